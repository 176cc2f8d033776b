"""`fastddpm fid`: how far two sets of images are from each other, by their Fréchet distance, with its standard error.

Heusel et al. 2017 (arXiv:1706.08500). With the features of the Inception network it is the FID. Statistics of features
are kept in a file for each set and extractor, so that the images go through the network once.
"""

import hashlib
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.evaluate.features import SHIPPED, Extractor, check_batch_size, extract, load_extractor
from fastddpm.evaluate.frechet import bootstrap, gaussian_distance, moments
from fastddpm.storage import datasets, shards
from fastddpm.storage.files import atomic

_ZIP = (zipfile.BadZipFile, zlib.error)
_AHEAD = 256  # images of a set in memory, or as many as a batch
_FORMAT = "fastddpm fid 1"  # a new number wherever the same images would get other statistics


@dataclass(frozen=True)
class Fid:
    """The distance of two sets.

    Attributes:
        distance: squared Fréchet distance of the Gaussians fitted to their features, float64.
        error: its standard error by bootstrap; None: not asked for, or neither set can be resampled.
        counts: images in each set; None: not known.
        dimension: D, of the features.
        extractor: what the features are of; None: both sets are statistics.
        statistics: the file of each set's statistics; None: they were not kept.
        notes: what limits the figures.
    """

    distance: float
    error: float | None
    counts: tuple[int | None, int | None]
    dimension: int
    extractor: str | None
    statistics: tuple[Path | None, Path | None]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Statistics:
    """What the features of one set are like: mu [D] and sigma [D, D] float64, its mean and covariance over N - 1.

    Attributes:
        count: N, where it is known.
        features: [N, D] float32; None: they are not known, and the set cannot be resampled.
        extractor: `Extractor.identity`, where it is known.
        path: the file they are in, if there is one.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None = None
    features: Tensor | None = None
    extractor: str | None = None
    path: Path | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """From an .npz with mu and sigma, as `save`, pytorch-fid and EDM write it.

        Raises: ValueError: it has none, or they are not finite, or of wrong shapes.
        """
        try:
            with open(path, "rb") as whole, np.load(whole, allow_pickle=False) as file:
                mu, sigma = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
                features = torch.from_numpy(file["features"]) if "features" in file.files else None
                count = int(file["count"]) if "count" in file.files else None
                extractor = str(file["extractor"]) if "extractor" in file.files else None
        except (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, *_ZIP) as error:
            raise ValueError(f"cannot load {path}: {error}; want statistics, an .npz with mu and sigma") from error
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError(
                f"{path} has mu {list(mu.shape)} and sigma {list(sigma.shape)}; want finite [D] and [D, D]"
            )
        if not torch.allclose(sigma, sigma.T, rtol=1e-6, atol=0) or (sigma.diag() < 0).any():
            raise ValueError(
                f"{path} has a sigma that is no covariance: it is not symmetric, or has a variance below 0"
            )
        if count is not None and count < 2:
            raise ValueError(f"{path} has count {count}; want that of its images, at least 2")
        if features is not None and not features.isfinite().all():
            raise ValueError(f"{path} has features that are not finite")
        if features is not None and features.shape != (count, len(mu)):
            raise ValueError(f"{path} has features {list(features.shape)}; want [{count}, {len(mu)}], count and D")
        return cls(mu, sigma, count, features, extractor, Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz: mu, sigma, and as far as they are known count, features and extractor."""
        named = {name: getattr(self, name) for name in ("mu", "sigma", "count", "features", "extractor")}
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in named.items() if value is not None}
        with atomic(path) as file:
            np.savez(file, **arrays)


def fid(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    features: str | os.PathLike[str] = SHIPPED,
    input_size: int | None = None,
    scale: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    replicates: int = 20,
    seed: int = 0,
    cache: str | os.PathLike[str] | bool = True,
    progress: bool = True,
) -> Fid:
    """The Fréchet distance of two sets of images, and its standard error.

    It is biased upwards, the more the fewer the images are: compare figures of equal number. Resampling adds to the
    bias, so the distance is that of the sets themselves, and the bootstrap gives its error alone.

    Args:
        a, b: each one of
            what `data.load_images` takes: an .npz, an MNIST-format file or a folder of images;
            "PATH.npz:ARRAY": another array of it;
            a folder that `fastddpm sample` has written;
            statistics, an .npz with mu and sigma. Without its features such a set is taken as exactly known.
        features, input_size, scale, device: as `load_extractor` takes them.
        batch_size: as `extract` takes it.
        replicates: of the bootstrap, K; 0: no error.
        seed: of the bootstrap, 0 <= seed < 2^64.
        cache: the folder in which statistics are kept, with their features; True: `cache_folder()`; False: nowhere.
        progress: show bars.
    Raises: ValueError: an argument is not as above, a set cannot be read, is still being written or has less than 2
        images, or the sets have features of different extractors.
    """
    if type(replicates) is not int or replicates < 0 or replicates == 1:
        raise ValueError(f"replicates is {replicates!r}; want 0, or at least 2, which have a standard deviation")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed!r}; want a whole number, 0 <= seed < 2^64")
    check_batch_size(batch_size)
    sets = [_parsed(source) for source in (a, b)]
    extractor = None
    if not all(_is_statistics(*one) for one in sets):
        extractor = load_extractor(features, device=device, input_size=input_size, scale=scale)
    folder = (cache_folder() if cache else None) if isinstance(cache, bool) else Path(cache)
    known = [
        Statistics.load(path)
        if extractor is None or _is_statistics(path, array)
        else _of_images(path, array, extractor, folder, batch_size, progress)
        for path, array in sets
    ]
    _check_alike(known, [str(a), str(b)], extractor)
    distance = gaussian_distance(known[0].mu, known[0].sigma, known[1].mu, known[1].sigma)
    error = None
    if replicates and any(one.features is not None for one in known):
        resampled = [(one.mu, one.sigma) if one.features is None else one.features for one in known]
        error = float(bootstrap(*resampled, replicates=replicates, seed=seed, progress=progress).std())
    return Fid(
        distance,
        error,
        (known[0].count, known[1].count),
        len(known[0].mu),
        None if extractor is None else extractor.name,
        (known[0].path, known[1].path),
        tuple(note for name, one in zip("AB", known, strict=True) for note in _notes(name, one)),
    )


def cache_folder() -> Path:
    """Where statistics are kept unless told otherwise: fastddpm/fid in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastddpm" / "fid"


def _parsed(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """A path, and an array of it where one is named."""
    if not os.fspath(source):
        raise ValueError("a set is named ''; name its images, or an .npz of statistics")
    found = re.fullmatch(r"(.+\.npz):([^:/\\]+)", os.fspath(source))
    return (Path(found[1]), found[2]) if found and not Path(source).exists() else (Path(source), None)


def _is_statistics(path: Path, array: str | None) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return array is None and {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False


def _of_images(
    path: Path, array: str | None, extractor: Extractor, folder: Path | None, batch_size: int | None, progress: bool
) -> Statistics:
    """From the cache, or computed, and put there."""
    kept, fingerprint = None, ""
    _check_finished(path)
    if folder is not None:
        fingerprint = _fingerprint(path, array, extractor)
        kept = folder / f"{fingerprint[:32]}.npz"
        try:
            return Statistics.load(kept)
        except ValueError:  # not there, or damaged
            pass
    count, batches = _images(path, array, batch_size or _AHEAD)
    found = extract(extractor, batches, count, batch_size=batch_size, progress=progress)
    if len(found) < 2:
        raise ValueError(f"{path} holds {len(found)} image; want at least 2, better thousands")
    known = Statistics(*moments(found), len(found), found, extractor.identity)
    if kept is None:
        return known
    if _fingerprint(path, array, extractor) != fingerprint:
        raise ValueError(f"{path} was changed while it was read; compare it again when it stays as it is")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        known.save(kept)
    except OSError as error:
        warnings.warn(
            f"the statistics of {path} are not kept: {error}; name another folder for the cache", stacklevel=3
        )
        return known
    return replace(known, path=kept)


def _check_finished(path: Path) -> None:
    """Refuse a job that has not drawn all its samples yet, at once, and one among other images at all."""
    if shards.is_store(path):
        opened = shards.Store.open(path)
        if opened.written() < len(opened.samples):
            done = f"{opened.written()} of its {len(opened.samples)} samples"
            raise ValueError(f"{path} holds {done}; the command that wrote them draws the others")
    elif path.is_dir():
        below = {file.parent for file in datasets.image_files(path)}
        if found := next(filter(shards.is_store, sorted(below)), None):
            raise ValueError(f"{path} holds a folder that `fastddpm sample` wrote, {found}; name that one")


def _images(path: Path, array: str | None, batch: int) -> tuple[int, Iterator[np.ndarray]]:
    if array is not None or not shards.is_store(path):
        return datasets.stream_images(path, array=array, batch=batch)
    opened = shards.Store.open(path)

    def pictures() -> Iterator[np.ndarray]:
        for shard in opened.arrays():
            if shard.dtype != np.uint8 or shard.ndim != 4:
                raise ValueError(f"{path} holds {list(shard.shape[1:])} {shard.dtype}; want pictures, uint8 [H, W, C]")
            yield shard

    return len(opened.samples), pictures()


def _fingerprint(path: Path, array: str | None, extractor: Extractor) -> str:
    """SHA-256 of all that statistics depend on: the files' names and bytes, which array, the extractor."""
    digest = hashlib.sha256(f"{_FORMAT}\0{extractor.identity}".encode())
    if shards.is_store(path):
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    else:
        files = datasets.image_files(path)
        array = array or datasets.array_name(path)
    for file in files:
        digest.update(f"\0{array}\0{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_alike(known: list[Statistics], names: list[str], extractor: Extractor | None) -> None:
    (a, b), way_out = known, "compare sets by one extractor"
    if len(a.mu) != len(b.mu):
        raise ValueError(f"{names[0]} has {len(a.mu)} features, {names[1]} has {len(b.mu)}; {way_out}")
    for one, name in zip(known, names, strict=True):
        if extractor is not None and one.extractor not in (None, extractor.identity):
            raise ValueError(
                f"{name} has features of another extractor than {extractor.name}, or of other options; {way_out}"
            )
    if len({one.extractor for one in known} - {None}) > 1:
        raise ValueError(f"{names[0]} and {names[1]} have features of different extractors; {way_out}")


def _notes(name: str, one: Statistics) -> Iterator[str]:
    dimension = len(one.mu)
    if one.count is not None and one.count <= dimension:
        yield (
            f"{name} has {one.count} images for {dimension} features: its covariance is singular, and the distance "
            "strongly biased upwards"
        )
    if one.features is None:
        yield f"{name} is a mean and a covariance alone, taken as exactly known"
