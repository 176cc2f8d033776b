"""Draws samples from a trained DDPM.

Sample i of a seed starts from noise that is a function of (seed, i), and every z added to it is a function of
(seed, i, t): neither depends on the batch that sample i happens to be in.
"""

import os
import sys
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import checkpoints
from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.medium import Medium
from fastddpm.core.checks import checked_call, takes_options_of, whole
from fastddpm.core.noise import address as noise_address  # `noise` is an argument where this is called
from fastddpm.core.precision import PRECISIONS, Compute
from fastddpm.core.schedule import Schedule, elements
from fastddpm.core.table import StepTable
from fastddpm.networks.fused import is_own
from fastddpm.sampling.arguments import (
    check_functions,
    checked_labels,
    checked_model,
    checked_output,
    checked_range,
    checked_schedule,
    checked_shape,
    checked_times,
    frame_rows,
    sample_shape,
)
from fastddpm.sampling.batches import PIXELS_PER_BATCH, default_size, micro_batch
from fastddpm.sampling.beginning import remaining_steps
from fastddpm.sampling.condition_arguments import ConditionArguments
from fastddpm.sampling.conditions import Conditions, X0Function
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.model import Model
from fastddpm.sampling.own_network import own_dtype
from fastddpm.sampling.parallel import Rounds, in_rounds
from fastddpm.sampling.run import Callback, Run
from fastddpm.sampling.watch import OnSteps
from fastddpm.storage import images


class Sampler:
    """Draws samples from a trained model.

    Args:
        model: a `UNet2D` or `UNet1D`, or any network (x_t [N, ...], t [N] int64) -> tensor like x_t: images [N, C, H,
            W], sequences [N, C, L], vectors [N, D]. The tensor may be `.sample` of an object, or the first item of a
            tuple, as networks of diffusers return it. The network is in evaluation mode while it samples, also if a
            function calls it. It is handed x_t in its own dtype and in contiguous memory, or in channels-last memory if
            it was converted to that. The first two are fused; one that was changed (hooks, replaced parts, other
            methods or attributes) is called as it is, with one warning that names the change.
        schedule: the noise schedule that the model was trained for. If it learns variances, the network returns twice
            the channels.
        shape: of one sample, channels first; None: that of a `UNet2D` or `UNet1D`.
        device: None: "cuda" if there is a GPU, else "cpu".
        precision: "fp32", "tf32" (on a GPU: float32 whose products are rounded to TF32), "bf16", "fp16" or "auto". The
            state, the noise, the update, the norms' statistics and all that depends on t alone are float32 in any case.
            A `UNet2D` or `UNet1D` computes in the precision; any other model is called under torch.autocast for bf16
            and fp16. "auto" is bf16 for these two if the device computes it natively; any other model has its own
            dtype, else fp32.
        engine: "eager"; "compiled", by torch.compile, whose first call takes a minute; "graph", each step the replay of
            one CUDA graph; "compiled+graph"; or "auto": "graph" for these two on a GPU if the run has enough steps,
            else "eager", with the same bits. In a graph, your own model must not wait for the GPU, and its decisions in
            Python are made once, at the capture. Tensors that it reads may change in place; if tensors, arrays,
            numbers or functions that it can reach from Python are replaced, the next batch captures it again. What is
            hidden from that must not change: the environment, context variables, what it imports in a call.
        batch_invariant: give sample i the same bits whatever is drawn with it. Every batch then has the same number of
            entries, with sample i at entry i modulo that number; other entries stay empty. True chooses the number by
            the device and the size of a sample; a whole number sets it.
        timestep_scale: the network gets the float t * timestep_scale instead of the integer t.
        timestep_values: [T] or [T, 1]: what the network gets for t = 0, ..., T - 1, as networks of a continuous time
            need; instead of timestep_scale.
        value_range: the least and the largest number of the data, to which x_0 is clipped if the schedule clips; None:
            +- its clip_sample_range. output="uint8" maps these two numbers to 0 and 255; with None, -1 and 1.
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
        timestep_scale: float | None = None,
        timestep_values: Iterable[float] | Tensor | None = None,
        value_range: tuple[float, float] | None = None,
    ):
        checked_model(model)
        self.schedule = checked_schedule(schedule)
        if shape is None and is_own(model) and model.config["sample_size"]:
            shape = sample_shape(model, self.schedule)
        self.shape, self.value_range = checked_shape(shape), checked_range(value_range)
        self._about = Checkpoint({}, {}, self.schedule)  # what it says besides the network and the schedule
        T = self.schedule.num_train_timesteps
        times = checked_times(timestep_scale, timestep_values, T)
        own = None
        if not is_own(model) and precision == "auto":
            own = own_dtype(model)
            precision = next((name for name, dtype in PRECISIONS.items() if dtype == own), "fp32")
        self.compute = Compute.resolve(device, precision)
        self.engine = Engine(model, self.shape, T, self.compute, engine, own, times)
        self.micro_batch = micro_batch(batch_invariant, self.shape, self.device)
        self._largest = sys.maxsize  # batches are at most this large, after a larger one ran out of memory
        if isinstance(model, nn.Module) and not is_own(model):
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
        return self._about.classes

    @property
    def null_label(self) -> int | None:
        """The class label that stands for no class, for guidance, if the checkpoint has one."""
        return self._about.null_label

    @property
    def decoder(self) -> Path | None:
        """The folder of the pipeline whose VAE turns the samples, latents, into images; None for images."""
        return self._about.decoder

    @property
    def medium(self) -> Medium | None:
        """What the samples are, if the checkpoint says that they are sounds or texts; None: images, or just numbers."""
        return self._about.medium

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
        timestep_scale: float | None = None,
        value_range: tuple[float, float] | None = None,
        format: str = "auto",
        **config: Any,
    ) -> "Sampler":
        """Load a DDPM checkpoint of one of the projects in `fastddpm.checkpoints.FORMATS`.

        Args:
            source: a folder, or a Hugging Face hub id such as "google/ddpm-cifar10-32"; None or "fashion-mnist": the
                bundled model, 28 x 28 garments; or a file of weights of another project, such as "model-100.pt".
            variant: of the weights, such as "fp16".
            schedule: use this one and not that of the checkpoint, which then needs none.
            shape: (C, H, W) of one sample; None: that of the checkpoint.
            device, precision, engine, batch_invariant, value_range: as in the constructor.
            timestep_scale: as in the constructor; None: that of the checkpoint.
            format, config: of a file of weights: see `fastddpm.checkpoints.load`.
        Raises: ValueError: there is no checkpoint, or it is damaged or needs something that is not supported.
        """
        compute = Compute.resolve(device, precision)
        folder = checkpoints.shipped_model() if source is None else source
        checkpoint = checkpoints.load(folder, variant=variant, schedule=schedule, format=format, **config)
        for note in checkpoint.notes:
            warnings.warn(note, stacklevel=3)
        sampler = cls(
            checkpoint.build(compute.device),
            checkpoint.schedule,
            shape=checkpoint.shape if shape is None else shape,
            device=compute.device,
            precision=compute.precision,
            engine=engine,
            batch_invariant=batch_invariant,
            timestep_scale=checkpoint.timestep_scale if timestep_scale is None else timestep_scale,
            value_range=value_range,
        )
        sampler._about = replace(checkpoint, config={}, parameters={}, network=None)
        return sampler

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
        model_kwargs: Mapping[str, Any] | None = None,
        concat: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        guide_variance: bool = False,
        start: Tensor | None = None,
        start_timestep: int | None = None,
        init: Tensor | None = None,
        strength: float | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        resample: int = 1,
        x_0_fn: X0Function | None = None,
        trajectory: Iterable[int] | None = None,
        parallel: str = "off",
        window: int | None = None,
        rounds: Rounds | None = None,
        progress: bool | OnSteps = True,
        callback: Callback | None = None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Draw samples, and yield each batch when it is finished.

        What belongs to a sample ([N, ...] below: a tensor or an array with an entry per sample, in the order of
        `samples`) follows it into whatever batch it is in. A function that needs more can ask for `sample_index`: a
        network, or an x_0_fn, that has an argument of this name is given the sample indices [n] int64 of its entries.

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
            class_labels: one per sample, for a class-conditional `UNet2D` or `UNet1D`.
            model_kwargs: further arguments of the network by name: [N, ...] tensors, also in dicts and lists; numbers,
                strings and None are the same for all samples. Tensors here and below must not change meanwhile.
            concat: [N, C', *spatial]: channels that follow those of x_t on the way into the network.
            guidance_scale: classifier-free guidance (arXiv:2207.12598): m_u + scale (m_c - m_u), where m_c is the
                output with the condition and m_u without; one number or [N].
            uncond_kwargs: with guidance, the arguments that differ for m_u, by name: a number, a tensor like one
                sample's, or [N, ...]. All others are those of model_kwargs. With class labels it is the null label,
                {"class_labels": k}; None: that of the checkpoint.
            guide_variance: guide a learned variance, too, as implementations do that combine all channels; else it is
                that of m_c, as in DiT, GLIDE and DeepFloyd IF.
            start: [N, *shape]: the states x_t at start_timestep, to begin with instead of x_T.
            init: [N, *shape]: x_0 that are noised to begin with; strength, 0 < strength <= 1: the share of the steps
                that is taken, the last ones (SDEdit, arXiv:2108.01073).
            known, mask: [N, *shape], and a mask for one sample or [N, ...], true where known holds the x_0: after each
                step this part is drawn from q(x_{t-1} | x_0), and in the result it is x_0 (inpainting).
            resample: with known: how often to take each step but the last, going back to x_t before each repetition
                (RePaint, arXiv:2201.09865, with jumps of one step).
            x_0_fn: x_0_fn(x_0 [n, *shape], t [n] int64) returns the x_0 with which the step continues: for
                thresholding, rounding to embeddings, guidance by a gradient (under `torch.enable_grad`). It is given
                x_0 already clipped, if the schedule clips; what it returns is not clipped again.
            trajectory: visited timesteps at which to keep x_t: a sample is then [K + 1, *shape], these states and x_0.
            parallel: take several steps per network call, to draw a few samples with less delay (docs/parallel.md):
                "law" is exact in distribution, for fixed variances; "bits" has the bits of "off" with the same window:
                in both, the network reads x_t in bf16.
            window: steps of one sample per network call; None: 16 if parallel. With a window, batch_size is the number
                of samples side by side, by default the usual batch size divided by the window.
            rounds: a `Rounds` to fill: counts the network calls, and the steps of each round of each sample.
            progress: show a bar; or a function to call instead: progress(steps since the last call, samples in their
                batch); with a window progress(1, steps of all samples in a round).
            callback: called in each step as callback(step, t, x_0, indices), step counting from 0: sees the clean
                samples x_0 predicted from x_t (float32, like the batch; after x_0_fn) before the update. One that has
                an argument named x_t is given the states x_t by that name, too. The tensors are copies. With resample,
                each repetition is a step of its own.
        Returns: an iterator over (sample indices [n] int64, samples [n, *shape] float32), both on the CPU, in the order
            requested.
        Raises: ValueError: as in `sample`; for a bad argument at the call, not in the first iteration.
        """
        check_functions(progress, callback)
        timesteps = None if timesteps is None else elements(timesteps)
        table, noising = remaining_steps(
            self.table(steps, sampler=sampler, eta=eta, timesteps=timesteps, noise=noise, with_x_0=x_0_fn is not None),
            self.schedule,
            start=start,
            start_timestep=start_timestep,
            init=init,
            strength=strength,
            listed=timesteps is not None,
        )
        addresses = noise_address(seed, samples)
        given = ConditionArguments(
            class_labels=class_labels,
            model_kwargs=model_kwargs,
            concat=concat,
            guidance_scale=guidance_scale,
            uncond_kwargs=uncond_kwargs,
            guide_variance=guide_variance,
            start=start,
            init=init,
            known=known,
            mask=mask,
            resample=resample,
            x_0_fn=x_0_fn,
        )
        size = self.default_batch_size() if batch_size is None else whole("batch_size", batch_size, 1)
        conditions = self.conditions(given, len(addresses), noising)
        run = Run(
            *(table, addresses, conditions, min(size, self._largest)),
            micro_batch=self.micro_batch,
            frames=frame_rows(trajectory, table),
            progress=progress,
            callback=callback,
            on_smaller=self._batches_are_at_most,
        )
        run = in_rounds(run, self.engine, parallel, window, rounds, chains=batch_size)
        return run.batches(self.engine)

    @checked_call
    @takes_options_of(batches)
    def sample(self, samples: int | Iterable[int], *, output: str = "float", **options: Any) -> Tensor:
        """Draw samples.

        Args:
            samples: how many (indices 0, 1, ...), or the sample indices, each 0 <= index < 2^56.
            output: "float": [N, *shape] float32 in data units, such as [-1, 1];
                "uint8": images [N, H, W, C].
            options: as in `batches`: seed, steps, class_labels and so on.
        Returns: all samples on the CPU, in the order requested; with a trajectory of K timesteps [N, K + 1, ...].
        Raises: ValueError: an argument is not as above, or the network returned something else than one finite number
            per element; the message names the step.
        """
        checked_output(output, self.shape, self.decoder)
        samples = noise_address(options.get("seed", 0), samples)[:, 1]
        shape, dtype = self.shape, torch.float32
        if output == "uint8":
            shape, dtype = (*self.shape[1:], self.shape[0]), torch.uint8
        out, done = None, 0
        with closing(self.batches(samples, **options)) as batches:  # so that its progress bar ends before an error
            for _, x in batches:
                frames = x.shape[1 : x.ndim - len(shape)]
                if out is None:
                    out = torch.empty(len(samples), *frames, *shape, dtype=dtype, device="cpu")
                out[done : done + len(x)] = self._uint8(x) if output == "uint8" else x
                done += len(x)
        return torch.empty(0, *shape, dtype=dtype, device="cpu") if out is None else out

    def table(self, steps: int | None = None, **options: Any) -> StepTable:
        """`Schedule.table` with x_0 clipped to the range of the values. Raises: ValueError: as that."""
        return self.schedule.table(steps, clip_range=self.value_range, **options)

    def checked_labels(self, given: Iterable[int] | Tensor | None, count: int) -> Tensor | None:
        """See `arguments.checked_labels`."""
        return checked_labels(given, count, self.model)

    def conditions(self, given: ConditionArguments, count: int, noising: Tensor | None = None) -> Conditions:
        """See `ConditionArguments.conditions`."""
        if given.guide_variance is True and not self.schedule.learns_variance:
            raise ValueError("guide_variance is True, but the schedule has no learned variance; leave it out")
        return given.conditions(count, model=self.model, shape=self.shape, null_label=self.null_label, noising=noising)

    def _batches_are_at_most(self, size: int) -> None:
        self._largest = min(self._largest, size)

    def _uint8(self, x: Tensor) -> Tensor:
        """Samples, or frames of samples, as images."""
        low, high = self.value_range or (-1.0, 1.0)
        if (low, high) != (-1.0, 1.0):
            x = (x - low) * (2 / (high - low)) - 1
        return images.to_uint8(x.flatten(0, -4)).unflatten(0, x.shape[:-3])

    def default_batch_size(self) -> int:
        """How many samples are computed together by default."""
        return default_size(self.shape, PIXELS_PER_BATCH[self.device.type])
