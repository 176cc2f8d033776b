"""Image files: which they are, and what their pixels are, also if the metadata beside them is damaged."""

import io
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
LARGEST = 1 << 30  # bytes of an image file, more than Pillow's largest image has
GREY = {"1", "L", "LA"}  # Pillow's modes
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_ORIENTATION = 0x0112  # the EXIF tag
_PNG = b"\x89PNG\r\n\x1a\n"
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
# chunks that do not change the pixels; any other that is damaged makes the image a damaged one
_PNG_METADATA = {b"eXIf", b"iCCP", b"iTXt", b"tEXt", b"zTXt", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT"}
_PNG_METADATA |= {b"bKGD", b"hIST", b"sPLT", b"oFFs", b"pCAL", b"sCAL", b"sTER", b"gIFg", b"gIFx", b"dSIG", b"vpAg"}
_PNG_METADATA |= {b"cICP", b"mDCV", b"mDCv", b"cLLI", b"cLLi", b"caNv", b"orNT", b"acTL", b"fcTL", b"fdAT"}
_WEBP_METADATA = {b"EXIF": 0x08, b"XMP ": 0x04, b"ICCP": 0x20}  # and the flag in VP8X that announces it


class ImageFile(NamedTuple):
    """A file in a folder or an archive.

    Attributes:
        name: relative to the folder or the archive, with / between its parts.
        place: the path, for error messages.
        size: in bytes.
        read: returns the bytes.
    """

    name: str
    place: str
    size: int
    read: Callable[[], bytes]


def is_image(name: str) -> bool:
    """Whether a name is that of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def decode(file: ImageFile) -> tuple[np.ndarray, str | None]:
    """An image, turned upright as its EXIF orientation says.

    Returns: uint8 [H, W, C], C = 1 or 3; and what is wrong with its metadata, or None.
    Raises: ValueError: it cannot be read, is not an image, is damaged, or has more than 8 bits per channel.
    """
    content = b""
    try:
        if file.size > LARGEST:
            raise ValueError(f"it has {file.size} bytes; want at most {LARGEST}")
        content = file.read()
        return _pixels(content)
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, DecompressionBombError
        try:
            return _pixels(_without_metadata(content))[0], "metadata that cannot be read"
        except Exception:
            raise ValueError(f"cannot read the image {file.place}: {_cause(error, file.size)}") from error


def _pixels(content: bytes) -> tuple[np.ndarray, str | None]:
    from PIL import Image

    if content.startswith(_POSTSCRIPT):
        raise ValueError("it is PostScript, a program that Pillow would run")
    with Image.open(io.BytesIO(content)) as image:
        if image.mode not in GREY | COLOUR:
            raise ValueError(f"its mode is {image.mode}; want 8 bits per channel")
        image.load()
        lost = None
        upright: Image.Image = image
        try:
            if exif := image.info.get("exif"):
                _check_directory(exif)
                Image.Exif().load(exif)  # for a JPEG, `getexif` keeps quiet about a damaged header
            orientation = image.getexif().get(_ORIENTATION, 1)
            turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
            if method := (turn | {7: "TRANSVERSE", 8: "ROTATE_90"}).get(orientation):
                upright = image.transpose(Image.Transpose[method])
        except Exception:
            lost = "an EXIF orientation that cannot be read"
        array = np.asarray(upright.convert("L" if image.mode in GREY else "RGB"))
    return array if array.ndim == 3 else array[..., None], lost


def _check_directory(exif: bytes) -> None:
    """Raises: struct.error or ValueError: Pillow would skip the orientation, with a warning that names no file."""
    tiff = exif
    while tiff.startswith(b"Exif\0\0"):
        tiff = tiff.removeprefix(b"Exif\0\0")
    if not tiff:
        return
    order = "<" if tiff[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, _, values, _ = struct.unpack_from(f"{order}HHII", tiff, entry)
        if tag == _ORIENTATION and values != 1:
            raise ValueError("the orientation is not one number")


def _cause(error: Exception, size: int) -> str:
    from PIL import UnidentifiedImageError

    if size == 0:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):  # its text names a buffer in memory
        return "it is not an image of a known kind, or damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _without_metadata(content: bytes) -> bytes:
    """The same PNG or WebP without its metadata."""
    if content[:8] == _PNG:
        return _png_pixels(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _webp_pixels(content)
    raise ValueError("its metadata cannot be separated")


def _png_pixels(content: bytes) -> bytes:
    kept, at = bytearray(_PNG), len(_PNG)
    while at + 8 <= len(content):
        size, name = struct.unpack(">I4s", content[at : at + 8])
        end = at + 12 + size
        if name not in _PNG_METADATA:
            kept += content[at:end]
        at = end
    return bytes(kept)


def _webp_pixels(content: bytes) -> bytes:
    kept, at = bytearray(b"WEBP"), 12
    while at + 8 <= len(content):
        name, size = struct.unpack("<4sI", content[at : at + 8])
        end = at + 8 + size + size % 2
        if name not in _WEBP_METADATA:
            kept += content[at:end]
        if name == b"VP8X" and end <= len(content):
            kept[-size] &= ~sum(_WEBP_METADATA.values()) & 0xFF  # its first byte holds flags
        at = end
    return b"RIFF" + struct.pack("<I", len(kept)) + bytes(kept)
