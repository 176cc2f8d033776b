"""Why does each reverse step add sigma_t z? Compares samples drawn with it, with half of it, and without it.

    python -m bench.sigma DATA.npz --num-samples 5000 --samples FOLDER

The samples of all settings start from the same x_T and, where they add z, add the same z. Each set is measured by its
Fréchet distance to real images (see `bench.frechet`), by its diversity (the mean distance between two of its images),
and by the classes that the classifier assigns to the images.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.frechet import compare, features, load_data, load_or_train, load_samples
from fastddpm.evaluate.features import CLASSES, SIDE, Classifier
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import images
from fastddpm.storage.files import atomic, check_writable
from fastddpm.storage.plots import new_figure, with_error

BATCH = 64  # samples per file, which are drawn together
SHOWN = 64  # samples in a picture
# for each set: arguments of `sample`, changes to the model's schedule, and a title
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "full": ({"noise": 1.0}, {}, "with σ_t z"),
    "half": ({"noise": 0.5}, {}, "with half of σ_t z"),
    "none": ({"noise": 0.0}, {}, "without σ_t z"),
    "ddim": ({"sampler": "ddim", "eta": 0.0}, {}, "DDIM, η = 0"),
    "unclipped": ({"sampler": "ddim", "eta": 0.0}, {"clip_sample": False}, "DDIM, η = 0, x_0 not clipped"),
}
PICTURED = ("full", "half", "none")


@dataclass(frozen=True)
class Measured:
    """One set of images: (value, standard error or deviation) of each measure."""

    name: str
    distance: tuple[float, float]  # Fréchet distance, with its standard deviation over choices of real images
    in_features: tuple[float, float]  # mean distance between two images, with its standard error
    in_pixels: tuple[float, float]  # the same, with pixels from 0 to 1
    classes: list[int]  # number of images that the classifier assigns to each class

    @property
    def entropy(self) -> float:
        """Entropy of the classes in bits: log2(10) = 3.32 if all are equally frequent."""
        share = np.array([count for count in self.classes if count]) / sum(self.classes)
        return max(0.0, -float((share * np.log2(share)).sum()))


def draw(
    sampler: Sampler,
    folder: str | os.PathLike[str],
    num_samples: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    part: tuple[int, int] = (1, 1),
) -> None:
    """Draw those of the samples 0, ..., num_samples - 1 of each setting that the folder does not have yet.

    Args:
        folder: for the files full/00000-00063.npz and so on.
        sampler: of grey images of 28 x 28.
        seed, steps: as `Sampler.batches` takes them.
        part: (k, n): draw the k-th of n equal shares. Several processes may share a folder.
    Raises: ValueError: the sampler's images have another shape, or the folder has samples with other settings.
    """
    if sampler.shape != (1, SIDE, SIDE):
        raise ValueError(f"the model's samples are {sampler.shape}; want (1, {SIDE}, {SIDE}) for the classifier")
    settings = {"model": _hash_of_weights(sampler), "precision": sampler.precision, "seed": seed, "steps": steps}
    _check_settings(Path(folder), settings | {"schedule": sampler.schedule.to_config()})
    files = [file for name in SETTINGS for file in _files(folder, name, num_samples)]
    todo = [(path, samples) for path, samples in files[part[0] - 1 :: part[1]] if not path.exists()]
    for path, samples in tqdm(todo, desc="samples", unit="batch"):
        check_writable(path)
        options, changes, _ = SETTINGS[path.parent.name]
        drawer = copy(sampler)
        drawer.schedule = replace(sampler.schedule, **changes)
        x = drawer.sample(samples, seed=seed, steps=steps, output="uint8", progress=False, **options)
        images.save_npz(x, path)


def load(folder: str | os.PathLike[str], setting: str, num_samples: int) -> np.ndarray:
    """Return the samples of a setting that `draw` has written: uint8 [N, 28, 28]."""
    return np.concatenate([load_samples(path) for path, _ in _files(folder, setting, num_samples)])


def pairwise(x: Tensor) -> tuple[float, float]:
    """Return the mean Euclidean distance between two different rows of [N, D], N >= 2, and its standard error.

    The mean over all pairs is a U-statistic: its variance is 4/N times that of a row's mean distance from all others.
    """
    x, n = x.double(), len(x)
    rows = torch.cat([torch.cdist(block, x).sum(1) / (n - 1) for block in x.split(500)])
    return float(rows.mean()), 2 * float(rows.std()) / n**0.5


def measure_set(
    name: str, pictures: np.ndarray, found: Tensor, model: Classifier, distances: Sequence[float]
) -> Measured:
    """Measure uint8 images [N, 28, 28] with these features [N, D] and two or more Fréchet distances."""
    with torch.inference_mode():
        classes = model.head(found).argmax(1)
    return Measured(
        name,
        (mean(distances), stdev(distances)),
        pairwise(found),
        pairwise(torch.from_numpy(pictures).flatten(1) / 255),
        torch.bincount(classes, minlength=CLASSES).tolist(),
    )


def measure_all(sets: dict[str, np.ndarray], real: np.ndarray, model: Classifier, *, splits: int = 5) -> list[Measured]:
    """Measure every set of images and, at the end, as many real ones.

    Args:
        sets: {setting: uint8 [N, 28, 28]}, with the same N.
        real: uint8 [M, 28, 28], M >= 2N.
        splits: number of random choices of N real images to compute the distance to; at least 2, for its deviation.
    Raises: ValueError: there are too few real images, or splits < 2.
    """
    if splits < 2:
        raise ValueError(f"splits is {splits}; want at least 2: a single distance has no standard deviation")
    of_real, found = features(model, real), []
    n = len(next(iter(sets.values())))
    for name, pictures in sets.items():
        of_these = features(model, pictures)
        distances = compare(of_these, of_real, splits=splits)
        found.append(measure_set(SETTINGS[name][-1], pictures, of_these, model, distances.samples))
    chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:n]
    return [*found, measure_set("real images", real[chosen.numpy()], of_real[chosen], model, distances.real)]


def markdown(found: Sequence[Measured]) -> str:
    """Return the measures as a Markdown table."""
    lines = ["| images | Fréchet distance | distance of two: features | pixels | classes |", "|---|--:|--:|--:|--:|"]
    for one in found:
        cells = [with_error(*pair) for pair in (one.distance, one.in_features, one.in_pixels)]
        lines.append(f"| {' | '.join([one.name, *cells, f'{one.entropy:.2f} bits'])} |")
    return "\n".join(lines)


def picture(grids: Sequence[tuple[str, np.ndarray]], path: str | os.PathLike[str], *, dpi: int = 100) -> None:
    """Write a PNG with some captions and, below each, the first 64 of its uint8 images [N, 28, 28], pixel by pixel."""
    tiled = [images.grid(pictures[:SHOWN, ..., None], width=448)[..., 0] for _, pictures in grids]
    height, width = (max(grid.shape[axis] for grid in tiled) for axis in (0, 1))
    margin, above = 12, 52
    whole = len(tiled) * (width + margin) + margin, height + above + margin
    with new_figure(path, (whole[0] / dpi, whole[1] / dpi), dpi=dpi) as figure:
        for i, ((caption, _), grid) in enumerate(zip(grids, tiled, strict=True)):
            left = margin + i * (width + margin)
            figure.figimage(grid, left, margin, cmap="gray", vmin=0, vmax=255)
            place = ((left + width / 2) / whole[0], 1 - above / 2 / whole[1])
            figure.text(*place, caption, ha="center", va="center", fontsize=11)


def _caption(one: Measured) -> str:
    name = one.name.replace("σ_t z", r"$σ_t\,z$")
    return f"{name}\nFréchet distance {with_error(*one.distance)}"


def _files(folder: str | os.PathLike[str], setting: str, num_samples: int) -> list[tuple[Path, range]]:
    """Return every file of a setting, and which samples it has."""
    parts = [range(start, min(start + BATCH, num_samples)) for start in range(0, num_samples, BATCH)]
    return [(Path(folder) / setting / f"{part[0]:05d}-{part[-1]:05d}.npz", part) for part in parts]


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Check that all samples in a folder were drawn with the same settings, which are stored in the folder."""
    path = check_writable(folder, folder=True) / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        other = [name for name, value in settings.items() if before.get(name) != value]
        if other:
            raise ValueError(f"{folder} has samples of another {', '.join(other)}; choose another folder for --samples")
    with atomic(path) as file:
        file.write(json.dumps(settings, indent=1).encode())


def _hash_of_weights(sampler: Sampler) -> str:
    """Return a hash of the weights."""
    digest = hashlib.sha256()
    for name, value in sampler.model.state_dict().items():  # type: ignore[union-attr]
        digest.update(name.encode())
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share K/N with 1 <= K <= N, such as 1/4")
    return int(found[1]), int(found[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sigma",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "What the noise of the reverse step is for. Samples of one seed, drawn with sigma_t z, with half of it,\n"
            "without it, and by DDIM, are compared with real images. Prints a table for docs/sigma.md.\n\n"
            "Samples that FOLDER has already are not drawn again: an interrupted run continues, and several processes\n"
            "can share the work, each with its own --part."
        ),
        epilog=(
            "example:\n"
            "  python -m bench.sigma fashion-mnist.npz --num-samples 5000 --samples drawn --part 1/2 &\n"
            "  python -m bench.sigma fashion-mnist.npz --num-samples 5000 --samples drawn --part 2/2; wait\n"
            "  python -m bench.sigma fashion-mnist.npz --num-samples 5000 --samples drawn"
        ),
    )
    parser.add_argument("data", metavar="DATA.npz", help="uint8 x_train, x_test [N, 28, 28]; labels y_train, y_test")
    text = "number of samples of each setting; at most half as many as x_train"
    parser.add_argument("--num-samples", type=int, required=True, help=text)
    parser.add_argument("--samples", metavar="FOLDER", required=True, help="folder of the samples, old and new")
    parser.add_argument("--part", type=_part, metavar="K/N", help="only draw samples, the K-th of N equal shares")
    text = "diffusers checkpoint (default: the bundled model)"
    parser.add_argument("--checkpoint", metavar="FOLDER", help=text)
    parser.add_argument("--steps", type=int, help="steps of the sampler (default: all T)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    text = "use this classifier, not the package's; if the file does not exist, train one and save it there"
    parser.add_argument("--classifier", metavar="FILE", help=text)
    parser.add_argument("--splits", type=int, default=5, help="random choices of real images to average (default 5)")
    parser.add_argument("--out", metavar="PNG", default="docs/sigma.png", help="the picture (default docs/sigma.png)")
    parser.add_argument("--json", metavar="FILE", help="the measures (default: next to the picture)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.num_samples < 2:
            raise ValueError(f"--num-samples is {args.num_samples}; want at least 2")
        data = load_data(args.data)
        sampler = Sampler.from_pretrained(args.checkpoint, device=args.device)
        part = args.part or (1, 1)
        draw(sampler, args.samples, args.num_samples, seed=args.seed, steps=args.steps, part=part)
        if args.part:
            return
        out = check_writable(args.out)
        numbers = check_writable(args.json or out.with_suffix(".json"))
        if numbers.resolve() == out.resolve():
            raise ValueError(f"the picture and the measures would both be {out}; choose another --out or --json")
        model = load_or_train(args.classifier, data["x_train"], data["y_train"])
        sets = {name: load(args.samples, name, args.num_samples) for name in SETTINGS}
        found = measure_all(sets, data["x_train"], model, splits=args.splits)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    picture([(_caption(one), sets[name]) for name, one in zip(SETTINGS, found, strict=False) if name in PICTURED], out)
    listed = [asdict(one) | {"entropy": one.entropy} for one in found]
    settings = {"num_samples": args.num_samples, "seed": args.seed, "steps": args.steps}
    with atomic(numbers) as file:
        file.write(json.dumps({**settings, "images": listed}, indent=1).encode())
    print(markdown(found))
    print(f"\n{args.num_samples} images each; wrote {out} and {numbers}")


if __name__ == "__main__":
    main()
