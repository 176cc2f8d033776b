"""The variational bound on -log p(x_0) of a trained model, with all of its terms (Ho et al. 2020, arXiv:2006.11239).

    L_T      KL(q(x_T | x_0) || p(x_T)): the prior term, in closed form
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)): at our t = 1..T-1, the paper's t + 1, with one draw of x_t
    L_0      -log p(x_0 | x_1): the decoder term, at our t = 0; for bytes, the probability of their bins (eq. 13)

p is the distribution that the sampler draws from: its mean is that of the posterior at the predicted x_0, clipped if
the schedule clips. With a fixed variance a term is a constant plus a factor times |predicted x_0 - x_0|^2, which
`ops.x_0_error` sums on the device. The constants, L_0 and terms with a learned variance are computed in float64; the
last two by the reference functions, element by element. Specification: `fastddpm.reference.likelihood`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.audio import Audio
from fastddpm.core import noise
from fastddpm.core.checks import checked_call, flag, is_whole, shown, whole
from fastddpm.core.memory import send
from fastddpm.evaluate.terms import BoundTerms, prior_kl, systematic
from fastddpm.networks.fused import labelled
from fastddpm.reference.likelihood import BYTES, PCM, SIGNS, Bins
from fastddpm.sampling.batch_network import BatchNetwork
from fastddpm.sampling.batches import evaluating, size_after_failure
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.watch import Watch
from fastddpm.storage.audio import FULL_SCALE
from fastddpm.text import Text

FEW_TIMESTEPS = 40  # up to this number, a plot shows each one; else
BIN_TERMS, BIN_WIDTH = 10, 1.1  # bins of at least so many terms, and of at least this ratio between the t of neighbours

# (model output, x_0, t, address) of a batch -> its terms [n] float64
Term = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bound:
    """The terms of the bound for N images, in nats, on the CPU.

    Attributes:
        prior: [N] float64: L_T.
        decoder: [N] float64: L_0.
        timesteps: [N, K] int64, ascending: those of 1..T-1 that were evaluated for each image.
        terms: [N, K] float64: L_{t-1} at each of them, not weighted.
        weights: [N, K] float64: how many terms each of them stands for; 1 if all were evaluated.
        num_train_timesteps: T.
        dimensions: the number of elements of an image.

    A standard error is that of a mean over the images. It covers everything that was drawn: the images from their
    distribution, their timesteps and their noise. It does not cover the model's rounding. For one image it is NaN.
    """

    prior: Tensor
    decoder: Tensor
    timesteps: Tensor
    terms: Tensor
    weights: Tensor
    num_train_timesteps: int
    dimensions: int

    @property
    def rate(self) -> Tensor:
        """[N] nats: L_1 + ... + L_T; an unbiased estimate if K < T - 1, where each term stands for several."""
        return self.prior + (self.terms * self.weights).sum(1)

    @property
    def per_image(self) -> Tensor:
        """[N]: the whole bound of each image, in bits/dim."""
        return self.bits(self.rate + self.decoder)

    def bits(self, nats: Tensor) -> Tensor:
        """Convert nats per image to bits per dimension."""
        return nats / (self.dimensions * math.log(2))

    def summary(self) -> dict[str, tuple[float, float]]:
        """(mean over the images, its standard error) in bits/dim.

        Keys: total (the bound); its two parts rate (L_1 + ... + L_T) and distortion (L_0); prior (L_T, part of rate).
        """
        parts = {"rate": self.rate, "distortion": self.decoder, "prior": self.prior}
        per_part = {name: _mean_and_error(self.bits(part)) for name, part in parts.items()}
        return {"total": _mean_and_error(self.per_image)} | per_part

    def per_timestep(self) -> tuple[Tensor, Tensor, Tensor]:
        """(t, mean, standard error), each [M], over the images that have a term at t.

        t is int64 and ascending, without timesteps that no image has. Mean and error are float64, in bits/dim.
        """
        t, terms = self.timesteps.reshape(-1), self.bits(self.terms).reshape(-1)
        zeros = torch.zeros(self.num_train_timesteps, dtype=torch.float64, device="cpu")
        count = zeros.index_add(0, t, torch.ones_like(terms))
        mean = zeros.index_add(0, t, terms) / count
        squares = zeros.index_add(0, t, (terms - mean[t]).square())
        error = (squares / (count - 1) / count).sqrt()
        seen = count.nonzero()[:, 0]
        return seen, mean[seen], error[seen]

    def binned(self) -> tuple[Tensor, Tensor, Tensor]:
        """`per_timestep` for a plot: where there are more than `FEW_TIMESTEPS`, those of bins, with float64 t.

        A bin holds neighbours, at least `BIN_TERMS` terms. Its t is their geometric mean; its mean and its error are
        over the images, each by the mean of its terms in the bin.
        """
        t, counts = self.timesteps.unique(return_counts=True)
        if len(t) <= FEW_TIMESTEPS:
            return self.per_timestep()
        bin_of = torch.zeros(self.num_train_timesteps, dtype=torch.int64, device="cpu")
        for number, inside in enumerate(_bins(t.tolist(), counts.tolist())):
            bin_of[inside] = number
        bins = bin_of[self.timesteps]
        zeros = torch.zeros(len(bins), int(bins.max()) + 1, dtype=torch.float64, device="cpu")
        drawn = zeros.scatter_add(1, bins, torch.ones_like(self.terms))
        log_t = zeros.scatter_add(1, bins, (self.timesteps + 1).double().log()).sum(0) / drawn.sum(0)
        per_image = zeros.scatter_add(1, bins, self.bits(self.terms)) / drawn  # NaN: the image has no term in the bin
        images = (drawn > 0).sum(0)
        mean = per_image.nansum(0) / images
        error = ((per_image - mean).square().nansum(0) / (images - 1) / images).sqrt()
        return log_t.exp() - 1, mean, error


@checked_call
def bound(
    sampler: Sampler,
    data: np.ndarray | Tensor,
    *,
    terms: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    class_labels: Iterable[int] | Tensor | None = None,
    progress: bool = True,
) -> Bound:
    """The variational bound of data under a sampler's model and schedule.

    The noise and the timesteps of image i are functions of (seed, i) alone: the batch size changes nothing but the
    network's own rounding. On a GPU the loop does not wait for results.

    Args:
        sampler: with any model. Its schedule defines p, including the variance_type, which may be learned.
        data: images uint8 [N, H, W, C], as `datasets.load_images` returns them: L_0 is the probability of their bytes.
            int16 [N, *sampler.shape], waveforms: the probability of the sample values. Floating point
            [N, *sampler.shape] in data units, computed in float32, within the clipping range if the schedule clips: a
            density, which is not comparable with a probability. If the sampler's medium is text in bits, every value
            must be -1 or 1, and L_0 is the probability of the signs.
        terms: K, how many of the T - 1 terms L_{t-1} to evaluate for each image, at random timesteps. Early ones are
            more likely, since their terms are large; the weights keep the bound unbiased. None: all.
        seed: 0 <= seed < 2^64.
        batch_size: how many pairs of an image and a timestep are computed together; None chooses by the device and the
            size of an image. If memory runs out it is halved, with a warning.
        class_labels: for a class-conditional `UNet2D`: one label per image.
        progress: show a bar.
    Raises: ValueError: an argument is not as above or does not fit the model, or a term is not finite; the message
        names image and timestep.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler is {shown(sampler)}; want a Sampler, such as Sampler.from_pretrained(...)")
    progress = flag("progress", progress)
    if sampler.value_range not in (None, (-1.0, 1.0)):
        raise ValueError(f"the sampler's value_range is {sampler.value_range}; the bound is for data in [-1, 1]")
    x_0, bins = _channels_last_data(data, sampler)
    T, N = sampler.schedule.num_train_timesteps, len(x_0)
    if sampler.decoder is not None and x_0.dtype == torch.uint8:
        raise ValueError("data are images, but the model is of latents; want its latents, as floating-point numbers")
    size = sampler.default_batch_size() if batch_size is None else whole("batch_size", batch_size, 1)
    least = min(1, T - 1)
    if terms is not None and (not is_whole(terms) or not least <= terms <= T - 1):
        raise ValueError(f"terms is {shown(terms)}; want a whole number from {least} to T - 1 = {T - 1}, or None: all")
    labels, addresses = sampler.checked_labels(class_labels, N), noise.address(seed, N)
    bound_terms = BoundTerms(sampler, bins=bins)
    timesteps, weights = systematic(T - 1, T - 1 if terms is None else int(terms), seed, N)
    size = min(size, N * max(1, timesteps.shape[1]))

    from tqdm import tqdm

    bar = tqdm(total=N * (1 + timesteps.shape[1]), desc="likelihood", unit="term", disable=not progress)
    with bar, evaluating(sampler.model):
        evaluator = _PairEvaluator(sampler.engine, x_0, addresses, labels, bound_terms, size, bar)
        decoder = evaluator.evaluate(bound_terms.distortion, torch.zeros(N, 1, dtype=torch.int64, device="cpu"))[:, 0]
        rates = evaluator.evaluate(bound_terms.kl, timesteps)
    prior = prior_kl(sampler.schedule, x_0)
    return Bound(prior, decoder, timesteps, rates, weights, T, math.prod(sampler.shape))


class _PairEvaluator:
    """Evaluates terms for pairs of an image and a timestep, in batches of equal size, so that one graph serves all.

    On a GPU the host is two batches ahead: the GPU never waits, and the bar counts batches that are finished.
    """

    def __init__(
        self,
        engine: Engine,
        x_0: Tensor,
        addresses: Tensor,
        labels: Tensor | None,
        terms: BoundTerms,
        size: int,
        bar: Any,
    ):
        self.engine, self.device = engine, engine.device
        self.x_0, self.terms, self.size, self.bar = x_0, terms, size, bar
        self.addresses = addresses.to(self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.watch = Watch(behind=2)

    def evaluate(self, term: Term, timesteps: Tensor) -> Tensor:
        """Evaluate a term for each pair. Args: timesteps: [N, K] int64. Returns: [N, K] float64, on the CPU."""
        t = timesteps.reshape(-1).to(self.device)
        out = torch.empty(timesteps.shape, dtype=torch.float64, device=self.device)
        done = 0
        while done < out.numel():
            network, failure = None, ""  # frees the network of a batch that did not fit
            try:
                with self._network() as network:
                    while done < out.numel():
                        values = self._batch(network, t, term, out, done)
                        for due in self.watch.look(values.isfinite().all(), values, done, timesteps):
                            self._judge(*due)
                        done += self.size
            except torch.OutOfMemoryError as error:
                failure = str(error).splitlines()[0]  # not the error: its traceback would keep tensors alive
            if failure:
                self.size = size_after_failure(self.engine, self.size, failure)
        for due in self.watch.finish():
            self._judge(*due)
        return out.cpu()

    @contextmanager
    def _network(self) -> Iterator[BatchNetwork]:
        """The network, prepared for batches of `size`."""
        T, batches = self.terms.schedule.num_train_timesteps, -(-self.bar.total // self.size)
        labels = None if self.labels is None else self.labels[:1].expand(self.size, *self.labels.shape[1:])
        with self.engine.network(self.size, capture=self.engine.captures(batches)) as network:
            network.prepare(torch.arange(T, device="cpu"), labelled(labels), per_entry=True)
            with network.working():
                yield network

    def _batch(self, network: BatchNetwork, timesteps: Tensor, term: Term, out: Tensor, start: int) -> Tensor:
        """Evaluate a term for a batch of pairs, from pair `start` on; pair i is entry i of out and timesteps.

        Args: timesteps: [N * K]; out: [N, K], which the terms are written to.
        Returns: the terms.
        """
        K, end = out.shape[1], min(start + self.size, out.numel())
        pair = torch.arange(start, start + self.size, device=self.device).clamp(max=out.numel() - 1)
        first, n, t = start // K, pair // K, timesteps[pair]
        # the images of a batch are neighbours: one copy to the device
        x_0 = send(self.x_0[first : (end - 1) // K + 1].contiguous(), self.device)[n - first].movedim(-1, 1)
        if self.labels is not None and network.labels is not None:
            network.read_labels(self.labels[n])
        address = self.addresses[n]
        x_t = ops.noising(x_0, t, address, self.terms.noising, stream=noise.LIKELIHOOD, dtype=network.input.dtype)
        return out.view(-1)[start:end].copy_(term(network(x_t, t), x_0, t, address)[: end - start])

    def _judge(self, finite: Tensor, values: Tensor, start: int, timesteps: Tensor) -> None:
        """Count the terms from pair `start` on. Raises: ValueError: one is not finite."""
        if not finite:
            bad = int((~values.isfinite()).nonzero()[0])
            i, k = divmod(start + bad, timesteps.shape[1])
            causes = "NaN or infinity"
            if self.terms.schedule.variance_type == "learned":
                causes = "NaN, infinity or a variance that is not positive, as with another variance_type than its own"
            raise ValueError(
                f"the term of image {i} at t = {int(timesteps[i, k])} is {values[bad]:g}: the network returned "
                f"{causes}; {self.engine.prepared.advice_on_nan()}"
            )
        self.bar.update(len(values))


def _bins(timesteps: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """The timesteps of each bin. Args: timesteps: ascending; counts: how many terms each has."""
    bins: list[list[int]] = []
    held = 0  # terms in the last bin
    for t, count in zip(timesteps, counts, strict=True):
        if not bins or (held >= BIN_TERMS and t + 1 >= BIN_WIDTH * (bins[-1][0] + 1)):
            bins.append([])
            held = 0
        bins[-1].append(t)
        held += count
    if held < BIN_TERMS and len(bins) > 1:
        bins[-2:] = [bins[-2] + bins[-1]]
    return bins


def _channels_last_data(data: Any, sampler: Sampler) -> tuple[Tensor, Bins | None]:
    """Data on the CPU with channels last, [N, *spatial, C], uint8 or float32, a view of it if possible; and their bins.

    Raises: ValueError: data is not as `bound` takes it.
    """
    shape, schedule = sampler.shape, sampler.schedule
    wanted = "want uint8 [N, H, W, C], or int16 or floating point [N, *shape]"
    try:
        x = torch.as_tensor(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"data is {shown(data)}; {wanted}") from error
    bins = {torch.uint8: BYTES, torch.int16: PCM}.get(x.dtype)
    if x.dtype == torch.uint8:
        want: tuple[int, ...] = (*shape[1:], shape[0])
    elif x.dtype == torch.int16:
        if isinstance(sampler.medium, Audio) and sampler.medium.code != "waveform":
            raise ValueError(
                "data is int16, but the model draws spectrograms; pass sampler.medium.encode(data / 32768)"
            )
        x, want = x.float() / FULL_SCALE, shape
    elif x.is_floating_point() and x.layout == torch.strided:
        x, want = x.float(), shape
    else:
        layout = "" if x.layout == torch.strided else f" {x.layout}"
        raise ValueError(f"data is {tuple(x.shape)} {x.dtype}{layout}; {wanted}")
    if x.shape[1:] != want or not len(x):
        sizes = ", ".join(map(str, want))
        raise ValueError(f"data is {tuple(x.shape)} {x.dtype}; want [N, {sizes}] with N >= 1 for this model")
    if x.dtype == torch.uint8:
        return x, bins
    if not x.isfinite().all():
        sample = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"data of sample {sample} is not finite; want finite numbers")
    farthest = x.flatten()[x.abs().argmax()]
    if schedule.clip_sample and farthest.abs() > schedule.clip_sample_range:
        limit = f"{schedule.clip_sample_range:g}"
        raise ValueError(
            f"data reaches {farthest:g}, but the schedule clips x_0 to [-{limit}, {limit}]; scale the data, "
            "or set clip_sample to False"
        )
    if isinstance(sampler.medium, Text) and sampler.medium.code == "bits":
        if not (x.abs() == 1).all():
            raise ValueError("data has values other than -1 and 1; pass sampler.medium.encode(texts)")
        bins = SIGNS
    return x.movedim(1, -1), bins


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean, and its standard error."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[:1], math.nan)[0]
    return float(values.mean()), float(error)
