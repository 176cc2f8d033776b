"""Draws samples from a trained DDPM.

Sample i of a seed starts from noise that is a function of (seed, i), and every z added to it is a function of
(seed, i, t): neither depends on the batch that sample i happens to be in.
"""

import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import checkpoints
from fastddpm.core.checks import checked_call, is_whole, shown, whole
from fastddpm.core.noise import address as noise_address  # `noise` is an argument where this is called
from fastddpm.core.precision import PRECISIONS, Compute
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import StepColumns, StepTable
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.arguments import (
    check_functions,
    checked_labels,
    checked_model,
    checked_output,
    checked_schedule,
    checked_shape,
    takes_x_t,
)
from fastddpm.sampling.batches import (
    MOST_ENTRIES,
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
from fastddpm.sampling.own_network import own_dtype
from fastddpm.sampling.runner import Runner
from fastddpm.sampling.watch import OnSteps, StepWatch
from fastddpm.storage import images

Callback = Callable[..., object]  # (step, t, x_0, sample indices), and x_t for one with an argument of this name


class Sampler:
    """Draws samples from a trained model.

    Args:
        model: a `UNet2D`, or any network (x_t [N, ...], t [N] int64) -> tensor like x_t: images [N, C, H, W],
            sequences [N, C, L], vectors [N, D]. The tensor may be `.sample` of an object, or the first item of a tuple,
            as networks of diffusers return it. The network is in evaluation mode while it samples, also if a function
            calls it. It is handed x_t in its own dtype and in contiguous memory, or in channels-last memory if it was
            converted to that. A `UNet2D` is fused; one that was changed (hooks, replaced parts, other methods or
            attributes) is called as it is, with one warning that names the change.
        schedule: the noise schedule that the model was trained for.
        shape: of one sample, channels first; None: that of a `UNet2D`.
        device: None: "cuda" if there is a GPU, else "cpu".
        precision: "fp32", "tf32" (on a GPU: float32 whose products are rounded to TF32), "bf16", "fp16" or "auto". The
            state, the noise, the update, the norms' statistics and all that depends on t alone are float32 in any case.
            A `UNet2D` computes in the precision; any other model is called under torch.autocast for bf16 and fp16.
            "auto" is bf16 for a `UNet2D` if the device computes it natively; any other model has its own dtype, else
            fp32.
        engine: "eager"; "compiled", by torch.compile, whose first call takes a minute; "graph", each step the replay of
            one CUDA graph; "compiled+graph"; or "auto": "graph" for a `UNet2D` on a GPU if the run has enough steps,
            else "eager", with the same bits. In a graph, your own model must not wait for the GPU, and its decisions in
            Python are made once, at the capture. Tensors that it reads may change in place; if tensors, arrays,
            numbers or functions that it can reach from Python are replaced, the next batch captures it again. What is
            hidden from that must not change: the environment, context variables, what it imports in a call.
        batch_invariant: give sample i the same bits whatever is drawn with it. Every batch then has the same number of
            entries, with sample i at entry i modulo that number; other entries stay empty. True chooses the number by
            the device and the size of a sample; a whole number sets it.
    Raises: ValueError: an argument is not as above.
    """

    @checked_call
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
        checked_model(model)
        if shape is None and isinstance(model, UNet2D) and model.config["sample_size"]:
            shape = sample_shape(model)
        self.schedule, self.shape = checked_schedule(schedule), checked_shape(shape)
        self._classes: tuple[str, ...] | None = None
        self._decoder: Path | None = None
        own = None
        if not isinstance(model, UNet2D) and precision == "auto":
            own = own_dtype(model)
            precision = next((name for name, dtype in PRECISIONS.items() if dtype == own), "fp32")
        self.compute = Compute.resolve(device, precision)
        self.engine = Engine(model, self.shape, self.schedule.num_train_timesteps, self.compute, engine, own)
        self.micro_batch = self._micro_batch(batch_invariant)
        self._largest = sys.maxsize  # batches are at most this large, after a larger one ran out of memory
        if isinstance(model, nn.Module) and not isinstance(model, UNet2D):
            model.to(self.device)

    def __repr__(self) -> str:
        settings = f"T={self.schedule.num_train_timesteps}, shape={self.shape}, device='{self.device}'"
        settings += f", precision='{self.precision}', engine='{self.engine.prepared.kind}'"
        settings += f", batch_invariant={self.micro_batch}" if self.micro_batch else ""
        settings += f", classes={len(self.classes)}" if self.classes else ""
        model = getattr(self.model, "__qualname__", None) or type(self.model).__name__
        return f"Sampler({model}, {settings})"

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
        return self.engine.prepared.dtype

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of their labels, if the checkpoint has them."""
        return self._classes

    @property
    def decoder(self) -> Path | None:
        """The folder of the pipeline whose VAE turns the samples, latents, into images; None for images."""
        return self._decoder

    @classmethod
    @checked_call
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        schedule: Schedule | None = None,
        shape: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
        engine: str = "auto",
        batch_invariant: bool | int = False,
        format: str = "auto",
        **config: Any,
    ) -> "Sampler":
        """Load a DDPM checkpoint in the format of diffusers, guided-diffusion, improved-diffusion or lucidrains.

        Args:
            source: a folder, or a Hugging Face hub id such as "google/ddpm-cifar10-32"; None or "fashion-mnist": the
                bundled model, 28 x 28 garments; or a file of weights of another project, such as "model-100.pt".
            variant: of the weights, such as "fp16".
            schedule: use this one and not that of the checkpoint, which then needs none.
            shape: (C, H, W) of one sample; None: that of the checkpoint.
            device, precision, engine, batch_invariant: as in the constructor.
            format, config: of a file of weights: see `fastddpm.checkpoints.load`.
        Raises: ValueError: there is no checkpoint, or it is damaged or needs something that is not supported.
        """
        compute = Compute.resolve(device, precision)
        folder = checkpoints.shipped_model() if source is None else source
        checkpoint = checkpoints.load(folder, variant=variant, schedule=schedule, format=format, **config)
        for note in checkpoint.notes:
            warnings.warn(note, stacklevel=3)
        net = checkpoint.network
        if net is None:
            with torch.device("meta"):
                net = UNet2D(**checkpoint.config)
            net.to_empty(device=compute.device)
            checkpoints.load_into(net, checkpoint.parameters)
        sampler = cls(
            net.eval(),
            checkpoint.schedule,
            shape=checkpoint.shape if shape is None else shape,
            device=compute.device,
            precision=compute.precision,
            engine=engine,
            batch_invariant=batch_invariant,
        )
        sampler._classes, sampler._decoder = checkpoint.classes, checkpoint.decoder
        return sampler

    @checked_call
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
        checked_output(output, self.shape, self.decoder)
        samples = noise_address(seed, samples)[:, 1]
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
        shape, dtype = self.shape, torch.float32
        if output == "uint8":
            shape, dtype = (*self.shape[1:], self.shape[0]), torch.uint8
        out = torch.empty(len(samples), *shape, dtype=dtype, device="cpu")
        done = 0
        with closing(batches):  # so that its progress bar ends before an error is shown
            for _, x in batches:
                out[done : done + len(x)] = images.to_uint8(x) if output == "uint8" else x
                done += len(x)
        return out

    @checked_call
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
            callback: called in each step as callback(step, t, x_0, indices), step counting from 0: sees the clean
                samples x_0 predicted from x_t (float32, like the batch) before the update. One that has an argument
                named x_t is given the states x_t by that name, too. The tensors are copies.
        Returns: an iterator over (sample indices [n] int64, samples [n, *shape] float32), both on the CPU, in the order
            requested.
        Raises: ValueError: as in `sample`; for a bad argument at the call, not in the first iteration.
        """
        check_functions(progress, callback)
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

        size = min(size, self._largest, max(1, len(addresses)))
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
        """All steps of one batch: [n, *shape] float32 on the CPU, contiguous, without empty entries."""
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
            x = runner.x.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return x if occupied.all() else x[occupied]

    def checked_labels(self, given: Iterable[int] | Tensor | None, count: int) -> Tensor | None:
        """See `arguments.checked_labels`."""
        return checked_labels(given, count, self.model)

    def default_batch_size(self) -> int:
        """How many samples are computed together by default."""
        return default_size(self.shape, PIXELS_PER_BATCH[self.device.type])

    def _micro_batch(self, batch_invariant: bool | int) -> int:
        """The fixed number of entries of every batch; 0: batches have no fixed size."""
        if isinstance(batch_invariant, bool):
            return default_size(self.shape, PIXELS_PER_MICRO_BATCH[self.device.type]) if batch_invariant else 0
        if not is_whole(batch_invariant) or not 1 <= batch_invariant <= MOST_ENTRIES:
            given = shown(batch_invariant)
            raise ValueError(f"batch_invariant is {given}; want True, False or a whole number, 1 to {MOST_ENTRIES}")
        return int(batch_invariant)


def _observer(callback: Callback, runner: Runner, table: StepTable, occupied: Tensor, samples: Tensor) -> Observe:
    """A function that calls the callback with x_0 of a step (eq. 15), clipped if the schedule clips."""
    sees_x_t = takes_x_t(callback)

    def observe(row: int, model_output: Tensor) -> None:
        c = StepColumns.of(runner.table.rows[row])
        x_0 = runner.table.scale[row] * (c.cx * runner.x + c.cm * model_output.float()).clamp(c.lo, c.hi)
        occupied_of = lambda x: x.contiguous() if occupied.all() else x[occupied.to(x.device)].contiguous()
        more = {"x_t": occupied_of(runner.x.clone())} if sees_x_t else {}
        callback(len(table) - 1 - row, int(table.timesteps[row]), occupied_of(x_0), samples.clone(), **more)

    return observe


def sample_shape(net: UNet2D) -> tuple[int, ...]:
    """(C, H, W) of a network's samples, from its configuration."""
    size = net.config["sample_size"]
    return (net.config["in_channels"], *((size, size) if isinstance(size, int) else size))
