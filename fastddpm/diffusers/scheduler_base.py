"""What the four schedulers share: tabulated coefficients, the noise of a run, and a step by `ops.predict_step`."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core.checks import is_whole
from fastddpm.core.memory import send
from fastddpm.diffusers.disguise import Disguised
from fastddpm.diffusers.noise_sources import (
    Generators,
    Noise,
    RunAddresses,
    checked_noise,
    draw_normals,
    new_addresses,
)
from fastddpm.diffusers.tables import CPU, Columns, Snapshot, Table

HALF = (torch.bfloat16, torch.float16)
STEP_DTYPES = (torch.float32, torch.float64, *HALF)
INTEGERS = (torch.int64, torch.int32)
STEP_METHODS = ("previous_timestep", "_get_variance")  # diffusers' step calls them; a table replaces them


class Levels(NamedTuple):
    """The signal and noise levels of all timesteps, for `add_noise`.

    Attributes:
        abar: alphas_cumprod, from which they were computed.
        dtype: of the samples that they are for.
        signal, noise: sqrt(abar_t) and sqrt(1 - abar_t), [len(alphas_cumprod)].
    """

    abar: Snapshot
    dtype: torch.dtype
    signal: Tensor
    noise: Tensor


class HostTimesteps(NamedTuple):
    """A copy of a scheduler's `timesteps` on the host.

    Attributes:
        source: `timesteps` when they were copied.
        values: the copy.
    """

    source: Snapshot
    values: list[int]


class Scheduler(Disguised):
    """Base class of the four schedulers, listed before diffusers' class.

    Attributes:
        noise: where z comes from. "generator": from torch, drawn as diffusers draws it. "philox": addressed noise, see
            `core.noise`, with a seed that is drawn from the generator once per run; `set_timesteps` begins a run. With
            a list of generators each draws the seed of its entry. A whole number: addressed noise of this seed; entry n
            of the batch is sample n. False: no noise; each step returns its mean. It is not part of the config.
    """

    config: Any
    alphas_cumprod: Tensor
    timesteps: Tensor
    output: type  # what step returns
    # (*key) -> the timesteps that have a row, and the columns, computed by diffusers' operations in their order
    _columns_of_steps: Callable[..., tuple[list[int], Columns]]

    noise: Noise = "generator"
    _table: Table | None = None
    _levels: Levels | None = None
    _host_timesteps: HostTimesteps | None = None
    _run_addresses: RunAddresses | None = None

    _original_methods: dict[str, Any] = {}  # noqa: RUF012 (one for each class of ours, never changed)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.rpartition(".")[0] == __package__:  # not for a user's subclass
            cls._original_methods = {name: getattr(cls, name) for name in STEP_METHODS if hasattr(cls, name)}

    def __getstate__(self) -> dict[str, Any]:
        cached = ("_table", "_levels", "_host_timesteps", "_run_addresses")  # valid for this object's tensors only
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # the keywords that from_config and from_pretrained pass to the constructor
        return {*diffusers.ConfigMixin._get_init_keys(input_class), "noise"}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (eq. 4).

        float32 and float64 give diffusers' bits; 16-bit samples are computed in float32 and rounded once. As in
        diffusers, `alphas_cumprod` moves to the samples' device and stays there. The host does not wait for a GPU.

        Args: original_samples: x_0, [N, ...]; noise: eps, like it; timesteps: [N] integers, on any device.
        """
        if not self._can_noise(original_samples, timesteps):
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        signal_level, noise_level = self._levels_at(original_samples, timesteps)
        return _weighted_sum(signal_level, original_samples, noise_level, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (arXiv:2202.00512, appendix D); otherwise like `add_noise`."""
        if not self._can_noise(sample, timesteps):
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        signal_level, noise_level = self._levels_at(sample, timesteps)
        return _weighted_sum(signal_level, noise, -noise_level, sample)

    def _can_noise(self, x: Any, timesteps: Any) -> bool:
        """Whether tabulated levels can be used; otherwise diffusers' own method runs, or raises its error."""
        abar = self.alphas_cumprod
        return (
            isinstance(x, Tensor)
            and isinstance(timesteps, Tensor)
            and x.dtype in STEP_DTYPES
            and abar.ndim == 1
            and not abar.requires_grad
            and not torch.compiler.is_compiling()
        )

    def _levels_at(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of each entry, [N, 1, ...]."""
        self.alphas_cumprod = abar = send(self.alphas_cumprod, x.device)
        levels = self._levels
        if levels is None or levels.dtype != x.dtype or not levels.abar.matches(abar):
            with torch.inference_mode(False):  # inference tensors would be useless outside that mode
                rounded = abar if x.dtype in HALF else abar.to(x.dtype)
                levels = Levels(Snapshot(abar), x.dtype, signal=rounded**0.5, noise=(1 - rounded) ** 0.5)
            self._levels = levels
        t = send(timesteps, x.device).reshape(-1)  # indexing by a 0-dim tensor would wait for it
        shape = (-1, *[1] * (x.ndim - 1))
        return levels.signal[t].view(shape), levels.noise[t].view(shape)

    def addresses(self, n: int, generator: Generators, noise: Noise, device: torch.device) -> Tensor:
        """(seed, sample index) of each entry of a batch, the same for a whole run: [n, 2] int64 on a device.

        Args:
            generator: if noise is "philox", draws the seed; each of a list draws the seed of its entry.
            noise: "philox", or the seed.
        """
        generators = generator if isinstance(generator, list) else [generator]
        key = noise, n, device, id(self.timesteps), *map(id, generators)
        run = self._run_addresses
        if run is None or run.key != key:
            address = send(new_addresses(n, generators, noise), device)
            self._run_addresses = run = RunAddresses(key, address, referenced=(self.timesteps, *generators))
        return run.address

    def _fast_step(
        self,
        x: Tensor,
        model_output: Tensor,
        timestep: Any,
        generator: Generators,
        noise: Noise | None,
        *,
        key: tuple[Any, ...],
        sources: tuple[Tensor, ...],
        adds_noise: Callable[[int | None], bool],
        sampler: str = "ddpm",
        v: Tensor | None = None,
        learned: str | None = None,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """(x_prev, x_0), or None if diffusers' own step has to run.

        Args:
            key, sources: the settings and the tensors that the coefficients depend on, besides alphas_cumprod.
            adds_noise: whether the step at a timestep adds noise; None is a timestep on the GPU whose value the host
                does not know.
            sampler, v, learned: as for `ops.predict_step`.
            z: the noise to add; None: from the scheduler's source.
        """
        noise = checked_noise(self.noise if noise is None else noise)
        if not self._can_step(x, model_output, timestep, sources):
            return None
        t = self._value_on_host(timestep, x.device)
        table = self._current_table(key, sources)
        if t is not None and t not in table.visited:
            return None
        address = None
        if z is None and noise is not False and adds_noise(t):
            if noise == "generator":
                z = draw_normals(model_output.shape, generator, model_output.device, model_output.dtype)
            else:
                address = self.addresses(len(model_output), generator, noise, model_output.device)
        clip: Any = self.config.clip_sample_range if self.config.clip_sample else None
        if self.config.thresholding:
            clip = self._threshold_sample  # type: ignore[attr-defined]
        rows = table.on(x.device)
        row = (timestep.long() + 1).clamp(0, len(rows) - 1) if t is None else t + 1
        return ops.predict_step(
            x, model_output, rows, row, predicts=self.config.prediction_type, sampler=sampler, clip=clip, v=v,
            learned=learned, z=z, address=address,
        )  # fmt: skip

    def _can_step(self, x: Any, model_output: Any, timestep: Any, sources: tuple[Any, ...]) -> bool:
        """Whether a table and `ops.predict_step` can take this step."""
        config = self.config
        return (
            _is_one_integer(timestep)
            and _are_alike(x, model_output)
            and x.ndim > (2 if config.thresholding else 1)
            and self._can_tabulate(sources, x.device)
            and config.prediction_type in ops.PREDICTIONS
            and (isinstance(config.clip_sample_range, numbers.Real) or not config.clip_sample)
            and not torch.compiler.is_compiling()
            and self._has_original_methods()
        )

    def _can_tabulate(self, sources: tuple[Any, ...], device: torch.device) -> bool:
        """Whether a table can be computed from alphas_cumprod and `sources`, for samples on a device."""
        abar = self.alphas_cumprod
        tensors = abar, *sources
        return (
            all(isinstance(one, Tensor) and one.device in (CPU, device) for one in tensors)
            and abar.ndim == 1
            and abar.dtype in (torch.float32, torch.float64)
            and not any(one.requires_grad for one in tensors)
        )

    def _has_original_methods(self) -> bool:
        """Whether the methods that a table replaces are diffusers' own: no subclass or instance overrides them."""
        return all(
            name not in vars(self) and getattr(type(self), name) is original
            for name, original in self._original_methods.items()
        )

    def _value_on_host(self, timestep: Any, device: torch.device) -> int | None:
        """The value of a timestep, if the host knows it without waiting for a GPU."""
        if not isinstance(timestep, Tensor) or CPU in (timestep.device, device):
            return int(timestep)
        timesteps, known = self.timesteps, self._host_timesteps
        if (
            known is None
            or not known.source.matches(timesteps)
            or timestep.dtype != timesteps.dtype
            or not timesteps.is_contiguous()
        ):
            return None
        place, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
        return known.values[place] if rest == 0 and 0 <= place < len(known.values) else None

    def _visited_timesteps(self) -> list[int]:
        """`timesteps` on the host. If they are new and on a GPU, this waits for them."""
        if self._host_timesteps is None or not self._host_timesteps.source.matches(self.timesteps):
            self._host_timesteps = HostTimesteps(Snapshot(self.timesteps), self.timesteps.tolist())
        return self._host_timesteps.values

    def _current_table(self, key: tuple[Any, ...], sources: tuple[Tensor, ...]) -> Table:
        """The table of these settings and tensors, computed again if any of them changed."""
        tensors = self.alphas_cumprod, *sources
        table = self._table
        if table is None or not table.is_current(key, tensors):
            with torch.inference_mode(False), torch.no_grad():
                timesteps, columns = self._columns_of_steps(*key)
                table = Table.of(key, tensors, timesteps, columns)
            self._table = table
        return table


def _is_one_integer(timestep: Any) -> bool:
    """Whether a timestep is a whole number, or a 0-dim tensor of integers."""
    if isinstance(timestep, Tensor):
        return timestep.ndim == 0 and timestep.dtype in INTEGERS
    return is_whole(timestep)


def _are_alike(x: Any, model_output: Any) -> bool:
    """Whether both are floating-point tensors of one shape on one CPU or GPU."""
    return (
        isinstance(x, Tensor)
        and isinstance(model_output, Tensor)
        and x.shape == model_output.shape
        and x.dtype in STEP_DTYPES
        and model_output.dtype in STEP_DTYPES
        and x.device == model_output.device
        and x.device.type in ("cpu", "cuda")
    )


def _weighted_sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y, rounded once if x and y have 16 bits."""
    total, dtype = a * x + b * y, torch.result_type(x, y)
    return total.to(dtype) if dtype in HALF else total
