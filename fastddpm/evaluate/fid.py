"""`fastddpm fid`: the Fréchet distance between two sets of images, with its standard error.

Heusel et al. 2017 (arXiv:1706.08500); with the features of the Inception network it is the FID. The statistics of each
set's features are kept in a file for each extractor, so that the images go through the network once.
"""

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.core import checks
from fastddpm.core.checks import shown
from fastddpm.core.names import SHIPPED_CLASSIFIER
from fastddpm.evaluate.features import INCEPTION_PER_S, INPUT_SIZE, Extractor, extract
from fastddpm.evaluate.frechet import (
    MOST_REPLICATES,
    are_moments,
    bootstrap,
    finite,
    gaussian_distance,
    is_covariance,
    moments,
)
from fastddpm.evaluate.isolated import load_extractor
from fastddpm.storage import datasets, npz, shards
from fastddpm.storage.arrays import StoredArray
from fastddpm.storage.caches import user_cache
from fastddpm.storage.files import as_path, atomic, check_not_input, check_regular, delete_leftovers

_IMAGES_READ = 256  # images of a set that are in memory at once, by default
_MANY_FEATURES = 1000  # from here on, a replicate of the bootstrap takes seconds
_FORMAT = "fastddpm fid 1"  # change the number whenever the same images would get other statistics


@dataclass(frozen=True)
class Fid:
    """The distance between two sets.

    Attributes:
        distance: squared Fréchet distance between the Gaussians fitted to their features, in float64.
        error: its standard error by the bootstrap; None: not asked for, or neither set can be resampled.
        counts: images in each set; None: unknown.
        dimension: D, the number of features of an image.
        extractor: the name of the extractor; None: both sets are statistics.
        statistics: the file with each set's statistics; None: they are not in a file.
        notes: what limits the accuracy of the distance.
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
    """The statistics of one set's features.

    Attributes:
        mu: [D] float64, the mean.
        sigma: [D, D] float64, the covariance, over N - 1.
        count: N; None: unknown.
        features: [N, D] float32; None: unknown, and the set cannot be resampled.
        extractor: `Extractor.identity`; None: unknown.
        path: the file that holds the statistics; None: they are not in a file.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None = None
    features: Tensor | None = None
    extractor: str | None = None
    path: Path | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Load an .npz with mu and sigma, as `save`, pytorch-fid and EDM write it.

        Raises: ValueError: the file is damaged, an array is missing, does not hold finite real numbers or is of a wrong
            shape, sigma is not a covariance, or they are not those of the features beside them.
        """
        stored = _stored_statistics(path)
        with np.errstate(over="ignore"):  # numbers beyond float64 become infinite, and are refused
            mu, sigma = (torch.from_numpy(stored[name].load().astype(np.float64)) for name in ("mu", "sigma"))
        if not mu.isfinite().all() or not sigma.isfinite().all():
            raise ValueError(f"{path} has a mu or a sigma that is not finite")
        if not is_covariance(sigma, mu):
            raise ValueError(
                f"{path} has a sigma that is not a covariance: it is not symmetric, or has an eigenvalue below 0"
            )
        count, extractor = (stored[name].load().item() if name in stored else None for name in ("count", "extractor"))
        if count is not None and count < 2:
            raise ValueError(f"{path} has count {count}; want the number of images, at least 2")
        features = _stored_features(path, stored["features"], mu, sigma, count) if "features" in stored else None
        return cls(mu, sigma, count, features, extractor, Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz with mu, sigma, and if known count, features and extractor."""
        named = {name: getattr(self, name) for name in ("mu", "sigma", "count", "features", "extractor")}
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in named.items() if value is not None}
        with atomic(path) as file:
            np.savez(file, **arrays)


def _stored_statistics(path: str | os.PathLike[str]) -> dict[str, StoredArray]:
    """The arrays of an .npz that make up statistics, by name. Their values are not read yet.

    Raises: ValueError: mu or sigma is missing, or an array is of another kind or shape.
    """
    path, wanted = check_regular(path), "want statistics, an .npz with mu and sigma"
    numbers, whole, text = ("fiu", "real numbers"), ("iu", "a whole number"), ("U", "a string")
    kinds = {"mu": numbers, "sigma": numbers, "features": numbers, "count": whole, "extractor": text}
    names = npz.array_names(path)
    if missing := [name for name in ("mu", "sigma") if name not in names]:
        raise ValueError(f"{path} holds no {missing[0]}; {wanted}")
    stored = {name: npz.open_array(path, name) for name in kinds if name in names}
    for name, array in stored.items():
        kind, want = kinds[name]
        if array.dtype.kind not in kind or (name in ("count", "extractor") and math.prod(array.shape) != 1):
            raise ValueError(f"{path} has {name} {list(array.shape)} {array.dtype}; want {want}")
    mu, sigma = stored["mu"].shape, stored["sigma"].shape
    if len(mu) != 1 or mu[0] < 1 or sigma != 2 * mu:
        raise ValueError(f"{path} has mu {list(mu)} and sigma {list(sigma)}; want [D] and [D, D], D >= 1")
    return stored


def _stored_features(
    path: str | os.PathLike[str], stored: StoredArray, mu: Tensor, sigma: Tensor, count: int | None
) -> Tensor:
    """[N, D] features beside statistics. Raises: ValueError: the statistics are not theirs."""
    if stored.shape != (count, len(mu)):
        raise ValueError(f"{path} has features {list(stored.shape)}; want [{count}, {len(mu)}], count and D")
    dtype = np.float32 if stored.dtype.itemsize <= 4 else np.float64
    features = torch.from_numpy(stored.load().astype(dtype, copy=False))
    if not features.isfinite().all():
        raise ValueError(f"{path} has features that are not finite")
    if not are_moments(mu, sigma, features):
        way_out = "give mu and sigma without features, or the images"
        raise ValueError(f"{path} has a mu or a sigma that is not that of its features; {way_out}")
    return features


@checks.checked_call
def fid(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    features: str | os.PathLike[str] = SHIPPED_CLASSIFIER,
    input_size: int | None = None,
    scale: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    replicates: int = 20,
    seed: int = 0,
    cache: str | os.PathLike[str] | bool = True,
    progress: bool = True,
) -> Fid:
    """The Fréchet distance between two sets of images, and its standard error.

    The distance is biased upwards, and the more so the fewer the images are: compare only distances of equally many
    images. Resampling adds to the bias, so the distance is that of the sets themselves; the bootstrap gives only its
    standard error.

    Args:
        a, b: each is one of
            what `datasets.load_images` takes, such as "FILE.npz:ARRAY" or a folder of images, which may be of several
            sizes;
            a folder that `fastddpm sample` wrote;
            statistics: an .npz with mu and sigma. Without features such a set is taken as exactly known.
        features, input_size, scale, device: as `isolated.load_extractor` takes them. A file's network is loaded and
            runs in a process of its own.
        batch_size: as `extract` takes it.
        replicates: K of the bootstrap, from 2 to 1,000,000; 0: no standard error.
        seed: of the bootstrap, 0 <= seed < 2^64.
        cache: the folder that keeps statistics with their features; True: `cache_folder()`; False: keep none.
        progress: say on stderr what takes long, and show bars.
    Raises: ValueError: an argument is not as above, a set cannot be read, is incomplete or has less than 2 images, or
        the sets have features of different extractors.
    """
    if not checks.is_whole(replicates) or replicates < 0 or replicates == 1:
        raise ValueError(f"replicates is {shown(replicates)}; want 0, or at least 2, which have a standard deviation")
    replicates = checks.whole("replicates", replicates, 0, MOST_REPLICATES)
    seed, progress = checks.seed(seed), checks.flag("progress", progress)
    if batch_size is not None:
        batch_size = checks.whole("batch_size", batch_size, 1)
    sources = [_Source.parse("a", a), _Source.parse("b", b)]
    if not isinstance(cache, bool | str | os.PathLike) or cache == "":
        raise ValueError(f"cache is {shown(cache)}; want a folder, True or False")
    kept_in = None if isinstance(cache, bool) else as_path("cache", cache)
    extractor = None
    if not all(source.is_statistics() for source in sources):
        extractor = load_extractor(features, device=device, input_size=input_size, scale=scale)
    folder = cache_folder() if cache is True else kept_in
    sets = []
    for source in sources:
        if extractor is None or source.is_statistics():
            sets.append(Statistics.load(source.path))
        else:
            sets.append(_statistics_of_images(source, extractor, folder, batch_size, progress))
    _check_comparable(sets, [str(a), str(b)], extractor)
    return _compare(sets[0], sets[1], extractor, replicates, seed, progress)


def _compare(
    a: Statistics, b: Statistics, extractor: Extractor | None, replicates: int, seed: int, progress: bool
) -> Fid:
    distance, error = finite(gaussian_distance(a.mu, a.sigma, b.mu, b.sigma)), None
    if replicates and (a.features is not None or b.features is not None):
        if progress and len(a.mu) >= _MANY_FEATURES:
            what = f"{replicates} replicates with {len(a.mu)} features, of some seconds each"
            print(f"the standard error takes {what}; without replicates there is none", file=sys.stderr)
        resampled = [(one.mu, one.sigma) if one.features is None else one.features for one in (a, b)]
        error = finite(float(bootstrap(*resampled, replicates=replicates, seed=seed, progress=progress).std()))
    return Fid(
        distance=distance,
        error=error,
        counts=(a.count, b.count),
        dimension=len(a.mu),
        extractor=None if extractor is None else extractor.name,
        statistics=(a.path, b.path),
        notes=(*_accuracy_notes("A", a), *_accuracy_notes("B", b)),
    )


def cache_folder() -> Path | None:
    """The default folder for statistics: fastddpm/fid in $XDG_CACHE_HOME or ~/.cache.

    None, with a warning, for a user without a home.
    """
    folder = user_cache("fid")
    if folder is None:
        warnings.warn("the statistics are not kept: there is no home; name a folder for the cache", stacklevel=4)
    return folder


@dataclass(frozen=True)
class _Source:
    """A path, and the array of it that was named, if any."""

    path: Path
    array: str | None

    @classmethod
    def parse(cls, name: str, text: str | os.PathLike[str]) -> "_Source":
        if not isinstance(text, str | os.PathLike) or not os.fspath(text):
            raise ValueError(f"{name} is {shown(text)}; want a path, that of images or of an .npz with statistics")
        return cls(*datasets.split_array(as_path(name, text)))

    def is_statistics(self) -> bool:
        if os.path.isdir(self.path):
            return False
        try:
            return self.array is None and {"mu", "sigma"} <= set(npz.array_names(check_regular(self.path)))
        except ValueError:
            return False


def _statistics_of_images(
    source: _Source, extractor: Extractor, folder: Path | None, batch_size: int | None, progress: bool
) -> Statistics:
    """Take the statistics from the cache, or compute them and put them there. Args: folder: of the cache, or None."""
    path, file, fingerprint = source.path, None, ""
    _check_finished(path)
    if folder is not None:
        fingerprint = _fingerprint(source, extractor)
        file = folder / f"{fingerprint[:32]}.npz"
        check_not_input("the cache", check_regular(file), path, extractor.name)
        with suppress(ValueError):  # missing or damaged
            return Statistics.load(file)
    count, batches = _open_images(source, batch_size or _IMAGES_READ)
    if progress:
        print(f"{path}: {count} images go through {extractor.name}{_how_long(extractor, count)}", file=sys.stderr)
    features = extract(extractor, batches, count, batch_size=batch_size, progress=progress)
    if len(features) < 2:
        raise ValueError(f"{path} holds {len(features)} image; want at least 2, better thousands")
    statistics = Statistics(*moments(features), len(features), features, extractor.identity)
    if folder is None or file is None:
        return statistics
    if _fingerprint(source, extractor) != fingerprint:
        raise ValueError(f"{path} was changed while it was read; compare again once it no longer changes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        delete_leftovers(folder, "[0-9a-f]" * 32 + ".npz")
        statistics.save(file)
    except OSError as error:
        cause = f"cannot write {folder}: {error.strerror or error}"
        warnings.warn(
            f"the statistics of {path} are not kept: {cause}; name another folder for the cache", stacklevel=4
        )
        return statistics
    return replace(statistics, path=file)


def _how_long(extractor: Extractor, count: int) -> str:
    """What is known beforehand of the time that images take; the bar shows the rest."""
    seconds = count / (INCEPTION_PER_S * torch.get_num_threads())
    if extractor.device.type != "cpu" or extractor.size != (INPUT_SIZE, INPUT_SIZE) or seconds < 60:
        return ""
    return f"; if that is an Inception network, it takes about {seconds / 60:.0f} minutes on this CPU"


def _check_finished(path: Path) -> None:
    """Raises: ValueError: path is an unfinished job of `fastddpm sample`, or a folder with a job's folder inside."""
    if shards.is_shard_folder(path):
        opened = shards.ShardFolder.open(path)
        if opened.written() < len(opened.samples):
            done = f"{opened.written()} of its {len(opened.samples)} samples"
            raise ValueError(f"{path} holds {done}; rerun the command that wrote them to draw the others")
    elif os.path.isdir(path):
        folders = {file.parent for file in datasets.image_files(path)}
        if job := next(filter(shards.is_shard_folder, sorted(folders)), None):
            raise ValueError(f"{path} holds a folder that `fastddpm sample` wrote, {job}; name that one")


def _open_images(source: _Source, batch: int) -> tuple[int, Iterator[np.ndarray]]:
    """The number of images, and the images: uint8 [n, H, W, C], at most `batch` at a time, or a shard at a time."""
    if source.array is not None or not shards.is_shard_folder(source.path):
        return datasets.stream_images(source.path, array=source.array, batch=batch, same_size=False)
    opened = shards.ShardFolder.open(source.path)

    def pictures() -> Iterator[np.ndarray]:
        for shard in opened.arrays():
            if shard.dtype != np.uint8 or shard.ndim != 4:
                came = f"{list(shard.shape[1:])} {shard.dtype}"
                raise ValueError(f"{source.path} holds {came}; want pictures, uint8 [H, W, C]")
            yield shard

    return len(opened.samples), pictures()


def _fingerprint(source: _Source, extractor: Extractor) -> str:
    """SHA-256 of all that statistics depend on: the names and bytes of the files, the array, the extractor."""
    path, array = source.path, source.array
    digest = hashlib.sha256(f"{_FORMAT}\0{extractor.identity}".encode())
    if shards.is_shard_folder(path):
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    else:
        files = datasets.image_files(path)
        array = array or datasets.array_name(path)
    for file in files:
        digest.update(f"\0{array}\0{file.relative_to(path)}\0{file.stat().st_size}\0".encode(errors="surrogatepass"))
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_comparable(sets: list[Statistics], names: list[str], extractor: Extractor | None) -> None:
    """Raises: ValueError: the sets have features of different extractors, as far as that is known."""
    (a, b), way_out = sets, "compare sets by one extractor"
    if len(a.mu) != len(b.mu):
        raise ValueError(f"{names[0]} has {len(a.mu)} features, {names[1]} has {len(b.mu)}; {way_out}")
    for one, name in zip(sets, names, strict=True):
        if extractor is not None and one.extractor not in (None, extractor.identity):
            raise ValueError(
                f"{name} has features of another extractor than {extractor.name}, or of other options; {way_out}"
            )
    if len({one.extractor for one in sets} - {None}) > 1:
        raise ValueError(f"{names[0]} and {names[1]} have features of different extractors; {way_out}")


def _accuracy_notes(name: str, one: Statistics) -> Iterator[str]:
    """What about a set limits the accuracy of the distance."""
    dimension = len(one.mu)
    if one.count is not None and one.count <= dimension:
        yield (
            f"{name} has {one.count} images for {dimension} features: its covariance is singular, and the distance "
            "strongly biased upwards"
        )
    if one.features is None:
        yield f"{name} is a mean and a covariance alone, taken as exactly known"
