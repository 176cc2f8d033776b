"""A folder of samples in shards, each of which is complete or missing.

samples/manifest.json     describes the samples; samples with another description are refused
samples/00000.npz ...     one file per shard; or 00000.tar ... for webdataset; or 00000.png ..., one file per sample
samples/.shards/00000 ... the checksum of a shard, written when all its files are on disk; a shard whose checksum is
                          missing or wrong is not done
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastddpm.core.checks import flag, one_of, seed, shown, whole
from fastddpm.core.noise import MOST_SAMPLES
from fastddpm.core.precision import PRECISIONS
from fastddpm.storage.files import as_path, atomic, check_regular, write_together
from fastddpm.storage.fingerprint import differing
from fastddpm.storage.indices import LIMIT, Indices
from fastddpm.storage.shard_formats import FORMATS, ONE_EACH, Stored, are_images, decoded, encoded

MANIFEST = "manifest.json"
LABELS = "dataset.json"  # the class labels of PNGs
MOST_SHARDS = 1 << 24  # each is looked for when a job begins
_DONE = ".shards"
_DIGITS = 5  # the least number of digits in a file name
_DEPTH = 32  # of nested values in a manifest; recursion ends at a thousand


class ShardFolder:
    """A folder of samples in shards.

    Args:
        path: the folder, which need not exist yet.
        manifest: a description of the samples that JSON can hold. These fields decide which file holds each sample:

            - "format": npz (arr_0 [n, ...], and arr_1 [n] for labels), png, wav, or webdataset (for each sample index a
              .png, or a .npy if the sample is not an image, and a .cls for its label);
            - "samples": the sample indices in order, as `Indices` writes them;
            - "shard_size": samples per shard; the last may hold fewer;
            - "class_labels": class labels, written like indices and repeated over the samples; None: no labels;
            - "grown_from", if the folder has grown: how many samples it held before each time. Where it has grown, a
              shard ends and another begins, so that finished shards stay as they are;
            - "shape" of a sample, channels first, and "latents": what the shards hold, see `are_images`;
            - "sample_rate" of waveforms, for the format wav.

    Attributes:
        samples: the sample indices.
        classes: the class labels that are repeated; None: no labels.
        history: the manifests of the folder, before each time it has grown and now.
        digits: number of digits in file names, at least 5.
    Raises: ValueError: a field of the manifest is missing or not as above.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]):
        self.path = Path(path)
        self.manifest = dict(manifest)
        if missing := [name for name in _REQUIRED if name not in self.manifest]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for name, check in _FIELDS.items():
            if name in self.manifest:
                check(f"its {name}", self.manifest[name])
        self.format = self.manifest["format"]
        self.shard_size = self.manifest["shard_size"]
        self.samples = Indices.parse(self.manifest["samples"])
        classes = self.manifest["class_labels"]
        self.classes = None if classes is None else Indices.parse(classes)
        self.grown_from = list(self.manifest.get("grown_from", []))
        if not self.samples or (self.classes is not None and not self.classes):
            raise ValueError(f"{'class_labels' if self.samples else 'samples'} are empty; want at least one")
        self._ends = [*self.grown_from, len(self.samples)]
        if self._ends != sorted(set(self._ends)):
            raise ValueError(f"its grown_from is {shown(self.grown_from)}; want growing numbers below {self._ends[-1]}")
        sizes = [end - start for start, end in zip([0, *self.grown_from], self._ends, strict=True)]
        self._first_shards = [0, *itertools.accumulate(-(-size // self.shard_size) for size in sizes)]
        if len(self) > MOST_SHARDS:
            what = f"{len(self.samples)} samples in shards of {self.shard_size} are {len(self)} shards"
            raise ValueError(f"{what}; want at most {MOST_SHARDS}: use a larger shard_size, or fewer samples")
        if min(self.shard_size, len(self.samples)) > MOST_SAMPLES:
            raise ValueError(f"its shard_size is {self.shard_size}; want at most {MOST_SAMPLES} samples in a shard")
        self.digits = max(_DIGITS, len(str(self.samples.largest())), len(str(len(self) - 1)))
        self.history = [*map(self._manifest_before, range(len(self.grown_from))), self.manifest]
        self._digests = [hashlib.sha256(json.dumps(past, sort_keys=True).encode()) for past in self.history]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ShardFolder":
        """Open an existing folder. Raises: ValueError: it has no manifest, or a damaged one."""
        manifest = as_path("the folder of samples", path) / MANIFEST
        try:
            if not os.path.lexists(manifest):
                raise FileNotFoundError
            return cls(path, _of_json(check_regular(manifest).read_bytes()))
        except FileNotFoundError as error:
            raise ValueError(f"{path} has no {MANIFEST}; want a folder that `fastddpm sample` wrote") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{manifest} is damaged ({error}); sample into another folder") from error

    def begin(self) -> None:
        """Create the folder and its manifest, or check the manifest; update that of a folder that grows.

        Raises: ValueError: the folder holds other samples.
        """
        manifest = self.path / MANIFEST
        self.path.mkdir(parents=True, exist_ok=True)
        before = ShardFolder.open(self.path).manifest if manifest.exists() else None
        if before is not None and before not in self.history:
            raise ValueError(self._difference(before))
        names = [] if before else os.listdir(self.path)
        if foreign := next((name for name in names if self.owns(name) and name != _DONE), None):
            raise ValueError(f"{self.path} holds {foreign} but no {MANIFEST}; name another folder")
        (self.path / _DONE).mkdir(exist_ok=True)
        labels = self._labels_file
        if before != self.manifest:
            if labels is not None:
                labels.unlink(missing_ok=True)  # those of the folder before it grew
            self._write_manifest()
        if labels is not None and not labels.exists():
            self._write_labels(labels)

    def owns(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path in the folder, relative to it, is one that the folder may use for itself."""
        path = Path(path)
        if len(path.parts) > 1:
            return path.parts[0] == _DONE
        return path.name in (_DONE, MANIFEST, LABELS) or path.suffix == FORMATS[self.format]

    def _difference(self, before: Mapping[str, Any]) -> str:
        """The error message for a folder with another manifest."""
        there, here = differing(before, self.manifest), differing(self.manifest, before)
        if there.keys() > {"grown_from"}:  # how the folder grew explains nothing where something else differs
            del there["grown_from"], here["grown_from"]
        way_out = "name another folder"
        held = len(Indices.parse(before["samples"]))
        others = str(self.samples[held:])
        more = others and str(self.samples[:held]) == before["samples"] and len(others) <= 200
        if more and there.keys() <= {"samples", "class_labels", "shard_size", "batch_size"}:
            way_out = (
                f"draw the others with --indices {others} into another folder, and join both with `fastddpm merge`"
            )
        return f"{self.path} holds samples with {in_short(there)}, not {in_short(here)}; {way_out}"

    def check_complete(self) -> None:
        """Check that no file was deleted since it was written. A deleted manifest, or file of labels, is written again.

        Raises: ValueError: a file, the labels or the manifest are missing, or the manifest is another one.
        """
        folders = [self.path, self.path / _DONE]
        names, records = (set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders)
        whole_folder = all(
            self._record(k).name in records and all(file.name in names for file in self._files(k))
            for k in range(len(self))
        )
        labels = self._labels_file
        labelled = labels is None or labels.name in names
        if names and labels is not None and not labelled:
            self._write_labels(labels)
        if names and MANIFEST not in names:
            self._write_manifest()
        elif names and ShardFolder.open(self.path).manifest != self.manifest:
            raise ValueError(f"{self.path / MANIFEST} was changed while the job ran; name another folder")
        if MANIFEST not in names or not labelled or not whole_folder:
            way_out = "give the same command again, which draws what is missing"
            raise ValueError(f"files of {self.path} were deleted while the job ran; {way_out}")

    def written(self) -> int:
        """The number of samples in shards that have a checksum; whether it still holds is not checked."""
        done = self.path / _DONE
        names = os.listdir(done) if done.exists() else []
        return sum(self.count(int(name)) for name in names if name.isdecimal() and int(name) < len(self))

    def __len__(self) -> int:
        """The number of shards of the finished folder."""
        return self._first_shards[-1]

    def count(self, k: int) -> int:
        """The number of samples in shard k."""
        return len(self.places(k))

    def indices(self, k: int) -> Indices:
        """The indices of the samples in shard k."""
        places = self.places(k)
        return self.samples[places.start : places.stop]

    def labels(self, k: int) -> np.ndarray | None:
        """[n] int64: the class labels of the samples in shard k; None: no labels."""
        return None if self.classes is None else self._labels_at(self.places(k))

    def all_labels(self) -> np.ndarray:
        """[N] int64: the class labels of all samples, which must have labels."""
        return self._labels_at(range(len(self.samples)))

    def write(self, k: int, samples: np.ndarray) -> None:
        """Write shard k; when this returns it is done, even if the machine crashes.

        Args:
            k: the shard.
            samples: uint8 [n, H, W, C] if they are images, else float32 [n, ...]; in the order of `indices`.
        """
        rate = self.manifest.get("sample_rate")
        labels = self.labels(k)
        contents = encoded(self.format, self.indices(k), samples, labels, digits=self.digits, sample_rate=rate)
        write_together(zip(self._files(k), contents, strict=True))
        with atomic(self._record(k)) as file:
            file.write(self._checksum(k, contents).encode())

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
        try:
            samples = decoded(self.format, contents, self.count(k), self._stored)
        except MemoryError:
            raise
        except Exception as error:  # what a damaged or hostile file makes a decoder raise
            shape, dtype = self._stored
            what = f"{self._files(k)[0]} does not hold {self.count(k)} samples of {shape} {dtype}, as {MANIFEST} says"
            raise ValueError(f"{what}; delete it and run the command that wrote it again") from error
        return samples

    def arrays(self) -> Iterator[np.ndarray]:
        """The samples of each shard in turn. Raises: ValueError: a shard is not done."""
        return map(self.read, range(len(self)))

    def _read(self, k: int) -> list[bytes] | None:
        """The bytes of the files of shard k; None if it is not done."""
        try:
            checksum = check_regular(self._record(k)).read_text(encoding="ascii")
            contents = [check_regular(file).read_bytes() for file in self._files(k)]
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return contents if self._checksum(k, contents) == checksum else None

    def _checksum(self, k: int, contents: Iterable[bytes]) -> str:
        """SHA-256 of the manifest of shard k's part and of its files: a shard of another job does not count as done."""
        digest = self._digests[self._part(k)].copy()
        for content in contents:
            digest.update(content)
        return digest.hexdigest()

    def _part(self, k: int) -> int:
        """The part of the folder that shard k belongs to."""
        return bisect.bisect_right(self._first_shards, k) - 1

    def places(self, k: int) -> range:
        """The places of shard k's samples among all samples."""
        part = self._part(k)
        start = [0, *self.grown_from][part] + (k - self._first_shards[part]) * self.shard_size
        return range(start, min(start + self.shard_size, self._ends[part]))

    def _labels_at(self, places: range) -> np.ndarray:
        classes = cast(Indices, self.classes)
        return classes.take(np.arange(places.start, places.stop) % len(classes))

    def _manifest_before(self, part: int) -> dict[str, Any]:
        """The manifest of the folder when this part was its last."""
        end = self._ends[part]
        past = {**self.manifest, "samples": str(self.samples[:end]), "grown_from": self.grown_from[:part]}
        if self.classes is not None and len(self.classes) > end:  # there are never more labels than samples
            past["class_labels"] = str(self.classes[:end])
        return {name: value for name, value in past.items() if name != "grown_from" or value}

    def _record(self, k: int) -> Path:
        return self.path / _DONE / f"{k:0{self.digits}d}"

    def _files(self, k: int) -> list[Path]:
        numbers = self.indices(k) if self.format in ONE_EACH else [k]
        return [self.path / f"{number:0{self.digits}d}{FORMATS[self.format]}" for number in numbers]

    @property
    def _stored(self) -> Stored:
        """(shape, dtype) of a sample in a file."""
        shape = tuple(self.manifest["shape"])
        if are_images(shape, latents=self.manifest.get("latents", False)):
            return (*shape[1:], shape[0]), np.dtype(np.uint8)
        return shape, np.dtype(np.float32)

    @property
    def _labels_file(self) -> Path | None:
        """The file of the class labels of PNGs or WAVs; None: there are no labels, or they are in the shards."""
        return self.path / LABELS if self.format in ONE_EACH and self.classes is not None else None

    def _write_manifest(self) -> None:
        with atomic(self.path / MANIFEST) as file:
            file.write(json.dumps(self.manifest, indent=1).encode())

    def _write_labels(self, path: Path) -> None:
        """Write the class labels of PNGs or WAVs as in the data sets of StyleGAN and EDM."""
        with atomic(path) as file:
            file.write(b'{"labels": [')
            for k in range(len(self)):
                pairs = zip(self._files(k), self.labels(k), strict=True)  # type: ignore[arg-type]
                text = ", ".join(f'["{path.name}", {label}]' for path, label in pairs)
                file.write(((", " if k else "") + text).encode())
            file.write(b"]}")


def continued(before: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a job that continues a folder: with "grown_from", if it asks for the same samples or for more.

    Args: before: the manifest of the folder; empty: there is none. manifest: what the job asks for.
    """
    if before:
        held = ShardFolder("", before)
        same = ShardFolder("", manifest).samples
        grown_from = held.grown_from + [len(held.samples)] * (len(same) > len(held.samples))
        if grown_from and str(same[: len(held.samples)]) == before["samples"]:
            grown = ShardFolder("", {**manifest, "grown_from": grown_from})
            if before in grown.history and grown.digits == held.digits:
                return grown.manifest
    return dict(manifest)


def is_shard_folder(path: str | os.PathLike[str]) -> bool:
    """Whether path is a folder with a manifest, such as `ShardFolder.begin` creates."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def _of_json(content: bytes) -> dict[str, Any]:
    """What a manifest holds. Raises: ValueError: it is no JSON object, or its values are nested too deeply."""
    try:
        held = json.loads(content)
    except (ValueError, RecursionError) as error:  # Python's words on a long integer advise to allow it
        raise ValueError("it is not valid JSON") from error
    if not isinstance(held, dict):
        raise ValueError(f"it is {shown(held)}; want an object")
    if not _is_shallow(held, _DEPTH):
        raise ValueError(f"its values are nested more than {_DEPTH} deep")
    return held


def _is_shallow(value: Any, depth: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in parts)


def _check_indices(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; want text such as 0-7,12")


def _check_list(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {shown(value)}; want a list")
    for number in value:
        whole(name, number, 1, LIMIT)


def _check_object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}; want an object")


_REQUIRED = ("format", "samples", "shard_size", "class_labels", "shape")
_FIELDS: dict[str, Callable[[str, Any], object]] = {
    "format": lambda name, value: one_of(name, value, FORMATS),
    "shard_size": lambda name, value: whole(name, value, 1, LIMIT),
    "samples": _check_indices,
    "class_labels": lambda name, value: None if value is None else _check_indices(name, value),
    "grown_from": _check_list,
    "shape": _check_list,
    "latents": flag,
    "sample_rate": lambda name, value: whole(name, value, 1, LIMIT),
    "seed": lambda _, value: seed(value),
    "precision": lambda name, value: one_of(name, value, PRECISIONS),
    "batch_size": lambda name, value: value is None or whole(name, value, 1, LIMIT),
    "batch_invariant": lambda name, value: whole(name, value, 0, LIMIT),
    "compiled": flag,
    **dict.fromkeys(("sampler", "schedule", "model", "code", "versions"), _check_object),
}


def in_short(facts: Mapping[str, Any]) -> str:
    """Some fields of a manifest as one line of text."""
    text = json.dumps(facts)[1:-1]
    return text if len(text) <= 200 else f"{text[:200]} ..."
