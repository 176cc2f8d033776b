"""Inputs of `ops.predict_step` in many layouts, and its specification."""

from math import nan

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import noise
from fastddpm.reference import diffusion
from tests.support.bits import same_bits
from tests.support.draws import addresses, generator

PREDICTS = ["epsilon", "sample", "v_prediction"]
SAMPLERS = ["ddpm", "ddim", "ddim_clipped"]
LEARNED = [None, "learned", "learned_range"]
SIGNAL, NOISE, OF_X_0, OF_W, SIGMA, LOG_MIN, LOG_MAX, NOISY = range(8)


def table(T: int = 20) -> Tensor:
    """Row t + 1 belongs to timestep t. Row 0 belongs to none and is NaN, because nothing may read it."""
    d = diffusion.Diffusion(torch.linspace(1e-4, 0.4, T, dtype=torch.float64))
    rows = torch.full((T + 1, 8), nan, dtype=torch.float64)
    rows[1:, SIGNAL], rows[1:, NOISE] = d.alphas_cumprod.sqrt(), (1 - d.alphas_cumprod).sqrt()
    rows[1:, OF_X_0] = d.alphas_cumprod_prev.sqrt() * d.betas / (1 - d.alphas_cumprod)
    rows[1:, OF_W] = d.alphas.sqrt() * (1 - d.alphas_cumprod_prev) / (1 - d.alphas_cumprod)
    rows[1:, SIGMA] = d.posterior_var.sqrt()
    rows[1:, LOG_MIN], rows[1:, LOG_MAX] = d.posterior_var.clamp(min=1e-20).log(), d.betas.log()
    rows[1:, NOISY] = torch.arange(T) > 0
    return rows.float()


ROWS = table()


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Channels-last memory, with the strides of a new tensor."""
    n, c, *spatial = x.shape
    return x.new_empty(n, *spatial, c).movedim(-1, 1).copy_(x)


def half(x: Tensor) -> Tensor:
    """The first half of the channels of a contiguous tensor, whose other half is NaN."""
    return torch.cat([x, x * nan], 1)[:, : x.shape[1]]


def half_of_channels_last(x: Tensor) -> Tensor:
    """The second half of the channels of a channels-last tensor."""
    return channels_last(torch.cat([x * nan, x], 1))[:, x.shape[1] :]


def sparse(x: Tensor) -> Tensor:
    """Every second entry and every third channel of a larger tensor."""
    memory = x.new_full((2 * len(x), 3 * x.shape[1], *x.shape[2:]), nan)
    return memory[1::2, 2::3].copy_(x)


def entries_innermost(x: Tensor) -> Tensor:
    """The entries have the smallest stride."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS = [contiguous, channels_last, half, half_of_channels_last, sparse, entries_innermost]


def inputs(shape, dtypes=(torch.float32,) * 4) -> tuple[Tensor, ...]:
    """x, m, v (positive, to be a variance as well) and z."""
    x, m, v, z = (torch.randn(shape, generator=generator(i)) for i in range(4))
    return tuple(a.to(dtype) for a, dtype in zip((x * 1.5, m, v.abs(), z), dtypes, strict=True))


def specified(x, m, rows, at, *, predicts, sampler, clip=None, v=None, learned=None, z=None, address=None):
    """The specification in float32, each result rounded once to its dtype."""
    dtype = torch.promote_types(x.dtype, m.dtype)
    kinds = dtype, m.dtype if predicts == "sample" else dtype
    row = list(rows[int(at)].unbind())
    if address is not None:
        z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=int(at) - 1)
    if learned == "learned":  # torch's float32 root may be an ulp off on a CPU
        row[SIGMA], learned = v.double().sqrt().float(), None
    x, m, v, z = (None if a is None else a.float() for a in (x, m, v, z))
    options = {"predicts": predicts, "sampler": sampler, "clip": clip, "v": v, "learned": learned, "z": z}
    return tuple(a.to(kind) for a, kind in zip(diffusion.predict_step(x, m, row, **options), kinds, strict=True))


def moved(x, device):
    """x on a device, with its memory and strides; `to` alone would make the strides those of a dense tensor."""
    if not isinstance(x, Tensor):
        return x
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def run(device, x, m, rows, at, *, v=None, z=None, address=None, **options):
    """`ops.predict_step` on a device, with the tensors' own strides."""
    x, m, rows, at, v, z, address = (moved(a, device) for a in (x, m, rows, at, v, z, address))
    return ops.predict_step(x, m, rows, at, v=v, z=z, address=address, **options)


def assert_same_bits(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Both results have the dtype, shape and bits that are wanted."""
    for ours, exact in zip(got, want, strict=True):
        assert same_bits(ours, exact)


NOISES = ["given", "in registers", "none"]


def noises(source, z):
    """The arguments that give this noise."""
    return {"given": {"z": z}, "in registers": {"address": addresses(len(z))}, "none": {}}[source]


def as_float64(x, m, rows, at, *, v, z, **options):
    """x_prev of the specification in float64."""
    x, m, v, z = (a.double() for a in (x, m, v, z))
    return diffusion.predict_step(x, m, rows[at].double(), v=v, z=z, **options)[0]
