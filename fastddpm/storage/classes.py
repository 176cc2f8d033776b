"""The classes of image files: numbers in files beside them, or the folders that they are in."""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastddpm.core.checks import shown
from fastddpm.storage.decoding import ImageFile

LABELS = "dataset.json"  # class labels as in the data sets of StyleGAN and EDM
LABEL_SUFFIX = ".cls"  # of a file with the class label of one image, as in webdataset


def holds_labels(name: str) -> bool:
    """Whether a name is that of a file with class labels."""
    return name == LABELS or name.endswith(LABEL_SUFFIX)


def numbers(images: Sequence[ImageFile], others: Mapping[str, ImageFile]) -> tuple[np.ndarray, str] | None:
    """The labels that files beside the images hold, and where they are from; None: there are no such files.

    Args: others: by name, the files for which `holds_labels` is true.
    Raises: ValueError: such a file is damaged, or has no label for an image.
    """
    found, where = {}, ""
    if LABELS in others:
        where = others[LABELS].place
        found = _of_json(others[LABELS])
    if not found:
        beside = {image.name: others.get(os.path.splitext(image.name)[0] + LABEL_SUFFIX) for image in images}
        found = {name: _of_text(file) for name, file in beside.items() if file is not None}
        where = f"the {LABEL_SUFFIX} files beside {images[0].place}"
    if not found:
        return None
    if missing := [image.place for image in images if image.name not in found]:
        raise ValueError(f"{where}: {len(missing)} images have no label, the first is {missing[0]}; want one for each")
    try:
        return np.array([found[image.name] for image in images]), where
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{where} has labels of several shapes; want one whole number for each image") from error


def names(images: Sequence[ImageFile]) -> tuple[str, ...]:
    """The folders that the images are in, in natural order; () if an image is in none."""
    folders = set(_folders(images))
    return () if "" in folders else tuple(sorted(folders, key=natural))


def numbered(images: Sequence[ImageFile], classes: int | Sequence[str] | None, *, path: object) -> np.ndarray:
    """[N] int64: the position of each image's folder among `names`, or among the classes of a model.

    Args: classes: of the model: how many, or their names; None: there is no model.
    Raises: ValueError: an image is in no folder, or the folders are not classes of the model.
    """
    folders, here = _folders(images), names(images)
    if not here:
        loose = images[folders.index("")].place
        raise ValueError(f"{loose} has no class; want each image in a folder below {path}, its class")
    if classes is None or isinstance(classes, int):
        _check_count(here, classes, path)
    else:
        if unknown := [name for name in here if name not in classes]:
            raise ValueError(
                f"{path} has {len(unknown)} folders that are no class of the model, the first is {unknown[0]}; the "
                f"classes are {_listed(classes)}: rename these folders, or move them elsewhere"
            )
        here = tuple(classes)
    number = {name: k for k, name in enumerate(here)}
    return np.array([number[folder] for folder in folders], np.int64)


def natural(name: str) -> list[tuple[int, int, str]]:
    """The key that sorts names with numbers by their value: 1, 2, 10. Others sort as strings do."""
    key = []
    for part in re.findall("[0-9]+|[^0-9]", name, re.DOTALL):
        digits = part.lstrip("0")
        key.append((ord("0"), len(digits), digits) if part[0] in "0123456789" else (ord(part), 0, ""))
    return [*key, (-1, 0, name)]


def _folders(images: Sequence[ImageFile]) -> list[str]:
    """The top folder of each image, "" if it is in none."""
    return [image.name.partition("/")[0] if "/" in image.name else "" for image in images]


def _check_count(here: Sequence[str], count: int | None, path: object) -> None:
    if count not in (None, len(here)):
        raise ValueError(
            f"{path} has {len(here)} folders with images, but the model has {count} classes, which are the folders "
            "that it was trained on; name the same folders, or pass the labels"
        )
    if count is not None and (before := sorted(here)) != list(here):
        warnings.warn(
            f"{path}: the model does not name its classes; its classes 0, 1, ... are taken to be {_listed(here)}, but "
            f"a model that an older fastddpm trained has the order {_listed(before)}",
            stacklevel=5,
        )


def _of_json(file: ImageFile) -> dict[str, Any]:
    """{name of an image: label} of a dataset.json; empty if it has no labels."""
    try:
        held = json.loads(file.read())
        return dict(held.get("labels") or {}) if isinstance(held, dict) else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{file.place} is damaged; want {{"labels": [[NAME, LABEL], ...]}}, or remove it') from error


def _of_text(file: ImageFile) -> int:
    text = file.read()[:20]
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{file.place} holds {shown(text)}; want a whole number, the label of the image") from error


def _listed(names: Sequence[str]) -> str:
    few = [name if len(name) < 60 else shown(name, 60) for name in names[:20]]
    return ", ".join(few) + ", ..." * (len(names) > 20)
