"""An array in a file: its header is read and checked first, then its values, all at once or a few rows at a time."""

import math
import sys
import tokenize
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fastddpm.storage.data_checks import CHANNEL_SHAPES, as_images, check_brightest

_CHUNK = 1 << 24  # bytes read at a time: decompressors hold as much again
_HEADER_ERRORS = (ValueError, EOFError, TypeError, KeyError, RecursionError, MemoryError, tokenize.TokenError)
_SMALL = 1 << 30  # bytes of an array that is loaded to say how its numbers could be converted


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        path: the file.
        kind: what the file is, for error messages.
        name: of the array, for error messages.
        shape, dtype, column_major: as the header says.
        open: opens the file at the first value.
    """

    path: Path
    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    column_major: bool
    open: Callable[[], AbstractContextManager[IO[bytes]]]

    def load(self) -> np.ndarray:
        """The whole array. Raises: ValueError: the file is damaged, or the array does not fit in memory."""
        with reading(self.path, self.kind), self.open() as file:
            values = self._read(file, self.shape)
            self._check_end(file)
        return values

    def load_images(self) -> np.ndarray:
        """uint8 [N, H, W, C]. Raises: ValueError: also if the array is not images."""
        if not self._is_images() and self._size(self.shape) > _SMALL:
            raise ValueError(f"{self.name} is {list(self.shape)} {self.dtype}; want uint8 (0..255) [N, H, W, C]")
        return as_images(np.ascontiguousarray(self.load()), self.name)

    def stream_images(self, batch: int) -> Iterator[np.ndarray]:
        """Batches of uint8 [n, H, W, C]. Refuses what `load_images` refuses, damage when it is reached.

        An array in Fortran's order is loaded at once, as it cannot be read a few images at a time.
        """
        if self.column_major or not self._is_images():
            images = self.load_images()
            return (images[start : start + batch] for start in range(0, len(images), batch))
        return self._batches(batch)

    def count(self) -> int:
        """The length of the first dimension."""
        return self.shape[0] if self.shape else 0

    def _batches(self, batch: int) -> Iterator[np.ndarray]:
        brightest = 0
        with reading(self.path, self.kind), self.open() as file:
            for start in range(0, self.shape[0], batch):
                images = self._read(file, (min(batch, self.shape[0] - start), *self.shape[1:]))
                brightest = max(brightest, int(images.max()))
                yield images if images.ndim == 4 else images[..., None]
            self._check_end(file)
        check_brightest(brightest, self.name)

    def _is_images(self) -> bool:
        """Whether the header is that of at least one image."""
        shape = self.shape
        return self.dtype == np.uint8 and len(shape) in (3, 4) and shape[3:] in CHANNEL_SHAPES and 0 not in shape

    def _size(self, shape: tuple[int, ...]) -> int:
        return math.prod(map(int, shape)) * self.dtype.itemsize

    def _read(self, file: IO[bytes], shape: tuple[int, ...]) -> np.ndarray:
        """The next values. The memory is used only as far as there are bytes: a header may say anything."""
        size, got = self._size(shape), 0
        if size > sys.maxsize:
            raise MemoryError
        values = np.empty(size, np.uint8)
        view = values.data
        while got < size and (content := file.read(min(_CHUNK, size - got))):
            view[got : got + len(content)] = content
            got += len(content)
        if got < size:
            total = self._size(self.shape)
            raise ValueError(f"it ends before the {total} bytes of {list(self.shape)} {self.dtype}")
        array = values.view(self.dtype)
        return array.reshape(shape[::-1]).T if self.column_major else array.reshape(shape)

    def _check_end(self, file: IO[bytes]) -> None:
        """Refuse more bytes than the array has. Decompressors compare their checksum at the end."""
        if file.read(1):
            raise ValueError(
                f"it holds more than the {self._size(self.shape)} bytes of {list(self.shape)} {self.dtype}"
            )


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """In this block, the errors of a damaged file become a ValueError that names it."""
    try:
        yield
    except Exception as error:  # decompressors fail in many ways: BadZipFile, zlib.error, LZMAError, struct.error
        raise ValueError(f"cannot load {path} as {kind}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError | RuntimeError) else f"{text}; the file is truncated or damaged"


def npy_array(
    path: Path, kind: str, array: str, size: int, opened: Callable[[], AbstractContextManager[IO[bytes]]]
) -> StoredArray:
    """An array in the .npy format.

    Args:
        array: its name in the file, or "".
        size: bytes of header and values.
        opened: opens the file at its header.
    Raises: ValueError: the header is damaged, does not fit the size, or is that of Python objects.
    """
    name = array or "it"
    with opened() as file:
        try:
            version = np.lib.format.read_magic(file)
            old = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(file)
            start = file.tell()
        except _HEADER_ERRORS as error:  # numpy's own words advise to allow pickles, which run code
            raise ValueError(f"{name} has no header of an .npy array, or a damaged one") from error
    if dtype.hasobject:
        way_out = "save it with a plain dtype such as uint8"
        raise ValueError(f"{name} holds Python objects, which are not loaded because loading can run code; {way_out}")
    values = math.prod(map(int, shape)) * dtype.itemsize
    if min(shape, default=0) < 0 or dtype.itemsize == 0 or values != size - start:
        held = f"{size - start} bytes of values"
        raise ValueError(f"{name} holds {held}, but its header says {list(shape)} {dtype}; the file is damaged")

    @contextmanager
    def at_values() -> Iterator[IO[bytes]]:
        with opened() as file:
            file.read(start)
            yield file

    return StoredArray(path, kind, f"{path}: {array}" if array else str(path), shape, dtype, column_major, at_values)
