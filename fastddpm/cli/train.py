"""`fastddpm train`: train a model on images or sequences."""

import argparse
import os
import shlex
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.options import add_device, add_network, number_list
from fastddpm.core.names import (
    AUDIO_CODES,
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TEXT_CODES,
    TRAIN_ENGINES,
    TRAIN_PRECISIONS,
    TRAIN_VARIANCE_TYPES,
)
from fastddpm.storage.files import check_writable

if TYPE_CHECKING:
    import numpy as np

    from fastddpm.train.options import TrainOptions

SUMMARY = "train a model on images, sounds or texts (Algorithm 1 of the DDPM paper)"
EPILOG = """
examples:
  fastddpm train fashion-mnist.npz --out runs/garments
  fastddpm train photographs/ --out runs/photographs --channels 64,128,256 --attention 1,2 --layers 2 --flip
  fastddpm train animals/ --out runs/animals --class-conditional    with one subfolder per class
  fastddpm train animals/ --out runs/guided --class-conditional --label-dropout 0.1    for classifier-free guidance
  fastddpm train digits.npz --out runs/digits --class-conditional --code spectrogram --prediction sample    sounds
  fastddpm train names.txt --out runs/names --channels 128 --kernel-size 5 --prediction sample    texts, one per line
  torchrun --nproc-per-node 8 -m fastddpm train photographs/ --out runs/photographs

DATA is an .npz or .npy with uint8 [N, H, W] or [N, H, W, C] (FILE.npz:ARRAY names the array), an MNIST-format file
(idx, gzipped or not), or images of one size in a folder, a .zip or a .tar. Sequences are an .npz with floats or int16
[N, L] or [N, C, L] (with an array sample_rate they are waveforms), a folder of WAV files, or a .txt with one text per
line. The folder --out becomes a diffusers checkpoint, together with a log, a loss curve and samples. To resume an
interrupted run, give the same command again. To train a finished run further, start a new run in another folder with
--init FOLDER. Under torchrun the processes share each batch, with the same images and noise as a single process.
"""

_OPTIONS: dict[str, tuple[Any, str]] = {  # a field of TrainOptions -> its default there, and the text of its option
    "steps": (20_000, "total number of optimiser steps"),
    "batch_size": (128, "images per step, over all processes"),
    "learning_rate": (5e-4, "peak learning rate"),
    "warmup": (None, "steps until the peak (default: 500, but at most a tenth of --steps)"),
    "ema": (0.999, "decay of the averaged weights, which are the weights that are saved"),
    "weight_decay": (0.01, "weight decay of AdamW"),
    "grad_clip": (1.0, "maximum norm of the gradient"),
    "flip": (False, "mirror half of the images, at random"),
    "channels": ((32, 64, 128), "channels of each U-Net level; each level after the first halves the resolution"),
    "layers": (1, "residual blocks per level (images)"),
    "attention": ((2,), "levels with self-attention; 0 is the finest (images)"),
    "groups": (8, "groups of the group norms"),
    "dropout": (0.0, "dropout rate in the residual blocks (images)"),
    "frame": (1, "consecutive elements merged into one position of the network (sequences)"),
    "kernel_size": (5, "kernel size of the convolutions, odd (sequences)"),
    "label_dropout": (0.0, "share of the labels that are dropped, for classifier-free guidance, such as 0.1"),
    "seed": (0, "seed of the initial weights, the batches and the noise"),
    "save_every": (1000, "steps between checkpoints"),
    "log_every": (50, "steps between log lines"),
    "sample_every": (
        2000,
        "steps between sample grids, or more if they would take over a tenth of the time; 0: none",
    ),
}
_FREE = {
    "code": None,
    "class_conditional": False,
    "engine": "auto",
    "precision": "auto",
    "device": None,
    "quiet": False,
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images or sequences: an .npz, .npy, .txt or MNIST-format file, a folder, .zip or .tar",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write the checkpoint, or the run to resume"
    )
    for name, (default, text) in _OPTIONS.items():
        _add_train_option(parser, _flag(name), default, text)
    parser.add_argument(
        "--beta-schedule",
        choices=BETA_SCHEDULES,
        default="linear",
        help="noise schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--timesteps",
        type=int,
        default=1000,
        metavar="T",
        help="length T of the noise schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--prediction",
        choices=PREDICTION_TYPES,
        default="epsilon",
        help="what the network learns to predict (default: %(default)s)",
    )
    parser.add_argument(
        "--variance-type",
        choices=TRAIN_VARIANCE_TYPES,
        default="fixed_small",
        help="variance of the reverse process; with learned_range the network returns it too (default: %(default)s)",
    )
    parser.add_argument(
        "--code",
        choices=(*TEXT_CODES, *AUDIO_CODES),
        help="encoding of sounds (waveform, the default, or spectrogram) or texts (bits, the default, or embeddings)",
    )
    parser.add_argument("--class-conditional", action="store_true", help="condition the model on the classes of DATA")
    parser.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help="start from this checkpoint's weights, with its layout and schedule: a folder, a hub id or fashion-mnist",
    )
    add_network(
        parser,
        engines=TRAIN_ENGINES,
        precisions=TRAIN_PRECISIONS,
        auto_precision="as in the run to resume, otherwise chosen for the device",
    )
    add_device(parser)


def _add_train_option(parser: argparse.ArgumentParser, flag: str, default: Any, text: str) -> None:
    """Add the option of one field of TrainOptions, of the type of its default."""
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=text)
    elif isinstance(default, tuple):
        shown = ",".join(map(str, default))
        parser.add_argument(flag, type=number_list, default=default, metavar="I,J", help=f"{text} (default: {shown})")
    elif default is None:
        parser.add_argument(flag, type=int, metavar="X", help=text)
    else:
        parser.add_argument(flag, type=type(default), default=default, metavar="X", help=f"{text} (default: {default})")


def run(args: argparse.Namespace) -> None:
    from fastddpm.core.schedule import Schedule
    from fastddpm.processes.distributed import AgreedError, ranks
    from fastddpm.storage import datasets, sequences
    from fastddpm.train.initial import load_initial
    from fastddpm.train.options import TrainOptions, check_options
    from fastddpm.train.state import LongerRunError
    from fastddpm.train.trainer import train

    options = TrainOptions(
        **{name: getattr(args, name) for name in (*_OPTIONS, "precision", "engine", "init")},
        schedule=Schedule(
            beta_schedule=args.beta_schedule,
            num_train_timesteps=args.timesteps,
            prediction_type=args.prediction,
            variance_type=args.variance_type,
        ),
    )
    with ranks(args.device) as group:
        prints = not args.quiet and group.rank == 0
        labels = classes = medium = None
        with group.agree():
            check_options(options, group.device)
            check_writable(args.out, folder=True, make=False)
            _check_apart(args.data, args.out)
            if sequences.is_sequences(args.data):
                like = None if args.init is None else load_initial(args.init, Path(args.out)).medium
                if like is not None and args.code not in (None, like.code):
                    raise ValueError(f"--code is {args.code}, but --init brings its own, {like.code}; leave --code out")
                data, medium = sequences.load_sequences(args.data, code=args.code, like=like)
                options = _without_clipping(options, data)
            elif args.code is not None:
                raise ValueError(f"--code is {args.code}, but {args.data} are images; leave it out")
            else:
                data = datasets.load_images(args.data, progress=prints)
            if args.class_conditional:
                labels = datasets.load_labels(args.data, count=len(data))
                classes = datasets.load_classes(args.data)
        try:
            train(
                data,
                args.out,
                options,
                labels=labels,
                classes=classes,
                medium=medium,
                device=group.device,
                progress=prints,
            )
        except ValueError as error:
            cause = error.__cause__ if isinstance(error, AgreedError) else error
            if isinstance(cause, LongerRunError):
                raise ValueError(f"{cause}; the command is: {_command_to_train_on(args, cause.more)}") from error
            raise
    if prints:
        print(f"{args.out}: trained for {options.steps} steps; now `fastddpm sample {shlex.quote(_path(args.out))}`")


def _without_clipping(options: "TrainOptions", data: "np.ndarray") -> "TrainOptions":
    """The options, with a schedule that does not clip x_0 if data are not within [-1, 1], such as embeddings."""
    if options.init is not None or data.dtype.kind != "f" or max(-data.min(), data.max()) <= 1:
        return options
    return replace(options, schedule=replace(options.schedule, clip_sample=False))


def _check_apart(data: str, out: str) -> None:
    """Raises: ValueError: the run would write over DATA, or write images into it that it would later train on."""
    from fastddpm.storage.datasets import split_array
    from fastddpm.train.run_folder import WRITTEN

    held = split_array(data)[0]
    for place in (Path(out), *(Path(out, name) for name in WRITTEN)):
        if os.path.exists(held) and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(held)):
            raise ValueError(
                f"--out is {out}, where the run would write {place}, in DATA, {data}; want a folder elsewhere"
            )


def _command_to_train_on(args: argparse.Namespace, more: int) -> str:
    """The command for a run of `more` steps that starts from the run in --out, with the same options."""
    from fastddpm.train.options import BROUGHT_BY_INIT

    names = (os.path.abspath(args.out) + suffix for suffix in chain(["-more"], (f"-more-{i}" for i in count(2))))
    out = next(name for name in names if not os.path.lexists(name))
    out = out if os.path.isabs(args.out) else os.path.relpath(out)
    data, init, out = map(_path, (args.data, args.out, out))
    words = ["fastddpm", "train", data, "--init", init, "--out", out, "--steps", str(more)]
    defaults = {name: default for name, (default, _) in _OPTIONS.items() if name not in ("steps", *BROUGHT_BY_INIT)}
    for name, default in (defaults | _FREE).items():
        value = getattr(args, name)
        if value != default:
            words += [_flag(name)] if value is True else [_flag(name), str(value)]
    return shlex.join(words)


def _path(name: str) -> str:
    """A path as a command takes it: one that starts with a hyphen would be an option."""
    return f"./{name}" if name.startswith("-") else name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
