"""Processes that share a job: their shares, sums with the same bits on all ranks, errors that reach all ranks."""

import json
import os
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastddpm.processes.distributed import AgreedError, Ranks, ranks
from tests.support.check import error_line
from tests.support.processes import run_ranks


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [64, 65, 127, 1000])
def test_shares_follow_each_other_and_are_even(size, count):
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in range(count)[share]] == list(range(count))
    lengths = {share.stop - share.start for share in shares}
    assert max(lengths) - min(lengths) <= 1


def test_batch_smaller_than_the_number_of_processes_is_refused():
    assert "a batch of 2 cannot be split among 3 processes; enlarge it or start fewer" in error_line(
        Ranks(1, 3).share, 2
    )


@pytest.mark.parametrize("device", [None, "cpu", "not looked at"])
def test_without_torchrun_there_is_one_process(device, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for every process
    with ranks(device) as alone:
        assert alone == Ranks(0, 1, device)
        assert not dist.is_initialized()
        x = torch.tensor([3.0])
        alone.sum_([x])
        assert x.tolist() == [3.0]
        alone.agree_on({"what": object()})
        with pytest.raises(KeyError, match="as it is"), alone.agree():
            raise KeyError("as it is")


@pytest.mark.parametrize(
    ("environment", "size", "alone"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node7"}, 2, True),
        ({"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node7"}, 4, False),
        ({"MASTER_ADDR": "localhost"}, 4, True),
        ({"MASTER_ADDR": "127.0.0.1"}, 4, True),
        ({"MASTER_ADDR": "10.0.0.1"}, 4, False),
    ],
)
def test_one_machine_is_recognised(environment, size, alone, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Ranks(0, size).on_one_machine() == alone


@pytest.mark.parametrize(
    "value", ["", "two", "-1", "2.0", "9" * 5000, "\N{ARABIC-INDIC DIGIT NINE}"], ids=lambda x: ascii(x[:9])
)
def test_environment_without_numbers_is_refused(second_of_two, monkeypatch, value):
    for name, other in (("WORLD_SIZE", "16"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
        message = error_line(enter, "cuda")
        assert message.startswith(f"{name} is ")
        assert message.endswith(" in the environment; want a whole number, as torchrun sets it, or none")
        monkeypatch.setenv(name, other)
    assert second_of_two == []


def test_existing_group_is_used_and_left_open(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with ranks("cpu") as joined:
            assert joined == Ranks(0, 1, "cpu")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.fixture
def second_of_two(monkeypatch):
    """As torchrun starts it on one of eight machines with two GPUs; joining is recorded, not done."""
    for name, value in {"RANK": 9, "WORLD_SIZE": 16, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    called = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("set_device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: called.append(("init", args, kwargs)))
    monkeypatch.setattr(dist, "get_rank", lambda: 9)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroy"))
    return called


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")], ids=str)
def test_each_process_takes_its_gpu(second_of_two, device):
    own = torch.device("cuda", 1)
    with ranks(device) as joined:
        assert joined == Ranks(9, 16, own)
        assert second_of_two == [("set_device", own), ("init", ("cpu:gloo,cuda:nccl",), {"device_id": own})]
    assert second_of_two[2:] == ["destroy"]


def test_cpu_may_be_asked_for_beside_gpus(second_of_two):
    with ranks("cpu") as joined:
        assert joined == Ranks(9, 16, "cpu")
    assert second_of_two == [("init", ("gloo",), {"device_id": None}), "destroy"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("error", [AgreedError, RuntimeError])
def test_group_is_closed_after_an_agreed_error(second_of_two, device, error):
    """Not after an error of this rank alone: nccl would wait for the others, which would exit before it is printed."""
    with pytest.raises(error, match="of all"), ranks(device):
        raise error("of all")
    assert ("destroy" in second_of_two) == (error is AgreedError)


def enter(device):
    with ranks(device):
        pass


def test_unavailable_gpus_are_refused(second_of_two, monkeypatch):
    assert "device is 'cuda:0', but each of several processes needs its own GPU; give 'cuda'" in error_line(
        enter, "cuda:0"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    want = "there is no GPU for process 1: this machine has 1; give --nproc-per-node 1"
    assert error_line(enter, "cuda") == want
    assert second_of_two == []


def test_unreachable_processes_are_reported(second_of_two, monkeypatch):
    def refuse(*args, **kwargs):
        raise dist.DistNetworkError("refused\n")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    want = "cannot join the 16 processes of torchrun: DistNetworkError: refused; start them all"
    assert error_line(enter, "cpu") == want


def say(**said):
    print(json.dumps(said), flush=True)


def values(rank):
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(rank))


def sums():
    with ranks("cpu") as r:
        summed = [values(r.rank).to(memory_format=torch.channels_last), torch.tensor(float(r.rank + 1)), torch.zeros(0)]
        before = [x.data_ptr() for x in summed]
        r.sum_(summed)
        same = before == [x.data_ptr() for x in summed]
        say(rank=r.rank, size=r.size, device=r.device, same=same, sums=[x.tolist() for x in summed])
    say(left=not dist.is_initialized())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_have_the_same_bits_on_every_rank(size, tmp_path):
    """For a channels-last tensor, a number (its sum is exact) and an empty tensor."""
    ends, outputs = run_ranks(tmp_path, size, sums)
    assert ends == [0] * size, outputs
    said, left = zip(*([json.loads(line) for line in text.splitlines()] for text in outputs), strict=True)
    first = {"size": size, "device": "cpu", "same": True, "sums": said[0]["sums"]}
    assert list(said) == [{"rank": rank, **first} for rank in range(size)]
    assert list(left) == [{"left": True}] * size
    total, whole, nothing = said[0]["sums"]
    assert (whole, nothing) == (size * (size + 1) / 2, [])
    parts = [values(rank) for rank in range(size)]
    orders = torch.stack([sum(parts[i:] + parts[:i]) for i in range(size)])  # for each rank that may come first
    assert (orders == torch.tensor(total)).any(0).all()


def agreements():
    with ranks("cpu") as r:
        said = []
        for failing in ([], [1], [1, 2], [0, 1, 2]):
            try:
                with r.agree():
                    if r.rank in failing:
                        raise RuntimeError("two\n lines") if failing == [1] else ValueError(r.rank)
            except AgreedError as error:
                said.append([str(error), error.__cause__ is not None])
        r.agree_on({"step": 4})
        try:
            r.agree_on({"step": 4, "data": r.rank // 2})
        except AgreedError as error:
            said.append(str(error))
        say(said=said)


@pytest.mark.slow
def test_error_on_one_rank_is_raised_on_all(tmp_path):
    """If several fail, the error of the first; afterwards the ranks still work together."""
    ends, outputs = run_ranks(tmp_path, 3, agreements)
    assert ends == [0] * 3, outputs
    for rank, text in enumerate(outputs):
        assert json.loads(text)["said"] == [
            ["RuntimeError: two lines", rank == 1],
            ["1", rank in (1, 2)],
            ["0", True],
            "data is 0 in process 0, 1 in process 2; give all of them the same data, options and folder",
        ]


def failure(agreed):
    with ranks("cpu") as r:
        with r.agree() if agreed else nullcontext():
            if r.rank == 1:
                raise ValueError("of rank one alone")
        r.sum_([torch.zeros(3)])


@pytest.mark.slow
@pytest.mark.parametrize("agreed", [True, False])
def test_failing_rank_ends_the_others(agreed, tmp_path):
    """Also while they wait for it in a sum."""
    ends, outputs = run_ranks(tmp_path, 3, failure, agreed)
    assert ends == [1] * 3
    assert [text.splitlines()[-1].endswith("Error: of rank one alone") for text in outputs] == [agreed, True, agreed]


def test_one_process_meets_and_gathers_alone():
    assert Ranks().meeting()()() is True
    assert Ranks().gather({"any": "thing"}) == [{"any": "thing"}]


def gathered():
    with ranks("cpu") as r:
        say(got=r.gather({"rank": r.rank, "odd": [None] * r.rank}), none=r.gather(None))


@pytest.mark.slow
def test_gathered_values_are_in_the_order_of_the_ranks(tmp_path):
    ends, outputs = run_ranks(tmp_path, 3, gathered)
    assert ends == [0] * 3, outputs
    want = {"got": [{"rank": rank, "odd": [None] * rank} for rank in range(3)], "none": [None] * 3}
    assert [json.loads(text) for text in outputs] == [want] * 3


def disagreeing():
    with ranks("cpu") as r:
        try:
            r.agree_on({"same": 1, "long": f"{r.rank}" * 1000, "other": r.rank})
        except AgreedError as error:
            say(said=str(error))


@pytest.mark.slow
def test_long_facts_are_shortened_in_errors(tmp_path):
    ends, outputs = run_ranks(tmp_path, 2, disagreeing)
    assert ends == [0] * 2, outputs
    what = f"long is {'0' * 200} in process 0, {'1' * 200} in process 1"
    want = f"{what}; give all of them the same data, options and folder"
    assert [json.loads(text)["said"] for text in outputs] == [want] * 2


def until(condition):
    while not condition():
        time.sleep(0.01)


def meetings(folder):
    """The second rank arrives after the first has waited for longer than the timeout of other operations."""
    store = next(dist.rendezvous("env://"))[0]
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(milliseconds=300))
    with ranks("cpu") as r:
        first, second = r.meeting(), r.meeting()
        if r.rank == 1:
            until((folder / "waited").exists)
        there = first()
        if r.rank == 0:
            began, looks = time.monotonic(), []
            while time.monotonic() < began + 0.7:
                looks.append(there())
                time.sleep(0.01)
            (folder / "waited").touch()
            say(early=any(looks))
        until(there)
        until(second())
        say(met=r.gather(r.rank))
    dist.destroy_process_group()


@pytest.mark.slow
def test_late_rank_is_waited_for(tmp_path):
    """No rank continues before; two meetings do not interfere."""
    ends, (first, second) = run_ranks(tmp_path, 2, meetings, tmp_path)
    assert ends == [0, 0], (first, second)
    assert [json.loads(line) for line in first.splitlines()] == [{"early": False}, {"met": [0, 1]}]
    assert json.loads(second) == {"met": [0, 1]}


def lost(folder):
    with ranks("cpu") as r:
        meet = r.meeting()
        if r.rank == 1:
            until((folder / "waits").exists)
            os._exit(7)
        there = meet()
        assert not there()
        (folder / "waits").touch()
        try:
            until(there)
        except RuntimeError as error:
            say(lost=type(error).__name__)
            os._exit(3)  # the group can no longer be closed


@pytest.mark.slow
def test_lost_rank_is_not_waited_for(tmp_path):
    ends, outputs = run_ranks(tmp_path, 2, lost, tmp_path)
    assert ends == [3, 7], outputs
    assert "lost" in json.loads(outputs[0])
