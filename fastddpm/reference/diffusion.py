"""The specification: "Denoising diffusion probabilistic models" (Ho et al. 2020, arXiv:2006.11239) in eager torch.

Everything fast in this package is tested against this file, in float64 or bit for bit. Timesteps count from 0: t here
is t + 1 in the paper, so x_t contains the noise of steps 0..t, and the reverse step at t = 0 returns x_0. Coefficients
are computed in float64 and rounded once, to the dtype of the state. States, eps and z are [N, ...] of any rank; t is an
int, or [N] integers with the timestep of each entry.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]  # eps_theta(x_t, t [N] int64) -> eps like x_t
VarianceType = Literal["fixed_small", "fixed_large"]  # sigma_t^2 is the posterior's variance, or beta_t


def update(
    x: Tensor,
    m: Tensor,
    row: Tensor,
    z: Tensor | None,
    *,
    clip: bool,
    x_0: Tensor | None = None,
    v: Tensor | None = None,
    learned: str | None = None,
) -> Tensor:
    """Take one step of any sampler, as an affine update of the state in the written order of operations.

    Each product and each sum is rounded separately: every implementation of the step returns the same bits as this one.

    Args:
        x: [N, ...] state, floating point.
        m: like x, of any float dtype (converted to that of x first): the network's output.
        row: [8 or more], or [N, 8 or more] with one row for each entry: cx, cm, lo, hi, A, B, C, S, and for learned
            variances L, V.
        z: like x, standard normal; None adds nothing, nor does S = 0.
        clip: whether the row is for a clamped x_0; without, the x_0 is folded into B and C.
        x_0: like x: x_0 / scale, instead of the one that x and m predict; needs a row with clip.
        v: like m: the network's output for the variance, if it is learned.
        learned: None, "learned" or "learned_range": see `deviation`.
    Returns: the next state, like x.
    """
    cx, cm, lo, hi, A, B, C, S, *others = _broadcast_columns(row, x)
    m = m.to(x.dtype)
    if clip:
        # x_0 / scale: A contains the scale
        w = torch.minimum(torch.maximum(cx * x + cm * m, lo), hi) if x_0 is None else x_0
        mean = (A * w + B * x) + C * m
    else:
        mean = B * x + C * m
    if z is None:
        return mean
    if learned is not None and v is not None:
        L, V, *_ = others
        S = S * deviation(v.to(x.dtype), L, V, learned)
    return torch.where(S == 0, mean, mean + S * z)


def guided(m_c: Tensor, m_u: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), in the written order.

    Args: m_c, m_u: the network's output with and without the condition; scale: broadcastable; 1 gives m_c.
    """
    return m_u + scale * (m_c - m_u)


def deviation(v: Tensor, L: Tensor, V: Tensor, learned: str) -> Tensor:
    """sigma_t of a learned variance: sqrt(v), or exp(L + V v) for "learned_range" (arXiv:2102.09672, eq. 15)."""
    if learned == "learned":
        return v.double().sqrt().to(v.dtype)  # torch's square root on a CPU may be one unit off
    return exponential(L + V * v)


def exponential(a: Tensor) -> Tensor:
    """exp(a), rounded as written for float32, within one unit in the last place."""
    if a.dtype != torch.float32:
        return a.exp()
    a = torch.where(a < -120.0, -120.0, torch.where(a > 120.0, 120.0, a))
    shifted = a * 1.44269504 + 12582912.0  # adding and subtracting 1.5 2^23 rounds to a whole number
    whole = shifted - 12582912.0
    r = (a - whole * 0.693145752) - whole * 1.42860677e-6  # exp(a) = 2^whole exp(r), |r| <= ln(2) / 2
    p = r * 1.97903e-4 + 1.3944703e-3
    for k in (8.333498e-3, 4.1666295e-2, 1.6666666e-1, 0.5):
        p = p * r + k
    exponent = shifted.view(torch.int32) - 0x4B400000
    halves = exponent >> 1, exponent - (exponent >> 1)
    first, second = (((half + 127) << 23).view(torch.float32) for half in halves)
    return ((p * (r * r) + r) + 1.0) * first * second  # 2^whole in two factors, of which none is subnormal


def replaced(x: Tensor, known: Tensor, mask: Tensor, row: Tensor, z: Tensor) -> Tensor:
    """Replace the known part of a state by P known + Q z, which has the distribution q(x_prev | x_0), eq. 4.

    Args:
        x: [N, ...]: x_prev; known: like x: x_0; mask: like x, bool: where x_0 is known.
        row: [14] or [N, 14], as in `update`; Q = 0 adds no z.
        z: like x, standard normal.
    """
    *_, P, Q, _, _ = _broadcast_columns(row, x)
    return torch.where(mask, torch.where(Q == 0, P * known, P * known + Q * z), x)


def renoised(x: Tensor, row: Tensor, z: Tensor) -> Tensor:
    """Go back from x_prev to x_t: R x + U z, the forward process (eq. 2) of the skipped timesteps in one step."""
    *_, R, U = _broadcast_columns(row, x)
    return R * x + U * z


def predict_step(
    x: Tensor,
    m: Tensor,
    row: Sequence[float] | Tensor,
    *,
    predicts: str = "epsilon",
    sampler: str = "ddpm",
    clip: float | Callable[[Tensor], Tensor] | None = None,
    v: Tensor | None = None,
    learned: str | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict x_0 and take one step, in the order of operations of diffusers' schedulers.

    `update` is the same function, with coefficients that are combined in float64. Here each product, quotient and sum
    is rounded separately, to the dtype that torch promotes its operands to.

    Args:
        x: [N, ...] state, floating point.
        m: like x: the network's output.
        row: 8 numbers, or [8]: signal and noise, sqrt(abar_t) and sqrt(1 - abar_t); of_x_0 and of_w, the coefficients
            of the mean; sigma; log_min and log_max of the variance, for learned_range; noisy, whether the step adds
            noise.
        predicts: whether m is "epsilon", "sample" (x_0) or "v_prediction".
        sampler: "ddpm", whose mean is a sum of x_0 and x (eq. 7); "ddim", of x_0 and eps (arXiv:2010.02502, eq. 12);
            "ddim_clipped", with the eps that corresponds to the clipped x_0.
        clip: clamp x_0 to +-clip, or apply this function to it; None: do not change it.
        v: like x: the network's output for the variance.
        learned: None, "learned" (v is the variance) or "learned_range" (arXiv:2102.09672, eq. 15).
        z: like x, standard normal; None adds nothing.
    Returns: (next state, predicted x_0).
    """
    signal, noise, of_x_0, of_w, sigma, log_min, log_max, noisy = row
    if predicts == "epsilon":
        x_0 = (x - noise * m) / signal  # eq. 15
    elif predicts == "sample":
        x_0 = m
    else:
        x_0 = signal * x - noise * m  # arXiv:2202.00512, appendix D
    if callable(clip):
        x_0 = clip(x_0)
    elif clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if sampler == "ddpm":
        w = x
    elif sampler == "ddim_clipped":
        w = (x - signal * x_0) / noise
    elif predicts == "sample":
        w = (x - signal * m) / noise
    else:
        w = m if predicts == "epsilon" else signal * m + noise * x
    mean = of_x_0 * x_0 + of_w * w
    if z is None:
        return mean, x_0
    scale: Any = sigma
    if learned is not None:
        assert v is not None
        share = (v + 1) / 2
        log_var = share * log_max + (1 - share) * log_min
        scale = v**0.5 if learned == "learned" else torch.exp(0.5 * log_var)
    noised = mean + scale * z
    if isinstance(noisy, Tensor):
        return torch.where(noisy != 0, noised, mean), x_0
    return noised if noisy else mean, x_0


def add_noise(x_0: Tensor, eps: Tensor, row: Tensor) -> Tensor:
    """Eq. 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, two products and one sum, each rounded separately.

    Args:
        x_0, eps: [N, ...] of one dtype.
        row: [2], or [N, 2] with one row for each entry: sqrt(abar_t), sqrt(1 - abar_t).
    """
    signal, noise = _broadcast_columns(row, x_0)
    return signal * x_0 + noise * eps


def predicted_x_0(x_t: Tensor, m: Tensor, row: Tensor) -> Tensor:
    """x_0 = scale clamp(cx x_t + cm m, lo, hi), in the written order.

    Args:
        x_t: [N, ...].
        m: like x_t, of any float dtype (converted to that of x_t first): the network's output.
        row: [5], or [N, 5] with one row for each entry: cx, cm, lo, hi, scale.
    """
    cx, cm, lo, hi, scale = _broadcast_columns(row, x_t)
    return scale * torch.minimum(torch.maximum(cx * x_t + cm * m.to(x_t.dtype), lo), hi)


def target(x_0: Tensor, eps: Tensor, row: Tensor, predicts: str) -> Tensor:
    """The output that the network is trained for, in the written order.

    Args:
        x_0, eps: [N, ...] of one dtype.
        row: [2], or [N, 2] with one row for each entry: sqrt(abar_t), sqrt(1 - abar_t).
        predicts: "epsilon", "sample" (x_0) or "v_prediction" (arXiv:2202.00512, section 4).
    """
    if predicts != "v_prediction":
        return eps if predicts == "epsilon" else x_0
    signal, noise = _broadcast_columns(row, x_0)
    return signal * eps - noise * x_0


def squared_error(m: Tensor, target: Tensor) -> Tensor:
    """|m - target|^2 of each entry, in the written order: [N]; m is converted to target's dtype first."""
    return tree_sum((m.to(target.dtype) - target).square())


def tree_sum(x: Tensor) -> Tensor:
    """The sum of each entry's elements by a binary tree: neighbours are added first, missing ones count as zero.

    Args: x: [N, C, *spatial] or [N, D]; its elements are taken in channels-last order.
    Returns: [N].
    """
    x = x.movedim(1, -1).flatten(1)
    while x.shape[1] != 1:
        x = F.pad(x, (0, x.shape[1] % 2 or 2 * (x.shape[1] == 0)))
        x = x[:, ::2] + x[:, 1::2]
    return x[:, 0]


def linear_betas(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The paper's variances of the forward process (section 4): [T] float64."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu")


class Posterior(NamedTuple):
    """The normal distribution q(x_{t-1} | x_t, x_0), eq. 6: its mean, like x_t, and one variance for each entry."""

    mean: Tensor
    var: Tensor


class Diffusion:
    """The forward process with given betas, its posterior, the training loss (Algorithm 1), the sampler (Algorithm 2).

    Args:
        betas: [T], each 0 < beta < 1: variances of the forward steps.
    Attributes: betas, alphas, alphas_cumprod, alphas_cumprod_prev (shifted by one, starting at 1),
        posterior_var (eq. 7): [T] float64.
    Raises: ValueError: betas are not as above.
    """

    def __init__(self, betas: Tensor):
        outside = int((~((betas > 0) & (betas < 1))).sum())
        if betas.ndim != 1 or outside:
            raise ValueError(
                f"betas are {tuple(betas.shape)}, {outside} not in 0 < beta < 1; want [T], all of them in it"
            )
        self.betas = betas.double()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones_like(self.alphas[:1]), self.alphas_cumprod[:-1]])
        self.posterior_var = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod) * self.betas

    @property
    def T(self) -> int:
        return len(self.betas)

    @property
    def noising_rows(self) -> Tensor:
        """[T, 2] float64: sqrt(abar_t) and sqrt(1 - abar_t), the coefficients of eq. 4."""
        return torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()], -1)

    def diffuse(self, x_prev: Tensor, t: int | Tensor, z: Tensor) -> Tensor:
        """q(x_t | x_{t-1}), eq. 2: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, one step of the forward process."""
        return _coefficient(self.alphas.sqrt(), t, x_prev) * x_prev + _coefficient(self.betas.sqrt(), t, x_prev) * z

    def noised(self, x_0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """q(x_t | x_0), eq. 4: has the distribution that steps 0..t of the forward process give."""
        return add_noise(x_0, eps, self.noising_rows.to(x_0.device)[t])

    def posterior(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x_0), eq. 6 and 7."""
        of_x_0 = self.alphas_cumprod_prev.sqrt() * self.betas / (1 - self.alphas_cumprod)
        of_x_t = self.alphas.sqrt() * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        mean = _coefficient(of_x_0, t, x_t) * x_0 + _coefficient(of_x_t, t, x_t) * x_t
        return Posterior(mean, _coefficient(self.posterior_var, t, x_t))

    def predicted_x_0(self, x_t: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Eq. 15: eq. 4 solved for x_0."""
        noise = _coefficient((1 - self.alphas_cumprod).sqrt(), t, x_t) * eps.to(x_t.dtype)
        return (x_t - noise) / _coefficient(self.alphas_cumprod.sqrt(), t, x_t)

    def loss(self, model: Model, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple, eq. 14, at given t and eps: the squared error of the predicted noise, averaged over elements."""
        return (eps - model(self.noised(x_0, t, eps), t)).square().mean()

    def training_loss(self, model: Model, x_0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss of Algorithm 1, lines 3 to 5: a uniform t and a normal eps are drawn for each entry of x_0."""
        t = torch.randint(self.T, x_0.shape[:1], generator=generator, device=x_0.device)
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
        return self.loss(model, x_0, t, eps)

    def sigmas(self, variance_type: VarianceType = "fixed_small") -> Tensor:
        """sigma_t of Algorithm 2: [T] float64, 0 at t = 0 (line 3: the last step adds no noise).

        Args:
            variance_type: "fixed_small", the posterior's: optimal for data that is one point;
                "fixed_large", beta_t: optimal for data from N(0, I) (section 3.2).
        Raises: ValueError: variance_type is neither.
        """
        if variance_type not in get_args(VarianceType):
            raise ValueError(f"variance_type is {variance_type!r}; want one of {', '.join(get_args(VarianceType))}")
        var = (self.posterior_var if variance_type == "fixed_small" else self.betas).clone()
        var[0] = 0
        return var.sqrt()

    def step(
        self,
        x_t: Tensor,
        eps: Tensor,
        t: int | Tensor,
        z: Tensor | None = None,
        *,
        variance_type: VarianceType = "fixed_small",
        clip: float | None = None,
    ) -> Tensor:
        """Algorithm 2, line 4: x_t -> x_{t-1}.

        Args:
            x_t: [N, ...] state.
            eps: like x_t, of any float dtype: what the network predicted.
            z: like x_t, standard normal; None leaves out sigma_t z (sigma_0 is 0).
            variance_type: see `sigmas`.
            clip: clamp the predicted x_0 to [-clip, clip], and take the posterior's mean (eq. 7) there; None: eq. 11.
        """
        if clip is None:
            shift = _coefficient(self.betas / (1 - self.alphas_cumprod).sqrt(), t, x_t) * eps.to(x_t.dtype)
            mean = (x_t - shift) / _coefficient(self.alphas.sqrt(), t, x_t)
        else:
            mean = self.posterior(self.predicted_x_0(x_t, t, eps).clamp(-clip, clip), x_t, t).mean
        return mean if z is None else mean + _coefficient(self.sigmas(variance_type), t, x_t) * z

    def sample(
        self,
        model: Model,
        x_T: Tensor,
        noise: Callable[[int], Tensor] | None,
        *,
        variance_type: VarianceType = "fixed_small",
        clip: float | None = None,
    ) -> Tensor:
        """Algorithm 2: all steps, T-1 down to 0.

        Args:
            model: eps_theta(x_t, t), t [N] int64.
            x_T: [N, ...] standard normal.
            noise: returns z of the step at t, like x_T; called with T-1, ..., 1. None: without sigma_t z.
            variance_type, clip: see `step`.
        Returns: x_0, like x_T.
        """
        x = x_T
        for t in reversed(range(self.T)):  # line 2
            eps = model(x, torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device))
            z = noise(t) if noise and t else None  # line 3
            x = self.step(x, eps, t, z, variance_type=variance_type, clip=clip)  # line 4
        return x


def _coefficient(values: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
    """values[t] in the dtype of x, broadcastable over the elements of each entry."""
    return _broadcast_columns(values.to(x.device)[t].unsqueeze(-1), x)[0]


def _broadcast_columns(row: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The K columns of row, [K] or [N, K], in the dtype of x, broadcastable over the elements of each entry."""
    return row.to(x.dtype).reshape(-1, row.shape[-1], *[1] * (x.ndim - 1)).unbind(1)
