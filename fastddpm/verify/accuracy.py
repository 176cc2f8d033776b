"""Measures of how far a result is from the reference, and the record of one comparison."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHANCE = 5  # standard errors: chance alone exceeds them once in two million comparisons


@dataclass(frozen=True)
class Record:
    """One comparison. Without an error it was skipped.

    Attributes:
        rung: a key of `rungs.RUNGS`.
        compared: what was compared with what.
        error: how far apart they are: the number of unequal elements if bound is 0, else an error or a squared Fréchet
            distance.
        bound: the largest error that passes.
        note: an explanation: why the comparison was skipped or failed, or what its numbers mean.
        steps: for a trajectory, (t, error, error of plain torch) after each step, as root mean squares.
    """

    rung: str
    compared: str
    error: float | None = None
    bound: float | None = None
    note: str = ""
    steps: Sequence[tuple[int, float, float]] = ()

    @property
    def verdict(self) -> str:
        """pass, FAIL or skipped. NaN fails."""
        if self.error is None or self.bound is None:
            return "skipped"
        return "pass" if self.error <= self.bound < math.inf else "FAIL"


def accuracy(ours: Tensor, plain: Tensor, ref: Tensor) -> list[tuple[str, float, float]]:
    """Compare the errors of two results in one dtype, against float64.

    Args:
        ours: the result to judge.
        plain: the result of plain torch.
        ref: the result in float64.
    Returns: (measure, error of ours, bound) for the largest error and for the root mean square. The bound is twice
        plain torch's error; an error of plain torch below half a unit in the last place counts as that.
    Raises: ValueError: the shapes differ.
    """
    if not ours.shape == plain.shape == ref.shape:
        raise ValueError(
            f"ours is {tuple(ours.shape)}, plain {tuple(plain.shape)}, ref {tuple(ref.shape)}; want equal shapes"
        )
    half_ulp = torch.finfo(plain.dtype).eps / 2
    results = []
    for name, measure in (("max", largest), ("rms", root_mean_square)):
        plain_error = max(measure(plain.double() - ref), half_ulp * measure(ref))
        results.append((name, measure(ours.double() - ref), 2 * plain_error))
    return results


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def unequal(got: Tensor, want: Tensor) -> float:
    """The number of elements whose bits differ; infinity if shape or dtype differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    return float((got.cpu().view(integers) != want.cpu().view(integers)).sum())


def accuracy_records(rung: str, compared: str, ours: Tensor, plain: Tensor, ref: Tensor) -> Iterator[Record]:
    """One record for each measure of `accuracy`."""
    for measure, error, bound in accuracy(ours.to(ref.device), plain, ref):
        yield Record(rung, f"{compared}, {measure}", error, bound)


def normality_records(rung: str, compared: str, z: Tensor) -> Iterator[Record]:
    """Compare the mean and the variance of z, which should be standard normal, with 0 and 1, within chance."""
    n = z.numel()
    yield Record(rung, f"{compared}, its mean with 0", abs(float(z.mean())), CHANCE / math.sqrt(n))
    yield Record(rung, f"{compared}, its variance with 1", abs(float(z.square().mean()) - 1), CHANCE * math.sqrt(2 / n))
