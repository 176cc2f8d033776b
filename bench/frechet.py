"""The Fréchet distance of samples to real images, in the features of a classifier, next to that between real images.

    python -m bench.frechet DATA.npz SAMPLES.npz

The idea is that of the FID (Heusel et al. 2017, arXiv:1706.08500), with features that fit the data: the inputs of the
last layer of a small classifier, which is trained on the labelled training images. The package contains the classifier
of Fashion-MNIST, which was trained by this command. A distance means little alone, and it does not compare with
published FIDs: compare it with the distance between two disjoint sets of real images.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastddpm.evaluate.features import CLASSES, FEATURES, SCALES, SIDE, Classifier, shipped_classifier
from fastddpm.evaluate.frechet import frechet_distance
from fastddpm.storage.datasets import load_images
from fastddpm.storage.files import atomic


def train(images: np.ndarray, labels: np.ndarray, *, epochs: int = 4, batch_size: int = 128) -> Classifier:
    """Train on uint8 [N, 28, 28] with labels 0..9. One machine and thread count always give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier().to(memory_format=torch.channels_last).train()
        batches = -(-len(images) // batch_size)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches + 1)
        for epoch in range(epochs):
            order = torch.randperm(len(images)).split(batch_size)
            for batch in tqdm(order, desc=f"training the classifier, epoch {epoch + 1} of {epochs}", leave=False):
                loss = nn.functional.cross_entropy(model(_input(images[batch])), torch.from_numpy(labels[batch]).long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.inference_mode()
def features(model: Classifier, images: np.ndarray) -> Tensor:
    """Return [N, 128] float32 features of uint8 [N, 28, 28] images."""
    starts = tqdm(range(0, len(images), 500), desc="features", leave=False)
    return torch.cat([model.features(_input(images[start : start + 500])) for start in starts])


@torch.inference_mode()
def accuracy(model: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of images that are classified correctly."""
    return float((model.head(features(model, images)).argmax(1) == torch.from_numpy(labels)).double().mean())


def _input(images: np.ndarray) -> Tensor:
    return SCALES["signed"](torch.from_numpy(images)[:, None].float())


@dataclass(frozen=True)
class Distances:
    """One distance for each random choice of real images. All sets have the same size."""

    samples: list[float]  # from the samples to a set of real images
    real: list[float]  # from that set to a second, disjoint one


def compare(samples: Tensor, real: Tensor, *, splits: int = 5, seed: int = 0) -> Distances:
    """Return the distances of sample features [n, D] to n real ones and of these to n others, for random choices.

    Raises: ValueError: there are fewer than 2n real ones, n < 2 or splits < 1.
    """
    n, generator = len(samples), torch.Generator().manual_seed(seed)
    if not 2 <= n <= len(real) // 2:
        raise ValueError(f"there are {n} samples; want 2 to {len(real) // 2}, half of the {len(real)} real images")
    if splits < 1:
        raise ValueError(f"splits is {splits}; want at least 1")
    distances = Distances([], [])
    for _ in tqdm(range(splits), desc="distances", leave=False):
        one, other = torch.randperm(len(real), generator=generator)[: 2 * n].split(n)
        distances.samples.append(frechet_distance(samples, real[one]))
        distances.real.append(frechet_distance(real[other], real[one]))
    return distances


def load_data(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Load x_train, y_train, x_test and y_test from an .npz: images uint8 [N, 28, 28], labels [N] 0..9.

    Raises: ValueError: the file cannot be loaded, or an array has another shape, dtype or range.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot load {path}: {error}; want an .npz with x_train, y_train, x_test, y_test") from error
    for part in ("train", "test"):
        images, labels = data[f"x_{part}"], data[f"y_{part}"]
        if images.dtype != np.uint8 or images.shape != (len(labels), SIDE, SIDE) or not len(labels):
            found = f"{list(images.shape)} {images.dtype} with {len(labels)} labels"
            raise ValueError(f"x_{part} of {path} is {found}; want uint8 [N, {SIDE}, {SIDE}] with N labels")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
            raise ValueError(f"y_{part} of {path} is {labels.dtype}; want whole numbers from 0 to {CLASSES - 1}")
    return data


def load_samples(path: str | os.PathLike[str]) -> np.ndarray:
    """Load uint8 [N, 28, 28] from the .npz (uint8 [N, 28, 28, 1]) or folder of PNGs of `fastddpm sample`."""
    images = load_images(path)
    if images.shape[1:] != (SIDE, SIDE, 1):
        raise ValueError(f"the samples in {path} are {list(images.shape)}; want grey images [N, {SIDE}, {SIDE}, 1]")
    return images[..., 0]


def load_or_train(path: str | os.PathLike[str] | None, images: np.ndarray, labels: np.ndarray) -> Classifier:
    """Return the package's classifier, or the one in a file. If the file does not exist, train one and save it there.

    Raises: ValueError: the file is not such a classifier.
    """
    if path is None:
        return shipped_classifier()
    if not Path(path).exists():
        model = train(images, labels)
        with atomic(path) as file:
            torch.save(model.state_dict(), file)
        return model
    model = Classifier()
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch.load and load_state_dict fail in many ways
        raise ValueError(f"{path} is not a classifier of this command; name another file to train one") from error
    return model.to(memory_format=torch.channels_last).eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.frechet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "The Fréchet distance of samples to real images, next to that between two disjoint sets of equally many\n"
            "real images. The features are the 128 inputs of the last layer of a small classifier: the package's for\n"
            "Fashion-MNIST (92 % right), or one that is trained on the training images (a few minutes on one core).\n\n"
            "Perfect samples are as far from real images as real images are from each other. All distances grow as\n"
            "the number of images shrinks: compare only distances of equally many images."
        ),
        epilog=(
            "example:\n"
            "  fastddpm sample --num-samples 5000 --format npz --out samples.npz\n"
            "  python -m bench.frechet fashion.npz samples.npz"
        ),
    )
    parser.add_argument("data", metavar="DATA.npz", help="uint8 x_train, x_test [N, 28, 28]; labels y_train, y_test")
    parser.add_argument("samples", metavar="SAMPLES.npz", help="uint8 [N, 28, 28, 1], at most half as many as x_train")
    text = "use this classifier, not the package's; if the file does not exist, train one and save it there"
    parser.add_argument("--classifier", metavar="FILE", help=text)
    parser.add_argument("--splits", type=int, default=5, help="random choices of real images to average (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of these choices (default 0)")
    args = parser.parse_args(argv)
    try:
        data, samples = load_data(args.data), load_samples(args.samples)
        model = load_or_train(args.classifier, data["x_train"], data["y_train"])
        right = accuracy(model, data["x_test"], data["y_test"])
        real = features(model, data["x_train"])
        distances = compare(features(model, samples), real, splits=args.splits, seed=args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    n = len(samples)
    print(f"classifier: {right:.2%} of {len(data['x_test'])} test images right, {FEATURES} features")
    print(f"{n} samples to {n} real images:     {_spread(distances.samples)}")
    print(f"{n} real images to {n} other ones:  {_spread(distances.real)}")
    print(f"mean ± standard deviation over {args.splits} choices of real images; compare only equal numbers of images")


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


if __name__ == "__main__":
    main()
