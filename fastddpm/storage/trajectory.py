"""Pictures of the way from noise to samples: an animated GIF, or a PNG with a column for each of a few timesteps."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastddpm.storage import class_grid
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


def save_trajectory(
    frames: np.ndarray,
    timesteps: Sequence[int],
    path: str | os.PathLike[str],
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write an animated GIF of grids of all samples, or a PNG with a row for each sample.

    Args:
        frames: uint8 [F, N, H, W, C], C = 1 or 3: the states in the order of the steps, and last the samples.
        timesteps: [F - 1] the t of each state x_t.
        path: ends in one of SUFFIXES.
        labels: [N] the class of each sample, by which a GIF is arranged and the rows of a PNG are named; None: none.
        names: of the classes 0, 1, ...; None: their numbers are shown.
    """
    if Path(path).suffix.lower() == ".gif":
        _save_gif([class_grid.picture(frame, labels, names, width=320) for frame in frames], path)
        return
    rows = grid(frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:]), columns=len(frames), width=900)
    titled = rows if labels is None else class_grid.with_titles(rows, labels, names)
    headings = _headings([f"t = {t}" for t in timesteps] + ["x_0"], rows.shape[1], titled.shape[1], rows.shape[2])
    with atomic(path) as file:
        file.write(png(np.concatenate([headings, titled])))


def _save_gif(pictures: Sequence[np.ndarray], path: str | os.PathLike[str]) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture) for picture in pictures]
    durations = [_FRAME_MS] * len(rest) + [_LAST_MS]
    with atomic(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _headings(headings: Sequence[str], columns: int, width: int, channels: int) -> np.ndarray:
    """A line [_HEADING, width, channels] with a heading over each of the columns, which are `columns` wide together.

    They end at the right; on their left may be titles.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (width, _HEADING), 255)
    draw = ImageDraw.Draw(canvas)
    column = columns / len(headings)
    letters = class_grid.font(11)
    for i, heading in enumerate(headings):
        x = width - columns + (i + 0.5) * column
        draw.text((x, _HEADING / 2), heading, fill=0, font=letters, anchor="mm")
    return np.asarray(canvas)[..., None].repeat(channels, axis=2)
