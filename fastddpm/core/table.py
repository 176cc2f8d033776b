"""The step table: one row of float32 coefficients per reverse step, and the formulas of these coefficients.

Every supported sampler is an affine update of the state, so samplers differ only in their rows. With x the state, m
the network's output and z standard normal (specification: `fastddpm.reference.diffusion.update`):

    w      = clamp(cx*x + cm*m, lo, hi)      x_0 = scale*w
    x_prev = ((A*w + B*x) + C*m) + S*z       if x_0 is clipped
    x_prev =  (B*x + C*m) + S*z              if not: A*w is folded into B and C, in float64

The scale is kept apart because late steps predict x_0 as a small difference times a large number (eq. 15). Two large
products would lose the digits in which they agree.

Where the network learns the variance, with v the second half of its output, S is multiplied by exp(L + V*v) or sqrt(v).
For inpainting, the part of x_0 that is known becomes P*x_0 + Q*z in x_prev (eq. 4), and R*x_prev + U*z goes back from
x_prev to x_t (eq. 2).

Equation numbers are those of Ho et al. 2020 (arXiv:2006.11239) unless another paper is named.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastddpm.core.checks import is_real, one_of, shown
from fastddpm.core.names import SAMPLERS

MOST_NOISE = 1e6  # by which sigma_t z may be multiplied: float32 holds the states


class StepColumns(NamedTuple):
    """The columns of step rows, each [...] of rows [..., 14]."""

    cx: Tensor
    cm: Tensor
    lo: Tensor
    hi: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    S: Tensor
    L: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor
    R: Tensor
    U: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "StepColumns":
        """The columns of rows [..., 14], as views."""
        return cls(*rows.unbind(-1))


COLUMNS = StepColumns._fields


@dataclass(frozen=True, eq=False)
class StepTable:
    """The visited timesteps in ascending order, one row of coefficients each; row S-1 is the first step taken.

    Attributes:
        rows: [S, 14] float32, COLUMNS. cx and cm give w whether or not x_0 is clipped; without clipping, lo and hi are
            infinite.
        scale: [S] float32.
        timesteps: [S] int32, ascending, each 0 <= t < num_train_timesteps.
        clip: for which of the two forms of the update the rows are; True: for the one with x_0.
        num_train_timesteps: T.
        learned: what the second half of the network's output is: None (there is none), "unused", "learned" (the
            variance) or "learned_range" (interpolates between two).
    """

    rows: Tensor
    scale: Tensor
    timesteps: Tensor
    clip: bool
    num_train_timesteps: int
    learned: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def last(self, steps: int) -> "StepTable":
        """The table of the last `steps` steps."""
        return replace(self, rows=self.rows[:steps], scale=self.scale[:steps], timesteps=self.timesteps[:steps])

    @property
    def columns(self) -> StepColumns:
        return StepColumns.of(self.rows)

    def to(self, device: torch.device | str) -> "StepTable":
        return replace(
            self, rows=self.rows.to(device), scale=self.scale.to(device), timesteps=self.timesteps.to(device)
        )


class Process(Protocol):
    """What the rows depend on: properties of a `Schedule`."""

    @property
    def betas(self) -> Tensor: ...
    @property
    def log_alphas_cumprod(self) -> Tensor: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def variance_type(self) -> str: ...
    @property
    def learns_variance(self) -> bool: ...
    @property
    def clip_sample(self) -> bool: ...
    @property
    def clip_sample_range(self) -> float: ...
    @property
    def set_alpha_to_one(self) -> bool: ...
    @property
    def use_clipped_model_output(self) -> bool: ...


def step_rows(
    schedule: Process,
    timesteps: Tensor,
    *,
    sampler: str = "ddpm",
    eta: float = 0.0,
    noise: float = True,
    clip_range: tuple[float, float] | None = None,
    with_x_0: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rows and scales of `Schedule.table` before they are rounded: [S, 14] and [S] float64.

    Args: timesteps: [S] int64, ascending; the others as in `Schedule.table`.
    """
    _check_sampler(schedule, sampler, eta, noise)
    eta, noise = float(eta), float(noise)  # numpy's would compute in their own precision
    log_abar = schedule.log_alphas_cumprod[timesteps]
    ends_at_one = sampler == "ddpm" or schedule.set_alpha_to_one
    log_last = torch.zeros(1, dtype=torch.float64, device="cpu") if ends_at_one else schedule.log_alphas_cumprod[:1]
    log_prev = torch.cat([log_last, log_abar[:-1]])
    abar, noise_var = log_abar.exp(), 0 - log_abar.expm1()  # noise_var = 1 - abar
    abar_prev, noise_var_prev = log_prev.exp(), 0 - log_prev.expm1()
    # summed separately for each step: a difference of cumulative sums would lose the digits of a late, small beta
    edges, log_alphas = [-1 if ends_at_one else 0, *timesteps.tolist()], torch.log1p(-schedule.betas)
    log_alpha = torch.stack([log_alphas[start + 1 : end + 1].sum() for start, end in pairwise(edges)])
    alpha, beta = log_alpha.exp(), 0 - log_alpha.expm1()
    posterior_var = noise_var_prev / noise_var * beta  # eq. 7

    (scale, cx, cm), (ex, em) = _predictions(schedule.prediction_type, abar, noise_var, timesteps)
    with_x_0 = with_x_0 or schedule.clip_sample
    L = V = torch.zeros_like(scale)
    if sampler == "ddpm":
        A = abar_prev.sqrt() * beta / noise_var  # eq. 7
        B = alpha.sqrt() * noise_var_prev / noise_var
        C = torch.zeros_like(A)
        S, L, V = _deviation(schedule.variance_type, posterior_var, beta)
    else:
        # 1 - abar_prev - sigma_t^2, arranged so that nothing cancels for eta <= 1
        direction_var = noise_var_prev * (alpha * noise_var_prev + (1 - eta * eta) * beta) / noise_var
        if not (direction_var >= 0).all():
            t = int(timesteps[int((direction_var >= 0).long().argmin())])
            raise ValueError(f"eta is {eta}, so that sigma_t^2 > 1 - abar_prev at t={t}; use 0 <= eta <= 1")
        A, B, C = abar_prev.sqrt(), direction_var.sqrt() * ex, direction_var.sqrt() * em  # arXiv:2010.02502, eq. 12
        if with_x_0 and schedule.use_clipped_model_output:  # the eps that the clipped x_0 corresponds to (eq. 4)
            A = A - direction_var.sqrt() * (abar / noise_var).sqrt()
            B, C = (direction_var / noise_var).sqrt(), torch.zeros_like(C)
        S = eta * posterior_var.sqrt()  # eq. 16
    A = A * scale
    if not with_x_0:
        A, B, C = torch.zeros_like(A), B + A * cx, C + A * cm
    S[0] = 0
    S = noise * S
    lo, hi = (bound / scale for bound in _bounds(schedule, clip_range))
    P, Q = abar_prev.sqrt(), noise_var_prev.sqrt()
    P[0], Q[0] = 1, 0  # the last step returns x_0
    R, U = alpha.sqrt(), beta.sqrt()
    columns = StepColumns(cx=cx, cm=cm, lo=lo, hi=hi, A=A, B=B, C=C, S=S, L=L, V=V, P=P, Q=Q, R=R, U=U)
    return torch.stack(columns, 1), scale


def _deviation(variance_type: str, posterior_var: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, L and V: sigma_t is S exp(L + V v), or S sqrt(v) for "learned". posterior_var is 0 in the last step's row."""
    zero = torch.zeros_like(beta)
    if variance_type == "learned":
        return torch.ones_like(beta), zero, zero
    if variance_type != "learned_range":
        return (posterior_var if variance_type.startswith("fixed_small") else beta).sqrt(), zero, zero
    L, V = zero.clone(), zero.clone()  # arXiv:2102.09672, eq. 15, where (v + 1) / 2 interpolates
    log_min, log_max = posterior_var[1:].log(), beta[1:].log()
    L[1:], V[1:] = (log_max + log_min) / 4, (log_max - log_min) / 4
    return torch.ones_like(beta), L, V


def _bounds(schedule: Process, clip_range: tuple[float, float] | None) -> tuple[float, float]:
    """Between which numbers x_0 is clipped."""
    if not schedule.clip_sample:
        return -math.inf, math.inf
    return clip_range or (-schedule.clip_sample_range, schedule.clip_sample_range)


def x_0_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """The columns that define the predicted x_0 = scale clamp(cx x + cm m, lo, hi): cx, cm, lo, hi, scale.

    Args: rows: [S, 14] step rows; scale: [S].
    Returns: [S, 5].
    """
    columns = StepColumns.of(rows)
    return torch.stack([columns.cx, columns.cm, columns.lo, columns.hi, scale], 1)


def _check_sampler(schedule: Process, sampler: str, eta: float, noise: float) -> None:
    one_of("sampler", sampler, SAMPLERS)
    if not is_real(eta) or eta < 0:
        raise ValueError(f"eta is {shown(eta)}; want a number, 0 <= eta (1 gives DDPM's noise)")
    if not isinstance(noise, bool) and (not is_real(noise) or not 0 <= noise <= MOST_NOISE):
        raise ValueError(
            f"noise is {shown(noise)}; want True, False or a number, 0 to {MOST_NOISE:g}, by which sigma_t z is "
            "multiplied"
        )
    if sampler == "ddpm" and eta != 0:
        raise ValueError(
            f"eta is {eta} with sampler 'ddpm'; eta is for sampler='ddim', variance_type sets DDPM's noise"
        )


def _predictions(
    prediction_type: str, abar: Tensor, noise_var: Tensor, timesteps: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((scale, cx, cm), (ex, em)): x_0 = scale*(cx*x + cm*m) and eps = ex*x + em*m, which eq. 4 relates."""
    signal, noise, zero, one = abar.sqrt(), noise_var.sqrt(), torch.zeros_like(abar), torch.ones_like(abar)
    if prediction_type == "sample":
        return (one, zero, one), (1 / noise, -signal / noise)
    if prediction_type == "v_prediction":
        return (one, signal, -noise), (noise, signal)
    if not signal[-1] > 1 / torch.finfo(torch.float32).max:
        raise ValueError(
            f"prediction_type is 'epsilon', but abar is {abar[-1]:g} at t={timesteps[-1]}: x_t contains nothing of x_0 "
            "there, so eps does not determine it; use a network with prediction_type 'v_prediction' or 'sample'"
        )
    return (1 / signal, one, -noise), (zero, one)
