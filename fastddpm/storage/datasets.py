"""Images to train on or to compare with, and class labels: from files of arrays, folders and archives."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fastddpm.core import checks
from fastddpm.storage import npz
from fastddpm.storage.archives import open_tar, open_zip, zip_holds_images
from fastddpm.storage.arrays import StoredArray
from fastddpm.storage.data_checks import WANTED, as_images, as_labels
from fastddpm.storage.files import check_regular
from fastddpm.storage.idx import GZIP, labels_beside, open_idx
from fastddpm.storage.image_folder import open_folder
from fastddpm.storage.npz import split_array
from fastddpm.storage.sequences import holds_waves, is_text_file, open_waves
from fastddpm.storage.shards import ShardFolder, is_shard_folder

# (what a file has at this byte, the kind of the file); a .zip is an .npz unless it holds images
_MAGIC = ((b"\x93NUMPY", 0, "npy"), (GZIP, 0, "idx"), (b"\0\0", 0, "idx"), (b"ustar", 257, "tar"))


def load_images(path: str | os.PathLike[str], *, held_out: bool = False, progress: bool = True) -> np.ndarray:
    """All images, of one size, in memory.

    Args:
        path: one of
            an .npz with uint8 [N, H, W] or [N, H, W, C]: the array x_train, x, arr_0, images or train_images, or its
            only array, or "FILE.npz:NAME";
            an .npy with such an array;
            an MNIST-format file (idx of unsigned bytes, [N, H, W] or [N, H, W, C]), gzipped or not;
            a folder, searched with its subfolders, or a .zip, both sorted by name (1, 10, 2), or a .tar, in its order:
            if all images are grey, C = 1, if any has colour or a palette, all become RGB; alpha is dropped; photographs
            are turned as their EXIF orientation says; hidden files are left out;
            a folder of shards that `fastddpm sample` wrote.
        held_out: prefer an .npz's x_test or test_images, which no model was trained on.
        progress: show a bar while many image files are read.
    Returns: uint8 [N, H, W, C], C = 1, 3 or 4.
    Raises: ValueError: path does not exist, is of another kind, is damaged or empty, or its images differ in size.
    Warns: files in a folder or an archive are left out, or the metadata of an image is damaged.
    """
    try:
        return _open(path, held_out=held_out).load(progress)
    except MemoryError as error:
        raise ValueError(f"the images of {path} do not fit in memory; use fewer, or smaller ones") from error


def stream_images(
    path: str | os.PathLike[str], *, array: str | None = None, batch: int = 128, same_size: bool = True
) -> tuple[int, Iterator[np.ndarray]]:
    """The images of `load_images` in batches, so that they need not fit in memory.

    Args:
        path: as in `load_images`.
        array: the array of an .npz; None: as `load_images` chooses.
        batch: images per batch, at least 1; the last, also of each shard, may hold fewer.
        same_size: refuse image files of several sizes; False: each `batch` images become one batch for each of their
            sizes.
    Returns: the number of images, and an iterator of uint8 [n, H, W, C]. For grey and coloured image files C is 3 if
        one of the n is coloured.
    Raises: ValueError: as in `load_images`, but some damage is found only when the iterator reaches it.
    """
    return _open(path, array=array).stream(checks.whole("batch", batch, 1), same_size)


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that images are read from: path itself, or the files of a folder, sorted.

    Raises: ValueError: path does not exist, is of another kind, or is a folder without images.
    """
    return list(_open(path).files)


def load_labels(
    path: str | os.PathLike[str],
    *,
    count: int,
    held_out: bool = False,
    classes: int | Sequence[str] | None = None,
) -> np.ndarray:
    """The class labels of the images of `load_images(path)`, or of `load_sequences(path)`, in the same order.

    Args:
        path: one of
            an .npz with integers [N] or [N, 1]: array y_train for the images x_train, y for x, arr_1 for arr_0,
            train_labels for train_images, and so on, labels for others;
            an .npy of images, with such an .npy beside it;
            an MNIST-format file of images, whose labels are in a file beside it, such as train-labels-idx1-ubyte for
            train-images-idx3-ubyte.gz, either of them gzipped or not;
            a folder of images or WAV files, or an archive, with one folder per class, as `load_classes` orders them; or
            with a dataset.json as StyleGAN and EDM read it; or with a .cls beside each image, as webdataset reads it;
            a folder of shards that `fastddpm sample` wrote.
        count: the number of images or sequences, N.
        held_out: as in `load_images`.
        classes: the number of classes K of a model, or their names, by which the folders are numbered; None: as many as
            the labels have.
    Returns: int64 [N], 0 <= label < K; without `classes`, K > 1 and each class occurs at least once.
    Raises: ValueError: there are no labels, they are damaged, or not as above; or the folders are not `classes`.
    Warns: the order of the folders is not certain, as `classes` is a number.
    """
    classes = _checked_classes(classes)
    if is_text_file(path):
        raise ValueError(f"{path} is a text file, which has no class labels; leave them (--class-conditional) out")
    labels, name = _open(path, held_out=held_out, waves=True).labels(classes)
    return as_labels(labels, name, count, classes if classes is None or isinstance(classes, int) else len(classes))


def load_classes(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """The names of the classes of `load_labels(path)`: those of the class folders in natural order (1, 2, 10).

    None: the labels are numbers, or there are none.
    """
    return None if is_text_file(path) else _open(path, waves=True).classes()


def array_name(path: str | os.PathLike[str], *, held_out: bool = False) -> str | None:
    """The array of an .npz that `load_images` reads; None if path is not an .npz."""
    path, kind, array = _parsed(path)
    return npz.choose_array(path, held_out=held_out) if kind == "npz" and array is None else array


class _Source(Protocol):
    """What images and labels are read from."""

    @property
    def files(self) -> Sequence[Path]: ...
    def load(self, progress: bool) -> np.ndarray: ...
    def stream(self, batch: int, same_size: bool) -> tuple[int, Iterator[np.ndarray]]: ...
    def labels(self, of_model: int | Sequence[str] | None) -> tuple[np.ndarray, str]: ...
    def classes(self) -> tuple[str, ...] | None: ...


@dataclass(frozen=True)
class _Array:
    """An array of images in a file of the kind npz, npy or idx, and its name in an .npz."""

    path: Path
    kind: str
    array: str | None = None

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def load(self, progress: bool) -> np.ndarray:
        return self._stored().load_images()

    def stream(self, batch: int, same_size: bool) -> tuple[int, Iterator[np.ndarray]]:
        stored = self._stored()
        return stored.count(), stored.stream_images(batch)

    def labels(self, of_model: int | Sequence[str] | None) -> tuple[np.ndarray, str]:
        if self.array is not None:
            stored = npz.open_labels(self.path, self.array)
        elif self.kind == "npy":
            stored = npz.open_npy(npz.npy_labels(self.path))
        else:
            stored = open_idx(labels_beside(self.path), (1,), "labels")
        return stored.load(), stored.name

    def classes(self) -> None:
        return None

    def _stored(self) -> StoredArray:
        if self.array is not None:
            return npz.open_array(self.path, self.array)
        return npz.open_npy(self.path) if self.kind == "npy" else open_idx(self.path, (3, 4), "images")


@dataclass(frozen=True)
class _Shards:
    """A folder of shards, in the format npz or webdataset, that `fastddpm sample` wrote."""

    folder: ShardFolder

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.path.iterdir() if file.is_file() and file.name[0] != ".")

    def load(self, progress: bool) -> np.ndarray:
        return np.concatenate(list(self._pictures()))

    def stream(self, batch: int, same_size: bool) -> tuple[int, Iterator[np.ndarray]]:
        parts = (shard[at : at + batch] for shard in self._pictures() for at in range(0, len(shard), batch))
        return len(self.folder.samples), parts

    def labels(self, of_model: int | Sequence[str] | None) -> tuple[np.ndarray, str]:
        if self.folder.classes is None:
            raise ValueError(f"{self.folder.path} has no class labels; leave them out, or name other data")
        return self.folder.all_labels(), str(self.folder.path)

    def classes(self) -> None:
        return None

    def _pictures(self) -> Iterator[np.ndarray]:
        return (as_images(shard, self.folder.path) for shard in self.folder.arrays())


def _open(
    path: str | os.PathLike[str], *, array: str | None = None, held_out: bool = False, waves: bool = False
) -> _Source:
    """What is at path.

    Args:
        array: of an .npz, if path does not name one.
        waves: a folder may hold WAV files, of which there are labels, but no images.
    """
    path, kind, array = _parsed(path, array)
    checks.flag("held_out", held_out)
    if kind == "npz":
        return _Array(path, kind, npz.choose_array(path, held_out=held_out) if array is None else array)
    if kind in ("npy", "idx"):
        return _Array(path, kind)
    if kind == "folder" and is_shard_folder(path) and (shards := ShardFolder.open(path)).format != "png":
        return _Shards(shards)
    if kind == "folder" and waves and holds_waves(path):
        return open_waves(path)
    if kind == "folder":
        return open_folder(path)
    return open_zip(path) if kind == "zip" else open_tar(path)


def _parsed(path: str | os.PathLike[str], array: str | None = None) -> tuple[Path, str, str | None]:
    """(the file or folder, what it is: folder, npz, npy, idx, zip or tar; the array of an .npz that is named)."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise ValueError(f"path is {checks.shown(path)}; {WANTED}")
    if array is not None and not isinstance(array, str):
        raise ValueError(f"array is {checks.shown(array)}; want the name of an array, or None")
    path, named = split_array(path)
    if array is not None and named not in (None, array):
        raise ValueError(f"path names the array {named}, but array is {array}; give one of them")
    array = array if named is None else named
    kind = "folder" if os.path.isdir(path) else _kind(check_regular(path))
    if array is not None and kind != "npz":
        raise ValueError(f"{path} is not an .npz; leave out :{array}")
    return path, kind, array


def _kind(path: Path) -> str:
    """What a file is: npz, npy, idx, zip or tar."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {WANTED}") from error
    if start[:2] == b"PK":
        return "zip" if zip_holds_images(path) else "npz"
    for magic, at, kind in _MAGIC:
        if start[at : at + len(magic)] == magic:
            return kind
    raise ValueError(f"{path} is of unknown type; {WANTED}")


def _checked_classes(classes: int | Sequence[str] | None) -> int | Sequence[str] | None:
    """Raises: ValueError: classes are neither None, nor a number, nor names."""
    if classes is None or checks.is_whole(classes):
        return None if classes is None else checks.whole("classes", classes, 1)
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"classes are {checks.shown(classes)}; want their number, or a sequence of their names")
    return classes
