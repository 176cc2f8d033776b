"""Image files in a folder, a .zip or a .tar: decoded ahead in threads, in memory or in batches."""

import os
import warnings
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastddpm.storage import classes
from fastddpm.storage.decoding import SUFFIXES, ImageFile, decode

# names of files that are expected beside images
_NOTES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".xml", ".yaml", ".yml", ".html", ".db", ".ini", ".log"}
_CHUNK = 8  # images that one thread decodes at a time
_AHEAD = 8  # chunks that are decoded ahead of their use


def images_among(
    names: Sequence[str], place: Path, suffixes: Collection[str] = SUFFIXES, kind: str = "images"
) -> tuple[list[str], str]:
    """(the names that are those of images, a sentence about others that are not expected beside images).

    Args: suffixes, kind: of the files that are wanted; they need not be images.
    Raises: ValueError: there are no images.
    """
    images = [name for name in names if os.path.splitext(name)[1].lower() in suffixes]
    found = set(images)
    others = [name for name in names if name not in found and not classes.holds_labels(name)]
    others = [name for name in others if not images or not _is_note(name)]
    wanted = f"the names of {kind} end in {' '.join(sorted(suffixes))}"
    if others:
        wanted = f"{len(others)} of {len(names)} files are left out, the first is {others[0]}; {wanted}"
    if not images:
        raise ValueError(f"{place} holds no {kind}: {wanted}")
    return images, f"{place}: {wanted}" if others else ""


def _is_note(name: str) -> bool:
    """Whether a file is expected beside images; one with labels is not, in a folder where it is not read."""
    return os.path.splitext(name)[1].lower() in _NOTES and os.path.basename(name) != classes.LABELS


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder or an archive.

    Attributes:
        path: the folder or the archive.
        files: the files that the images are read from.
        images: in order, at least one.
        label_files: by name, the files with class labels.
        left_out: a sentence about other files, with which `load` and `stream` warn; "": there are none.
    """

    path: Path
    files: Sequence[Path]
    images: Sequence[ImageFile]
    label_files: Mapping[str, ImageFile]
    left_out: str = ""

    def load(self, progress: bool) -> np.ndarray:
        """All images: uint8 [N, H, W, C], C = 3 if one of them is coloured, else 1."""
        from tqdm import tqdm

        self._warn_of_others()
        images: np.ndarray | None = None
        count = len(self.images)
        quiet = not progress or count <= 1000
        for i, image in enumerate(tqdm(self._decoded(), "reading images", count, unit="image", disable=quiet)):
            if images is None:
                images = np.empty((count, *image.shape), np.uint8)
            if image.shape[2] > images.shape[3]:
                images = images.repeat(3, axis=3)
            images[i] = image
        assert images is not None
        return images

    def stream(self, batch: int, same_size: bool) -> tuple[int, Iterator[np.ndarray]]:
        """(the number of images, batches: uint8 [n, H, W, C], C = 3 if one of the batch is coloured, else 1).

        With same_size=False each `batch` images become one array for each of their sizes.
        """
        self._warn_of_others()
        return len(self.images), self._batches(batch, same_size)

    def _batches(self, batch: int, same_size: bool) -> Iterator[np.ndarray]:
        decoded = self._decoded(same_size)
        for start in range(0, len(self.images), batch):
            by_size = defaultdict(list)
            for _ in self.images[start : start + batch]:
                image = next(decoded)
                by_size[image.shape[:2]].append(image)
            for images in by_size.values():
                channels = max(image.shape[2] for image in images)
                yield np.stack([image.repeat(channels // image.shape[2], axis=2) for image in images])
        next(decoded, None)  # warns of damaged metadata

    def _decoded(self, same_size: bool = True) -> Iterator[np.ndarray]:
        """Each image in order: uint8 [H, W, C], C = 1 or 3.

        Raises: ValueError: an image is damaged, or with same_size=True its size differs from that of the first.
        """
        first: tuple[int, ...] = ()
        damaged = []
        chunks = [self.images[start : start + _CHUNK] for start in range(0, len(self.images), _CHUNK)]
        with ThreadPoolExecutor() as pool:
            submit = lambda chunk: pool.submit(lambda: [decode(file) for file in chunk])
            ahead = deque(map(submit, chunks[:_AHEAD]))
            for i, chunk in enumerate(chunks):
                images = ahead.popleft().result()
                ahead.extend(map(submit, chunks[i + _AHEAD : i + _AHEAD + 1]))
                for file, (image, lost) in zip(chunk, images, strict=True):
                    damaged += [f"{file.place} has {lost}"] if lost else []
                    first = first or image.shape
                    if same_size and image.shape[:2] != first[:2]:
                        (h, w), (h0, w0) = image.shape[:2], first[:2]
                        differ = f"{self.images[0].place} is {w0}x{h0}, {file.place} is {w}x{h}"
                        raise ValueError(f"sizes differ: {differ}; write copies, cropped or resized, to another folder")
                    yield image
        if damaged:
            others = f", and {len(damaged) - 1} others have the like" * (len(damaged) > 1)
            warnings.warn(f"{damaged[0]}{others}; the pixels are whole and are taken as they are", stacklevel=5)

    def _warn_of_others(self) -> None:
        if self.left_out:
            warnings.warn(self.left_out, stacklevel=4)

    def labels(self, of_model: int | Sequence[str] | None) -> tuple[np.ndarray, str]:
        """(the class label of each image, where they are from). Args: of_model: the number of its classes, or names.

        Raises: ValueError: an image has no label, or the classes are not those of the model.
        """
        found = classes.numbers(self.images, self.label_files)
        if found is not None:
            return found
        return classes.numbered(self.images, of_model, path=self.path), str(self.path)

    def classes(self) -> tuple[str, ...] | None:
        """The names of the class folders in natural order; None if other files hold the labels, or there are none."""
        if classes.numbers(self.images, self.label_files) is not None:
            return None
        return classes.names(self.images) or None
