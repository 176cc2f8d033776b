"""Images to learn from or to compare with: uint8 [N, H, W, C] from an .npz, an MNIST-format file or a folder."""

import gzip
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

_ARRAYS = ("x_train", "x", "arr_0", "images")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_GREY, _COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_WANTED = "want an .npz, an MNIST-format file (idx, plain or .gz) or a folder of images"


def load_images(path: str | os.PathLike[str], *, progress: bool = True) -> np.ndarray:
    """All images of one size, in memory.

    Args:
        path: one of
            an .npz with uint8 [N, H, W] or [N, H, W, C]: array x_train, x, arr_0 or images, else its only array;
            an MNIST-format file (idx of unsigned bytes, [N, H, W] or [N, H, W, C]), gzipped or not;
            a folder, searched with its subfolders in sorted order: all grey gives C = 1, any colour makes all RGB (a
            palette counts as colour); alpha is dropped; a photograph is turned as its EXIF orientation says.
        progress: show a bar while a large folder is read.
    Returns: uint8 [N, H, W, C], C = 1, 3 or 4.
    Raises: ValueError: it does not exist, is of another kind, is damaged, is empty, or its images differ in size.
    """
    if not os.fspath(path):
        raise ValueError(f"path is ''; {_WANTED}")
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, progress)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {_WANTED}") from error
    if magic[:2] == b"PK":
        return _checked(*_load_npz(path))
    if magic[:2] == b"\x1f\x8b" or magic[:2] == b"\0\0":
        return _checked(_load_idx(path, gzipped=magic[:1] == b"\x1f"), path)
    raise ValueError(f"{path} is of unknown type; {_WANTED}")


def _checked(array: np.ndarray, name: object) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3, 4)):
        wanted = "uint8 (0..255) [N, H, W] or [N, H, W, C] with C = 1, 3 or 4"
        raise ValueError(f"{name} is {list(array.shape)} {array.dtype}; want {wanted}")
    if array.size == 0:
        raise ValueError(f"{name} is {list(array.shape)}: it holds no images")
    return array if array.ndim == 4 else array[..., None]


def _load_npz(path: Path) -> tuple[np.ndarray, str]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            name = next((name for name in _ARRAYS if name in arrays.files), arrays.files[0] if arrays.files else "")
            if name not in _ARRAYS and len(arrays.files) != 1:
                found = ", ".join(arrays.files[:8]) or "nothing"
                raise ValueError(f"it holds {found}; want an array named {', '.join(_ARRAYS)}, or one array alone")
            return np.asarray(arrays[name]), f"{path}: {name}"
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot load {path} as .npz: {error}") from error


def _load_idx(path: Path, *, gzipped: bool) -> np.ndarray:
    """The format of the MNIST files: 0, 0, type, rank, big-endian uint32 sizes, values; type 8 is the unsigned byte."""
    try:
        data = gzip.decompress(path.read_bytes()) if gzipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot unpack {path}: {error}; the file is truncated or damaged") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"{path} is of unknown type; {_WANTED}")
    kind, rank = data[2:4]
    start = 4 + 4 * rank
    if kind != 8 or rank not in (3, 4):
        raise ValueError(f"{path} has {rank} dimensions of type {kind:#04x}; want images: 3 or 4 of type 0x08 (uint8)")
    if len(data) < start:
        raise ValueError(f"{path} is truncated: its header ends after {len(data)} bytes, not {start}")
    shape = struct.unpack(f">{rank}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(data) - start} bytes of images, its header promises {math.prod(shape)} {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # bytes are read-only, torch warns


def _load_folder(folder: Path, progress: bool) -> np.ndarray:
    from tqdm import tqdm

    found = (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and not _hidden(file, folder))
    files = sorted(filter(Path.is_file, found))
    if not files:
        raise ValueError(f"{folder} holds no images (none of *{' *'.join(sorted(_SUFFIXES))})")
    first = _decode(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    quiet = not progress or len(files) <= 1000
    for i, file in enumerate(tqdm(files, desc="reading images", unit="image", disable=quiet)):
        image = _decode(file)
        if image.shape[:2] != first.shape[:2]:
            (h, w), (h0, w0) = image.shape[:2], first.shape[:2]
            way_out = f"resize or crop to one size first, for example with `magick mogrify -resize {w0}x{h0}! *`"
            raise ValueError(f"sizes differ: {files[0]} is {w0}x{h0}, {file} is {w}x{h}; {way_out}")
        if image.shape[2] > images.shape[3]:
            images = images.repeat(3, axis=3)
        images[i] = image
    return images


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _decode(file: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.mode not in _GREY | _COLOUR:
                raise ValueError(f"its mode is {image.mode}, want 8 bits per channel")
            array = np.asarray(ImageOps.exif_transpose(image).convert("L" if image.mode in _GREY else "RGB"))
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, DecompressionBombError
        raise ValueError(f"cannot read the image {file}: {error}") from error
    return array if array.ndim == 3 else array[..., None]
