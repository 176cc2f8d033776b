"""A folder of samples in shards, each of which is complete or missing.

samples/manifest.json     describes the samples; samples with another description are refused
samples/00000.npz ...     one file per shard; or 00000.tar ... for webdataset; or 00000.png ..., one file per sample
samples/.shards/00000 ... the checksum of a shard, written when all its files are on disk; a shard whose checksum is
                          missing or wrong is not done
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

from fastddpm.core.checks import one_of, whole
from fastddpm.storage import images
from fastddpm.storage.files import TEMPORARY, atomic, write_together
from fastddpm.storage.fingerprint import differing
from fastddpm.storage.indices import Indices

FORMATS = {"npz": ".npz", "png": ".png", "webdataset": ".tar"}
MANIFEST = "manifest.json"
LABELS = "dataset.json"  # the class labels of PNGs
_DONE = ".shards"
_DIGITS = 5  # the least number of digits in a file name


class ShardFolder:
    """A folder of samples in shards.

    Args:
        path: the folder, which need not exist yet.
        manifest: a description of the samples that JSON can hold. These fields decide which file holds each sample:

            - "format": npz (arr_0 [n, ...], and arr_1 [n] for labels), png, or webdataset (for each sample index a
              .png, or a .npy if the sample is not an image, and a .cls for its label);
            - "samples": the sample indices in order, as `Indices` writes them;
            - "shard_size": samples per shard; the last may hold fewer;
            - "class_labels": class labels, written like indices and repeated over the samples; None: no labels.

    Attributes:
        samples: the sample indices.
        classes: [L] int64, the class labels that are repeated; None: no labels.
        digits: number of digits in file names, at least 5.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]):
        self.path = Path(path)
        self.manifest = dict(manifest)
        self.format = one_of("its format", self.manifest["format"], FORMATS)
        self.shard_size = whole("its shard_size", self.manifest["shard_size"], 1)
        self.samples = Indices.parse(self.manifest["samples"])
        classes = self.manifest["class_labels"]
        self.classes = None if classes is None else np.array(tuple(Indices.parse(classes)), np.int64)
        if self.classes is not None and not self.classes.size:
            raise ValueError("class_labels are empty; want at least one")
        self.digits = max(_DIGITS, len(str(self.samples.largest())), len(str(len(self) - 1)))
        self._manifest_digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ShardFolder":
        """Open an existing folder. Raises: ValueError: it has no manifest, or a damaged one."""
        manifest = Path(path) / MANIFEST
        try:
            return cls(path, json.loads(manifest.read_text()))
        except FileNotFoundError as error:
            raise ValueError(f"{path} has no {MANIFEST}; want a folder that `fastddpm sample` wrote") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{manifest} is damaged ({error}); sample into another folder") from error

    def begin(self) -> None:
        """Create the folder and its manifest, or check the manifest; deletes the leftovers of an interrupted job.

        Raises: ValueError: the folder holds other samples.
        """
        manifest = self.path / MANIFEST
        self.path.mkdir(parents=True, exist_ok=True)
        begun = manifest.exists()
        if begun:
            before = ShardFolder.open(self.path).manifest
            if changed := differing(before, self.manifest):
                there, here = in_short(changed), in_short(differing(self.manifest, before))
                raise ValueError(f"{self.path} holds samples with {there}, not {here}; name another folder")
        else:
            suffixes = (FORMATS[self.format], LABELS)
            if foreign := next((name for name in os.listdir(self.path) if name.endswith(suffixes)), None):
                raise ValueError(f"{self.path} holds {foreign} but no {MANIFEST}; name another folder")
        (self.path / _DONE).mkdir(exist_ok=True)
        for folder in (self.path, self.path / _DONE):
            for leftover in folder.glob(TEMPORARY):
                leftover.unlink(missing_ok=True)
        if not begun:
            with atomic(manifest) as file:
                file.write(json.dumps(self.manifest, indent=1).encode())
        if self.format == "png" and self.classes is not None and not (self.path / LABELS).exists():
            self._write_labels()

    def written(self) -> int:
        """The number of samples in shards that have a checksum; whether it still holds is not checked."""
        done = self.path / _DONE
        names = os.listdir(done) if done.exists() else []
        return sum(self.count(int(name)) for name in names if name.isdecimal())

    def __len__(self) -> int:
        """The number of shards of the finished folder."""
        return -(-len(self.samples) // self.shard_size)

    def count(self, k: int) -> int:
        """The number of samples in shard k."""
        return min(self.shard_size, len(self.samples) - k * self.shard_size)

    def indices(self, k: int) -> Indices:
        """The indices of the samples in shard k."""
        return self.samples[k * self.shard_size : (k + 1) * self.shard_size]

    def labels(self, k: int) -> np.ndarray | None:
        """[n] int64: the class labels of the samples in shard k; None: no labels."""
        if self.classes is None:
            return None
        start = k * self.shard_size
        return self.classes[np.arange(start, start + self.count(k)) % len(self.classes)]

    def all_labels(self) -> np.ndarray:
        """[N] int64: the class labels of all samples, which must have labels."""
        return np.resize(cast(np.ndarray, self.classes), len(self.samples))

    def write(self, k: int, samples: np.ndarray) -> None:
        """Write shard k; when this returns it is done, even if the machine crashes.

        Args:
            k: the shard.
            samples: uint8 [n, H, W, C] if they are images, else float32 [n, ...]; in the order of `indices`.
        """
        contents = list(self._encoded(k, samples))
        write_together(zip(self._files(k), contents, strict=True))
        with atomic(self._record(k)) as file:
            file.write(self._checksum(contents).encode())

    def is_done(self, k: int) -> bool:
        """Whether the files of shard k exist and have its checksum."""
        return self._read(k) is not None

    def read(self, k: int) -> np.ndarray:
        """The samples of shard k, as `write` was given them.

        Raises: ValueError: the shard is not done.
        """
        if (contents := self._read(k)) is None:
            problem = "is damaged" if self._record(k).exists() else "is not written yet"
            way_out = "run the command that wrote the others again"
            raise ValueError(f"shard {k} of {len(self)} in {self.path} {problem}; {way_out}")
        if self.format == "npz":
            with np.load(io.BytesIO(contents[0]), allow_pickle=False) as arrays:
                return arrays["arr_0"]
        if self.format == "webdataset":
            with tarfile.open(fileobj=io.BytesIO(contents[0])) as tar:
                members = [member for member in tar if not member.name.endswith(".cls")]
                return np.stack([_decode_sample(member.name, tar.extractfile(member).read()) for member in members])  # type: ignore[union-attr]
        return np.stack([_decode_sample(".png", content) for content in contents])

    def arrays(self) -> Iterator[np.ndarray]:
        """The samples of each shard in turn. Raises: ValueError: a shard is not done."""
        return map(self.read, range(len(self)))

    def _read(self, k: int) -> list[bytes] | None:
        """The bytes of the files of shard k; None if it is not done."""
        try:
            checksum = self._record(k).read_text()
            contents = [file.read_bytes() for file in self._files(k)]
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return contents if self._checksum(contents) == checksum else None

    def _checksum(self, contents: Iterable[bytes]) -> str:
        """SHA-256 of the manifest and of a shard's files, so that a shard of another job does not count as done."""
        digest = self._manifest_digest.copy()
        for content in contents:
            digest.update(content)
        return digest.hexdigest()

    def _record(self, k: int) -> Path:
        return self.path / _DONE / f"{k:0{self.digits}d}"

    def _files(self, k: int) -> list[Path]:
        numbers = self.indices(k) if self.format == "png" else [k]
        return [self.path / f"{number:0{self.digits}d}{FORMATS[self.format]}" for number in numbers]

    def _encoded(self, k: int, samples: np.ndarray) -> Iterator[bytes]:
        """The content of each file of shard k."""
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
        """Write the class labels of PNGs as in the data sets of StyleGAN and EDM."""
        with atomic(self.path / LABELS) as file:
            file.write(b'{"labels": [')
            for k in range(len(self)):
                pairs = zip(self._files(k), self.labels(k), strict=True)  # type: ignore[arg-type]
                text = ", ".join(f'["{path.name}", {label}]' for path, label in pairs)
                file.write(((", " if k else "") + text).encode())
            file.write(b"]}")


def is_shard_folder(path: str | os.PathLike[str]) -> bool:
    """Whether path is a folder with a manifest, such as `ShardFolder.begin` creates."""
    return (Path(path) / MANIFEST).is_file()


def add_to_tar(
    tar: tarfile.TarFile, indices: Indices, samples: np.ndarray, labels: np.ndarray | None, *, digits: int
) -> None:
    """Append samples for webdataset, which groups files whose names differ only in the suffix into one sample."""
    for place, index in enumerate(indices):
        name = f"{index:0{digits}d}"
        if images.are_pictures(samples):
            _add_file(tar, f"{name}.png", images.png(samples[place]))
        else:
            buffer = io.BytesIO()
            np.save(buffer, samples[place])
            _add_file(tar, f"{name}.npy", buffer.getvalue())
        if labels is not None:
            _add_file(tar, f"{name}.cls", str(labels[place]).encode())


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, so that equal samples give equal bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _decode_sample(name: str, content: bytes) -> np.ndarray:
    if name.endswith(".npy"):
        return np.load(io.BytesIO(content), allow_pickle=False)
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def in_short(facts: Mapping[str, Any]) -> str:
    """Some fields of a manifest as one line of text."""
    text = json.dumps(facts)[1:-1]
    return text if len(text) <= 200 else f"{text[:200]} ..."
