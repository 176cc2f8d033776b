"""Images to train on or to compare with, and their class labels: from an .npz, an MNIST-format file or a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastddpm.storage import npz
from fastddpm.storage.data_checks import WANTED, as_images, as_labels
from fastddpm.storage.idx import labels_beside, load_idx
from fastddpm.storage.image_folder import find_images, folder_labels, load_files, stream_files

_MAGIC = {b"PK": "npz", b"\x1f\x8b": "idx", b"\0\0": "idx"}  # the first two bytes of each kind of file


def load_images(path: str | os.PathLike[str], *, held_out: bool = False, progress: bool = True) -> np.ndarray:
    """All images, of one size, in memory.

    Args:
        path: one of
            an .npz with uint8 [N, H, W] or [N, H, W, C]: array x_train, x, arr_0 or images, else its only array;
            an MNIST-format file (idx of unsigned bytes, [N, H, W] or [N, H, W, C]), gzipped or not;
            a folder, searched with its subfolders in sorted order: if all images are grey, C = 1, if any has colour or
            a palette, all become RGB; alpha is dropped; photographs are turned as their EXIF orientation says.
        held_out: prefer an .npz's x_test, which no model was trained on.
        progress: show a bar while a large folder is read.
    Returns: uint8 [N, H, W, C], C = 1, 3 or 4.
    Raises: ValueError: path does not exist, is of another kind, is damaged or empty, or its images differ in size.
    """
    path, kind = _path_and_kind(path)
    if kind == "folder":
        return load_files(find_images(path), progress)
    if kind == "npz":
        return as_images(*npz.load_array(path, held_out=held_out))
    return as_images(load_idx(path, (3, 4), "images"), path)


def stream_images(
    path: str | os.PathLike[str], *, array: str | None = None, batch: int = 128
) -> tuple[int, Iterator[np.ndarray]]:
    """The images of `load_images` in batches, so that an .npz or a folder need not fit in memory.

    Args:
        path: as in `load_images`.
        array: the array of an .npz; None: as `load_images` chooses.
        batch: images per batch, at least 1; the last may hold fewer.
    Returns: the number of images, and an iterator of uint8 [n, H, W, C]. In a folder of grey and coloured images C is 3
        if one of the n is coloured.
    Raises: ValueError: as in `load_images`, but some damage is found only when the iterator reaches it.
    """
    path, kind = _path_and_kind(path)
    if array is not None and kind != "npz":
        raise ValueError(f"{path} is not an .npz; leave out :{array}")
    if kind == "folder":
        files = find_images(path)
        return len(files), stream_files(files, batch)
    if kind == "npz":
        return npz.stream_array(path, array, batch)
    images = as_images(load_idx(path, (3, 4), "images"), path)
    return len(images), (images[start : start + batch] for start in range(0, len(images), batch))


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that images are read from: path itself, or the image files of a folder, sorted.

    Raises: ValueError: path does not exist, is of another kind, or is a folder without images.
    """
    path, kind = _path_and_kind(path)
    return find_images(path) if kind == "folder" else [path]


def load_labels(
    path: str | os.PathLike[str], *, count: int, held_out: bool = False, classes: int | None = None
) -> np.ndarray:
    """The class labels of the images of `load_images(path)`, in the same order.

    Args:
        path: one of
            an .npz with integers [N] or [N, 1]: array y_train for the images x_train, y_test for x_test, y for x, arr_1
            for arr_0, labels for images;
            an MNIST-format file of images, whose labels are in a file beside it, such as train-labels-idx1-ubyte for
            train-images-idx3-ubyte.gz, either of them gzipped or not;
            a folder with one folder per class: their sorted names are the classes 0, 1, ...
        count: the number of images, N.
        held_out: as in `load_images`.
        classes: the number of classes K of a model; None: as many as the labels have.
    Returns: int64 [N], 0 <= label < K; without `classes`, K > 1 and each class occurs at least once.
    Raises: ValueError: there are no labels, they are damaged, or not as above; or the folder does not have `classes`
        folders, so that their numbers would differ from those in training.
    """
    path, kind = _path_and_kind(path)
    if kind == "folder":
        labels, name = folder_labels(path, classes), str(path)
    elif kind == "npz":
        labels, name = npz.load_array(path, held_out=held_out, labels=True)
    else:
        file = labels_beside(path)
        labels, name = load_idx(file, (1,), "labels"), str(file)
    return as_labels(labels, name, count, classes)


def array_name(path: str | os.PathLike[str], *, held_out: bool = False) -> str | None:
    """The array of an .npz that `load_images` reads; None if path is not an .npz."""
    path, kind = _path_and_kind(path)
    return npz.image_array_name(path, held_out=held_out) if kind == "npz" else None


def _path_and_kind(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """(path, what it is: "folder", "npz" or "idx")."""
    if not os.fspath(path):
        raise ValueError(f"path is ''; {WANTED}")
    path = Path(path)
    if path.is_dir():
        return path, "folder"
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {WANTED}") from error
    if magic not in _MAGIC:
        raise ValueError(f"{path} is of unknown type; {WANTED}")
    return path, _MAGIC[magic]
