"""The rungs with a network: which networks they take, and what they detect."""

import math
from dataclasses import replace
from statistics import median_low

import pytest
import torch

from fastddpm.core.schedule import Schedule
from fastddpm.core.table import StepColumns
from fastddpm.sampling import sampler
from fastddpm.sampling.sampler import Sampler
from fastddpm.verify import sampling_rungs
from fastddpm.verify.case import TORCH, NetworkCase
from fastddpm.verify.ladder import verify
from fastddpm.verify.rungs import climb
from tests.verify.checkpoint import CPU, save_tiny


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
def test_other_networks_pass(config, tmp_path, only):
    only("unet", "trajectory", "batch", "distribution")
    records = verify(save_tiny(tmp_path, **config), steps=4, progress=False)
    assert [record for record in records if record.verdict != "pass"] == []
    assert {record.rung for record in records} == {"unet", "trajectory", "batch", "distribution"}


def test_unet_is_accurate_for_four_thousand_timesteps(tmp_path, only):
    """That needs exact sines of the time embedding."""
    only("unet")
    schedule = Schedule(num_train_timesteps=4000, beta_start=2.5e-5, beta_end=0.005)
    records = verify(save_tiny(tmp_path, schedule), device="cpu", progress=False)
    assert [record.verdict for record in records] == ["pass"] * 6


def test_unet_is_judged_at_both_ends_and_in_the_middle(tiny, only, monkeypatch):
    plain_output, seen = NetworkCase.plain_output, set()

    def noted(case, precision, x, t, labels):
        seen.add((precision, t))
        return plain_output(case, precision, x, t, labels)

    only("unet")
    monkeypatch.setattr(NetworkCase, "plain_output", noted)
    verify(tiny, device="cpu", progress=False)
    assert seen == {(precision, t) for precision in ("fp32", "bf16", "fp16", "fp64") for t in (0, 6, 11)}


def test_unet_is_skipped_in_a_precision_in_which_plain_torch_overflows(tiny, only, monkeypatch):
    plain_output = NetworkCase.plain_output

    def overflowing(case, precision, *args):
        return plain_output(case, precision, *args) + (math.inf if precision == "fp16" else 0)

    monkeypatch.setattr(NetworkCase, "plain_output", overflowing)
    only("unet")
    records = verify(tiny, device="cpu", progress=False)
    assert [record.verdict for record in records] == ["pass"] * 4 + ["skipped"]
    assert records[-1].note == "plain torch overflows in fp16"


@pytest.mark.parametrize(("steps", "timesteps"), [(None, range(11, -1, -1)), (3, (8, 4, 0)), (1, (0,))])
def test_trajectory_reports_the_error_after_each_step(steps, timesteps, tiny, only):
    only("trajectory")
    fp32, bf16 = verify(tiny, steps=steps, progress=False)
    assert f" of {len(timesteps)} steps " in fp32.compared
    assert [t for t, _, _ in fp32.steps] == [t for t, _, _ in bf16.steps] == list(timesteps)
    for record in (fp32, bf16):
        errors, plain = ([point[i] for point in record.steps] for i in (1, 2))
        assert record.error == median_low(errors)
        assert record.bound == {"fp32": 2, "bf16": 4}[record.compared[:4]] * median_low(plain)
        decibel = [20 * math.log10(2 / values[-1]) for values in (errors, plain)]  # the peak of [-1, 1] is 2
        assert record.note == "PSNR of x_0 {:.1f} dB, plain torch's {:.1f}".format(*decibel)


@pytest.mark.slow
def test_trajectory_may_begin_without_an_error(tmp_path, only):
    """All of x_0 is clipped at first, so rounding shows in ours and in plain torch's at different steps."""
    only("trajectory")
    schedule = Schedule(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    records = verify(save_tiny(tmp_path, schedule), progress=False)
    assert [record.verdict for record in records] == ["pass"] * 4
    ours, plain = torch.tensor(records[2].steps)[:, 1:].unbind(1)
    assert (ours[1:] / torch.maximum(plain[1:], ours[:-1])).max() > 50


@pytest.mark.parametrize("row", [0, 5, 11])
def test_a_single_wrong_step_fails(row, tiny, only, monkeypatch):
    def with_wrong_row(table, *, damage):
        rows = table.rows.clone()
        columns = StepColumns.of(rows)
        for column in (columns.A, columns.B, columns.C):
            column[row] *= 1.001
        return replace(table, rows=rows)

    only("trajectory")
    monkeypatch.setattr(sampling_rungs, "step_table", with_wrong_row)
    monkeypatch.setattr(sampling_rungs, "LONG", 12)
    records = {record.compared: record for record in verify(tiny, progress=False)}
    name = "fp32 trajectory of 12 steps, largest growth of the error in one step"
    assert records[name].verdict == "FAIL"


def test_a_wrong_seed_fails(tiny, only, monkeypatch):
    """The samples differ one by one, though their distribution is right."""
    only("distribution")
    assert [record.verdict for record in verify(tiny, progress=False)] == ["pass", "pass"]
    address = sampler.noise_address
    monkeypatch.setattr(sampler, "noise_address", lambda seed, samples: address(seed + 1, samples))
    assert [record.verdict for record in verify(tiny, progress=False)] == ["FAIL", "pass"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_returns_nan_or_infinity_fails(value, tiny):
    sound, broken = (Sampler.from_pretrained(tiny, precision="fp32", device="cpu") for _ in range(2))
    case = NetworkCase(sound.schedule, CPU, TORCH, sound.model, sound.shape)
    with torch.no_grad():
        for precision in ("fp64", *case.precisions):
            case.plain_output(precision, torch.zeros(1, 1, 8, 8), 0, {})  # builds the references, with sound weights
        broken.model.conv_out.bias[0] = value
    case.net = broken.model
    for name in ("unet", "trajectory", "distribution"):
        records = climb(name, case, False)
        assert records
        assert {record.verdict for record in records} == {"FAIL"}
