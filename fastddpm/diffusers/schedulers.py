"""diffusers' DDPM and DDIM schedulers, with coefficients that are tabulated and, on a GPU, a step that is one kernel.

Each class inherits diffusers' own. An overridden method takes a fast path where all is ordinary and leaves the rest to
the inherited one, so that bad input raises diffusers' own errors. Equation numbers are those of Ho et al. 2020
(arXiv:2006.11239) unless another paper is named.
"""

import numbers
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import diffusers
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_parallel, scheduling_ddpm, scheduling_ddpm_parallel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddpm import ops
from fastddpm.core import noise as standard
from fastddpm.diffusers.disguise import Disguised
from fastddpm.diffusers.tables import CPU, Seen, Table, send

Noise = str | int  # "generator", "philox", a seed, or False
Generators = torch.Generator | list[torch.Generator] | None

LOW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *LOW)
INTEGERS = (torch.int64, torch.int32)
PREDICTS = ("epsilon", "sample", "v_prediction")
LEARNED = ("learned", "learned_range")
ASKED = ("previous_timestep", "_get_variance")  # by diffusers' step; a table has their answers
AHEAD = 8  # draws of noise on the host that may wait for a GPU to take them: each holds page-locked memory

_under_way: "deque[torch.cuda.Event]" = deque()  # such draws
_deferred: ContextVar[bool] = ContextVar("deferred", default=False)  # to diffusers' own step


class Scheduler(Disguised):
    """What the four have in common.

    Attributes:
        noise: where z comes from. "generator": from torch, drawn as diffusers draws it. "philox": addressed, see
            `core.noise`, by a seed that is drawn from the generator once in each run, which `set_timesteps` begins;
            with a list of generators each draws the seed of its entry. A whole number: addressed by this seed, entry n
            of the batch being sample n. False: from nowhere, each step returns its mean. It is not part of the config.
    """

    config: Any
    alphas_cumprod: Tensor
    timesteps: Tensor
    output: type  # of step
    # (*key) -> the timesteps that have a row, and the columns: by the operations of diffusers, in its order
    _columns: Callable[..., tuple[list[int], list[Tensor]]]

    noise: Noise = "generator"
    _table: Table | None = None
    _roots: tuple[Seen, torch.dtype, Tensor, Tensor] | None = None  # of abar and 1 - abar
    _values: tuple[Seen, list[int]] | None = None  # of timesteps
    _run: tuple[Any, ...] | None = None  # the addresses of its noise, and whose they are

    _own: dict[str, Any] = {}  # noqa: RUF012 (of each class, and never changed)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            cls._own = {name: getattr(cls, name) for name in ASKED if hasattr(cls, name)}

    def __getstate__(self) -> dict[str, Any]:
        made = ("_table", "_roots", "_values", "_run")  # of the identity of tensors, which a copy does not share
        return {name: value for name, value in self.__dict__.items() if name not in made}

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # what from_config and from_pretrained hand on to the constructor
        return {*diffusers.ConfigMixin._get_init_keys(input_class), "noise"}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (eq. 4).

        In float32 and float64 diffusers' bits; in 16 bits computed in float32 and rounded once. As in diffusers,
        `alphas_cumprod` moves to the samples' device and stays there. The host does not wait for a GPU.

        Args: original_samples: x_0, [N, ...]; noise: eps, like it; timesteps: [N] integers, on any device.
        """
        if not self._noises(original_samples):
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        signal, spread = self._levels(original_samples, timesteps)
        return _mixed(signal, original_samples, spread, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (arXiv:2202.00512, appendix D), as `add_noise`."""
        if not self._noises(sample):
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        signal, spread = self._levels(sample, timesteps)
        return _mixed(signal, noise, -spread, sample)

    def _noises(self, x: Tensor) -> bool:
        """Whether the tables serve these samples, or diffusers has to."""
        abar = self.alphas_cumprod
        ordinary = isinstance(x, Tensor) and x.dtype in FLOATS and abar.ndim == 1 and not abar.requires_grad
        return ordinary and not torch.compiler.is_compiling()

    def _levels(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of each entry, [N, 1, ...]."""
        self.alphas_cumprod = abar = send(self.alphas_cumprod, x.device)
        roots = self._roots
        if roots is None or roots[1] != x.dtype or not roots[0].is_(abar):
            with torch.inference_mode(False):  # else they would be of no use outside of it
                rounded = abar if x.dtype in LOW else abar.to(x.dtype)
                self._roots = roots = Seen(abar), x.dtype, rounded**0.5, (1 - rounded) ** 0.5
        _, _, signal, spread = roots
        t = send(timesteps, x.device).reshape(-1)  # an index of no dimension is waited for
        shape = (-1, *[1] * (x.ndim - 1))
        return signal[t].view(shape), spread[t].view(shape)

    def addresses(self, n: int, generator: Generators, noise: Noise, device: torch.device) -> Tensor:
        """(seed, sample index) of each entry of a batch, the same for all of a run: [n, 2] int64 on a device.

        Args:
            generator: draws the seed where noise is "philox"; each of a list that of its entry.
            noise: "philox", or the seed.
        """
        several = generator if isinstance(generator, list) else [generator]
        key = noise, n, device, id(self.timesteps), *map(id, several)
        run = self._run
        if run is None or run[0] != key:
            if noise != "philox":
                address = standard.address(int(noise), n)
            else:
                one = len(several) == 1
                seeds = _seed(several[0]).expand(n) if one else torch.cat([_seed(several[i]) for i in range(n)])
                samples = torch.arange(n, device=seeds.device)
                address = torch.stack([seeds, samples if one else 0 * samples], 1)
            self._run = run = key, send(address, device), self.timesteps, several
        return run[1]

    def _fast(
        self,
        x: Tensor,
        m: Tensor,
        timestep: Any,
        generator: Generators,
        noise: Noise | None,
        *,
        key: tuple[Any, ...],
        made_of: tuple[Tensor, ...],
        noisy: Callable[[int | None], bool],
        z: Tensor | None = None,
        **how: Any,
    ) -> tuple[Tensor, Tensor] | None:
        """(x_prev, x_0), or None where something is not ordinary: then diffusers has the say.

        Args:
            key, made_of: what the coefficients depend on, besides alphas_cumprod.
            noisy: whether noise is added at a timestep; None is one on the GPU, of a value not known here.
            z: the noise, instead of any other.
            how: more for `ops.predict_step`.
        """
        noise, config = checked(self.noise if noise is None else noise), self.config
        if not self._ordinary(x, m, timestep, made_of):
            return None
        t, table = self._value(timestep, x.device), self._tabulated(key, made_of)
        if t is not None and t not in table.visited:
            return None
        if z is None and noise is not False and noisy(t):
            if noise == "generator":
                z = drawn(m.shape, generator, m.device, m.dtype)
            else:
                how["address"] = self.addresses(len(m), generator, noise, m.device)
        clip: Any = config.clip_sample_range if config.clip_sample else None
        if config.thresholding:
            clip = self._threshold_sample  # type: ignore[attr-defined]
        rows = table.on(x.device)
        at = (timestep.long() + 1).clamp(0, len(rows) - 1) if t is None else t + 1
        return ops.predict_step(x, m, rows, at, predicts=config.prediction_type, clip=clip, z=z, **how)

    def _ordinary(self, x: Any, m: Any, timestep: Any, made_of: Any) -> bool:
        if isinstance(timestep, Tensor):
            whole = timestep.ndim == 0 and timestep.dtype in INTEGERS
        else:
            whole = isinstance(timestep, numbers.Integral) and not isinstance(timestep, bool)
        return (
            whole
            and isinstance(x, Tensor)
            and isinstance(m, Tensor)
            and x.shape == m.shape
            and x.ndim > (2 if self.config.thresholding else 1)
            and x.dtype in FLOATS
            and m.dtype in FLOATS
            and x.device == m.device
            and x.device.type in ("cpu", "cuda")
            and all(
                isinstance(one, Tensor) and one.device in (CPU, x.device) for one in (self.alphas_cumprod, *made_of)
            )
            and self.alphas_cumprod.ndim == 1
            and self.alphas_cumprod.dtype in FLOATS[:2]
            and self.config.prediction_type in PREDICTS
            and (isinstance(self.config.clip_sample_range, numbers.Real) or not self.config.clip_sample)
            and not any(one.requires_grad for one in (self.alphas_cumprod, *made_of))
            and not torch.compiler.is_compiling()
            and all(name not in vars(self) and getattr(type(self), name) is own for name, own in self._own.items())
        )

    def _value(self, timestep: Any, device: torch.device) -> int | None:
        """A timestep, if the host has it."""
        if not isinstance(timestep, Tensor) or CPU in (timestep.device, device):
            return int(timestep)
        own, known = self.timesteps, self._values
        if known is None or not known[0].is_(own) or timestep.dtype != own.dtype or not own.is_contiguous():
            return None
        place, rest = divmod(timestep.data_ptr() - own.data_ptr(), own.element_size())
        return known[1][place] if rest == 0 and 0 <= place < len(known[1]) else None

    def _visited(self) -> list[int]:
        """`timesteps` on the host, which waits for them where they are new."""
        if self._values is None or not self._values[0].is_(self.timesteps):
            self._values = Seen(self.timesteps), self.timesteps.tolist()
        return self._values[1]

    def _tabulated(self, key: tuple[Any, ...], made_of: tuple[Tensor, ...]) -> Table:
        abar, table = self.alphas_cumprod, self._table
        tensors = abar, *made_of
        if table is None or not table.is_of(key, tensors):
            with torch.inference_mode(False), torch.no_grad():
                t, columns = self._columns(*key)
                rows = torch.full((2 + len(abar), 8), torch.nan, dtype=abar.dtype, device=abar.device)
                rows[send(torch.tensor(t, dtype=torch.int64), abar.device) + 1] = torch.stack(columns, 1)
            self._table = table = Table(key, list(map(Seen, tensors)), rows, frozenset(t))
        return table


class DDPM(Scheduler):
    one: Tensor  # abar before the first step
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
        """x_t -> x_{t-1}, Algorithm 2 line 4 with x_0 predicted first (eq. 15, 7).

        On a CPU diffusers' bits in float32 and float64; 16-bit tensors are widened to float32 and the results rounded
        once. On a GPU one kernel beside the drawing of the noise, and the host does not wait for it; where `timestep`
        is on the GPU and not an element of `timesteps`, noise is drawn even if it is 0, and then not added.

        Args:
            model_output: [N, C, ...]; [N, 2 C, ...] with a learned variance.
            timestep: an element of `timesteps`, on any device, or its value.
            sample: x_t, [N, C, ...].
            generator: draws the noise; of a list each that of its entry.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
            noise: in place of the attribute `noise`, for this step.
        Raises: what diffusers' own step raises; ValueError: noise is not as `Scheduler` has it.
        """
        m, v, type_ = model_output, None, self.variance_type
        learned = type_ if type_ in LEARNED else None
        if learned is not None and model_output.shape[1] == 2 * sample.shape[1]:
            m, v = model_output.split(sample.shape[1], 1)
        done = None
        listed = isinstance(self.timesteps, Tensor) and self.timesteps.ndim == 1 and self.timesteps.dtype in INTEGERS
        if listed and type_ == self.config.variance_type and (learned is None) == (v is None):
            key = self.custom_timesteps, self.num_inference_steps, type_
            noisy = lambda t: t is None or t > 0
            how: dict[str, Any] = {"v": v, "learned": learned}
            done = self._fast(
                sample, m, timestep, generator, noise, key=key, made_of=(self.timesteps, self.one), noisy=noisy, **how
            )
        if done is None:
            not_served(noise, self.noise)
            step = super().step  # type: ignore[misc]
            if type_ != "fixed_large_log":
                return step(model_output, timestep, sample, generator, return_dict)
            token = _deferred.set(True)
            try:
                return step(model_output, timestep, sample, generator, return_dict)
            finally:
                _deferred.reset(token)
        return self.output(*done) if return_dict else done

    def _get_variance(
        self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        # diffusers' step takes the root of what this returns, of fixed_large_log a logarithm: NaN (#14569)
        if self.config.variance_type == "fixed_large_log" and _deferred.get():
            variance_type = "fixed_large"
        return super()._get_variance(t, predicted_variance, variance_type)  # type: ignore[misc]

    def _columns(self, custom_timesteps: Any, num_inference_steps: Any, variance_type: Any) -> Any:
        abar = self.alphas_cumprod
        follows = {t: t - 1 for t in range(-1, len(abar))}
        if custom_timesteps or num_inference_steps:
            visited = self._visited()
            follows = dict(zip(reversed(visited), [-1, *reversed(visited)], strict=False))  # of equals the first counts
        follows = {t: prev for t, prev in follows.items() if -1 <= t < len(abar) and prev < len(abar)}
        t, prev = (send(torch.tensor(list(side)).long(), abar.device) for side in (follows, follows.values()))
        abar_t = abar[t]
        abar_prev = torch.where(prev < 0, send(self.one, abar.device), abar[prev.clamp(min=0)])
        rest_t, rest_prev, alpha = 1 - abar_t, 1 - abar_prev, abar_t / abar_prev
        beta = 1 - alpha
        var = (rest_prev / rest_t * beta).clamp(min=1e-20)  # eq. 7
        if variance_type == "fixed_small_log":
            sigma = (0.5 * var.log()).exp()
        else:  # with fixed_large_log as with fixed_large (#14569)
            sigma = (beta if variance_type in ("fixed_large", "fixed_large_log") else var) ** 0.5
        of_x_0 = abar_prev**0.5 * beta / rest_t
        of_x = alpha**0.5 * rest_prev / rest_t
        noisy = (t > 0).to(abar.dtype)
        return list(follows), [abar_t**0.5, rest_t**0.5, of_x_0, of_x, sigma, var.log(), beta.log(), noisy]


class DDIM(Scheduler):
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
        """x_t -> x_{t-1} of DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), as `DDPM.step`.

        Args:
            model_output, sample: [N, C, ...].
            timestep: an element of `timesteps`, on any device, or its value. The next is T // steps below it, as in
                diffusers: for linspace and trailing spacing that is not always the next in `timesteps` (#11347).
            eta: 0 is deterministic, 1 has DDPM's noise.
            use_clipped_model_output: take the eps that belongs to the clipped x_0.
            generator: draws the noise; of a list each that of its entry.
            variance_noise: the noise itself, instead.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
            noise: in place of the attribute `noise`, for this step.
        Raises: what diffusers' own step raises; ValueError: noise is not as `Scheduler` has it.
        """
        T, steps, done = self.config.num_train_timesteps, self.num_inference_steps, None
        fine = isinstance(eta, numbers.Real) and isinstance(steps, numbers.Integral) and steps > 0
        adds_noise = fine and eta > 0
        z = variance_noise if adds_noise else None
        if z is not None:
            fine = generator is None and isinstance(z, Tensor) and z.dtype in FLOATS
            fine = fine and z.shape == sample.shape and z.device == sample.device
        if fine:
            done = self._fast(
                sample,
                model_output,
                timestep,
                generator,
                noise,
                key=(T, steps, eta),
                made_of=(self.final_alpha_cumprod,),
                noisy=lambda t: adds_noise,
                z=z,
                sampler="ddim_clipped" if use_clipped_model_output else "ddim",
            )
        if done is None:
            not_served(noise, self.noise)
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        return self.output(*done) if return_dict else done

    def _columns(self, T: Any, steps: Any, eta: Any) -> Any:
        abar = self.alphas_cumprod
        t = torch.arange(-1, len(abar), device=abar.device)
        prev = t - T // steps
        abar_t = abar[t]
        abar_prev = torch.where(prev < 0, send(self.final_alpha_cumprod, abar.device), abar[prev.clamp(min=0)])
        rest_t, rest_prev = 1 - abar_t, 1 - abar_prev
        sigma = eta * ((rest_prev / rest_t) * (1 - abar_t / abar_prev)) ** 0.5  # eq. 16
        of_eps = (1 - abar_prev - sigma**2) ** 0.5
        unused, noisy = torch.zeros_like(sigma), torch.ones_like(sigma)
        return list(range(-1, len(abar))), [
            abar_t**0.5, rest_t**0.5, abar_prev**0.5, of_eps, sigma, unused, unused, noisy
        ]  # fmt: skip


def with_noise(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor with diffusers' signature, which is also that of the config, and the keyword `noise`."""

    @wraps(init)
    def wrapped(self: Any, *args: Any, noise: Noise = "generator", **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.noise = checked(noise)

    return wrapped


def with_values(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    """diffusers' set_timesteps, which keeps the timesteps on the host, too: no step has to wait for them."""

    @wraps(set_timesteps)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        set_timesteps(self, *args, **kwargs)
        self._visited()

    return wrapped


class DDPMScheduler(DDPM, diffusers.DDPMScheduler):
    output = scheduling_ddpm.DDPMSchedulerOutput
    __init__ = with_noise(diffusers.DDPMScheduler.__init__)
    set_timesteps = with_values(diffusers.DDPMScheduler.set_timesteps)


class DDPMParallelScheduler(DDPM, diffusers.DDPMParallelScheduler):
    output = scheduling_ddpm_parallel.DDPMParallelSchedulerOutput
    __init__ = with_noise(diffusers.DDPMParallelScheduler.__init__)
    set_timesteps = with_values(diffusers.DDPMParallelScheduler.set_timesteps)


class DDIMScheduler(DDIM, diffusers.DDIMScheduler):
    output = scheduling_ddim.DDIMSchedulerOutput
    __init__ = with_noise(diffusers.DDIMScheduler.__init__)
    set_timesteps = with_values(diffusers.DDIMScheduler.set_timesteps)


class DDIMParallelScheduler(DDIM, diffusers.DDIMParallelScheduler):
    output = scheduling_ddim_parallel.DDIMParallelSchedulerOutput
    __init__ = with_noise(diffusers.DDIMParallelScheduler.__init__)
    set_timesteps = with_values(diffusers.DDIMParallelScheduler.set_timesteps)


def checked(noise: Any) -> Noise:
    """noise, as the attribute of `Scheduler` may have it."""
    whole = isinstance(noise, numbers.Integral) and not isinstance(noise, bool) and 0 <= int(noise) < 1 << 64
    if noise is False or whole or (isinstance(noise, str) and noise in ("generator", "philox")):
        return noise
    raise ValueError(f"noise is {noise!r}; want 'generator', 'philox', a seed (0 <= seed < 2^64), or False for none")


def not_served(noise: Any, attribute: Any) -> None:
    """Refuse noise that is not torch's in a step that is left to diffusers."""
    noise = attribute if noise is None else noise
    if noise != "generator":
        raise ValueError(
            f"noise is {noise!r}, but this step is not an ordinary one, and so is left to diffusers, which draws from "
            "torch; want a listed timestep, floating-point tensors of one shape on one CPU or GPU, no torch.compile, "
            f"and {' and '.join(ASKED)} as they are"
        )


def drawn(shape: Any, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normals as diffusers draws them; from a generator on the CPU to a GPU without waiting for it."""
    first = generator[0] if isinstance(generator, list) else generator
    if device.type == "cuda" and first is not None and first.device.type == "cpu":
        z = send(randn_tensor(shape, generator=generator, device=CPU, dtype=dtype), device)
        _under_way.append(torch.cuda.current_stream(device).record_event())
        if len(_under_way) > AHEAD:
            _under_way.popleft().synchronize()
        return z
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


def _seed(generator: torch.Generator | None) -> Tensor:
    """[1] int64, drawn from a generator, or from torch's own on the CPU."""
    device = CPU if generator is None else generator.device
    return torch.randint((1 << 63) - 1, (1,), generator=generator, device=device)


def _mixed(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y, rounded once where x and y have 16 bits."""
    mixed, dtype = a * x + b * y, torch.result_type(x, y)
    return mixed.to(dtype) if dtype in LOW else mixed
