"""How good are sampled spoken digits, and what does the noise of the reverse step do for them?

    python -m bench.digits digits.npz --classifier classifier.pt --samples drawn

A classifier, trained on the real training clips (see `bench.digit_classifier`), classifies the samples. The measures
are: how often it recognises the digit that was asked for; the Fréchet distance of its features to real clips, beside
that between two sets of real clips; how far samples are from the nearest training clip and from each other; and the
signal itself.
Prints tables for docs/sigma.md, and draws spectrograms.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.digit_classifier import DIGITS, DigitClassifier, in_parts, load, load_or_train
from bench.frechet import compare
from bench.sigma import pairwise
from fastddpm import Sampler
from fastddpm.audio import Audio
from fastddpm.core.names import SHIPPED_SOUNDS
from fastddpm.storage.audio import spectrogram
from fastddpm.storage.files import atomic
from fastddpm.storage.fingerprint import weights_sha256
from fastddpm.storage.images import save_npz
from fastddpm.storage.plots import new_figure, with_error

SETTINGS = {"full": (1.0, "with σ_t z"), "half": (0.5, "with half of σ_t z"), "none": (0.0, "without σ_t z")}
CLIPPED, END = 32767 / 32768, 0.05  # two neighbours from here on are clipped; the share of a clip that is its end


@dataclass(frozen=True)
class Measured:
    """A set of clips.

    Attributes:
        heard: the share that the classifier hears as the digit asked for, and its standard error.
        distance: Fréchet distance to real clips, and its deviation over choices of these.
        nearest: the median distance to the nearest training clip, between log-mel spectrograms.
        apart: the mean distance of two clips of the same digit in the classifier's features, and its standard error.
        peak, rms, dc: medians; dc of the absolute means. clipped: the share of clips with clipped samples.
        end_db: median level of the last twentieth, relative to full scale.
    """

    title: str
    heard: tuple[float, float]
    distance: tuple[float, float]
    nearest: float
    apart: tuple[float, float]
    peak: float
    rms: float
    dc: float
    clipped: float
    end_db: float


def draw(sampler: Sampler, setting: str, num_samples: int, folder: Path, **options: Any) -> Tensor:
    """[N, L]: the waveforms of a setting, every digit in turn. The folder keeps them for the next time."""
    path, about = folder / f"{setting}.npz", folder / f"{setting}.json"
    how = {"weights": weights_sha256(sampler.model), "num_samples": num_samples, **options}
    if path.exists():
        if not about.exists() or json.loads(about.read_text()) != how:
            raise ValueError(f"{path} was drawn by another model or with other options; name another folder")
        with np.load(path) as arrays:
            return torch.from_numpy(arrays["arr_0"])
    medium = sampler.medium
    assert isinstance(medium, Audio)
    digits = [i % DIGITS for i in range(num_samples)]
    x = sampler.sample(num_samples, class_labels=digits, noise=SETTINGS[setting][0], **options)
    waveforms = medium.decode(x)[:, 0].clamp(-1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    about.write_text(json.dumps(how))
    save_npz(waveforms, path)
    return waveforms


def measure(
    title: str, x: Tensor, digits: Tensor, distances: Sequence[float], train: Tensor, model: DigitClassifier
) -> Measured:
    """Measure waveforms [N, L]. Args: distances: to real clips; train: log-mel spectrograms of the training clips."""
    found, right = in_parts(model.features, x), (in_parts(model, x).argmax(1) == digits).double()
    spectrograms = in_parts(model.spectrogram, x).flatten(1)
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # else equal clips would have a distance
    nearest = torch.cat([torch.cdist(part, train, **exact).min(1).values for part in spectrograms.split(50)])
    apart = [pairwise(found[digits == digit]) for digit in range(DIGITS)]
    end = x[:, -round(END * x.shape[1]) :].double().square().mean(1)
    return Measured(
        title,
        (float(right.mean()), float(right.std()) / len(x) ** 0.5),
        (mean(distances), stdev(distances)),
        float(nearest.median()),
        (mean(a for a, _ in apart), sum(e**2 for _, e in apart) ** 0.5 / DIGITS),
        float(x.abs().amax(1).median()),
        float(x.square().mean(1).sqrt().median()),
        float(x.mean(1).abs().median()),
        float(((x[:, 1:].abs() >= CLIPPED) & (x[:, :-1].abs() >= CLIPPED)).any(1).double().mean()),
        float(10 * torch.log10(end.median() + 1e-12)),
    )


def markdown(found: Sequence[Measured]) -> str:
    """The measures as two Markdown tables."""
    titles = "clips", "heard as asked", "Fréchet distance", "nearest training clip", "distance of two"
    lines = [f"| {' | '.join(titles)} |", "|---|" + "--:|" * (len(titles) - 1)]
    for one in found:
        heard = f"{with_error(100 * one.heard[0], 100 * one.heard[1])} %"
        cells = heard, with_error(*one.distance), f"{one.nearest:.1f}", with_error(*one.apart)
        lines.append(f"| {' | '.join([one.title, *cells])} |")
    titles = "clips", "peak", "rms", "DC", "clipped", "last 5 %"
    lines += ["", f"| {' | '.join(titles)} |", "|---|" + "--:|" * (len(titles) - 1)]
    for one in found:
        cells = (
            f"{one.peak:.2f}",
            f"{one.rms:.3f}",
            f"{one.dc:.4f}",
            f"{100 * one.clipped:.0f} %",
            f"{one.end_db:.0f} dB",
        )
        lines.append(f"| {' | '.join([one.title, *cells])} |")
    return "\n".join(lines)


def plot(sets: dict[str, Tensor], sample_rate: int, path: str | os.PathLike[str]) -> None:
    """Draw the spectrograms of the first clip of each digit, a row per set."""
    with new_figure(path, (11, 1.6 * len(sets)), dpi=100, layout="constrained") as figure:
        for axes, (title, x) in zip(figure.subplots(len(sets), DIGITS, squeeze=False), sets.items(), strict=True):
            for digit, (panel, waveform) in enumerate(zip(axes, x, strict=False)):
                extent = (0, len(waveform) / sample_rate, 0, sample_rate / 2000)
                levels = {"vmin": -80, "vmax": -10, "cmap": "magma"}
                panel.imshow(spectrogram(waveform, sample_rate), origin="lower", aspect="auto", extent=extent, **levels)
                panel.set(xticks=[], yticks=[])  # and so no grid
                panel.set_title(str(digit), pad=2)
            axes[0].set_ylabel(title, fontsize=8)


def measure_all(
    sets: dict[str, Tensor], data: str | os.PathLike[str], model: DigitClassifier, *, splits: int = 5
) -> list[Measured]:
    """Measure sets of clips, every digit in turn, and the held-out clips."""
    (train, _), (test, of_test) = load(data, "train"), load(data, "test")
    real = in_parts(model.features, torch.cat([train, test]))
    spectrograms = in_parts(model.spectrogram, train).flatten(1)
    found = []
    for title, x in sets.items():
        asked = torch.arange(len(x)) % DIGITS
        distances = compare(in_parts(model.features, x), real, splits=splits)
        found.append(measure(title, x, asked, distances.samples, spectrograms, model))
    of_real = compare(in_parts(model.features, test), real[: len(train)], splits=splits)
    found.append(measure("held-out clips", test, of_test, of_real.real, spectrograms, model))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.digits", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("data", metavar="DATA.npz", help="int16 x_train, x_test [N, L]; digits y_train, y_test")
    parser.add_argument("--classifier", metavar="FILE", required=True, help="is trained and saved if it does not exist")
    parser.add_argument(
        "--checkpoint", default=SHIPPED_SOUNDS, metavar="FOLDER", help="a model of digits (default: %(default)s)"
    )
    parser.add_argument("--num-samples", type=int, default=300, metavar="N", help="of each setting (default: 300)")
    parser.add_argument("--guidance-scale", type=float, default=2.0, metavar="S", help="default: 2")
    parser.add_argument("--steps", type=int, metavar="S", help="steps of the sampler (default: all T)")
    parser.add_argument("--samples", metavar="FOLDER", required=True, help="folder of the samples, old and new")
    parser.add_argument("--out", metavar="PNG", help="draw ten spectrograms of each setting")
    parser.add_argument("--json", metavar="FILE", help="also write the measures")
    args = parser.parse_args(argv)
    try:
        sampler = Sampler.from_pretrained(args.checkpoint)
        if not isinstance(sampler.medium, Audio):
            raise ValueError(f"{args.checkpoint} does not draw sounds; want a model of digits")
        model, folder = load_or_train(args.classifier, args.data), Path(args.samples)
        options = {"guidance_scale": args.guidance_scale, "steps": args.steps}
        drawn = {name: draw(sampler, name, args.num_samples, folder, **options) for name in SETTINGS}
        found = measure_all({SETTINGS[name][1]: x for name, x in drawn.items()}, args.data, model)
    except (ValueError, OSError, KeyError) as error:
        parser.error(str(error))
    if args.out:
        plot({SETTINGS[name][1]: x for name, x in drawn.items()}, sampler.medium.sample_rate, args.out)
    if args.json:
        with atomic(args.json) as file:
            file.write((json.dumps([asdict(one) for one in found], indent=1) + "\n").encode())
    print(markdown(found))


if __name__ == "__main__":
    main()
