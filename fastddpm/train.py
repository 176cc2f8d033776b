"""Algorithm 1 (Ho et al. 2020, arXiv:2006.11239): train eps_theta on images noised in one shot.

Everything random in step k (which images, flips, t, eps, dropout) is a function of (seed, k) alone, so a run that was
killed and resumed takes the same steps as one that was not.
"""

import copy
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import checkpoint, images, noise, ops
from fastddpm.engine import PRECISIONS
from fastddpm.files import atomic, check_writable
from fastddpm.layout import channels_last
from fastddpm.sampler import Sampler, device_and_precision
from fastddpm.schedule import Schedule
from fastddpm.unet import UNet2D

STATE = "training.pt"  # beside the checkpoint: what a resumed run needs
LOG = "log.jsonl"
LOG_EVERY = 50  # steps; reading the loss makes a GPU wait
TRAINED = ("auto", "fp32", "bf16")  # gradients in fp16 would need their loss scaled
GRID_STEPS = 100  # of the sample grids


@dataclass(frozen=True)
class TrainOptions:
    """What to train, and how.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images per step.
        learning_rate: peak of AdamW's rate: linear warm-up over `warmup` steps, then cosine decay to zero.
        ema: decay of the exponential moving average of the weights, which is what is saved and sampled; early in a run
            (1 + k) / (10 + k) where that is smaller.
        grad_clip: largest norm of the gradient; inf: do not clip.
        flip: mirror half of the images left to right.
        channels: of the U-Net's levels; every level after the first halves the image's sides.
        layers: residual blocks per level.
        attention: levels with self-attention, 0 the finest.
        groups: of the group norms.
        dropout: in the residual blocks.
        seed: of initial weights and everything random; 0 <= seed < 2^64.
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

    A folder that holds an unfinished run of the same images and options is resumed. Beside the checkpoint:
    `training.pt` (to resume), `log.jsonl` (step, loss, seconds) and `samples/` (grids as the run goes). torch's random
    state, on the CPU and on `device`, is afterwards what it was before.

    Args:
        data: [N, H, W, C] uint8; H and W multiples of 2^(levels - 1); C = 1, 3 or 4.
        out: folder to write.
    Returns: out, as a path.
    Raises: ValueError: data or an option is not as above, `out` cannot be written or holds another run or a checkpoint
        that no run can go on from, or the run diverged.
    """
    from tqdm import tqdm

    height, width, channels = _checked(data, options)
    data = np.require(data, requirements=["C", "W"])  # torch takes neither negative strides nor read-only memory
    if options.precision not in TRAINED:
        raise ValueError(f"precision is {options.precision!r}; want one of {', '.join(TRAINED)}")
    device, precision = device_and_precision(device, options.precision)
    dtype = PRECISIONS[precision]
    out, run = Path(out), _described(data, options)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked):
        torch.manual_seed(options.seed)
        net = UNet2D(**options.unet_config(height, width, channels)).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, fused=True)
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    start, seconds = _resume(out, run, parts)
    check_writable(out / "samples", folder=True)
    if start:  # a kill may have come between the state and the checkpoint
        checkpoint.save(out, ema.config, ema.state_dict(), options.schedule)

    pixels = channels_last(torch.from_numpy(data).movedim(-1, 1)).to(device)
    table = options.schedule.noising_table().to(device)
    began = time.monotonic() - seconds
    bar = tqdm(total=options.steps, initial=start, desc="train", unit="step", disable=not progress)
    net.train()
    with bar, torch.random.fork_rng(forked):
        for k in range(start, options.steps):
            torch.manual_seed(int(np.random.SeedSequence((options.seed, 2, k)).generate_state(1, np.uint64)[0]))
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
            log, save, draw = (
                done % every == 0 or done == options.steps
                for every in (LOG_EVERY, options.save_every, options.sample_every)
            )
            if log or save or draw:
                value = _finite(loss, ema, done, out, options)
            if log:
                bar.set_postfix(loss=f"{value:.4f}")
                _log(out, {"step": done, "loss": value, "seconds": time.monotonic() - began})
            if save:
                _save_state(out, run, parts, done, time.monotonic() - began)
                checkpoint.save(out, ema.config, ema.state_dict(), options.schedule)
            if draw:
                sampler = Sampler(ema, options.schedule, device=device, precision=precision)
                steps = _grid_steps(options)
                grid = sampler.sample(64, seed=options.seed, steps=steps, output="uint8", progress=False)
                images.save_grid(grid, out / "samples" / f"step-{done:07d}.png")
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


def _grid_steps(options: TrainOptions) -> int:
    return min(GRID_STEPS, options.schedule.num_train_timesteps)


def _finite(loss: Tensor, ema: nn.Module, step: int, out: Path, options: TrainOptions) -> float:
    """The loss, once it and the weights are known to be worth keeping."""
    value = loss.item()
    if not math.isfinite(value) or not all(bool(weights.isfinite().all()) for weights in ema.parameters()):
        what = "the weights are not finite" if math.isfinite(value) else f"the loss is {value}"
        raise ValueError(
            f"{what} at step {step}; lower learning_rate ({options.learning_rate}), or use precision fp32; "
            f"what {out} held is kept"
        )
    return value


def _checked(data: np.ndarray, options: TrainOptions) -> tuple[int, int, int]:
    if data.dtype != np.uint8 or data.ndim != 4 or not len(data) or data.shape[3] not in images.CHANNELS:
        wanted = "uint8 [N, H, W, C] with at least one image and C = 1, 3 or 4"
        raise ValueError(f"data is {data.dtype} {data.shape}; want {wanted}")

    def want(name: str, good: Callable[[Any], Any], wanted: str) -> None:
        value = getattr(options, name)
        if not good(value):
            raise ValueError(f"{name} is {value!r}; want {wanted}")

    for name in ("steps", "batch_size", "save_every", "sample_every", "layers", "groups"):
        want(name, lambda value: _whole(value, 1), "a whole number, at least 1")
    want("warmup", lambda warmup: _whole(warmup, 0), "a whole number, at least 0")
    want("seed", lambda seed: _whole(seed, 0, 1 << 64), "a whole number, 0 <= seed < 2^64")
    want("learning_rate", lambda rate: _real(rate) and 0 < rate < math.inf, "a finite number > 0")
    want("grad_clip", lambda norm: _real(norm) and norm > 0, "a number > 0; inf: do not clip")
    for name in ("ema", "dropout"):
        want(name, lambda share: _real(share) and 0 <= share < 1, f"a number, 0 <= {name} < 1")
    want("flip", lambda flip: isinstance(flip, bool), "True or False")
    want("channels", lambda widths: widths and _wholes(widths, 1), "whole numbers > 0, one per level")
    levels = len(options.channels)
    want("attention", lambda at: _wholes(at, 0, levels), f"levels, each from 0 to {levels - 1}")
    divisor = f"a divisor of each of channels, {', '.join(map(str, options.channels))}"
    want("groups", lambda groups: not any(width % groups for width in options.channels), divisor)
    if options.schedule.prediction_type != "epsilon":
        raise ValueError(f"prediction_type is {options.schedule.prediction_type!r}; the trainer predicts epsilon")
    for steps in (None, _grid_steps(options)):
        options.schedule.table(steps)  # what cannot be sampled is not worth training

    height, width, channels = data.shape[1:]
    factor = 1 << (levels - 1)
    if not height or not width or height % factor or width % factor:
        raise ValueError(
            f"images are {height} x {width}; with {levels} levels both sides must be multiples of "
            f"{factor}: crop or resize them, or give fewer channels"
        )
    return height, width, channels


def _whole(value: Any, low: int, end: float = math.inf) -> bool:
    return type(value) is int and low <= value < end


def _wholes(values: Any, low: int, end: float = math.inf) -> bool:
    return isinstance(values, tuple | list) and all(_whole(value, low, end) for value in values)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _described(data: np.ndarray, options: TrainOptions) -> dict[str, Any]:
    """What must not change when a run is resumed, as JSON would hold it."""
    described = asdict(options) | {"schedule": options.schedule.to_config()}
    for free in ("save_every", "sample_every", "precision"):
        del described[free]
    described["data"] = {"shape": data.shape, "crc32": zlib.crc32(data.data)}
    return json.loads(json.dumps(described))


def _resume(out: Path, run: dict[str, Any], parts: dict[str, Any]) -> tuple[int, float]:
    """Steps done and seconds spent, after loading the state in `out`; (0, 0) where there is none."""
    path, step, seconds = out / STATE, 0, 0.0
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step, seconds, other = int(state["step"]), float(state["seconds"]), state["run"]
            changed = {name: other.get(name) for name in run if other.get(name) != run[name]}
            if not changed:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
        except Exception as error:  # whatever a damaged or hostile pickle comes to
            kind = type(error).__name__
            raise ValueError(f"{path} is damaged, or not of a run ({kind}); train into another folder") from error
        if changed:
            raise ValueError(f"{out} holds a run with other {json.dumps(changed)[1:-1]}; give those, or another folder")
    elif held := [name for name in ("unet", "model_index.json", "config.json") if (out / name).exists()]:
        raise ValueError(f"{out} holds a checkpoint ({held[0]}) and no {STATE} to resume; train into another folder")
    if (out / LOG).exists():
        lines = (out / LOG).read_text(errors="replace").splitlines()
        with atomic(out / LOG) as file:
            file.write("".join(line + "\n" for line in lines if _logged(line) <= step).encode())
    return step, seconds


def _save_state(out: Path, run: dict[str, Any], parts: dict[str, Any], step: int, seconds: float) -> None:
    state = {"step": step, "seconds": seconds, "run": run, **{name: part.state_dict() for name, part in parts.items()}}
    with atomic(out / STATE) as file:
        torch.save(state, file)


def _log(out: Path, record: dict[str, Any]) -> None:
    with (out / LOG).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _logged(line: str) -> float:
    """The step of a line of the log; infinity for what a kill left of one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
