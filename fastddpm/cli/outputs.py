"""Where `fastddpm sample` writes to, in which format, and what fits the model's samples."""

import argparse
import os
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastddpm.sampling.sampler import Sampler
    from fastddpm.storage.shards import ShardFolder

DEFAULT_OUT = {
    "png": "samples",
    "grid": "samples.png",
    "npz": "samples.npz",
    "txt": "samples.txt",
    "wav": "samples",
    "webdataset": "samples",
}
_FORMAT_OF_SUFFIX = {".png": "grid", ".npz": "npz", ".txt": "txt", "": "png"}
_FIRST = 25  # spectrograms in a folder of WAV files


def destination(out: str | None, format: str | None) -> tuple[Path, str, bool]:
    """(path, format, whether the path is a folder). Either option may imply the other."""
    given, out = out, DEFAULT_OUT[format or "grid"] if out is None else out
    if not out:
        raise ValueError("--out is ''; want a .png, an .npz, a .txt or a folder")
    suffix = "" if out.endswith(os.sep) or (given and os.path.isdir(out)) else Path(out).suffix.lower()
    implied = _FORMAT_OF_SUFFIX.get(suffix)
    if format is None and implied is None:
        raise ValueError(f"--out is {out}; want a .png, an .npz, a .txt or a folder, or give --format")
    if format is not None and suffix and implied is not None and implied != format:
        raise ValueError(f"--format is {format}, but --out is {out}, which means {implied}; leave --format out")
    if format == "wav" and suffix:
        raise ValueError(f"--out is {out}, but --format wav writes a folder of WAV files; want a folder")
    format = format or str(implied)
    if format == "webdataset" and suffix == ".tar":
        folder = f"{Path(out).stem}/"
        raise ValueError(
            f"--out is {out}, but --format webdataset writes a folder of several tars; want a folder: "
            f"--out {folder}, then `fastddpm merge {folder} {out}` joins them"
        )
    return Path(out), format, format in ("png", "wav", "webdataset") or (format == "npz" and not suffix)


def prints(args: argparse.Namespace, sampler: "Sampler") -> bool:
    """Whether texts are printed, not written to a file."""
    from fastddpm.text import Text

    return isinstance(sampler.medium, Text) and args.out is None and args.format is None


def format_of_medium(args: argparse.Namespace, sampler: "Sampler", format: str) -> str:
    """The format, where sounds and texts have another default."""
    from fastddpm.audio import Audio

    if prints(args, sampler):
        return "txt"
    return "wav" if isinstance(sampler.medium, Audio) and args.format is None and format == "png" else format


def check_what_is_drawn(args: argparse.Namespace, sampler: "Sampler", format: str, count: int) -> None:
    """Raises: ValueError: the options of one file do not fit what the model draws."""
    from fastddpm.audio import Audio
    from fastddpm.sampling.manifest import draws_images
    from fastddpm.storage.sequence_files import MOST_SHOWN

    if args.decode and sampler.decoder is None:
        raise ValueError("--decode is for a pipeline with a VAE, which this checkpoint does not have; leave it out")
    if args.decode and args.trajectory is not None:
        raise ValueError("--trajectory shows the states of the sampler, which --decode does not decode; omit one")
    if args.decode or draws_images(sampler) or (format == "npz" and args.trajectory is None):
        if format == "txt":
            raise ValueError("the format is txt, but the model's samples are images; use a .png, an .npz or a folder")
        return
    if sampler.medium is not None and args.trajectory is None:
        kind, suits = ("sounds", "grid") if isinstance(sampler.medium, Audio) else ("texts", "txt")
        if format != suits:
            suffixes = " or ".join(name for name, of in _FORMAT_OF_SUFFIX.items() if of in (suits, "npz"))
            raise ValueError(
                f"the model's samples are {kind}; want --out with the suffix {suffixes}, or a folder with --format "
                f"{'wav, npz' if suits == 'grid' else 'npz'} or webdataset"
            )
        if suits == "grid" and count > MOST_SHOWN:
            raise ValueError(
                f"{count} sounds are too many for one picture; want at most {MOST_SHOWN}, or a folder of WAV files"
            )
        return
    without = ", without --trajectory" * (args.trajectory is not None)
    if sampler.decoder is not None:
        raise ValueError(
            "the model's samples are latents, which the VAE of its pipeline turns into images; use --decode for "
            f"images (it needs diffusers), or --format npz for the latents{without}"
        )
    raise ValueError(
        f"the model's samples have the shape {sampler.shape}, which is not that of an image; use --format npz{without}"
    )


def draw_first(store: "ShardFolder", sampler: "Sampler") -> None:
    """Draw the spectrograms of the first samples."""
    import torch

    from fastddpm.audio import Audio
    from fastddpm.storage.sequence_files import PICTURE, save_sequences

    first = torch.from_numpy(np.stack(list(islice(chain.from_iterable(store.arrays()), _FIRST))))
    labels = None if store.classes is None else store.all_labels()[: len(first)].tolist()
    medium = Audio(store.manifest["sample_rate"])
    save_sequences(first, store.path / PICTURE, medium, labels, sampler.classes)
