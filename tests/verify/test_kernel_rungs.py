"""The rungs of single operations hold for many schedules, and fail when an operation is wrong."""

import json
from pathlib import Path

import pytest

from fastddpm import ops
from fastddpm.core.schedule import Schedule
from fastddpm.verify import kernel_rungs
from fastddpm.verify.case import BY_BACKEND, TORCH, Case
from fastddpm.verify.rungs import OF_KERNELS, climb
from tests.verify.checkpoint import CPU, SCHEDULE


@pytest.mark.parametrize("name", [*OF_KERNELS, "forward"])
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule(num_train_timesteps=1),
        Schedule(clip_sample=False, variance_type="fixed_large"),
        Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        Schedule(50, prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0),
        Schedule(beta_schedule="squaredcos_cap_v2"),  # its first step divides by 5e-5 to predict x_0
    ],
    ids=["default", "one step", "unclipped", "v", "x_0", "cosine"],
)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_rungs_hold_for_other_schedules_and_fail_if_damaged(backend, schedule, name):
    case = Case(schedule, CPU, BY_BACKEND[backend])
    with ops.forced_backend(backend):
        others = [record for record in climb(name, case, False) if record.verdict != "pass"]
        verdicts = {record.verdict for record in climb(name, case, True)}
    same = {"noise": ["z and eps"], "step": ["update"], "noising": ["x_t"]}.get(name, [])
    assert [record.compared.partition(" by ")[0] for record in others] == (same if backend == "torch" else [])
    assert {record.note for record in others} <= {"same code here"}
    assert verdicts == {"FAIL"} if name == "loss" else "FAIL" in verdicts


@pytest.mark.parametrize(
    ("name", "wrong", "failing"),
    [
        ("eps_loss", lambda error: error + error.detach() / 1e6, "loss by torch"),
        ("eps_loss", lambda error: error + (error / 1e3 - (error / 1e3).detach()), "gradient by torch"),
        ("x_0_error", lambda error: error.nextafter(error + 1), "the error of x_0 by torch"),
    ],
    ids=["loss", "gradient", "x_0"],
)
def test_a_wrong_loss_gradient_or_error_fails_its_own_comparison(name, wrong, failing, monkeypatch):
    right = getattr(kernel_rungs.ops, name)
    monkeypatch.setattr(kernel_rungs.ops, name, lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    records = climb("loss", Case(SCHEDULE, CPU, TORCH), False)
    assert len(records) == 7
    assert all((record.verdict == "FAIL") == (failing in record.compared) for record in records)


def test_published_numbers_are_those_of_the_noise_standard():
    vectors = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
    published = [[" ".join(case[key]) for key in ("counter", "key", "words")] for case in vectors["philox4x32_10"]]
    assert [list(line) for line in kernel_rungs.PUBLISHED_WORDS] == published
    normals = {
        (case["seed"], case["stream"], case["sample"], case["t"], " ".join(case["bits"][:4]))
        for case in vectors["normals"]
    }
    assert set(kernel_rungs.PUBLISHED_NORMALS) <= normals
