"""Finds the images in a folder and its subfolders. None is left out without a word."""

import os
import stat
from functools import partial
from pathlib import Path

from fastddpm.storage.classes import holds_labels
from fastddpm.storage.decoding import ImageFile
from fastddpm.storage.image_files import ImageFiles, images_among


def open_folder(folder: Path) -> ImageFiles:
    """The image files in a folder and its subfolders, sorted by name (1, 10, 2); follows links, skips what is hidden.

    Raises: ValueError: there are none, or one of them, or a folder, cannot be read.
    """
    names = _names(folder)
    files = {name: _file(folder, name) for name in names}
    if bad := [name for name, file in files.items() if file is None]:
        count = f"{len(bad)} of {len(names)} files cannot be read, the first is {folder / bad[0]}"
        raise ValueError(f"{folder}: {count}, {_why_unreadable(folder / bad[0])}, or remove what is not to be read")
    images, left_out = images_among(names, folder)
    readable = {name: file for name, file in files.items() if file is not None}
    labels = {name: file for name, file in readable.items() if holds_labels(name)}
    paths = [folder / name for name in images]
    return ImageFiles(folder, paths, [readable[name] for name in images], labels, left_out=left_out)


def _names(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, as names relative to it, without hidden ones, in sorted order."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    found = []
    for root, below, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(root)
        above = here.resolve()  # following a link to a folder above would never end
        below[:] = [name for name in below if name[0] != "." and not above.is_relative_to((here / name).resolve())]
        inside = here.relative_to(folder).parts
        found += ["/".join((*inside, name)) for name in names if name[0] != "."]
    return sorted(found, key=lambda name: name.split("/"))


def _file(folder: Path, name: str) -> ImageFile | None:
    """None: it cannot be read."""
    path = os.path.join(folder, name)
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        return None
    return ImageFile(name, path, status.st_size, partial(_read, path))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _why_unreadable(path: Path) -> str:
    """Why `_file` is None, and the beginning of the way out."""
    if not os.path.exists(path):
        to = f"a link to {os.readlink(path)}, " if os.path.islink(path) else ""
        return f"{to}which is not there: mount or fetch what is missing"
    return "whose permissions forbid it: change them" if path.is_file() else "a pipe or a device: write it to a file"
