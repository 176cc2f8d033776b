"""A scheduler of ours beside diffusers' own: what a call of each does, and whether it is the same."""

import math
from contextlib import contextmanager
from functools import lru_cache

import diffusers
import torch
from torch import Tensor

from fastddpm import diffusers as fast

DDPM, DDIM = ("DDPMScheduler", "DDPMParallelScheduler"), ("DDIMScheduler", "DDIMParallelScheduler")
NAMES = (*DDPM, *DDIM)
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "another")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SINGLE, DOUBLE = torch.float32, torch.float64
HALF = (torch.bfloat16, torch.float16)


def assert_same(got, want) -> None:
    """Both have the same types and values, also within tuples and diffusers' outputs. NaN equals NaN."""
    if type(got) is not type(want):
        came, wanted = (x if isinstance(x, str) else type(x).__name__ for x in (got, want))
        raise AssertionError(f"{came} is not {wanted}")
    if isinstance(want, Tensor):
        for attribute in ("dtype", "device", "shape", "requires_grad"):
            ours, theirs = getattr(got, attribute), getattr(want, attribute)
            assert ours == theirs, f"{attribute}: {ours} is not {theirs}"
        if want.numel():
            strides = [[step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (got, want)]
            assert strides[0] == strides[1], f"strides: {strides[0]} are not {strides[1]}"
        if want.is_meta:
            return
        wrong = (got != want) & ~(got.isnan() & want.isnan())
        if wrong.any():
            raise AssertionError(f"{wrong.sum()} of {want.numel()} differ: {got[wrong][:3]} are not {want[wrong][:3]}")
    elif isinstance(want, list | tuple | dict):
        assert len(got) == len(want)
        parts = (got.items(), want.items()) if isinstance(want, dict) else (got, want)
        for ours, theirs in zip(*parts, strict=True):
            assert_same(ours, theirs)
    else:
        assert got == want


@contextmanager
def named(case):
    """Prefix an assertion error of the block with the case."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


def outcome(call, *args, generators=(), **kwargs):
    """Seed the generators and torch's own, and call.

    Returns: the result or the error's text, and the states of torch's generator and the others afterwards.
    """
    # not torch.manual_seed, which takes as long as a step: it seeds every GPU
    generators = [torch.default_generator, *generators]
    for seed, generator in enumerate(generators):
        generator.manual_seed(seed)
    try:
        result = call(*args, **kwargs)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    return result, [generator.get_state() for generator in generators]


def scheduler_pair(name, **config):
    """Our scheduler of that name, and diffusers'."""
    return getattr(fast, name)(**config), getattr(diffusers, name)(**config)


def apply_to_both(schedulers, function):
    """Call a function with each of two schedulers; returns the two."""
    for scheduler in schedulers:
        function(scheduler)
    return schedulers


def with_steps(schedulers, *args, **kwargs):
    """Set the timesteps of both schedulers; returns the two."""
    return apply_to_both(schedulers, lambda scheduler: scheduler.set_timesteps(*args, **kwargs))


@lru_cache
def tensors(shape, dtype, layout="contiguous", values="normal", seed=0) -> Tensor:
    """Normal values, or "extreme" ones such as infinities, in a given memory layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    if values == "extreme":
        edges = torch.tensor([0.0, -0.0, 1, -1, math.inf, -math.inf, math.nan, 1e30, -1e-30, 1e-42, 3], dtype=DOUBLE)
        x.view(-1)[::2] = edges.repeat(x.numel())[: len(x.view(-1)[::2])]
    x = x.to(dtype)
    if layout == "channels-last":
        return x.to(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0] if layout == "strided" else x


X, OUTPUT = tensors((2, 3, 4, 4), SINGLE, seed=1), tensors((2, 3, 4, 4), SINGLE, seed=2)
OUTPUT_WITH_VARIANCE = torch.cat([OUTPUT, OUTPUT.square()], 1)


def assert_same_outcome(ours, theirs, method, *args, **kwargs):
    """A method of both has the same result or error, and leaves torch's generator in the same state."""
    assert_same(outcome(getattr(ours, method), *args, **kwargs), outcome(getattr(theirs, method), *args, **kwargs))


def assert_same_steps(ours, theirs, timesteps=(999, 500, 1, 0), model_output=OUTPUT, x=X):
    """Both take the same steps, with noise of torch's own generator. DDIM steps with eta = 1, so that it adds noise."""
    eta = {"eta": 1.0} if isinstance(theirs, tuple(getattr(diffusers, name) for name in DDIM)) else {}
    for t in timesteps:
        with named(t):
            assert_same_outcome(ours, theirs, "step", model_output, t, x, **eta)
