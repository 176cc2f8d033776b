"""Images in a folder and its subfolders, decoded ahead in threads; the subfolders may be classes."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
GREY = {"1", "L", "LA"}  # Pillow's modes
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_CHUNK = 8  # images that one thread decodes at a time
_AHEAD = 8  # chunks that are decoded ahead of their use


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; follows links, skips hidden files.

    Raises: ValueError: there are none, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    files: list[Path] = []
    for root, below, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(root)
        above = here.resolve()  # following a link to a folder above would never end
        below[:] = [name for name in below if name[0] != "." and not above.is_relative_to((here / name).resolve())]
        files += [here / name for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    if not (files := sorted(filter(Path.is_file, files))):
        raise ValueError(f"{folder} holds no images (none of *{' *'.join(sorted(SUFFIXES))})")
    return files


def load_files(files: Sequence[Path], progress: bool) -> np.ndarray:
    """All images: uint8 [N, H, W, C], C = 3 if one of them is coloured, else 1."""
    from tqdm import tqdm

    images: np.ndarray | None = None
    quiet = not progress or len(files) <= 1000
    for i, image in enumerate(tqdm(_decode_all(files), "reading images", len(files), unit="image", disable=quiet)):
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape[2] > images.shape[3]:
            images = images.repeat(3, axis=3)
        images[i] = image
    assert images is not None
    return images


def stream_files(files: Sequence[Path], batch: int) -> Iterator[np.ndarray]:
    """Batches of images: uint8 [n, H, W, C], C = 3 if one of the batch is coloured, else 1."""
    decoded = _decode_all(files)
    for start in range(0, len(files), batch):
        images = [next(decoded) for _ in files[start : start + batch]]
        channels = max(image.shape[2] for image in images)
        yield np.stack([image.repeat(channels // image.shape[2], axis=2) for image in images])


def folder_labels(folder: Path, classes: int | None) -> np.ndarray:
    """[N] int64: the class of each file of `find_images`, the position of its top subfolder in sorted order.

    Raises: ValueError: an image is in no subfolder, or `classes` is not None and not the number of subfolders.
    """
    files = [file.relative_to(folder) for file in find_images(folder)]
    if loose := [file for file in files if len(file.parts) == 1]:
        raise ValueError(f"{folder / loose[0]} has no class; want each image in a folder below {folder}, its class")
    names, labels = np.unique([file.parts[0] for file in files], return_inverse=True)
    if classes not in (None, len(names)):
        raise ValueError(
            f"{folder} has {len(names)} folders with images, but the model has {classes} classes, which are the sorted "
            "folders that it was trained on; name the same folders, or pass the labels"
        )
    return labels


def _decode_all(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Each image in order: uint8 [H, W, C], C = 1 or 3. Raises: ValueError: a size differs from that of the first."""
    first: tuple[int, ...] = ()
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        decode = lambda chunk: pool.submit(lambda: [_decode_file(file) for file in chunk])
        ahead = deque(map(decode, chunks[:_AHEAD]))
        for i, chunk in enumerate(chunks):
            images = ahead.popleft().result()
            ahead.extend(map(decode, chunks[i + _AHEAD : i + _AHEAD + 1]))
            for file, image in zip(chunk, images, strict=True):
                first = first or image.shape
                if image.shape[:2] != first[:2]:
                    (h, w), (h0, w0) = image.shape[:2], first[:2]
                    differ = f"{files[0]} is {w0}x{h0}, {file} is {w}x{h}"
                    way_out = f"resize or crop to one size first, for example `magick mogrify -resize {w0}x{h0}! *`"
                    raise ValueError(f"sizes differ: {differ}; {way_out}")
                yield image


def _decode_file(file: Path) -> np.ndarray:
    """One image: uint8 [H, W, C], C = 1 or 3, turned upright as its EXIF orientation says."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.mode not in GREY | COLOUR:
                raise ValueError(f"its mode is {image.mode}; want 8 bits per channel")
            array = np.asarray(ImageOps.exif_transpose(image).convert("L" if image.mode in GREY else "RGB"))
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, DecompressionBombError
        raise ValueError(f"cannot read the image {file}: {error}") from error
    return array if array.ndim == 3 else array[..., None]
