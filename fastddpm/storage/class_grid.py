"""A grid of class-conditional samples: one row per class, with the name of the class on its left."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastddpm.storage.files import atomic
from fastddpm.storage.images import grid, png

MOST_ROWS = 32  # with more classes than this, a grid is a plain one
WIDE = 16  # images in a row; rows with more become several, unless the picture is hardly wider than high
_MARGIN = 6  # pixels on both sides of a name
NO_CLASS = "no class"  # the title of the null label
_LONGEST = 24  # characters of a name that are shown


def class_grid(
    images: np.ndarray, labels: Sequence[int], names: Sequence[str] | None = None, *, width: int = 640
) -> np.ndarray:
    """Tile images into one picture with a row for each class that occurs; many images of a class take several rows.

    Args:
        images: uint8 [N, H, W, C] with C = 1, 3 or 4, N >= 1.
        labels: [N] the class of each.
        names: of the classes 0, 1, ...; None: their numbers are shown.
        width: in pixels, as `grid` takes it, for both sides: small images are enlarged.
    Returns: uint8 [height, width, C]: the classes in ascending order, the images of one in the order given.
    """
    places = {label: [i for i, of in enumerate(labels) if of == label] for label in sorted(set(labels))}
    rows_of = lambda columns: [-(-len(of_class) // columns) for of_class in places.values()]
    longest = max(map(len, places.values()))
    most = next(c for c in range(longest, 0, -1) if c <= max(WIDE, 2 * sum(rows_of(c))))
    columns = -(-longest // -(-longest // most))  # the fewest that take no more rows
    rows = rows_of(columns)
    tiles = np.full((sum(rows) * columns, *images.shape[1:]), 255, np.uint8)
    for start, of_class in zip(accumulate([0, *rows]), places.values(), strict=False):
        tiles[start * columns :][: len(of_class)] = images[of_class]
    width = width * columns // max(columns, sum(rows))
    return with_titles(grid(tiles, columns=columns, width=width), list(places), names, rows)


def picture(
    images: np.ndarray, labels: Sequence[int] | None = None, names: Sequence[str] | None = None, *, width: int = 640
) -> np.ndarray:
    """Images in one picture: by class if they have labels of at most MOST_ROWS classes, else as `grid` does."""
    if labels is not None and 0 < len(set(labels)) <= MOST_ROWS:
        return class_grid(images, labels, names, width=width)
    return grid(images, width=width)


def save_samples(
    images: Tensor | np.ndarray,
    path: str | os.PathLike[str],
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write one PNG of all samples, as `picture` arranges them."""
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    with atomic(path) as file:
        file.write(png(picture(array, labels, names)))


def with_titles(
    picture: np.ndarray,
    labels: Sequence[int],
    names: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
) -> np.ndarray:
    """A picture of rows of equal height, with the name or the number of each class on the left of its rows.

    Args:
        picture: uint8 [height, width, C].
        labels: the classes, from above.
        names: of the classes 0, 1, ...; a label after them is the null label. None: their numbers.
        rows: how many rows each has; None: one.
    """
    from PIL import Image, ImageDraw

    rows = [1] * len(labels) if rows is None else rows
    height, _, channels = picture.shape
    row = height / sum(rows)
    letters = font(int(min(14, max(8, row * 0.8))))
    titles = titles_of(labels, names)
    width = round(max(letters.getlength(title) for title in titles)) + 2 * _MARGIN
    canvas = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(canvas)
    for title, end, count in zip(titles, accumulate(rows), rows, strict=True):
        draw.text((width - _MARGIN, (end - count / 2) * row), title, fill=0, font=letters, anchor="rm")
    column = np.asarray(canvas)[..., None].repeat(channels, axis=2)
    if channels == 4:
        column[..., 3] = 255
    return np.concatenate([column, picture], axis=1)


def titles_of(labels: Sequence[int], names: Sequence[str] | None) -> list[str]:
    """The names of classes as titles. Args: names: of the classes 0, 1, ...; a label after them is the null label."""
    shown = map(str, labels) if names is None else ([*names, NO_CLASS][min(label, len(names))] for label in labels)
    return [_title(name) for name in shown]


def _title(name: str) -> str:
    """A name as one short line that a font can draw: without line breaks and lone surrogates."""
    short = f"{name[:_LONGEST]}..." if len(name) > _LONGEST else name
    return "".join(c if c.isprintable() else "?" for c in short)


def font(size: int) -> Any:
    """The font of words in pictures. Args: size: in pixels."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)  # Pillow's own has fewer letters
