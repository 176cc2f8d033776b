"""diffusers' DDPM and DDIM pipelines; where possible `fastddpm.networks.unet2d` executes their network."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Union

import diffusers
import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from fastddpm.core import layout
from fastddpm.core import noise as standard
from fastddpm.core.checks import shown
from fastddpm.diffusers.disguise import Disguised, adopt
from fastddpm.diffusers.noise_sources import Generators, Noise, checked_noise, draw_normals
from fastddpm.diffusers.scheduler_base import Scheduler
from fastddpm.diffusers.schedulers import DDIMParallelScheduler, DDIMScheduler
from fastddpm.diffusers.tables import CPU
from fastddpm.diffusers.unet import UNet2DModel, fused_network

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

UNet = Union[diffusers.UNet2DModel, UNet2DModel]  # noqa: UP007 (`from_pipe` compares types and cannot read `A | B`)

logger = logging.getLogger(__name__)


class Pipeline(Disguised):
    """What both pipelines share: Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239), or its counterpart for DDIM.

    If there is no `obstacle`, the network is a fused copy of `unet` with its weights at the start of the call, and the
    state is float32 even if the network has 16 bits. Otherwise diffusers' own forward runs, and the state keeps its
    dtype.

    Callbacks find here what diffusers' other pipelines offer them: `num_timesteps`, `current_timestep` and `interrupt`.
    """

    unet: Any
    scheduler: Any
    _callback_tensor_inputs = ["latents", "model_output", "pred_original_sample"]  # noqa: RUF012 (diffusers' are lists)
    _num_timesteps = 0
    _current_timestep: Tensor | None = None
    _interrupt = False

    @property
    def num_timesteps(self) -> int:
        """How many steps the call takes that is under way, or the last one took; 0 before the first."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """t of the step under way; None before the first call and after a finished one."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt` to True: the call leaves out the remaining steps."""
        return self._interrupt

    def _generate(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        output_type: str | None,
        return_dict: bool,
        *,
        latents: Tensor | None,
        class_labels: Any,
        noise: Noise | None,
        callback_on_step_end: StepEnd | None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
        **step_options: Any,
    ) -> Any:
        """The body of `__call__`; step_options: further keywords of the scheduler's step."""
        requested = self._tensors_for_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if noise is not None:
            step_options["noise"] = self._noise_for_scheduler(noise)
        device: torch.device = self._execution_device  # type: ignore[attr-defined]
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        labels = None if class_labels is None else _as_labels(class_labels, device)

        self.scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt = False
        x = self._starting_state(shape, generator, device, latents, noise)
        with fused_network(self.unet, self.scheduler.timesteps, shape, labels) as network:
            if network is not None:
                x = layout.channels_last(x.float())
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # type: ignore[attr-defined]
                if self._interrupt:
                    break
                self._current_timestep = t
                if network is not None:
                    model_output = network(x, i)
                elif labels is None:
                    model_output = self.unet(x, t).sample
                else:
                    model_output = self.unet(x, t, labels).sample
                step = self.scheduler.step(model_output, t, x, generator=generator, **step_options)
                x = step.prev_sample
                if callback_on_step_end is not None:
                    x_0 = getattr(step, "pred_original_sample", None)
                    tensors = {"latents": x, "model_output": model_output, "pred_original_sample": x_0}
                    x = self._call_back(callback_on_step_end, i, t, {name: tensors[name] for name in requested}, x)
        self._current_timestep = None
        images = self._to_images(x, output_type)
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _tensors_for_callback(self, callback: Any, names: Sequence[str] | None) -> Sequence[str]:
        """The names of the tensors that a callback gets; one of diffusers' classes has its own list."""
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end is {callback!r}; want a function of (pipeline, i, t, tensors)")
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        unknown = [name for name in names or () if name not in self._callback_tensor_inputs]
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; want some of {known}")
        return names or ()

    def _call_back(self, callback: StepEnd, i: int, t: Tensor, tensors: dict[str, Tensor | None], x: Tensor) -> Tensor:
        """Call the callback after step i, which led to x; returns the state to go on from."""
        x = x.contiguous()
        given: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor is None:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs has {name}, which a step of the "
                    f"{type(self.scheduler).__name__} does not return; leave it out"
                )
            given[name] = x if name == "latents" else tensor.contiguous()  # the callback may change x in place
        returned = callback(self, i, t, given) or {}
        if not isinstance(returned, dict):
            raise ValueError(f"callback_on_step_end returned a {type(returned).__name__}; want a dictionary or None")
        latents = returned.get("latents", x)
        if not isinstance(latents, Tensor) or latents.shape != x.shape:
            raise ValueError(f"callback_on_step_end returned latents of {_kind(latents)}; want {tuple(x.shape)}")
        return latents

    def _noise_for_scheduler(self, noise: Noise) -> Noise:
        """Return the noise of a call. Raises: ValueError: it is unknown, or the scheduler does not accept it."""
        if not isinstance(self.scheduler, Scheduler):
            raise ValueError(
                f"noise is {noise!r}, but the scheduler is a {type(self.scheduler).__name__}, which draws its own; "
                "leave it out, or use a DDPMScheduler or DDIMScheduler"
            )
        return checked_noise(noise)

    def _starting_state(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        device: torch.device,
        latents: Tensor | None,
        noise: Noise | None,
    ) -> Tensor:
        """x_T in the network's dtype: the latents, noise drawn as diffusers draws it, or addressed noise."""
        if latents is not None:
            if not isinstance(latents, Tensor) or latents.shape != shape:
                raise ValueError(f"latents are {_kind(latents)}; want {shape}, batch_size samples of the unet's shape")
            return latents.to(device, self.unet.dtype)
        scheduler = self.scheduler
        if noise is None and isinstance(scheduler, Scheduler):
            noise = scheduler.noise
        if noise in (None, "generator") or noise is False:
            drawn_on = device if device.type in ("cpu", "cuda") else CPU
            return draw_normals(shape, generator, drawn_on, self.unet.dtype).to(device)
        address = scheduler.addresses(shape[0], generator, noise, device)
        x = standard.normal(address, shape[1:], stream=standard.START, t=scheduler.config.num_train_timesteps)
        return x.to(self.unet.dtype)

    def _to_images(self, x: Tensor, output_type: str | None) -> Any:
        """Convert [N, C, H, W] in [-1, 1] to images in [0, 1].

        Args:
            output_type: "latent": x itself; "pt": a tensor of its shape; "pil": a list of images; anything else:
                [N, H, W, C] in numpy.
        """
        if output_type == "latent":
            return x.to(self.unet.dtype).contiguous()
        images = (x / 2 + 0.5).clamp(0, 1).contiguous()
        if output_type == "pt":
            return images.to(self.unet.dtype)
        if output_type != "pil" and self.unet.dtype != torch.bfloat16:
            images = images.to(self.unet.dtype)
        if images.dtype == torch.bfloat16:  # numpy does not have it
            images = images.float()
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays  # type: ignore[attr-defined]


def _kind(value: Any) -> Any:
    """The shape of a tensor, or the type of anything else, for an error."""
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _as_labels(class_labels: Any, device: torch.device) -> Tensor:
    """Class labels as a tensor. numpy reads a list: torch would give its numbers the process's default dtype."""
    if not isinstance(class_labels, Tensor):
        array = np.asarray(class_labels)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"class_labels is {shown(class_labels)}; want numbers, one label for each image")
        class_labels = torch.from_numpy(array)
    return class_labels.to(device)


class DDPMPipeline(Pipeline, diffusers.DDPMPipeline):
    """diffusers' DDPMPipeline; it turns a scheduler of diffusers' own class into one of ours."""

    def __init__(self, unet: UNet, scheduler: diffusers.DDPMScheduler):
        super().__init__(unet=unet, scheduler=adopt(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        class_labels: Any = None,
        noise: Noise | None = None,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> Any:
        """Sample images. With a generator they are diffusers' own, up to the rounding of the network.

        Args:
            batch_size: N, the number of images.
            generator: draws the noise as in diffusers; each of a list draws that of its image.
            num_inference_steps: how many of the timesteps to visit.
            output_type: "pil", "np" ([N, H, W, C] in [0, 1]), "pt" ([N, C, H, W] on the network's device) or "latent"
                (x_0 itself, [N, C, H, W] there, neither scaled nor clipped).
            return_dict: False returns the tuple (images,).
            latents: x_T, [N, C, H, W]; None: noise.
            class_labels: [N], for a class-conditional network.
            noise: the source of the noise of this call, see `Scheduler`: "generator", "philox", a seed (image n is then
                the same in any batch), or False (none is added after x_T, so sampling is deterministic).
            callback_on_step_end: called after each step as callback(pipeline, i, t, tensors), as in diffusers' other
                pipelines; if it returns a dictionary with "latents", they become the state. It may read
                `pipeline.num_timesteps`, and end the run early by `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of the tensors: latents, model_output, pred_original_sample. A
                `PipelineCallback` of diffusers has its own list.
        Returns: ImagePipelineOutput(images), or the tuple.
        Raises: what diffusers' own raises; ValueError: an argument that diffusers' does not have is not as above.
        """
        return self._generate(
            batch_size, generator, num_inference_steps, output_type, return_dict,
            latents=latents, class_labels=class_labels, noise=noise, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip


class DDIMPipeline(Pipeline, diffusers.DDIMPipeline):
    """diffusers' DDIMPipeline; it keeps a DDIM scheduler of ours, and replaces any other by one of the same config."""

    def __init__(self, unet: UNet, scheduler: diffusers.DDIMScheduler):
        super().__init__(unet=unet, scheduler=scheduler)
        is_ours = isinstance(scheduler, DDIMScheduler | DDIMParallelScheduler)
        self.register_modules(scheduler=scheduler if is_ours else adopt(self.scheduler))  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        class_labels: Any = None,
        noise: Noise | None = None,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> Any:
        """Sample images; otherwise like `DDPMPipeline`.

        Args:
            eta: 0 is deterministic, 1 has DDPM's noise.
            use_clipped_model_output: use the eps that belongs to the clipped x_0.
        """
        if not 0.0 <= eta <= 1.0:
            logger.warning("eta is %s; want 0 (DDIM) to 1 (the noise of DDPM)", eta)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}, but batch_size is {batch_size}; want one for each image"
            )
        return self._generate(
            batch_size, generator, num_inference_steps, output_type, return_dict,
            latents=latents, class_labels=class_labels, noise=noise, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            eta=eta, use_clipped_model_output=use_clipped_model_output,
        )  # fmt: skip
