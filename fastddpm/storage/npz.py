"""Arrays of images and class labels in an .npz, or in .npy files beside each other."""

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastddpm.core.checks import shown
from fastddpm.storage.arrays import StoredArray, npy_array, reading

# names of image arrays, in order of preference
HELD_OUT = ("x_test", "test_images")
ARRAYS = ("x_train", "x", "arr_0", "images", "train_images")
SAMPLE_RATE = "sample_rate"  # the array beside waveforms that says how fast they are
# how the name of the labels is made from that of the images
_LABELS = (("^arr_0$", "arr_1"), ("^[xX](?=_|$)", "y"), ("images", "labels"), ("image", "label"), ("data", "labels"))


def choose_array(path: Path, *, held_out: bool = False) -> str:
    """Which array of an .npz holds the images. Raises: ValueError: there are several, none with a known name."""
    with reading(path, ".npz"):
        names = [name for name in _members(path) if name != SAMPLE_RATE]
        known = [*HELD_OUT, *ARRAYS] if held_out else [*ARRAYS]
        name = next((name for name in known if name in names), names[0] if names else "")
        if name not in known and len(names) != 1:
            way_out = f", or name one, as in {path}:{names[0]}" if names else ""
            raise ValueError(f"it holds {_some(names)}; want an array named {', '.join(known)}{way_out}")
    return name


def split_array(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """(FILE, NAME) of "FILE:NAME"; NAME is None if path names no array of a file."""
    text = os.fspath(path)
    if not os.path.exists(text):
        for at in reversed([at for at, character in enumerate(text) if character == ":"]):
            if os.path.isfile(text[:at]):
                return Path(text[:at]), text[at + 1 :]
    return Path(text), None


def array_names(path: Path) -> list[str]:
    """The arrays of an .npz. Raises: ValueError: it is damaged, or no .npz."""
    with reading(path, ".npz"):
        return list(_members(path))


def open_array(path: Path, name: str) -> StoredArray:
    """An array of an .npz. Raises: ValueError: there is none of this name, or it is damaged."""
    with reading(path, ".npz"):
        members = _members(path)
        if name not in members:
            missing = f"but no {name}" if name else "but none is named after the colon"
            raise ValueError(f"it holds {_some(list(members))}, {missing}")
        member = members[name]

        @contextmanager
        def opened() -> Iterator[IO[bytes]]:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                yield file

        return npy_array(path, ".npz", name, member.file_size, opened)


def open_labels(path: Path, images: str) -> StoredArray:
    """The labels of an array of images in an .npz. Raises: ValueError: there are none."""
    wanted = labels_name(images)
    with reading(path, ".npz"):
        if wanted not in (members := _members(path)):
            raise ValueError(f"it holds {_some(list(members))}; want labels of {images} in an array named {wanted}")
    return open_array(path, wanted)


def open_npy(path: Path) -> StoredArray:
    """The array of an .npy file. Raises: ValueError: it is damaged."""
    with reading(path, ".npy"):
        return npy_array(path, ".npy", "", path.stat().st_size, lambda: open(path, "rb"))


def npy_labels(path: Path) -> Path:
    """The .npy file of labels beside one of images, such as y_train.npy for x_train.npy.

    Raises: ValueError: there is none.
    """
    labels = path.with_name(f"{labels_name(path.stem)}.npy")
    if not labels.is_file():
        raise ValueError(f"{path} has no labels beside it; want {labels}")
    return labels


def labels_name(images: str) -> str:
    """The name of the labels of images: y_train of x_train, train_labels of train_images, else labels."""
    for pattern, replacement in _LABELS:
        if re.search(pattern, images):
            return re.sub(pattern, replacement, images)
    return "labels"


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an .npz by name."""
    with zipfile.ZipFile(path) as archive:
        files = [member for member in archive.infolist() if member.filename.endswith(".npy")]
    return {member.filename.removesuffix(".npy"): member for member in files}


def _some(names: Sequence[str]) -> str:
    return ", ".join(name if len(name) < 60 else shown(name, 60) for name in names[:12]) or "no arrays"
