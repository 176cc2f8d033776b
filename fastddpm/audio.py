"""Sounds as samples of real numbers [C, L]: waveforms, or the levels of their spectrograms.

from fastddpm.audio import Audio

sound = Audio(8000, "spectrogram")
x = sound.encode(waveforms)  # [N, 1, L] in [-1, 1] -> [N, 128, L / 64] in [-1, 1]
sound.decode(x)  # waveforms again
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.core import noise
from fastddpm.core.checks import one_of, shape_of, whole
from fastddpm.core.names import AUDIO_CODES

HIGHEST_RATE = 1_000_000  # Hz
RANGE = 70.0  # dB from the level of the number -1 to that of the number 1
COLUMNS = 16  # encoded waveforms are padded to a multiple of so many columns, so that a network can halve their number
ROUNDS, MOMENTUM = 60, 0.99  # of the search for phases; Perraudin et al. recommend 0.99
_AT_ONCE = 1 << 20  # values at a time: encoding takes some 140 bytes for each value, decoding 240


@dataclass(frozen=True)
class Audio:
    """The representation of mono sounds as samples of a model.

    The code "waveform" is the waveform itself, [1, L] numbers in [-1, 1].

    The code "spectrogram" is its level at each frequency and time, [C, columns] numbers in [-1, 1]. Row k is the
    frequency k * sample_rate / (2 C), column i is centred at sample i * C / 2. The level is 1 + 20 log10(m +
    10^(-70/20)) / 35, clamped to [-1, 1]: -1 is silence, 1 is full scale, and the range covers 70 dB. m is the
    magnitude of a short-time Fourier transform with a hop of C / 2 and a Hann window of 2 C samples, which are 32 ms
    rounded up to a power of two, at least 16. A sine of amplitude 1 has m = 1. The phase is lost. `decode` finds one
    that fits the magnitudes, by the method of Griffin & Lim 1984 as Perraudin et al. 2013 accelerate it. It begins with
    the phases of the complex numbers [C + 1, columns] whose real and imaginary parts are, in this order, normal numbers
    of the noise standard (seed 0, sample 0, stream 255, t = 0).

    Attributes:
        sample_rate: per second, a whole number from 1 to 1,000,000.
        code: "waveform" or "spectrogram".
    Raises: ValueError: an attribute is not as above.
    """

    sample_rate: int
    code: str = "waveform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", whole("sample_rate", self.sample_rate, 1, HIGHEST_RATE))
        one_of("code", self.code, AUDIO_CODES)

    @property
    def channels(self) -> int:
        """C of a sample [C, L]."""
        return 1 if self.code == "waveform" else window_of(self.sample_rate) // 2

    def shape_of_waveform(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(1, L) of the waveform that a sample of the shape [C, columns] is decoded to."""
        return 1, shape[1] if self.code == "waveform" else shape[1] * self.channels // 2

    def encode(self, waveforms: np.ndarray) -> np.ndarray:
        """Floating-point waveforms [N, 1, L] in [-1, 1], N and L >= 1, as samples, float32.

        A spectrogram covers the waveform and zeros after it, up to a multiple of 16 columns.
        Raises: ValueError: waveforms are not as above.
        """
        if not isinstance(waveforms, np.ndarray) or waveforms.dtype.kind != "f" or not _fits(waveforms, 1):
            raise ValueError(f"waveforms are {shape_of(waveforms)}; want a NumPy array of floats in [-1, 1], [N, 1, L]")
        if self.code == "waveform":
            return waveforms.astype(np.float32)
        length = waveforms.shape[2]
        padding = -length % (COLUMNS * self.channels // 2)
        parts = torch.from_numpy(waveforms[:, 0].astype(np.float64)).split(max(1, _AT_ONCE // (length + padding)))
        return torch.cat([self._levels(F.pad(part, (0, padding))) for part in parts]).numpy()

    def decode(self, samples: Tensor) -> Tensor:
        """Floating-point samples [N, C, L], N and L >= 1, as waveforms [N, 1, L] of their dtype, on their device.

        Those of the code "waveform" may go beyond [-1, 1]. From a spectrogram [C, columns] a waveform has
        L = columns * C / 2. With the phases that are found it may go beyond [-1, 1]; then it is scaled to a peak of 1.
        Raises: ValueError: samples are not as above.
        """
        if not isinstance(samples, Tensor) or not samples.is_floating_point() or not _fits(samples, self.channels):
            raise ValueError(f"samples are {shape_of(samples)}; want a tensor of floats, [N, {self.channels}, L]")
        if self.code == "waveform":
            return samples
        parts = samples.double().split(max(1, _AT_ONCE // math.prod(samples.shape[1:])))
        waveforms = torch.cat([self._waveforms(part) for part in parts])
        return (waveforms / waveforms.abs().amax(1, keepdim=True).clamp(min=1))[:, None].to(samples.dtype)

    def _levels(self, waveforms: Tensor) -> Tensor:
        """[N, L] -> [N, C, columns]."""
        magnitude = self._transform(waveforms)[:, :-1].abs() / (self.channels / 2)
        levels = 20 * torch.log10(magnitude + 10 ** (-RANGE / 20))
        return (levels * (2 / RANGE) + 1).clamp(-1, 1).float()

    def _waveforms(self, levels: Tensor) -> Tensor:
        """[N, C, columns] -> [N, L]: search for a waveform of these levels.

        Each round takes the phases of the last waveform's spectrum, moved on in the direction of their change.
        """
        magnitude = (10 ** ((levels.clamp(-1, 1) - 1) * (RANGE / 40)) - 10 ** (-RANGE / 20)) * (self.channels / 2)
        magnitude = F.pad(magnitude, (0, 0, 0, 1))  # the highest frequency
        spectrum = torch.view_as_complex(_normal(magnitude.shape[1:], magnitude.device)).expand_as(magnitude)
        previous = torch.zeros_like(spectrum)
        for _ in range(ROUNDS):
            waveforms = self._inverse(magnitude * _phases(spectrum))
            latest = self._transform(waveforms)
            spectrum, previous = latest + MOMENTUM * (latest - previous), latest
        return self._inverse(magnitude * _phases(spectrum))

    def _transform(self, waveforms: Tensor) -> Tensor:
        """[N, L] -> complex [N, C + 1, columns]: the short-time Fourier transform."""
        window = _hann(2 * self.channels, waveforms.device)
        spectrum = torch.stft(
            waveforms, len(window), len(window) // 4, window=window, pad_mode="constant", return_complex=True
        )
        return spectrum[..., :-1]  # the last column is centred at the end

    def _inverse(self, spectrum: Tensor) -> Tensor:
        """The waveforms whose transform is nearest: [N, L]."""
        window = _hann(2 * self.channels, spectrum.device)
        hop = len(window) // 4
        return torch.istft(spectrum, len(window), hop, window=window, length=hop * spectrum.shape[2])


def window_of(sample_rate: int) -> int:
    """The samples of a window of 32 ms, rounded up to a power of two, 16 or more."""
    return max(16, 1 << math.ceil(math.log2(0.032 * sample_rate)) if sample_rate > 32 else 1)


def _fits(x: np.ndarray | Tensor, channels: int) -> bool:
    """Whether x is [N, channels, L] with N and L >= 1."""
    return x.ndim == 3 and x.shape[1] == channels and 0 not in x.shape


def _phases(spectrum: Tensor) -> Tensor:
    """Numbers of the same angles and of absolute value 1."""
    return spectrum / spectrum.abs().clamp(min=1e-30)


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal numbers [*shape, 2], always the same ones."""
    drawn = noise.normal(noise.address(0, 1, "cpu"), (2 * math.prod(shape),), stream=noise.CODES, t=0)
    return drawn.double().view(*shape, 2).to(device)


def _hann(length: int, device: torch.device) -> Tensor:
    return torch.hann_window(length, dtype=torch.float64, device=device)
