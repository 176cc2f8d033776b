"""Schedules: betas and what follows from them, the timesteps that are visited, and diffusers' configurations."""

import json
import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from fastddpm.core.names import BETA_SCHEDULES
from fastddpm.core.schedule import Schedule
from tests.support.check import error_line
from tests.support.defaults import defaults
from tests.support.exact import assert_close, decimals, exact_abar, float64

# Betas and what follows from them


def test_sqrt_is_the_schedule_of_diffusion_lm():
    """Which diffusers lacks: abar falls as 1 - sqrt(t / T + 1e-4), from its value at 0 on."""
    t = np.arange(1, 1000) / 1000
    want = (1 - np.sqrt(t + 1e-4)) / (1 - np.sqrt(1e-4))
    got = Schedule(beta_schedule="sqrt").alphas_cumprod.numpy()
    assert np.abs(got[:-1] - want).max() < 1e-12
    assert 0 < got[-1] < 1e-4


@pytest.mark.parametrize("beta_schedule", [name for name in BETA_SCHEDULES if name != "sqrt"])
@pytest.mark.parametrize("T", [1, 7, 1000])
def test_betas_equal_diffusers(beta_schedule, T):
    s = Schedule(num_train_timesteps=T, beta_schedule=beta_schedule)
    want = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=beta_schedule).betas
    got = s.betas
    if beta_schedule in ("squaredcos_cap_v2", "laplace"):  # diffusers computes these in float64 and rounds once
        assert torch.equal(got.float(), want)
    else:  # and these in float32, in a few operations
        assert (got - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * s.beta_end
    assert got.dtype == torch.float64


def test_named_betas_equal_their_formulas():
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
    want = float64([exact_abar(s.betas)])[0]
    assert ((s.alphas_cumprod - want).abs() <= 1e-12 * want).all()
    assert s.alphas_cumprod_prev.tolist() == [1, *s.alphas_cumprod[:-1].tolist()]
    assert torch.equal(s.alphas, 1 - s.betas)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_one_minus_abar_loses_no_digits(beta_schedule):
    """The error is at most one rounding per term of the sum; that of 1 - alphas_cumprod can be hundreds."""
    s = Schedule(beta_schedule=beta_schedule)
    with decimals():
        want = float64([[1 - abar for abar in exact_abar(s.betas)]])[0]
    roundings = torch.arange(2, 1002, dtype=torch.float64)
    assert ((-s.log_alphas_cumprod.expm1() - want).abs() <= roundings * torch.finfo(torch.float64).eps * want).all()


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_shifts_and_scales_sqrt_abar(beta_schedule):
    """Lin et al. 2023, algorithm 1: sqrt(abar) keeps its first value, and ends at 0."""
    plain, rescaled = (
        Schedule(beta_schedule=beta_schedule, rescale_betas_zero_snr=on).alphas_cumprod.sqrt() for on in (False, True)
    )
    assert rescaled[-1] == 0
    assert_close(rescaled[:1], plain[:1])
    assert_close(rescaled, (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]))


def test_trained_betas_are_not_changed():
    betas = [0.1, 0.25, 0.5]
    want = torch.tensor(betas, dtype=torch.float64)
    for given in (betas, tuple(betas), np.array(betas), want.clone().requires_grad_()):
        s = Schedule(num_train_timesteps=3, trained_betas=given, beta_schedule="sigmoid")
        assert torch.equal(s.betas, want)
        assert s == Schedule(num_train_timesteps=3, trained_betas=betas, beta_schedule="sigmoid")
        assert len({s, replace(s)}) == 1
    read_only = np.array(betas, dtype=np.float32)
    read_only.flags.writeable = False
    assert torch.equal(Schedule(num_train_timesteps=3, trained_betas=read_only).betas, want.float().double())


def test_noising_table_is_eq_4():
    s = Schedule()
    with decimals():
        want = float64([(a.sqrt(), (1 - a).sqrt()) for a in exact_abar(s.betas)])
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
def test_timesteps_equal_diffusers(options):
    s = Schedule(**options)
    for steps in range(1, 1000):
        assert s.timesteps(steps).tolist()[::-1] == diffusers_timesteps(s, steps)


def test_trailing_visits_exactly_so_many_timesteps():
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


def test_without_steps_all_timesteps_are_visited():
    for options in ({}, {"steps_offset": 1}, {"timestep_spacing": "trailing"}):
        assert Schedule(**options).table().timesteps.tolist() == list(range(1000))


@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.tensor, iter])
def test_custom_timesteps(as_given):
    table = Schedule().table(timesteps=as_given([900, 500, 499, 0]))
    assert table.timesteps.tolist() == [0, 499, 500, 900]
    assert table.timesteps.dtype == torch.int32
    assert (len(table), table.num_train_timesteps, table.clip) == (4, 1000, True)
    assert torch.equal(table.rows[2], Schedule().table().rows[500])  # the step from 500 to 499
    moved = table.to("meta")
    assert (moved.rows.device.type, moved.timesteps.device.type) == ("meta", "meta")


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
def test_configs_survive_json_and_diffusers(s):
    config = json.loads(json.dumps(s.to_config()))
    assert Schedule.from_config(config) == s
    theirs = diffusers.DDPMScheduler.from_config(config)
    assert Schedule.from_config({**theirs.config, "set_alpha_to_one": s.set_alpha_to_one}) == s


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; want a whole number from 1 to 1000000"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps is 10.0; want a whole number from 1 to 1000000"),
        ({"steps_offset": -1}, "steps_offset is -1; want a whole number from 0 to 1000000"),
        ({"beta_start": -0.1}, "beta_start is -0.1; want a finite number, above 0"),
        ({"beta_end": "big"}, "beta_end is 'big'; want a finite number, above 0"),
        ({"beta_end": math.nan}, "beta_end is nan; want a finite number, above 0"),
        ({"beta_end": 1.5}, "beta_start and beta_end give beta 1.00003 at t=666; want 0 < beta < 1"),
        ({"clip_sample_range": 0}, "clip_sample_range is 0; want a finite number, above 0"),
        ({"clip_sample_range": math.inf}, "clip_sample_range is inf; want a finite number, above 0"),
        (
            {"num_train_timesteps": 10**23},
            "num_train_timesteps is 100000000000000000000000; want a whole number from 1",
        ),
        ({"steps_offset": 10**23}, "steps_offset is 100000000000000000000000; want a whole number from 0"),
        ({"beta_start": 10**400}, "beta_start is 1000000000"),
        ({"beta_end": True}, "beta_end is True; want a finite number, above 0"),
        ({"beta_end": [0.02]}, "beta_end is [0.02]; want a finite number, above 0"),
        ({"clip_sample": "false"}, "clip_sample is 'false'; want True or False"),
        ({"set_alpha_to_one": None}, "set_alpha_to_one is None; want True or False"),
        ({"beta_schedule": ["linear"]}, "beta_schedule is ['linear']; want one of linear"),
        ({"trained_betas": [10**400] * 1000}, "trained_betas: an entry is 10000"),
        ({"trained_betas": "0.1"}, "trained_betas: an entry is '0'; want a number for each timestep"),
        ({"trained_betas": torch.ones(3, device="meta")}, "a tensor on the meta device has no values; want one on"),
        ({"clip_sample": 1}, "clip_sample is 1; want True or False"),
        (
            {"beta_schedule": "cosine"},
            "beta_schedule is 'cosine'; want one of linear, scaled_linear, squaredcos_cap_v2",
        ),
        ({"variance_type": "small"}, "variance_type is 'small'; want one of fixed_small, fixed_small_log, fixed_large"),
        ({"prediction_type": "eps"}, "prediction_type is 'eps'; want one of epsilon, sample, v_prediction"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; want one of leading, trailing, linspace"),
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
    assert message in error_line(Schedule, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "config is a list; want the dict of a scheduler_config.json"),
        (
            {"_class_name": "ScoreSdeVeScheduler"},
            "scheduler config: _class_name is 'ScoreSdeVeScheduler'; want one of DDPM",
        ),
        (
            {"use_karras_sigmas": True},
            "scheduler config: an option is 'use_karras_sigmas'; want one of num_train_timesteps",
        ),
        ({"_class_name": ["DDPMScheduler"]}, "scheduler config: _class_name is ['DDPMScheduler']; want one of DDPM"),
        ({1: 2}, "scheduler config: an option is 1; want one of num_train_timesteps"),
        ({"\ud800": 2}, r"scheduler config: an option is '\ud800'; want one of num_train_timesteps"),
        ({"predict_epsilon": "false"}, "scheduler config: predict_epsilon is 'false'; want True or False"),
    ],
)
def test_bad_configs(config, message):
    assert message in error_line(Schedule.from_config, config)


def test_numbers_of_numpy_become_json():
    s = Schedule(num_train_timesteps=np.int64(10), beta_start=np.float32(1e-4), steps_offset=np.int32(1))
    assert Schedule.from_config(json.loads(json.dumps(s.to_config()))) == s


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_default_dtype_and_device_change_nothing(beta_schedule):
    def tables() -> list[torch.Tensor]:
        s = Schedule(beta_schedule=beta_schedule, rescale_betas_zero_snr=True, prediction_type="v_prediction")
        custom = s.table(timesteps=[900, 3]).timesteps
        return [s.betas, s.alphas_cumprod_prev, s.noising_table(), s.timesteps(), s.timesteps(7), custom]

    want = tables()
    with defaults(torch.float64, "meta"):
        got = tables()
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_sparse_trained_betas_are_numbers():
    betas = torch.tensor([0.1, 0.25, 0.5])
    s = Schedule(num_train_timesteps=3, trained_betas=betas.to_sparse())
    assert s == Schedule(num_train_timesteps=3, trained_betas=betas)
