"""The idx format of the MNIST files: 0, 0, type, rank, big-endian uint32 sizes, values; gzipped or not."""

import gzip
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastddpm.storage.arrays import StoredArray, reading
from fastddpm.storage.data_checks import WANTED

GZIP = b"\x1f\x8b"
_UINT8 = 8  # the type of unsigned bytes
_DEFLATE = 1032  # bytes that one byte of a .gz can become at most


def open_idx(path: Path, ranks: tuple[int, ...], what: str) -> StoredArray:
    """The uint8 array in a file, of which only the header is read.

    Args:
        path: the file.
        ranks: the numbers of dimensions that are allowed.
        what: "images" or "labels", for error messages.
    Raises: ValueError: the header is damaged, or the file holds something else.
    """
    with reading(path, "idx"), open(path, "rb") as raw:
        packed = raw.read(2) == GZIP
    opener: Callable[..., Any] = gzip.open if packed else open
    with reading(path, "idx"), opener(path, "rb") as file:
        header = file.read(4)
        rank = header[3] if len(header) == 4 else 0
        header += file.read(4 * rank)
    if len(header) < 4 or header[:2] != b"\0\0":
        raise ValueError(f"{path} is of unknown type{' inside its gzip' * packed}; {WANTED}")
    if header[2] != _UINT8 or rank not in ranks:
        wanted = f"{what}: {' or '.join(map(str, ranks))} of type 0x08 (uint8)"
        raise ValueError(f"{path} has {rank} dimensions of type {header[2]:#04x}; want {wanted}")
    start = 4 + 4 * rank
    if len(header) < start:
        raise ValueError(f"{path} is truncated: its header ends after {len(header)} bytes, not {start}")
    shape = struct.unpack(f">{rank}I", header[4:])
    size, held = math.prod(shape), path.stat().st_size - start
    if size > _DEFLATE * path.stat().st_size if packed else size != held:
        came = "too few bytes" if packed else f"{held} bytes"
        raise ValueError(f"{path} holds {came} of {what}, but its header says {size} {shape}; the file is damaged")

    @contextmanager
    def at_values() -> Iterator[IO[bytes]]:
        with opener(path, "rb") as file:
            file.read(start)
            yield file

    return StoredArray(path, "idx", str(path), shape, np.dtype(np.uint8), False, at_values)


def labels_beside(path: Path) -> Path:
    """The file of labels beside a file of images, such as train-labels-idx1-ubyte for train-images-idx3-ubyte.gz.

    Raises: ValueError: there is none, or the name of the images does not contain "images".
    """
    if "images" not in path.name:
        way_out = "rename it, for example to train-images-idx3-ubyte"
        raise ValueError(f"{path} has no 'images' in its name that 'labels' could replace; {way_out}")
    name = re.sub("idx[34]", "idx1", path.name.removesuffix(".gz").replace("images", "labels"))
    for file in (path.with_name(name), path.with_name(f"{name}.gz")):
        if os.path.isfile(file):
            return file
    raise ValueError(f"{path} has no labels beside it; want {path.with_name(name)} or the same with .gz")
