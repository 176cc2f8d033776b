"""The ladder holds on this machine, and each rung fails when the side under test is wrong."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from fastddpm import checkpoints
from fastddpm.cli.main import main
from fastddpm.core.schedule import LEARNED_VARIANCE_TYPES
from fastddpm.core.table import StepColumns
from fastddpm.networks.unet2d import UNet2D
from fastddpm.verify import interpreter, kernel_rungs, rungs, sampling_rungs
from fastddpm.verify.accuracy import Record
from fastddpm.verify.ladder import verify
from fastddpm.verify.rungs import OF_KERNELS, RUNGS
from tests.conftest import needs_gpu
from tests.support import check
from tests.verify.checkpoint import NETWORK, SCHEDULE, save_tiny

interpreted = cache(interpreter.climb_interpreted)


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the interpreter in this process, and the undamaged rungs of kernels only once."""
    if torch.cuda.is_available():
        return
    pytest.importorskip("triton")

    def records(schedule, damage):
        return interpreted(schedule, damage if damage in OF_KERNELS else None)

    monkeypatch.setattr(interpreter, "interpreted_records", records)


def run_json(capsys, *arguments):
    """Exit status and comparisons of `fastddpm verify --json`. The JSON must not contain NaN or infinity."""
    status = main(["verify", "--json", "--quiet", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    output = json.loads(out, parse_constant=pytest.fail)
    assert output["passed"] == (status == 0)
    return status, output["records"]


def failed_rungs(records):
    return {record["rung"] for record in records if record["verdict"] == "FAIL"}


@pytest.mark.slow
def test_the_ladder_holds(tiny, capsys):
    status, records = run_json(capsys, tiny)
    assert status == 0, [record for record in records if record["verdict"] == "FAIL"]
    assert list(dict.fromkeys(record["rung"] for record in records)) == list(RUNGS)
    on_gpu = torch.cuda.is_available()
    skipped = {record["rung"]: record["note"] for record in records if record["verdict"] == "skipped"}
    assert skipped == ({} if on_gpu else {"engines": "cpu has no CUDA graphs"})
    for name in OF_KERNELS:
        text = " ".join(record["compared"] for record in records if record["rung"] == name)
        implementations = ["the kernel"] if on_gpu else ["the C++ kernel", "the interpreted kernel"]
        assert all(f"by {implementation}" in text for implementation in implementations)
    compared = {record["compared"] for record in records}
    for precision in ("fp32", "bf16", "fp16", *(["tf32"] if on_gpu else [])):
        for measure in ("max", "rms"):
            assert f"{precision} U-Net with the float64 reference, {measure}" in compared
    for precision in ("fp32", "bf16"):
        assert f"{precision} trajectory of 12 steps with float64, median rms" in compared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("rung", [*RUNGS])
def test_only_the_damaged_rung_fails(rung, tiny, capsys, in_this_process):
    if rung == "engines" and not torch.cuda.is_available():
        pytest.skip("it needs a GPU")
    status, records = run_json(capsys, tiny, "--damage", rung, "--steps", "6")
    assert status == 1
    assert failed_rungs(records) == {rung}
    if rung in OF_KERNELS and not torch.cuda.is_available():
        verdicts = [record["verdict"] for record in records if record["rung"] == rung]
        assert verdicts[: len(verdicts) // 2].count("FAIL") >= 1  # in C++
        assert verdicts[len(verdicts) // 2 :].count("FAIL") >= 1  # in the interpreter


@pytest.mark.parametrize("damage", [None, "engines", "step", "forward", "loss", "norm", "trajectory"])
@pytest.mark.parametrize("mark", [pytest.param("cuda", marks=needs_gpu)])
def test_the_ladder_on_a_gpu(mark, damage, tiny, capsys):
    status, records = run_json(capsys, tiny, "--device", mark, *(["--damage", damage] if damage else []))
    assert failed_rungs(records) == ({damage} if damage else set())
    assert status == (1 if damage else 0)
    assert "skipped" not in {record["verdict"] for record in records}


@pytest.mark.parametrize("variance_type", LEARNED_VARIANCE_TYPES)
def test_learned_variances_pass(variance_type, tmp_path, monkeypatch, only):
    monkeypatch.setattr(rungs, "OF_KERNELS", ())
    source = save_learned(tmp_path, variance_type)
    records = verify(source, device="cpu", progress=False)
    verdicts = {(record.rung, record.verdict) for record in records}
    assert verdicts == {(name, "skipped" if name == "engines" else "pass") for name in RUNGS}
    assert any(record.compared.endswith("with a learned variance") for record in records)
    only("unet", "trajectory")
    assert verify(source, device="cpu", damage="unet", progress=False)[0].verdict == "FAIL"
    damaged = verify(source, device="cpu", damage="trajectory", progress=False)
    assert {record.rung for record in damaged if record.verdict == "FAIL"} == {"trajectory"}


def save_learned(folder, variance_type):
    """A checkpoint whose variances are positive, or between their bounds."""
    torch.manual_seed(0)
    net = UNet2D(**{**NETWORK, "out_channels": 2})
    net.conv_out.weight.data[1:] *= 0.01
    net.conv_out.bias.data[1:] = 0.1
    checkpoints.save(folder, net.config, net.state_dict(), replace(SCHEDULE, variance_type=variance_type))
    return str(folder)


@pytest.mark.parametrize("damage", ["step", "trajectory"])
def test_damaged_learned_variance_is_found(damage, tmp_path, monkeypatch, only):
    """Also where only the columns of the variance are wrong."""

    def damaged(table, *, damage):
        rows = table.rows.clone()
        StepColumns.of(rows).L.add_(0.01 * damage)
        return replace(table, rows=rows)

    for module in (kernel_rungs, sampling_rungs):
        monkeypatch.setattr(module, "step_table", damaged)
    source = save_learned(tmp_path, "learned_range")
    only(damage)
    monkeypatch.setattr(rungs, "OF_KERNELS", ())
    verdicts = {record.verdict for record in verify(source, device="cpu", damage=damage, progress=False)}
    assert "FAIL" in verdicts
    assert {record.verdict for record in verify(source, device="cpu", progress=False)} == {"pass"}


@pytest.mark.parametrize(("variance_type", "channels"), [("learned_range", 1), ("fixed_small", 2)])
def test_network_must_fit_the_variance_type(variance_type, channels, tmp_path, monkeypatch):
    monkeypatch.setattr(rungs, "climb", None)
    source = save_tiny(tmp_path, replace(SCHEDULE, variance_type=variance_type), out_channels=channels)
    message = check.error_line(verify, source, device="cpu")
    assert message.startswith(f"variance_type is '{variance_type}', for which the network must return {3 - channels} ")
    assert f"but it returns {channels}; use a" in message


def test_an_exception_fails_its_rung_and_the_others_run(tiny, only, monkeypatch):
    def broken(case, damage):
        yield Record("words", "first", 0, 0)
        raise ZeroDivisionError("on\ntwo lines")

    only("words", "step")
    monkeypatch.setitem(rungs.RUNGS, "words", broken)
    first, second, *others = verify(tiny, progress=False)
    assert (first.compared, first.verdict) == ("first", "pass")
    assert (second.rung, second.verdict, second.note) == ("words", "FAIL", "ZeroDivisionError: on two lines")
    assert {record.rung for record in others} == {"step"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damage": "stepp"}, f"damage is 'stepp'; want one of the rungs {', '.join(RUNGS)}"),
        ({"steps": 13}, "steps is 13; want a whole number from 1 to 12"),
        ({"seconds": 0}, "seconds is 0; want a finite number, above 0"),
        ({"seconds": 9, "steps": 3}, "steps is 3 and seconds is 9; give one of the two"),
        ({"device": "abacus"}, "device is 'abacus'; want 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_wrong_arguments_raise_before_a_rung_runs(arguments, message, tiny, monkeypatch):
    monkeypatch.setattr(rungs, "climb", None)
    assert check.error_line(verify, tiny, **arguments) == message


@pytest.mark.parametrize(
    ("seconds", "steps", "has_time"), [(0.5, 20, False), (245, 20, False), (250, 24, True), (9000, 100, True)]
)
def test_seconds_shorten_the_trajectory(seconds, steps, has_time, tmp_path, only, monkeypatch):
    """A step of the trajectory takes 1 s, and building the networks 1.2 s, of a clock that only they advance."""
    source, clock, calls = save_tiny(tmp_path, replace(SCHEDULE, num_train_timesteps=100, beta_end=0.1)), [100.0], []

    def errors(case, table, precisions, damage):
        calls.append(len(table))
        clock[0] += len(table) + (1.2 if len(calls) == 1 else 0)
        return {"fp32": [(0, 0.0, 0.0)] * len(table)}, torch.zeros(1)

    only("trajectory", "distribution")
    monkeypatch.setattr(sampling_rungs, "trajectory_errors", errors)
    monkeypatch.setattr(sampling_rungs.time, "monotonic", lambda: clock[0])
    trajectory, *_, distribution = verify(source, device="cpu", seconds=seconds, progress=False)
    assert trajectory.compared == f"fp32 trajectory of {steps} steps with float64, median rms"
    assert (distribution.note == "no time is left for it; give more seconds") is not has_time


def test_a_skipped_rung_cannot_be_damaged(tiny, only):
    only("words", "engines")
    message = check.error_line(verify, tiny, device="cpu", damage="engines", progress=False)
    assert message == "damage is 'engines', but that rung is skipped: cpu has no CUDA graphs; choose another"


def test_command_prints_the_table_after_a_bar(tiny, capsys, only):
    only("words", "trajectory")
    assert main(["verify", tiny, "--steps", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "passed: all 3 comparisons; 0 skipped"
    assert "verify" in err
    assert "trajectory" in err
    assert main(["verify", tiny, "--steps", "3", "--quiet", "--damage", "words"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "FAILED: 1 of 3 comparisons, in words"
    assert err == ""


def test_json_writes_nan_and_infinity_as_text(tiny, capsys, only, monkeypatch):
    only("words")
    monkeypatch.setitem(rungs.RUNGS, "words", lambda *_: iter([Record("words", "c", math.nan, math.inf)]))
    status, records = run_json(capsys, tiny)
    assert status == 1
    assert records == [
        {"rung": "words", "compared": "c", "error": "nan", "bound": "inf", "note": "", "steps": [], "verdict": "FAIL"}
    ]


def test_help_hides_damage(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    text = capsys.readouterr().out
    assert "--steps" in text
    assert "damage" not in text


def test_scaled_timesteps_are_those_of_the_network(tmp_path, only):
    only("unet", "trajectory", "batch")
    torch.manual_seed(0)
    net = UNet2D(**NETWORK)
    checkpoints.save(tmp_path, net.config, net.state_dict(), SCHEDULE, timestep_scale=83.5)
    records = verify(tmp_path, device="cpu", progress=False)
    assert {record.verdict for record in records} == {"pass"}


def test_networks_that_need_more_are_refused(tmp_path):
    source = save_tiny(tmp_path, in_channels=3)
    line = check.error_line(verify, source, device="cpu")
    assert line.startswith("the network takes 2 channels more than a sample has (concat), which the ladder does not")
