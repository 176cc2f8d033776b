"""Noise schedules in float64: the forward process, its options, and the timesteps that a sampler visits.

Equation numbers are those of Ho et al. 2020 (arXiv:2006.11239) unless another paper is named. Option names, defaults
and meanings are those of diffusers' DDPMScheduler and DDIMScheduler, with these deliberate differences:

- The last step returns the mean: S = 0 in the row of the earliest visited timestep. diffusers adds noise there unless
  that timestep is 0, which it is not with trailing spacing or an offset (sigma_t = 0.321 at the end of 10 trailing
  steps with fixed_large).
- The previous timestep is the next one visited, for DDIM too; diffusers' DDIM subtracts T // steps from t instead.
- Trailing spacing visits exactly `steps` timesteps; diffusers adds t = -1 for 62 of the 1000 step counts at T = 1000.
- fixed_large_log has sigma_t = sqrt(beta_t), like fixed_large; diffusers takes the root of log(beta_t), which is NaN.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.core.betas import named_betas, rescale_zero_snr
from fastddpm.core.checks import checked_call, flag, is_real, one_of, real, shown, whole
from fastddpm.core.names import (
    BETA_SCHEDULES,
    LEARNED_VARIANCE_TYPES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
)
from fastddpm.core.table import StepTable, step_rows

MOST_TIMESTEPS = 1_000_000  # for which the tables take seconds and 100 MB

_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
# keys of published configs without effect here: they belong to thresholding or to other schedulers, or no longer exist
_IGNORED = {"dynamic_thresholding_ratio", "sample_max_value", "tensor_format", "skip_prk_steps", "predict_epsilon"}


@dataclass(frozen=True)
class Schedule:
    """A forward process and how to reverse it; fields and defaults are diffusers' scheduler options.

    Args:
        num_train_timesteps: T, 1 to a million.
        beta_start, beta_end: 0 < beta < 1; used by linear, scaled_linear and sigmoid.
        beta_schedule: one of BETA_SCHEDULES.
        trained_betas: the T betas themselves instead of a named schedule: a sequence, an array or a tensor.
        variance_type: of the DDPM sampler: fixed_small is the posterior's (eq. 7), fixed_large is beta_t, and `_log`
            changes nothing. With learned and learned_range, the network has twice the channels, and the second half
            of its output is the variance, or interpolates between those two (arXiv:2102.09672, eq. 15). DDIM does not
            use it.
        clip_sample, clip_sample_range: clip the predicted x_0 to +-range.
        prediction_type: what the network returns: epsilon, sample (x_0) or v_prediction (arXiv:2202.00512).
        timestep_spacing, steps_offset: which timesteps fewer than T steps visit; only leading spacing uses the offset.
        rescale_betas_zero_snr: make x_T pure noise, abar_{T-1} = 0 (Lin et al. 2023, arXiv:2305.08891, algorithm 1).
        thresholding: dynamic thresholding; must be False.
        set_alpha_to_one: DDIM's last step ends at abar = 1, else at abar_0.
        use_clipped_model_output: DDIM takes the eps that corresponds to the clipped x_0, as guided-diffusion does, not
            the network's.
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
    use_clipped_model_output: bool = False

    def __post_init__(self) -> None:
        self._check_options()
        if self.trained_betas is not None:
            self._set("trained_betas", self._checked_betas(elements(self.trained_betas)))
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError(
                "rescale_betas_zero_snr is True; it keeps abar_0 and makes abar_{T-1} zero, so it needs T >= 2"
            )
        inside = (self.betas > 0) & (self.betas < 1)
        inside[-1] |= self.betas[-1] == 1
        if not inside.all():
            source = "trained_betas" if self.trained_betas is not None else "beta_start and beta_end"
            t = int(inside.long().argmin())
            raise ValueError(f"{source} give beta {self.betas[t]:g} at t={t}; want 0 < beta < 1 (the last may be 1)")

    def _check_options(self) -> None:
        """Check all options but trained_betas; numpy's numbers become Python's, which JSON can hold."""
        for name, low in (("num_train_timesteps", 1), ("steps_offset", 0)):
            self._set(name, whole(name, getattr(self, name), low, MOST_TIMESTEPS))
        for name in ("beta_start", "beta_end", "clip_sample_range"):
            self._set(name, real(name, getattr(self, name), 0, above=True))
        flags = "clip_sample", "rescale_betas_zero_snr", "thresholding", "set_alpha_to_one", "use_clipped_model_output"
        for name in flags:
            flag(name, getattr(self, name))
        one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        one_of("variance_type", self.variance_type, (*VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES))
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.thresholding:
            raise ValueError(
                "thresholding is True; dynamic thresholding is not supported, "
                "use thresholding=False with clip_sample=True and a clip_sample_range"
            )

    def _checked_betas(self, betas: list) -> tuple[float, ...]:
        for beta in betas:
            if not is_real(beta):
                raise ValueError(f"trained_betas: an entry is {shown(beta)}; want a number for each timestep")
        if len(betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas holds {len(betas)} betas, but num_train_timesteps is {self.num_train_timesteps}; "
                "pass num_train_timesteps=len(trained_betas)"
            )
        return tuple(map(float, betas))  # hashable and comparable

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    @checked_call
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """The schedule of a diffusers scheduler_config.json, given as a dict.

        Ignores keys that start with "_", except for `_class_name`, and unknown options that are null or false. A DDIM
        config does not select the DDIM sampler; the `sampler` argument of `table` does.

        Raises: ValueError: an option or the scheduler's class is unknown or unsupported, or a value is out of range.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config is a {type(config).__name__}; want the dict of a scheduler_config.json")
        one_of("scheduler config: _class_name", config.get("_class_name", _SCHEDULERS[0]), _SCHEDULERS)
        names = [field.name for field in fields(cls)]
        for key, value in config.items():
            if not (str(key).startswith("_") or key in _IGNORED or value is None or value is False):
                one_of("scheduler config: an option", key, names)
        options = {key: value for key, value in config.items() if key in names}
        predicts_epsilon = config.get("predict_epsilon")
        if predicts_epsilon is not None and not flag("scheduler config: predict_epsilon", predicts_epsilon):
            options.setdefault("prediction_type", "sample")  # which is what old versions of diffusers call it
        return cls(**options)

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready dict that diffusers' DDPMScheduler.from_config and Schedule.from_config load."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.use_clipped_model_output:  # an argument of DDIM's step in diffusers, which warns of the option
            del config["use_clipped_model_output"]
        betas = self.trained_betas
        return {"_class_name": _SCHEDULERS[0], **config, "trained_betas": None if betas is None else list(betas)}

    @property
    def learns_variance(self) -> bool:
        """Whether the network also returns the variance of the reverse process, in a second half of its channels."""
        return self.variance_type in LEARNED_VARIANCE_TYPES

    @cached_property
    def betas(self) -> Tensor:
        """[T] float64: variances of the forward process (eq. 2)."""
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64, device="cpu")
        else:
            betas = named_betas(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        return rescale_zero_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas(self) -> Tensor:
        """[T] float64: 1 - betas."""
        return 1 - self.betas

    @cached_property
    def log_alphas_cumprod(self) -> Tensor:
        """[T] float64: log abar, which gives 1 - abar and 1 - abar_t/abar_prev without cancellation."""
        return torch.log1p(-self.betas).cumsum(0)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """[T] float64: abar, products of the alphas (eq. 4)."""
        return self.log_alphas_cumprod.exp()

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """[T] float64: abar shifted by one, starting at 1."""
        return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1]])

    @checked_call
    def timesteps(self, steps: int | None = None) -> Tensor:
        """The timesteps that `steps` steps visit (None: all T): [steps] int64, ascending.

        Raises: ValueError: steps is not a whole number from 1 to T, or the offset moves a timestep beyond T-1.
        """
        T = self.num_train_timesteps
        if steps is None:
            return torch.arange(T, device="cpu")
        steps = whole("steps", steps, 1, T)
        if self.timestep_spacing == "leading":
            visited = np.arange(steps) * (T // steps) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            # the floating-point range of diffusers, to round ties as it does; the range may have steps + 1 entries
            visited = np.arange(T, 0, -T / steps)[:steps][::-1].round() - 1
        else:
            visited = np.linspace(0, T - 1, steps).round()
        if visited[-1] >= T:
            raise ValueError(
                f"steps is {steps} with steps_offset {self.steps_offset}, which visits t={visited[-1]}, but the last "
                f"timestep is {T - 1}; use fewer steps, steps_offset=0 or trailing spacing"
            )
        return torch.from_numpy(visited.astype(np.int64))

    @checked_call
    def table(
        self,
        steps: int | None = None,
        *,
        sampler: str = "ddpm",
        eta: float = 0.0,
        timesteps: Iterable[int] | None = None,
        noise: float = True,
        clip_range: tuple[float, float] | None = None,
        with_x_0: bool = False,
    ) -> StepTable:
        """The rows of one sampler, on the CPU.

        Args:
            steps: how many of the T timesteps to visit (None: all); timestep_spacing says which.
            sampler: "ddpm" (Algorithm 2; with fewer steps alpha_t is abar_t/abar_prev) or "ddim" (arXiv:2010.02502).
            eta: for DDIM: 0 is deterministic, 1 has DDPM's noise. More than 1 is allowed while
                sigma_t^2 <= 1 - abar_prev.
            timesteps: visit exactly these, strictly descending, instead of `steps`.
            noise: a factor of sigma_t z; with False (or 0) every step returns its mean.
            clip_range: where x_0 is clipped, clip it to these two numbers instead of +-clip_sample_range.
            with_x_0: rows of the form that contains x_0, also where it is not clipped.
        Raises: ValueError: an argument is not as above, or the network predicts epsilon where abar_t = 0.
        """
        if timesteps is None:
            visited = self.timesteps(steps)
        elif steps is None:
            visited = _descending(timesteps, self.num_train_timesteps).flip(0)
        else:
            raise ValueError(f"steps is {steps}, but timesteps is given too; pass one of them")
        rows, scale = step_rows(
            self, visited, sampler=sampler, eta=eta, noise=noise, clip_range=clip_range, with_x_0=with_x_0
        )
        return StepTable(
            rows=rows.float(),
            scale=scale.float(),
            timesteps=visited.int(),
            clip=self.clip_sample or with_x_0,
            num_train_timesteps=self.num_train_timesteps,
            learned=None if not self.learns_variance else self.variance_type if sampler == "ddpm" else "unused",
        )

    def noising_table(self) -> Tensor:
        """[T, 2] float32: sqrt(abar_t), sqrt(1 - abar_t), the coefficients of x_0 and eps in x_t (eq. 4)."""
        log_abar = self.log_alphas_cumprod
        return torch.stack([log_abar.exp().sqrt(), (-log_abar.expm1()).sqrt()], 1).float()


Schedule.__init__ = checked_call(Schedule.__init__)  # type: ignore[method-assign]


def _descending(timesteps: Any, T: int) -> Tensor:
    visited = [whole("timesteps: an entry", t, 0, T - 1) for t in elements(timesteps)]
    if not visited:
        raise ValueError("timesteps is empty; want a strictly descending list of timesteps, or None")
    for before, after in pairwise(visited):
        if after >= before:
            raise ValueError(f"timesteps has {after} after {before}; want strictly descending timesteps")
    return torch.tensor(visited, dtype=torch.int64, device="cpu")


def elements(values: Any) -> list:
    """The elements of a sequence, an array or a tensor, as Python objects; of a single value, a list of it."""
    if isinstance(values, Tensor):
        if values.is_meta:
            raise ValueError("a tensor on the meta device has no values; want one on a CPU or a GPU")
        values = values.detach().to_dense()
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) else [values]
