"""Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239) as a loop: network, fused update, next step; and nothing else.

Sample i of a seed starts from noise that is a function of (seed, i), and every z added to it is one of (seed, i, t):
neither depends on the batch that sample i happens to be in.
"""

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import checkpoint, images, layout, noise, ops
from fastddpm.noise import address as _address  # `noise` is an argument where this is called
from fastddpm.schedule import Schedule, StepTable
from fastddpm.unet import UNet2D

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t [N] int64) -> eps, x_0 or v, like x_t
Network = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]  # (x, x in the precision, row, class labels) -> m
Callback = Callable[[int, int, Tensor, Tensor], object]  # (step, t, x_0, sample indices)

SHIPPED = "fashion-mnist"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIXELS_PER_BATCH = {"cpu": 1 << 16, "cuda": 1 << 20}  # by default: 64 and 1024 images of 32 x 32


class Sampler:
    """Draws samples from a trained eps-model.

    Args:
        model: a `UNet2D`, or any network (x_t [N, ...] float32, t [N] int64) -> tensor like x_t: images [N, C, H, W],
            sequences [N, C, L], vectors [N, D].
        schedule: the noise schedule the model was trained for.
        shape: of one sample, channels first; a `UNet2D` knows its own.
        device: "cuda" where there is one, else "cpu".
        precision: "fp32", "bf16" or "auto". The state, the noise and the update are float32 in any case. A `UNet2D`
            computes in the precision; any other model is called under torch.autocast for bf16. "auto" is bf16 for a
            `UNet2D` where the device computes it natively, else fp32.
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
        self.native = isinstance(model, UNet2D)
        if shape is None:
            if not isinstance(model, UNet2D) or not model.config["sample_size"]:
                raise ValueError("shape is missing; give that of one sample: (C, H, W), (C, L) or (D,)")
            shape = sample_shape(model)
        sizes = tuple(shape) if isinstance(shape, Iterable) else ()
        if not sizes or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise ValueError(f"shape is {shape!r}; want whole numbers > 0: (C, H, W), (C, L) or (D,)")
        self.model, self.schedule, self.shape = model, schedule, tuple(map(int, sizes))
        self.device, self.dtype = device_and_dtype(device, precision if self.native or precision != "auto" else "fp32")
        if isinstance(model, nn.Module) and not self.native:
            model.to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        shape: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
    ) -> "Sampler":
        """A sampler of a diffusers DDPM checkpoint.

        Args:
            source: a folder, or a Hugging Face hub id such as "google/ddpm-cifar10-32"; None: the model in the package,
                28 x 28 garments.
            variant: of the weights, such as "fp16".
            shape: of one sample, (C, H, W), where it shall not be that of the checkpoint.
            device, precision: as above.
        Raises: ValueError: there is no checkpoint, or it is damaged or needs something that is not supported.
        """
        folder = shipped_model() if source is None else source
        config, parameters, schedule = checkpoint.load(folder, variant=variant)
        with torch.device("meta"):
            net = UNet2D(**config)
        net.to_empty(device="cpu")
        checkpoint.load_into(net, parameters)
        return cls(net.eval(), schedule, shape=shape, device=device, precision=precision)

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
        done = [batch for _, batch in self.batches(samples, **how)]
        x = torch.cat(done) if done else layout.empty(0, self.shape, dtype=torch.float32)
        return images.to_uint8(x) if output == "uint8" else x

    def batches(
        self,
        samples: int | Iterable[int],
        *,
        seed: int = 0,
        steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        noise: bool = True,
        batch_size: int | None = None,
        class_labels: Iterable[int] | Tensor | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Draw samples and hand out each batch when it is finished.

        Args:
            samples: how many, or which, as in `sample`.
            seed: 0 <= seed < 2^64.
            steps: how many of the T timesteps to visit; None: all, the exact ancestral sampler.
            timesteps: visit exactly these instead, strictly descending.
            sampler: "ddpm" or "ddim"; eta: DDIM's, 0 is deterministic.
            noise: False switches sigma_t z off, and each step returns its mean.
            batch_size: samples computed together; None chooses by the device and the size of a sample.
            class_labels: of a class-conditional `UNet2D`: one label per sample.
            progress: show a bar.
            callback: called in each step as callback(step, t, x_0, indices), step counting from 0: sees the predicted
                clean samples x_0 (float32, like the batch) before the update. Both tensors are copies.
        Returns: an iterator over (sample indices [n] int64, samples [n, *shape] float32), both on the CPU.
        Raises: ValueError: as `sample`; for a bad argument at once, not in the first iteration.
        """
        table = self.schedule.table(steps, sampler=sampler, eta=eta, timesteps=timesteps, noise=noise)
        addresses = _address(seed, samples)
        size = self._batch_size() if batch_size is None else batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size is {size!r}; want a whole number, at least 1")
        labels = self._labels(class_labels, len(addresses))
        return self._batches(table.to(self.device), addresses, labels, size, progress, callback)

    def _batches(
        self,
        table: StepTable,
        addresses: Tensor,
        labels: Tensor | None,
        size: int,
        progress: bool,
        callback: Callback | None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        from tqdm import tqdm

        parts = [slice(start, start + size) for start in range(0, len(addresses), size)]
        bar = tqdm(total=len(parts) * len(table), desc="sample", unit="step", disable=not progress)
        with bar, _evaluating(self.model):
            network = self._network(table)
            for part in parts:
                label = None if labels is None else labels[part]
                yield addresses[part, 1].clone(), self._run(network, table, addresses[part], label, callback, bar).cpu()

    @torch.no_grad()
    def _run(
        self,
        network: Network,
        table: StepTable,
        addresses: Tensor,
        labels: Tensor | None,
        callback: Callback | None,
        bar: Any,
    ) -> Tensor:
        """All steps of one batch: [N, *shape] float32, channels-last."""
        address = addresses.to(self.device)
        labels = None if labels is None else labels.to(self.device)
        x = noise.normal(address, self.shape, stream=noise.START, t=table.num_train_timesteps)
        low = x.to(self.dtype)  # x itself in float32
        pos = torch.full((len(x),), len(table) - 1, dtype=torch.int32, device=self.device)
        watch = _Watch(table, addresses, self.device)
        for k in reversed(range(len(table))):
            with self._strict():
                m = network(x, low, k, labels)
            m = watch.checked(m, x, k)
            if callback is not None:
                step = len(table) - 1 - k
                callback(step, int(table.timesteps[k]), _predicted(x, m, table.rows[k]), addresses[:, 1].clone())
            if self.dtype == torch.float32:
                ops.step(x, m, table, pos, address)
            else:
                _, low = ops.step(x, m, table, pos, address, out_dtype=self.dtype)
            pos -= 1
            bar.update()
        watch.finish(x)
        return x

    def _network(self, table: StepTable) -> Network:
        """The model as the loop calls it; prepared anew for every run, so that weights changed in between are seen."""
        device, dtype, model = self.device, self.dtype, self.model
        if isinstance(model, UNet2D):
            net = model.for_inference(dtype, device)
            timesteps = table.timesteps
            if net.class_embedding is None:
                with torch.no_grad():
                    rows = net.time_rows(timesteps).to(dtype)
                return lambda x, low, k, labels: net.denoise(low, rows[k : k + 1])
            return lambda x, low, k, labels: net.denoise(low, net.time_rows(timesteps[k : k + 1], labels).to(dtype))

        t = table.timesteps.long().tolist()

        def call(x: Tensor, low: Tensor, k: int, labels: Tensor | None) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return model(x.clone(), torch.full((len(x),), t[k], device=device))  # a model may write to its input

        return call

    @contextmanager
    def _strict(self) -> Iterator[None]:
        """float32 of a `UNet2D` is float32: by default cuDNN's convolutions round to TF32. Set process-wide."""
        if not (self.native and self.device.type == "cuda" and self.dtype == torch.float32):
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
                yield
        finally:
            torch.set_float32_matmul_precision(matmul)

    def _labels(self, given: Iterable[int] | Tensor | None, count: int) -> Tensor | None:
        """One class label per sample: [N] int64, or [N, ...] as an embedding of type "identity" takes them."""
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

    def _batch_size(self) -> int:
        pixels = math.prod(self.shape[1:])
        return max(1, PIXELS_PER_BATCH[self.device.type] // max(pixels, 1 << 8))


@contextmanager
def _evaluating(model: Model | nn.Module) -> Iterator[None]:
    """No dropout and no batch statistics in a run; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class _Watch:
    """Stops a run whose network returned the wrong thing, naming the step and the samples.

    Reading a flag would make a GPU wait in every step, so there the first bad step is kept on the device and read at
    intervals.
    """

    def __init__(self, table: StepTable, addresses: Tensor, device: torch.device):
        self.timesteps, self.samples = table.timesteps.tolist(), addresses[:, 1].tolist()
        self.every = 1 if device.type == "cpu" else 100
        self.bad = torch.full((len(addresses),), -1, device=device)  # row at which each sample first went wrong

    def checked(self, m: Any, x: Tensor, k: int) -> Tensor:
        """m in channels-last memory, as the update takes it."""
        if not isinstance(m, Tensor) or m.shape != x.shape or not m.is_floating_point() or m.device != x.device:
            came = f"{tuple(m.shape)} {m.dtype} on {m.device}" if isinstance(m, Tensor) else f"a {type(m).__name__}"
            raise ValueError(
                f"{self._step(k)}: the network returned {came} for {tuple(x.shape)} on {x.device}; want a tensor with "
                "one value per element (lambda x, t: unet(x, t).sample for a diffusers model)"
            )
        m = layout.channels_last(m if m.dtype in ops.FLOATS else m.float())
        self._look(m, k)
        if k % self.every == 0:
            self._stop()
        return m

    def finish(self, x: Tensor) -> None:
        """After the last step, whose result is x."""
        self._look(x, 0)
        self._stop()

    def _look(self, values: Tensor, k: int) -> None:
        finite = values.isfinite().flatten(1).all(1)
        self.bad = torch.where((self.bad < 0) & ~finite, k, self.bad)

    def _stop(self) -> None:
        first = int(self.bad.max()) if len(self.bad) else -1
        if first >= 0:
            named = [sample for sample, bad in zip(self.samples, self.bad.tolist(), strict=True) if bad == first]
            raise ValueError(
                f"{self._step(first)}: the network returned NaN or infinity for samples {named[:8]}"
                f"{' ...' * (len(named) > 8)}; try precision fp32, or another checkpoint"
            )

    def _step(self, k: int) -> str:
        return f"step {len(self.timesteps) - k} of {len(self.timesteps)} (t = {self.timesteps[k]})"


def _predicted(x: Tensor, m: Tensor, row: Tensor) -> Tensor:
    """x_0 as the step sees it (eq. 15), clipped where the schedule clips."""
    cx, cm, lo, hi = row[:4]
    return (cx * x + cm * m.float()).clamp(lo, hi)


def sample_shape(net: UNet2D) -> tuple[int, ...]:
    """(C, H, W) of a network's samples, from its configuration."""
    size = net.config["sample_size"]
    return (net.config["in_channels"], *((size, size) if isinstance(size, int) else size))


def shipped_model() -> Path:
    """The folder of the model in the package."""
    return Path(__file__).parent / "models" / SHIPPED


def device_and_dtype(device: torch.device | str | None, precision: str) -> tuple[torch.device, torch.dtype]:
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
    if precision != "auto" and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; want one of auto, {', '.join(PRECISIONS)}")
    if precision != "auto":
        return device, PRECISIONS[precision]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return device, torch.bfloat16 if native else torch.float32
