"""The options of a training run, and their checks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastddpm import ops
from fastddpm.core import checks
from fastddpm.core.precision import Compute
from fastddpm.core.schedule import Schedule

TRAIN_PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # fp16 gradients would need a scaled loss
TRAIN_ENGINES = ("auto", "eager", "compiled", "compiled+graph")
_GRID_STEPS = 100  # per sample of the grids


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
        channels: of each level of the U-Net; every level after the first halves both sides of the image.
        layers: residual blocks per level.
        attention: levels with self-attention; level 0 has the full resolution.
        groups: of the group norms.
        dropout: in the residual blocks.
        seed: of the initial weights and all random numbers; 0 <= seed < 2^64.
        precision: "fp32", "tf32" (on a GPU), "bf16" (autocast), or "auto": the precision of the run that is resumed, or
            for a new run bf16 where the device computes it natively, else fp32. The weights, their average and the
            optimiser's state are always float32.
        engine: "eager"; "compiled": torch.compile, which takes a minute or more at the start; "compiled+graph": the
            same with CUDA graphs; "auto": "compiled" on a GPU, else "eager".
        log_every: steps between lines of the log.
        save_every: steps between checkpoints.
        sample_every: steps between grids of samples.
        init: a checkpoint to start from. Its layout and schedule replace those of these options.
        schedule: the noise schedule, and what the network predicts: epsilon, x_0 or v.
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
    seed: int = 0
    precision: str = "auto"
    engine: str = "auto"
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 2000
    init: str | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def unet_config(self, height: int, width: int, channels: int, classes: int | None = None) -> dict[str, Any]:
        """The configuration of the U-Net, in diffusers' names, for images of this size and this number of classes."""
        levels = range(len(self.channels))
        down = ["AttnDownBlock2D" if i in self.attention else "DownBlock2D" for i in levels]
        return {
            "sample_size": height if height == width else (height, width),
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            "down_block_types": tuple(down),
            "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
            "attention_head_dim": None,
            "norm_num_groups": self.groups,
            "dropout": self.dropout,
        } | ({} if classes is None else {"num_class_embeds": classes})


def check_options(options: TrainOptions, device: torch.device | str | None) -> TrainOptions:
    """Check all that can be checked before the images are read.

    Args: device: as `train` takes it.
    Returns: the options, with numpy's numbers converted to Python's.
    Raises: ValueError: an option is not as `TrainOptions` says, the device does not support it, or it is given beside
        `init`, which brings its own.
    """

    def require(name: str, valid: Callable[[Any], Any], wanted: str) -> None:
        value = getattr(options, name)
        if not valid(value):
            raise ValueError(f"{name} is {value!r}; want {wanted}")

    require("schedule", lambda schedule: isinstance(schedule, Schedule), "a Schedule")
    if options.init is not None:
        _check_init(options)
    plain: dict[str, Any] = {"seed": checks.seed(options.seed)}
    for name in ("steps", "batch_size", "log_every", "save_every", "sample_every", "layers", "groups"):
        plain[name] = checks.whole(name, getattr(options, name), 1)
    if options.warmup is not None:
        require("warmup", lambda warmup: _is_whole_from(0, warmup), "a whole number, at least 0, or none")
        plain["warmup"] = int(options.warmup)
    require("learning_rate", lambda rate: checks.is_real(rate) and rate > 0, "a finite number > 0")
    require("weight_decay", lambda decay: checks.is_real(decay) and decay >= 0, "a finite number >= 0")
    require("grad_clip", lambda norm: _is_real_or_inf(norm) and norm > 0, "a number > 0; inf: do not clip")
    for name in ("ema", "dropout"):
        require(name, lambda share: checks.is_real(share) and 0 <= share < 1, f"a number, 0 <= {name} < 1")
    for name in ("learning_rate", "weight_decay", "grad_clip", "ema", "dropout"):
        value = getattr(options, name)
        plain[name] = value if isinstance(value, int) else float(value)
    require("flip", lambda flip: isinstance(flip, bool), "True or False")
    require("channels", lambda widths: widths and _are_whole(widths, 1), "whole numbers > 0, one per level")
    levels = len(options.channels)
    require("attention", lambda at: _are_whole(at, 0, levels), f"levels, each from 0 to {levels - 1}")
    for name in ("channels", "attention"):
        plain[name] = type(getattr(options, name))(map(int, getattr(options, name)))
    divisor = f"a divisor of each of channels, {', '.join(map(str, options.channels))}"
    require("groups", lambda groups: not any(width % groups for width in options.channels), divisor)
    checks.one_of("precision", options.precision, TRAIN_PRECISIONS)
    checks.one_of("engine", options.engine, TRAIN_ENGINES)
    check_can_sample(options)
    resolve_engine(options.engine, Compute.resolve(device, options.precision).device)
    return replace(options, **plain)


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


def _check_init(options: TrainOptions) -> None:
    """Raises: ValueError: init is not a name, or an option is given that the checkpoint brings."""
    if not isinstance(options.init, str):
        raise ValueError(f"init is {options.init!r}; want the name of a folder or a hub id")
    given, default = (
        {name: getattr(each, name) for name in ("channels", "layers", "attention", "groups", "dropout")}
        | each.schedule.to_config()
        for each in (options, TrainOptions())
    )
    for name, value in given.items():
        if value != default.get(name):
            raise ValueError(
                f"{name} is {value!r}, but init brings its own layout and schedule; leave out one of the two"
            )


def _is_whole_from(low: int, value: Any, end: float = math.inf) -> bool:
    return checks.is_whole(value) and low <= value < end


def _are_whole(values: Any, low: int, end: float = math.inf) -> bool:
    return isinstance(values, tuple | list) and all(_is_whole_from(low, value, end) for value in values)


def _is_real_or_inf(value: Any) -> bool:
    return checks.is_real(value) or (isinstance(value, float) and value == math.inf)
