"""Step tables: against the papers' formulas in 50 decimal digits, and against the reference."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddpm.core.names import BETA_SCHEDULES, LEARNED_VARIANCE_TYPES, PREDICTION_TYPES, VARIANCE_TYPES
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import COLUMNS, StepColumns, step_rows, x_0_rows
from fastddpm.reference.diffusion import Diffusion, update
from tests.support.check import error_line
from tests.support.exact import assert_close, decimals, exact_abar, float64

PROBES = torch.tensor([[1, 0], [0, 1], [0.3, -1.2], [-2.5, 0.7], [0.01, 0.02]], dtype=torch.float64)  # (x, m)


def textbook_step(s: Schedule, x: Decimal, m: Decimal, abar: Decimal, abar_prev: Decimal, sampler: str, eta: float):
    """(predicted x_0, mean of x_prev, sigma_t) as the papers write them."""
    if s.prediction_type == "epsilon":
        x_0, eps = (x - (1 - abar).sqrt() * m) / abar.sqrt(), m
    elif s.prediction_type == "sample":
        x_0, eps = m, (x - abar.sqrt() * m) / (1 - abar).sqrt()
    else:
        x_0, eps = abar.sqrt() * x - (1 - abar).sqrt() * m, (1 - abar).sqrt() * x + abar.sqrt() * m
    if s.clip_sample:
        bound = Decimal(s.clip_sample_range)
        x_0 = min(max(x_0, -bound), bound)
    alpha = abar / abar_prev
    beta = 1 - alpha
    posterior_var = (1 - abar_prev) / (1 - abar) * beta
    if sampler == "ddpm":  # arXiv:2006.11239, eq. 7
        mean = abar_prev.sqrt() * beta / (1 - abar) * x_0 + alpha.sqrt() * (1 - abar_prev) / (1 - abar) * x
        if s.variance_type == "learned_range" and posterior_var:  # arXiv:2102.09672, eq. 15, with m as v
            share = (m + 1) / 2
            return x_0, mean, ((share * beta.ln() + (1 - share) * posterior_var.ln()) / 2).exp()
        return x_0, mean, (posterior_var if "small" in s.variance_type else beta).sqrt()
    sigma = Decimal(eta) * posterior_var.sqrt()  # arXiv:2010.02502, eq. 16 and 12
    direction = max(1 - abar_prev - sigma**2, Decimal(0)).sqrt()
    if s.use_clipped_model_output:
        eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
    return x_0, abar_prev.sqrt() * x_0 + direction * eps, sigma


def assert_textbook(
    rows: Tensor, scale: Tensor, s: Schedule, visited: list[int], *, sampler="ddpm", eta=0.0, at=slice(None)
) -> None:
    """Assert that the predicted x_0, the mean and sigma_t of each row are those of the papers."""
    abar = exact_abar(s.betas)
    last = Decimal(1) if sampler == "ddpm" or s.set_alpha_to_one else abar[0]
    steps = list(zip(rows, scale, [abar[t] for t in visited], [last, *(abar[t] for t in visited)], strict=False))
    x, m = PROBES.unbind(1)
    for row, factor, abar_t, abar_prev in steps[at]:
        with decimals():
            want = [
                textbook_step(s, Decimal(a), Decimal(b), abar_t, abar_prev, sampler, eta) for a, b in PROBES.tolist()
            ]
            of_x_0 = float64([[abar_prev.sqrt(), (1 - abar_prev).sqrt()]])[0]
            back = float64([[(abar_t / abar_prev).sqrt(), (1 - abar_t / abar_prev).sqrt()]])[0]
        x_0, mean, sigma = float64(want).unbind(1)
        c, last_row = StepColumns.of(row), row is steps[0][0]
        assert_close(factor * (c.cx * x + c.cm * m).clamp(c.lo, c.hi), x_0)
        assert_close(update(x, m, row, None, clip=s.clip_sample), mean)
        learned = s.variance_type == "learned_range" and sampler == "ddpm"
        got = c.S * torch.exp(c.L + c.V * m)
        assert learned or c.L == c.V == 0
        assert_close(got, torch.zeros_like(sigma) if last_row else sigma)
        assert_close(torch.stack([c.P, c.Q]), of_x_0.new_tensor([1, 0]) if last_row else of_x_0)
        assert_close(torch.stack([c.R, c.U]), back)


def check_rows(s: Schedule, visited: list[int], sampler: str = "ddpm", eta: float = 0.0, at=slice(None)) -> None:
    """Assert that the float64 rows are those of the papers, and that the float32 table is these rounded once."""
    rows, scale = step_rows(s, torch.tensor(visited), sampler=sampler, eta=eta)
    assert_textbook(rows, scale, s, visited, sampler=sampler, eta=eta, at=at)
    table = s.table(timesteps=visited[::-1], sampler=sampler, eta=eta)
    assert torch.equal(table.rows, rows.float())
    assert torch.equal(table.scale, scale.float())
    assert table.timesteps.tolist() == visited


@pytest.mark.parametrize("column", [*COLUMNS, "scale"])
def test_a_damaged_row_is_not_textbook(column):
    s, visited = Schedule(num_train_timesteps=10), list(range(10))
    rows, scale = step_rows(s, torch.tensor(visited), sampler="ddim", eta=0.5)
    assert_textbook(rows, scale, s, visited, sampler="ddim", eta=0.5)
    damaged = scale if column == "scale" else getattr(StepColumns.of(rows), column)
    damaged[5] += 1e-9
    with pytest.raises(AssertionError):
        assert_textbook(rows, scale, s, visited, sampler="ddim", eta=0.5)


SAMPLERS = [  # (sampler, eta, variance_type)
    *(("ddpm", 0.0, variance_type) for variance_type in (*VARIANCE_TYPES, "learned_range")),
    *(("ddim", eta, "fixed_small") for eta in (0.0, 0.3, 1.0)),
]


@st.composite
def cases(draw):
    T = draw(st.integers(1, 40))
    named = st.sampled_from(BETA_SCHEDULES)
    trained = st.lists(st.floats(0.01, 0.5), min_size=T, max_size=T)
    options = {
        "num_train_timesteps": T,
        "beta_schedule": draw(named),
        "trained_betas": draw(st.none() | trained),
        "variance_type": draw(st.sampled_from([*VARIANCE_TYPES, "learned_range"])),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.sampled_from([1.0, 0.5, 3.0])),
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "timestep_spacing": draw(st.sampled_from(["leading", "trailing", "linspace"])),
        "steps_offset": draw(st.integers(0, 2)),
        "set_alpha_to_one": draw(st.booleans()),
        "use_clipped_model_output": draw(st.booleans()),
    }
    rescale = draw(st.booleans()) and T > 1 and options["prediction_type"] != "epsilon"
    return Schedule(**options, rescale_betas_zero_snr=rescale), draw(st.integers(1, T))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(["ddpm", "ddim"]), st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
def test_every_row_is_textbook(case, sampler, eta):
    s, steps = case
    last = (steps - 1) * (s.num_train_timesteps // steps) + s.steps_offset if s.timestep_spacing == "leading" else 0
    assume(last < s.num_train_timesteps)
    visited = s.timesteps(steps).tolist()
    check_rows(s, visited, sampler, eta if sampler == "ddim" else 0.0)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(("sampler", "eta", "variance_type"), SAMPLERS)
def test_rows_of_a_thousand_timesteps_are_textbook(beta_schedule, zero_snr, sampler, eta, variance_type):
    for prediction_type in PREDICTION_TYPES[zero_snr:]:
        for clip in (False, True):
            s = Schedule(
                beta_schedule=beta_schedule,
                rescale_betas_zero_snr=zero_snr,
                prediction_type=prediction_type,
                clip_sample=clip,
                variance_type=variance_type,
            )
            check_rows(s, list(range(1000)), sampler, eta, at=slice(None, None, 333))


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("trained_betas", [None, torch.linspace(0.05, 1e-5, 1000)], ids=["linear", "falling"])
def test_unclipped_rows_are_algorithm_2(variance_type, trained_betas):
    """Line 4: (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t) + sigma_t z, each coefficient to 1e-12."""
    s = Schedule(variance_type=variance_type, clip_sample=False, trained_betas=trained_betas)
    rows, _ = step_rows(s, torch.arange(1000))
    abar = [Decimal(1), *exact_abar(s.betas)]
    with decimals():
        betas = [Decimal(beta) for beta in s.betas.tolist()]
        of_x = [1 / (1 - beta).sqrt() for beta in betas]
        of_eps = [-beta / (1 - a).sqrt() / (1 - beta).sqrt() for beta, a in zip(betas, abar[1:], strict=True)]
        small = [((1 - a_prev) / (1 - a) * b).sqrt() for a_prev, a, b in zip(abar, abar[1:], betas, strict=False)]
        large = [Decimal(0), *(beta.sqrt() for beta in betas[1:])]
    want = float64([of_x, of_eps, small if "small" in variance_type else large])
    columns = StepColumns.of(rows)
    assert ((torch.stack([columns.B, columns.C, columns.S]) - want).abs() <= 1e-12 * want.abs()).all()
    assert (columns.A == 0).all()
    assert s.table().clip is False
    assert columns.lo.tolist() == [-math.inf] * 1000
    assert columns.hi.tolist() == [math.inf] * 1000


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_rows_take_the_steps_of_the_specification(variance_type, clip):
    s = Schedule(num_train_timesteps=50, variance_type=variance_type, clip_sample=clip is not None)
    paper, (rows, _) = Diffusion(s.betas), step_rows(s, torch.arange(50))
    x, m, z = torch.randn(3, 50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = update(x, m, rows, z, clip=s.clip_sample)
    assert_close(got, paper.step(x, m, torch.arange(50), z, variance_type=variance_type, clip=clip))


def assert_same_but_for_sigma(some: StepColumns, others: StepColumns) -> None:
    assert all(torch.equal(getattr(some, name), getattr(others, name)) for name in COLUMNS if name != "S")


@pytest.mark.parametrize("factor", [0.5, 1, 0, 2.0])
def test_noise_is_a_factor_of_sigma(factor):
    scaled, full = (Schedule().table(20, noise=noise).columns for noise in (factor, True))
    assert_same_but_for_sigma(scaled, full)
    assert torch.equal(scaled.S, factor * full.S)


@pytest.mark.parametrize("noise", [-0.5, 1.1e6, float("nan"), float("inf"), "half", None])
def test_bad_noise_is_rejected(noise):
    message = error_line(Schedule().table, 20, noise=noise)
    assert f"noise is {noise!r}; want True, False or a number, 0 to 1e+06" in message


def test_noise_off_returns_the_mean():
    for options in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.7}):
        on, off = (Schedule().table(20, **options, noise=noise).columns for noise in (True, False))
        assert_same_but_for_sigma(on, off)
        assert (on.S[1:] > 0).all()
        assert (off.S == 0).all()


@pytest.mark.parametrize("options", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_only_the_last_step_adds_no_noise(options, sampler, eta):
    table = Schedule(**options, set_alpha_to_one=False).table(10, sampler=sampler, eta=eta)
    assert table.timesteps[0] > 0
    assert table.columns.S[0] == 0
    assert (table.columns.S[1:] > 0).all()


def test_eta_above_one_works_while_sigma_is_small_enough():
    """With eta = 1.4, sigma_t^2 <= 1 - abar_prev holds for the step from 501 to 500, and not for that from 500 to 0."""
    check_rows(Schedule(clip_sample=False), [500, 501], "ddim", 1.4)
    line = error_line(Schedule().table, timesteps=[500, 0], sampler="ddim", eta=1.4)
    assert line == "eta is 1.4, so that sigma_t^2 > 1 - abar_prev at t=500; use 0 <= eta <= 1"


def test_x_0_rows_are_the_columns_of_x_0():
    rows, scale = step_rows(Schedule(), torch.arange(1000))
    c = StepColumns.of(rows)
    assert torch.equal(x_0_rows(rows, scale), torch.stack([c.cx, c.cm, c.lo, c.hi, scale], 1))
    assert " ".join(COLUMNS) == "cx cm lo hi A B C S L V P Q R U"


@pytest.mark.parametrize("kind", LEARNED_VARIANCE_TYPES)
def test_learned_variances_are_those_of_ddpm(kind):
    schedule = Schedule.from_config({"variance_type": kind})
    assert schedule.to_config()["variance_type"] == kind
    assert torch.equal(schedule.noising_table(), Schedule().noising_table())
    table, ddim = schedule.table(5), schedule.table(5, sampler="ddim", eta=1.0)
    assert (table.learned, ddim.learned, Schedule().table().learned) == (kind, "unused", None)
    assert table.columns.S.tolist() == [0, 1, 1, 1, 1]
    assert_same_but_for_sigma(ddim.columns, Schedule().table(5, sampler="ddim", eta=1.0).columns)
    assert torch.equal(ddim.columns.S, Schedule().table(5, sampler="ddim", eta=1.0).columns.S)


def test_clip_range_replaces_clip_sample_range():
    table = Schedule().table(5, clip_range=(0.0, 2.0))
    assert torch.equal(table.columns.lo, torch.zeros(5))
    assert torch.equal(table.columns.hi, 2 * Schedule().table(5).columns.hi)
    assert Schedule(clip_sample=False).table(5, clip_range=(0.0, 2.0)).columns.hi.tolist() == [math.inf] * 5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_rows_with_x_0_take_the_same_step(sampler):
    """The form with x_0, but not clipped, is the folded form within rounding."""
    s = Schedule(clip_sample=False)
    apart, folded = s.table(9, sampler=sampler, with_x_0=True), s.table(9, sampler=sampler)
    assert (apart.clip, folded.clip) == (True, False)
    x, m = torch.randn(2, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (update(x, m, table.rows.double(), None, clip=table.clip) for table in (apart, folded))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(apart.last(3).rows, apart.rows[:3])
    assert apart.last(3).timesteps.tolist() == apart.timesteps[:3].tolist()


# Bad input


ZERO_SNR = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        *(
            ({}, {"steps": steps}, f"steps is {steps!r}; want a whole number from 1 to 1000")
            for steps in (0, -5, 1001, True, 10.0, "10", math.nan, [10])
        ),
        (
            {"steps_offset": 1},
            {"steps": 1000},
            "steps is 1000 with steps_offset 1, which visits t=1000, but the last",
        ),
        ({}, {"sampler": "euler"}, "sampler is 'euler'; want one of ddpm, ddim"),
        ({}, {"eta": 0.5}, "eta is 0.5 with sampler 'ddpm'; eta is for sampler='ddim'"),
        ({}, {"sampler": "ddim", "eta": -0.1}, "eta is -0.1; want a number, 0 <= eta"),
        ({}, {"sampler": "ddim", "eta": math.nan}, "eta is nan; want a number, 0 <= eta"),
        ({}, {"sampler": "ddim", "eta": 2.0}, "eta is 2.0, so that sigma_t^2 > 1 - abar_prev at t=1;"),
        ({}, {"steps": 10, "timesteps": [5]}, "steps is 10, but timesteps is given too; pass one of them"),
        ({}, {"timesteps": []}, "timesteps is empty; want a strictly descending list of timesteps, or None"),
        ({}, {"timesteps": [5, 5]}, "timesteps has 5 after 5; want strictly descending timesteps"),
        ({}, {"timesteps": [3, 5]}, "timesteps has 5 after 3; want strictly descending timesteps"),
        ({}, {"timesteps": [1000, 5]}, "timesteps: an entry is 1000; want a whole number from 0 to 999"),
        ({}, {"timesteps": [5, -1]}, "timesteps: an entry is -1; want a whole number from 0 to 999"),
        ({"num_train_timesteps": 1}, {"timesteps": [1]}, "timesteps: an entry is 1; want a whole number from 0 to 0"),
        ({}, {"timesteps": [5, 2.5]}, "timesteps: an entry is 2.5; want a whole number from 0 to 999"),
        ({}, {"timesteps": 7.5}, "timesteps: an entry is 7.5; want a whole number from 0 to 999"),
        (ZERO_SNR, {}, "prediction_type is 'epsilon', but abar is 0 at t=999: x_t contains nothing of x_0 there"),
        (ZERO_SNR, {"sampler": "ddim"}, "use a network with prediction_type 'v_prediction' or 'sample'"),
        ({"beta_end": 0.9}, {}, "prediction_type is 'epsilon', but abar is "),
    ],
)
def test_bad_arguments_of_table(options, arguments, message):
    assert message in error_line(Schedule(**options).table, **arguments)
