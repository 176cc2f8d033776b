"""The Fréchet distance between two sets of samples: that of Gaussians fitted to their features.

It is the idea of the FID (Heusel et al. 2017, arXiv:1706.08500). A value means little alone: it depends on the features
and on the number of samples. Compare it with the distance between two sets of one distribution.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.core import checks, noise

BLOCK = 8192  # features widened to float64 at once: 128 MiB of Inception's
MOST_REPLICATES = 1_000_000  # of the bootstrap
WIDTHS = (16, 24)  # channels of the random network's two layers


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features, in float64.

    It is biased upwards, and the more so the fewer the features are: compare only distances of equal N and M.

    Args: a, b: [N, D] and [M, D], N, M >= 2, D >= 1.
    Raises: ValueError: a or b has no finite numbers, or the shapes are not as above; or the distance is beyond float64.
    """
    a, b = (_as_features(name, x) for name, x in (("a", a), ("b", b)))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or not a.shape[1]:
        want = "want [N, D] and [M, D], N, M >= 2, D >= 1"
        raise ValueError(f"features are {list(a.shape)} and {list(b.shape)}; {want}")
    for name, x in (("a", a), ("b", b)):
        if not x.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; want finite features")
    return finite(gaussian_distance(*moments(a), *moments(b)))


def finite(distance: float) -> float:
    """The same distance. Raises: ValueError: it is not finite."""
    if not math.isfinite(distance):
        raise ValueError("the distance is not finite: the features are too large for it; name another extractor")
    return distance


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), never negative; [D] and [D, D] float64."""
    return _distance((mean_a, _root(cov_a)), (mean_b, _root(cov_b)))


def moments(x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] over N - 1, in float64.

    Args:
        x: [N, D] features.
        counts: [N] integers, how often each row counts; None: once.
    """
    counts = torch.ones(len(x), dtype=torch.int64, device=x.device) if counts is None else counts
    n, rows = counts.sum(), counts.nonzero().flatten()  # a resampling leaves out 1/e of the rows
    mean, cov = x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros(2 * x.shape[1:], dtype=torch.float64)
    for part in rows.split(BLOCK):
        mean += counts[part].double() @ x[part].double() / n
    for part in rows.split(BLOCK):
        centred = (x[part].double() - mean) * counts[part].double().sqrt()[:, None]
        cov.addmm_(centred.T, centred)
    return mean, cov / (n - 1)


def are_moments(mean: Tensor, cov: Tensor, x: Tensor) -> bool:
    """Whether mean and cov are `moments(x)`, but for rounding; x is [N, D], N >= 2.

    The covariance is compared in eight random directions, which takes a small part of the time of `moments`.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    directions = torch.randn(x.shape[1], 8, generator=generator, dtype=torch.float64, device="cpu")
    parts = x.split(BLOCK)
    want = sum((part.double().sum(0) for part in parts), torch.zeros_like(mean)) / len(x)
    along = torch.cat([(part.double() - want) @ directions for part in parts]).square().sum(0) / (len(x) - 1)
    spread = (cov.diag().clamp(min=0) + (1e-9 * want).square()).sqrt()
    same_mean = (mean - want).abs() <= 1e-12 * (spread + want.abs())
    found = (directions * (cov @ directions)).sum(0)
    same_cov = (found - along).abs() <= 1e-12 * (spread @ directions.abs()).square()
    return bool(same_mean.all() and same_cov.all())


def is_covariance(cov: Tensor, mean: Tensor) -> bool:
    """Whether [D, D] float64 is symmetric without negative eigenvalues, but for rounding.

    That is rounding to float32, and what E[x^2] - mean^2 leaves in float64, such as -1e-14 where 0 is meant.
    """
    largest = cov.diag().max().clamp(min=0)
    cancellation = 1e-12 * (1 + mean.square().max())
    if not torch.allclose(cov, cov.T, rtol=1e-6, atol=float(1e-10 * largest + cancellation)):
        return False
    # the Cholesky factorisation fails where an eigenvalue is below that much less than 0
    shift = 1e-6 * largest + cancellation
    shifted = cov + shift * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    return bool(torch.linalg.cholesky_ex(shifted).info == 0)


def bootstrap(
    a: Tensor | tuple[Tensor, Tensor],
    b: Tensor | tuple[Tensor, Tensor],
    *,
    replicates: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Distances between sets that are drawn from a and from b, independently and with replacement: [K] float64.

    Their standard deviation estimates the standard error of the distance between a and b (Efron 1979), with a relative
    error of 1 / sqrt(2 (K - 1)). Their mean is not an estimate: resampling adds to the bias of a small set. If a and b
    are of one distribution, the distance is quadratic in their noise, and the estimate is too large.

    Args:
        a, b: features [N, D], N >= 2; or (mean [D], covariance [D, D]) of a set that is not resampled.
        replicates: K, from 1 to 1,000,000.
        seed: 0 <= seed < 2^64; equal seeds give equal distances.
        progress: show a bar.
    Raises: ValueError: replicates or seed is not as above.
    """
    from tqdm import tqdm

    replicates, seed = checks.whole("replicates", replicates, 1, MOST_REPLICATES), checks.seed(seed)
    generator = torch.Generator("cpu").manual_seed(seed)

    def resampler(x: Tensor | tuple[Tensor, Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that returns the mean and the root of the covariance of a new draw."""
        if not isinstance(x, Tensor):
            fixed = x[0], _root(x[1])
            return lambda: fixed

        def draw() -> tuple[Tensor, Tensor]:
            drawn = torch.randint(len(x), (len(x),), generator=generator, device="cpu")
            mean, cov = moments(x, drawn.bincount(minlength=len(x)))
            return mean, _root(cov)

        return draw

    draw_a, draw_b = resampler(a), resampler(b)
    steps = tqdm(range(replicates), desc="bootstrap", disable=not progress, leave=False)
    distances = [_distance(draw_a(), draw_b()) for _ in steps]
    return torch.tensor(distances, dtype=torch.float64, device="cpu")


def random_features(images: Tensor) -> Tensor:
    """Features that need no training: those of a fixed random convolutional network.

    The network has two 3 x 3 convolutions of stride 2 with ReLU, and weights from the noise standard.

    Args: images: [N, C, H, W], or sequences [N, C, L], which are images of height 1; floating point.
    Returns: [N, 24] float64: the mean activations of the second layer.
    """
    h = images.double() if images.ndim == 4 else images.double()[:, :, None]
    for layer, width in enumerate(WIDTHS):
        fan_in = 9 * h.shape[1]
        z = noise.normal(noise.address(0, [layer], h.device), (width * fan_in,), stream=128, t=0)
        weight = z.double().view(width, h.shape[1], 3, 3) * (2 / fan_in) ** 0.5
        h = F.conv2d(h, weight, stride=2, padding=1).relu()
    return h.mean((2, 3))


def _as_features(name: str, value: Any) -> Tensor:
    """float64 on the CPU."""
    try:
        features = torch.as_tensor(value, device="cpu").to_dense()
        if features.is_complex():
            raise TypeError("complex numbers")
        return features.double()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # no numbers, or on the meta device
        raise ValueError(f"{name} is {checks.shown(value)}; want features [N, D], N >= 2") from error


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """The squared distance of two Gaussians, each given by its mean and the symmetric root of its covariance."""
    # The eigenvalues of cov_a cov_b are the squared singular values of root_a root_b. Unlike the product of the
    # covariances, that of the roots does not lose digits of the small ones.
    (mean_a, root_a), (mean_b, root_b) = a, b
    try:
        overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    except torch.linalg.LinAlgError:  # of numbers that are not finite
        return math.nan
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave -1e-15 in place of 0; NaN remains NaN


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    try:
        values, vectors = torch.linalg.eigh(cov)
    except torch.linalg.LinAlgError:  # of numbers that are not finite
        return torch.full_like(cov, math.nan)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding can leave -1e-15 in place of 0
