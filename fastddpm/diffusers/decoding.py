"""Turns the latents of a latent pipeline into images, as diffusers' `LDMPipeline` does."""

import os
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from fastddpm.checkpoints.diffusers import decoder_of
from fastddpm.checkpoints.reading import as_folder, in_one_line
from fastddpm.core.checks import whole
from fastddpm.core.precision import Compute


def decode(
    folder: str | os.PathLike[str],
    latents: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Turn latents into images with the VAE of a pipeline, in float32.

    As diffusers' `LDMPipeline` does, the latents are divided by the VAE's scaling_factor first, and a VQModel replaces
    them by the nearest entries of its codebook.

    Args:
        folder: of the pipeline, `Sampler.decoder`; it has a model_index.json.
        latents: [N, C, h, w], as `Sampler.sample` returns them.
        batch_size: latents decoded together.
        device: where the VAE computes.
    Returns: [N, channels, H, W] float32 on the CPU, clipped to [-1, 1].
    Raises: ValueError: the pipeline has no VAE that diffusers can load, the latents do not fit it, or there is no such
        device.
    """
    whole("batch_size", batch_size, 1)
    place = Compute.resolve(device, "fp32").device
    vae = _load_vae(folder)
    config: Any = vae.config
    channels = config.get("latent_channels")
    fits = isinstance(latents, Tensor) and latents.ndim == 4 and channels in (None, latents.shape[1])
    if not fits or 0 in latents.shape:
        given = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"latents are {given}; want a tensor [N, {channels or 'C'}, h, w] for the {type(vae).__name__}"
        )
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    vae.to(place).eval()
    with torch.no_grad():
        parts = [
            vae.decode(part.to(place, torch.float32) / scale + shift).sample.clamp(-1, 1).float().cpu()
            for part in latents.split(batch_size)
        ]
    return torch.cat(parts)


def _load_vae(folder: str | os.PathLike[str]) -> Any:
    """The VAE of a pipeline."""
    root = as_folder("folder", folder)
    component = decoder_of(root)
    if component is None:
        raise ValueError(f"{root} is a pipeline without a VAE, so its samples are not latents to decode")
    name, class_name = component
    kind = getattr(diffusers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin) and hasattr(kind, "decode")):
        raise ValueError(f"{root} has the decoder {class_name}, which diffusers {diffusers.__version__} does not have")
    try:
        with torch.device("cpu"):  # not on the process's default device
            return kind.from_pretrained(
                root, subfolder=name, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
            )
    except Exception as error:  # of diffusers, torch and safetensors, about missing or damaged files
        raise ValueError(f"cannot load the {class_name} in {root / name}: {in_one_line(error)}") from error
