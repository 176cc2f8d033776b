"""Noise schedules in float64, and the table with one row of eight float32 numbers per reverse step.

Every supported sampler is an affine update of the state, so samplers differ in their rows and in nothing else. With x
the state, m the network's output and z standard normal (specification: `fastddpm.reference.diffusion.update`):

    w      = clamp(cx*x + cm*m, lo, hi)      x_0 = scale*w
    x_prev = ((A*w + B*x) + C*m) + S*z       clipping x_0
    x_prev =  (B*x + C*m) + S*z              not clipping: A*w is folded into B and C, in float64

The scale stands apart because late steps predict x_0 as a small difference times a large number (eq. 15): made of two
large numbers it would lack the digits in which they agree.

Equation numbers are those of Ho et al. 2020 (arXiv:2006.11239) unless another paper is named. Option names, defaults
and meanings are those of diffusers' DDPMScheduler and DDIMScheduler, with these deliberate differences:

- The last step returns the mean: S = 0 wherever no timestep follows. diffusers draws noise there unless it is at t = 0,
  so with trailing spacing or an offset (sigma_t = 0.321 at the end of 10 trailing steps with fixed_large).
- The previous timestep is the next one visited, for DDIM too; diffusers' DDIM subtracts T // steps from t instead.
- Trailing spacing visits exactly `steps` timesteps; diffusers adds t = -1 for 62 of the 1000 step counts at T = 1000.
- fixed_large_log has sigma_t = sqrt(beta_t), as fixed_large; diffusers takes the root of log(beta_t), which is NaN.
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS = ("cx", "cm", "lo", "hi", "A", "B", "C", "S")

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
SAMPLERS = ("ddpm", "ddim")

_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
# keys of published configs that change nothing: they serve thresholding or other schedulers, or no longer exist
_INERT = {"dynamic_thresholding_ratio", "sample_max_value", "tensor_format", "skip_prk_steps", "predict_epsilon"}


@dataclass(frozen=True, eq=False)
class StepTable:
    """The visited timesteps in ascending order, one row of coefficients each; row S-1 is the first step taken.

    Attributes:
        rows: [S, 8] float32, COLUMNS. cx and cm give w in both modes; lo and hi are infinite without clipping.
        scale: [S] float32.
        timesteps: [S] int32, ascending, each 0 <= t < num_train_timesteps.
        clip: whether x_0 is clipped, which is to say: which of the two forms of the update the rows are for.
        num_train_timesteps: T.
    """

    rows: Tensor
    scale: Tensor
    timesteps: Tensor
    clip: bool
    num_train_timesteps: int

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> "StepTable":
        return replace(
            self, rows=self.rows.to(device), scale=self.scale.to(device), timesteps=self.timesteps.to(device)
        )


@dataclass(frozen=True)
class Schedule:
    """A forward process and how to reverse it; fields and defaults are diffusers' scheduler options.

    Args:
        num_train_timesteps: T >= 1.
        beta_start, beta_end: 0 < beta < 1; used by linear, scaled_linear and sigmoid.
        beta_schedule: one of BETA_SCHEDULES.
        trained_betas: the T betas themselves instead of a named schedule: a sequence, an array or a tensor.
        variance_type: of the DDPM sampler: fixed_small is the posterior's (eq. 7), fixed_large beta_t; `_log` the same.
            For `likelihood` alone, learned, the variance itself, and learned_range (arXiv:2102.09672, eq. 15), which a
            network with twice the channels returns as its second half; `table` refuses them.
        clip_sample, clip_sample_range: clip the predicted x_0 to +-range.
        prediction_type: what the network returns: epsilon, sample (x_0) or v_prediction (arXiv:2202.00512).
        timestep_spacing, steps_offset: which timesteps fewer than T steps visit; the offset is for leading alone.
        rescale_betas_zero_snr: make x_T pure noise, abar_{T-1} = 0 (Lin et al. 2023, arXiv:2305.08891, algorithm 1).
        thresholding: dynamic thresholding; must be False.
        set_alpha_to_one: DDIM's last step ends at abar = 1, else at abar_0.
    Raises: ValueError: an option is unknown, unsupported or out of range.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | np.ndarray | Tensor | None = None
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    thresholding: bool = False
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        _whole("num_train_timesteps", self.num_train_timesteps, 1)
        _whole("steps_offset", self.steps_offset, 0)
        for name in ("beta_start", "beta_end", "clip_sample_range"):
            value = getattr(self, name)
            if not _real(value) or value <= 0:
                raise ValueError(f"{name} is {value!r}; want a number > 0")
        for name in ("num_train_timesteps", "steps_offset"):
            object.__setattr__(self, name, int(getattr(self, name)))  # numpy's numbers are not JSON's
        for name in ("beta_start", "beta_end", "clip_sample_range"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("clip_sample", "rescale_betas_zero_snr", "thresholding", "set_alpha_to_one"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; want True or False")
        _known("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _known("variance_type", self.variance_type, (*VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES))
        _known("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _known("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.thresholding:
            raise ValueError(
                "thresholding is True; dynamic thresholding is not supported, "
                "use thresholding=False with clip_sample=True and a clip_sample_range"
            )
        if self.trained_betas is not None:
            given = _listed(self.trained_betas)
            for beta in given:
                if not _real(beta):
                    raise ValueError(f"trained_betas: an entry is {beta!r}; want a number for each timestep")
            if len(given) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas holds {len(given)} betas, but num_train_timesteps is {self.num_train_timesteps}; "
                    "pass num_train_timesteps=len(trained_betas)"
                )
            object.__setattr__(self, "trained_betas", tuple(map(float, given)))  # hashable, comparable
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError("rescale_betas_zero_snr is True; it keeps abar_0 and zeroes abar_T-1, so it needs T >= 2")
        inside = (self.betas > 0) & (self.betas < 1)
        inside[-1] |= self.betas[-1] == 1
        if not inside.all():
            source = "trained_betas" if self.trained_betas is not None else "beta_start and beta_end"
            t = int(inside.long().argmin())
            raise ValueError(f"{source} give beta {self.betas[t]:g} at t={t}; want 0 < beta < 1 (the last may be 1)")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """The schedule of a diffusers scheduler_config.json, given as a dict.

        Keys that start with "_" are ignored, save for a `_class_name` that is not supported, and so are unknown options
        that are null or false. A DDIM config does not choose the sampler: `table` does.

        Raises: ValueError: an option or the scheduler's class is unknown or unsupported.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config is a {type(config).__name__}; want the dict of a scheduler_config.json")
        _known("scheduler config: _class_name", config.get("_class_name", _SCHEDULERS[0]), _SCHEDULERS)
        names = [field.name for field in fields(cls)]
        for key, value in config.items():
            if not (key.startswith("_") or key in _INERT or value is None or value is False):
                _known("scheduler config: option", key, names)
        options = {key: value for key, value in config.items() if key in names}
        if config.get("predict_epsilon") is False:  # how old versions of diffusers wrote prediction_type="sample"
            options.setdefault("prediction_type", "sample")
        return cls(**options)

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready dict that diffusers' DDPMScheduler.from_config and Schedule.from_config load."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        betas = self.trained_betas
        return {"_class_name": _SCHEDULERS[0], **config, "trained_betas": None if betas is None else list(betas)}

    @property
    def learns_variance(self) -> bool:
        """Whether the network returns the reverse process's variance, too: in as many channels again."""
        return self.variance_type in LEARNED_VARIANCE_TYPES

    @cached_property
    def betas(self) -> Tensor:
        """[T] float64: variances of the forward process (eq. 2)."""
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        else:
            betas = _named_betas(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        return _rescale_zero_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas(self) -> Tensor:
        """[T] float64: 1 - betas."""
        return 1 - self.betas

    @cached_property
    def log_alphas_cumprod(self) -> Tensor:
        """[T] float64: log abar, of which 1 - abar and 1 - abar_t/abar_prev follow without cancellation."""
        return torch.log1p(-self.betas).cumsum(0)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """[T] float64: abar, products of the alphas (eq. 4)."""
        return self.log_alphas_cumprod.exp()

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """[T] float64: abar shifted by one, starting at 1."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    def timesteps(self, steps: int | None = None) -> Tensor:
        """The timesteps that `steps` steps visit (None: all T): [steps] int64, ascending.

        Raises: ValueError: steps is not a whole number from 1 to T, or the offset leads beyond T-1.
        """
        T = self.num_train_timesteps
        if steps is None:
            return torch.arange(T)
        _whole("steps", steps, 1, T)
        if self.timestep_spacing == "leading":
            visited = np.arange(steps) * (T // steps) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            # the floating-point range of diffusers, to round ties like it; its length can be steps + 1, hence the cut
            visited = np.arange(T, 0, -T / steps)[:steps][::-1].round() - 1
        else:
            visited = np.linspace(0, T - 1, steps).round()
        if visited[-1] >= T:
            raise ValueError(
                f"steps is {steps} with steps_offset {self.steps_offset}, which visits t={visited[-1]}, but the last "
                f"timestep is {T - 1}; use fewer steps, steps_offset=0 or trailing spacing"
            )
        return torch.from_numpy(visited.astype(np.int64))

    def table(
        self,
        steps: int | None = None,
        *,
        sampler: str = "ddpm",
        eta: float = 0.0,
        timesteps: Iterable[int] | None = None,
        noise: float = True,
    ) -> StepTable:
        """The rows of one sampler, on the CPU.

        Args:
            steps: how many of the T timesteps to visit (None: all), spaced as timestep_spacing says.
            sampler: "ddpm" (Algorithm 2; over fewer steps alpha_t is abar_t/abar_prev) or "ddim" (arXiv:2010.02502).
            eta: of DDIM: 0 is deterministic, 1 has DDPM's noise. More than 1 works while sigma_t^2 <= 1 - abar_prev.
            timesteps: visit exactly these, strictly descending, instead of `steps`.
            noise: what sigma_t z is multiplied by; False switches it off: every step returns its mean.
        Raises: ValueError: an argument is not as above, the network predicts epsilon where abar_t = 0, or variances are
            learned.
        """
        if timesteps is None:
            visited = self.timesteps(steps)
        elif steps is None:
            visited = _descending(timesteps, self.num_train_timesteps).flip(0)
        else:
            raise ValueError(f"steps is {steps} and timesteps is given too; pass one of them")
        rows, scale = step_rows(self, visited, sampler=sampler, eta=eta, noise=noise)
        return StepTable(
            rows=rows.float(),
            scale=scale.float(),
            timesteps=visited.int(),
            clip=self.clip_sample,
            num_train_timesteps=self.num_train_timesteps,
        )

    def noising_table(self) -> Tensor:
        """[T, 2] float32: sqrt(abar_t), sqrt(1 - abar_t), the coefficients of x_0 and eps in x_t (eq. 4)."""
        log_abar = self.log_alphas_cumprod
        return torch.stack([log_abar.exp().sqrt(), (-log_abar.expm1()).sqrt()], 1).float()


def step_rows(
    schedule: Schedule, timesteps: Tensor, *, sampler: str = "ddpm", eta: float = 0.0, noise: float = True
) -> tuple[Tensor, Tensor]:
    """The rows and scales of `Schedule.table` before they are rounded: [S, 8] and [S] float64.

    Args: timesteps: [S] int64, ascending; the others as `Schedule.table` takes them.
    """
    _known("sampler", sampler, SAMPLERS)
    if schedule.learns_variance:
        raise ValueError(
            f"variance_type is {schedule.variance_type!r}; sampling with learned variances is not supported, "
            f"use one of {', '.join(VARIANCE_TYPES)} with a network that returns the mean's channels alone"
        )
    if not _real(eta) or eta < 0:
        raise ValueError(f"eta is {eta!r}; want a number, 0 <= eta (1 gives DDPM's noise)")
    if not isinstance(noise, bool) and (not _real(noise) or noise < 0):
        raise ValueError(f"noise is {noise!r}; want True, False or a number >= 0, the share of sigma_t z that is added")
    if sampler == "ddpm" and eta != 0:
        raise ValueError(
            f"eta is {eta} with sampler 'ddpm'; eta is for sampler='ddim', variance_type sets DDPM's noise"
        )

    log_abar = schedule.log_alphas_cumprod[timesteps]
    ends_at_one = sampler == "ddpm" or schedule.set_alpha_to_one
    log_last = torch.zeros(1, dtype=torch.float64) if ends_at_one else schedule.log_alphas_cumprod[:1]
    log_prev = torch.cat([log_last, log_abar[:-1]])
    abar, noise_var = log_abar.exp(), 0 - log_abar.expm1()  # noise_var = 1 - abar
    abar_prev, noise_var_prev = log_prev.exp(), 0 - log_prev.expm1()
    # summed over each step by itself: a difference of the cumulated logs would lose the digits of a late, small beta
    edges, log_alphas = [-1 if ends_at_one else 0, *timesteps.tolist()], torch.log1p(-schedule.betas)
    log_alpha = torch.stack([log_alphas[start + 1 : end + 1].sum() for start, end in pairwise(edges)])
    alpha, beta = log_alpha.exp(), 0 - log_alpha.expm1()
    posterior_var = noise_var_prev / noise_var * beta  # eq. 7

    (scale, cx, cm), (ex, em) = _predictions(schedule.prediction_type, abar, noise_var, timesteps)
    if sampler == "ddpm":
        A = abar_prev.sqrt() * beta / noise_var  # eq. 7
        B = alpha.sqrt() * noise_var_prev / noise_var
        C = torch.zeros_like(A)
        S = (posterior_var if schedule.variance_type.startswith("fixed_small") else beta).sqrt()
    else:
        # 1 - abar_prev - sigma_t^2, arranged so that nothing cancels for eta <= 1
        direction_var = noise_var_prev * (alpha * noise_var_prev + (1 - eta * eta) * beta) / noise_var
        if not (direction_var >= 0).all():
            t = int(timesteps[int((direction_var >= 0).long().argmin())])
            raise ValueError(f"eta is {eta}, which asks for sigma_t^2 > 1 - abar_prev at t={t}; use 0 <= eta <= 1")
        A = abar_prev.sqrt()  # arXiv:2010.02502, eq. 12; eps is that of the unclipped x_0
        B = direction_var.sqrt() * ex
        C = direction_var.sqrt() * em
        S = eta * posterior_var.sqrt()  # eq. 16
    A = A * scale
    if not schedule.clip_sample:
        A, B, C = torch.zeros_like(A), B + A * cx, C + A * cm
    S[0] = 0
    S = float(noise) * S
    hi = (schedule.clip_sample_range if schedule.clip_sample else math.inf) / scale
    return torch.stack([cx, cm, -hi, hi, A, B, C, S], 1), scale


def _predictions(
    prediction_type: str, abar: Tensor, noise_var: Tensor, timesteps: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((scale, cx, cm), (ex, em)): x_0 = scale*(cx*x + cm*m), eps = ex*x + em*m, which eq. 4 ties together."""
    signal, noise, zero, one = abar.sqrt(), noise_var.sqrt(), torch.zeros_like(abar), torch.ones_like(abar)
    if prediction_type == "sample":
        return (one, zero, one), (1 / noise, -signal / noise)
    if prediction_type == "v_prediction":
        return (one, signal, -noise), (noise, signal)
    if not signal[-1] > 1 / torch.finfo(torch.float32).max:
        raise ValueError(
            f"prediction_type is 'epsilon', but abar is {abar[-1]:g} at t={timesteps[-1]}: x_t holds no trace of x_0 "
            "there, so eps cannot give it; use a network with prediction_type 'v_prediction' or 'sample'"
        )
    return (1 / signal, one, -noise), (zero, one)


def _named_betas(name: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    def linspace(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, T, dtype=torch.float64)

    if name == "linear":
        return linspace(beta_start, beta_end)
    if name == "scaled_linear":
        return linspace(math.sqrt(beta_start), math.sqrt(beta_end)) ** 2
    if name == "sigmoid":
        return linspace(-6, 6).sigmoid() * (beta_end - beta_start) + beta_start
    abar = _cosine if name == "squaredcos_cap_v2" else _laplace
    return torch.tensor([min(1 - abar((t + 1) / T) / abar(t / T), 0.999) for t in range(T)], dtype=torch.float64)


def _cosine(u: float) -> float:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, at the fraction u = t/T."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """diffusers' Laplace schedule (after Hang et al. 2024, arXiv:2407.03297) at the fraction u = t/T."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _rescale_zero_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2023 (arXiv:2305.08891), algorithm 1: shift and scale sqrt(abar) to end at 0, its first value kept."""
    root = (1 - betas).cumprod(0).sqrt()
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def _descending(timesteps: Any, T: int) -> Tensor:
    listed = [_whole("timesteps: an entry", t, 0, T - 1) for t in _listed(timesteps)]
    if not listed:
        raise ValueError("timesteps is empty; want a strictly descending list of timesteps, or None")
    for before, after in pairwise(listed):
        if after >= before:
            raise ValueError(f"timesteps has {after} after {before}; want strictly descending timesteps")
    return torch.tensor(listed)


def _listed(values: Any) -> list:
    """The elements of a sequence, an array or a tensor; anything else is its own only element."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) else [values]


def _whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        span = f">= {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; want a whole number {span}")
    return int(value)


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _known(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; known: {', '.join(known)}")
