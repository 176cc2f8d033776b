"""The rung of the forward process: q(x_T | x_0) by the chain of q(x_t | x_{t-1}) (eq. 2) and in one shot (eq. 4)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.reference.diffusion import Diffusion, add_noise
from fastddpm.verify.accuracy import CHANCE, Record, largest, normality_records
from fastddpm.verify.case import DAMAGE, FREE_STREAM, SHAPE, Case, normal_inputs

IMAGES = 256  # noised by `ops`


@dataclass
class Moments:
    """The moments of q(x_t | x_0) for t = 0..T-1, float64, and how much rounding may change them.

    Attributes:
        signal: [T] sqrt(abar_t).
        var: [T] 1 - abar_t.
        table: [T, 2] float32: the noising table, with both.
        chain: [T, 2]: sqrt(abar_t) and sqrt(1 - abar_t) by the chain.
        signal_bound, var_bound: relative differences that rounding explains, of signal and of var.
        unit: of these bounds.
    """

    signal: Tensor
    var: Tensor
    table: Tensor
    chain: Tensor
    signal_bound: float
    var_bound: float
    unit: float

    @classmethod
    def of(cls, case: Case, damage: bool) -> "Moments":
        schedule, factor = case.schedule, DAMAGE if damage else 1
        log_abar = schedule.log_alphas_cumprod
        # In units of 2^-52, T steps change the chain's moments by at most 5/4 T and 3/2 T, relative to them, and
        # log(abar) by T/2, relative to its size. That is an error of abar, half as large in its root, and larger than
        # that of 1 - abar.
        unit = (schedule.num_train_timesteps + 2) * torch.finfo(torch.float64).eps
        size = float(-log_abar.nan_to_num(neginf=0).min())
        return cls(
            signal=schedule.alphas_cumprod.sqrt() * factor,
            var=-log_abar.expm1() * factor,
            table=schedule.noising_table() * factor,
            chain=chain_moments(schedule.betas),
            signal_bound=(5 / 4 + size / 4) * unit,
            var_bound=2 * unit,
            unit=unit,
        )


def forward_rung(case: Case, damage: bool) -> Iterator[Record]:
    moments, x_0 = Moments.of(case, damage), (normal_inputs(1, SHAPE, 1) / 2).clamp(-1, 1)
    yield from moments_at_every_t(moments)
    yield from all_steps_and_one_shot(case, moments, x_0)
    yield from noised_images(case, moments, x_0)


def moments_at_every_t(moments: Moments) -> Iterator[Record]:
    table_bound = torch.finfo(torch.float32).eps / 2 + max(moments.signal_bound, moments.var_bound)
    for name, got, want, bound in (
        ("sqrt(abar_t)", moments.signal, moments.chain[:, 0], moments.signal_bound),
        ("1 - abar_t", moments.var, moments.chain[:, 1].square(), moments.var_bound),
        ("the float32 table", moments.table.double(), moments.chain, table_bound),
    ):
        error = (got - want) / want.clamp(min=torch.finfo(torch.float32).tiny)  # below, float32 loses digits
        yield Record("forward", f"{name} with the moments of the chain at every t", largest(error), bound)


def all_steps_and_one_shot(case: Case, moments: Moments, x_0: Tensor) -> Iterator[Record]:
    """x_T by T steps, and in one shot with the eps that these steps' z's amount to."""
    betas, T = case.schedule.betas, case.schedule.num_train_timesteps
    t, address = torch.arange(T, device="cpu"), noise.address(0, 1).expand(T, 2)
    z = noise.normal(address, SHAPE, stream=FREE_STREAM, t=t).double()
    process, x = Diffusion(betas[betas < 1]), x_0.double()
    for step in range(T):
        z_t = z[step : step + 1]
        x = process.diffuse(x, step, z_t) if betas[step] < 1 else z_t  # a last beta of 1 leaves nothing of x
    later = case.schedule.alphas.sqrt()[1:]  # by what each later step multiplies
    weights = betas.sqrt() * torch.cat([later, torch.ones_like(betas[:1])]).flip(0).cumprod(0).flip(0)
    eps = torch.tensordot(weights / weights.norm(), z, 1)[None]
    one_shot = add_noise(x_0.double(), eps, torch.stack([moments.signal[-1], moments.var[-1].sqrt()]))
    size = largest(moments.signal[-1] * x_0.abs() + torch.tensordot(weights, z.abs(), 1))
    # each term is rounded T times in the steps, and in two sums of T terms here
    bound = (moments.signal_bound + moments.var_bound + 4 * moments.unit) * size
    note = f"{T} z's make one eps, with weights whose squares sum to 1"
    yield Record("forward", "x_T by all steps with that by one shot in float64", largest(x - one_shot), bound, note)
    yield from normality_records("forward", "eps of all steps", eps)


def noised_images(case: Case, moments: Moments, x_0: Tensor) -> Iterator[Record]:
    """x_T of many equal images by `ops`: its noise is standard normal, and sqrt(abar_T) x_0 is left of x_0."""
    images, T = layout.channels_last(x_0.repeat(IMAGES, 1, 1, 1)).to(case.device), case.schedule.num_train_timesteps
    t = torch.full((IMAGES,), T - 1, dtype=torch.int64, device=case.device)
    address = noise.address(0, IMAGES, case.device)
    x = ops.noising(images, t, address, moments.table.to(case.device), stream=noise.LIKELIHOOD).double().cpu()
    signal, std = moments.chain[-1]
    yield from normality_records("forward", f"eps of x_T by {case.implementation}", (x - signal * x_0) / std)
    energy = float(x_0.double().square().sum())
    error = (x * x_0).sum() / (IMAGES * energy) - signal
    standard_error = std / math.sqrt(IMAGES * energy)
    log_abar = case.schedule.log_alphas_cumprod[-1]
    note = f"L_T is at most {0 - math.log2(-float(log_abar.expm1())) / 2:.2g} bits/dim"
    compared = f"x_0 left in x_T by {case.implementation} with sqrt(abar_T)"
    yield Record("forward", compared, float(error.abs()), CHANCE * float(standard_error), note)


def chain_moments(betas: Tensor) -> Tensor:
    """[T, 2] float64: the factor on x_0 in x_t, and the standard deviation of the noise, multiplied step by step."""
    signal, var, moments = 1.0, 0.0, []
    for beta in betas.tolist():
        signal, var = math.sqrt(1 - beta) * signal, (1 - beta) * var + beta
        moments.append((signal, math.sqrt(var)))
    return torch.tensor(moments, dtype=torch.float64, device="cpu")
