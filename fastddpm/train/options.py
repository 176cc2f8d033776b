"""The options of a training run, and their checks."""

import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastddpm import ops
from fastddpm.core import checks
from fastddpm.core.names import TRAIN_ENGINES, TRAIN_PRECISIONS
from fastddpm.core.precision import Compute
from fastddpm.core.schedule import Schedule

OF_IMAGES = ("flip", "layers", "attention", "dropout")  # options that only images have
OF_SEQUENCES = ("frame", "kernel_size")
BROUGHT_BY_INIT = ("channels", "layers", "attention", "groups", "dropout", *OF_SEQUENCES)  # and the schedule
_EMBED = 64  # of the time and of a class, in a network for sequences
_GRID_STEPS = 100  # per sample of the grids
_MOST = 1 << 40  # steps, images per batch and so on
_MOST_EXAMPLES = 1 << 56  # of a run: the noise of each has an address
_WIDEST, _MOST_LAYERS = 1 << 16, 1 << 10  # of a U-Net


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run.

    Attributes:
        steps: number of optimiser steps.
        batch_size: images per step, summed over all processes.
        learning_rate: peak learning rate of AdamW: linear warm-up over `warmup` steps, then cosine decay to zero.
        warmup: None: 500, but at most a tenth of `steps`.
        ema: decay of the exponential moving average of the weights, which is what is saved and sampled. Step k uses
            (1 + k) / (10 + k) while that is smaller.
        weight_decay: of AdamW.
        grad_clip: largest norm of the gradient; inf: do not clip.
        flip: mirror half of the images left to right.
        channels: of each level of the U-Net; every level after the first halves both sides of an image, or the length
            of a sequence.
        layers: residual blocks per level.
        attention: levels with self-attention; level 0 has the full resolution.
        groups: of the group norms.
        dropout: in the residual blocks.
        frame, kernel_size: of a network for sequences: see `UNet1D`. Sequences do not use flip, layers, attention or
            dropout.
        label_dropout: share of the labels that are replaced by the null label, for classifier-free guidance (Ho &
            Salimans 2022, arXiv:2207.12598). A network of K classes then has one more embedding, K, the null label.
        seed: of the initial weights and all random numbers; 0 <= seed < 2^64.
        precision: "fp32", "tf32" (on a GPU), "bf16" (autocast), or "auto": the precision of the run that is resumed, or
            for a new run bf16 where the device computes it natively, else fp32. The weights, their average and the
            optimiser's state are always float32.
        engine: "eager"; "compiled": torch.compile, which takes a minute or more at the start; "compiled+graph": the
            same with CUDA graphs; "auto": "compiled" on a GPU, else "eager".
        log_every: steps between lines of the log.
        save_every: steps between checkpoints.
        sample_every: steps between grids of samples; 0: draw none. They are drawn less often where they would take more
            than about a tenth of the training, and are smaller in a short run. The last step always draws one.
        init: a checkpoint to start from. Its layout and schedule replace those of these options.
        schedule: the noise schedule, and what the network predicts: epsilon, x_0 or v. With variance_type
            "learned_range" it also returns the variance, and is trained by L_hybrid (arXiv:2102.09672, eq. 16).
    """

    steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 5e-4
    warmup: int | None = None
    ema: float = 0.999
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    flip: bool = False
    channels: tuple[int, ...] = (32, 64, 128)
    layers: int = 1
    attention: tuple[int, ...] = (2,)
    groups: int = 8
    dropout: float = 0.0
    frame: int = 1
    kernel_size: int = 5
    label_dropout: float = 0.0
    seed: int = 0
    precision: str = "auto"
    engine: str = "auto"
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 2000
    init: str | os.PathLike[str] | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def unet_config(self, shape: tuple[int, ...], classes: int | None = None) -> dict[str, Any]:
        """The configuration of the U-Net.

        Args:
            shape: of a sample, channels first: (C, H, W) of an image, or (C, L) of a sequence.
            classes: how many there are, with the null label; None: the network is not class-conditional.
        Raises: ValueError: an option is given that samples of this shape do not have.
        """
        others, kind = (OF_IMAGES, "images") if len(shape) == 2 else (OF_SEQUENCES, "sequences")
        for name in others:
            if (value := getattr(self, name)) != getattr(TrainOptions, name):
                raise ValueError(f"{name} is {value}, which is for {kind} only; leave it out")
        if len(shape) == 2 and self.schedule.learns_variance:
            raise ValueError(
                f"variance_type is {self.schedule.variance_type}, which is for images only; use fixed_small or "
                "fixed_large"
            )
        of_classes = {} if classes is None else {"num_class_embeds": classes}
        if len(shape) == 2:
            return of_classes | {
                "input_dim": shape[0],
                "sample_size": shape[1],
                "down_dims": self.channels,
                "n_groups": self.groups,
                "kernel_size": self.kernel_size,
                "frame": self.frame,
                "diffusion_step_embed_dim": _EMBED,
                "cond_predict_scale": True,
            }
        channels, height, width = shape
        levels = range(len(self.channels))
        _levels(self)  # checks the default, which is not checked for sequences
        down = ["AttnDownBlock2D" if i in self.attention else "DownBlock2D" for i in levels]
        return {
            "sample_size": height if height == width else (height, width),
            "in_channels": channels,
            "out_channels": 2 * channels if self.schedule.learns_variance else channels,
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            "down_block_types": tuple(down),
            "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
            "attention_head_dim": None,
            "norm_num_groups": self.groups,
            "dropout": self.dropout,
            **of_classes,
        }


def check_options(options: TrainOptions, device: torch.device | str | None) -> TrainOptions:
    """Check all that can be checked before the images are read.

    Args: device: as `train` takes it.
    Returns: the options, with numpy's numbers and arrays converted to Python's.
    Raises: ValueError: an option is not as `TrainOptions` says, the device does not support it, or it is given beside
        `init`, which brings its own.
    """
    if not isinstance(options, TrainOptions):
        raise ValueError(f"options is {checks.shown(options)}; want TrainOptions")
    if not isinstance(options.schedule, Schedule):
        raise ValueError(f"schedule is {checks.shown(options.schedule)}; want a Schedule")
    plain: dict[str, Any] = {"seed": checks.seed(options.seed), "flip": checks.flag("flip", options.flip)}
    for name in ("steps", "batch_size", "log_every", "save_every"):
        plain[name] = checks.whole(name, getattr(options, name), 1, _MOST)
    if plain["steps"] * plain["batch_size"] > _MOST_EXAMPLES:
        raise ValueError(
            f"{plain['steps']} steps of batch_size {plain['batch_size']} are too many; want at most 2^56 images in all"
        )
    plain["sample_every"] = checks.whole("sample_every", options.sample_every, 0, _MOST)
    if options.warmup is not None:
        plain["warmup"] = checks.whole("warmup", options.warmup, 0, _MOST)
    plain["learning_rate"] = checks.real("learning_rate", options.learning_rate, 0, above=True)
    plain["weight_decay"] = checks.real("weight_decay", options.weight_decay, 0)
    unlimited = isinstance(options.grad_clip, numbers.Real) and options.grad_clip == math.inf
    plain["grad_clip"] = math.inf if unlimited else checks.real("grad_clip", options.grad_clip, 0, above=True)
    for name in ("ema", "dropout", "label_dropout"):
        plain[name] = share = checks.real(name, getattr(options, name))
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; want a number, 0 <= {name} < 1")
    plain |= _layout(options)
    if options.init is not None:
        if not isinstance(options.init, str | os.PathLike) or isinstance(os.fspath(options.init), bytes):
            raise ValueError(f"init is {checks.shown(options.init)}; want the name of a folder or a hub id")
        plain["init"] = os.fspath(options.init)
    checks.one_of("precision", options.precision, TRAIN_PRECISIONS)
    checks.one_of("engine", options.engine, TRAIN_ENGINES)
    options = replace(options, **plain)
    if options.init is not None:
        _check_beside_init(options)
    elif options.schedule.variance_type == "learned":
        raise ValueError(
            "variance_type is 'learned': the network returns the variance itself, which is often negative for random "
            "weights; use learned_range, or start from a checkpoint that has variance_type 'learned' (init)"
        )
    check_can_sample(options)
    resolve_engine(options.engine, Compute.resolve(device, options.precision).device)
    return options


def _layout(options: TrainOptions) -> dict[str, Any]:
    """The checked options of the network's layout."""
    channels = _whole_numbers("channels", options.channels, 1, _WIDEST)
    if not channels:
        raise ValueError("channels is (); want one number per level, at least one")
    groups = checks.whole("groups", options.groups, 1)
    if any(width % groups for width in channels):
        widths = ", ".join(map(str, channels))
        raise ValueError(f"groups is {groups}; want a divisor of each of channels, {widths}")
    return {
        "channels": channels,
        "layers": checks.whole("layers", options.layers, 1, _MOST_LAYERS),
        "attention": options.attention if options.attention == TrainOptions.attention else _levels(options),
        "groups": groups,
        "frame": checks.whole("frame", options.frame, 1, _WIDEST),
        "kernel_size": checks.whole("kernel_size", options.kernel_size, 1, 255),
    }


def _levels(options: TrainOptions) -> tuple[int, ...]:
    """The levels with attention."""
    return _whole_numbers("attention", options.attention, 0, len(options.channels) - 1)


def resolve_engine(engine: str, device: torch.device) -> str:
    """The engine that "auto" stands for on a device.

    Raises: ValueError: the engine needs CUDA graphs, which the device does not have.
    """
    if engine == "auto":
        return "compiled" if ops.backend(device) == "triton" else "eager"
    if "graph" in engine and device.type != "cuda":
        raise ValueError(f"engine is {engine!r}, but '{device}' has no CUDA graphs; use 'eager' or 'compiled'")
    return engine


def check_can_sample(options: TrainOptions) -> None:
    """Raises: ValueError: a network trained with this schedule could not be sampled."""
    for steps in (None, grid_steps(options)):
        options.schedule.table(steps)


def warmup_steps(options: TrainOptions) -> int:
    """Steps until the learning rate reaches its peak."""
    return min(500, options.steps // 10) if options.warmup is None else options.warmup


def grid_steps(options: TrainOptions) -> int:
    """Steps per sample of the grids that a run draws."""
    return min(_GRID_STEPS, options.schedule.num_train_timesteps)


def _check_beside_init(options: TrainOptions) -> None:
    """Raises: ValueError: an option is given that the checkpoint `init` brings."""
    given, default = (
        {name: getattr(each, name) for name in BROUGHT_BY_INIT} | each.schedule.to_config()
        for each in (options, TrainOptions())
    )
    for name, value in given.items():
        if value != default.get(name):
            raise ValueError(
                f"{name} is {value!r}, but init brings its own layout and schedule; leave out one of the two"
            )


def _whole_numbers(name: str, values: Any, low: int, high: int) -> tuple[int, ...]:
    """A sequence or an array as a tuple. Raises: ValueError: it is none, or not all are whole numbers in this range."""
    is_list = isinstance(values, Sequence) or (isinstance(values, np.ndarray) and values.ndim == 1)
    if not is_list or not all(checks.is_whole(value) and low <= value <= high for value in values):
        raise ValueError(f"{name} is {checks.shown(values)}; want a list of whole numbers, each from {low} to {high}")
    return tuple(map(int, values))
