"""diffusers' DDPM and DDIM schedulers with tabulated coefficients; on a GPU a step is one kernel.

Each class inherits from diffusers' own. An overridden method takes a fast path in the ordinary cases and calls the
inherited one in all others, so bad input raises diffusers' own errors. Equation numbers are those of Ho et al. 2020
(arXiv:2006.11239) unless another paper is named; numbers such as #14569 are issues of huggingface/diffusers.
"""

import numbers
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import diffusers
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_parallel, scheduling_ddpm, scheduling_ddpm_parallel
from torch import Tensor

from fastddpm.core.memory import send
from fastddpm.diffusers.noise_sources import Generators, Noise, checked_noise
from fastddpm.diffusers.scheduler_base import INTEGERS, STEP_DTYPES, STEP_METHODS, Scheduler
from fastddpm.diffusers.tables import Columns

LEARNED = ("learned", "learned_range")

_in_inherited_step: ContextVar[bool] = ContextVar("in_inherited_step", default=False)


class DDPM(Scheduler):
    """What both DDPM schedulers override."""

    one: Tensor  # abar_prev at t = 0
    variance_type: str
    custom_timesteps: bool
    num_inference_steps: int | None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        noise: Noise | None = None,
    ) -> Any:
        """x_t -> x_{t-1}: Algorithm 2 line 4, with x_0 predicted first (eq. 15, 7).

        On a CPU float32 and float64 give diffusers' bits; 16-bit tensors are widened to float32 and the results rounded
        once. On a GPU this launches one kernel besides drawing the noise, and the host does not wait for it. If
        `timestep` is on the GPU and not an element of `timesteps`, noise is drawn even at t = 0, where it is not
        added.

        Args:
            model_output: [N, C, ...]; [N, 2 C, ...] with a learned variance.
            timestep: an element of `timesteps`, on any device, or its value.
            sample: x_t, [N, C, ...].
            generator: draws the noise; each of a list draws that of its entry.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
            noise: overrides the attribute `noise` for this step.
        Raises: what diffusers' own step raises; ValueError: noise is not as `Scheduler` describes it.
        """
        result = self._tabulated_step(model_output, timestep, sample, generator, noise)
        if result is None:
            check_diffusers_draws(noise, self.noise)
            return self._inherited_step(model_output, timestep, sample, generator, return_dict)
        return self.output(*result) if return_dict else result

    def _tabulated_step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators, noise: Noise | None
    ) -> tuple[Tensor, Tensor] | None:
        """(x_prev, x_0), or None if diffusers' own step has to run."""
        variance_type, v = self.variance_type, None
        learned = variance_type if variance_type in LEARNED else None
        if learned is not None and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, v = model_output.split(sample.shape[1], 1)
        listed = isinstance(self.timesteps, Tensor) and self.timesteps.ndim == 1 and self.timesteps.dtype in INTEGERS
        if not listed or variance_type != self.config.variance_type or (learned is None) != (v is None):
            return None
        return self._fast_step(
            sample, model_output, timestep, generator, noise,
            key=(self.custom_timesteps, self.num_inference_steps, variance_type), sources=(self.timesteps, self.one),
            adds_noise=lambda t: t is None or t > 0, v=v, learned=learned,
        )  # fmt: skip

    def _inherited_step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators, return_dict: bool
    ) -> Any:
        step = super().step  # type: ignore[misc]
        if self.variance_type != "fixed_large_log":
            return step(model_output, timestep, sample, generator, return_dict)
        token = _in_inherited_step.set(True)
        try:
            return step(model_output, timestep, sample, generator, return_dict)
        finally:
            _in_inherited_step.reset(token)

    def _get_variance(
        self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        # diffusers' step takes the square root of the result, which for fixed_large_log is a logarithm: NaN (#14569)
        if self.config.variance_type == "fixed_large_log" and _in_inherited_step.get():
            variance_type = "fixed_large"
        return super()._get_variance(t, predicted_variance, variance_type)  # type: ignore[misc]

    def _columns_of_steps(
        self, custom_timesteps: Any, num_inference_steps: Any, variance_type: Any
    ) -> tuple[list[int], Columns]:
        abar = self.alphas_cumprod
        follows = {t: t - 1 for t in range(-1, len(abar))}
        if custom_timesteps or num_inference_steps:
            ascending = self._visited_timesteps()[::-1]
            # of equal timesteps the first visited counts
            follows = dict(zip(ascending, [-1, *ascending], strict=False))
        follows = {t: prev for t, prev in follows.items() if -1 <= t < len(abar) and prev < len(abar)}
        pairs = torch.tensor(list(follows.items()), dtype=torch.int64, device="cpu").reshape(-1, 2)
        t, prev = send(pairs, abar.device).unbind(1)
        abar_t = abar[t]
        abar_prev = torch.where(prev < 0, send(self.one, abar.device), abar[prev.clamp(min=0)])
        rest_t, rest_prev = 1 - abar_t, 1 - abar_prev
        alpha = abar_t / abar_prev
        beta = 1 - alpha
        var = (rest_prev / rest_t * beta).clamp(min=1e-20)  # eq. 7
        if variance_type == "fixed_small_log":
            sigma = (0.5 * var.log()).exp()
        elif variance_type in ("fixed_large", "fixed_large_log"):  # the latter too (#14569)
            sigma = beta**0.5
        else:
            sigma = var**0.5
        return list(follows), Columns(
            signal=abar_t**0.5,
            noise=rest_t**0.5,
            of_x_0=abar_prev**0.5 * beta / rest_t,
            of_w=alpha**0.5 * rest_prev / rest_t,
            sigma=sigma,
            log_min=var.log(),
            log_max=beta.log(),
            noisy=(t > 0).to(abar.dtype),
        )


class DDIM(Scheduler):
    """What both DDIM schedulers override."""

    final_alpha_cumprod: Tensor
    num_inference_steps: int | None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        noise: Noise | None = None,
    ) -> Any:
        """x_t -> x_{t-1} of DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16); otherwise like `DDPM.step`.

        Args:
            model_output, sample: [N, C, ...].
            timestep: an element of `timesteps`, on any device, or its value. The next one is T // steps below it, as in
                diffusers: for linspace and trailing spacing that is not always the next in `timesteps` (#11347).
            eta: 0 is deterministic, 1 has DDPM's noise.
            use_clipped_model_output: use the eps that belongs to the clipped x_0.
            generator: draws the noise; each of a list draws that of its entry.
            variance_noise: the noise, instead of a generator.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
            noise: overrides the attribute `noise` for this step.
        Raises: what diffusers' own step raises; ValueError: noise is not as `Scheduler` describes it.
        """
        T, steps = self.config.num_train_timesteps, self.num_inference_steps
        ordinary = isinstance(eta, numbers.Real) and isinstance(steps, numbers.Integral) and steps > 0
        adds_noise = ordinary and eta > 0
        z = variance_noise if adds_noise else None
        if z is not None:
            ordinary = (
                generator is None
                and isinstance(z, Tensor)
                and z.dtype in STEP_DTYPES
                and z.shape == sample.shape
                and z.device == sample.device
            )
        result = None
        if ordinary:
            result = self._fast_step(
                sample, model_output, timestep, generator, noise,
                key=(T, steps, eta), sources=(self.final_alpha_cumprod,), adds_noise=lambda t: adds_noise,
                sampler="ddim_clipped" if use_clipped_model_output else "ddim", z=z,
            )  # fmt: skip
        if result is None:
            check_diffusers_draws(noise, self.noise)
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        return self.output(*result) if return_dict else result

    def _columns_of_steps(self, T: Any, steps: Any, eta: Any) -> tuple[list[int], Columns]:
        abar = self.alphas_cumprod
        t = torch.arange(-1, len(abar), device=abar.device)
        prev = t - T // steps
        abar_t = abar[t]
        abar_prev = torch.where(prev < 0, send(self.final_alpha_cumprod, abar.device), abar[prev.clamp(min=0)])
        rest_t, rest_prev = 1 - abar_t, 1 - abar_prev
        sigma = eta * ((rest_prev / rest_t) * (1 - abar_t / abar_prev)) ** 0.5  # eq. 16
        unused = torch.zeros_like(sigma)
        return list(range(-1, len(abar))), Columns(
            signal=abar_t**0.5,
            noise=rest_t**0.5,
            of_x_0=abar_prev**0.5,
            of_w=(1 - abar_prev - sigma**2) ** 0.5,  # of eps
            sigma=sigma,
            log_min=unused,
            log_max=unused,
            noisy=torch.ones_like(sigma),
        )


def with_noise(init: Callable[..., None]) -> Callable[..., None]:
    """Add the keyword `noise` to diffusers' constructor, whose signature also is that of the config."""

    @wraps(init)
    def wrapped(self: Any, *args: Any, noise: Noise = "generator", **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.noise = checked_noise(noise)

    return wrapped


def with_host_copy(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    """Let diffusers' set_timesteps also keep the timesteps on the host, so that no step waits for them."""

    @wraps(set_timesteps)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        set_timesteps(self, *args, **kwargs)
        self._visited_timesteps()

    return wrapped


class DDPMScheduler(DDPM, diffusers.DDPMScheduler):
    output = scheduling_ddpm.DDPMSchedulerOutput
    __init__ = with_noise(diffusers.DDPMScheduler.__init__)
    set_timesteps = with_host_copy(diffusers.DDPMScheduler.set_timesteps)


class DDPMParallelScheduler(DDPM, diffusers.DDPMParallelScheduler):
    output = scheduling_ddpm_parallel.DDPMParallelSchedulerOutput
    __init__ = with_noise(diffusers.DDPMParallelScheduler.__init__)
    set_timesteps = with_host_copy(diffusers.DDPMParallelScheduler.set_timesteps)


class DDIMScheduler(DDIM, diffusers.DDIMScheduler):
    output = scheduling_ddim.DDIMSchedulerOutput
    __init__ = with_noise(diffusers.DDIMScheduler.__init__)
    set_timesteps = with_host_copy(diffusers.DDIMScheduler.set_timesteps)


class DDIMParallelScheduler(DDIM, diffusers.DDIMParallelScheduler):
    output = scheduling_ddim_parallel.DDIMParallelSchedulerOutput
    __init__ = with_noise(diffusers.DDIMParallelScheduler.__init__)
    set_timesteps = with_host_copy(diffusers.DDIMParallelScheduler.set_timesteps)


def check_diffusers_draws(noise: Noise | None, attribute: Noise) -> None:
    """Raise a ValueError if a step that diffusers takes would draw other noise than the caller asked for.

    Args:
        noise: the step's argument; None: the scheduler's attribute counts.
    """
    noise = attribute if noise is None else noise
    if noise != "generator":
        raise ValueError(
            f"noise is {noise!r}, but this step falls back to diffusers, which draws from torch; want a listed "
            "timestep, floating-point tensors of one shape on one CPU or GPU, no torch.compile, and "
            f"{' and '.join(STEP_METHODS)} not overridden; or use noise='generator'"
        )
