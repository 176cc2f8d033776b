"""Waveforms: 16-bit mono WAV files, and pictures of their spectrograms."""

import io
import math
import os
import shlex
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastddpm.audio import HIGHEST_RATE, window_of
from fastddpm.core.checks import shape_of, whole
from fastddpm.storage.class_grid import font
from fastddpm.storage.files import atomic, check_regular
from fastddpm.storage.images import png

FULL_SCALE = 32768  # 16-bit samples stand for numbers in [-1, 1): one more would be 1.0
_LARGEST = 1 << 32  # bytes of a WAV file: its sizes are 32-bit numbers

FLOOR = -120.0  # dB: what is quieter, also silence, counts as this; half a step of 16 bits is -96
RANGE = 80.0  # dB between the darkest and the brightest colour
COLUMNS = 5  # panels in a row
PANEL = 264, 180  # width and height of a spectrogram in pixels
_MARGIN, _LINE, _LEFT, _BAR = 14, 20, 58, 14  # pixels: between panels; a line of text; left of panels; the colour bar
# magma, a perceptually ordered colour map: its colours at 0, 1/8, ..., 1
_COLOURS = np.array([
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
    (254, 194, 135), (252, 253, 191),
])  # fmt: skip


def read_wav(path: str | os.PathLike[str], *, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """A WAV file as numbers; the inverse of `wav_bytes`. Nothing is resampled or mixed.

    Args:
        path: of a WAV file with one channel of 16-bit PCM samples.
        sample_rate: the rate that it must have; None: any.
    Returns: float32 [L] in [-1, 1), the stored samples / 32768; and the sample rate.
    Raises: ValueError: path is missing, is not as above, is damaged or holds no samples; or soundfile is not installed.
    """
    samples, rate = read_pcm(path, sample_rate=sample_rate)
    return samples / np.float32(FULL_SCALE), rate


def read_pcm(path: str | os.PathLike[str], *, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """The samples of `read_wav` as they are stored: int16 [L], and the sample rate."""
    if sample_rate is not None:
        sample_rate = whole("sample_rate", sample_rate, 1, HIGHEST_RATE)
    path = check_regular(path)
    soundfile = _soundfile(path)
    content = _content(path)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as sound:
            _check_form(path, sound, sample_rate)
            _check_whole(path, content)
            samples, rate = sound.read(dtype="int16"), sound.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot read {path} as WAV: {error.error_string} The file is damaged; replace it") from error
    if len(samples) == 0:
        raise ValueError(f"{path} holds no samples; want at least one: leave this file out")
    return samples, rate


def wav_bytes(waveform: Tensor | np.ndarray, sample_rate: int) -> bytes:
    """A waveform as the bytes of a WAV file: one channel of 16-bit PCM. Equal samples give equal bytes.

    Args:
        waveform: floating-point [L] or [1, L], L >= 1; times 32768, rounded to nearest (ties to even). Values outside
            [-1, 1], also infinite ones, are clamped.
        sample_rate: samples per second.
    Raises: ValueError: an argument is not as above, or waveform holds NaN; or soundfile is not installed.
    """
    sample_rate = whole("sample_rate", sample_rate, 1, HIGHEST_RATE)
    values = _waveforms(waveform, "waveform", "[L] or [1, L]", 1)[0]
    if nan := np.isnan(values).sum():
        raise ValueError(f"waveform has {nan} NaN among {len(values)} values; want numbers in [-1, 1]")
    samples = np.rint(values.clip(-1, 1) * FULL_SCALE).clip(max=FULL_SCALE - 1).astype(np.int16)
    buffer = io.BytesIO()
    _soundfile("a WAV file").write(buffer, samples, sample_rate, subtype="PCM_16", format="WAV")
    return buffer.getvalue()


def save_wav(path: str | os.PathLike[str], waveform: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write `wav_bytes` of a waveform to path, which appears complete or not at all."""
    content = wav_bytes(waveform, sample_rate)
    with atomic(path) as file:
        file.write(content)


def spectrogram(
    waveform: Tensor | np.ndarray, sample_rate: int, *, window: int | None = None, hop: int | None = None
) -> np.ndarray:
    """The magnitude of a short-time Fourier transform, in dB; a sine of amplitude 1 has 0 dB.

    Args:
        waveform: floating-point [L] or [1, L], L >= 1; counts as 0 before its beginning and after its end.
        sample_rate: samples per second.
        window: samples of the Hann window; None: 32 ms, rounded up to a power of two.
        hop: samples from one frame to the next; None: a quarter of the window.
    Returns: float32 [window // 2 + 1, 1 + ceil(L / hop)], at least -120: row k is the frequency k * sample_rate /
        window; column i is centred at sample i * hop.
    Raises: ValueError: an argument is not as above, or waveform holds values that are not finite.
    """
    sample_rate = whole("sample_rate", sample_rate, 1, HIGHEST_RATE)
    values = _waveforms(waveform, "waveform", "[L] or [1, L]", 1)[0]
    if not np.isfinite(values).all():
        raise ValueError(f"waveform has {(~np.isfinite(values)).sum()} values that are not finite")
    window = window_of(sample_rate) if window is None else whole("window", window, 2, 1 << 20)
    hop = max(1, window // 4) if hop is None else whole("hop", hop, 1)
    last = -(-len(values) // hop)
    padded = np.pad(values, (window // 2, last * hop + window - len(values)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: last * hop + 1 : hop]
    weights = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(window) / window)
    magnitude = np.abs(np.fft.rfft(frames * weights, axis=1)).T * (2 / weights.sum())
    return (20 * np.log10(np.maximum(magnitude, 10 ** (FLOOR / 20)))).astype(np.float32)


def draw_spectrograms(waveforms: Tensor | np.ndarray, labels: Sequence[object] | None, sample_rate: int) -> np.ndarray:
    """Draw the spectrograms of waveforms in one picture, up to five in a row, all with the same axes and colours.

    Args:
        waveforms: floating-point [N, L] or [N, 1, L], N and L >= 1.
        labels: [N] what is written above each, such as the name of its class; None: nothing.
        sample_rate: samples per second.
    Returns: uint8 [H, W, 3]. The brightest colour is the loudest of all values, the darkest 80 dB less.
    Raises: ValueError: an argument is not as above, or a waveform holds values that are not finite.
    """
    from PIL import Image, ImageDraw

    sample_rate = whole("sample_rate", sample_rate, 1, HIGHEST_RATE)
    values = _waveforms(waveforms, "waveforms", "[N, L] or [N, 1, L]", 2)
    if labels is not None and len(labels) != len(values):
        raise ValueError(f"there are {len(labels)} labels for {len(values)} waveforms; want one for each, or None")
    decibels = [spectrogram(each, sample_rate) for each in values]
    loudest = max(FLOOR + RANGE, *(float(each.max()) for each in decibels))  # so that silence is dark
    hops = values.shape[1] / max(1, window_of(sample_rate) // 4)
    columns = min(COLUMNS, len(values))
    (width, height), above = PANEL, _MARGIN + _LINE * (labels is not None)
    wide, high = width + _MARGIN, height + above
    rows = -(-len(values) // columns)
    size = (_LEFT + columns * wide + _BAR + _LEFT, rows * high + 2 * _LINE + 6)
    canvas = Image.new("RGB", size, "white")
    draw, letters = ImageDraw.Draw(canvas), font(13)
    for n, each in enumerate(decibels):
        row, column = divmod(n, columns)
        x, y = _LEFT + column * wide, row * high + above
        canvas.paste(Image.fromarray(_coloured(_enlarged(np.maximum(each, loudest - RANGE), hops), loudest)), (x, y))
        if labels is not None:
            title = _fitting(str(labels[n]), font(14), width)
            draw.text((x + width / 2, y - 4), title, fill=0, font=font(14), anchor="ms")
        _draw_times(draw, letters, (x, y + height), values.shape[1] / sample_rate, numbers=n + columns >= len(values))
        _draw_frequencies(canvas, letters, (x, y + height), sample_rate / 2000, numbers=column == 0)
    _draw_bar(canvas, letters, (size[0] - _BAR - _LEFT, above), loudest)
    return np.asarray(canvas)


def save_spectrograms(
    path: str | os.PathLike[str], waveforms: Tensor | np.ndarray, labels: Sequence[object] | None, sample_rate: int
) -> None:
    """Write the picture of `draw_spectrograms` as a PNG, which appears complete or not at all."""
    content = png(draw_spectrograms(waveforms, labels, sample_rate))
    with atomic(path) as file:
        file.write(content)


def check_soundfile() -> None:
    """Raises: ValueError: soundfile is not installed."""
    _soundfile("a WAV file")


def _soundfile(what: object) -> Any:
    """The module soundfile. Args: what: needs it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: it is there, but not its library
        raise ValueError(f"{what} needs soundfile; pip install 'fastddpm[audio]'") from error
    return soundfile


def _content(path: Path) -> bytes:
    """The bytes of a WAV file. Raises: ValueError: it cannot be read, or is no WAV file."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
            if start[:4] not in (b"RIFF", b"RIFX") or start[8:] != b"WAVE":
                found = f"begins with {start!r}" if start else "is empty"
                raise ValueError(f"{path} is not a WAV file: it {found}; convert it: {conversion(path, None)}")
            if (size := os.fstat(file.fileno()).st_size) > _LARGEST:
                raise ValueError(f"{path} has {size} bytes; a WAV file has at most {_LARGEST}: cut it into pieces")
            return start + file.read()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; want a WAV file") from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit in memory; cut it into pieces") from error


def _check_form(path: Path, sound: Any, rate: int | None) -> None:
    """Raises: ValueError: a file is not 16-bit mono at this rate."""
    if (sound.subtype, sound.channels) != ("PCM_16", 1) or rate not in (None, sound.samplerate):
        came = f"{sound.channels} {'channel' if sound.channels == 1 else 'channels'} of {sound.subtype_info}"
        wanted = "1 channel of Signed 16 bit PCM" + f" at {rate} Hz" * (rate is not None)
        way_out = f"convert it: {conversion(path, rate)}"
        raise ValueError(f"{path} holds {came} at {sound.samplerate} Hz; want {wanted}; {way_out}")


def _check_whole(path: Path, content: bytes) -> None:
    """Refuse a file that ends before the samples that its header announces, which libsndfile would leave out."""
    order, at = ">" if content[:4] == b"RIFX" else "<", 12
    while at + 8 <= len(content):
        name, size = struct.unpack_from(f"{order}4sI", content, at)
        at += 8
        if name == b"data":
            if size > len(content) - at:
                held = f"its header announces {size} bytes of samples, but {len(content) - at} follow"
                raise ValueError(f"{path} is truncated: {held}; copy it again, or repair it: {conversion(path, None)}")
            return
        at += size + size % 2


def conversion(path: Path, rate: int | None) -> str:
    """The command that converts a file. Args: rate: None: the rate stays."""
    return f"ffmpeg -i {shlex.quote(str(path))} {f'-ar {rate} ' if rate else ''}-ac 1 -c:a pcm_s16le out.wav"


def _waveforms(x: Tensor | np.ndarray, name: str, wanted: str, ndim: int) -> np.ndarray:
    """One or several waveforms as float64 [N, L]. Raises: ValueError: the shape or the dtype is wrong."""
    array = x.detach().cpu().double().numpy() if isinstance(x, Tensor) and x.is_floating_point() else x
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"{name} is {shape_of(x)}; want floating-point {wanted} in [-1, 1]")
    if array.ndim not in (ndim, ndim + 1) or (array.ndim > ndim and array.shape[-2] != 1) or array.size == 0:
        raise ValueError(f"{name} is {array.shape} {array.dtype}; want {wanted}, at least one value")
    return array.reshape(-1, array.shape[-1]).astype(np.float64)


def _enlarged(decibels: np.ndarray, hops: float) -> np.ndarray:
    """A spectrogram of the size of a panel, the highest frequency on top. Args: hops: the end of the waveform."""
    from PIL import Image

    (bins, frames), (width, height) = decibels.shape, PANEL
    down, across = -(-bins // height), -(-frames // width)
    pixels = np.maximum.reduceat(decibels[::-1], range(0, bins, down), axis=0)  # a mean would hide a pure tone
    pixels = np.maximum.reduceat(pixels, range(0, frames, across), axis=1)
    # the centre of the first column is the beginning of the waveform, that of the lowest row 0 Hz
    box = (0.5 / across, 0.5 / down, (0.5 + hops) / across, (bins - 0.5) / down)
    return np.asarray(Image.fromarray(pixels).resize(PANEL, Image.Resampling.BICUBIC, box))


def _coloured(decibels: np.ndarray, loudest: float) -> np.ndarray:
    """Values as colours: uint8 [..., 3]."""
    place = ((decibels - loudest) / RANGE + 1).clip(0, 1)
    anchors = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(place, anchors, channel) for channel in _COLOURS.T], -1).round().astype(np.uint8)


def _fitting(text: str, letters: Any, width: float) -> str:
    """Text as one line that is not wider than this."""
    line = "".join(c if c.isprintable() else "?" for c in text[:200])
    short = line
    while letters.getlength(short) > width:
        line = line[:-1]
        short = f"{line}..."
    return short


def _ticks(end: float) -> tuple[list[float], int]:
    """Three to six round numbers from 0 to end, and the decimals that they need."""
    power = 10 ** math.floor(math.log10(end / 3))
    step = next(step for step in (power * 5, power * 2, power) if end / step >= 2 or step == power)
    decimals = max(0, -math.floor(math.log10(step * 1.001)))
    return [k * step for k in range(int(end / step * 1.000001) + 1)], decimals


def _draw_times(draw: Any, letters: Any, corner: tuple[int, int], end: float, *, numbers: bool) -> None:
    """Draw the time axis below a panel, with or without numbers. Args: corner: the panel's lower left; end: seconds."""
    (x, y), (ticks, decimals) = corner, _ticks(end)
    for value in ticks:
        at = x + round(value / end * (PANEL[0] - 1))
        draw.line((at, y, at, y + 4), fill="black")
        if numbers:
            anchor = "lt" if value == 0 else "rt" if value > 0.94 * end else "mt"  # so that neighbours do not touch
            draw.text((at, y + 7), f"{value:.{decimals}f}", fill="black", font=letters, anchor=anchor)
    if numbers:
        draw.text((x + PANEL[0] / 2, y + _LINE + 6), "time (s)", fill="black", font=letters, anchor="mt")


def _draw_frequencies(canvas: Any, letters: Any, corner: tuple[int, int], end: float, *, numbers: bool) -> None:
    """Draw the frequency axis on the left of a panel. Args: corner: the panel's lower left; end: in kHz."""
    from PIL import Image, ImageDraw

    (x, y), (ticks, decimals), draw = corner, _ticks(end), ImageDraw.Draw(canvas)
    for value in ticks:
        at = y - 1 - round(value / end * (PANEL[1] - 1))
        draw.line((x - 5, at, x - 1, at), fill="black")
        if numbers:
            draw.text((x - 8, at), f"{value:.{decimals}f}", fill="black", font=letters, anchor="rm")
    if numbers:
        title = Image.new("RGB", (PANEL[1], _LINE), "white")
        ImageDraw.Draw(title).text((PANEL[1] / 2, 2), "frequency (kHz)", fill="black", font=letters, anchor="mt")
        canvas.paste(title.transpose(Image.Transpose.ROTATE_90), (0, y - PANEL[1]))


def _draw_bar(canvas: Any, letters: Any, corner: tuple[int, int], loudest: float) -> None:
    """Draw the colours and the values that they stand for, relative to the loudest. Args: corner: its upper left."""
    from PIL import Image, ImageDraw

    (x, y), height, draw = corner, PANEL[1], ImageDraw.Draw(canvas)
    values = np.linspace(loudest, loudest - RANGE, height)[:, None].repeat(_BAR, 1)
    canvas.paste(Image.fromarray(_coloured(values, loudest)), corner)
    for value in range(0, int(RANGE) + 1, 20):
        at = y + round(value / RANGE * (height - 1))
        draw.text((x + _BAR + 5, at), f"{-value}{' dB' * (value == 0)}", fill="black", font=letters, anchor="lm")
