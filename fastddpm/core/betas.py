"""The named schedules of betas, the variances of the forward process, in float64."""

import math

import torch
from torch import Tensor


def named_betas(name: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    """The betas of one of BETA_SCHEDULES: [T] float64. squaredcos_cap_v2, laplace and sqrt ignore both ends."""

    def linspace(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, T, dtype=torch.float64, device="cpu")

    if name == "linear":
        return linspace(beta_start, beta_end)
    if name == "scaled_linear":
        return linspace(math.sqrt(beta_start), math.sqrt(beta_end)) ** 2
    if name == "sigmoid":
        return linspace(-6, 6).sigmoid() * (beta_end - beta_start) + beta_start
    abar = {"squaredcos_cap_v2": cosine_abar, "laplace": laplace_abar, "sqrt": sqrt_abar}[name]
    betas = [min(1 - abar((t + 1) / T) / abar(t / T), 0.999) for t in range(T)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def cosine_abar(u: float) -> float:
    """abar at the fraction u = t/T: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace_abar(u: float) -> float:
    """abar at the fraction u = t/T: diffusers' Laplace schedule (after Hang et al. 2024, arXiv:2407.03297)."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def sqrt_abar(u: float) -> float:
    """abar at the fraction u = t/T: that of Diffusion-LM (Li et al. 2022, arXiv:2205.14217, appendix A)."""
    return max(1 - math.sqrt(u + 1e-4), 1e-5)


def rescale_zero_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that it ends at 0 and keeps its first value: [T] betas -> [T] betas.

    Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    root = (1 - betas).cumprod(0).sqrt()
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
