"""Finds the images in a .zip or a .tar. Their files are read one by one, and never written to the disk."""

import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from fastddpm.storage.arrays import reading
from fastddpm.storage.classes import holds_labels
from fastddpm.storage.decoding import ImageFile, is_image
from fastddpm.storage.image_files import ImageFiles, images_among

_TAR_BLOCK = 512


def zip_holds_images(path: Path) -> bool:
    """Whether a .zip holds image files; an .npz is a .zip, too, of .npy files."""
    with reading(path, ".zip"), zipfile.ZipFile(path) as archive:
        return any(_is_wanted(name) and is_image(name) for name in archive.namelist())


def open_zip(path: Path) -> ImageFiles:
    """The image files in a .zip, sorted as in a folder. Raises: ValueError: there are none, or it is damaged."""
    with reading(path, ".zip"):
        archive = zipfile.ZipFile(path)  # stays open: each opening would read the whole table of contents
        members = [member for member in archive.infolist() if not member.is_dir()]
        links = [member.filename for member in members if stat.S_ISLNK(member.external_attr >> 16)]
    files = [
        ImageFile(member.filename, f"{path}: {member.filename}", member.file_size, partial(archive.read, member))
        for member in members
    ]
    files.sort(key=lambda file: file.name.split("/"))
    return _images_of(path, files, links)


def open_tar(path: Path) -> ImageFiles:
    """The image files in a .tar, in its order. Raises: ValueError: there are none, or it is damaged."""
    with reading(path, ".tar"), open(path, "rb") as raw:
        with tarfile.open(fileobj=raw, mode="r:") as archive:
            members = [member for member in archive if not member.isdir()]
            end = archive.offset
        raw.seek(end)
        if raw.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):  # tarfile takes whatever is no header for the end
            raise ValueError(f"it ends, or is damaged, after {len(members)} files; pack or copy it again")
    links = [member.name for member in members if not member.isreg() or member.issparse()]
    files = [
        ImageFile(member.name, f"{path}: {member.name}", member.size, _reader(path, member.offset_data, member.size))
        for member in members
    ]
    return _images_of(path, files, links)


def _reader(path: Path, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    return read


def _images_of(path: Path, files: Sequence[ImageFile], links: Sequence[str]) -> ImageFiles:
    """The images among the files of an archive. Args: links: names of files that have no bytes of their own."""
    files = _relative([file for file in files if _is_wanted(file.name)])
    by_name = {file.name: file for file in files}
    images, left_out = images_among(list(by_name), path)
    places = {by_name[name].place for name in images}
    if bad := [link for link in links if f"{path}: {link}" in places]:
        way_out = "pack the files that they point to"
        raise ValueError(f"{path}: {len(bad)} images are links or pipes, one is {min(bad)}; {way_out}")
    labels = {name: file for name, file in by_name.items() if holds_labels(name)}
    return ImageFiles(path, [path], [by_name[name] for name in images], labels, left_out)


def _relative(files: Sequence[ImageFile]) -> list[ImageFile]:
    """The files with names relative to the folder that was packed: the deepest that holds all images and labels."""
    parts = [[part for part in file.name.split("/") if part != "."] or [file.name] for file in files]
    data = [each[:-1] for each in parts if is_image(each[-1]) or holds_labels(each[-1])]
    common = takewhile(lambda level: len(set(level)) == 1, zip(*data, strict=False))
    packed = [level[0] for level in common]
    depth = len(packed)
    names = ("/".join(each[depth:] if each[:depth] == packed else each) for each in parts)
    return [file._replace(name=name) for file, name in zip(files, names, strict=True)]


def _is_wanted(name: str) -> bool:
    """Whether neither a file nor a folder that it is in is hidden."""
    return not any(part.startswith(".") and part != "." for part in name.split("/"))
