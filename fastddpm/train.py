"""Algorithm 1 (Ho et al. 2020, arXiv:2006.11239): train eps_theta on images noised in one shot.

Everything random in step k (which images, flips, t, eps) is a function of (seed, k) alone, so a run that was killed and
resumed takes the same steps as one that was not.
"""

import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import checkpoint, images, noise, ops
from fastddpm.files import atomic
from fastddpm.layout import channels_last
from fastddpm.sampler import Sampler, device_and_dtype
from fastddpm.schedule import Schedule
from fastddpm.unet import UNet2D

STATE = "training.pt"  # beside the checkpoint: what a resumed run needs
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainOptions:
    """What to train, and how.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images per step.
        learning_rate: peak of AdamW's rate: linear warm-up over `warmup` steps, then cosine decay to zero.
        ema: decay of the exponential moving average of the weights, which is what is saved and sampled; early in a run
            (1 + k) / (10 + k) where that is smaller.
        grad_clip: largest norm of the gradient.
        flip: mirror half of the images left to right.
        channels: of the U-Net's levels; every level after the first halves the image's sides.
        layers: residual blocks per level.
        attention: levels with self-attention, 0 the finest.
        groups: of the group norms.
        dropout: in the residual blocks.
        seed: of initial weights and everything random.
        precision: "auto" (bf16 where the device computes it natively), "fp32" or "bf16"; weights are always float32.
        save_every, sample_every: steps between checkpoints and sample grids.
        schedule: the noise schedule, eps prediction.
    """

    steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 5e-4
    warmup: int = 500
    ema: float = 0.999
    grad_clip: float = 1.0
    flip: bool = False
    channels: tuple[int, ...] = (32, 64, 128)
    layers: int = 1
    attention: tuple[int, ...] = (2,)
    groups: int = 8
    dropout: float = 0.0
    seed: int = 0
    precision: str = "auto"
    save_every: int = 1000
    sample_every: int = 2000
    schedule: Schedule = field(default_factory=Schedule)

    def unet_config(self, height: int, width: int, channels: int) -> dict[str, Any]:
        """The U-Net's configuration (diffusers' names) for images of this size."""
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
        }


def train(
    data: np.ndarray,
    out: str | os.PathLike[str],
    options: TrainOptions,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train on images and leave a diffusers checkpoint of the averaged weights in the folder `out`.

    A folder that holds an unfinished run with the same options is resumed. Beside the checkpoint: `training.pt` (to
    resume), `log.jsonl` (step, loss, seconds) and `samples/` (grids as the run goes).

    Args:
        data: [N, H, W, C] uint8; H and W multiples of 2^(levels - 1).
        out: folder to write.
    Returns: out, as a path.
    Raises: ValueError: data or an option is not as above, or `out` holds a run with other options.
    """
    from tqdm import tqdm

    height, width, channels = _checked(data, options)
    device, dtype = device_and_dtype(device, options.precision)
    torch.manual_seed(options.seed)
    net = UNet2D(**options.unet_config(height, width, channels)).to(device)
    out = Path(out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, fused=True)
    start, seconds = _resume(out, options, net, ema, optimizer)

    pixels = channels_last(torch.from_numpy(data).movedim(-1, 1)).to(device)
    table = options.schedule.noising_table().to(device)
    began = time.monotonic() - seconds
    bar = tqdm(total=options.steps, initial=start, desc="train", unit="step", disable=not progress)
    net.train()
    for k in range(start, options.steps):
        x_0, t, address = _batch(pixels, k, options)
        x_t = ops.noising(x_0, t, address, table)
        eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.mse_loss(net(x_t, t).float(), eps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), options.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(k, options)
        optimizer.step()
        _average(ema, net, min(options.ema, (1 + k) / (10 + k)))

        bar.update()
        done = k + 1
        if done % 50 == 0 or done == options.steps:
            value = loss.item()
            if not value < float("inf"):
                raise ValueError(
                    f"the loss is {value} at step {done}; lower learning_rate ({options.learning_rate}), or use "
                    f"precision fp32; {out} keeps the last checkpoint"
                )
            bar.set_postfix(loss=f"{value:.4f}")
            _log(out, {"step": done, "loss": value, "seconds": time.monotonic() - began})
        if done % options.save_every == 0 or done == options.steps:
            _save(out, options, net, ema, optimizer, done, time.monotonic() - began)
        if done % options.sample_every == 0 or done == options.steps:
            sampler = Sampler(ema, options.schedule, device=device)
            steps = min(100, options.schedule.num_train_timesteps)
            grid = sampler.sample(64, seed=options.seed, steps=steps, output="uint8", progress=False)
            images.save_grid(grid, out / "samples" / f"step-{done:07d}.png")
    bar.close()
    return out


def _batch(pixels: Tensor, k: int, options: TrainOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and noise addresses of step k; the images come in a new order in every epoch."""
    size, total = options.batch_size, len(pixels)
    seen = np.arange(k * size, (k + 1) * size)  # running numbers of the examples, the noise standard's sample index
    epoch, place = np.divmod(seen, total)
    index = np.empty(size, np.int64)
    for e in np.unique(epoch):
        order = np.random.default_rng((options.seed, 0, e)).permutation(total)
        index[epoch == e] = order[place[epoch == e]]
    draw = np.random.default_rng((options.seed, 1, k))
    t = torch.from_numpy(draw.integers(options.schedule.num_train_timesteps, size=size)).to(pixels.device)
    x_0 = pixels[torch.from_numpy(index).to(pixels.device)]
    if options.flip:
        mirrored = torch.from_numpy(draw.random(size) < 0.5).to(pixels.device)
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    return channels_last(x_0), t, noise.address(options.seed, torch.from_numpy(seen), pixels.device)


def _rate(k: int, options: TrainOptions) -> float:
    """Share of the peak learning rate in step k."""
    left = (k - options.warmup) / max(options.steps - options.warmup, 1)
    return (k + 1) / options.warmup if k < options.warmup else 0.5 + 0.5 * math.cos(math.pi * left)


@torch.no_grad()
def _average(ema: nn.Module, net: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def _checked(data: np.ndarray, options: TrainOptions) -> tuple[int, int, int]:
    if data.dtype != np.uint8 or data.ndim != 4 or not len(data):
        raise ValueError(f"data is {data.dtype} {data.shape}; want uint8 [N, H, W, C] with at least one image")
    for name in ("steps", "batch_size", "save_every", "sample_every", "layers"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; want a whole number, at least 1")
    if options.schedule.prediction_type != "epsilon":
        raise ValueError(f"prediction_type is {options.schedule.prediction_type!r}; the trainer predicts epsilon")
    height, width, channels = data.shape[1:]
    factor = 1 << (len(options.channels) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"images are {height} x {width}; with {len(options.channels)} levels both sides must be multiples of "
            f"{factor}: crop or resize them, or give fewer channels"
        )
    return height, width, channels


def _described(options: TrainOptions) -> str:
    """What must not change when a run is resumed."""
    described = asdict(options) | {"schedule": options.schedule.to_config()}
    for free in ("save_every", "sample_every", "precision"):
        del described[free]
    return json.dumps(described, sort_keys=True)


def _resume(
    out: Path, options: TrainOptions, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Steps done and seconds spent, after loading the state in `out`; (0, 0) where there is none."""
    if not (out / STATE).exists():
        return 0, 0.0
    state = torch.load(out / STATE, map_location="cpu", weights_only=True)
    if state["options"] != _described(options):
        raise ValueError(f"{out} holds a run with other options: {state['options']}; give those, or another folder")
    net.load_state_dict(state["net"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    lines = (out / LOG).read_text().splitlines() if (out / LOG).exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    with atomic(out / LOG) as file:
        file.write("".join(line + "\n" for line in kept).encode())
    return state["step"], state["seconds"]


def _save(
    out: Path,
    options: TrainOptions,
    net: nn.Module,
    ema: UNet2D,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    checkpoint.save(out, ema.config, ema.state_dict(), options.schedule)
    state = {
        "step": step,
        "seconds": seconds,
        "options": _described(options),
        "net": net.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic(out / STATE) as file:
        torch.save(state, file)


def _log(out: Path, record: dict[str, Any]) -> None:
    with (out / LOG).open("a") as file:
        file.write(json.dumps(record) + "\n")
