"""Images to learn from or to compare with, and their classes: from an .npz, an MNIST-format file or a folder."""

import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

_HELD_OUT = {"x_test": "y_test"}
_ARRAYS = {"x_train": "y_train", "x": "y", "arr_0": "arr_1", "images": "labels"}  # of images, and of their labels
_MAGIC = {b"PK": "npz", b"\x1f\x8b": "idx", b"\0\0": "idx"}  # how a file begins
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_GREY, _COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_PART, _AHEAD = 8, 8  # pictures decoded by one thread at a time; so many of these parts before they are asked for
_CHANNELS = ((), (1,), (3,), (4,))  # what may follow [N, H, W]
_WANTED = "want an .npz, an MNIST-format file (idx, plain or .gz) or a folder of images"


def load_images(path: str | os.PathLike[str], *, held_out: bool = False, progress: bool = True) -> np.ndarray:
    """All images of one size, in memory.

    Args:
        path: one of
            an .npz with uint8 [N, H, W] or [N, H, W, C]: array x_train, x, arr_0 or images, else its only array;
            an MNIST-format file (idx of unsigned bytes, [N, H, W] or [N, H, W, C]), gzipped or not;
            a folder, searched with its subfolders in sorted order: all grey gives C = 1, any colour makes all RGB (a
            palette counts as colour); alpha is dropped; a photograph is turned as its EXIF orientation says.
        held_out: prefer an .npz's x_test, which no model was trained on.
        progress: show a bar while a large folder is read.
    Returns: uint8 [N, H, W, C], C = 1, 3 or 4.
    Raises: ValueError: it does not exist, is of another kind, is damaged, is empty, or its images differ in size.
    """
    path, kind = _opened(path)
    if kind == "folder":
        return _load_folder(path, progress)
    if kind == "npz":
        return _checked(*_load_npz(path, held_out))
    return _checked(_load_idx(path, (3, 4), "images"), path)


def stream_images(
    path: str | os.PathLike[str], *, array: str | None = None, batch: int = 128
) -> tuple[int, Iterator[np.ndarray]]:
    """The images that `load_images` gives, a few at a time: of an .npz or a folder no more are in memory.

    Args:
        path: as of `load_images`.
        array: which one of an .npz; None: as `load_images` chooses.
        batch: images to give at once, at least 1; of the last ones, what is left.
    Returns: how many there are, and an iterator of uint8 [n, H, W, C]. In a folder of grey and coloured pictures C is 3
        where one of the n is coloured.
    Raises: ValueError: as of `load_images`, in part only when the iterator comes to what is damaged.
    """
    path, kind = _opened(path)
    if array is not None and kind != "npz":
        raise ValueError(f"{path} is no .npz; leave out :{array}")
    if kind == "folder":
        files = _files(path)
        return len(files), _stream_folder(files, batch)
    if kind == "npz":
        return _stream_npz(path, array, batch)
    images = _checked(_load_idx(path, (3, 4), "images"), path)
    return len(images), (images[start : start + batch] for start in range(0, len(images), batch))


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that images are read from: that one, or those in a folder, in order. Raises: as of `load_images`."""
    path, kind = _opened(path)
    return _files(path) if kind == "folder" else [path]


def load_labels(
    path: str | os.PathLike[str], *, count: int, held_out: bool = False, classes: int | None = None
) -> np.ndarray:
    """The classes of the images that `load_images(path)` gives, in the same order.

    Args:
        path: one of
            an .npz with integers [N] or [N, 1]: array y_train beside the images x_train, y_test beside x_test, y beside
            x, arr_1 beside arr_0, labels beside images;
            an MNIST-format file of images, named so: the file of labels beside it is read, such as
            train-labels-idx1-ubyte for train-images-idx3-ubyte.gz, either of them gzipped or not;
            a folder of one folder for each class: their names, sorted, are the classes 0, 1, ...
        count: how many images there are, N.
        held_out: as of `load_images`.
        classes: K of a model that knows them; None: as many as there are.
    Returns: int64 [N], 0 <= label < K; without `classes`, K > 1 and each of them is there at least once.
    Raises: ValueError: there are no labels, they are damaged, not one per image, or not as above; or a folder has not
        `classes` folders, whose numbers would then be others than those of training.
    """
    path, kind = _opened(path)
    if kind == "folder":
        labels, name = _folder_labels(path, classes), str(path)
    elif kind == "npz":
        labels, name = _load_npz(path, held_out, labels=True)
    else:
        name = str(_labels_beside(path))
        labels = _load_idx(Path(name), (1,), "labels")
    return _checked_labels(labels, name, count, classes)


def array_name(path: str | os.PathLike[str], *, held_out: bool = False) -> str | None:
    """Which array of an .npz `load_images` reads; None of what is no .npz."""
    path, kind = _opened(path)
    if kind != "npz":
        return None
    with _reading(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return _chosen(arrays.files, held_out)


def _opened(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The path, and what lies there: folder, npz or idx."""
    if not os.fspath(path):
        raise ValueError(f"path is ''; {_WANTED}")
    path = Path(path)
    if path.is_dir():
        return path, "folder"
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {_WANTED}") from error
    if magic not in _MAGIC:
        raise ValueError(f"{path} is of unknown type; {_WANTED}")
    return path, _MAGIC[magic]


def _checked(array: np.ndarray, name: object) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[3:] not in _CHANNELS:
        wanted = "uint8 (0..255) [N, H, W] or [N, H, W, C] with C = 1, 3 or 4"
        raise ValueError(f"{name} is {list(array.shape)} {array.dtype}; want {wanted}{_conversion(array)}")
    if array.size == 0:
        raise ValueError(f"{name} is {list(array.shape)}: it holds no images")
    _check_brightest(array.max(), name)
    return array if array.ndim == 4 else array[..., None]


def _check_brightest(value: int, name: object) -> None:
    if value == 1:
        raise ValueError(f"{name} is 0 and 1 only, all but black in 0..255; multiply it by 255")


def _conversion(x: np.ndarray) -> str:
    """How to make images of numbers that look like some."""
    if x.ndim == 4 and x.shape[1] in (1, 3, 4) and x.shape[3] not in (1, 3, 4):
        return "; move its channels: x.transpose(0, 2, 3, 1)"
    if x.dtype.kind not in "fiu" or x.dtype == np.uint8 or x.size == 0 or x.ndim not in (3, 4):
        return ""
    low, high = x.min(), x.max()
    if x.dtype.kind == "f" and low >= -1 and high <= 1:
        return f"; convert it: ({'x * 255' if low >= 0 else '(x + 1) * 127.5'}).round().astype('uint8')"
    return "; convert it: x.round().astype('uint8')" if low >= 0 and high <= 255 else ""


def _checked_labels(labels: np.ndarray, name: str, count: int, known: int | None) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.ndim == 0 or labels.shape[1:] not in ((), (1,)):
        wanted = "integers [N]; number classes with np.unique(y, return_inverse=True)[1], one-hot ones with y.argmax(1)"
        raise ValueError(f"{name} is {list(labels.shape)} {labels.dtype}; want {wanted}")
    if len(labels) != count:
        raise ValueError(f"{name} holds {len(labels)} labels, but there are {count} images; want one for each")
    if known is not None:
        if labels.min() < 0 or labels.max() >= known:
            raise ValueError(
                f"{name} has labels from {labels.min()} to {labels.max()}; want 0 to {known - 1}, the model's"
            )
        return labels.reshape(-1).astype(np.int64)
    classes, labels = np.unique(labels, return_inverse=True)
    if classes[0] < 0:
        raise ValueError(f"{name} has the label {classes[0]}; want 0, 1, ..., each of them at least once")
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        missing = np.setdiff1d(np.arange(len(classes)), classes)[0]
        way_out = "number the classes 0, 1, ... with np.unique(y, return_inverse=True)[1]"
        raise ValueError(f"{name} has labels from {classes[0]} to {classes[-1]}, but none is {missing}; {way_out}")
    if len(classes) == 1:
        raise ValueError(f"{name} has one class alone; train without labels, or give the folder above the classes")
    return labels.reshape(-1)


def _load_npz(path: Path, held_out: bool, *, labels: bool = False) -> tuple[np.ndarray, str]:
    """The array of the images, or of their labels, and its name."""
    known = _HELD_OUT | _ARRAYS
    with _reading(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        name, found = _chosen(arrays.files, held_out), _listed(arrays.files)
        if labels:
            images, name = name, known.get(name, "labels")
            if name not in arrays.files:
                raise ValueError(f"it holds {found}; want labels of {images} in an array named {name}")
        return np.asarray(arrays[name]), f"{path}: {name}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a damaged .npz in this block name it."""
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot load {path} as .npz: {error}") from error


def _chosen(names: Sequence[str], held_out: bool = False) -> str:
    """Which array holds the images."""
    known = [*_HELD_OUT, *_ARRAYS] if held_out else [*_ARRAYS]
    name = next((name for name in known if name in names), names[0] if names else "")
    if name not in known and len(names) != 1:
        raise ValueError(f"it holds {_listed(names)}; want an array named {', '.join(known)}, or one array alone")
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) or "nothing"


def _stream_npz(path: Path, array: str | None, batch: int) -> tuple[int, Iterator[np.ndarray]]:
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = [member.removesuffix(".npy") for member in archive.namelist()]
        name = _chosen(names) if array is None else array
        if name not in names:
            raise ValueError(f"it holds {_listed(names)}, and no {name}")
        member = archive.namelist()[names.index(name)]
        with archive.open(member) as file:
            shape, by_columns, dtype = _npy_header(file)
    title = f"{path}: {name}"
    if by_columns or dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in _CHANNELS or 0 in shape:
        with _reading(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = np.ascontiguousarray(arrays[name])
        images = _checked(images, title)  # tells what is wrong with it
        return len(images), (images[start : start + batch] for start in range(0, len(images), batch))

    def stream() -> Iterator[np.ndarray]:
        brightest = 0
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _npy_header(file)
            for start in range(0, shape[0], batch):
                n = min(batch, shape[0] - start)
                pixels = bytearray(file.read(n * math.prod(shape[1:])))  # bytes are read-only, torch warns
                images = np.frombuffer(pixels, np.uint8).reshape(n, *shape[1:])
                brightest = max(brightest, int(images.max()))
                yield images if images.ndim == 4 else images[..., None]
        _check_brightest(brightest, title)

    return shape[0], stream()


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _labels_beside(path: Path) -> Path:
    name = re.sub("idx[34]", "idx1", path.name.removesuffix(".gz").replace("images", "labels"))
    found = [file for file in (path.with_name(name), path.with_name(f"{name}.gz")) if file.is_file()]
    if "images" not in path.name:
        raise ValueError(f"{path} does not tell where its labels are; name it train-images-idx3-ubyte or alike")
    if not found:
        raise ValueError(f"{path} has no labels beside it; want {path.with_name(name)}, or that .gz")
    return found[0]


def _load_idx(path: Path, ranks: tuple[int, ...], what: str) -> np.ndarray:
    """The format of the MNIST files: 0, 0, type, rank, big-endian uint32 sizes, values; type 8 is the unsigned byte."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot unpack {path}: {error}; the file is truncated or damaged") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"{path} is of unknown type; {_WANTED}")
    kind, rank = data[2:4]
    start = 4 + 4 * rank
    if kind != 8 or rank not in ranks:
        wanted = f"{what}: {' or '.join(map(str, ranks))} of type 0x08 (uint8)"
        raise ValueError(f"{path} has {rank} dimensions of type {kind:#04x}; want {wanted}")
    if len(data) < start:
        raise ValueError(f"{path} is truncated: its header ends after {len(data)} bytes, not {start}")
    shape = struct.unpack(f">{rank}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(data) - start} bytes of {what}, its header promises {math.prod(shape)} {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # bytes are read-only, torch warns


def _load_folder(folder: Path, progress: bool) -> np.ndarray:
    from tqdm import tqdm

    files = _files(folder)
    images: np.ndarray | None = None
    quiet = not progress or len(files) <= 1000
    for i, image in enumerate(tqdm(_decoded(files), "reading images", len(files), unit="image", disable=quiet)):
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape[2] > images.shape[3]:
            images = images.repeat(3, axis=3)
        images[i] = image
    assert images is not None
    return images


def _stream_folder(files: Sequence[Path], batch: int) -> Iterator[np.ndarray]:
    pictures = _decoded(files)
    for start in range(0, len(files), batch):
        some = [next(pictures) for _ in files[start : start + batch]]
        channels = max(image.shape[2] for image in some)
        yield np.stack([image.repeat(channels // image.shape[2], axis=2) for image in some])


def _decoded(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """What is in the files, in order, of one size: uint8 [H, W, C], C = 1 or 3. Some are decoded ahead, in threads."""
    first: tuple[int, ...] = ()
    parts = [files[start : start + _PART] for start in range(0, len(files), _PART)]
    with ThreadPoolExecutor() as pool:
        decode = lambda part: pool.submit(lambda: [_decode(file) for file in part])
        ahead = deque(map(decode, parts[:_AHEAD]))
        for i, part in enumerate(parts):
            images = ahead.popleft().result()
            ahead.extend(map(decode, parts[i + _AHEAD : i + _AHEAD + 1]))
            for file, image in zip(part, images, strict=True):
                first = first or image.shape
                if image.shape[:2] != first[:2]:
                    (h, w), (h0, w0) = image.shape[:2], first[:2]
                    way_out = (
                        f"resize or crop to one size first, for example with `magick mogrify -resize {w0}x{h0}! *`"
                    )
                    raise ValueError(f"sizes differ: {files[0]} is {w0}x{h0}, {file} is {w}x{h}; {way_out}")
                yield image


def _folder_labels(folder: Path, known: int | None) -> np.ndarray:
    files = [file.relative_to(folder) for file in _files(folder)]
    if loose := [file for file in files if len(file.parts) == 1]:
        raise ValueError(f"{folder / loose[0]} is in no class; want each image in a folder below {folder}, its class")
    classes, labels = np.unique([file.parts[0] for file in files], return_inverse=True)
    if known not in (None, len(classes)):
        raise ValueError(
            f"{folder} has {len(classes)} folders with images, but the model has {known} classes, numbered as the "
            "folders of its training, sorted; name the same folders, or pass the labels"
        )
    return labels


def _files(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, linked ones too, sorted; nothing hidden."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    files: list[Path] = []
    for root, below, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(root)
        above = here.resolve()  # a link that leads back up would be followed for ever
        below[:] = [name for name in below if name[0] != "." and not above.is_relative_to((here / name).resolve())]
        files += [here / name for name in names if name[0] != "." and Path(name).suffix.lower() in _SUFFIXES]
    if not (files := sorted(filter(Path.is_file, files))):
        raise ValueError(f"{folder} holds no images (none of *{' *'.join(sorted(_SUFFIXES))})")
    return files


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
