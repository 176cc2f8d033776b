"""Whole trajectories in float64: diffusers' schedulers, given our betas, and where we deliberately differ."""

import diffusers
import pytest
import torch
from torch import Tensor

from fastddpm.core.schedule import PREDICTION_TYPES, VARIANCE_TYPES, Schedule
from fastddpm.core.table import step_rows
from fastddpm.reference.diffusion import update
from tests.support.exact import assert_close


def in_float64(scheduler, s: Schedule):
    """The scheduler with our float64 betas; diffusers makes its own in float32."""
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = s.betas, s.alphas, s.alphas_cumprod
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = s.alphas_cumprod_prev[0] if s.set_alpha_to_one else s.alphas_cumprod[0]
    return scheduler


def network(x: Tensor, t: int) -> Tensor:
    """Close to the eps of data around 0, so that the trajectories do not amplify rounding."""
    return 0.95 * x + 0.02 * torch.sin(3 * x + t)


def their_states(scheduler, x: Tensor, **options) -> list[Tensor]:
    """x after each of diffusers' steps."""
    generator, states = torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x, generator=generator, **options).prev_sample
        states.append(x)
    return states


def our_states(s: Schedule, visited: Tensor, x: Tensor, sampler: str, eta: float = 0.0) -> list[Tensor]:
    """x after each of our steps, with the noise that diffusers draws from the same generator.

    diffusers' DDPM draws at every t > 0, and its DDIM at every step if eta > 0.
    """
    generator, states = torch.Generator().manual_seed(1), []
    rows, _ = step_rows(s, visited, sampler=sampler, eta=eta)
    for row, t in zip(reversed(rows), reversed(visited.tolist()), strict=True):
        drawn = eta > 0 if sampler == "ddim" else t > 0
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


# Where we deliberately differ from diffusers


def test_fixed_large_log_is_fixed_large_where_diffusers_is_nan():
    log, plain = (Schedule(variance_type=name) for name in ("fixed_large_log", "fixed_large"))
    scheduler = diffusers.DDPMScheduler.from_config(log.to_config())
    assert scheduler.step(network(START, 500), 500, START).prev_sample.isnan().all()
    assert torch.equal(log.table().rows, plain.table().rows)
    c = log.table().columns
    assert all(column.isfinite().all() for column in (c.A, c.B, c.C, c.S))


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


def test_ddim_steps_to_the_next_visited_timestep_where_diffusers_does_not():
    s = Schedule(timestep_spacing="linspace")
    scheduler = in_float64(diffusers.DDIMScheduler.from_config(s.to_config()), s)
    scheduler.set_timesteps(10)
    visited = s.timesteps(10).tolist()
    assert visited[-2:] == [888, 999]
    ours = our_states(s, torch.tensor(visited), START, sampler="ddim")[0]
    m = network(START, 999)
    to_888, to_899 = (
        update(START, m, step_rows(s, torch.tensor([0, t, 999]), sampler="ddim")[0][-1], None, clip=True)
        for t in (888, 899)
    )
    assert_close(ours, to_888)
    assert_close(scheduler.step(m, 999, START).prev_sample, to_899)
