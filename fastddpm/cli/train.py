"""`fastddpm train`: train a model on images."""

import argparse
from pathlib import Path

from fastddpm.cli.options import add_device, add_network, number_list
from fastddpm.core.schedule import BETA_SCHEDULES, PREDICTION_TYPES, Schedule
from fastddpm.processes.distributed import ranks
from fastddpm.storage import datasets
from fastddpm.storage.files import check_writable
from fastddpm.train.options import TRAIN_ENGINES, TRAIN_PRECISIONS, TrainOptions, check_options
from fastddpm.train.trainer import train

SUMMARY = "train a model on images (Algorithm 1 of the DDPM paper)"
EPILOG = """
examples:
  fastddpm train fashion-mnist.npz --out runs/garments
  fastddpm train photographs/ --out runs/photographs --channels 64,128,256 --attention 1,2 --layers 2 --flip
  fastddpm train animals/ --out runs/animals --class-conditional    with one subfolder per class
  torchrun --nproc-per-node 8 -m fastddpm train photographs/ --out runs/photographs

DATA is an .npz with uint8 [N, H, W] or [N, H, W, C], an MNIST-format file (idx, gzipped or not), or a folder of images
of one size. The folder --out becomes a diffusers checkpoint, together with a log, a loss curve and samples. To resume
an interrupted run, give the same command again. Under torchrun the processes share each batch, with the same images
and noise as a single process.
"""

_OPTION_HELP = {  # a field of TrainOptions -> the text of its option
    "steps": "total number of optimiser steps",
    "batch_size": "images per step, over all processes",
    "learning_rate": "peak learning rate",
    "warmup": "steps until the peak (default: 500, but at most a tenth of --steps)",
    "ema": "decay of the averaged weights, which are the weights that are saved",
    "weight_decay": "weight decay of AdamW",
    "grad_clip": "maximum norm of the gradient",
    "flip": "mirror half of the images, at random",
    "channels": "channels of each U-Net level; each level after the first halves the resolution",
    "layers": "residual blocks per level",
    "attention": "levels with self-attention; 0 is the finest",
    "groups": "groups of the group norms",
    "dropout": "dropout rate in the residual blocks",
    "seed": "seed of the initial weights, the batches and the noise",
    "save_every": "steps between checkpoints",
    "log_every": "steps between log lines",
    "sample_every": "steps between sample grids",
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="an .npz, an MNIST-format file or a folder of images")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write the checkpoint, or the run to resume"
    )
    for name, text in _OPTION_HELP.items():
        _add_train_option(parser, name, text)
    schedule = TrainOptions().schedule
    parser.add_argument(
        "--beta-schedule",
        choices=BETA_SCHEDULES,
        default=schedule.beta_schedule,
        help="noise schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--timesteps",
        type=int,
        default=schedule.num_train_timesteps,
        metavar="T",
        help="length T of the noise schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--prediction",
        choices=PREDICTION_TYPES,
        default=schedule.prediction_type,
        help="what the network learns to predict (default: %(default)s)",
    )
    parser.add_argument("--class-conditional", action="store_true", help="condition the model on the classes of DATA")
    parser.add_argument(
        "--init", metavar="CHECKPOINT", help="start from this checkpoint's weights, with its layout and schedule"
    )
    add_network(
        parser,
        engines=TRAIN_ENGINES,
        precisions=TRAIN_PRECISIONS,
        auto_precision="as in the run to resume, otherwise chosen for the device",
    )
    add_device(parser)


def _add_train_option(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add the option of one field of TrainOptions, with the type and the default of the field."""
    default, flag = getattr(TrainOptions(), name), "--" + name.replace("_", "-")
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
    options = TrainOptions(
        **{name: getattr(args, name) for name in (*_OPTION_HELP, "precision", "engine", "init")},
        schedule=Schedule(
            beta_schedule=args.beta_schedule,
            num_train_timesteps=args.timesteps,
            prediction_type=args.prediction,
        ),
    )
    if Path(args.data).is_dir() and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(
            f"--out is {args.out}, a folder in DATA, {args.data}, where the run's own images would become training "
            "images; want a folder elsewhere"
        )
    with ranks(args.device) as group:
        prints = not args.quiet and group.rank == 0
        with group.agree():
            check_options(options, group.device)
            check_writable(args.out, folder=True, make=False)
            images = datasets.load_images(args.data, progress=prints)
            labels = datasets.load_labels(args.data, count=len(images)) if args.class_conditional else None
        out = train(images, args.out, options, labels=labels, device=group.device, progress=prints)
    if prints:
        print(f"{out}: trained for {options.steps} steps; now `fastddpm sample {out}`")
