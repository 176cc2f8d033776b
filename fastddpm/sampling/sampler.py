"""Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239) as a loop: network, fused update, next step; and nothing else.

Sample i of a seed starts from noise that is a function of (seed, i), and every z added to it is one of (seed, i, t):
neither depends on the batch that sample i happens to be in.
"""

import math
import os
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import checkpoints
from fastddpm.core import layout
from fastddpm.core.noise import address as _address  # `noise` is an argument where this is called
from fastddpm.core.schedule import Schedule, StepTable
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.engine import PRECISIONS, Engine, Model, Slots
from fastddpm.storage import images

Callback = Callable[[int, int, Tensor, Tensor], object]  # (step, t, x_0, sample indices)
Progress = Callable[[int, int], object]  # (steps since the last call, samples they were of)

SHIPPED = "fashion-mnist"
PIXELS_PER_BATCH = {"cpu": 1 << 16, "cuda": 1 << 20}  # by default: 64 and 1024 images of 32 x 32
PIXELS_PER_MICRO_BATCH = {"cpu": 1 << 12, "cuda": 1 << 16}  # 4 and 64
LOOK = 16  # steps on a GPU from one look at the flag to the next

_evaluated: dict[int, tuple[int, list[tuple[nn.Module, bool]]]] = {}  # id of a model: runs under way, modes before them
_evaluated_lock = threading.Lock()


class Sampler:
    """Draws samples from a trained eps-model.

    Args:
        model: a `UNet2D`, or any network (x_t [N, ...] float32, t [N] int64) -> tensor like x_t: images [N, C, H, W],
            sequences [N, C, L], vectors [N, D].
        schedule: the noise schedule the model was trained for.
        shape: of one sample, channels first; a `UNet2D` knows its own.
        device: "cuda" where there is one, else "cpu".
        precision: "fp32", "tf32" (on a GPU: float32 whose products are rounded to TF32), "bf16", "fp16" or "auto". The
            state, the noise, the update, the norms' statistics and all that depends on t alone are float32 in any case.
            A `UNet2D` computes in the precision; any other model is called under torch.autocast for bf16 and fp16.
            "auto" is bf16 for a `UNet2D` where the device computes it natively, else fp32.
        engine: "eager"; "compiled", by torch.compile, which takes a minute at first; "graph", each step the replay of
            one CUDA graph; "compiled+graph"; or "auto": "graph" for a `UNet2D` on a GPU and runs that are worth it,
            else "eager", with the same bits. In a graph a model of your own must not wait for the GPU, and what it
            decides in Python it decides once; pass the module itself, not a function around it, if its weights may be
            replaced (changes in place are seen by the next batch in any case).
        batch_invariant: sample i is the same bits alone, in any batch, at any place: the network always computes the
            same number of samples at once, sample i in place i modulo that number, beside empty places where samples
            are missing. True chooses the number by the device and the size of a sample; a whole number is it.
    Raises: ValueError: an argument is not as above.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        schedule: Schedule | None = None,
        *,
        shape: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
        engine: str = "auto",
        batch_invariant: bool | int = False,
    ):
        if not callable(model):
            raise ValueError(f"model is {model!r}; want a network, called as model(x_t, t)")
        if schedule is None:
            schedule = Schedule()
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"schedule is a {type(schedule).__name__}; want a Schedule: Schedule.from_config(scheduler.config) "
                "makes one of a diffusers scheduler"
            )
        if shape is None:
            if not isinstance(model, UNet2D) or not model.config["sample_size"]:
                raise ValueError("shape is missing; give that of one sample: (C, H, W), (C, L) or (D,)")
            shape = sample_shape(model)
        sizes = tuple(shape) if isinstance(shape, Iterable) else ()
        if not sizes or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise ValueError(f"shape is {shape!r}; want whole numbers > 0: (C, H, W), (C, L) or (D,)")
        self.schedule, self.shape = schedule, tuple(map(int, sizes))
        if not isinstance(model, UNet2D) and precision == "auto":
            precision = "fp32"
        self.device, self.precision = device_and_precision(device, precision)
        self.engine = Engine(model, self.shape, schedule.num_train_timesteps, self.device, self.precision, engine)
        self.micro_batch = self._micro_batch(batch_invariant)
        self._fits = sys.maxsize  # no batch larger than this: there was no memory for one
        if isinstance(model, nn.Module) and not isinstance(model, UNet2D):
            model.to(self.device)

    @property
    def model(self) -> Model | nn.Module:
        return self.engine.model

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.engine.dtype

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        shape: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
        engine: str = "auto",
        batch_invariant: bool | int = False,
    ) -> "Sampler":
        """A sampler of a diffusers DDPM checkpoint.

        Args:
            source: a folder, or a Hugging Face hub id such as "google/ddpm-cifar10-32"; None: the model in the package,
                28 x 28 garments.
            variant: of the weights, such as "fp16".
            shape: of one sample, (C, H, W), where it shall not be that of the checkpoint.
            device, precision, engine, batch_invariant: as above.
        Raises: ValueError: there is no checkpoint, or it is damaged or needs something that is not supported.
        """
        device, precision = device_and_precision(device, precision)
        folder = shipped_model() if source is None else source
        config, parameters, schedule = checkpoints.load(folder, variant=variant)
        with torch.device("meta"):
            net = UNet2D(**config)
        net.to_empty(device=device)
        checkpoints.load_into(net, parameters)
        how: dict[str, Any] = {"device": device, "precision": precision, "engine": engine}
        return cls(net.eval(), schedule, shape=shape, batch_invariant=batch_invariant, **how)

    def sample(self, samples: int | Iterable[int], *, output: str = "float", **how: Any) -> Tensor:
        """Draw samples.

        Args:
            samples: how many (indices 0, 1, ...), or the sample indices, each 0 <= index < 2^56.
            output: "float": [N, *shape] float32 in data units, [-1, 1] where the schedule clips;
                "uint8": images [N, H, W, C].
            **how: see `batches`.
        Returns: all samples on the CPU, in the order asked for.
        Raises: ValueError: an argument is not as above, or the network returned something else than one finite number
            per element; the message names the step.
        """
        if output not in ("float", "uint8"):
            raise ValueError(f"output is {output!r}; want 'float' or 'uint8'")
        if output == "uint8" and len(self.shape) != 3:
            raise ValueError(f"output is 'uint8', but a sample is {self.shape}, not an image (C, H, W); use 'float'")
        if isinstance(samples, Iterable) and not isinstance(samples, Tensor):
            samples = tuple(samples)
        batches = self.batches(samples, **how)
        count = int(samples) if isinstance(samples, Integral) else len(samples)  # type: ignore[arg-type]
        out = layout.empty(count, self.shape, dtype=torch.float32, device="cpu")
        if output == "uint8":
            out = torch.empty(count, *self.shape[1:], self.shape[0], dtype=torch.uint8, device="cpu")
        done = 0
        with closing(batches):  # its progress bar ends before an error is told
            for _, x in batches:
                out[done : done + len(x)] = images.to_uint8(x) if output == "uint8" else x
                done += len(x)
        return out

    def batches(
        self,
        samples: int | Iterable[int],
        *,
        seed: int = 0,
        steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        noise: float = True,
        batch_size: int | None = None,
        class_labels: Iterable[int] | Tensor | None = None,
        progress: bool | Progress = True,
        callback: Callback | None = None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Draw samples and hand out each batch when it is finished.

        Args:
            samples: how many, or which, as in `sample`.
            seed: 0 <= seed < 2^64.
            steps: how many of the T timesteps to visit; None: all, the exact ancestral sampler.
            timesteps: visit exactly these instead, strictly descending.
            sampler: "ddpm" or "ddim"; eta: DDIM's, 0 is deterministic. Many steps of DDIM want a schedule with
                clip_sample=False (docs/sigma.md).
            noise: what sigma_t z is multiplied by; False switches it off, and each step returns its mean.
            batch_size: samples computed together; None chooses by the device and the size of a sample. Without enough
                memory it is halved, with a warning, for good. It does not apply with batch_invariant.
            class_labels: of a class-conditional `UNet2D`: one label per sample.
            progress: show a bar; or what is told of the steps instead: progress(steps since the last call, samples
                they were of).
            callback: called in each step as callback(step, t, x_0, indices), step counting from 0: sees the predicted
                clean samples x_0 (float32, like the batch) before the update. Both tensors are copies.
        Returns: an iterator over (sample indices [n] int64, samples [n, *shape] float32), both on the CPU, in the order
            asked for.
        Raises: ValueError: as `sample`; for a bad argument at once, not in the first iteration.
        """
        table = self.schedule.table(steps, sampler=sampler, eta=eta, timesteps=timesteps, noise=noise)
        addresses = _address(seed, samples)
        size = self.default_batch_size() if batch_size is None else batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size is {size!r}; want a whole number, at least 1")
        labels = self.checked_labels(class_labels, len(addresses))
        return self._batches(table, addresses, labels, size, progress, callback)

    def _batches(
        self,
        table: StepTable,
        addresses: Tensor,
        labels: Tensor | None,
        size: int,
        progress: bool | Progress,
        callback: Callback | None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        from tqdm import tqdm

        size = min(size, self._fits)
        parts, in_order = deque(self._parts(addresses[:, 1], size)), _InOrder(addresses[:, 1])
        silent = callable(progress) or not progress
        bar = tqdm(total=len(parts) * len(table), desc="sample", unit="step", disable=silent)
        told = progress if callable(progress) else lambda steps, _: bar.update(steps)
        with bar, evaluating(self.model):
            while parts:
                part, done = parts.popleft(), bar.n
                try:
                    x = self._run(table, part, addresses, labels, callback, bar, told)
                except torch.OutOfMemoryError as error:
                    failure, x = str(error).splitlines()[0], None  # the error itself would keep the memory
                if x is None:
                    size = smaller(self.engine, len(part), failure, self.micro_batch)
                    if size < len(part):
                        self._fits = size
                    parts = deque(torch.cat([part, *parts]).split(size))
                    bar.n, bar.total = done, done + len(parts) * len(table)
                else:
                    yield from in_order.put(part, x)

    def _parts(self, samples: Tensor, size: int) -> list[Tensor]:
        """Which samples to compute together: for each entry of a batch the place in samples, -1 where it is empty."""
        if not self.micro_batch:
            return list(torch.arange(len(samples), device="cpu").split(size)) if len(samples) else []
        parts: list[Tensor] = []
        seen: Counter[int] = Counter()  # how many samples each entry was given
        for place, entry in enumerate((samples % self.micro_batch).tolist()):
            if seen[entry] == len(parts):
                parts.append(torch.full((self.micro_batch,), -1, device="cpu"))
            parts[seen[entry]][entry] = place
            seen[entry] += 1
        return parts

    def _run(
        self,
        table: StepTable,
        part: Tensor,
        addresses: Tensor,
        labels: Tensor | None,
        callback: Callback | None,
        bar: Any,
        told: Progress,
    ) -> Tensor:
        """All steps of one batch: [n, *shape] float32 on the CPU, channels-last, of the entries that are not empty."""
        taken = part >= 0
        which = part.clamp(min=0)  # what stands in an empty entry does not matter
        with self.engine.slots(len(part), 0 if callback else len(table)) as slots:
            if self.engine.compiles:
                bar.set_description("compile")  # which takes minutes
            slots.load(table, addresses[which], None if labels is None else labels[which])
            bar.set_description("sample", refresh=False)
            samples = addresses[which, 1][taken]
            watch = _Watch(slots, taken, samples, told)
            for k in reversed(range(len(table))):
                if callback is None:
                    slots.advance()
                else:
                    m = slots.predict()
                    x_0 = _predicted(slots.x, m, slots.table.rows[k], slots.table.scale[k])
                    x_0 = x_0 if taken.all() else x_0[taken.to(x_0.device)]
                    callback(len(table) - 1 - k, int(table.timesteps[k]), x_0, samples.clone())
                    slots.update(m)
                watch.after(k)
            x = slots.x.to("cpu", copy=True)
        return x if taken.all() else layout.channels_last(x[taken])

    def checked_labels(self, given: Iterable[int] | Tensor | None, count: int) -> Tensor | None:
        """One class label per sample: [N] int64, or [N, ...] as an embedding of type "identity" takes them.

        Raises: ValueError: the labels are not so, are missing, or not for this model.
        """
        conditional = isinstance(self.model, UNet2D) and self.model.class_embedding is not None
        if given is None and not conditional:
            return None
        if not isinstance(self.model, UNet2D) or not conditional:
            raise ValueError("class_labels were given, but the model is not a class-conditional UNet2D; leave them out")
        if given is None:
            raise ValueError("the model is class-conditional; pass class_labels, one per sample")
        labels = given if isinstance(given, Tensor) else torch.tensor(list(given))
        if labels.shape[:1] != (count,):
            raise ValueError(f"class_labels are {tuple(labels.shape)} for {count} samples; want one each")
        if self.model.config["class_embed_type"] == "identity":
            return labels
        classes = self.model.config["num_class_embeds"] or 1 << 31
        integers = labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
        if not integers or (count and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
            raise ValueError(f"class_labels are {labels.tolist()[:8]}; want whole numbers, 0 <= label < {classes}")
        return labels.long()

    def default_batch_size(self) -> int:
        """Samples computed together where nobody says how many."""
        return max(1, PIXELS_PER_BATCH[self.device.type] // max(math.prod(self.shape[1:]), 1 << 8))

    def _micro_batch(self, batch_invariant: bool | int) -> int:
        """How many samples the network always computes at once; 0: as many as there are."""
        if isinstance(batch_invariant, bool):
            size = max(1, PIXELS_PER_MICRO_BATCH[self.device.type] // max(math.prod(self.shape[1:]), 1 << 8))
            return size if batch_invariant else 0
        if not isinstance(batch_invariant, Integral) or batch_invariant < 1:
            raise ValueError(f"batch_invariant is {batch_invariant!r}; want True, False or a whole number, at least 1")
        return int(batch_invariant)


def smaller(engine: Engine, size: int, failure: str, micro_batch: int = 0) -> int:
    """The batch to try again with where one of `size` failed for want of memory: the same, if some could be freed.

    Raises: torch.OutOfMemoryError: there is no smaller one; the message begins with `failure`.
    """
    if engine.clear():
        return size
    if micro_batch or size == 1:
        way_out = f"batch_invariant={size // 2} (with other bits), " if size > 1 else ""
        raise torch.OutOfMemoryError(f"{failure} This was for a batch of {size}; use {way_out}fp16 or bf16, or the CPU")
    size = (size + 1) // 2
    warnings.warn(f"out of memory; going on with batches of {size}. {failure}", stacklevel=4)
    return size


@contextmanager
def evaluating(model: Model | nn.Module) -> Iterator[None]:
    """No dropout and no batch statistics in a run; after the last of several, every part is in the mode it was in."""
    if not isinstance(model, nn.Module):
        yield
        return
    with _evaluated_lock:
        runs, modes = _evaluated.get(id(model), (0, [(part, part.training) for part in model.modules()]))
        _evaluated[id(model)] = runs + 1, modes
        for part, _ in modes:
            part.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            runs, modes = _evaluated.pop(id(model))
            if runs > 1:
                _evaluated[id(model)] = runs - 1, modes
            else:
                for part, training in modes:
                    part.training = training


class _InOrder:
    """Hands out samples in the order asked for, as soon as all before them are there."""

    def __init__(self, samples: Tensor):
        self.samples, self.next = samples, 0
        self.waiting: dict[int, Tensor] = {}

    def put(self, part: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        places = part[part >= 0]
        if places.tolist() == list(range(self.next, self.next + len(places))) and not self.waiting:
            self.next += len(places)
            yield self.samples[places], x
            return
        self.waiting |= dict(zip(places.tolist(), x, strict=True))
        first = self.next
        ready = []
        while self.next in self.waiting:
            ready.append(self.waiting.pop(self.next))
            self.next += 1
        if ready:
            yield self.samples[first : self.next].clone(), layout.channels_last(torch.stack(ready))


class _Watch:
    """Stops a run whose network returned NaN or infinity, naming the first bad step and the samples; tells of steps.

    Waiting for the flag in each step would leave a GPU idle. There it is copied to the host behind the steps that are
    under way, and read one look later: so the host is never more than two looks ahead, and the GPU never waits.
    """

    def __init__(self, slots: Slots, taken: Tensor, samples: Tensor, told: Progress):
        self.slots, self.taken, self.samples, self.told = slots, taken, samples, told
        self.on_gpu, self.steps, self.copied = slots.bad.device.type == "cuda", 0, 0
        if self.on_gpu:
            self.host = torch.empty(len(taken), dtype=torch.int32, device="cpu", pin_memory=True)
            self.event = torch.cuda.Event()

    def after(self, k: int) -> None:
        """After the step at row k."""
        self.steps += 1
        if not self.on_gpu:
            self._judge(self.slots.bad)
        elif k % LOOK == 0:
            self._collect()
            self.host.copy_(self.slots.bad, non_blocking=True)
            self.event.record(torch.cuda.current_stream(self.slots.bad.device))
            self.copied, self.steps = self.steps, 0
            if k == 0:
                self._collect()

    def _collect(self) -> None:
        if self.copied:
            self.event.synchronize()
            self._judge(self.host, self.copied)

    def _judge(self, bad: Tensor, steps: int = 1) -> None:
        bad = bad[self.taken]
        first = int(bad.max())
        if first >= 0:
            named = self.samples[bad == first].tolist()
            raise ValueError(
                f"{self.slots.step(first)}: the network returned NaN or infinity for samples {named[:8]}"
                f"{' ...' * (len(named) > 8)}; try precision fp32, or another checkpoint"
            )
        self.told(steps, len(self.samples))


def _predicted(x: Tensor, m: Tensor, row: Tensor, scale: Tensor) -> Tensor:
    """x_0 as the step sees it (eq. 15), clipped where the schedule clips."""
    cx, cm, lo, hi = row[:4]
    return scale * (cx * x + cm * m.float()).clamp(lo, hi)


def sample_shape(net: UNet2D) -> tuple[int, ...]:
    """(C, H, W) of a network's samples, from its configuration."""
    size = net.config["sample_size"]
    return (net.config["in_channels"], *((size, size) if isinstance(size, int) else size))


def shipped_model() -> Path:
    """The folder of the model in the package."""
    return Path(__file__).parents[1] / "models" / SHIPPED


def device_and_precision(device: torch.device | str | None, precision: str) -> tuple[torch.device, str]:
    """Where and in what to compute: the GPU if there is one; for "auto", bf16 where the device computes it natively.

    Raises: ValueError: the device or the precision is unknown, or not to be had here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; want 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in PIXELS_PER_BATCH or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is '{device}', which is not to be had here; use 'cpu'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # another thread may have another
    if precision != "auto" and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; want one of auto, {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision is 'tf32', which '{device}' does not have; use fp32 or bf16")
    if precision != "auto":
        return device, precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return device, "bf16" if native else "fp32"
