"""Images and class labels in an .npz, all at once or a few at a time."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fastddpm.storage.data_checks import CHANNEL_SHAPES, as_images, check_brightest

# names of image arrays, in order of preference, and of the arrays of their labels
HELD_OUT = {"x_test": "y_test"}
ARRAYS = {"x_train": "y_train", "x": "y", "arr_0": "arr_1", "images": "labels"}


def load_array(path: Path, *, held_out: bool = False, labels: bool = False) -> tuple[np.ndarray, str]:
    """(the array of the images, or with labels=True that of their labels; its name for error messages)."""
    with _naming_errors(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        name = _choose_array(arrays.files, held_out=held_out)
        if labels:
            images = name
            name = (HELD_OUT | ARRAYS).get(images, "labels")
            if name not in arrays.files:
                held = _some_names(arrays.files)
                raise ValueError(f"it holds {held}; want labels of {images} in an array named {name}")
        return np.asarray(arrays[name]), f"{path}: {name}"


def image_array_name(path: Path, *, held_out: bool = False) -> str:
    """The name of the array that `load_array` reads images from."""
    with _naming_errors(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return _choose_array(arrays.files, held_out=held_out)


def stream_array(path: Path, array: str | None, batch: int) -> tuple[int, Iterator[np.ndarray]]:
    """(the number of images in an array, an iterator of batches of them). array: None: as `load_array` chooses.

    An array in Fortran's order is loaded at once, as it cannot be read a few images at a time.
    """
    with _naming_errors(path), zipfile.ZipFile(path) as archive:
        names = [member.removesuffix(".npy") for member in archive.namelist()]
        name = _choose_array(names) if array is None else array
        if name not in names:
            raise ValueError(f"it holds {_some_names(names)}, but no {name}")
        member = archive.namelist()[names.index(name)]
        with archive.open(member) as file:
            shape, column_major, dtype = _npy_header(file)
    title = f"{path}: {name}"
    if column_major or dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in CHANNEL_SHAPES or 0 in shape:
        with _naming_errors(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = np.ascontiguousarray(arrays[name])
        images = as_images(images, title)
        return len(images), (images[start : start + batch] for start in range(0, len(images), batch))

    def stream() -> Iterator[np.ndarray]:
        brightest = 0
        with _naming_errors(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _npy_header(file)
            for start in range(0, shape[0], batch):
                n = min(batch, shape[0] - start)
                pixels = bytearray(file.read(n * math.prod(shape[1:])))  # writable: torch warns of read-only arrays
                images = np.frombuffer(pixels, np.uint8).reshape(n, *shape[1:])
                brightest = max(brightest, int(images.max()))
                yield images if images.ndim == 4 else images[..., None]
        check_brightest(brightest, title)

    return shape[0], stream()


def _choose_array(names: Sequence[str], *, held_out: bool = False) -> str:
    """Which of the arrays of an .npz holds the images. Raises: ValueError: several, none with a known name."""
    known = [*HELD_OUT, *ARRAYS] if held_out else [*ARRAYS]
    name = next((name for name in known if name in names), names[0] if names else "")
    if name not in known and len(names) != 1:
        raise ValueError(f"it holds {_some_names(names)}; want an array named {', '.join(known)}, or a single array")
    return name


@contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """In this block, the errors of a damaged .npz become a ValueError that names it."""
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot load {path} as .npz: {error}") from error


def _some_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) or "nothing"


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the order is Fortran's, dtype)."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
