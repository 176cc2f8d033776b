"""The specification of the variational bound on -log p(x_0).

Ho et al. 2020 (arXiv:2006.11239), eq. 3 and 5:

    -log p(x_0) <= E_q[ KL(q(x_T | x_0) || p(x_T))                                          L_T, `prior_kl`
                      + sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))     L_{t-1}, `term` at t > 0
                      - log p(x_0 | x_1) ]                                                  L_0, `term` at t = 0

These are the paper's timesteps, 1 to T; in the code they count from 0, as in `fastddpm.reference.diffusion`. All is in
nats, in the dtype of x_0. States are [N, ...] of any rank.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastddpm.reference.diffusion import Diffusion, Model, target

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")


class Bins(NamedTuple):
    """What discrete numbers stand for: bins of equal width with centres -1, -1 + 2 half_width, ..., top.

    The first bin extends to -infinity, and the last to infinity.
    """

    half_width: float
    top: float = 1.0


BYTES, PCM, SIGNS = Bins(1 / 255), Bins(2**-16, 1 - 2**-15), Bins(1.0)  # bytes, 16-bit samples, bits
HYBRID_WEIGHT = 0.001  # of L_vlb in L_hybrid


def normal_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(N(mean_q, var_q) || N(mean_p, var_p)) for each element, in nats; the arguments are broadcast."""
    ratio = log_var_q - log_var_p
    return (ratio.expm1() - ratio + (mean_q - mean_p).square() * torch.exp(-log_var_p)) / 2


def normal_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log of the density of N(mean, var) at x, for each element, in nats."""
    return (math.log(2 * math.pi) + log_var + (x - mean).square() * torch.exp(-log_var)) / 2


def decoder_nll(x: Tensor, mean: Tensor, log_var: Tensor, bins: Bins = BYTES) -> Tensor:
    """-log of the probability that N(mean, var) assigns to the bin of x, for each element, in nats: eq. 13.

    The result is finite wherever the mean is: the difference of two tails is computed from their logarithms.

    Args:
        x: bytes u as (u - 127.5) / 127.5, 16-bit samples u as u / 32768, or bits as -1 and 1; floating point.
        mean, log_var: broadcast to it.
        bins: BYTES, PCM or SIGNS, respectively.
    """
    scale = torch.exp(-log_var / 2)
    half, top = bins
    low = torch.where(x < half - 1, -math.inf, (x - half - mean) * scale)
    high = torch.where(x > top - half, math.inf, (x + half - mean) * scale)
    right = low + high > 0  # where the lower tails are close to 1: the mirrored bin has the same probability
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_high = torch.special.log_ndtr(high)
    drop = torch.special.log_ndtr(low) - log_high
    small = drop > -math.log(2)
    log_rest = torch.where(small, torch.log(-torch.expm1(drop)), torch.log1p(-torch.exp(drop)))
    return -(log_high + log_rest)


def prior_kl(process: Diffusion, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) for each entry: [N]."""
    abar = process.alphas_cumprod[-1].to(x_0)
    zero = torch.zeros_like(abar)
    return normal_kl(abar.sqrt() * x_0, torch.log1p(-abar), zero, zero).flatten(1).sum(1)


def log_variance(process: Diffusion, t: Tensor, variance_type: str, v: Tensor | None, like: Tensor) -> Tensor:
    """log of the variance of p(x_{t-1} | x_t), broadcastable over like.

    At t = 0, where the posterior's variance is 0, the fixed variances are the posterior's at t = 1, as in the authors'
    code (if T = 1, beta_0).

    Args:
        t: [N].
        variance_type: fixed_small: the posterior's (eq. 7); fixed_large: beta_t; learned: v; learned_range: from the
            first at v = -1 to the second at v = 1, interpolated in the logarithm (Nichol & Dhariwal 2021,
            arXiv:2102.09672, eq. 15).
        v: like `like`: the network's output for the variance.
    """
    first = process.posterior_var[1:2] if process.T > 1 else process.betas
    small = torch.cat([first, process.posterior_var[1:]]).log().to(like)
    large = process.betas.log().to(like)
    small, beta = (values[t].view(-1, *[1] * (like.ndim - 1)) for values in (small, large))
    if v is None:
        return torch.where(t.view(beta.shape) == 0, small, beta) if variance_type == "fixed_large" else small
    if variance_type == "learned":
        return v.log()
    share = (v + 1) / 2
    return share * beta + (1 - share) * small


def predicted_x_0(
    process: Diffusion, x_t: Tensor, t: Tensor, m: Tensor, predicts: str = "epsilon", clip: float | None = None
) -> Tensor:
    """The x_0 that the network's output m predicts, clamped to +-clip.

    Args: predicts: whether m is "epsilon", "sample" (x_0) or "v_prediction".
    """
    if predicts == "epsilon":
        x_0 = process.predicted_x_0(x_t, t, m)
    elif predicts == "sample":
        x_0 = m.to(x_t.dtype)
    else:
        x_0 = process.noised(x_t, t, -m.to(x_t.dtype))  # arXiv:2202.00512, appendix D: signal x_t - noise v
    return x_0 if clip is None else x_0.clamp(-clip, clip)


def term(
    process: Diffusion,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    predicts: str = "epsilon",
    variance_type: str = "fixed_small",
    clip: float | None = None,
    bins: Bins | None = BYTES,
) -> Tensor:
    """One term of the bound for each entry: [N], in nats.

    Where t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), where the mean of p is the posterior's at the predicted
    x_0. Where t = 0: -log p(x_0 | x_t), where the mean of p is the predicted x_0.

    Args:
        model: (x_t, t [N]) -> its output, like x_t; with twice the channels for a learned variance.
        x_0: [N, C, ...] clean samples in data units.
        t: [N] int64.
        eps: like x_0, standard normal: the noise in x_t.
        predicts, clip: see `predicted_x_0`.
        variance_type: see `log_variance`.
        bins: L_0 is the probability of the bin of x_0, see `decoder_nll`; None: it is a density.
    Raises: ValueError: variance_type is unknown.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"variance_type is {variance_type!r}; want one of {', '.join(VARIANCE_TYPES)}")
    x_t = process.noised(x_0, t, eps)
    m, v = model(x_t, t).to(x_0.dtype), None
    if variance_type.startswith("learned"):
        m, v = m.chunk(2, 1)
    mean_x_0 = predicted_x_0(process, x_t, t, m, predicts, clip)
    log_var = log_variance(process, t, variance_type, v, x_0)
    q, p = process.posterior(x_0, x_t, t), process.posterior(mean_x_0, x_t, t)
    kl = normal_kl(q.mean, torch.where(q.var > 0, q.var, 1).log(), p.mean, log_var)
    nll = normal_nll(x_0, mean_x_0, log_var)
    if bins is not None:
        nll = decoder_nll(x_0, mean_x_0, log_var, bins)
    return torch.where(t > 0, kl.flatten(1).sum(1), nll.flatten(1).sum(1))


def bound(
    process: Diffusion,
    model: Model,
    x_0: Tensor,
    noise: Callable[[int], Tensor],
    *,
    predicts: str = "epsilon",
    variance_type: str = "fixed_small",
    clip: float | None = None,
    bins: Bins | None = BYTES,
) -> Tensor:
    """The bound on -log p(x_0) for each entry, in nats: [N]. Divided by log 2 and an entry's elements, it is bits/dim.

    Args:
        noise: returns the eps of x_t, like x_0; called with 0, ..., T-1.
        model, x_0, predicts, variance_type, clip, bins: see `term`.
    """
    total = prior_kl(process, x_0)
    for t in range(process.T):
        total = total + term(
            process,
            model,
            x_0,
            torch.full((len(x_0),), t, dtype=torch.int64, device=x_0.device),
            noise(t),
            predicts=predicts,
            variance_type=variance_type,
            clip=clip,
            bins=bins,
        )
    return total


def hybrid_loss(
    process: Diffusion,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    predicts: str = "epsilon",
    variance_type: str = "learned_range",
) -> Tensor:
    """L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16), at given t and eps.

    L_simple is the squared error of the network's output, averaged over the elements. L_vlb is T times the `term` at t,
    in bits per dimension, without clipping x_0, as in the authors' code; averaged over uniform t, it is the bound
    without L_T, which has no trained parameters. Its gradient reaches the variance only, not the mean.

    Args:
        model: (x_t, t [N]) -> [N, 2C, ...]: the prediction, and the variance as `log_variance` takes it.
        x_0: [N, C, ...]: bytes u as (u - 127.5) / 127.5, floating point.
        t: [N] int64.
        eps: like x_0, standard normal: the noise in x_t.
        predicts: see `predicted_x_0`.
        variance_type: "learned" or "learned_range".
    Returns: [], in the dtype of x_0.
    """
    m, v = model(process.noised(x_0, t, eps), t).to(x_0.dtype).chunk(2, 1)
    frozen = torch.cat([m.detach(), v], 1)
    simple = (m - target(x_0, eps, process.noising_rows.to(x_0.device)[t], predicts)).square().mean()
    nats = term(process, lambda *_: frozen, x_0, t, eps, predicts=predicts, variance_type=variance_type)
    vlb = process.T * nats.mean() / (math.log(2) * x_0[0].numel())
    return simple + HYBRID_WEIGHT * vlb
