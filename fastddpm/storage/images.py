"""Samples in [-1, 1] as images: uint8 arrays, a grid of all of them, PNG and .npz files."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.core.checks import whole
from fastddpm.storage.files import atomic

CHANNELS = (1, 3, 4)  # of a PNG: grey, RGB, RGBA


def to_uint8(x: Tensor) -> Tensor:
    """Samples as 8-bit images, rounded as in diffusers' pipelines: x/2 + 1/2 clamped to [0, 1], times 255, to nearest.

    Args:
        x: [N, C, H, W] floating-point, [-1, 1]; values outside are clamped, also infinite ones. fp16 and bf16 are
            widened to fp32 first.
    Returns: uint8 [N, H, W, C] on x's device.
    Raises: ValueError: x has another rank or dtype, or holds NaN (the message lists those samples).
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; want floating-point [N, C, H, W] in [-1, 1]")
    bad = x.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"x has NaN in samples {bad[:8]}{' ...' * (len(bad) > 8)}; NaN has no colour")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).contiguous()


def grid(images: Tensor | np.ndarray, *, columns: int | None = None, margin: int = 2, width: int = 640) -> np.ndarray:
    """Tile images into one picture, row by row.

    Args:
        images: uint8 [N, H, W, C], N >= 1.
        columns: images per row, at least 1; None: as close to a square as possible.
        margin: white pixels around each image.
        width: small images are enlarged by the largest whole factor that keeps a row within this many pixels, not
            counting margins.
    Returns: uint8 [height, width, C].
    Raises: ValueError: images or columns are not as above.
    """
    array = _uint8(images)
    if columns is not None:
        columns = whole("columns", columns, 1)
    n, h, w, c = array.shape
    if n == 0:
        raise ValueError("there are no images to tile; want at least one")
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, width // (columns * max(h, w)))
    array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    h, w = h * scale, w * scale
    tiles = np.full((rows * columns, h + margin, w + margin, c), 255, np.uint8)
    tiles[:n, :h, :w] = array
    tiled = tiles.reshape(rows, columns, h + margin, w + margin, c).swapaxes(1, 2)
    tiled = tiled.reshape(rows * (h + margin), columns * (w + margin), c)
    return np.pad(tiled, ((margin, 0), (margin, 0), (0, 0)), constant_values=255)


def save_grid(images: Tensor | np.ndarray, path: str | os.PathLike[str], *, columns: int | None = None) -> None:
    """Write one PNG of all images, as `grid` arranges them. images: uint8 [N, H, W, C] with C = 1, 3 or 4."""
    picture = grid(images, columns=columns)
    with atomic(path) as file:
        file.write(png(picture))


def save_pngs(
    images: Tensor | np.ndarray, folder: str | os.PathLike[str], indices: Sequence[int] | None = None
) -> None:
    """Write each image as folder/00000.png, ...; creates the folder and replaces files of the same name.

    Args:
        images: uint8 [N, H, W, C] with C = 1, 3 or 4.
        indices: the numbers in the names of the files (sample indices); 0, 1, ... by default.
    """
    array = _uint8(images)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index, image in zip(range(len(array)) if indices is None else indices, array, strict=True):
        with atomic(Path(folder) / f"{index:05d}.png") as file:
            file.write(png(image))


def png(image: np.ndarray) -> bytes:
    """An image as the bytes of a PNG file. image: uint8 [H, W, C] with C = 1, 3 or 4."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def are_pictures(samples: np.ndarray) -> bool:
    """Whether samples are uint8 [N, H, W, C] with a number of channels that a PNG can have."""
    return samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in CHANNELS


def save_npz(samples: Tensor | np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write samples of any shape and dtype, such as uint8 images [N, H, W, C], as array `arr_0` of an .npz."""
    array = samples.cpu().numpy() if isinstance(samples, Tensor) else samples
    with atomic(path) as file:
        np.savez(file, array)


def _uint8(images: Tensor | np.ndarray) -> np.ndarray:
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    if array.ndim != 4 or array.dtype != np.uint8:
        raise ValueError(
            f"images are {array.shape} {array.dtype}; want uint8 [N, H, W, C]: use to_uint8, or write .npz"
        )
    if array.shape[3] not in CHANNELS:
        raise ValueError(f"images have {array.shape[3]} channels; want 1, 3 or 4 for a PNG, or write .npz")
    return array
