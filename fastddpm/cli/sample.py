"""`fastddpm sample`: draw images, sounds or texts from a trained model, into one file or into a folder."""

import argparse
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastddpm.cli.conditions import add_conditions, condition_arguments, steps_of
from fastddpm.cli.labels import class_labels, parse_labels
from fastddpm.cli.options import (
    add_batch_size,
    add_checkpoint,
    add_device,
    add_network,
    add_parallel,
    add_seed,
    checkpoint_files,
    how_long,
    index_list,
)
from fastddpm.cli.outputs import (
    DEFAULT_OUT,
    check_what_is_drawn,
    destination,
    draw_first,
    format_of_medium,
    prints,
)
from fastddpm.cli.terminal import tell
from fastddpm.core.names import SAMPLERS, SHIPPED_CONDITIONAL
from fastddpm.storage.files import check_not_input, check_writable
from fastddpm.storage.indices import Indices

if TYPE_CHECKING:
    from torch import Tensor

    from fastddpm.processes.distributed import Ranks
    from fastddpm.sampling.sampler import Sampler

SUMMARY = "draw images, sounds or texts from a trained model"
EPILOG = """
examples:
  fastddpm sample                                          16 garments from the model fashion-mnist -> samples.png
  fastddpm sample google/ddpm-cifar10-32 --num-samples 64  a diffusers checkpoint from the Hugging Face Hub
  fastddpm sample runs/mine --sampler ddim --steps 50      a local folder; 50 deterministic steps instead of all T
  fastddpm sample --num-samples 8 --trajectory way.gif     also the states from noise to garments
  fastddpm sample runs/mine --class-labels trousers,bag    a class-conditional model
  fastddpm sample --class-labels 0-9 --guidance-scale 2    the bundled class-conditional model, fashion-mnist-classes
  fastddpm sample spoken-digits --class-labels 0-9 --guidance-scale 2 --out digits/ --format wav    ten WAV files
  fastddpm sample names --num-samples 20 --round           texts, printed one per line
  fastddpm sample --init garment.png --strength 0.5        variations of a picture
  fastddpm sample --num-samples 1 --parallel law           one garment, with fewer sequential network calls
  fastddpm sample --known garment.png --mask left.png      other right halves of a picture
  fastddpm sample runs/mine --indices 7,100-120 --out some.npz
  fastddpm sample runs/mine --num-samples 50000 --out samples/ --format webdataset
  torchrun --nproc-per-node 8 -m fastddpm sample runs/mine --num-samples 50000 --out samples/

Sample i of a seed is the same whatever else is drawn with it, up to the network's rounding. With
--batch-invariant the bits are the same, too.

A folder is written shard by shard. If the command is killed, run it again, with any number of processes: it draws the
samples that are missing, and the folder ends up with the files of an uninterrupted run.
"""

_DEFAULT_COUNT = 16
_MOST_LISTED = 10_000  # classes of which one sample each is drawn by default


def add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="draw samples 0 to N-1 (default: 16, or one for each class if --class-labels lists several)",
    )
    which.add_argument(
        "--indices", type=index_list, metavar="I,J-K", help="draw these samples instead, such as 5,7,100-120"
    )
    add_seed(parser, "the noise")
    parser.add_argument("--steps", type=int, metavar="S", help="take S steps over the T timesteps (default: T)")
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="ddpm",
        help="ddpm is the DDPM paper's sampler (default); ddim needs fewer steps",
    )
    parser.add_argument(
        "--eta", type=float, default=0.0, help="amount of noise in ddim; 0 is deterministic (default: %(default)s)"
    )
    parser.add_argument("--no-noise", action="store_true", help="omit sigma_t z, so that each step returns its mean")
    parser.add_argument(
        "--class-labels",
        metavar="L,M-N",
        help="numbers or names of classes for a class-conditional model, one per sample; a shorter list, such as 0-9, "
        "is repeated (default: every class in turn); without CHECKPOINT: of fashion-mnist-classes",
    )
    parser.add_argument(
        "--decode", action="store_true", help="turn the latents of a latent pipeline into images (needs diffusers)"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="a .png (one grid, or spectrograms), an .npz, a .txt (texts), or a folder (default: samples.png; texts "
        "are printed)",
    )
    parser.add_argument(
        "--trajectory", metavar="PATH", help="also draw the states from noise to the samples, as a .gif or a .png"
    )
    parser.add_argument(
        "--format",
        choices=tuple(DEFAULT_OUT),
        help="output format (default: from --out; for a folder: png, or wav for sounds)",
    )
    parser.add_argument("--shard-size", type=int, metavar="K", help="samples per shard of a folder (default: a batch)")
    parser.add_argument(
        "--json-log", metavar="FILE", help="append a folder's progress to FILE, one JSON line every ten seconds"
    )
    add_parallel(parser)
    add_batch_size(parser, "samples")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="give each sample the same bits whatever is drawn with it"
    )
    add_conditions(parser)
    add_network(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from fastddpm.processes.distributed import ranks

    if args.batch_invariant and args.batch_size is not None:
        raise ValueError(
            "--batch-size does not apply with --batch-invariant, which sets the batch size; leave one of them out"
        )
    if args.checkpoint is None and (args.class_labels is not None or args.guidance_scale is not None):
        args.checkpoint = SHIPPED_CONDITIONAL
    out, format, into_folder = destination(args.out, args.format)
    with ranks(args.device) as group:
        with group.agree():
            count = _DEFAULT_COUNT if args.num_samples is None else args.num_samples
            samples = Indices.of(count if args.indices is None else args.indices)
            if not samples:
                raise ValueError("no samples were requested; give --num-samples or --indices")
            if into_folder:
                _check_options_of_a_folder(args)
            else:
                _check_options_of_one_file(args, samples, out, group)
            if args.out is not None:
                check_writable(out, folder=into_folder, make=False)
            sampler = _load_sampler(args, out, into_folder, group)
            if args.out is None and not prints(args, sampler):
                check_writable(out, folder=into_folder, make=False)
            if args.class_labels is not None and args.num_samples is None and args.indices is None:
                classes = len(parse_labels(args.class_labels, sampler.classes))
                samples = Indices.of(classes if 1 < classes <= _MOST_LISTED else _DEFAULT_COUNT)
            format = format_of_medium(args, sampler, format)
            if not into_folder:
                check_what_is_drawn(args, sampler, format, len(samples))
            conditions = condition_arguments(args, sampler, len(samples))
            given = "class_labels" in conditions.get("model_kwargs", {}) and args.class_labels is None
            labels = None if given else class_labels(args.class_labels, sampler, samples)
            sampler.schedule.table(args.steps, sampler=args.sampler, eta=args.eta, noise=not args.no_noise)  # checks
        if not args.quiet and group.rank == 0:
            tell(_what_is_drawn(args, sampler, samples, out))
        if into_folder:
            _sample_into_folder(args, sampler, samples, labels, conditions, out, format, group)
        else:
            _sample_into_file(args, sampler, samples, labels, conditions, out, format)


def _load_sampler(args: argparse.Namespace, out: Path, into_folder: bool, group: "Ranks") -> "Sampler":
    """The sampler; a folder that is continued keeps its precision unless --precision is given."""
    from fastddpm.sampling import job
    from fastddpm.sampling.sampler import Sampler

    precision = args.precision
    if into_folder and precision == "auto":
        precision = job.previous_manifest(out).get("precision", precision)
    return Sampler.from_pretrained(
        args.checkpoint,
        variant=args.variant,
        device=group.device,
        precision=precision,
        engine=args.engine,
        batch_invariant=args.batch_invariant,
    )


def _what_is_drawn(args: argparse.Namespace, sampler: "Sampler", samples: Indices, out: Path) -> str:
    steps = steps_of(args, sampler)
    size = " x ".join(map(str, sampler.shape))
    where = f"{sampler.precision} on {sampler.device}"
    long = how_long(sampler, len(samples) * steps * (1 if args.guidance_scale is None else 2))
    into = "" if prints(args, sampler) else f", into {out}"
    return f"drawing {len(samples)} samples of {size} in {steps} steps, {where}{into}{long}"


def _sample_into_folder(
    args: argparse.Namespace,
    sampler: "Sampler",
    samples: Indices,
    labels: Indices | None,
    conditions: dict[str, Any],
    out: Path,
    format: str,
    group: "Ranks",
) -> None:
    from fastddpm.sampling import job

    began = time.monotonic()
    store = job.sample_to(
        out,
        sampler,
        samples,
        format=format,
        class_labels=labels,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        seed=args.seed,
        steps=args.steps,
        sampler=args.sampler,
        eta=args.eta,
        noise=not args.no_noise,
        parallel=args.parallel,
        window=args.window,
        progress=not args.quiet,
        json_log=args.json_log,
        **conditions,
    )
    if format == "wav" and group.rank == 0:
        draw_first(store, sampler)
    if not args.quiet and group.rank == 0:
        print(f"{out}: all {len(store.samples)} samples are done; {time.monotonic() - began:.1f} s this time")


def _sample_into_file(
    args: argparse.Namespace,
    sampler: "Sampler",
    samples: Indices,
    labels: Indices | None,
    conditions: dict[str, Any],
    out: Path,
    format: str,
) -> None:
    """Draw all samples in memory, then write one file: a grid or an .npz."""
    import torch

    from fastddpm.cli.trajectory import Trajectory
    from fastddpm.sampling.manifest import draws_images
    from fastddpm.sampling.parallel import Rounds
    from fastddpm.storage import class_grid, images, sequence_files

    classes = None if labels is None else labels.take(np.arange(len(samples)) % len(labels)).tolist()
    trajectory = None
    if args.trajectory is not None:
        trajectory = Trajectory(sampler, samples, classes, steps_of(args, sampler), args.trajectory)
    if args.decode:  # whether the VAE can be loaded and run is found out before the work
        _decoded(sampler, torch.zeros(1, *sampler.shape, dtype=torch.float32, device="cpu"), 1)
    began, rounds = time.monotonic(), None if args.parallel == "off" and args.window is None else Rounds()
    x = sampler.sample(
        samples,
        output="uint8" if draws_images(sampler) else "float",
        class_labels=classes,
        batch_size=args.batch_size,
        seed=args.seed,
        steps=args.steps,
        sampler=args.sampler,
        eta=args.eta,
        noise=not args.no_noise,
        parallel=args.parallel,
        window=args.window,
        rounds=rounds,
        progress=not args.quiet,
        callback=trajectory,
        **conditions,
    )
    seconds = time.monotonic() - began
    if args.decode and not args.quiet:
        tell(f"decoding {len(x)} latents")
    pictures = _decoded(sampler, x, args.batch_size) if args.decode else x
    if prints(args, sampler):
        print("\n".join(sampler.medium.decode(x)))  # type: ignore[union-attr]
    elif sampler.medium is not None and format in ("grid", "txt"):
        sequence_files.save_sequences(x, out, sampler.medium, classes, sampler.classes)
    elif format == "grid":
        class_grid.save_samples(pictures, out, classes, sampler.classes)
    else:
        images.save_npz(pictures, out)
    if not args.quiet and not prints(args, sampler):
        in_rounds = "" if rounds is None else f"; {rounds}"
        print(f"{out}: {len(x)} samples in {seconds:.1f} s, {len(x) / seconds:.3g} per second{in_rounds}")
    if trajectory is not None:
        trajectory.save(x)
        if not args.quiet:
            print(f"{args.trajectory}: {trajectory.about}")


def _decoded(sampler: "Sampler", latents: "Tensor", batch_size: int | None) -> "Tensor":
    """Latents as uint8 images [N, H, W, C]."""
    from fastddpm.diffusers.decoding import decode
    from fastddpm.storage import images

    assert sampler.decoder is not None
    size = batch_size or sampler.default_batch_size()
    return images.to_uint8(decode(sampler.decoder, latents, batch_size=size, device=sampler.device))


def _check_options_of_a_folder(args: argparse.Namespace) -> None:
    for option, is_given in (
        ("--decode", args.decode),
        ("--trajectory", args.trajectory is not None),
        ("--round", args.round),
    ):
        if is_given:
            way_out = f"use --out x.{'txt' if option == '--round' else 'png'}, or --out x.npz"
            raise ValueError(f"{option} is for one file, not for a folder; {way_out}")


def _check_options_of_one_file(args: argparse.Namespace, samples: Indices, out: Path, group: "Ranks") -> None:
    from fastddpm.core.noise import MOST_SAMPLES
    from fastddpm.storage.trajectory import SUFFIXES

    way_out = f"write a folder instead: --out {out.stem or 'samples'}/ --format npz"
    if group.size > 1:
        raise ValueError(f"{group.size} processes cannot write one file, {out}; {way_out}")
    for option, value in (("--shard-size", args.shard_size), ("--json-log", args.json_log)):
        if value is not None:
            raise ValueError(f"{option} does not apply to one file, {out}; {way_out}")
    if args.round and (args.parallel != "off" or args.window is not None):
        raise ValueError("--round requires sequential steps; leave out --round, or --parallel and --window")
    if len(samples) > MOST_SAMPLES:
        raise ValueError(f"{len(samples)} samples are too many for one file, {out}; {way_out}")
    if args.decode and find_spec("diffusers") is None:
        raise ValueError("--decode needs diffusers; install it: pip install diffusers")
    if args.trajectory is not None:
        if Path(args.trajectory).suffix.lower() not in SUFFIXES:
            raise ValueError(f"--trajectory is {args.trajectory}; want a .gif or a .png file")
        check_writable(args.trajectory)
        if os.path.realpath(args.trajectory) == os.path.realpath(out):
            raise ValueError(f"--trajectory and --out are both {out}; want two files")
    for option, path in (("--out", out), ("--trajectory", args.trajectory)):
        if path is not None and os.path.isfile(path):
            check_not_input(option, path, *checkpoint_files(args.checkpoint))
