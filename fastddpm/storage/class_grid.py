"""A grid of class-conditional samples: one row per class, with the name of the class on its left."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastddpm.storage.files import atomic
from fastddpm.storage.images import grid, png

MOST_ROWS = 32  # with more classes than this, a grid is a plain one
_MARGIN = 6  # pixels on both sides of a name
_LONGEST = 24  # characters of a name that are shown


def class_grid(images: np.ndarray, labels: Sequence[int], names: Sequence[str] | None = None) -> np.ndarray:
    """Tile images into one picture with a row for each class that occurs.

    Args:
        images: uint8 [N, H, W, C] with C = 1, 3 or 4, N >= 1.
        labels: [N] the class of each.
        names: of the classes 0, 1, ...; None: their numbers.
    Returns: uint8 [height, width, C]: the classes in ascending order, the images of one in the order given.
    """
    rows = {label: [i for i, of in enumerate(labels) if of == label] for label in sorted(set(labels))}
    columns = max(map(len, rows.values()))
    tiles = np.full((len(rows), columns, *images.shape[1:]), 255, np.uint8)
    for row, places in zip(tiles, rows.values(), strict=True):
        row[: len(places)] = images[places]
    width = 640 * columns // max(columns, len(rows))  # no side of the picture is much longer than this
    picture = grid(tiles.reshape(-1, *images.shape[1:]), columns=columns, width=width)
    titles = [str(label) if names is None else names[label] for label in rows]
    return np.concatenate([_titles(titles, *picture.shape[::2]), picture], axis=1)


def save_samples(
    images: Tensor | np.ndarray,
    path: str | os.PathLike[str],
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write one PNG of all samples: by class if they have labels of at most MOST_ROWS classes, else as `grid` does."""
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    by_class = labels is not None and 0 < len(set(labels)) <= MOST_ROWS
    picture = class_grid(array, labels, names) if labels is not None and by_class else grid(array)
    with atomic(path) as file:
        file.write(png(picture))


def _titles(titles: Sequence[str], height: int, channels: int) -> np.ndarray:
    """A white column [height, width, channels] that holds the titles, each at the centre of its row."""
    from PIL import Image, ImageDraw

    row = height / len(titles)
    letters = font(int(min(14, max(8, row * 0.8))))
    shown = [f"{title[:_LONGEST]}..." if len(title) > _LONGEST else title for title in titles]
    width = round(max(letters.getlength(title) for title in shown)) + 2 * _MARGIN
    canvas = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(shown):
        draw.text((width - _MARGIN, (i + 0.5) * row), title, fill=0, font=letters, anchor="rm")
    return np.asarray(canvas)[..., None].repeat(channels, axis=2)


def font(size: int) -> Any:
    """The font of words in pictures. Args: size: in pixels."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)  # Pillow's own has fewer letters
