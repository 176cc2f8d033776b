"""Finished samples joined: all of one folder, or of several, in one .npz or one tar."""

import os
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastddpm.storage.files import atomic, check_writable
from fastddpm.storage.fingerprint import differing
from fastddpm.storage.indices import Indices
from fastddpm.storage.shards import Store, add_to_tar, in_short

ALIKE = ("model", "schedule", "sampler", "shape", "precision")  # what a manifest tells of the distribution of samples

Shards = Iterable[tuple[Store, int]]


def merge(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, progress: bool = True
) -> tuple[int, ...]:
    """Write the samples of finished jobs into one file, of which memory holds a shard at a time.

    Args:
        folders: what `job.sample_to` has written, in any format; several are joined in the order given.
        out: x.npz: `arr_0` [N, ...], as guided-diffusion's evaluator reads it, and, of labelled samples, `arr_1` [N];
            the bytes are those of `images.save_npz`. x.tar: as webdataset reads it.
    Returns: the shape of all samples together.
    Raises: ValueError: a folder holds no samples, or not yet all; it is of another model, schedule, sampler or
        precision than the first, or holds a sample that another holds as well; or out is not as above.
    """
    from tqdm import tqdm

    suffix = Path(out).suffix.lower()
    if suffix not in (".npz", ".tar"):
        raise ValueError(f"out is {os.fspath(out)}; want an .npz or a .tar")
    check_writable(out)
    stores = [Store.open(folder) for folder in folders]
    _check_alike(stores, by_name=suffix == ".tar")
    if inside := next((store for store in stores if Path(out).resolve().is_relative_to(store.folder.resolve())), None):
        raise ValueError(f"out is {os.fspath(out)}, among the samples of {inside.folder}; name another place")
    first = stores[0].read(0)
    shape = (sum(len(store.samples) for store in stores), *first.shape[1:])
    shards = tqdm(
        [(store, k) for store in stores for k in range(len(store))], desc="merge", unit="shard", disable=not progress
    )
    with shards, atomic(out) as file:
        if suffix == ".npz":
            _write_npz(file, stores, shards, shape, first.dtype)
        else:
            _write_tar(file, shards, digits=max(store.digits for store in stores))
    return shape


def _check_alike(stores: Sequence[Store], *, by_name: bool) -> None:
    """Refuse samples of different origin, or twice the same; by name, also those of two seeds and one index."""
    if not stores:
        raise ValueError("there is nothing to merge; name at least one folder of samples")
    facts = [
        {name: store.manifest.get(name) for name in ALIKE} | {"labelled": store.classes is not None} for store in stores
    ]
    for store, fact in zip(stores, facts, strict=True):
        if changed := differing(fact, facts[0]):
            there, here = in_short(changed), in_short(differing(facts[0], fact))
            held = f"{store.folder} holds samples with {there}, {stores[0].folder} with {here}"
            raise ValueError(f"{held}; merge alike ones")
    seeds = defaultdict(list)
    for store in stores:
        seeds[None if by_name else store.manifest.get("seed")].append(store.samples)
    for seed, parts in seeds.items():
        if (twice := Indices.joined(parts).twice()) is not None:
            what = f"an index {twice}, by which a tar names it," if by_name else f"sample {twice} of seed {seed}"
            raise ValueError(f"{what} is there twice; merge folders that have none in common")


def _write_npz(
    file: BinaryIO, stores: Sequence[Store], shards: Shards, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for store, k in shards:
                entry.write(store.read(k).tobytes())
        if stores[0].classes is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.concatenate([store.all_labels() for store in stores]))


def _write_tar(file: BinaryIO, shards: Shards, *, digits: int) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for store, k in shards:
            add_to_tar(tar, store.indices(k), store.read(k), store.labels(k), digits=digits)
