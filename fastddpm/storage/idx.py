"""The idx format of the MNIST files: 0, 0, type, rank, big-endian uint32 sizes, values; gzipped or not."""

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from fastddpm.storage.data_checks import WANTED

_UINT8 = 8  # the type of unsigned bytes


def load_idx(path: Path, ranks: tuple[int, ...], what: str) -> np.ndarray:
    """The uint8 array in a file.

    Args:
        path: the file.
        ranks: the numbers of dimensions that are allowed.
        what: "images" or "labels", for error messages.
    Raises: ValueError: the file is damaged, or holds something else.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot unpack {path}: {error}; the file is truncated or damaged") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"{path} is of unknown type; {WANTED}")
    kind, rank = data[2:4]
    start = 4 + 4 * rank
    if kind != _UINT8 or rank not in ranks:
        wanted = f"{what}: {' or '.join(map(str, ranks))} of type 0x08 (uint8)"
        raise ValueError(f"{path} has {rank} dimensions of type {kind:#04x}; want {wanted}")
    if len(data) < start:
        raise ValueError(f"{path} is truncated: its header ends after {len(data)} bytes, not {start}")
    shape = struct.unpack(f">{rank}I", data[4:start])
    if len(data) - start != math.prod(shape):
        held = f"{len(data) - start} bytes of {what}"
        raise ValueError(f"{path} holds {held}, but its header says {math.prod(shape)} {shape}; the file is damaged")
    array = np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    return array.copy()  # writable: torch warns of read-only arrays


def labels_beside(path: Path) -> Path:
    """The file of labels beside a file of images, such as train-labels-idx1-ubyte for train-images-idx3-ubyte.gz.

    Raises: ValueError: there is none, or the name of the images does not contain "images".
    """
    if "images" not in path.name:
        way_out = "rename it, for example to train-images-idx3-ubyte"
        raise ValueError(f"{path} has no 'images' in its name that 'labels' could replace; {way_out}")
    name = re.sub("idx[34]", "idx1", path.name.removesuffix(".gz").replace("images", "labels"))
    for file in (path.with_name(name), path.with_name(f"{name}.gz")):
        if file.is_file():
            return file
    raise ValueError(f"{path} has no labels beside it; want {path.with_name(name)} or the same with .gz")
