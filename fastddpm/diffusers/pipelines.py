"""diffusers' DDPM and DDIM pipelines, whose network is executed by `fastddpm.networks.unet2d` where it can be."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Union

import diffusers
import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from fastddpm.core import layout
from fastddpm.core import noise as standard
from fastddpm.diffusers.disguise import Disguised, adopt
from fastddpm.diffusers.schedulers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    Generators,
    Noise,
    Scheduler,
    checked,
    drawn,
)
from fastddpm.diffusers.tables import CPU
from fastddpm.diffusers.unet import UNet2DModel, fused

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

UNet = Union[diffusers.UNet2DModel, UNet2DModel]  # noqa: UP007 (as `from_pipe`, which compares types, can read it)

logger = logging.getLogger(__name__)


class Pipeline(Disguised):
    """What the two have in common: Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239), or its like for DDIM.

    Where there is no `obstacle`, the network is a fused copy of `unet` with the weights of the time a call begins, and
    the state is float32 also where the network has 16 bits. Else it is diffusers' own forward, and its dtype.
    """

    unet: Any
    scheduler: Any
    _callback_tensor_inputs = ("latents", "model_output", "pred_original_sample")

    def _sampled(
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
        callback_on_step_end_tensor_inputs: Sequence[str],
        how: dict[str, Any],
    ) -> Any:
        """What a call returns; how: more for the scheduler's step."""
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; want some of {known}")
        if noise is not None:
            if not isinstance(self.scheduler, Scheduler):
                raise ValueError(
                    f"noise is {noise!r}, but the scheduler is a {type(self.scheduler).__name__}, which draws its own; "
                    "leave it out, or use a DDPMScheduler or DDIMScheduler"
                )
            how["noise"] = checked(noise)
        device: torch.device = self._execution_device  # type: ignore[attr-defined]
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=device)

        self.scheduler.set_timesteps(num_inference_steps)
        x = self._start(shape, generator, device, latents, how.get("noise"))
        with fused(self.unet, self.scheduler.timesteps, shape, class_labels) as forward:
            if forward is not None:
                x = layout.channels_last(x.float())
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # type: ignore[attr-defined]
                if forward is not None:
                    m = forward.at(x, i)
                elif class_labels is None:
                    m = self.unet(x, t).sample
                else:
                    m = self.unet(x, t, class_labels).sample
                done = self.scheduler.step(m, t, x, generator=generator, **how)
                x = done.prev_sample
                if callback_on_step_end is not None:
                    x = x.contiguous()
                    tensors = {"latents": x, "model_output": m.contiguous()}
                    if "pred_original_sample" in done:
                        tensors["pred_original_sample"] = done.pred_original_sample.contiguous()
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    x = (callback_on_step_end(self, i, t, wanted) or {}).get("latents", x)
                    if x.shape != shape:
                        raise ValueError(f"callback_on_step_end returned latents of {tuple(x.shape)}; want {shape}")
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _start(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        device: torch.device,
        latents: Tensor | None,
        noise: Noise | None,
    ) -> Tensor:
        """x_T: what is given, or noise as diffusers draws it, in the network's dtype, or addressed noise."""
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"latents are {tuple(latents.shape)}; want {shape}: batch_size and the unet's samples")
            return latents.to(device, self.unet.dtype)
        scheduler = self.scheduler
        if noise is None and isinstance(scheduler, Scheduler):
            noise = scheduler.noise
        if noise in (None, "generator") or noise is False:
            where = device if device.type in ("cpu", "cuda") else CPU
            return drawn(shape, generator, where, self.unet.dtype).to(device)
        address = scheduler.addresses(shape[0], generator, noise, device)
        x = standard.normal(address, shape[1:], stream=standard.START, t=scheduler.config.num_train_timesteps)
        return x.to(self.unet.dtype)

    def _images(self, x: Tensor, output_type: str | None) -> Any:
        """[N, C, H, W] in [-1, 1] -> images in [0, 1]: "pt" such a tensor, "pil" a list, else [N, H, W, C] in numpy."""
        images = (x / 2 + 0.5).clamp(0, 1).contiguous()
        if output_type == "pt":
            return images.to(self.unet.dtype)
        if output_type != "pil" and self.unet.dtype != torch.bfloat16:
            images = images.to(self.unet.dtype)
        if images.dtype == torch.bfloat16:  # which numpy does not have
            images = images.float()
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays  # type: ignore[attr-defined]


class DDPMPipeline(Pipeline, diffusers.DDPMPipeline):
    """diffusers' DDPMPipeline; a scheduler of diffusers' own class becomes one of ours."""

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Sample images. With a generator they are diffusers' own, up to the rounding of the network.

        Args:
            batch_size: N, how many.
            generator: draws the noise as in diffusers; of a list each that of its image.
            num_inference_steps: how many of the timesteps to visit.
            output_type: "pil", "np" ([N, H, W, C] in [0, 1]) or "pt" ([N, C, H, W] on the network's device).
            return_dict: False returns the tuple (images,).
            latents: x_T, [N, C, H, W], instead of noise.
            class_labels: [N], for a class-conditional network.
            noise: where it comes from in this call, see `Scheduler`: "generator", "philox", a seed (image n is then the
                same in any batch), or False (after x_T none is added, and sampling is deterministic).
            callback_on_step_end: called after each step as callback(pipeline, i, t, tensors), as in diffusers' other
                pipelines; "latents" in what it returns, if anything, is the state to go on with.
            callback_on_step_end_tensor_inputs: names of the tensors: latents, model_output, pred_original_sample.
        Returns: ImagePipelineOutput(images), or the tuple.
        Raises: what diffusers' own raises; ValueError: an argument that it does not have is not as above.
        """
        return self._sampled(
            batch_size, generator, num_inference_steps, output_type, return_dict,
            latents=latents, class_labels=class_labels, noise=noise, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, how={},
        )  # fmt: skip


class DDIMPipeline(Pipeline, diffusers.DDIMPipeline):
    """diffusers' DDIMPipeline; it keeps a DDIM scheduler of ours, and makes one of the config of any other."""

    def __init__(self, unet: UNet, scheduler: diffusers.DDIMScheduler):
        super().__init__(unet=unet, scheduler=scheduler)
        own = isinstance(scheduler, DDIMScheduler | DDIMParallelScheduler)
        self.register_modules(scheduler=scheduler if own else adopt(self.scheduler))  # type: ignore[attr-defined]

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Sample images, as `DDPMPipeline`.

        Args:
            eta: 0 is deterministic, 1 has DDPM's noise.
            use_clipped_model_output: take the eps that belongs to the clipped x_0.
        """
        if not 0.0 <= eta <= 1.0:
            logger.warning("eta is %s; want 0 (DDIM) to 1 (the noise of DDPM)", eta)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)} for batch_size {batch_size}; want one for each")
        return self._sampled(
            batch_size, generator, num_inference_steps, output_type, return_dict,
            latents=latents, class_labels=class_labels, noise=noise, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            how={"eta": eta, "use_clipped_model_output": use_clipped_model_output},
        )  # fmt: skip
