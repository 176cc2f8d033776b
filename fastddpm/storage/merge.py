"""Merges the samples of one or several finished folders into one .npz or one tar."""

import os
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastddpm.core.checks import checked_call, flag, shown
from fastddpm.storage.files import as_path, atomic, check_writable
from fastddpm.storage.fingerprint import differing
from fastddpm.storage.indices import Indices
from fastddpm.storage.shard_formats import add_to_tar
from fastddpm.storage.shards import ShardFolder, in_short

ALIKE = (
    "model",
    "schedule",
    "sampler",
    "shape",
    "latents",
    "precision",
)  # the manifest's fields that decide the distribution

Shards = Iterable[tuple[ShardFolder, int]]


@checked_call
def merge(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, progress: bool = True
) -> tuple[int, ...]:
    """Write the samples of finished jobs into one file, holding one shard in memory at a time.

    Args:
        folders: folders that `job.sample_to` has written, in any format; their samples are joined in this order.
        out: x.npz: array `arr_0` [N, ...], as guided-diffusion's evaluator reads it, and `arr_1` [N] if the samples
            have labels; the same bytes as from `images.save_npz`. x.tar: for webdataset.
        progress: show a bar.
    Returns: the shape of all samples together.
    Raises: ValueError: a folder holds no samples or lacks some; a shard holds other samples than its manifest says; the
        model, schedule, sampler, shape or precision of a folder is not that of the first; some have labels and others
        not; two folders hold the same sample; or out is not as above, or in one of the folders.
    """
    from tqdm import tqdm

    suffix = as_path("out", out).suffix.lower()
    if suffix not in (".npz", ".tar"):
        raise ValueError(f"out is {os.fspath(out)}; want an .npz or a .tar")
    if isinstance(folders, str) or not isinstance(folders, Sequence):
        raise ValueError(f"folders are {shown(folders)}; want a list of paths")
    sources = [ShardFolder.open(folder) for folder in folders]
    for source in sources:
        if Path(out).resolve().is_relative_to(source.path.resolve()):
            raise ValueError(f"out is {os.fspath(out)}, in {source.path} among its samples; name another place")
    flag("progress", progress)
    check_writable(out)
    _check_same_distribution(sources)
    _check_no_duplicates(sources, ignore_seed=suffix == ".tar")
    first = sources[0].read(0)
    shape = (sum(len(source.samples) for source in sources), *first.shape[1:])
    all_shards = [(source, k) for source in sources for k in range(len(source))]
    shards = tqdm(all_shards, desc="merge", unit="shard", disable=not progress)
    with shards, atomic(out) as file:
        if suffix == ".npz":
            _write_npz(file, sources, shards, shape, first.dtype)
        else:
            _write_tar(file, shards, digits=max(source.digits for source in sources))
    return shape


def _check_same_distribution(sources: Sequence[ShardFolder]) -> None:
    """Refuse samples of different models or settings, and labelled beside unlabelled ones."""
    if not sources:
        raise ValueError("there is nothing to merge; name at least one folder of samples")
    facts = [
        {name: source.manifest.get(name) for name in ALIKE} | {"labelled": source.classes is not None}
        for source in sources
    ]
    for source, fact in zip(sources, facts, strict=True):
        if changed := differing(fact, facts[0]):
            there, here = in_short(changed), in_short(differing(facts[0], fact))
            difference = f"{source.path} holds samples with {there}, but {sources[0].path} with {here}"
            raise ValueError(f"{difference}; merge samples of one distribution")


def _check_no_duplicates(sources: Sequence[ShardFolder], *, ignore_seed: bool) -> None:
    """Refuse a sample that occurs twice; with ignore_seed=True also samples of two seeds with the same index."""
    parts = defaultdict(list)
    for source in sources:
        parts[None if ignore_seed else source.manifest.get("seed")].append(source.samples)
    for seed, indices in parts.items():
        if (index := Indices.joined(indices).duplicate()) is None:
            continue
        if ignore_seed:
            twice = f"index {index}, by which a tar names samples, occurs twice"
        else:
            twice = f"sample {index} of seed {seed} occurs twice"
        raise ValueError(f"{twice}; merge folders without common samples")


def _write_npz(
    file: BinaryIO, sources: Sequence[ShardFolder], shards: Shards, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for source, k in shards:
                entry.write(source.read(k).tobytes())
        if sources[0].classes is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.concatenate([source.all_labels() for source in sources]))


def _write_tar(file: BinaryIO, shards: Shards, *, digits: int) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for source, k in shards:
            add_to_tar(tar, source.indices(k), source.read(k), source.labels(k), digits=digits)
