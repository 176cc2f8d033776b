"""Draws samples from a trained DDPM.

Sample i of a seed starts from noise that is a function of (seed, i), and every z added to it is a function of
(seed, i, t): neither depends on the batch that sample i happens to be in.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import checkpoints
from fastddpm.core import layout
from fastddpm.core.checks import is_whole, whole
from fastddpm.core.noise import address as noise_address  # `noise` is an argument where this is called
from fastddpm.core.precision import Compute
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import StepColumns, StepTable
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.batches import (
    PIXELS_PER_BATCH,
    PIXELS_PER_MICRO_BATCH,
    InOrder,
    default_size,
    evaluating,
    size_after_failure,
    split,
)
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.loop import Observe, reverse_process
from fastddpm.sampling.model import Model
from fastddpm.sampling.runner import Runner
from fastddpm.sampling.watch import OnSteps, StepWatch
from fastddpm.storage import images

Callback = Callable[[int, int, Tensor, Tensor], object]  # (step, t, x_0, sample indices)


class Sampler:
    """Draws samples from a trained model.

    Args:
        model: a `UNet2D`, or any network (x_t [N, ...] float32, t [N] int64) -> tensor like x_t: images [N, C, H, W],
            sequences [N, C, L], vectors [N, D].
        schedule: the noise schedule that the model was trained for.
        shape: of one sample, channels first; None: that of a `UNet2D`.
        device: None: "cuda" if there is a GPU, else "cpu".
        precision: "fp32", "tf32" (on a GPU: float32 whose products are rounded to TF32), "bf16", "fp16" or "auto". The
            state, the noise, the update, the norms' statistics and all that depends on t alone are float32 in any case.
            A `UNet2D` computes in the precision; any other model is called under torch.autocast for bf16 and fp16.
            "auto" is bf16 for a `UNet2D` if the device computes it natively, else fp32.
        engine: "eager"; "compiled", by torch.compile, whose first call takes a minute; "graph", each step the replay of
            one CUDA graph; "compiled+graph"; or "auto": "graph" for a `UNet2D` on a GPU if the run has enough steps,
            else "eager", with the same bits. In a graph, your own model must not wait for the GPU, and its decisions in
            Python are made once, at the capture. If its weights may be replaced, pass the module itself, not a function
            that wraps it; changes in place take effect with the next batch in any case.
        batch_invariant: give sample i the same bits whatever is drawn with it. Every batch then has the same number of
            entries, with sample i at entry i modulo that number; other entries stay empty. True chooses the number by
            the device and the size of a sample; a whole number sets it.
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
                "makes one from a diffusers scheduler"
            )
        if shape is None:
            if not isinstance(model, UNet2D) or not model.config["sample_size"]:
                raise ValueError("shape is missing; give that of one sample: (C, H, W), (C, L) or (D,)")
            shape = sample_shape(model)
        sizes = tuple(shape) if isinstance(shape, Iterable) else ()
        if not sizes or not all(is_whole(n) and n > 0 for n in sizes):
            raise ValueError(f"shape is {shape!r}; want whole numbers > 0: (C, H, W), (C, L) or (D,)")
        self.schedule, self.shape = schedule, tuple(map(int, sizes))
        if not isinstance(model, UNet2D) and precision == "auto":
            precision = "fp32"
        self.compute = Compute.resolve(device, precision)
        self.engine = Engine(model, self.shape, schedule.num_train_timesteps, self.compute, engine)
        self.micro_batch = self._micro_batch(batch_invariant)
        self._largest = sys.maxsize  # batches are at most this large, after a larger one ran out of memory
        if isinstance(model, nn.Module) and not isinstance(model, UNet2D):
            model.to(self.device)

    @property
    def model(self) -> Model | nn.Module:
        return self.engine.model

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def precision(self) -> str:
        return self.compute.precision

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.compute.dtype

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
        """Load a DDPM checkpoint in the format of diffusers.

        Args:
            source: a folder, or a Hugging Face hub id such as "google/ddpm-cifar10-32"; None: the bundled
                model, 28 x 28 garments.
            variant: of the weights, such as "fp16".
            shape: (C, H, W) of one sample; None: that of the checkpoint.
            device, precision, engine, batch_invariant: as in the constructor.
        Raises: ValueError: there is no checkpoint, or it is damaged or needs something that is not supported.
        """
        compute = Compute.resolve(device, precision)
        folder = checkpoints.shipped_model() if source is None else source
        config, parameters, schedule = checkpoints.load(folder, variant=variant)
        with torch.device("meta"):
            net = UNet2D(**config)
        net.to_empty(device=compute.device)
        checkpoints.load_into(net, parameters)
        return cls(
            net.eval(),
            schedule,
            shape=shape,
            device=compute.device,
            precision=compute.precision,
            engine=engine,
            batch_invariant=batch_invariant,
        )

    def sample(
        self,
        samples: int | Iterable[int],
        *,
        output: str = "float",
        seed: int = 0,
        steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        noise: float = True,
        batch_size: int | None = None,
        class_labels: Iterable[int] | Tensor | None = None,
        progress: bool | OnSteps = True,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            samples: how many (indices 0, 1, ...), or the sample indices, each 0 <= index < 2^56.
            output: "float": [N, *shape] float32 in data units, [-1, 1] if the schedule clips;
                "uint8": images [N, H, W, C].
            seed, steps, ..., callback: as in `batches`.
        Returns: all samples on the CPU, in the order requested.
        Raises: ValueError: an argument is not as above, or the network returned something else than one finite number
            per element; the message names the step.
        """
        if output not in ("float", "uint8"):
            raise ValueError(f"output is {output!r}; want 'float' or 'uint8'")
        if output == "uint8" and len(self.shape) != 3:
            raise ValueError(f"output is 'uint8', but a sample is {self.shape}, not an image (C, H, W); use 'float'")
        if isinstance(samples, Iterable) and not isinstance(samples, Tensor):
            samples = tuple(samples)
        batches = self.batches(
            samples,
            seed=seed,
            steps=steps,
            timesteps=timesteps,
            sampler=sampler,
            eta=eta,
            noise=noise,
            batch_size=batch_size,
            class_labels=class_labels,
            progress=progress,
            callback=callback,
        )
        count = int(samples) if is_whole(samples) else len(samples)  # type: ignore[arg-type]
        out = layout.empty(count, self.shape, dtype=torch.float32, device="cpu")
        if output == "uint8":
            out = torch.empty(count, *self.shape[1:], self.shape[0], dtype=torch.uint8, device="cpu")
        done = 0
        with closing(batches):  # so that its progress bar ends before an error is shown
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
        progress: bool | OnSteps = True,
        callback: Callback | None = None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Draw samples, and yield each batch when it is finished.

        Args:
            samples: how many, or which, as in `sample`.
            seed: 0 <= seed < 2^64.
            steps: how many of the T timesteps to visit; None: all, the exact ancestral sampler.
            timesteps: visit exactly these instead, strictly descending.
            sampler: "ddpm" or "ddim"; eta: DDIM's, 0 is deterministic. For many steps of DDIM use a schedule
                with clip_sample=False (docs/sigma.md).
            noise: a factor of sigma_t z; False is 0, so that each step returns its mean.
            batch_size: samples computed together; None chooses by the device and the size of a sample. If memory runs
                out it is halved, with a warning, for all later batches too. It does not apply with batch_invariant.
            class_labels: one per sample, for a class-conditional `UNet2D`.
            progress: show a bar; or a function to call instead: progress(steps since the last call, samples in their
                batch).
            callback: called in each step as callback(step, t, x_0, indices), step counting from 0: sees the predicted
                clean samples x_0 (float32, like the batch) before the update. Both tensors are copies.
        Returns: an iterator over (sample indices [n] int64, samples [n, *shape] float32), both on the CPU, in the order
            requested.
        Raises: ValueError: as in `sample`; for a bad argument at the call, not in the first iteration.
        """
        table = self.schedule.table(steps, sampler=sampler, eta=eta, timesteps=timesteps, noise=noise)
        addresses = noise_address(seed, samples)
        size = self.default_batch_size() if batch_size is None else whole("batch_size", batch_size, 1)
        labels = self.checked_labels(class_labels, len(addresses))
        return self._batches(table, addresses, labels, size, progress, callback)

    def _batches(
        self,
        table: StepTable,
        addresses: Tensor,
        labels: Tensor | None,
        size: int,
        progress: bool | OnSteps,
        callback: Callback | None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        from tqdm import tqdm

        size = min(size, self._largest)
        samples = addresses[:, 1]
        waiting, in_order = deque(split(samples, size, self.micro_batch)), InOrder(samples)
        silent = callable(progress) or not progress
        bar = tqdm(total=len(waiting) * len(table), desc="sample", unit="step", disable=silent)
        on_steps = progress if callable(progress) else lambda steps, _: bar.update(steps)
        with bar, evaluating(self.model):
            while waiting:
                batch, done = waiting.popleft(), bar.n
                try:
                    x = self._run(table, batch, addresses, labels, callback, bar, on_steps)
                except torch.OutOfMemoryError as error:
                    failure, x = str(error).splitlines()[0], None  # the error itself would keep the memory
                if x is None:
                    size = size_after_failure(self.engine, len(batch), failure, self.micro_batch)
                    if size < len(batch):
                        self._largest = size
                    waiting = deque(torch.cat([batch, *waiting]).split(size))
                    bar.n, bar.total = done, done + len(waiting) * len(table)
                else:
                    yield from in_order.put(batch, x)

    def _run(
        self,
        table: StepTable,
        batch: Tensor,
        addresses: Tensor,
        labels: Tensor | None,
        callback: Callback | None,
        bar: Any,
        on_steps: OnSteps,
    ) -> Tensor:
        """All steps of one batch: [n, *shape] float32 on the CPU, channels-last, without empty entries."""
        occupied = batch >= 0
        places = batch.clamp(min=0)  # an empty entry computes the first sample; the result is dropped
        capture = callback is None and self.engine.captures(len(table))
        with self.engine.runner(len(batch), capture=capture) as runner:
            if self.engine.compiles:
                bar.set_description("compile")  # which takes minutes
            runner.load(table, addresses[places], None if labels is None else labels[places])
            bar.set_description("sample", refresh=False)
            samples = addresses[places, 1][occupied]
            watch = StepWatch(runner, occupied, samples, on_steps)
            observe = None if callback is None else _observer(callback, runner, table, occupied, samples)
            for row in reverse_process(runner, observe):
                watch.after(row)
            x = runner.x.to("cpu", copy=True)
        return x if occupied.all() else layout.channels_last(x[occupied])

    def checked_labels(self, given: Iterable[int] | Tensor | None, count: int) -> Tensor | None:
        """One class label per sample: [N] int64, or [N, ...] as an embedding of type "identity" takes them.

        Raises: ValueError: the labels do not have this form, are missing, or this model takes none.
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
        """How many samples are computed together by default."""
        return default_size(self.shape, PIXELS_PER_BATCH[self.device.type])

    def _micro_batch(self, batch_invariant: bool | int) -> int:
        """The fixed number of entries of every batch; 0: batches have no fixed size."""
        if isinstance(batch_invariant, bool):
            return default_size(self.shape, PIXELS_PER_MICRO_BATCH[self.device.type]) if batch_invariant else 0
        if not is_whole(batch_invariant) or batch_invariant < 1:
            raise ValueError(f"batch_invariant is {batch_invariant!r}; want True, False or a whole number, at least 1")
        return int(batch_invariant)


def _observer(callback: Callback, runner: Runner, table: StepTable, occupied: Tensor, samples: Tensor) -> Observe:
    """A function that calls the callback with the x_0 of a step (eq. 15), clipped if the schedule clips."""

    def observe(row: int, model_output: Tensor) -> None:
        c = StepColumns.of(runner.table.rows[row])
        x_0 = runner.table.scale[row] * (c.cx * runner.x + c.cm * model_output.float()).clamp(c.lo, c.hi)
        x_0 = x_0 if occupied.all() else x_0[occupied.to(x_0.device)]
        callback(len(table) - 1 - row, int(table.timesteps[row]), x_0, samples.clone())

    return observe


def sample_shape(net: UNet2D) -> tuple[int, ...]:
    """(C, H, W) of a network's samples, from its configuration."""
    size = net.config["sample_size"]
    return (net.config["in_channels"], *((size, size) if isinstance(size, int) else size))
