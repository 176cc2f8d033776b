"""A scheduler of ours and one of diffusers, what each does, and whether it is the same."""

import math
from contextlib import contextmanager
from functools import lru_cache

import diffusers
import torch
from torch import Tensor

from fastddpm import diffusers as fast

DDPM, DDIM = ("DDPMScheduler", "DDPMParallelScheduler"), ("DDIMScheduler", "DDIMParallelScheduler")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "another")
NAMES = (*DDPM, *DDIM)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SINGLE, DOUBLE = torch.float32, torch.float64


def assert_same(got, want) -> None:
    """The same types and the same values, also within tuples and diffusers' outputs; NaN is NaN."""
    if type(got) is not type(want):
        came, wanted = (x if isinstance(x, str) else type(x).__name__ for x in (got, want))
        raise AssertionError(f"{came} is not {wanted}")
    if isinstance(want, Tensor):
        for what in ("dtype", "device", "shape", "requires_grad"):
            ours, theirs = getattr(got, what), getattr(want, what)
            assert ours == theirs, f"{what}: {ours} is not {theirs}"
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
    """An assertion that fails within says which case it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


def outcome(call, *args, generators=(), **kwargs):
    """What a call gives: its result or its error, and where it leaves the generators and torch's own.

    All are seeded first.
    """
    generators = [
        torch.default_generator,
        *generators,
    ]  # torch.manual_seed takes as long as a step: it is for every GPU
    for seed, generator in enumerate(generators):
        generator.manual_seed(seed)
    try:
        result = call(*args, **kwargs)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    return result, [generator.get_state() for generator in generators]


def pair(name, **config):
    """Our scheduler of that name, and diffusers'."""
    return getattr(fast, name)(**config), getattr(diffusers, name)(**config)


@lru_cache
def tensors(shape, dtype, layout="contiguous", values="normal", seed=0) -> Tensor:
    """Normals, or numbers at the ends of their range; laid out as said."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    if values == "extreme":
        edges = torch.tensor([0.0, -0.0, 1, -1, math.inf, -math.inf, math.nan, 1e30, -1e-30, 1e-42, 3], dtype=DOUBLE)
        x.view(-1)[::2] = edges.repeat(x.numel())[: len(x.view(-1)[::2])]
    x = x.to(dtype)
    if layout == "channels-last":
        return x.to(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0] if layout == "strided" else x


X, M = tensors((2, 3, 4, 4), SINGLE, seed=1), tensors((2, 3, 4, 4), SINGLE, seed=2)
BOTH = torch.cat([M, M.square()], 1)  # m, and a learned variance


def assert_same_outcome(ours, theirs, method, *args, **kwargs):
    """A method of both does the same: the same result or error, and the same draws from torch."""
    assert_same(outcome(getattr(ours, method), *args, **kwargs), outcome(getattr(theirs, method), *args, **kwargs))


def assert_same_steps(ours, theirs, timesteps=(999, 500, 1, 0), m=M, x=X):
    """Both step alike, with the noise of torch's own generator; DDIM adds noise, too."""
    eta = {"eta": 1.0} if isinstance(theirs, tuple(getattr(diffusers, name) for name in DDIM)) else {}
    for t in timesteps:
        with named(t):
            assert_same_outcome(ours, theirs, "step", m, t, x, **eta)


def both(scheduler_pair, function):
    """Do the same with our scheduler and with diffusers'."""
    for scheduler in scheduler_pair:
        function(scheduler)
    return scheduler_pair
