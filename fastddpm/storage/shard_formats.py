"""The formats of a shard: the bytes of its files, and the samples in them."""

import io
import math
import tarfile
import wave
from collections.abc import Sequence

import numpy as np

from fastddpm.storage import audio, images
from fastddpm.storage.indices import Indices

FORMATS = {"npz": ".npz", "png": ".png", "wav": ".wav", "webdataset": ".tar"}
ONE_EACH = ("png", "wav")  # formats with a file for each sample
MODES = ("L", "RGB", "RGBA")  # of the PNGs that `images.png` writes

Stored = tuple[tuple[int, ...], np.dtype]  # (shape, dtype) of a sample in a file


def are_images(shape: Sequence[int], *, latents: bool) -> bool:
    """Whether samples of a shape, channels first, are stored as images, uint8 [H, W, C]; all others are float32."""
    return len(shape) == 3 and shape[0] in images.CHANNELS and not latents


def encoded(
    form: str,
    indices: Indices,
    samples: np.ndarray,
    labels: np.ndarray | None,
    *,
    digits: int,
    sample_rate: int | None = None,
) -> list[bytes]:
    """The content of each file of a shard: one, or for the formats ONE_EACH one per sample.

    Args: sample_rate: of the format wav.
    """
    if form == "png":
        return list(map(images.png, samples))
    if form == "wav":
        assert sample_rate is not None
        return [audio.wav_bytes(sample, sample_rate) for sample in samples]
    buffer = io.BytesIO()
    if form == "npz":
        np.savez(buffer, samples, *([] if labels is None else [labels]))
    else:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            add_to_tar(tar, indices, samples, labels, digits=digits)
    return [buffer.getvalue()]


def decoded(form: str, contents: Sequence[bytes], count: int, stored: Stored) -> np.ndarray:
    """The inverse of `encoded`, but for the rounding to 16 bits in wav: [count, ...]. stored: what each sample must be.

    Raises: Exception: the content is damaged, or it is something else; any exception of a decoder.
    """
    if form == "npz":
        samples = _from_npz(contents[0], count, stored)
    elif form == "webdataset":
        samples = np.stack(_from_tar(contents[0], stored))
    else:
        of_file = _from_png if form == "png" else _from_wav
        samples = np.stack([of_file(content, stored) for content in contents])
    if len(samples) != count or (samples.shape[1:], samples.dtype) != stored:
        raise ValueError(f"{samples.shape} {samples.dtype}")
    return samples


def add_to_tar(
    tar: tarfile.TarFile, indices: Indices, samples: np.ndarray, labels: np.ndarray | None, *, digits: int
) -> None:
    """Append samples for webdataset, which groups files whose names differ only in the suffix into one sample."""
    for place, index in enumerate(indices):
        name = f"{index:0{digits}d}"
        if images.are_pictures(samples):
            _add_file(tar, f"{name}.png", images.png(samples[place]))
        else:
            buffer = io.BytesIO()
            np.save(buffer, samples[place])
            _add_file(tar, f"{name}.npy", buffer.getvalue())
        if labels is not None:
            _add_file(tar, f"{name}.cls", str(labels[place]).encode())


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, so that equal samples give equal bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _from_npz(content: bytes, count: int, stored: Stored) -> np.ndarray:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        size = arrays.zip.getinfo("arr_0.npy").file_size
        if size > count * math.prod(stored[0]) * stored[1].itemsize + (1 << 16):
            raise ValueError(f"an array of {size} bytes when unpacked")
        return arrays["arr_0"]


def _from_tar(content: bytes, stored: Stored) -> list[np.ndarray]:
    samples = []
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if member.issparse():
                raise ValueError("a sparse file, which may be of any size")
            if not member.name.endswith(".cls"):
                held = tar.extractfile(member).read()  # type: ignore[union-attr]
                samples.append(_from_npy(held) if member.name.endswith(".npy") else _from_png(held, stored))
    return samples


def _from_npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _from_wav(content: bytes, stored: Stored) -> np.ndarray:
    with wave.open(io.BytesIO(content)) as sound:
        form = sound.getnchannels(), sound.getsampwidth(), sound.getnframes()
        if form != (1, 2, stored[0][-1]):
            raise ValueError(f"(channels, bytes, samples) are {form}")
        pcm = np.frombuffer(sound.readframes(form[2]), "<i2")
    return (pcm / np.float32(audio.FULL_SCALE)).astype(np.float32)[None]


def _from_png(content: bytes, stored: Stored) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.mode not in MODES or image.size != stored[0][1::-1]:
            raise ValueError(f"an image of {image.size} {image.mode}")
        array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]
