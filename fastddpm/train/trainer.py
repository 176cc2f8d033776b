"""Algorithm 1 (Ho et al. 2020, arXiv:2006.11239): train eps_theta on images noised in one shot.

Everything random in step k (which images, flips, t, eps) is a function of the seed, k, the batch size and the number of
images alone, so a run that was killed and resumed takes the same steps as one that was not, and several processes take
the steps of one; but for dropout, which is a function of the process's rank, too.
"""

import copy
import json
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm import checkpoints, ops
from fastddpm.core import noise
from fastddpm.core.layout import channels_last
from fastddpm.core.schedule import Schedule
from fastddpm.networks.unet2d import UNet2D
from fastddpm.processes.distributed import Ranks, ranks
from fastddpm.sampling.engine import PRECISIONS, arithmetic
from fastddpm.sampling.sampler import Sampler, device_and_precision
from fastddpm.storage import images
from fastddpm.storage.files import check_writable, locked
from fastddpm.train import run_folder

TRAINED = ("auto", "fp32", "tf32", "bf16")  # gradients in fp16 would need their loss scaled
TRAINERS = ("auto", "eager", "compiled", "compiled+graph")
GRID = 64  # samples to look at, or as many as make whole rows of classes
GRID_STEPS = 100  # each


@dataclass(frozen=True)
class TrainOptions:
    """What to train, and how.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images per step, of all processes together.
        learning_rate: peak of AdamW's rate: linear warm-up over `warmup` steps, then cosine decay to zero.
        warmup: None: 500, but at most a tenth of `steps`.
        ema: decay of the exponential moving average of the weights, which is what is saved and sampled; early in a run
            (1 + k) / (10 + k) where that is smaller.
        weight_decay: AdamW's.
        grad_clip: largest norm of the gradient; inf: do not clip.
        flip: mirror half of the images left to right.
        channels: of the U-Net's levels; every level after the first halves the image's sides.
        layers: residual blocks per level.
        attention: levels with self-attention, 0 the finest.
        groups: of the group norms.
        dropout: in the residual blocks.
        seed: of initial weights and everything random; 0 <= seed < 2^64.
        precision: "auto" (that of the run that is resumed; else bf16 where the device computes it natively, or fp32),
            "fp32", "tf32" (on a GPU), or "bf16", by autocast; the weights, their average and the optimiser's state are
            always float32.
        engine: "eager"; "compiled", by torch.compile, which takes a minute or more at first; "compiled+graph", which
            also replays CUDA graphs; or "auto": "compiled" on a GPU, else "eager".
        log_every, save_every, sample_every: steps between lines of the log, checkpoints, and sample grids.
        init: a checkpoint to start from: its weights, with its layout and schedule in place of those here.
        schedule: the noise schedule, and what the network is to predict: epsilon, x_0 or v.
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
        """The U-Net's configuration (diffusers' names) for images of this size, and of so many classes."""
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


def train(
    data: np.ndarray,
    out: str | os.PathLike[str],
    options: TrainOptions,
    *,
    labels: np.ndarray | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train on images and leave a diffusers checkpoint of the averaged weights in the folder `out`.

    A folder that holds an unfinished run of the same images and options is resumed; Ctrl-C and SIGTERM end one when its
    step (under torchrun: its stretch of `log_every` steps) is finished and saved. Beside the checkpoint:
    `training.pt` (to resume), `log.jsonl` (loss and so on), `loss.png` and `samples/` (grids as the run goes). Started
    by torchrun, the processes share each batch: images and noise are those of one process, whatever their number, and
    the first alone writes. torch's random state, on the CPU and on `device`, is afterwards what it was before.

    Args:
        data: [N, H, W, C] uint8; H and W multiples of 2^(levels - 1); C = 1, 3 or 4.
        out: folder to write.
        labels: [N] integers >= 0: train a class-conditional network.
        device: "cuda" where there is one, else "cpu".
    Returns: out, as a path.
    Raises:
        ValueError: data, labels or an option is not as above, `out` cannot be written, is being written by another
            process, or holds another run or a checkpoint that no run can go on from, or the run diverged.
        OSError: a file could not be written, as on a full disk.
        RuntimeError: another process of several was lost.
    """
    modes = torch.inference_mode(False), torch.enable_grad()  # of the caller, perhaps otherwise
    with ranks(device) as group, ExitStack() as held:
        for mode in modes:
            held.enter_context(mode)
        with group.agree():
            trainer = Trainer(data, labels, Path(out), options, group)
            if group.rank == 0:
                held.enter_context(locked(check_writable(out, folder=True)))
        with group.agree():
            trainer.resume()
        group.agree_on({"the step": trainer.done.step, "precision": trainer.precision, **trainer.described})
        trainer.run(progress)
    return Path(out)


class Trainer:
    """A run: what it needs besides its folder, which it leaves alone until it is to be resumed."""

    def __init__(
        self, data: np.ndarray, labels: np.ndarray | None, out: Path, options: TrainOptions, group: Ranks
    ) -> None:
        check_options(options, group.device)
        init, started = options.init, None
        if init is not None:
            folder, before = os.path.abspath(init), run_folder.begun_from(out)
            if os.path.isdir(folder) or folder == before:  # which may be gone by now
                init = folder
            started = _start(init, out if init == before else None)
            options = replace(options, init=init, schedule=started[2])
            _check_schedule(options)
        shape, classes = _checked_images(data), _checked_classes(labels, data)
        config = options.unet_config(*shape, classes)
        if started is not None:
            config = _fitting(started[0], config, str(init))
        _check_sides(*shape[:2], levels=len(config["block_out_channels"]))
        group.share(options.batch_size)
        self.device, self.precision, self.engine = _where_and_how(options, group.device)
        self.options, self.out, self.group, self.classes = options, out, group, classes
        with _forked(self.device):
            torch.manual_seed(options.seed)
            self.net = UNet2D(**config).to(self.device)
        if started is not None:
            checkpoints.load_into(self.net, started[1])
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.parts = {"net": self.net, "ema": self.ema, "optimizer": self.optimizer}
        data = np.require(data, requirements=["C", "W"])  # torch takes neither negative strides nor read-only memory
        self.described = _described(data, labels, options)
        self.done = run_folder.Progress()
        self.pixels = _placed(channels_last(torch.from_numpy(data).movedim(-1, 1)), self.device)
        self.labels = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, np.int64))
        self.table = options.schedule.noising_table().to(self.device)

    def resume(self) -> None:
        """Take over what the folder holds of this run."""
        done = self.done = run_folder.resume(self.out, self.described, self.parts)
        if self.options.precision == "auto":  # which elsewhere may be another
            before = done.how.get("precision", self.precision)
            try:
                self.precision = device_and_precision(self.device, before)[1]
            except ValueError as error:
                raise ValueError(f"{self.out} holds a run whose {error}") from error
        check_writable(self.out / "samples", folder=True)
        if self.group.rank == 0:
            run_folder.tidy(self.out, done.step)
            if done.step:  # a kill may have come between the state and the checkpoint
                self._save_checkpoint()

    def run(self, progress: bool) -> None:
        """Take the steps that are left."""
        from tqdm import tqdm

        options, done, losses = self.options, self.done, []
        self.began = time.monotonic() - done.seconds
        self.mark = done.step, time.monotonic()
        network = self._network()
        silent = not progress or self.group.rank > 0
        done.how = self._how()
        if not silent:
            print(f"{self.out}:", ", ".join(f"{name} {value}" for name, value in done.how.items()), file=sys.stderr)
        bar = tqdm(total=options.steps, initial=done.step, desc="train", unit="step", disable=silent)
        stop = False
        with run_folder.put_off() as caught, bar, _forked(self.device):
            while done.step < options.steps and not stop:
                loss, norm = self._step(network, done.step)
                losses.append(loss)
                done.step += 1
                bar.update()
                due = any(map(self._due, (options.log_every, options.sample_every, options.save_every)))
                stop = self._stops(bool(caught), due)
                if due or stop:
                    done.losses += self._finite(losses)
                    losses = []
                    self._keep(norm, bar, stop)
            if stop:
                caught[:] = caught or [signal.SIGTERM]  # another rank's, which ends them all
                if not silent:
                    bar.write(
                        f"{self.out}: stopped after step {done.step}; the same command goes on from there", sys.stderr
                    )

    def _how(self) -> dict[str, Any]:
        """What is trained on what, as the state and the first line say it."""
        return {
            "device": str(self.device),
            "precision": self.precision,
            "engine": self.engine,
            "processes": self.group.size,
            "parameters": sum(weights.numel() for weights in self.net.parameters()),
            "images": len(self.pixels),
            "batch": self.options.batch_size,
        }

    def _stops(self, asked: bool, due: bool) -> bool:
        """Whether to stop after this step; several ranks agree on it where they wait for each other anyway."""
        if self.group.size == 1:
            return asked
        if not due:
            return False
        votes = torch.tensor(float(asked), device=self.device)
        self.group.sum_([votes])
        return bool(votes)

    def _due(self, every: int) -> bool:
        return self.done.step % every == 0 or self.done.step == self.options.steps

    def _keep(self, norm: Tensor, bar: Any, last: bool) -> None:
        """Log, draw and save what is due; save what is the last for now."""
        options, done, writes = self.options, self.done, self.group.rank == 0
        done.seconds = time.monotonic() - self.began
        if self._due(options.log_every):
            record = self._record(norm)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            done.losses = []
            if writes:
                run_folder.log(self.out, record)
        if writes and self._due(options.sample_every):
            self._draw()
        if writes and (last or self._due(options.save_every)):  # what came after it would be lost by a kill
            run_folder.save(self.out, self.described, self.parts, done)
            self._save_checkpoint()
        self.mark = done.step, time.monotonic()

    def _network(self) -> Callable[..., Tensor]:
        """The network as it is trained: perhaps compiled, its gradients those of all ranks."""
        network: Any = self.net
        if self.group.size > 1:
            at = [self.device] if self.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=at, gradient_as_bucket_view=True)
        if self.engine == "eager":
            return network
        return torch.compile(network, dynamic=False, mode="reduce-overhead" if "graph" in self.engine else "default")

    def _step(self, network: Callable[..., Tensor], k: int) -> tuple[Tensor, Tensor]:
        """Step k, nothing of which waits for a GPU: this rank's part of the loss, and the norm of the gradient."""
        options, dtype, device = self.options, PRECISIONS[self.precision], self.device
        if self.net.config["dropout"]:
            state = np.random.SeedSequence((options.seed, 2, k, self.group.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
        self.optimizer.zero_grad()
        x_0, t, address, labels = self._batch(k)
        x_t = ops.noising(x_0, t, address, self.table, dtype=dtype)
        with torch.autocast(device.type, enabled=False), arithmetic(self.precision, device):  # the caller's is not ours
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                m = network(x_t, t, labels)
            errors = ops.eps_loss(m, x_0, t, address, self.table, predicts=options.schedule.prediction_type)
            loss = errors.sum() / (options.batch_size * x_0.shape[1:].numel())
            (loss * self.group.size).backward()  # of which the mean over the ranks is taken
        norm = _clip(list(self.net.parameters()), options.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(k, options)
        self.optimizer.step()
        _average(self.ema, self.net, min(options.ema, (1 + k) / (10 + k)))
        return loss.detach(), norm

    def _batch(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This rank's share of step k, on the device: images, timesteps, noise addresses and labels."""
        share = self.group.share(self.options.batch_size)
        index, t, mirrored, address = (drawn[share] for drawn in draws(k, len(self.pixels), self.options))
        labels = [] if self.labels is None else [self.labels[index]]
        x_0 = self.pixels[index if self.pixels.device.type == "cpu" else self._sent(index)]
        x_0, numbers = self._sent(x_0), self._sent(torch.stack([t, mirrored, *address.T, *labels]))
        t, mirrored, seed, sample, *labels = numbers.unbind()
        if self.options.flip:
            x_0 = torch.where(mirrored.bool()[:, None, None, None], x_0.flip(-1), x_0)
        return channels_last(x_0), t, torch.stack([seed, sample], 1), labels[0] if labels else None

    def _sent(self, x: Tensor) -> Tensor:
        """x on the device; from pageable memory that would wait for all that a GPU has still to do."""
        if x.device.type == self.device.type:
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    def _finite(self, losses: list[Tensor]) -> list[float]:
        """The losses of these steps, of all ranks, once they and the weights are known to be worth keeping."""
        values = torch.stack(losses)
        self.group.sum_([values])
        found = values.tolist()
        bad = [i for i, loss in enumerate(found) if not math.isfinite(loss)]
        if bad or not torch.stack([weights.isfinite().all() for weights in self.ema.parameters()]).all():
            what = f"the loss is {found[bad[0]]}" if bad else "the weights are not finite"
            step = self.done.step - (len(found) - 1 - bad[0] if bad else 0)
            raise ValueError(
                f"{what} at step {step}; lower learning_rate ({self.options.learning_rate}), or use precision fp32; "
                f"what {self.out} held is kept"
            )
        return found

    def _record(self, norm: Tensor) -> dict[str, float]:
        """A line of the log: the mean loss since the last; the rate without pictures and files."""
        done, options, (step, since) = self.done, self.options, self.mark
        return {
            "step": done.step,
            "loss": sum(done.losses) / len(done.losses),
            "grad_norm": float(norm),
            "learning_rate": options.learning_rate * _rate(done.step - 1, options),
            "images_per_second": (done.step - step) * options.batch_size / (time.monotonic() - since),
            "seconds": done.seconds,
        }

    def _save_checkpoint(self) -> None:
        checkpoints.save(self.out, self.ema.config, self.ema.state_dict(), self.options.schedule)

    def _draw(self) -> None:
        """Samples of the averaged weights, and the loss so far, as pictures."""
        options = self.options
        sampler = Sampler(
            self.ema, options.schedule, shape=self.pixels.shape[1:], device=self.device, precision=self.precision
        )
        columns, labels = 8, None
        if self.classes is not None:
            columns = self.classes * max(1, round(8 / self.classes)) if self.classes <= 16 else 8
            labels = torch.arange(GRID - GRID % columns) % self.classes  # of up to 16, a column shows one class
        count = GRID if labels is None else len(labels)
        how: dict[str, Any] = {"steps": _grid_steps(options), "output": "uint8", "progress": False}
        grid = sampler.sample(count, seed=options.seed, class_labels=labels, **how)
        images.save_grid(grid, self.out / "samples" / f"step-{self.done.step:07d}.png", columns=columns)
        run_folder.draw_curve(self.out)


def draws(k: int, total: int, options: TrainOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What step k draws for its batch of N of `total` images: a function of the seed and k.

    Returns: [N] int64 each: which images, in a new order in every epoch; t; whether they are mirrored. And [N, 2], the
        addresses of their noise, whose sample index is the running number of the example.
    """
    size, seed = options.batch_size, options.seed
    seen = np.arange(k * size, (k + 1) * size)
    epoch, place = np.divmod(seen, total)
    index = np.empty(size, np.int64)
    for e in np.unique(epoch).tolist():
        index[epoch == e] = _order(seed, e, total)[place[epoch == e]]
    draw = np.random.default_rng((seed, 1, k))
    t = draw.integers(options.schedule.num_train_timesteps, size=size)
    mirrored = (draw.random(size) < 0.5).astype(np.int64)
    drawn = (torch.from_numpy(numbers) for numbers in (index, t, mirrored))
    return *drawn, noise.address(seed, torch.from_numpy(seen))  # type: ignore[return-value]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(total)


def _placed(pixels: Tensor, device: torch.device) -> Tensor:
    """The images on the device, or on the host where they would take more than half of what a GPU has free."""
    if device.type == "cuda" and pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return pixels
    return pixels.to(device)


def _forked(device: torch.device) -> Any:
    """A context after which torch's random state is what it was."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _rate(k: int, options: TrainOptions) -> float:
    """Share of the peak learning rate in step k."""
    warmup = _warmup(options)
    left = (k - warmup) / max(options.steps - warmup, 1)
    return (k + 1) / warmup if k < warmup else 0.5 + 0.5 * math.cos(math.pi * left)


def _warmup(options: TrainOptions) -> int:
    return min(500, options.steps // 10) if options.warmup is None else options.warmup


@torch.no_grad()
def _average(ema: nn.Module, net: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def _clip(weights: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients to a norm of at most `most`; returns what it was."""
    norm = nn.utils.get_total_norm([cast(Tensor, each.grad) for each in weights])
    # torch.compile gives biases whose gradients are equal one tensor, which is to be scaled once
    apart = {cast(Tensor, each.grad).data_ptr(): each for each in weights}
    nn.utils.clip_grads_with_norm_(apart.values(), most, norm)
    return norm


def _grid_steps(options: TrainOptions) -> int:
    return min(GRID_STEPS, options.schedule.num_train_timesteps)


def _checked_images(data: np.ndarray) -> tuple[int, int, int]:
    """Height, width and channels."""
    if not isinstance(data, np.ndarray):
        kind = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"data is a {kind}; want a numpy array, uint8 [N, H, W, C]")
    if data.dtype != np.uint8 or data.ndim != 4 or not len(data) or data.shape[3] not in images.CHANNELS:
        wanted = "uint8 [N, H, W, C] with at least one image and C = 1, 3 or 4"
        raise ValueError(f"data is {data.dtype} {data.shape}; want {wanted}")
    return data.shape[1:]


def _checked_classes(labels: np.ndarray | None, data: np.ndarray) -> int | None:
    """How many classes there are."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != data.shape[:1]:
        what = f"labels are {labels.dtype} {labels.shape}"
        raise ValueError(f"{what}; want one whole number for each of the {len(data)} images")
    found = np.unique(labels)
    if found[0] != 0 or found[-1] != len(found) - 1:
        what = f"labels are {len(found)} numbers from {found[0]} to {found[-1]}"
        way_out = "np.unique(labels, return_inverse=True)[1] numbers them anew"
        raise ValueError(f"{what}; want classes 0, 1, ... without gaps: {way_out}")
    return len(found)


def _check_sides(height: int, width: int, levels: int) -> None:
    factor = 1 << (levels - 1)
    if not height or not width or height % factor or width % factor:
        raise ValueError(
            f"images are {height} x {width}; with {levels} levels both sides must be multiples of "
            f"{factor}: crop or resize them, or give fewer channels"
        )


def _start(init: str, own: Path | None) -> tuple[dict[str, Any], dict[str, Tensor], Schedule]:
    """The checkpoint to start from; of a run that has come to one of its own, that one, if it is whole."""
    if own is not None:
        with suppress(ValueError):
            return checkpoints.load(own)
    return checkpoints.load(init)


def _fitting(config: dict[str, Any], wanted: dict[str, Any], source: str) -> dict[str, Any]:
    """The configuration of a checkpoint to start from, for images of another size."""
    for name in ("in_channels", "out_channels", "num_class_embeds", "class_embed_type"):
        if config.get(name) != wanted.get(name):
            labels = "leave labels out, or " if wanted.get(name) else "give labels (--class-conditional), or "
            hint = labels if name == "num_class_embeds" else ""
            raise ValueError(
                f"init is {source}, whose {name} is {config.get(name)}; these images need {wanted.get(name)}: "
                f"{hint}start from another checkpoint, or from none"
            )
    return config | {"sample_size": wanted["sample_size"]}


def _check_init(options: TrainOptions) -> None:
    """That nothing is asked for which a checkpoint to start from brings with it."""
    if not isinstance(options.init, str):
        raise ValueError(f"init is {options.init!r}; want the name of a folder, or a hub id")
    given, plain = (
        {name: getattr(these, name) for name in ("channels", "layers", "attention", "groups", "dropout")}
        | these.schedule.to_config()
        for these in (options, TrainOptions())
    )
    for name, value in given.items():
        if value != plain.get(name):
            raise ValueError(
                f"{name} is {value!r}, but init brings its own layout and schedule; leave out one of the two"
            )


def check_options(options: TrainOptions, device: torch.device | str | None) -> None:
    """What of the options can be told before the images are there. device: as of `train`.

    Raises: ValueError: an option is not as `TrainOptions` says, not to be had on the device, or given beside `init`,
        which brings it.
    """

    def want(name: str, good: Callable[[Any], Any], wanted: str) -> None:
        value = getattr(options, name)
        if not good(value):
            raise ValueError(f"{name} is {value!r}; want {wanted}")

    want("schedule", lambda schedule: isinstance(schedule, Schedule), "a Schedule")
    if options.init is not None:
        _check_init(options)
    for name in ("steps", "batch_size", "log_every", "save_every", "sample_every", "layers", "groups"):
        want(name, lambda value: _whole(value, 1), "a whole number, at least 1")
    want("warmup", lambda warmup: warmup is None or _whole(warmup, 0), "a whole number, at least 0, or none")
    want("seed", lambda seed: _whole(seed, 0, 1 << 64), "a whole number, 0 <= seed < 2^64")
    want("learning_rate", lambda rate: _real(rate) and 0 < rate < math.inf, "a finite number > 0")
    want("weight_decay", lambda decay: _real(decay) and 0 <= decay < math.inf, "a finite number >= 0")
    want("grad_clip", lambda norm: _real(norm) and norm > 0, "a number > 0; inf: do not clip")
    for name in ("ema", "dropout"):
        want(name, lambda share: _real(share) and 0 <= share < 1, f"a number, 0 <= {name} < 1")
    want("flip", lambda flip: isinstance(flip, bool), "True or False")
    want("channels", lambda widths: widths and _wholes(widths, 1), "whole numbers > 0, one per level")
    levels = len(options.channels)
    want("attention", lambda at: _wholes(at, 0, levels), f"levels, each from 0 to {levels - 1}")
    divisor = f"a divisor of each of channels, {', '.join(map(str, options.channels))}"
    want("groups", lambda groups: not any(width % groups for width in options.channels), divisor)
    for name, known in (("precision", TRAINED), ("engine", TRAINERS)):
        want(name, known.__contains__, f"one of {', '.join(known)}")
    _check_schedule(options)
    _where_and_how(options, device)


def _where_and_how(options: TrainOptions, device: torch.device | str | None) -> tuple[torch.device, str, str]:
    """Device, precision and engine, none of them "auto"."""
    device, precision = device_and_precision(device, options.precision)
    engine = options.engine
    if engine == "auto":
        engine = "compiled" if ops.backend(device) == "triton" else "eager"
    if "graph" in engine and device.type != "cuda":
        raise ValueError(f"engine is {engine!r}, and '{device}' has no CUDA graphs; use 'eager' or 'compiled'")
    return device, precision, engine


def _check_schedule(options: TrainOptions) -> None:
    for steps in (None, _grid_steps(options)):
        options.schedule.table(steps)  # what cannot be sampled is not worth training


def _whole(value: Any, low: int, end: float = math.inf) -> bool:
    return type(value) is int and low <= value < end


def _wholes(values: Any, low: int, end: float = math.inf) -> bool:
    return isinstance(values, tuple | list) and all(_whole(value, low, end) for value in values)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _described(data: np.ndarray, labels: np.ndarray | None, options: TrainOptions) -> dict[str, Any]:
    """What must not change when a run is resumed, as JSON would hold it."""
    described = asdict(options) | {"schedule": options.schedule.to_config(), "warmup": _warmup(options)}
    for free in ("log_every", "save_every", "sample_every", "precision", "engine"):
        del described[free]
    described["data"] = {"shape": data.shape, "crc32": zlib.crc32(data.data)}
    if labels is not None:
        described["labels"] = {"crc32": zlib.crc32(np.ascontiguousarray(labels, np.int64).data)}
    return json.loads(json.dumps(described))
