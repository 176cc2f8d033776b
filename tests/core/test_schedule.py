"""Schedules and step tables: against the papers' formulas in 50 decimal digits, and against diffusers in float64."""

import json
import math
from dataclasses import replace
from decimal import Context, Decimal, localcontext
from itertools import accumulate
from operator import mul

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddpm.core.schedule import (
    BETA_SCHEDULES,
    COLUMNS,
    LEARNED_VARIANCE_TYPES,
    PREDICTION_TYPES,
    VARIANCE_TYPES,
    Schedule,
    step_rows,
)
from fastddpm.reference.diffusion import Diffusion, update
from tests.support.check import error_line

PROBES = torch.tensor([[1, 0], [0, 1], [0.3, -1.2], [-2.5, 0.7], [0.01, 0.02]], dtype=torch.float64)  # (x, m)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Everywhere to 1e-12 of the largest value."""
    assert got.dtype == want.dtype == torch.float64
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_a_damaged_result_is_not_close():
    want = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    assert_close(want * (1 + 1e-13), want)
    for damaged in (want * (1 + 3e-12), want + torch.tensor([0, 0, 3e-12]), want * math.nan, want[:2], want.float()):
        with pytest.raises(AssertionError):
            assert_close(damaged, want)


# The papers' formulas in 50 decimal digits, the float64 betas taken as exact


def decimals():
    return localcontext(Context(prec=50))


def tensor(values: list) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in values], dtype=torch.float64)


def exact_abar(betas: Tensor) -> list[Decimal]:
    with decimals():
        return list(accumulate((1 - Decimal(beta) for beta in betas.tolist()), mul))


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
        return x_0, mean, (posterior_var if "small" in s.variance_type else beta).sqrt()
    sigma = Decimal(eta) * posterior_var.sqrt()  # arXiv:2010.02502, eq. 16 and 12
    direction = max(1 - abar_prev - sigma**2, Decimal(0)).sqrt()
    return x_0, abar_prev.sqrt() * x_0 + direction * eps, sigma


def assert_textbook(
    rows: Tensor, scale: Tensor, s: Schedule, visited: list[int], *, sampler="ddpm", eta=0.0, at=slice(None)
) -> None:
    """The predicted x_0, mean and sigma_t of each row are the papers'."""
    abar = exact_abar(s.betas)
    last = Decimal(1) if sampler == "ddpm" or s.set_alpha_to_one else abar[0]
    steps = list(zip(rows, scale, [abar[t] for t in visited], [last, *(abar[t] for t in visited)], strict=False))
    x, m = PROBES.unbind(1)
    for row, factor, abar_t, abar_prev in steps[at]:
        with decimals():
            want = [
                textbook_step(s, Decimal(a), Decimal(b), abar_t, abar_prev, sampler, eta) for a, b in PROBES.tolist()
            ]
        x_0, mean, sigma = tensor(want).unbind(1)
        cx, cm, lo, hi, *_, S = row
        assert_close(factor * (cx * x + cm * m).clamp(lo, hi), x_0)
        assert_close(update(x, m, row, None, clip=s.clip_sample), mean)
        assert_close(S.expand_as(sigma), torch.zeros_like(sigma) if row is steps[0][0] else sigma)


def check_rows(s: Schedule, visited: list[int], **chosen) -> None:
    """The float64 rows are the papers', and the float32 table is these rounded once."""
    at = chosen.pop("at", slice(None))
    rows, scale = step_rows(s, torch.tensor(visited), **chosen)
    assert_textbook(rows, scale, s, visited, **chosen, at=at)
    table = s.table(timesteps=visited[::-1], **chosen)
    assert torch.equal(table.rows, rows.float())
    assert torch.equal(table.scale, scale.float())
    assert table.timesteps.tolist() == visited


@pytest.mark.parametrize("column", [*COLUMNS, "scale"])
def test_a_damaged_row_is_not_textbook(column):
    s, visited = Schedule(num_train_timesteps=10), list(range(10))
    rows, scale = step_rows(s, torch.tensor(visited), sampler="ddim", eta=0.5)
    assert_textbook(rows, scale, s, visited, sampler="ddim", eta=0.5)
    damaged = scale if column == "scale" else rows[:, COLUMNS.index(column)]
    damaged[5] += 1e-9
    with pytest.raises(AssertionError):
        assert_textbook(rows, scale, s, visited, sampler="ddim", eta=0.5)


SAMPLERS = [
    *({"sampler": "ddpm", "variance_type": variance_type} for variance_type in VARIANCE_TYPES),
    *({"sampler": "ddim", "eta": eta} for eta in (0.0, 0.3, 1.0)),
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
        "variance_type": draw(st.sampled_from(VARIANCE_TYPES)),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.sampled_from([1.0, 0.5, 3.0])),
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "timestep_spacing": draw(st.sampled_from(["leading", "trailing", "linspace"])),
        "steps_offset": draw(st.integers(0, 2)),
        "set_alpha_to_one": draw(st.booleans()),
    }
    rescale = draw(st.booleans()) and T > 1 and options["prediction_type"] != "epsilon"
    return Schedule(**options, rescale_betas_zero_snr=rescale), draw(st.integers(1, T))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(["ddpm", "ddim"]), st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
def test_every_row_is_textbook(case, sampler, eta):
    s, steps = case
    leads_beyond = s.timestep_spacing == "leading" and (steps - 1) * (s.num_train_timesteps // steps) + s.steps_offset
    assume(leads_beyond < s.num_train_timesteps)
    visited = s.timesteps(steps).tolist()
    check_rows(s, visited, sampler=sampler, eta=eta if sampler == "ddim" else 0.0)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: "-".join(map(str, s.values())))
def test_rows_of_a_thousand_timesteps_are_textbook(beta_schedule, zero_snr, sampler):
    options = {key: value for key, value in sampler.items() if key == "variance_type"}
    chosen = {key: value for key, value in sampler.items() if key != "variance_type"}
    for prediction_type in PREDICTION_TYPES[zero_snr:]:
        for clip in (False, True):
            s = Schedule(
                beta_schedule=beta_schedule,
                rescale_betas_zero_snr=zero_snr,
                prediction_type=prediction_type,
                clip_sample=clip,
                **options,
            )
            check_rows(s, list(range(1000)), **chosen, at=slice(None, None, 333))


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
    want = tensor([of_x, of_eps, small if "small" in variance_type else large]).T
    assert ((rows[:, 5:] - want).abs() <= 1e-12 * want.abs()).all()
    assert (rows[:, 4] == 0).all()
    assert s.table().clip is False
    assert rows[:, 2].tolist() == [-math.inf] * 1000
    assert rows[:, 3].tolist() == [math.inf] * 1000


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_rows_take_the_steps_of_the_specification(variance_type, clip):
    s = Schedule(num_train_timesteps=50, variance_type=variance_type, clip_sample=clip is not None)
    paper, (rows, _) = Diffusion(s.betas), step_rows(s, torch.arange(50))
    x, m, z = torch.randn(3, 50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = update(x, m, rows, z, clip=s.clip_sample)
    assert_close(got, paper.step(x, m, torch.arange(50), z, variance_type=variance_type, clip=clip))


@pytest.mark.parametrize("share", [0.5, 1, 0, 2.0])
def test_noise_is_the_share_of_sigma_that_is_added(share):
    some, whole = (Schedule().table(20, noise=noise).rows for noise in (share, True))
    assert torch.equal(some[:, :-1], whole[:, :-1])
    assert torch.equal(some[:, -1], share * whole[:, -1])


@pytest.mark.parametrize("noise", [-0.5, float("nan"), float("inf"), "half", None])
def test_a_share_of_sigma_that_makes_no_sense(noise):
    assert f"noise is {noise!r}; want True, False or a number >= 0" in error_line(Schedule().table, 20, noise=noise)


def test_noise_off_returns_the_mean():
    for options in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.7}):
        on, off = (Schedule().table(20, **options, noise=noise) for noise in (True, False))
        assert torch.equal(on.rows[:, :7], off.rows[:, :7])
        assert (on.rows[1:, 7] > 0).all()
        assert (off.rows[:, 7] == 0).all()


@pytest.mark.parametrize("options", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
@pytest.mark.parametrize("chosen", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}])
def test_only_the_last_step_adds_no_noise(options, chosen):
    table = Schedule(**options, set_alpha_to_one=False).table(10, **chosen)
    assert table.timesteps[0] > 0
    assert table.rows[0, 7] == 0
    assert (table.rows[1:, 7] > 0).all()


def test_eta_above_one_works_where_a_mean_is_left():
    """sigma_t^2 <= 1 - abar_prev holds for eta = 1.4 from 501 to 500, and not on a jump from 500 to 0."""
    check_rows(Schedule(clip_sample=False), [500, 501], sampler="ddim", eta=1.4)
    assert_one_line(
        "eta is 1.4, which asks for sigma_t^2 > 1 - abar_prev at t=500; use 0 <= eta <= 1",
        lambda: Schedule().table(timesteps=[500, 0], sampler="ddim", eta=1.4),
    )


# Betas and what follows from them


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("T", [1, 7, 1000])
def test_betas_are_those_of_diffusers(beta_schedule, T):
    s = Schedule(num_train_timesteps=T, beta_schedule=beta_schedule)
    want = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=beta_schedule).betas
    got = s.betas
    if beta_schedule in ("squaredcos_cap_v2", "laplace"):  # diffusers computes these in float64 and rounds once
        assert torch.equal(got.float(), want)
    else:  # and these in float32, in a handful of operations
        assert (got - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * s.beta_end
    assert got.dtype == torch.float64


def test_named_betas_are_their_formulas():
    T, (b0, b1), i = 1000, (0.0001, 0.02), np.arange(1000)
    u = i / (T - 1)
    cosine = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    for name, want in {
        "linear": b0 + (b1 - b0) * u,
        "scaled_linear": (b0**0.5 + (b1**0.5 - b0**0.5) * u) ** 2,
        "sigmoid": b0 + (b1 - b0) / (1 + np.exp(6 - 12 * u)),
        "squaredcos_cap_v2": np.minimum(1 - cosine[1:] / cosine[:-1], 0.999),
    }.items():
        assert_close(Schedule(beta_schedule=name).betas, torch.from_numpy(want))


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_cumulative_products_are_exact_to_12_digits(beta_schedule, zero_snr):
    s = Schedule(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr, prediction_type="sample")
    want = tensor([exact_abar(s.betas)])[0]
    assert ((s.alphas_cumprod - want).abs() <= 1e-12 * want).all()
    assert s.alphas_cumprod_prev.tolist() == [1, *s.alphas_cumprod[:-1].tolist()]
    assert torch.equal(s.alphas, 1 - s.betas)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_one_minus_abar_loses_no_digits(beta_schedule):
    """Within one rounding per term of the sum, where 1 - alphas_cumprod can be off by hundreds of them."""
    s = Schedule(beta_schedule=beta_schedule)
    with decimals():
        want = tensor([[1 - abar for abar in exact_abar(s.betas)]])[0]
    roundings = torch.arange(2, 1002, dtype=torch.float64)
    assert ((-s.log_alphas_cumprod.expm1() - want).abs() <= roundings * torch.finfo(torch.float64).eps * want).all()


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_is_an_affine_image_of_sqrt_abar(beta_schedule):
    """Lin et al. 2023, algorithm 1: sqrt(abar) keeps its first value, ends at 0, and is shifted and scaled between."""
    plain, rescaled = (
        Schedule(beta_schedule=beta_schedule, rescale_betas_zero_snr=on).alphas_cumprod.sqrt() for on in (False, True)
    )
    assert rescaled[-1] == 0
    assert_close(rescaled[:1], plain[:1])
    assert_close(rescaled, (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]))


def test_trained_betas_are_taken_as_they_are():
    betas = [0.1, 0.25, 0.5]
    want = torch.tensor(betas, dtype=torch.float64)
    for given_as in (betas, tuple(betas), np.array(betas), want.clone().requires_grad_()):
        s = Schedule(num_train_timesteps=3, trained_betas=given_as, beta_schedule="sigmoid")
        assert torch.equal(s.betas, want)
        assert s == Schedule(num_train_timesteps=3, trained_betas=betas, beta_schedule="sigmoid")
        assert len({s, replace(s)}) == 1
    read_only = np.array(betas, dtype=np.float32)
    read_only.flags.writeable = False
    assert torch.equal(Schedule(num_train_timesteps=3, trained_betas=read_only).betas, want.float().double())


def test_noising_table_is_eq_4():
    s = Schedule()
    with decimals():
        want = tensor([(a.sqrt(), (1 - a).sqrt()) for a in exact_abar(s.betas)])
    got = s.noising_table()
    assert got.dtype == torch.float32
    assert got.shape == (1000, 2)
    assert (got - want).abs().max() <= torch.finfo(torch.float32).eps / 2
    zero_snr = Schedule(rescale_betas_zero_snr=True)
    assert zero_snr.noising_table()[-1].tolist() == [0, 1]


# Timesteps


def diffusers_timesteps(s: Schedule, steps: int) -> list[int]:
    scheduler = diffusers.DDPMScheduler.from_config(s.to_config())
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("options", [{}, {"steps_offset": 1}, {"timestep_spacing": "linspace"}])
def test_timesteps_are_those_of_diffusers(options):
    s = Schedule(**options)
    for steps in range(1, 1000):
        assert s.timesteps(steps).tolist()[::-1] == diffusers_timesteps(s, steps)


def test_trailing_visits_as_many_timesteps_as_asked():
    s, one_more = Schedule(timestep_spacing="trailing"), []
    for steps in range(1, 1001):
        got, theirs = s.timesteps(steps).tolist()[::-1], diffusers_timesteps(s, steps)
        if len(theirs) == steps + 1:
            one_more.append(steps)
            assert theirs[-1] == -1
        assert got == theirs[:steps]
        assert len(got) == steps
    assert len(one_more) == 62
    assert s.table(one_more[0]).timesteps.tolist() == s.timesteps(one_more[0]).tolist()


def test_no_steps_given_means_all_of_them():
    for options in ({}, {"steps_offset": 1}, {"timestep_spacing": "trailing"}):
        assert Schedule(**options).table().timesteps.tolist() == list(range(1000))


@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.tensor, iter])
def test_custom_timesteps(as_given):
    table = Schedule().table(timesteps=as_given([900, 500, 499, 0]))
    assert table.timesteps.tolist() == [0, 499, 500, 900]
    assert table.timesteps.dtype == torch.int32
    assert (len(table), table.num_train_timesteps, table.clip) == (4, 1000, True)
    assert torch.equal(table.rows[2], Schedule().table().rows[500])  # the one step of two neighbours
    moved = table.to("meta")
    assert (moved.rows.device.type, moved.timesteps.device.type) == ("meta", "meta")


# diffusers, given our float64 schedule


def in_float64(scheduler, s: Schedule):
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = s.betas, s.alphas, s.alphas_cumprod
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = s.alphas_cumprod_prev[0] if s.set_alpha_to_one else s.alphas_cumprod[0]
    return scheduler


def network(x: Tensor, t: int) -> Tensor:
    """Near eps of data around 0, so that the trajectories do not amplify rounding."""
    return 0.95 * x + 0.02 * torch.sin(3 * x + t)


def their_states(scheduler, x: Tensor, **options) -> list[Tensor]:
    generator, states = torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x, generator=generator, **options).prev_sample
        states.append(x)
    return states


def our_states(s: Schedule, visited: Tensor, x: Tensor, **options) -> list[Tensor]:
    """With the noise diffusers draws from the same generator: DDPM at every t > 0, DDIM at every step if eta > 0."""
    generator, states = torch.Generator().manual_seed(1), []
    rows, _ = step_rows(s, visited, **options)
    for row, t in zip(reversed(rows), reversed(visited.tolist()), strict=True):
        drawn = options["eta"] > 0 if options["sampler"] == "ddim" else t > 0
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if drawn else None
        x = update(x, network(x, t), row, z, clip=s.clip_sample)
        states.append(x)
    return states


START = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES[:3])
@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "linspace"}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_ddpm_trajectories_are_those_of_diffusers(prediction_type, clip, variance_type, options):
    s = Schedule(prediction_type=prediction_type, clip_sample=clip, variance_type=variance_type, **options)
    scheduler = in_float64(diffusers.DDPMScheduler.from_config(s.to_config()), s)
    scheduler.set_timesteps(50)
    got = our_states(s, s.timesteps(50), START, sampler="ddpm")
    assert_close(torch.stack(got), torch.stack(their_states(scheduler, START)))


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES[:3])
def test_a_thousand_ddpm_steps_are_those_of_diffusers(variance_type):
    s = Schedule(variance_type=variance_type)
    scheduler = in_float64(diffusers.DDPMScheduler.from_config(s.to_config()), s)
    got = our_states(s, s.timesteps(), START, sampler="ddpm")
    assert_close(torch.stack(got), torch.stack(their_states(scheduler, START)))


def test_custom_timesteps_are_those_of_diffusers():
    s, visited = Schedule(clip_sample_range=0.5), [950, 500, 499, 20, 0]
    scheduler = in_float64(diffusers.DDPMScheduler.from_config(s.to_config()), s)
    scheduler.set_timesteps(timesteps=visited)
    got = our_states(s, torch.tensor(visited[::-1]), START, sampler="ddpm")
    assert_close(torch.stack(got), torch.stack(their_states(scheduler, START)))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": False}])
def test_ddim_trajectories_are_those_of_diffusers(prediction_type, clip, eta, options):
    s = Schedule(prediction_type=prediction_type, clip_sample=clip, **options)
    scheduler = in_float64(diffusers.DDIMScheduler.from_config(s.to_config()), s)
    scheduler.set_timesteps(50)
    got = our_states(s, s.timesteps(50), START, sampler="ddim", eta=eta)
    assert_close(torch.stack(got), torch.stack(their_states(scheduler, START, eta=eta)))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[1:])
def test_zero_terminal_snr_trajectories_are_those_of_diffusers(prediction_type):
    s = Schedule(rescale_betas_zero_snr=True, prediction_type=prediction_type, clip_sample=False)
    scheduler = in_float64(diffusers.DDPMScheduler.from_config(s.to_config()), s)
    got = our_states(s, s.timesteps(), START, sampler="ddpm")
    assert_close(torch.stack(got), torch.stack(their_states(scheduler, START)))


# Where diffusers is not followed


def test_fixed_large_log_is_fixed_large_where_diffusers_is_nan():
    log, plain = (Schedule(variance_type=name) for name in ("fixed_large_log", "fixed_large"))
    scheduler = diffusers.DDPMScheduler.from_config(log.to_config())
    assert scheduler.step(network(START, 500), 500, START).prev_sample.isnan().all()
    assert torch.equal(log.table().rows, plain.table().rows)
    assert log.table().rows[:, 4:].isfinite().all()


def test_last_trailing_step_is_the_mean_where_diffusers_adds_noise():
    s = Schedule(timestep_spacing="trailing", variance_type="fixed_large")
    scheduler = in_float64(diffusers.DDPMScheduler.from_config(s.to_config()), s)
    scheduler.set_timesteps(10)
    theirs, ours = their_states(scheduler, START), our_states(s, s.timesteps(10), START, sampler="ddpm")
    assert_close(torch.stack(ours[:-1]), torch.stack(theirs[:-1]))
    generator = torch.Generator().manual_seed(1)
    *_, z = (torch.randn(START.shape, dtype=START.dtype, generator=generator) for _ in range(10))
    sigma = (1 - s.alphas_cumprod[99]).sqrt()
    assert round(float(sigma), 3) == 0.321
    assert_close(ours[-1] + sigma * z, theirs[-1])


def test_ddim_goes_to_the_timestep_visited_next_where_diffusers_does_not():
    s = Schedule(timestep_spacing="linspace")
    scheduler = in_float64(diffusers.DDIMScheduler.from_config(s.to_config()), s)
    scheduler.set_timesteps(10)
    visited = s.timesteps(10).tolist()
    assert visited[-2:] == [888, 999]
    check_rows(s, visited, sampler="ddim")
    m = network(START, 999)
    to_899 = update(START, m, step_rows(s, torch.tensor([0, 899, 999]), sampler="ddim")[0][-1], None, clip=True)
    assert_close(scheduler.step(m, 999, START).prev_sample, to_899)


# Configs

CIFAR10 = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
OLD_DDIM = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.0.4",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sample_max_value": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "tensor_format": "pt",
    "timestep_values": None,
    "use_clipped_model_output": False,
    "thresholding": False,
    "trained_betas": None,
}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, Schedule()),
        (CIFAR10, Schedule(variance_type="fixed_large")),
        (
            OLD_DDIM,
            Schedule(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                prediction_type="v_prediction",
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        ),
        ({"predict_epsilon": True}, Schedule()),
        ({"predict_epsilon": False}, Schedule(prediction_type="sample")),
        ({"predict_epsilon": False, "prediction_type": "v_prediction"}, Schedule(prediction_type="v_prediction")),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 0.2]}, Schedule(2, trained_betas=[0.1, 0.2])),
        (diffusers.DDPMScheduler().config, Schedule()),
        (diffusers.DDIMScheduler(clip_sample=False).config, Schedule(clip_sample=False)),
        (diffusers.DDIMParallelScheduler(set_alpha_to_one=False).config, Schedule(set_alpha_to_one=False)),
        (diffusers.DDPMParallelScheduler(variance_type="fixed_large").config, Schedule(variance_type="fixed_large")),
    ],
)
def test_published_configs_load(config, want):
    assert Schedule.from_config(config) == want


@pytest.mark.parametrize(
    "s",
    [
        Schedule(),
        Schedule(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3], steps_offset=1, clip_sample_range=2.0),
        Schedule(beta_schedule="sigmoid", variance_type="fixed_large_log", rescale_betas_zero_snr=True),
        Schedule(prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=False),
    ],
)
def test_configs_make_the_round_trip_through_json_and_diffusers(s):
    config = json.loads(json.dumps(s.to_config()))
    assert Schedule.from_config(config) == s
    theirs = diffusers.DDPMScheduler.from_config(config)
    assert Schedule.from_config({**theirs.config, "set_alpha_to_one": s.set_alpha_to_one}) == s


# Bad input: one line that names what came, what was wanted and the way out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; want a whole number >= 1"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps is 10.0; want a whole number >= 1"),
        ({"steps_offset": -1}, "steps_offset is -1; want a whole number >= 0"),
        ({"beta_start": -0.1}, "beta_start is -0.1; want a number > 0"),
        ({"beta_end": "big"}, "beta_end is 'big'; want a number > 0"),
        ({"beta_end": math.nan}, "beta_end is nan; want a number > 0"),
        ({"beta_end": 1.5}, "beta_start and beta_end give beta 1.00003 at t=666; want 0 < beta < 1"),
        ({"clip_sample_range": 0}, "clip_sample_range is 0; want a number > 0"),
        ({"clip_sample": 1}, "clip_sample is 1; want True or False"),
        ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine'; known: linear, scaled_linear, squaredcos_cap_v2"),
        ({"variance_type": "small"}, "variance_type is 'small'; known: fixed_small, fixed_small_log, fixed_large"),
        ({"prediction_type": "eps"}, "prediction_type is 'eps'; known: epsilon, sample, v_prediction"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; known: leading, trailing, linspace"),
        (
            {"thresholding": True},
            "thresholding is True; dynamic thresholding is not supported, use thresholding=False",
        ),
        (
            {"trained_betas": [0.1, 0.2]},
            "trained_betas holds 2 betas, but num_train_timesteps is 1000; pass num_train",
        ),
        ({"trained_betas": [0.1, "x"]}, "trained_betas: an entry is 'x'; want a number for each timestep"),
        ({"trained_betas": [[0.1], [0.2]]}, "trained_betas: an entry is [0.1]; want a number for each timestep"),
        ({"trained_betas": 7}, "trained_betas holds 1 betas, but num_train_timesteps is 1000"),
        (
            {"num_train_timesteps": 3, "trained_betas": [0.1, 0.0, 0.2]},
            "trained_betas give beta 0 at t=1; want 0 < beta < 1",
        ),
        (
            {"num_train_timesteps": 2, "trained_betas": [1.0, 0.2]},
            "trained_betas give beta 1 at t=0; want 0 < beta < 1",
        ),
        (
            {"num_train_timesteps": 2, "trained_betas": [0.2, 1.5]},
            "trained_betas give beta 1.5 at t=1; want 0 < beta < 1 (the last may be 1)",
        ),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True; it keeps abar_0"),
    ],
)
def test_bad_options(options, message):
    assert_one_line(message, lambda: Schedule(**options))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "config is a list; want the dict of a scheduler_config.json"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler config: _class_name is 'ScoreSdeVeScheduler'; known: DDPM"),
        ({"use_karras_sigmas": True}, "scheduler config: option is 'use_karras_sigmas'; known: num_train_timesteps"),
    ],
)
def test_bad_configs(config, message):
    assert_one_line(message, lambda: Schedule.from_config(config))


@pytest.mark.parametrize("kind", LEARNED_VARIANCE_TYPES)
def test_a_learned_variance_is_kept_and_not_sampled_with(kind):
    schedule = Schedule.from_config({"variance_type": kind})
    assert schedule.to_config()["variance_type"] == kind
    assert torch.equal(schedule.noising_table(), Schedule().noising_table())
    for sampler in ("ddpm", "ddim"):
        message = f"variance_type is '{kind}'; sampling with learned variances is not supported, use one of fixed_small"
        assert_one_line(message, lambda sampler=sampler: schedule.table(5, sampler=sampler))


ZERO_SNR = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("options", "asked", "message"),
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
        ({}, {"sampler": "euler"}, "sampler is 'euler'; known: ddpm, ddim"),
        ({}, {"eta": 0.5}, "eta is 0.5 with sampler 'ddpm'; eta is for sampler='ddim'"),
        ({}, {"sampler": "ddim", "eta": -0.1}, "eta is -0.1; want a number, 0 <= eta"),
        ({}, {"sampler": "ddim", "eta": math.nan}, "eta is nan; want a number, 0 <= eta"),
        ({}, {"sampler": "ddim", "eta": 2.0}, "eta is 2.0, which asks for sigma_t^2 > 1 - abar_prev at t=1;"),
        ({}, {"steps": 10, "timesteps": [5]}, "steps is 10 and timesteps is given too; pass one of them"),
        ({}, {"timesteps": []}, "timesteps is empty; want a strictly descending list of timesteps, or None"),
        ({}, {"timesteps": [5, 5]}, "timesteps has 5 after 5; want strictly descending timesteps"),
        ({}, {"timesteps": [3, 5]}, "timesteps has 5 after 3; want strictly descending timesteps"),
        ({}, {"timesteps": [1000, 5]}, "timesteps: an entry is 1000; want a whole number from 0 to 999"),
        ({}, {"timesteps": [5, -1]}, "timesteps: an entry is -1; want a whole number from 0 to 999"),
        ({"num_train_timesteps": 1}, {"timesteps": [1]}, "timesteps: an entry is 1; want a whole number from 0 to 0"),
        ({}, {"timesteps": [5, 2.5]}, "timesteps: an entry is 2.5; want a whole number from 0 to 999"),
        ({}, {"timesteps": 7.5}, "timesteps: an entry is 7.5; want a whole number from 0 to 999"),
        (ZERO_SNR, {}, "prediction_type is 'epsilon', but abar is 0 at t=999: x_t holds no trace of x_0 there"),
        (ZERO_SNR, {"sampler": "ddim"}, "use a network with prediction_type 'v_prediction' or 'sample'"),
        ({"beta_end": 0.9}, {}, "prediction_type is 'epsilon', but abar is "),
    ],
)
def test_bad_tables(options, asked, message):
    assert_one_line(message, lambda: Schedule(**options).table(**asked))


def assert_one_line(message: str, call) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        call()
    assert message in str(caught.value)


def test_numbers_of_numpy_are_json():
    s = Schedule(num_train_timesteps=np.int64(10), beta_start=np.float32(1e-4), steps_offset=np.int32(1))
    assert Schedule.from_config(json.loads(json.dumps(s.to_config()))) == s
