"""A small classifier of spoken digits, to judge sampled ones: a log-mel spectrogram, four convolutions, a mean.

    python -m bench.digit_classifier digits.npz classifier.pt

trains it on x_train and prints its accuracy on x_test.
"""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastddpm.storage.audio import FULL_SCALE
from fastddpm.storage.files import atomic

RATE, HOP, WINDOW, MELS, DIGITS = 8000, 64, 256, 40, 10
WIDTHS = 16, 32, 64, 96


class DigitClassifier(nn.Module):
    """Logits of the ten digits of waveforms [N, L] of 8 kHz, whatever their gain and offset."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)
        layers: list[nn.Module] = []
        for n, m in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers[:-1])  # no pooling after the last
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(WIDTHS[-1], DIGITS)

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """[N, L] -> [N, MELS, frames]: natural logarithms of the power of the waveform, normalised to rms 1."""
        x = waveform - waveform.mean(1, keepdim=True)
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        padded, options = F.pad(x, (WINDOW // 2, WINDOW // 2)), {"center": False, "return_complex": True}
        spectrum = torch.stft(padded, WINDOW, HOP, window=self.window, **options)
        power = (spectrum.real.square() + spectrum.imag.square()) / WINDOW
        return torch.log(power.mT @ self.filters + 1e-3).mT

    def features(self, waveform: Tensor) -> Tensor:
        """[N, L] -> [N, 96]: the inputs of the last layer, for Fréchet distances."""
        return self.layers((self.spectrogram(waveform)[:, None] + 2) / 3).mean((2, 3))

    def forward(self, waveform: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(waveform)))


def mel_filters() -> Tensor:
    """[WINDOW // 2 + 1, MELS]: triangles, equally spaced on the mel scale from 60 Hz to 3800 Hz."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (60, 3800))
    edges = 700 * (10 ** (torch.linspace(low, high, MELS + 2, dtype=torch.float64) / 2595) - 1)
    f = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)[:, None]
    rising, falling = (f - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - f) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles / triangles.sum(0).clamp(min=1e-9)).float()


def load(path: str | os.PathLike[str], part: str) -> tuple[Tensor, Tensor]:
    """(waveforms [N, L] in [-1, 1], digits [N]) of x_PART and y_PART in an .npz."""
    with np.load(path, allow_pickle=False) as arrays:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    return torch.from_numpy(x / np.float32(FULL_SCALE)), torch.from_numpy(y.astype(np.int64))


def train(x: Tensor, y: Tensor, *, epochs: int = 20, batch: int = 64) -> DigitClassifier:
    """Train on waveforms [N, L] and digits [N]. One machine and thread count always give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitClassifier().train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * math.ceil(len(x) / batch) + 1)
        for epoch in range(epochs):
            order = torch.randperm(len(x)).split(batch)
            for i in tqdm(order, desc=f"training the classifier, epoch {epoch + 1} of {epochs}", leave=False):
                loss = F.cross_entropy(model(_augmented(x[i])), y[i], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _augmented(x: Tensor) -> Tensor:
    """Shift each clip by up to 0.1 s, filling with zeros, and add noise at -50 to -15 dB of its rms."""
    n, length = x.shape
    index = torch.arange(length) - torch.randint(-RATE // 10, RATE // 10 + 1, (n, 1))
    x = torch.where((index >= 0) & (index < length), x.gather(1, index.clamp(0, length - 1)), 0)
    rms = x.square().mean(1, keepdim=True).sqrt()
    return x + torch.randn_like(x) * rms * 10 ** (-(15 + 35 * torch.rand(n, 1)) / 20)


@torch.inference_mode()
def in_parts(function: nn.Module | object, x: Tensor) -> Tensor:
    """The results of a function of waveforms, 100 at a time."""
    return torch.cat([function(part) for part in x.split(100)])  # type: ignore[operator]


def accuracy(model: DigitClassifier, x: Tensor, y: Tensor) -> float:
    """The share of waveforms that are heard as y."""
    return float((in_parts(model, x).argmax(1) == y).double().mean())


def load_or_train(path: str | os.PathLike[str], data: str | os.PathLike[str]) -> DigitClassifier:
    """The classifier in a file. If there is none, train one on data and save it there.

    Raises: ValueError: the file is not such a classifier.
    """
    if not Path(path).exists():
        model = train(*load(data, "train"))
        with atomic(path) as file:
            torch.save(model.state_dict(), file)
        return model
    model = DigitClassifier()
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch.load and load_state_dict fail in many ways
        raise ValueError(f"{path} is not a classifier of this command; name another file to train one") from error
    return model.eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.digit_classifier",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("data", metavar="DATA.npz", help="int16 x_train, x_test [N, L]; digits y_train, y_test")
    parser.add_argument("out", metavar="FILE", help="the classifier; if it exists it is only judged")
    args = parser.parse_args(argv)
    try:
        model = load_or_train(args.out, args.data)
        x, y = load(args.data, "test")
    except (ValueError, OSError, KeyError) as error:
        parser.error(str(error))
    print(f"{args.out}: {100 * accuracy(model, x, y):.1f} % of {len(x)} held-out clips are heard as the right digit")


if __name__ == "__main__":
    main()
