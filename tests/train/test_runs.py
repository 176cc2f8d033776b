"""Whole runs as processes: killed and resumed to the same bits, and the same steps for any number of ranks."""

import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastddpm import Schedule, UNet2D, checkpoints, ops
from fastddpm.cli.main import main
from fastddpm.core import noise
from fastddpm.reference.diffusion import Diffusion
from fastddpm.storage.files import TEMPORARY
from tests.support.check import assert_as_accurate
from tests.support.processes import run_ranks, start

STEPS = 40
OPTIONS = (
    f"--steps {STEPS} --batch-size 7 --warmup 5 --channels 8,16 --attention 1 --groups 4 --dropout 0.1 --flip "
    "--learning-rate 2e-3 --timesteps 50 --log-every 3 --save-every 4 --sample-every 16 --class-conditional "
    "--label-dropout 0.3 --precision fp32 --device cpu --quiet"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """8 x 8 pictures of squares on black, in two classes: dark squares and bright ones."""
    rng = np.random.default_rng(0)
    x = np.zeros((24, 8, 8, 1), np.uint8)
    for image, (i, j) in zip(x, rng.integers(0, 4, (24, 2)), strict=True):
        image[i : i + 4, j : j + 4] = rng.integers(64, 256)
    path = tmp_path_factory.mktemp("images") / "x.npz"
    np.savez(path, x=x, y=x.max((1, 2, 3)) // 160)
    return path


def arguments(images, out, options=OPTIONS):
    return ["train", str(images), "--out", str(out), *options.split()]


def command(arguments: list[str], hook: Callable[[], None] | None = None) -> int:
    """Run `fastddpm`, after a hook that watches or disturbs it."""
    if hook is not None:
        hook()
    return main(arguments)


def refuse_writing(event, args):
    """An audit hook that forbids writing named files of the run; `check_writable` uses a nameless one."""
    opened = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if (opened or event == "os.rename") and f"{os.sep}run{os.sep}" in str(args[0]) and Path(args[0]).suffix:
        raise PermissionError(f"rank {os.environ['RANK']} writes {args[0]}")


def record_steps(folder: Path, killed: tuple[int, int] | None = None) -> None:
    """Save the inputs and the resulting weights of each step of this rank in steps-RANK.pt.

    Ranks other than the first may not write into the folder of the run.

    Args: killed: (rank, step) at which that rank is killed.
    """
    rank, steps, now = int(os.environ["RANK"]), [], {}
    if rank:
        sys.addaudithook(refuse_writing)
    noising, forward = ops.noising, UNet2D.forward

    def noised(x_0, t, address, *args, **kwargs):
        now.update(x_0=x_0.clone(), t=t.clone(), address=address.clone())
        return noising(x_0, t, address, *args, **kwargs)

    def called(self, x_t, t, class_labels=None, *args, **kwargs):
        if self.training:
            now.update(x_t=x_t.clone(), class_labels=class_labels, config=dict(self.config))
        return forward(self, x_t, t, class_labels, *args, **kwargs)

    def before(optimizer, args, kwargs):
        if (rank, len(steps)) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if not steps:
            now["weights"] = [value.detach().clone() for value in _parameters(optimizer)]
            now["grads"] = [value.grad.clone() for value in _parameters(optimizer)]

    def after(optimizer, args, kwargs):
        values = b"".join(value.detach().numpy().tobytes() for value in _parameters(optimizer))
        steps.append({**now, "digest": hashlib.sha256(values).hexdigest()})
        now.clear()
        torch.save(steps, folder / f"steps-{rank}.pt")

    ops.noising, UNet2D.forward = noised, called
    warnings.filterwarnings("ignore", "this UNet2D is called as it is")  # in the grid, as its forward was replaced
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _parameters(optimizer):
    return [value for group in optimizer.param_groups for value in group["params"]]


def die_before(place: str, operation: int) -> None:
    """SIGKILL before the given operation (open, rename or remove) on paths that start with `place`, counted from 1."""
    left = [operation]

    def watch(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(place):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def die_writing(size: int) -> None:
    """Kill this process in the middle of the write that makes a file larger than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def records(out):
    """The log without times and rates."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def assert_same_run(out, want):
    assert records(out) == records(want)
    for folder in (out, want):
        assert not list(folder.rglob(f"*{TEMPORARY}"))
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(want) for path in want.rglob("*")}
    got, weights = checkpoints.load(out).parameters, checkpoints.load(want).parameters
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    for grid in (want / "samples").iterdir():
        assert (out / "samples" / grid.name).read_bytes() == grid.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run = [sys.executable, "-m", "fastddpm", *arguments(images, out)]
    done = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out


@pytest.mark.slow
def test_run_killed_many_times_equals_uninterrupted_run(images, uninterrupted, tmp_path):
    """Killed before operations on certain files and on any file, in the middle of writes, and at random times."""
    rng = np.random.default_rng(0)
    out, output, ends = tmp_path / "run", tmp_path / "output", []
    for place, most in (("", 40), (".loss", 2), (".training", 2), ("unet/.", 4)):
        size = int(np.exp(rng.uniform(np.log(50), np.log(150_000))))
        before = functools.partial(die_before, f"{out}/{place}", int(rng.integers(1, most, endpoint=True)))
        soon = functools.partial(signal_after, 3, signal.SIGKILL)  # at the latest: the stop below needs steps
        for hook in (before, functools.partial(die_writing, size), soon):
            process = start(output, command, arguments(images, out), hook)
            process.join(rng.uniform(0.2, 1.0) if hook is soon else None)
            process.kill()
            process.join()
            ends.append(process.exitcode)
    assert {-signal.SIGKILL, -signal.SIGXFSZ} <= set(ends) <= {0, -signal.SIGKILL, -signal.SIGXFSZ}
    # a stop, so that the next command finds the weights of its state; finally between the last state and its weights,
    # and before the grid is in its place
    process = start(output, command, arguments(images, out), functools.partial(signal_after, 1, signal.SIGTERM))
    process.join()
    assert process.exitcode == 143
    once = OPTIONS.replace("--save-every 4", f"--save-every {STEPS}")
    for place, operation in (("unet/.", 3), ("samples/.step", 2)):
        hook = functools.partial(die_before, f"{out}/{place}", operation)
        process = start(output, command, arguments(images, out, once), hook)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert torch.load(out / "training.pt")["progress"]["step"] == STEPS
    assert list((out / "samples").glob(f".*{TEMPORARY}"))
    process = start(tmp_path / "last", command, arguments(images, out))
    process.join()
    assert (process.exitcode, (tmp_path / "last").read_text()) == (0, "")
    assert_same_run(out, uninterrupted)


def signal_after(step: int, number: int, rank: str | None = None) -> None:
    """Send a signal to this process (or only to `rank`) after a step, before anything of the step is saved."""
    left = [step]

    def after(optimizer, args, kwargs):
        left[0] -= 1
        if not left[0] and rank in (None, os.environ.get("RANK")):
            os.kill(os.getpid(), number)

    register_optimizer_step_post_hook(after)


@pytest.mark.slow
def test_interrupted_run_saves_its_last_step(images, uninterrupted, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    ends = ((signal.SIGTERM, 5, 5, 143), (signal.SIGINT, 2, 7, 130), (signal.SIGINT, 5, 12, 130))
    for number, steps, reached, status in ends:  # between lines of the log, and where a save is due anyway
        hook = functools.partial(signal_after, steps, number)
        process = start(output, command, arguments(images, out, OPTIONS.replace("--quiet", "")), hook)
        process.join()
        assert process.exitcode == status
        assert torch.load(out / "training.pt")["progress"]["step"] == reached
        text = output.read_text()
        assert text.endswith(f"{out}: stopped after step {reached} of {STEPS}; the same command resumes the run\n")
    process = start(output, command, arguments(images, out))
    process.join()
    assert process.exitcode == 0
    assert_same_run(out, uninterrupted)


SHARED = (
    OPTIONS.replace(f"--steps {STEPS}", "--steps 6")
    .replace("--dropout 0.1", "--grad-clip inf")
    .replace("--log-every 3 --save-every 4 --sample-every 16", "--log-every 1 --save-every 2 --sample-every 6")
)


@pytest.fixture(scope="module")
def shared(images, tmp_path_factory):
    """{number of ranks: (folder of the run, [what `record_steps` saved of each rank])}"""
    runs = {}
    for size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{size}")
        hook = functools.partial(record_steps, folder)
        ends = run_ranks(folder, size, command, arguments(images, folder / "run", SHARED), hook)
        assert ends == ([0] * size, [""] * size)
        runs[size] = folder / "run", recorded(folder, size)
    return runs


def recorded(folder, size):
    return [torch.load(folder / f"steps-{rank}.pt") for rank in range(size)]


def together(ranks, k, name):
    """An input of step k of all ranks, in the order of their shares."""
    return torch.cat([steps[k][name] for steps in ranks])


def assert_steps_of_one_process(ranks, alone):
    for k, step in enumerate(alone):
        sizes = [len(steps[k]["t"]) for steps in ranks]
        assert (sum(sizes), max(sizes) - min(sizes)) == (7, 7 % len(ranks) > 0)
        for name in ("x_0", "t", "address", "x_t", "class_labels"):
            assert torch.equal(together(ranks, k, name), step[name]), name


def assert_same_weights(ranks):
    digests = [[step["digest"] for step in steps] for steps in ranks]
    assert digests == [digests[0]] * len(ranks)
    assert len(set(digests[0])) == len(digests[0])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_several_ranks_take_the_steps_of_one_process(shared, size):
    """Each rank takes its share of the same images, flips, classes, timesteps and noise; all have the same weights."""
    (one, [alone]), (out, ranks) = shared[1], shared[size]
    assert [len(steps) for steps in ranks] == [6] * size
    assert_steps_of_one_process(ranks, alone)
    assert_same_weights(ranks)
    assert [line["step"] for line in records(out)] == [1, 2, 3, 4, 5, 6]
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(one) for path in one.rglob("*")}


def gradients(step, dtype):
    """Loss and gradients of plain torch for the inputs and weights of a recorded step."""
    net = UNet2D(**step["config"])
    with torch.no_grad():
        for value, weights in zip(net.parameters(), step["weights"], strict=True):
            value.copy_(weights)
    net = net.to(dtype).train()
    eps = noise.normal(step["address"], step["x_0"].shape[1:], stream=noise.TRAIN, t=0).to(dtype)
    x_0 = step["x_0"].to(dtype) / 127.5 - 1
    process = Diffusion(Schedule(num_train_timesteps=50).betas)
    loss = process.loss(lambda x_t, t: net(x_t, t, step["class_labels"]), x_0, step["t"], eps)
    loss.backward()
    return loss.detach(), torch.cat([value.grad.flatten() for value in net.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_unequal_shares_count_as_one_batch(shared, size):
    """With 7 images on 2 or 3 ranks, the logged loss and the gradient are those of the mean over the batch."""
    out, ranks = shared[size]
    (loss, plain), (exact, ref) = (gradients(shared[1][1][0][0], dtype) for dtype in (torch.float32, torch.float64))
    for steps in ranks:
        assert_as_accurate(torch.cat([grad.flatten() for grad in steps[0]["grads"]]), plain, ref)
    assert_as_accurate(torch.tensor(records(out)[0]["loss"]), loss, exact)


@pytest.mark.slow
def test_run_resumes_with_another_number_of_ranks(images, shared, tmp_path):
    """One rank of two is killed: the other exits with one line. Three ranks resume, with the steps of one process."""
    out, (_, [alone]) = tmp_path / "run", shared[1]
    hook = functools.partial(record_steps, tmp_path, killed=(1, 4))
    (first, second), (output, _) = run_ranks(tmp_path, 2, command, arguments(images, out, SHARED), hook)
    assert (first, second) == (2, -signal.SIGKILL)
    assert output.startswith("fastddpm: error: RuntimeError: ")
    assert output.count("\n") == 1
    (folder := tmp_path / "resumed").mkdir()
    hook = functools.partial(record_steps, folder)
    assert run_ranks(folder, 3, command, arguments(images, out, SHARED), hook) == ([0] * 3, [""] * 3)
    ranks = recorded(folder, 3)
    assert [len(steps) for steps in ranks] == [2] * 3  # the state of step 4 was saved
    assert_steps_of_one_process(ranks, alone[4:])
    assert_same_weights(ranks)
    assert [line["step"] for line in records(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_signal_to_one_rank_stops_all(images, tmp_path):
    """At the next line of the log; the steps up to there are saved."""
    out, options = tmp_path / "run", SHARED.replace("--log-every 1 --save-every 2", "--log-every 3 --save-every 6")
    hook = functools.partial(signal_after, 2, signal.SIGTERM, rank="1")
    ends, _ = run_ranks(tmp_path, 2, command, arguments(images, out, options), hook)
    assert ends == [143] * 2
    assert torch.load(out / "training.pt")["progress"]["step"] == 3
    assert [line["step"] for line in records(out)] == [3]


@pytest.mark.slow
def test_error_of_all_ranks_is_one_line_each(images, tmp_path):
    """A batch smaller than the number of ranks: nothing is written, no rank waits."""
    ends, output = run_ranks(tmp_path, 3, command, arguments(images, tmp_path / "run", SHARED + " --batch-size 2"))
    assert ends == [2, 2, 2]
    assert set(output) == {
        "fastddpm: error: a batch of 2 cannot be split among 3 processes; enlarge it or start fewer\n"
    }
    assert not (tmp_path / "run").exists()


def hide_images(images: Path) -> None:
    """Make rank 1 unable to read the images."""
    if os.environ["RANK"] == "1":
        os.chdir(images.parent.parent)


@pytest.mark.slow
def test_images_that_one_rank_cannot_read_stop_all(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    hook = functools.partial(hide_images, images)
    ends, output = run_ranks(tmp_path, 2, command, arguments(images.name, tmp_path / "run", SHARED), hook)
    assert ends == [2, 2]
    assert len(set(output)) == 1
    assert output[0].startswith(f"fastddpm: error: cannot read {images.name}: No such file or directory; want ")
    assert output[0].count("\n") == 1


def command_with_other_options(arguments: list[str], others: list[str]) -> int:
    """`command`, with further options on rank 1."""
    return command(arguments + others * (os.environ["RANK"] == "1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "line"),
    [
        (["--out", "/proc/run"], "cannot write /proc/run: No such file or directory; name another place"),
        (["--warmup", "-1"], "warmup is -1; want a whole number from 0 to "),
        (
            ["--precision", "bf16"],
            "precision is fp32 in process 0, bf16 in process 1; give all of them the same",
        ),
    ],
)
def test_other_options_on_one_rank_stop_all(images, tmp_path, others, line):
    ends, output = run_ranks(
        tmp_path, 2, command_with_other_options, arguments(images, tmp_path / "run", SHARED), others
    )
    assert ends == [2, 2]
    assert len(set(output)) == 1
    assert output[0].startswith(f"fastddpm: error: {line}")


@pytest.mark.slow
def test_torchrun_reports_one_line_of_each_rank(tmp_path):
    """With exit status 2; the only traceback is torchrun's own."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastddpm"]
    done = subprocess.run(
        [*run, *arguments(tmp_path / "absent.npz", tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    lines = {line for line in done.stderr.splitlines() if "fastddpm: error" in line}
    assert len(lines) == 1
    assert lines.pop().startswith(f"fastddpm: error: cannot read {tmp_path / 'absent.npz'}: No such file")
    assert done.stderr.count("Traceback") == 1
    assert "exitcode  : 2" in done.stderr
    assert done.stdout == ""
