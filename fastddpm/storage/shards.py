"""Samples on the disk, in shards that are there whole or not at all.

samples/manifest.json     what the samples are: nothing else is mixed with them
samples/00000.npz ...     a shard each; or 00000.tar ..., as webdataset reads them; or 00000.png ..., a sample each
samples/.shards/00000 ... checksum of a shard, written when all its files are safe: it is done while that holds
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastddpm.storage import images
from fastddpm.storage.files import TEMPORARY, atomic, write_together
from fastddpm.storage.fingerprint import differing
from fastddpm.storage.indices import Indices

FORMATS = {"npz": ".npz", "png": ".png", "webdataset": ".tar"}
MANIFEST = "manifest.json"
LABELS = "dataset.json"  # of PNGs
_DONE = ".shards"
_DIGITS = 5  # of a name, at least


class Store:
    """A folder of samples.

    Args:
        folder: where they are.
        manifest: what they are, as JSON holds it. Of all that it says these decide where each sample lies:
            "format": npz (arr_0 [n, ...] and, of labelled ones, arr_1 [n]), png, or webdataset (by sample index a .png,
                or .npy of what is no picture, and of labelled ones a .cls);
            "samples": their indices, in order, as `Indices` writes them;
            "shard_size": how many there are in a shard; in the last what is left;
            "class_labels": written so, too, and repeated over the samples in order; None: they have no labels.

    Attributes:
        samples: their indices.
        classes: [L] int64, as repeated; None: there are none.
        digits: of the numbers that files are named by, at least 5.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any]):
        self.folder, self.manifest = Path(folder), dict(manifest)
        self.format, self.shard_size = self.manifest["format"], self.manifest["shard_size"]
        if self.format not in FORMATS:
            raise ValueError(f"its format is {self.format!r}; want one of {', '.join(FORMATS)}")
        if type(self.shard_size) is not int or self.shard_size < 1:
            raise ValueError(f"its shard_size is {self.shard_size!r}; want a whole number, at least 1")
        self.samples = Indices.parse(self.manifest["samples"])
        classes = self.manifest["class_labels"]
        self.classes = None if classes is None else np.array(tuple(Indices.parse(classes)), np.int64)
        if self.classes is not None and not self.classes.size:
            raise ValueError("class_labels are empty; want at least one")
        self.digits = max(_DIGITS, len(str(self.samples.largest())), len(str(len(self) - 1)))
        self._identity = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Store":
        """The samples in a folder. Raises: ValueError: there are none, or their manifest is damaged."""
        path = Path(folder) / MANIFEST
        try:
            return cls(folder, json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no {MANIFEST}; want a folder that `fastddpm sample` wrote") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); sample into another folder") from error

    def begin(self) -> None:
        """Make the folder one of these samples, or find that it is. What a kill has left half written is removed.

        Raises: ValueError: it holds others.
        """
        path, suffix = self.folder / MANIFEST, FORMATS[self.format]
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = path.exists()
        if begun:
            before = Store.open(self.folder).manifest
            if changed := differing(before, self.manifest):
                there, here = in_short(changed), in_short(differing(self.manifest, before))
                raise ValueError(f"{self.folder} holds samples with {there}, not {here}; name another folder")
        elif found := next((name for name in os.listdir(self.folder) if name.endswith((suffix, LABELS))), None):
            raise ValueError(f"{self.folder} holds {found}, and no {MANIFEST} to tell of what; name another folder")
        (self.folder / _DONE).mkdir(exist_ok=True)
        for folder in (self.folder, self.folder / _DONE):
            for rest in folder.glob(TEMPORARY):
                rest.unlink(missing_ok=True)
        if not begun:
            with atomic(path) as file:
                file.write(json.dumps(self.manifest, indent=1).encode())
        if self.format == "png" and self.classes is not None and not (self.folder / LABELS).exists():
            self._write_labels()

    def written(self) -> int:
        """How many samples are in shards that are done, or were."""
        return sum(self.count(int(name)) for name in _listed(self.folder / _DONE) if name.isdecimal())

    def __len__(self) -> int:
        """How many shards there are, when all are done."""
        return -(-len(self.samples) // self.shard_size)

    def count(self, k: int) -> int:
        """How many samples are in shard k."""
        return min(self.shard_size, len(self.samples) - k * self.shard_size)

    def indices(self, k: int) -> Indices:
        """Which samples are in shard k."""
        return self.samples[k * self.shard_size : (k + 1) * self.shard_size]

    def labels(self, k: int) -> np.ndarray | None:
        """[n] int64: the classes of the samples in shard k."""
        if self.classes is None:
            return None
        start = k * self.shard_size
        return self.classes[np.arange(start, start + self.count(k)) % len(self.classes)]

    def all_labels(self) -> np.ndarray:
        """[N] int64: the classes of all samples, which must have some."""
        return np.resize(cast(np.ndarray, self.classes), len(self.samples))

    def write(self, k: int, samples: np.ndarray) -> None:
        """Write shard k, which is then done, also after a crash of the machine.

        Args: samples: in order; pictures uint8 [n, H, W, C], else float32 [n, ...].
        """
        contents = list(self._encoded(k, samples))
        write_together(zip(self._files(k), contents, strict=True))
        with atomic(self._record(k)) as file:
            file.write(self._checksum(contents).encode())

    def is_done(self, k: int) -> bool:
        """Whether shard k is there, and whole."""
        return self._read(k) is not None

    def read(self, k: int) -> np.ndarray:
        """The samples of shard k, as they were given to `write`.

        Raises: ValueError: it is not done.
        """
        if (contents := self._read(k)) is None:
            what = "is damaged" if self._record(k).exists() else "is not there yet"
            way_out = "the command that wrote the others writes it"
            raise ValueError(f"shard {k} of {len(self)} in {self.folder} {what}; {way_out}")
        if self.format == "npz":
            with np.load(io.BytesIO(contents[0]), allow_pickle=False) as arrays:
                return arrays["arr_0"]
        if self.format == "webdataset":
            with tarfile.open(fileobj=io.BytesIO(contents[0])) as tar:
                members = [member for member in tar if not member.name.endswith(".cls")]
                return np.stack([_decoded(member.name, tar.extractfile(member).read()) for member in members])  # type: ignore[union-attr]
        return np.stack([_decoded(".png", content) for content in contents])

    def arrays(self) -> Iterator[np.ndarray]:
        """The samples of one shard after the other. Raises: ValueError: one is not done."""
        return map(self.read, range(len(self)))

    def _read(self, k: int) -> list[bytes] | None:
        """What is in the files of shard k; None if it is not done."""
        try:
            known, contents = self._record(k).read_text(), [file.read_bytes() for file in self._files(k)]
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return contents if self._checksum(contents) == known else None

    def _checksum(self, contents: Iterable[bytes]) -> str:
        """SHA-256 of the manifest's and of a shard's files: what a process of another job left is not of this one."""
        digest = self._identity.copy()
        for content in contents:
            digest.update(content)
        return digest.hexdigest()

    def _record(self, k: int) -> Path:
        return self.folder / _DONE / f"{k:0{self.digits}d}"

    def _files(self, k: int) -> list[Path]:
        numbers = self.indices(k) if self.format == "png" else [k]
        return [self.folder / f"{number:0{self.digits}d}{FORMATS[self.format]}" for number in numbers]

    def _encoded(self, k: int, samples: np.ndarray) -> Iterator[bytes]:
        """What is to be in each file of shard k."""
        labels = self.labels(k)
        if self.format == "png":
            yield from map(images.png, samples)
            return
        buffer = io.BytesIO()
        if self.format == "npz":
            np.savez(buffer, samples, *([] if labels is None else [labels]))
        else:
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                add_to_tar(tar, self.indices(k), samples, labels, digits=self.digits)
        yield buffer.getvalue()

    def _write_labels(self) -> None:
        """The classes of the PNGs, as the data sets of StyleGAN and EDM have them."""
        with atomic(self.folder / LABELS) as file:
            file.write(b'{"labels": [')
            for k in range(len(self)):
                pairs = zip(self._files(k), self.labels(k), strict=True)  # type: ignore[arg-type]
                text = ", ".join(f'["{path.name}", {label}]' for path, label in pairs)
                file.write(((", " if k else "") + text).encode())
            file.write(b"]}")


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether path is a folder that `Store.begin` has made one of samples."""
    return (Path(path) / MANIFEST).is_file()


def add_to_tar(
    tar: tarfile.TarFile, indices: Indices, samples: np.ndarray, labels: np.ndarray | None, *, digits: int
) -> None:
    """Append samples as webdataset reads them: files that share a name but for the suffix are one sample."""
    for place, index in enumerate(indices):
        name = f"{index:0{digits}d}"
        if images.are_pictures(samples):
            _add(tar, f"{name}.png", images.png(samples[place]))
        else:
            buffer = io.BytesIO()
            np.save(buffer, samples[place])
            _add(tar, f"{name}.npy", buffer.getvalue())
        if labels is not None:
            _add(tar, f"{name}.cls", str(labels[place]).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time and no owner: the same samples are the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _decoded(name: str, content: bytes) -> np.ndarray:
    if name.endswith(".npy"):
        return np.load(io.BytesIO(content), allow_pickle=False)
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def in_short(facts: Mapping[str, Any]) -> str:
    """Some fields of a manifest, in no more than a line."""
    text = json.dumps(facts)[1:-1]
    return text if len(text) <= 200 else f"{text[:200]} ..."
