"""Finds the images in a folder and its subfolders. None is left out without a word."""

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from fastddpm.storage.classes import holds_labels
from fastddpm.storage.decoding import SUFFIXES, ImageFile
from fastddpm.storage.image_files import ImageFiles, images_among


def open_folder(
    folder: Path, suffixes: Collection[str] = SUFFIXES, kind: str = "images", ignored: Collection[str] = ()
) -> ImageFiles:
    """The image files in a folder and its subfolders, sorted by name (1, 10, 2); follows links, skips what is hidden.

    Args:
        suffixes, kind: of the files that are wanted. Others than images have labels and classes, but no pixels.
        ignored: names of files that do not count.
    Raises: ValueError: there are none, or one of them, or a folder, cannot be read.
    """
    names = [name for name in _names(folder) if os.path.basename(name) not in ignored]
    files = {name: _file(folder, name) for name in names}
    if bad := [name for name, file in files.items() if file is None]:
        count = f"{len(bad)} of {len(names)} files cannot be read, the first is {folder / bad[0]}"
        raise ValueError(f"{folder}: {count}, {_why_unreadable(folder / bad[0])}, or remove what is not to be read")
    images, left_out = images_among(names, folder, suffixes, kind)
    readable = {name: file for name, file in files.items() if file is not None}
    labels = {name: file for name, file in readable.items() if holds_labels(name)}
    paths = [folder / name for name in images]
    return ImageFiles(folder, paths, [readable[name] for name in images], labels, left_out=left_out)


def would_hold(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether a file written to path would be among the files of a folder, also by way of links."""
    inside = {os.path.realpath(below) for below, _ in _folders(folder)}
    places = (os.path.realpath(os.path.dirname(path)), os.path.dirname(os.path.realpath(path)))
    return any(str(above) in inside for place in places for above in (Path(place), *Path(place).parents))


def holds_files(
    folder: Path, suffixes: Collection[str], *, but: Collection[str] = (), ignored: Collection[str] = ()
) -> bool:
    """Whether `open_folder` would find files with these suffixes, and none with the suffixes `but`. Opens no file.

    Args: ignored: names of files that do not count.
    """
    found = set()
    for _, names in _folders(folder):
        found |= {os.path.splitext(name)[1].lower() for name in names if name not in ignored}
        if not found.isdisjoint(but):
            return False
    return not found.isdisjoint(suffixes)


def _names(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, as names relative to it, without hidden ones, in sorted order."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    found = []
    for below, names in _folders(folder, unreadable):
        inside = Path(below).relative_to(folder).parts
        found += ["/".join((*inside, name)) for name in names]
    return sorted(found, key=lambda name: name.split("/"))


def _folders(
    folder: str | os.PathLike[str], unreadable: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, each with its files; follows links, skips what is hidden.

    Args: unreadable: called for a folder that cannot be read; None: it is left out.
    """
    leading: dict[str, tuple[Path, ...]] = {os.fspath(folder): ()}  # the folders that lead to each, without links
    for here, below, names in os.walk(folder, onerror=unreadable, followlinks=True):
        chain = (*leading.pop(here), Path(here).resolve())
        below[:] = [name for name in below if name[0] != "." and not _leads_back(os.path.join(here, name), chain)]
        leading |= {os.path.join(here, name): chain for name in below}
        yield here, [name for name in names if name[0] != "."]


def _leads_back(path: str, chain: Sequence[Path]) -> bool:
    """Whether a folder is one of those that lead to it, or above one; following it would never end."""
    target = Path(path).resolve()
    return any(above.is_relative_to(target) for above in chain)


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
    forbidden = "whose permissions forbid it: change them"
    try:
        status = os.stat(path)
    except PermissionError:  # of a folder
        return forbidden
    except OSError:
        to = f"a link to {os.readlink(path)}, " if os.path.islink(path) else ""
        return f"{to}which is not there: mount or fetch what is missing"
    return forbidden if stat.S_ISREG(status.st_mode) else "a pipe or a device: write it to a file"
