"""Changes to a scheduler take effect from the next step on, as in the installed diffusers."""

import math
from itertools import product

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import (
    DDIM,
    DDPM,
    DOUBLE,
    NAMES,
    OUTPUT,
    OUTPUT_WITH_VARIANCE,
    SINGLE,
    VARIANCES,
    X,
    apply_to_both,
    assert_same,
    assert_same_outcome,
    assert_same_steps,
    named,
    outcome,
    scheduler_pair,
    with_steps,
)
from tests.support.defaults import defaults

CONFIGS = {
    "clip_sample": False,
    "clip_sample_range": 0.25,
    "thresholding": True,
    "prediction_type": "v_prediction",
    "beta_start": 0.01,  # has no effect after construction
    "num_train_timesteps": 5,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "variance_type": "fixed_large",
    "rescale_betas_zero_snr": True,
    "dynamic_thresholding_ratio": 0.5,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", CONFIGS)
def test_a_changed_config_takes_effect(name, key):
    ours, theirs = with_steps(scheduler_pair(name), 10)
    visited = theirs.timesteps.tolist()
    assert_same_steps(ours, theirs, visited)
    apply_to_both((ours, theirs), lambda scheduler: setattr(scheduler.config, key, CONFIGS[key]))
    assert_same_steps(ours, theirs, visited)
    with_steps((ours, theirs), 5)
    assert_same(ours.timesteps, theirs.timesteps)
    assert_same_steps(ours, theirs, theirs.timesteps.tolist())
    apply_to_both((ours, theirs), lambda scheduler: scheduler.register_to_config(**{key: CONFIGS[key]}))
    assert_same_steps(ours, theirs, theirs.timesteps.tolist())


def test_a_changed_config_item_acts_as_in_diffusers():
    ours, theirs = scheduler_pair("DDPMScheduler")
    apply_to_both((ours, theirs), lambda scheduler: scheduler.config.__setitem__("clip_sample", False))
    assert_same_steps(ours, theirs)


CHANGES = {
    "assigned": lambda s: setattr(s, "alphas_cumprod", torch.linspace(0.99, 0.01, 1000)),
    "assigned in double": lambda s: setattr(s, "alphas_cumprod", torch.linspace(0.99, 0.01, 1000, dtype=DOUBLE)),
    "assigned in half": lambda s: setattr(s, "alphas_cumprod", torch.linspace(0.99, 0.01, 1000).half()),
    "assigned short": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod[:900]),
    "assigned long": lambda s: setattr(s, "alphas_cumprod", torch.linspace(0.99, 0.01, 1500)),
    "assigned twice": lambda s: [setattr(s, "alphas_cumprod", s.alphas_cumprod.clone() * 0.9) for _ in range(2)],
    "element": lambda s: s.alphas_cumprod.__setitem__(500, 0.5),
    "in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "by data": lambda s: s.alphas_cumprod.data.mul_(0.9),
    "by numpy": lambda s: np.multiply(s.alphas_cumprod.numpy(), 0.9, out=s.alphas_cumprod.numpy()),
    "in inference mode": lambda s: torch.inference_mode()(s.alphas_cumprod.mul_)(0.9),
    "betas": lambda s: s.betas.zero_(),  # not used after construction
    "timesteps": lambda s: setattr(s, "timesteps", torch.tensor([900, 500, 499, 0])),
    "timesteps in place": lambda s: s.timesteps.sub_(1),
    "num_inference_steps": lambda s: setattr(s, "num_inference_steps", 20),
    "custom_timesteps": lambda s: setattr(s, "custom_timesteps", True),
    "no num_inference_steps": lambda s: setattr(s, "num_inference_steps", None),
    "final_alpha_cumprod": lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.7)),
    "final_alpha_cumprod in place": lambda s: getattr(s, "final_alpha_cumprod", s.betas).mul_(0.7),
    "one": lambda s: setattr(s, "one", torch.tensor(0.7)),
    "one in place": lambda s: getattr(s, "one", s.betas).mul_(0.7),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_attribute_takes_effect(name, change):
    for steps in (None, 10):
        ours, theirs = scheduler_pair(name, set_alpha_to_one=False) if name in DDIM else scheduler_pair(name)
        if steps:
            with_steps((ours, theirs), 10)
        timesteps = [900, 899, 500, 499, 0, -1]
        t, eps = torch.tensor([3, 800]), OUTPUT
        for _ in range(2):
            assert_same_steps(ours, theirs, timesteps)
            for method in ("add_noise", "get_velocity"):
                assert_same_outcome(ours, theirs, method, X, eps, t)
            apply_to_both((ours, theirs), CHANGES[change])


def test_the_variance_type_attribute_alone_acts_as_in_diffusers():
    """Set alone, the attribute has half an effect: it chooses the formula, and the config chooses its input."""
    for config, attribute in product(VARIANCES, VARIANCES):
        if "fixed_large_log" in (config, attribute):
            continue
        ours, theirs = apply_to_both(
            scheduler_pair("DDPMScheduler", variance_type=config),
            lambda scheduler, attribute=attribute: setattr(scheduler, "variance_type", attribute),
        )
        with named((config, attribute)):
            for model_output in (OUTPUT, OUTPUT_WITH_VARIANCE):
                assert_same_steps(ours, theirs, model_output=model_output)


@pytest.mark.parametrize("name", DDPM)
def test_fixed_large_log_is_fixed_large(name):
    """diffusers gives NaN (huggingface/diffusers#14569). The result of _get_variance does not change."""
    ours, theirs = scheduler_pair(name, variance_type="fixed_large_log")
    large = getattr(diffusers, name)(variance_type="fixed_large")
    assert outcome(theirs.step, OUTPUT, 500, X)[0].prev_sample.isnan().all()
    assert_same(ours._get_variance(500), theirs._get_variance(500))
    for _ in range(2):
        for t in (999, 500, 1, 0, torch.tensor([500])):
            assert_same(outcome(ours.step, OUTPUT, t, X), outcome(large.step, OUTPUT, t, X))
            assert_same(outcome(ours.step, OUTPUT[:1], t, X), outcome(large.step, OUTPUT[:1], t, X))
        with_steps((ours, large), timesteps=[999, 500, 1, 0])


def test_schedulers_do_not_share_tables():
    pairs = [
        scheduler_pair("DDPMScheduler"),
        scheduler_pair("DDPMScheduler", beta_end=0.03),
        scheduler_pair("DDIMScheduler"),
    ]
    for schedulers, steps in product(pairs, (10, 20, 10)):
        with_steps(schedulers, steps)
        for other in pairs[:2]:
            assert_same_steps(*other, (900, 100, 0))


# Subclasses


class OtherPath:
    """Steps over every second timestep."""

    def previous_timestep(self, timestep):
        return super().previous_timestep(super().previous_timestep(timestep))


class OtherVariance:
    def _get_variance(self, *args, **kwargs):
        return 0.25 * super()._get_variance(*args, **kwargs)


class OtherLimit:
    def _threshold_sample(self, sample):
        return sample.tanh()


class OtherCoefficients:
    """Takes effect as in diffusers, whose step reads the attribute of the instance."""

    @property
    def alphas_cumprod(self):
        return self._alphas_cumprod * 0.9

    @alphas_cumprod.setter
    def alphas_cumprod(self, value):
        self._alphas_cumprod = value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixin", [OtherPath, OtherVariance, OtherLimit, OtherCoefficients])
def test_a_method_of_a_subclass_is_called(name, mixin):
    ours, theirs = (type("Mine", (mixin, getattr(module, name)), {}) for module in (fast, diffusers))
    for thresholding in (False, True):
        schedulers = with_steps((ours(thresholding=thresholding), theirs(thresholding=thresholding)), 10)
        for _ in range(2):
            assert_same_steps(*schedulers, (900, 800, 100))
        assert [scheduler.__module__ for scheduler in schedulers] == [__name__] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["previous_timestep", "_get_variance", "_threshold_sample"])
def test_a_replaced_method_is_called(name, method, monkeypatch):
    """Also if it is assigned to the instance, after steps with the original method."""
    schedulers = with_steps(scheduler_pair(name, thresholding=True), 10)
    assert_same_steps(*schedulers, (900, 800, 100))
    replacement = {
        "previous_timestep": lambda t: t - 1,
        "_get_variance": lambda *args, **kwargs: torch.tensor(0.3),
        "_threshold_sample": torch.tanh,
    }[method]
    apply_to_both(schedulers, lambda scheduler: setattr(scheduler, method, replacement))
    assert_same_steps(*schedulers, (900, 800, 100))


# Other dtypes and number types


@pytest.mark.parametrize("name", NAMES)
def test_the_default_dtype_acts_as_in_diffusers(name):
    """The constant 1, which is abar before the first step, has the default dtype."""
    with defaults(DOUBLE):
        schedulers = scheduler_pair(name)
        for steps in (1000, 10):
            with_steps(schedulers, steps)
            for dtype in (SINGLE, DOUBLE):
                assert_same_steps(*schedulers, (900, 500, 100, 0), model_output=OUTPUT.to(dtype), x=X.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_coefficients_equal_diffusers(name):
    grads = []
    for scheduler in with_steps(scheduler_pair(name), 10):
        scheduler.alphas_cumprod = abar = scheduler.alphas_cumprod.clone().requires_grad_()
        for _ in range(2):
            noisy = scheduler.add_noise(X, OUTPUT, torch.tensor([3, 900]))
            outcome(scheduler.step, OUTPUT, 900, noisy)[0].prev_sample.sum().backward()
        grads.append(abar.grad)
    assert_same(*grads)


@pytest.mark.parametrize("eta", [np.float64(0.7), np.float32(0.7), np.int64(1), 1, True, math.nan, math.inf], ids=repr)
@pytest.mark.parametrize("name", DDIM)
def test_eta_of_any_number_type(name, eta):
    ours, theirs = with_steps(scheduler_pair(name), 10)
    for t in (900, 0):
        assert_same_outcome(ours, theirs, "step", OUTPUT, t, X, eta=eta)
