"""The rung of the forward process holds for every schedule, and each of its comparisons fails when it should."""

import pytest

from fastddpm.core.schedule import Schedule
from fastddpm.verify import forward_rung
from fastddpm.verify.case import TORCH, Case
from fastddpm.verify.rungs import climb
from tests.verify.checkpoint import CPU, SCHEDULE

CHAIN = "the moments of the chain at every t"
ONE_SHOT = "x_T by all steps with that by one shot in float64"


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "failing"),
    [
        (forward_rung, "chain_moments", lambda moments: moments + 1e-9, f"sqrt(abar_t) with {CHAIN}"),
        (forward_rung, "chain_moments", lambda moments: moments + 1e-9, f"1 - abar_t with {CHAIN}"),
        (Schedule, "noising_table", lambda table: table.nextafter(table + 1), f"the float32 table with {CHAIN}"),
        (forward_rung.Diffusion, "diffuse", lambda x: x * (1 + 1e-9), ONE_SHOT),
        (forward_rung.noise, "normal", lambda z: z + 0.3, "eps of all steps, its mean with 0"),
        (forward_rung.noise, "normal", lambda z: z * 1.2, "eps of all steps, its variance with 1"),
        (forward_rung.ops, "noising", lambda x: x + 0.02, "eps of x_T by torch, its mean with 0"),
        (forward_rung.ops, "noising", lambda x: x * 1.01, "eps of x_T by torch, its variance with 1"),
        (forward_rung.ops, "noising", lambda x: -x, "x_0 left in x_T by torch with sqrt(abar_T)"),
    ],
)
def test_each_comparison_fails_for_its_own_damage(owner, name, wrong, failing, monkeypatch):
    case, right = Case(SCHEDULE, CPU, TORCH), getattr(owner, name)
    assert {record.verdict for record in climb("forward", case, False)} == {"pass"}
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    assert failing in {record.compared for record in climb("forward", case, False) if record.verdict == "FAIL"}


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "laplace", "sigmoid", "scaled_linear"])
def test_rung_holds_for_every_beta_schedule(name):
    records = climb("forward", Case(Schedule(beta_schedule=name), CPU, TORCH), False)
    assert [record.verdict for record in records] == ["pass"] * 9


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(8, rescale_betas_zero_snr=True, prediction_type="sample"),
        Schedule(1, trained_betas=[1.0], prediction_type="sample"),
    ],
    ids=["zero SNR", "one step"],
)
def test_a_last_beta_of_1_leaves_nothing_of_x_0(schedule):
    records = climb("forward", Case(schedule, CPU, TORCH), False)
    assert {record.verdict for record in records} == {"pass"}
    assert records[-1].note == "L_T is at most 0 bits/dim"
