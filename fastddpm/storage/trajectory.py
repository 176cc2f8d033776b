"""Pictures of the way from noise to samples: an animated GIF, or a PNG with a column for each of a few timesteps."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastddpm.storage.class_grid import font
from fastddpm.storage.files import atomic
from fastddpm.storage.images import grid, png

SUFFIXES = (".gif", ".png")
GIF_FRAMES, PNG_FRAMES = 60, 10  # how many states each shows, the samples included
_FRAME_MS, _LAST_MS = 60, 2500  # how long a frame of a GIF is shown
_HEADING = 16  # pixels above the columns of a PNG


def shown_steps(steps: int, path: str | os.PathLike[str]) -> list[int]:
    """Which of the steps 0, 1, ... have their state x_t in the picture; the samples come after them."""
    frames = GIF_FRAMES if Path(path).suffix.lower() == ".gif" else PNG_FRAMES
    count = min(frames - 1, steps)
    return sorted({round(i * steps / count) for i in range(count)})


def save_trajectory(frames: np.ndarray, timesteps: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Write an animated GIF of grids of all samples, or a PNG with a row for each sample.

    Args:
        frames: uint8 [F, N, H, W, C], C = 1 or 3: the states in the order of the steps, and last the samples.
        timesteps: [F - 1] the t of each state x_t.
        path: ends in one of SUFFIXES.
    """
    if Path(path).suffix.lower() == ".gif":
        _save_gif(frames, path)
    else:
        picture = grid(frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:]), columns=len(frames), width=900)
        with atomic(path) as file:
            file.write(png(_with_headings(picture, [f"t = {t}" for t in timesteps] + ["x_0"])))


def _save_gif(frames: np.ndarray, path: str | os.PathLike[str]) -> None:
    from PIL import Image

    pictures = [grid(frame, width=320) for frame in frames]
    first, *rest = [Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture) for picture in pictures]
    durations = [_FRAME_MS] * len(rest) + [_LAST_MS]
    with atomic(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _with_headings(picture: np.ndarray, headings: Sequence[str]) -> np.ndarray:
    """A picture below a line of headings, one for each of its columns of equal width."""
    from PIL import Image, ImageDraw

    width, channels = picture.shape[1:]
    canvas = Image.new("L", (width, _HEADING), 255)
    draw = ImageDraw.Draw(canvas)
    column = width / len(headings)
    for i, heading in enumerate(headings):
        draw.text(((i + 0.5) * column, _HEADING / 2), heading, fill=0, font=font(11), anchor="mm")
    line = np.asarray(canvas)[..., None].repeat(channels, axis=2)
    return np.concatenate([line, picture])
