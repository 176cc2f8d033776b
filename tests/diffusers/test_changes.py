"""What is changed in a scheduler counts from the next step on, as in the installed diffusers."""

import math
from itertools import product

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import (
    BOTH,
    DDIM,
    DDPM,
    DOUBLE,
    NAMES,
    SINGLE,
    VARIANCES,
    M,
    X,
    assert_same,
    assert_same_outcome,
    assert_same_steps,
    both,
    named,
    outcome,
    pair,
)

CONFIGS = {
    "clip_sample": False,
    "clip_sample_range": 0.25,
    "thresholding": True,
    "prediction_type": "v_prediction",
    "beta_start": 0.01,  # comes too late
    "num_train_timesteps": 5,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "variance_type": "fixed_large",
    "rescale_betas_zero_snr": True,
    "dynamic_thresholding_ratio": 0.5,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", CONFIGS)
def test_a_changed_config_counts(name, key):
    ours, theirs = both(pair(name), lambda scheduler: scheduler.set_timesteps(10))
    visited = theirs.timesteps.tolist()
    assert_same_steps(ours, theirs, visited)
    both((ours, theirs), lambda scheduler: setattr(scheduler.config, key, CONFIGS[key]))
    assert_same_steps(ours, theirs, visited)
    both((ours, theirs), lambda scheduler: scheduler.set_timesteps(5))
    assert_same(ours.timesteps, theirs.timesteps)
    assert_same_steps(ours, theirs, theirs.timesteps.tolist())
    both((ours, theirs), lambda scheduler: scheduler.register_to_config(**{key: CONFIGS[key]}))
    assert_same_steps(ours, theirs, theirs.timesteps.tolist())


def test_a_changed_item_of_the_config_does_what_it_does_in_diffusers():
    ours, theirs = pair("DDPMScheduler")
    both((ours, theirs), lambda scheduler: scheduler.config.__setitem__("clip_sample", False))
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
    "betas": lambda s: s.betas.zero_(),  # are used no more
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
def test_a_changed_attribute_counts(name, change):
    for steps in (None, 10):
        ours, theirs = pair(name, set_alpha_to_one=False) if name in DDIM else pair(name)
        if steps:
            both((ours, theirs), lambda scheduler: scheduler.set_timesteps(10))
        timesteps = [900, 899, 500, 499, 0, -1]
        t, eps = torch.tensor([3, 800]), M
        for _ in range(2):
            assert_same_steps(ours, theirs, timesteps)
            for method in ("add_noise", "get_velocity"):
                assert_same_outcome(ours, theirs, method, X, eps, t)
            both((ours, theirs), CHANGES[change])


def test_the_type_of_the_variance_set_alone_has_half_its_effect():
    """The attribute chooses the formula, the config what goes into it."""
    for ours_type, attribute in product(VARIANCES, VARIANCES):
        if "fixed_large_log" in (ours_type, attribute):
            continue
        ours, theirs = both(
            pair("DDPMScheduler", variance_type=ours_type),
            lambda scheduler, attribute=attribute: setattr(scheduler, "variance_type", attribute),
        )
        with named((ours_type, attribute)):
            for m in (M, BOTH):
                assert_same_steps(ours, theirs, m=m)


@pytest.mark.parametrize("name", DDPM)
def test_fixed_large_log_is_fixed_large(name):
    """diffusers gives NaN (huggingface/diffusers#14569). What _get_variance returns is left as it is."""
    ours, theirs = pair(name, variance_type="fixed_large_log")
    large = getattr(diffusers, name)(variance_type="fixed_large")
    assert outcome(theirs.step, M, 500, X)[0].prev_sample.isnan().all()
    assert_same(ours._get_variance(500), theirs._get_variance(500))
    for _ in range(2):
        for t in (999, 500, 1, 0, torch.tensor([500])):
            assert_same(outcome(ours.step, M, t, X), outcome(large.step, M, t, X))
            assert_same(outcome(ours.step, M[:1], t, X), outcome(large.step, M[:1], t, X))
        both((ours, large), lambda scheduler: scheduler.set_timesteps(timesteps=[999, 500, 1, 0]))


def test_two_schedulers_do_not_mix():
    pairs = [pair("DDPMScheduler"), pair("DDPMScheduler", beta_end=0.03), pair("DDIMScheduler")]
    for scheduler_pair, steps in product(pairs, (10, 20, 10)):
        both(scheduler_pair, lambda scheduler, steps=steps: scheduler.set_timesteps(steps))
        for other in pairs[:2]:
            assert_same_steps(*other, (900, 100, 0))


# Subclasses


class OtherPath:
    """Skips every other timestep."""

    def previous_timestep(self, timestep):
        return super().previous_timestep(super().previous_timestep(timestep))


class OtherVariance:
    def _get_variance(self, *args, **kwargs):
        return 0.25 * super()._get_variance(*args, **kwargs)


class OtherLimit:
    def _threshold_sample(self, sample):
        return sample.tanh()


class OtherCoefficients:
    """Counts as one who has read diffusers' source expects: step asks the instance."""

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
        schedulers = both(
            (ours(thresholding=thresholding), theirs(thresholding=thresholding)), lambda s: s.set_timesteps(10)
        )
        for _ in range(2):
            assert_same_steps(*schedulers, (900, 800, 100))
        assert [scheduler.__module__ for scheduler in schedulers] == [__name__] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["previous_timestep", "_get_variance", "_threshold_sample"])
def test_a_replaced_method_is_called(name, method, monkeypatch):
    """Put into the instance, after steps with the old one."""
    schedulers = both(pair(name, thresholding=True), lambda scheduler: scheduler.set_timesteps(10))
    assert_same_steps(*schedulers, (900, 800, 100))
    replacement = {
        "previous_timestep": lambda t: t - 1,
        "_get_variance": lambda *args, **kwargs: torch.tensor(0.3),
        "_threshold_sample": torch.tanh,
    }[method]
    both(schedulers, lambda scheduler: setattr(scheduler, method, replacement))
    assert_same_steps(*schedulers, (900, 800, 100))


# Numbers of other kinds


@pytest.mark.parametrize("name", NAMES)
def test_a_default_dtype_is_honoured(name):
    """The 1 before the first step has it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    try:
        schedulers = pair(name)
        for steps in (1000, 10):
            both(schedulers, lambda scheduler, steps=steps: scheduler.set_timesteps(steps))
            for dtype in (SINGLE, DOUBLE):
                assert_same_steps(*schedulers, (900, 500, 100, 0), m=M.to(dtype), x=X.to(dtype))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_to_the_coefficients_are_those_of_diffusers(name):
    grads = []
    for scheduler in both(pair(name), lambda scheduler: scheduler.set_timesteps(10)):
        scheduler.alphas_cumprod = abar = scheduler.alphas_cumprod.clone().requires_grad_()
        for _ in range(2):
            noisy = scheduler.add_noise(X, M, torch.tensor([3, 900]))
            outcome(scheduler.step, M, 900, noisy)[0].prev_sample.sum().backward()
        grads.append(abar.grad)
    assert_same(*grads)


@pytest.mark.parametrize("eta", [np.float64(0.7), np.float32(0.7), np.int64(1), 1, True, math.nan, math.inf], ids=repr)
@pytest.mark.parametrize("name", DDIM)
def test_eta_of_any_kind(name, eta):
    ours, theirs = both(pair(name), lambda scheduler: scheduler.set_timesteps(10))
    for t in (900, 0):
        assert_same_outcome(ours, theirs, "step", M, t, X, eta=eta)
