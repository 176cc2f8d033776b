"""How far two sets of samples are from each other: the Fréchet distance of Gaussians fitted to features of them.

The idea of the FID (Heusel et al. 2017, arXiv:1706.08500). A figure means nothing by itself: it depends on the features
and on how many there are. The yardstick is the distance of two sets that are known to be alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import noise

WIDTHS = (16, 24)  # channels of the random network's two layers


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features, in float64.

    Args: a, b: [N, D] and [M, D], N, M >= 2. It is biased upwards, the more the fewer they are: compare equal N and M.
    Raises: ValueError: the shapes are not as above.
    """
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features are {list(a.shape)} and {list(b.shape)}; want [N, D] and [M, D], N, M >= 2")
    return gaussian_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)); [D] and [D, D] float64."""
    # the eigenvalues of cov_a cov_b are the squared singular values of the product of the symmetric roots, which unlike
    # the product of the covariances loses no digits of the small ones
    overlap = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def random_features(images: Tensor) -> Tensor:
    """Features that need no training: what a fixed random convolutional network sees.

    Args: images: [N, C, H, W], floating point.
    Returns: [N, 24] float64: the mean activations of two layers of 3 x 3 convolutions of stride 2 with ReLU, their
        weights from the noise standard.
    """
    h = images.double()
    for layer, width in enumerate(WIDTHS):
        fan_in = 9 * h.shape[1]
        z = noise.normal(noise.address(0, [layer], h.device), (width * fan_in,), stream=128, t=0)
        weight = z.double().view(width, h.shape[1], 3, 3) * (2 / fan_in) ** 0.5
        h = F.conv2d(h, weight, stride=2, padding=1).relu()
    return h.mean((2, 3))


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding can leave -1e-17 in place of 0
