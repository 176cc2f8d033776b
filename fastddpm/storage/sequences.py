"""Sequences to train on: arrays of numbers in an .npz, folders of WAV files, files of text."""

import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastddpm.audio import Audio
from fastddpm.core.checks import flag, one_of
from fastddpm.core.memory import is_out_of_memory
from fastddpm.core.names import AUDIO_CODES
from fastddpm.storage import npz
from fastddpm.storage.arrays import StoredArray
from fastddpm.storage.audio import FULL_SCALE, conversion, read_pcm
from fastddpm.storage.decoding import SUFFIXES
from fastddpm.storage.files import as_path, check_regular
from fastddpm.storage.image_files import ImageFiles
from fastddpm.storage.image_folder import holds_files, open_folder
from fastddpm.storage.sequence_files import PICTURE
from fastddpm.text import Text, read_texts

WANTED = "want an .npz with floats or int16 [N, L] or [N, C, L], a folder of WAV files, or a .txt with a text per line"
MULTIPLE = 64  # the length of WAV files is padded to a multiple of this, so that a network can halve it several times
_WAVES = (".wav",)
_FEW = 8  # a last dimension up to this, and far below the one before it, is taken to be the channels


class Sequences(NamedTuple):
    """Samples that are not images.

    Attributes:
        data: [N, C, L] float32, or int16 whose values / 32768 are the samples.
        medium: what they are, if they are waveforms or text.
    """

    data: np.ndarray
    medium: Audio | Text | None


def load_sequences(
    path: str | os.PathLike[str], *, code: str | None = None, held_out: bool = False, like: Audio | Text | None = None
) -> Sequences:
    """All sequences, of one length, in memory.

    Args:
        path: one of
            an .npz with floats or int16, [N, L] or [N, C, L]: the array is found by name as `load_images` does, or is
            "FILE.npz:NAME". With an array `sample_rate`, one number, they are waveforms of one channel;
            a folder, searched with its subfolders, of 16-bit mono WAV files of one sample rate, sorted by name (1, 10,
            2). Shorter ones are filled with zeros at the end, up to the longest, and that up to a multiple of 64;
            a .txt file in UTF-8 with one text per line, which are encoded by `Text.fit`.
        code: of texts, see `Text`, or of waveforms, see `Audio`; None: "bits" or "waveform".
        held_out: prefer an .npz's x_test.
        like: encode the data as this medium does, whose sample rate or alphabet they must have; instead of code.
    Raises: ValueError: path does not exist, is of another kind, is damaged or empty; sample rates differ; or values are
        not finite, or for waveforms outside [-1, 1].
    Warns: files in a folder are left out.
    """
    flag("held_out", held_out)
    path, array = npz.split_array(as_path("path", path))
    kind = _kind(path)
    if array is not None and kind != "npz":
        raise ValueError(f"{path} is not an .npz; leave out :{array}")
    try:
        if kind == "waves":
            return _encoded(path, _from_waves(path), code, like)
        if kind == "text":
            texts = read_texts(path)
            text = like if isinstance(like, Text) else Text.fit(texts, code or "bits")
            _check_medium(path, text, like)
            return Sequences(text.encode(texts).numpy(), text)
        found = _from_npz(path, npz.choose_array(path, held_out=held_out) if array is None else array)
        return _encoded(path, found, code, like)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise ValueError(f"the sequences of {path} do not fit in memory; use fewer, or shorter ones") from error


def is_sequences(path: str | os.PathLike[str]) -> bool:
    """Whether `load_sequences` reads path, rather than `load_images`. Reads no values; damage is left to them.

    True: an .npz whose array is floats or int16, [N, L] or [N, C, L] with C != L; a folder with WAV files and no
    images; a file whose name ends in .txt.
    """
    path, array = npz.split_array(as_path("path", path))
    try:
        kind = _kind(path)
        if kind != "npz":
            return True
        stored = npz.open_array(path, npz.choose_array(path) if array is None else array)
    except ValueError:
        return False
    shape = stored.shape
    is_square = len(shape) == 3 and shape[1] == shape[2]  # probably grey images, whose error says how to convert them
    return _is_numbers(stored) and len(shape) in (2, 3) and not is_square


def is_text_file(path: str | os.PathLike[str]) -> bool:
    """Whether path is a file whose name ends in .txt."""
    return isinstance(path, str | os.PathLike) and Path(path).suffix.lower() == ".txt" and os.path.isfile(path)


def holds_waves(folder: Path) -> bool:
    """Whether a folder holds WAV files, and no images besides the one that `fastddpm sample` draws."""
    return holds_files(folder, _WAVES, but=SUFFIXES, ignored=(PICTURE,))


def open_waves(folder: Path) -> ImageFiles:
    """The WAV files in a folder and its subfolders, sorted by name, with the classes that they are in."""
    return open_folder(folder, _WAVES, "WAV files", ignored=(PICTURE,))


def _kind(path: Path) -> str:
    """What is at path: waves, text or npz. Raises: ValueError: it is something else, or cannot be read."""
    if os.path.isdir(path):  # Path.is_dir raises an error of its own for a name that is too long
        if holds_waves(path):
            return "waves"
        raise ValueError(f"{path} is a folder without WAV files, or with images beside them; {WANTED}")
    if is_text_file(path):
        return "text"
    try:
        with open(check_regular(path), "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {WANTED}") from error
    if start != b"PK":
        raise ValueError(f"{path} is of unknown type; {WANTED}")
    return "npz"


def _from_waves(folder: Path) -> Sequences:
    files = open_waves(folder)
    if files.left_out:
        warnings.warn(files.left_out, stacklevel=3)
    waveforms, rate = [], 0
    for path in files.files:
        samples, its_rate = read_pcm(path)
        rate = rate or its_rate
        if its_rate != rate:
            came = f"{files.files[0]} has {rate} Hz, {path} has {its_rate} Hz"
            raise ValueError(f"sample rates differ: {came}; convert the second: {conversion(path, rate)}")
        waveforms.append(samples)
    longest = max(map(len, waveforms))
    data = np.zeros((len(waveforms), 1, MULTIPLE * -(-longest // MULTIPLE)), np.int16)
    for row, samples in zip(data, waveforms, strict=True):
        row[0, : len(samples)] = samples
    return Sequences(data, Audio(rate))


def _from_npz(path: Path, array: str) -> Sequences:
    medium = _sample_rate(path) if npz.SAMPLE_RATE in npz.array_names(path) else None
    stored = npz.open_array(path, array)
    _check_header(stored, medium)
    x = np.ascontiguousarray(stored.load())
    if x.dtype.kind == "i":
        x = x.astype(np.int16, copy=False)  # of this machine's byte order
    else:
        with np.errstate(over="ignore"):  # beyond the largest float32 is infinity, which is refused below
            x = x.astype(np.float32, copy=False)
        if bad := np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1)).tolist():
            listed = f"{bad[:8]}{' ...' * (len(bad) > 8)}"
            raise ValueError(f"{stored.name} has values that are not finite in samples {listed}; leave these out")
        if medium is not None and np.abs(x).max() > 1:
            came = f"has values from {x.min():g} to {x.max():g}"
            raise ValueError(f"{stored.name} {came}; want waveforms in [-1, 1]: divide them, x / np.abs(x).max()")
    return Sequences(x if x.ndim == 3 else x[:, None], medium)


def _check_medium(path: Path, medium: Audio | Text | None, like: Audio | Text | None) -> None:
    """Raises: ValueError: sequences are of another kind than a medium, or of another sample rate."""
    kinds = {Audio: "waveforms with a sample rate", Text: "texts", type(None): "just numbers"}
    if like is not None and type(medium) is not type(like):
        raise ValueError(f"{path} holds {kinds[type(medium)]}, but the model's samples are {kinds[type(like)]}")
    if isinstance(like, Audio) and isinstance(medium, Audio) and medium.sample_rate != like.sample_rate:
        raise ValueError(
            f"{path} has {medium.sample_rate} Hz, but the model's samples have {like.sample_rate} Hz; convert the "
            f"waveforms: {conversion(Path('in.wav'), like.sample_rate)}"
        )


def _encoded(path: Path, found: Sequences, code: str | None, like: Audio | Text | None) -> Sequences:
    """Sequences in a code, or that of a medium. Raises: ValueError: they are of another kind."""
    data, medium = found
    _check_medium(path, medium, like)
    if isinstance(like, Audio):
        code = like.code
    if code is None:
        return found
    if not isinstance(medium, Audio):
        raise ValueError(
            f"code is {code}, but the data have no sample_rate, so they are not waveforms; leave code out, or add an "
            "array sample_rate to the .npz"
        )
    if (code := one_of("code", code, AUDIO_CODES)) == "waveform":
        return found
    waveforms = data / np.float32(FULL_SCALE) if data.dtype == np.int16 else data
    medium = Audio(medium.sample_rate, code)
    return Sequences(medium.encode(waveforms), medium)


def _sample_rate(path: Path) -> Audio:
    """Raises: ValueError: the sample rate in an .npz is not one, from 1 to 1,000,000."""
    stored = npz.open_array(path, npz.SAMPLE_RATE)
    if math.prod(stored.shape) != 1 or stored.dtype.kind not in "iuf":
        came = f"{list(stored.shape)} {stored.dtype}"
        raise ValueError(f"{stored.name} is {came}; want one number, the samples per second")
    rate = stored.load().item()
    try:
        return Audio(int(rate) if isinstance(rate, float) and rate.is_integer() else rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_header(stored: StoredArray, medium: Audio | None) -> None:
    """Raises: ValueError: the dtype or the shape is not that of sequences."""
    shape, came = stored.shape, f"{stored.name} is {list(stored.shape)} {stored.dtype}"
    if not _is_numbers(stored) or len(shape) not in (2, 3):
        way_out = ""
        if len(shape) == 1:
            way_out = "; cut it into samples of one length, as with x.reshape(-1, L)"
        elif len(shape) in (2, 3) and stored.dtype.kind in "iub":
            way_out = "; convert it: x.astype('float32')"
        raise ValueError(f"{came}; want floats, or int16 for waveforms, [N, L] or [N, C, L]{way_out}")
    if 0 in shape:
        raise ValueError(f"{came}, which is empty; want [N, L] or [N, C, L] with every size at least 1")
    if len(shape) == 3 and shape[2] <= _FEW and shape[1] >= 4 * shape[2]:
        raise ValueError(f"{came}, which looks like [N, L, C]; want [N, C, L]: x.transpose(0, 2, 1)")
    if medium is not None and len(shape) == 3 and shape[1] != 1:
        way_out = "mix the channels, x.mean(1), or leave out sample_rate"
        raise ValueError(f"{came} with a sample_rate; want waveforms of one channel, [N, L] or [N, 1, L]: {way_out}")


def _is_numbers(stored: StoredArray) -> bool:
    """Whether the values are floats or int16."""
    return stored.dtype.kind == "f" or (stored.dtype.kind == "i" and stored.dtype.itemsize == 2)
