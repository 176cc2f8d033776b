"""The ladder holds on this machine, and each rung of it breaks when the fast side of that rung is wrong."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median_low

import pytest
import torch

from fastddpm import checkpoints
from fastddpm.cli.main import main
from fastddpm.core.schedule import LEARNED_VARIANCE_TYPES, Schedule
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling import sampler
from fastddpm.verify import ladder, rungs
from fastddpm.verify.rungs import OF_KERNELS, RUNGS, Case, Checkpoint, Record
from tests.conftest import needs_gpu
from tests.support import check

NETWORK = {**check.TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1}
SCHEDULE = Schedule(num_train_timesteps=12, beta_end=0.4)  # x_T is noise: abar_T = 0.05
CPU = torch.device("cpu")


def saved(folder, schedule=SCHEDULE, **config):
    torch.manual_seed(0)
    net = UNet2D(**NETWORK | config)
    checkpoints.save(folder, net.config, net.state_dict(), schedule)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of a random network, 8 x 8 grey."""
    return saved(tmp_path_factory.mktemp("tiny"))


interpreted = cache(ladder._climb_interpreted)


@pytest.fixture
def in_this_process(monkeypatch):
    """Triton interprets here, and need not be started anew; what is not damaged, once."""
    if torch.cuda.is_available():
        return
    pytest.importorskip("triton")
    monkeypatch.setattr(
        ladder, "_interpreted", lambda schedule, damage: interpreted(schedule, damage if damage in OF_KERNELS else None)
    )


def climbed(capsys, *arguments):
    """Exit status of fastddpm verify, and its comparisons, JSON without NaN and infinity."""
    status = main(["verify", "--json", "--quiet", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out, parse_constant=pytest.fail)
    assert told["passed"] == (status == 0)
    return status, told["records"]


def failed(records):
    return {record["rung"] for record in records if record["verdict"] == "FAIL"}


def only(monkeypatch, *names):
    monkeypatch.setattr(ladder, "RUNGS", {name: RUNGS[name] for name in names})
    monkeypatch.setattr(ladder, "OF_KERNELS", ())


# The ladder


@pytest.mark.slow
def test_the_ladder_holds(tiny, capsys):
    status, records = climbed(capsys, tiny)
    assert status == 0, [record for record in records if record["verdict"] == "FAIL"]
    assert list(dict.fromkeys(record["rung"] for record in records)) == list(RUNGS)
    on_gpu = torch.cuda.is_available()
    skipped = {record["rung"]: record["note"] for record in records if record["verdict"] == "skipped"}
    assert skipped == ({} if on_gpu else {"engines": "cpu has no CUDA graphs"})
    for name in OF_KERNELS:
        text = " ".join(record["compared"] for record in records if record["rung"] == name)
        wanted = ["the kernel"] if on_gpu else ["torch", "the interpreted kernel"]
        assert all(f"by {who}" in text for who in wanted)
    compared = {record["compared"] for record in records}
    for precision in ("fp32", "bf16", "fp16", *(["tf32"] if on_gpu else [])):
        for measure in ("max", "rms"):
            assert f"{precision} U-Net with the float64 reference, {measure}" in compared
    for precision in ("fp32", "bf16"):
        assert f"{precision} trajectory of 12 steps with float64, median rms" in compared


def test_four_thousand_steps_need_exact_waves(tmp_path, monkeypatch):
    only(monkeypatch, "unet")
    schedule = Schedule(num_train_timesteps=4000, beta_start=2.5e-5, beta_end=0.005)
    records = ladder.verify(saved(tmp_path, schedule), device="cpu", progress=False)
    assert [record.verdict for record in records] == ["pass"] * 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("rung", [*RUNGS])
def test_a_damaged_rung_fails_and_no_other(rung, tiny, capsys, in_this_process):
    if rung == "engines" and not torch.cuda.is_available():
        pytest.skip("it is a rung of GPUs")
    status, records = climbed(capsys, tiny, "--damage", rung, "--steps", "6")
    assert status == 1
    assert failed(records) == {rung}
    if rung in OF_KERNELS and not torch.cuda.is_available():
        both = [record["verdict"] for record in records if record["rung"] == rung]
        assert both[: len(both) // 2].count("FAIL") >= 1  # in torch
        assert both[len(both) // 2 :].count("FAIL") >= 1  # in the interpreter


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_damage_reaches_the_interpreter():
    pytest.importorskip("triton")
    records = ladder._interpreted(SCHEDULE, "step")
    assert {record.rung for record in records} == set(OF_KERNELS)
    assert {record.rung for record in records if record.verdict != "pass"} == {"step"}
    assert all(isinstance(record, Record) for record in records)


@pytest.mark.parametrize("name", [*OF_KERNELS, "forward"])
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule(num_train_timesteps=1),
        Schedule(clip_sample=False, variance_type="fixed_large"),
        Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        Schedule(50, prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0),
        Schedule(beta_schedule="squaredcos_cap_v2"),  # whose first step predicts x_0 by a division by 5e-5
    ],
    ids=["default", "one step", "unclipped", "v", "x_0", "cosine"],
)
def test_rungs_without_a_network_hold_for_other_schedules(schedule, name):
    records = ladder._climb(name, Case(schedule, CPU, "torch"), False)
    assert [record for record in records if record.verdict != "pass"] == []
    damaged = ladder._climb(name, Case(schedule, CPU, "torch"), True)
    verdicts = {record.verdict for record in damaged}
    assert verdicts == {"FAIL"} if name == "loss" else "FAIL" in verdicts


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"num_class_embeds": 3},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"sample_size": (8, 4), "in_channels": 3, "out_channels": 3, "resnet_time_scale_shift": "scale_shift"},
    ],
    ids=["classes", "classes by time", "embeddings", "scale and shift"],
)
def test_other_networks(config, tmp_path, monkeypatch):
    only(monkeypatch, "unet", "trajectory", "batch", "distribution")
    records = ladder.verify(saved(tmp_path, **config), steps=4, progress=False)
    assert [record for record in records if record.verdict != "pass"] == []
    assert {record.rung for record in records} == {"unet", "trajectory", "batch", "distribution"}


@pytest.mark.parametrize("variance_type", LEARNED_VARIANCE_TYPES)
def test_learned_variances_are_judged_without_sampling(variance_type, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "OF_KERNELS", ())
    source = saved(tmp_path, replace(SCHEDULE, variance_type=variance_type), out_channels=2)
    records = ladder.verify(source, device="cpu", progress=False)
    verdicts = {(record.rung, record.verdict) for record in records}
    sampling = {"step", "step64", "engines", "trajectory", "batch", "distribution"}
    assert verdicts == {(name, "skipped" if name in sampling else "pass") for name in RUNGS}
    note = f"sampling with variance_type '{variance_type}' is not supported"
    assert {record.note for record in records if record.verdict == "skipped"} == {note}
    only(monkeypatch, "unet", "trajectory")
    assert ladder.verify(source, device="cpu", damage="unet", progress=False)[0].verdict == "FAIL"
    message = check.error_line(ladder.verify, source, device="cpu", damage="trajectory", progress=False)
    assert message == f"damage is 'trajectory', but that rung is skipped: {note}; choose another"


@pytest.mark.parametrize(("variance_type", "channels"), [("learned_range", 1), ("fixed_small", 2)])
def test_a_network_that_does_not_go_with_the_variance_is_refused(variance_type, channels, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "_climb", None)
    source = saved(tmp_path, replace(SCHEDULE, variance_type=variance_type), out_channels=channels)
    message = check.error_line(ladder.verify, source, device="cpu")
    assert message.startswith(f"variance_type is '{variance_type}', for which the network must return {3 - channels} ")
    assert f"but it returns {channels}; use a" in message


def test_the_network_is_judged_at_both_ends_and_in_the_middle(tiny, monkeypatch):
    plain, seen = Checkpoint.plain, set()

    def noted(case, precision, x, t, labels):
        seen.add((precision, t))
        return plain(case, precision, x, t, labels)

    only(monkeypatch, "unet")
    monkeypatch.setattr(Checkpoint, "plain", noted)
    ladder.verify(tiny, device="cpu", progress=False)
    assert seen == {(precision, t) for precision in ("fp32", "bf16", "fp16", "fp64") for t in (0, 6, 11)}


def test_steps_are_those_of_the_trajectory(tiny, monkeypatch):
    only(monkeypatch, "trajectory")
    for steps, t in ((None, range(11, -1, -1)), (3, (8, 4, 0)), (1, (0,))):
        fp32, bf16 = ladder.verify(tiny, steps=steps, progress=False)
        assert f" of {len(t)} steps " in fp32.compared
        assert [at for at, _, _ in fp32.steps] == [at for at, _, _ in bf16.steps] == list(t)
        for record in (fp32, bf16):
            errors, plain = ([point[i] for point in record.steps] for i in (1, 2))
            assert record.error == median_low(errors)
            assert record.bound == 2 * median_low(plain)
            decibel = [20 * math.log10(2 / values[-1]) for values in (errors, plain)]  # of [-1, 1]
            assert record.note == "PSNR of x_0 {:.1f} dB, plain torch's {:.1f}".format(*decibel)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_a_trajectory_that_begins_without_an_error(seed, tmp_path, monkeypatch):
    """All of x_0 is clipped at first: the network's rounding shows in ours and in plain torch's at other steps."""
    only(monkeypatch, "trajectory")
    torch.manual_seed(seed)
    net = UNet2D(**NETWORK)
    schedule = Schedule(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    checkpoints.save(tmp_path, net.config, net.state_dict(), schedule)
    records = ladder.verify(tmp_path, progress=False)
    assert [record.verdict for record in records] == ["pass"] * 4
    ours, plain = torch.tensor(records[2].steps)[:, 1:].unbind(1)
    assert (ours[1:] / torch.maximum(plain[1:], ours[:-1])).max() > 100


@pytest.mark.parametrize("row", [0, 5, 11])
def test_a_single_wrong_step_is_seen(row, tiny, monkeypatch):
    def off(table, damage):
        rows = table.rows.clone()
        rows[row, 4:7] *= 1.001
        return replace(table, rows=rows)

    only(monkeypatch, "trajectory")
    monkeypatch.setattr(rungs, "_off", off)
    monkeypatch.setattr(rungs, "LONG", 12)
    records = {record.compared: record for record in ladder.verify(tiny, progress=False)}
    assert records["fp32 trajectory of 12 steps, growth of the error in one"].verdict == "FAIL"


def test_a_wrong_seed_is_seen(tiny, monkeypatch):
    """By the samples themselves, though their distribution is right."""
    only(monkeypatch, "distribution")
    assert [record.verdict for record in ladder.verify(tiny, progress=False)] == ["pass", "pass"]
    address = sampler._address
    monkeypatch.setattr(sampler, "_address", lambda seed, samples: address(seed + 1, samples))
    assert [record.verdict for record in ladder.verify(tiny, progress=False)] == ["FAIL", "pass"]


CHAIN = "the moments of the chain at every t"
ONE_SHOT = "x_T by all steps with that by one shot in float64"


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "seen"),
    [
        (rungs, "_moments", lambda moments: moments + 1e-9, f"sqrt(abar_t) with {CHAIN}"),
        (rungs, "_moments", lambda moments: moments + 1e-9, f"1 - abar_t with {CHAIN}"),
        (Schedule, "noising_table", lambda table: table.nextafter(table + 1), f"the float32 table with {CHAIN}"),
        (rungs.Diffusion, "diffuse", lambda x: x * (1 + 1e-9), ONE_SHOT),
        (rungs.noise, "normal", lambda z: z + 0.3, "eps of all steps, its mean with 0"),
        (rungs.noise, "normal", lambda z: z * 1.2, "eps of all steps, its variance with 1"),
        (rungs.ops, "noising", lambda x: x + 0.02, "eps of x_T by torch, its mean with 0"),
        (rungs.ops, "noising", lambda x: x * 1.01, "eps of x_T by torch, its variance with 1"),
        (rungs.ops, "noising", lambda x: -x, "what x_T by torch holds of x_0"),
    ],
)
def test_the_forward_process_is_judged_in_every_way(owner, name, wrong, seen, monkeypatch):
    case, right = Case(SCHEDULE, CPU, "torch"), getattr(owner, name)
    assert {record.verdict for record in ladder._climb("forward", case, False)} == {"pass"}
    monkeypatch.setattr(owner, name, lambda *args, **how: wrong(right(*args, **how)))
    assert seen in {record.compared for record in ladder._climb("forward", case, False) if record.verdict == "FAIL"}


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "laplace", "sigmoid", "scaled_linear"])
def test_the_forward_process_holds_for_every_schedule(name):
    records = ladder._climb("forward", Case(Schedule(beta_schedule=name), CPU, "torch"), False)
    assert [record.verdict for record in records] == ["pass"] * 9


def test_a_last_beta_of_1_forgets_all():
    for schedule in (
        Schedule(8, rescale_betas_zero_snr=True, prediction_type="sample"),
        Schedule(1, trained_betas=[1.0], prediction_type="sample"),
    ):
        records = ladder._climb("forward", Case(schedule, CPU, "torch"), False)
        assert {record.verdict for record in records} == {"pass"}
        assert records[-1].note == "L_T is at most 0 bits/dim"


@pytest.mark.parametrize(
    ("name", "wrong", "seen"),
    [
        ("eps_loss", lambda error: error + error.detach() / 1e6, "loss by torch"),
        ("eps_loss", lambda error: error + (error / 1e3 - (error / 1e3).detach()), "its gradient by torch"),
        ("x_0_error", lambda error: error.nextafter(error + 1), "the error of x_0 by torch"),
    ],
    ids=["loss", "gradient", "x_0"],
)
def test_a_wrong_loss_and_a_wrong_gradient_are_told_apart(name, wrong, seen, monkeypatch):
    right = getattr(rungs.ops, name)
    monkeypatch.setattr(rungs.ops, name, lambda *args, **how: wrong(right(*args, **how)))
    records = ladder._climb("loss", Case(SCHEDULE, CPU, "torch"), False)
    assert len(records) == 7
    assert all((record.verdict == "FAIL") == (seen in record.compared) for record in records)


# What a verdict means


def test_a_verdict_is_nan_proof():
    assert Record("r", "c").verdict == Record("r", "c", bound=1).verdict == "skipped"
    for error, bound in ((0, 0), (1.0, 1.0), (0.0, 5.0)):
        assert Record("r", "c", error, bound).verdict == "pass"
    for error, bound in ((1, 0), (1.01, 1), (math.nan, 1), (1, math.nan), (math.nan, math.nan), (math.inf, math.inf)):
        assert Record("r", "c", error, bound).verdict == "FAIL"
    assert Record("r", "c", 1, math.inf).verdict == "FAIL"


def test_unequal_bits_are_counted():
    want = torch.tensor([[0.0, 1.0], [2.0, math.nan]])
    assert rungs.unequal(want.clone(), want) == 0
    for place, value in (((0, 0), -0.0), ((0, 1), 1 + 2**-23), ((1, 0), math.nan)):
        got = want.clone()
        got[place] = value
        assert rungs.unequal(got, want) == 1
    assert rungs.unequal(want[:1], want) == rungs.unequal(want.double(), want) == math.inf
    assert rungs.unequal(torch.tensor([1, 3]), torch.tensor([1, 2])) == 1
    assert rungs.unequal(want.half(), want.half() + 1) == 3


def test_accuracy_wants_one_shape():
    x = torch.zeros(2, 3)
    message = check.error_line(rungs.accuracy, x, x, x[:1].double())
    assert message == "ours is (2, 3), plain (2, 3), ref (1, 3); want one"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_breaks_fails(value, tiny):
    one, other = (ladder.Sampler.from_pretrained(tiny, precision="fp32", device="cpu") for _ in range(2))
    case = Checkpoint(one.schedule, CPU, "torch", one.model, one.shape)
    with torch.no_grad():
        for precision in ("fp64", *case.precisions):
            case.plain(precision, torch.zeros(1, 1, 8, 8), 0, None)  # made now, of sound weights
        other.model.conv_out.bias[0] = value
    case.net = other.model
    for name in ("unet", "trajectory", "distribution"):
        records = ladder._climb(name, case, False)
        assert records
        assert {record.verdict for record in records} == {"FAIL"}


def test_what_raises_has_failed_and_the_rest_goes_on(tiny, monkeypatch):
    def broken(case, damage):
        yield Record("words", "first", 0, 0)
        raise ZeroDivisionError("on\ntwo lines")

    only(monkeypatch, "words", "step")
    monkeypatch.setitem(ladder.RUNGS, "words", broken)
    first, second, *others = ladder.verify(tiny, progress=False)
    assert (first.compared, first.verdict) == ("first", "pass")
    assert (second.rung, second.verdict, second.note) == ("words", "FAIL", "ZeroDivisionError: on two lines")
    assert {record.rung for record in others} == {"step"}


def test_where_plain_torch_overflows_nothing_is_compared(tiny, monkeypatch):
    plain = Checkpoint.plain

    def overflowing(case, precision, *args):
        return plain(case, precision, *args) + (math.inf if precision == "fp16" else 0)

    monkeypatch.setattr(Checkpoint, "plain", overflowing)
    only(monkeypatch, "unet")
    records = ladder.verify(tiny, device="cpu", progress=False)
    assert [record.verdict for record in records] == ["pass"] * 4 + ["skipped"]
    assert records[-1].note == "plain torch overflows in fp16"


# Triton's interpreter


def test_without_triton_the_interpreter_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text("raise ImportError('it is not for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records = ladder._interpreted(SCHEDULE, None)
    assert [record.rung for record in records] == list(OF_KERNELS)
    assert {(record.verdict, record.note) for record in records} == {
        ("skipped", "no Triton: it is not for this machine")
    }


def test_an_interpreter_that_crashes_has_failed(tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text("raise SystemError('triton is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records = ladder._interpreted(SCHEDULE, None)
    assert {(record.verdict, record.note) for record in records} == {("FAIL", "SystemError: triton is broken")}


def test_triton_is_not_imported_on_a_cpu(tiny):
    code = """
import sys
from fastddpm import verify
verify._interpreted = lambda *_: []  # in another process
verify.verify(sys.argv[1], device="cpu", steps=1, progress=False)
assert not {"triton", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, tiny], check=True)


# Arguments and output


def test_published_numbers_are_those_of_the_standard():
    vectors = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
    published = [[" ".join(case[key]) for key in ("counter", "key", "words")] for case in vectors["philox4x32_10"]]
    assert [list(line) for line in rungs.WORDS] == published
    normals = {
        (case["seed"], case["stream"], case["sample"], case["t"], " ".join(case["bits"][:4]))
        for case in vectors["normals"]
    }
    assert set(rungs.NORMALS) <= normals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damage": "stepp"}, f"damage is 'stepp'; want one of the rungs {', '.join(RUNGS)}"),
        ({"steps": 13}, "steps is 13; want a whole number from 1 to 12"),
        ({"device": "abacus"}, "device is 'abacus'; want 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, message, tiny, monkeypatch):
    monkeypatch.setattr(ladder, "_climb", None)
    assert check.error_line(ladder.verify, tiny, **arguments) == message


def test_a_rung_that_is_skipped_cannot_be_damaged(tiny, monkeypatch):
    only(monkeypatch, "words", "engines")
    message = check.error_line(ladder.verify, tiny, device="cpu", damage="engines", progress=False)
    assert message == "damage is 'engines', but that rung is skipped: cpu has no CUDA graphs; choose another"


def test_the_table_is_read_on_a_terminal():
    records = [
        Record("step", "update by torch with the float32 reference", 0, 0),
        Record("unet", "fp32 U-Net, max", 1.25e-6, 2e-6),
        Record("engines", "CUDA graph with eager", note="cpu has no CUDA graphs"),
        Record(
            "trajectory", "bf16 trajectory", 0.001, 0.0015, "PSNR of x_0 40.0 dB", [(11, 1e-4, 2e-4), (0, 1e-3, 9e-4)]
        ),
    ]
    head, step, unet, engines, trajectory, along, points, verdict = ladder.table(records).splitlines()
    assert head.split() == ["rung", "compared", "error", "bound"]
    assert step == "step        update by torch with the float32 reference  0 differ  equal   pass"
    assert unet.split() == ["unet", "fp32", "U-Net,", "max", "1.25e-06", "2e-06", "pass"]
    assert engines.endswith("  skipped  cpu has no CUDA graphs")
    assert trajectory.endswith("0.001     0.0015  pass     PSNR of x_0 40.0 dB")
    assert along == "bf16 trajectory, rms error after t (plain torch's):"
    assert points == "  11: 1.0e-04 (2.0e-04), 0: 1.0e-03 (9.0e-04)"
    assert verdict == "passed: all 3 comparisons; 1 skipped"
    records[0] = replace(records[0], error=7)
    records[1] = replace(records[1], error=math.nan)
    _, step, unet, *_, verdict = ladder.table(records).splitlines()
    assert step.endswith("7 differ  equal   FAIL")
    assert unet.split()[-3:] == ["nan", "2e-06", "FAIL"]
    assert verdict == "FAILED: 2 of 3 comparisons, in step, unet"


def test_the_command_prints_the_table_below_a_bar(tiny, capsys, monkeypatch):
    only(monkeypatch, "words", "trajectory")
    assert main(["verify", tiny, "--steps", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "passed: all 3 comparisons; 0 skipped"
    assert "verify" in err
    assert "trajectory" in err
    assert main(["verify", tiny, "--steps", "3", "--quiet", "--damage", "words"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "FAILED: 1 of 3 comparisons, in words"
    assert err == ""


def test_json_has_no_nan(tiny, capsys, monkeypatch):
    only(monkeypatch, "words")
    monkeypatch.setitem(ladder.RUNGS, "words", lambda *_: iter([Record("words", "c", math.nan, math.inf)]))
    status, records = climbed(capsys, tiny)
    assert status == 1
    assert records == [
        {"rung": "words", "compared": "c", "error": "nan", "bound": "inf", "note": "", "steps": [], "verdict": "FAIL"}
    ]


def test_damage_is_a_secret(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    text = capsys.readouterr().out
    assert "--steps" in text
    assert "damage" not in text


# On a GPU


@pytest.mark.parametrize("damage", [None, "engines", "step", "forward", "loss", "norm", "trajectory"])
@pytest.mark.parametrize("mark", [pytest.param("cuda", marks=needs_gpu)])
def test_the_ladder_of_a_gpu(mark, damage, tiny, capsys):
    status, records = climbed(capsys, tiny, "--device", mark, *(["--damage", damage] if damage else []))
    assert failed(records) == ({damage} if damage else set())
    assert status == (1 if damage else 0)
    assert "skipped" not in {record["verdict"] for record in records}
