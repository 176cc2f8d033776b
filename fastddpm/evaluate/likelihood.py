"""The variational bound on -log p(x_0) of a trained model, with all of its terms (Ho et al. 2020, arXiv:2006.11239).

    L_T      KL(q(x_T | x_0) || p(x_T)): the prior's, in closed form
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)): at our t = 1..T-1, the paper's t + 1, one draw of x_t each
    L_0      -log p(x_0 | x_1): the decoder's, at t = 0; of bytes the probability of their bins (eq. 13)

p is what the sampler draws from: its mean is the posterior's at the predicted x_0, clipped where the schedule clips.
With a fixed variance a term is a constant plus a factor times |predicted x_0 - x_0|^2, which `ops.x_0_error` sums on
the device; the constants, L_0 and terms with a learned variance are computed in float64, the last two by the reference
functions, element by element. Specification: `fastddpm.reference.likelihood`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import noise
from fastddpm.core.schedule import Schedule, step_rows
from fastddpm.reference.diffusion import predicted_x_0
from fastddpm.reference.likelihood import decoder_nll, normal_kl, normal_nll
from fastddpm.sampling.engine import Engine, Forward
from fastddpm.sampling.sampler import Sampler, evaluating, smaller

Term = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (m, x_0, t, address) of a batch -> its terms [n] float64


@dataclass(frozen=True, eq=False)
class Bound:
    """The terms of the bound of N images, in nats, on the CPU.

    Attributes:
        prior: [N] float64: L_T.
        decoder: [N] float64: L_0.
        timesteps: [N, K] int64, ascending: which of 1..T-1 were evaluated of each image.
        terms: [N, K] float64: L_{t-1} at each of them, as they are: not weighted.
        weights: [N, K] float64: how many terms each of them stands for; 1 where all were evaluated.
        num_train_timesteps: T.
        dimensions: elements of an image.

    A standard error is that over the images. It covers all that was drawn: the images out of their distribution, their
    timesteps and their noise; not that the model is evaluated in some precision. Of one image it is NaN.
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
        """[N] nats: L_1 + ... + L_T; without bias where K < T - 1, as each term of a subset stands for several."""
        return self.prior + (self.terms * self.weights).sum(1)

    @property
    def per_image(self) -> Tensor:
        """[N]: the bound of each image in bits/dim, all of its terms."""
        return self.bits(self.rate + self.decoder)

    def bits(self, nats: Tensor) -> Tensor:
        """Nats of images as bits per dimension."""
        return nats / (self.dimensions * math.log(2))

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean over the images and its standard error, in bits/dim.

        Keys: total (the bound); rate (L_1 + ... + L_T) and distortion (L_0), its two parts; prior (L_T), of the rate.
        """
        parts = {"rate": self.rate, "distortion": self.decoder, "prior": self.prior}
        return {"total": _mean(self.per_image)} | {name: _mean(self.bits(part)) for name, part in parts.items()}

    def per_timestep(self) -> tuple[Tensor, Tensor, Tensor]:
        """The terms by timestep: (t, mean, standard error), each [M], of the images that have a term at t.

        t is int64 and ascending, without those that no image has; means and errors are float64, in bits/dim.
        """
        T, t, terms = self.num_train_timesteps, self.timesteps.reshape(-1), self.bits(self.terms).reshape(-1)
        count = torch.zeros(T, dtype=torch.float64).index_add_(0, t, torch.ones_like(terms))
        mean = torch.zeros(T, dtype=torch.float64).index_add_(0, t, terms) / count
        squares = torch.zeros(T, dtype=torch.float64).index_add_(0, t, (terms - mean[t]).square())
        error = (squares / (count - 1) / count).sqrt()
        seen = count.nonzero()[:, 0]
        return seen, mean[seen], error[seen]


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
    """The variational bound of some data under a sampler's model and schedule.

    The noise and the timesteps of image i are functions of (seed, i) alone: the batch changes nothing but the network's
    own rounding. On a GPU the loop does not wait for what it finds.

    Args:
        sampler: of any model; its schedule says what p is: the variance_type, too, which may be learned.
        data: images uint8 [N, H, W, C], as `data.load_images` gives them, whose L_0 is the probability of their bytes;
            or floating point [N, *sampler.shape] in data units, computed in float32, whose L_0 is a density, not to be
            compared with the other; within the range to which the schedule clips, if it does.
        terms: of the T - 1 terms L_{t-1}, how many to evaluate of each image: K random timesteps, the more likely the
            earlier, as the early terms are the large ones; weighted so that the bound is unbiased. None: all.
        seed: 0 <= seed < 2^64.
        batch_size: pairs of an image and a timestep computed together; None chooses by the device and their size.
            Without enough memory it is halved, with a warning.
        class_labels: of a class-conditional `UNet2D`: one label per image.
        progress: show a bar.
    Raises: ValueError: an argument is not as above or does not fit the model, or a term is not finite; the message
        names image and timestep.
    """
    T, N = sampler.schedule.num_train_timesteps, len(data)
    x_0 = _checked(data, sampler.shape, sampler.schedule)
    size = sampler.default_batch_size() if batch_size is None else batch_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size is {size!r}; want a whole number, at least 1")
    least = min(1, T - 1)
    if terms is not None and (isinstance(terms, bool) or not isinstance(terms, int) or not least <= terms <= T - 1):
        raise ValueError(f"terms is {terms!r}; want a whole number from {least} to T - 1 = {T - 1}, or None: all")
    labels, addresses = sampler.checked_labels(class_labels, N), noise.address(seed, N)
    process = _Process(sampler, discrete=x_0.dtype == torch.uint8)
    timesteps, weights = systematic(T - 1, T - 1 if terms is None else terms, seed, N)
    size = min(size, N * max(1, timesteps.shape[1]))

    from tqdm import tqdm

    pairs = N * (1 + timesteps.shape[1])
    bar = tqdm(total=pairs, desc="likelihood", unit="term", disable=not progress)
    with bar, evaluating(sampler.model):
        loop = _Loop(sampler.engine, x_0, addresses, labels, process, size, bar)
        decoder = loop.over(torch.zeros(N, 1, dtype=torch.int64), process.distortion)[:, 0]
        rates = loop.over(timesteps, process.kl)
    prior = prior_kl(sampler.schedule, x_0)
    return Bound(prior, decoder, timesteps, rates, weights, T, math.prod(sampler.shape))


def systematic(population: int, count: int, seed: int, images: int) -> tuple[Tensor, Tensor]:
    """Which timesteps of 1..population are evaluated of each image, and how many each stands for.

    Systematic sampling with unequal probabilities: laid end to end, each timestep as long as it is likely, they are
    `count` long, and those are taken that lie at u, u + 1, ... of a u that is a function of (seed, image). The terms
    fall about as 1/t (Nichol & Dhariwal 2021, arXiv:2102.09672, figure 2), and so do the probabilities, up to 1.

    Returns: [images, count] int64, ascending; [images, count] float64: 1 / probability.
    """
    likely = _inclusion(population, count)
    if count in (0, population):
        chosen = torch.arange(1, count + 1).expand(images, -1)
    else:
        starts = [np.random.default_rng((seed, i)).random() for i in range(images)]
        places = torch.tensor(starts, dtype=torch.float64)[:, None] + torch.arange(count)
        chosen = 1 + torch.searchsorted(likely.cumsum(0)[:-1], places, right=True)
    return chosen, 1 / likely[chosen - 1]


def _inclusion(population: int, count: int) -> Tensor:
    """min(1, c / t) for t = 1..population with the c that makes its sum `count`: [population] float64."""
    likely = 1 / torch.arange(1, population + 1, dtype=torch.float64)
    certain = 0
    while certain < count and (count - certain) * likely[certain] >= likely[certain:].sum():
        certain += 1
    likely[certain:] *= (count - certain) / likely[certain:].sum()
    likely[:certain] = 1
    return likely


def prior_kl(schedule: Schedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in closed form: [N] float64 nats, on the CPU. x_0: [N, ...]."""
    abar = schedule.alphas_cumprod[-1]
    squares = torch.cat([_data_units(part).square().flatten(1).sum(1) for part in x_0.split(256)]).cpu()
    return (x_0[0].numel() * _excess(abar) + abar * squares) / 2


def check_returned(schedule: Schedule, channels: int, returned: int) -> None:
    """That a network for samples of so many channels returns as many; twice as many with a learned variance.

    Raises: ValueError: it does not.
    """
    if returned != (want := channels * (2 if schedule.learns_variance else 1)):
        raise ValueError(
            f"variance_type is {schedule.variance_type!r}, for which the network must return {want} channels, "
            f"but it returns {returned}; use {'a fixed' if schedule.learns_variance else 'a learned'} variance_type"
        )


class _Process:
    """The coefficients of the terms on the device, and the terms of a batch: [n] float64 nats, each."""

    def __init__(self, sampler: Sampler, *, discrete: bool):
        schedule, device, T = sampler.schedule, sampler.device, sampler.schedule.num_train_timesteps
        self.schedule, self.discrete, self.channels = schedule, discrete, sampler.shape[0]
        rows, scale = step_rows(replace(schedule, variance_type="fixed_small"), torch.arange(T))
        rows = torch.cat([rows[:, :4], scale[:, None]], 1)
        noising = schedule.noising_table()
        log_abar = schedule.log_alphas_cumprod
        abar_prev, noise_var = schedule.alphas_cumprod_prev, -log_abar.expm1()
        noise_var_prev = -torch.cat([torch.zeros(1, dtype=torch.float64), log_abar[:-1]]).expm1()
        small, large = noise_var_prev / noise_var * schedule.betas, schedule.betas.clone()  # eq. 7
        of_x_0 = abar_prev.sqrt() * schedule.betas / noise_var
        small[0] = small[1] if T > 1 else large[0]  # where the posterior's is 0, as in the authors' code
        fixed_small = schedule.variance_type.startswith("fixed_small")
        var = small if fixed_small else torch.cat([small[:1], large[1:]])
        shrunk = torch.zeros_like(var) if fixed_small else abar_prev * schedule.betas / noise_var  # 1 - small / large
        self.noising, self.rows = noising.to(device), rows.to(device)
        self.table = torch.cat([noising, rows.float()], 1).to(device)
        self.constant = (math.prod(sampler.shape) * _excess(shrunk) / 2).to(device)
        self.factor = (of_x_0.square() / (2 * var)).to(device)
        self.of_x_0, self.log_var = of_x_0.to(device), var.log().to(device)
        self.log_small, self.log_large = small.log().to(device), large.log().to(device)

    def kl(self, m: Tensor, x_0: Tensor, t: Tensor, address: Tensor) -> Tensor:
        """L_{t-1}, t >= 1."""
        if not self.schedule.learns_variance:
            error = ops.x_0_error(self._returned(m)[0], x_0, t, address, self.table)
            return self.constant[t] + self.factor[t] * error.double()
        mean_x_0, log_var = self._predicted(m, x_0, t, address)
        of_x_0, log_small = (_each(values[t], mean_x_0) for values in (self.of_x_0, self.log_small))
        # x_t's part of the two means is the same
        return normal_kl(of_x_0 * _data_units(x_0), log_small, of_x_0 * mean_x_0, log_var).flatten(1).sum(1)

    def distortion(self, m: Tensor, x_0: Tensor, t: Tensor, address: Tensor) -> Tensor:
        """L_0, t = 0."""
        mean, log_var = self._predicted(m, x_0, t, address)
        return (decoder_nll if self.discrete else normal_nll)(_data_units(x_0), mean, log_var).flatten(1).sum(1)

    def _predicted(self, m: Tensor, x_0: Tensor, t: Tensor, address: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted x_0, and log of p's variance, to be broadcast over it: float64."""
        m, v = self._returned(m)
        x_t = ops.noising(x_0, t, address, self.noising, stream=noise.LIKELIHOOD).double()
        mean = predicted_x_0(x_t, m, self.rows[t])
        if v is None:
            return mean, _each(self.log_var[t], mean)
        if self.schedule.variance_type == "learned":
            return mean, v.double().log()
        share = (v.double() + 1) / 2  # arXiv:2102.09672, eq. 15
        return mean, share * _each(self.log_large[t], mean) + (1 - share) * _each(self.log_small[t], mean)

    def _returned(self, m: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network returned for the mean, and for the variance."""
        check_returned(self.schedule, self.channels, m.shape[1])
        return (m[:, : self.channels], m[:, self.channels :]) if self.schedule.learns_variance else (m, None)


class _Loop:
    """Evaluates (image, timestep) pairs in batches of one size, so that one graph serves all.

    On a GPU the host is two batches ahead, so that the GPU never waits and the bar counts what is done.
    """

    def __init__(
        self,
        engine: Engine,
        x_0: Tensor,
        addresses: Tensor,
        labels: Tensor | None,
        process: _Process,
        size: int,
        bar: Any,
    ):
        self.engine, self.device, self.x_0, self.process = engine, engine.device, x_0, process
        self.size, self.bar, self.causes = size, bar, "NaN or infinity; try precision fp32"
        if process.schedule.variance_type == "learned":
            self.causes = "NaN, infinity or a variance that is not positive; try precision fp32, another variance_type"
        self.addresses = addresses.to(self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.pending: list[tuple[Tensor, Tensor, int, torch.cuda.Event | None]] = []

    def over(self, timesteps: Tensor, term: Term) -> Tensor:
        """term of each pair: [N, K] float64, on the CPU. timesteps: [N, K] int64."""
        t = timesteps.reshape(-1).to(self.device)
        out, done = torch.empty(timesteps.shape, dtype=torch.float64, device=self.device), 0
        while done < out.numel():
            forward, failure = None, ""  # the network of a batch that did not fit is let go
            try:
                with self._forward() as forward:
                    while done < out.numel():
                        self._batch(forward, t, term, out, done)
                        done += self.size
                        if len(self.pending) > 2:
                            self._judge(timesteps)
            except torch.OutOfMemoryError as error:
                failure = str(error).splitlines()[0]  # the error itself would keep the memory
            if failure:
                self.size = smaller(self.engine, self.size, failure)
        while self.pending:
            self._judge(timesteps)
        return out.cpu()

    @contextmanager
    def _forward(self) -> Iterator[Forward]:
        """The network, ready for batches of the size."""
        T, batches = self.process.schedule.num_train_timesteps, -(-self.bar.total // self.size)
        labels = None if self.labels is None else self.labels[:1].expand(self.size, *self.labels.shape[1:])
        with self.engine.forward(self.size, batches) as forward:
            forward.prepare(torch.arange(T), labels, apart=True)
            with forward.working():
                yield forward

    def _batch(self, forward: Forward, timesteps: Tensor, term: Term, out: Tensor, start: int) -> None:
        """term of the pairs from `start` on into out, [N, K]. timesteps: [N * K]."""
        K, end = out.shape[1], min(start + self.size, out.numel())
        pair = torch.arange(start, start + self.size, device=self.device).clamp(max=out.numel() - 1)
        first, n, t = start // K, pair // K, timesteps[pair]
        # the images of a batch are neighbours
        x_0 = self._there(self.x_0[first : (end - 1) // K + 1])[n - first].movedim(-1, 1)
        if self.labels is not None and forward.labels is not None:
            forward.labels.copy_(self.labels[n])
        address = self.addresses[n]
        x_t = ops.noising(x_0, t, address, self.process.noising, stream=noise.LIKELIHOOD, dtype=forward.low.dtype)
        terms = out.view(-1)[start:end].copy_(term(forward.at(x_t, t), x_0, t, address)[: end - start])
        self._watch(terms, start)

    def _watch(self, terms: Tensor, start: int) -> None:
        """Ask whether the terms from pair `start` on are finite, without waiting for the answer."""
        finite, event = terms.isfinite().all(), None
        if self.device.type == "cuda":
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self.pending.append((terms, finite, start, event))

    def _judge(self, timesteps: Tensor) -> None:
        """The oldest answer: move the bar, or raise."""
        terms, finite, start, event = self.pending.pop(0)
        if event is not None:
            event.synchronize()
        if not finite:
            bad = int((~terms.isfinite()).nonzero()[0])
            i, k = divmod(start + bad, timesteps.shape[1])
            where = f"the term of image {i} at t = {int(timesteps[i, k])}"
            raise ValueError(
                f"{where} is {terms[bad]:g}, for which the network returned {self.causes}, or another checkpoint"
            )
        self.bar.update(len(terms))

    def _there(self, x_0: Tensor) -> Tensor:
        """Images on the device; copied from pinned memory, which does not wait."""
        if x_0.device == self.device:
            return x_0.contiguous()
        x_0 = x_0.contiguous()
        return (x_0.pin_memory() if self.device.type == "cuda" else x_0).to(self.device, non_blocking=True)


def _checked(data: Any, shape: tuple[int, ...], schedule: Schedule) -> Tensor:
    """Data with its channels last, [N, *spatial, C], uint8 or float32; a view of it where possible."""
    x = torch.as_tensor(data).cpu()  # from where batches are sent to any device
    if x.dtype == torch.uint8:
        want: tuple[int, ...] = (*shape[1:], shape[0])
    elif x.is_floating_point():
        x, want = x.float(), shape
    else:
        raise ValueError(f"data is {tuple(x.shape)} {x.dtype}; want uint8 [N, H, W, C] or floating point [N, *shape]")
    if x.shape[1:] != want or not len(x):
        sizes = ", ".join(map(str, want))
        raise ValueError(f"data is {tuple(x.shape)} {x.dtype}; want [N, {sizes}] with N >= 1 for this model")
    if x.dtype == torch.uint8:
        return x
    if not x.isfinite().all():
        raise ValueError(f"data of sample {int((~x.isfinite()).flatten(1).any(1).nonzero()[0])} is not finite")
    furthest = x.flatten()[x.abs().argmax()]
    if schedule.clip_sample and furthest.abs() > schedule.clip_sample_range:
        most = f"{schedule.clip_sample_range:g}"
        raise ValueError(
            f"data reaches {furthest:g}, but the schedule clips x_0 to [-{most}, {most}]; scale the data, "
            "or set clip_sample to False"
        )
    return x.movedim(1, -1)


def _data_units(x: Tensor) -> Tensor:
    """float64: bytes as [-1, 1], all else as it is."""
    return (x.double() - 127.5) / 127.5 if x.dtype == torch.uint8 else x.double()


def _each(values: Tensor, like: Tensor) -> Tensor:
    """[n] to be broadcast over the elements of each entry."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _excess(shrunk: Tensor) -> Tensor:
    """r - 1 - log r of a ratio of variances r = 1 - shrunk: twice the divergence of two normals of one mean."""
    return -shrunk - torch.log1p(-shrunk)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return float(values.mean()), float(error)
