"""Files of sequences that people look at: spectrograms of sounds, lines of texts."""

import os
from collections.abc import Sequence

from torch import Tensor

from fastddpm.audio import Audio
from fastddpm.storage import audio, images
from fastddpm.storage.class_grid import titles_of
from fastddpm.storage.files import atomic
from fastddpm.text import Text

MOST_SHOWN = 100  # spectrograms of a picture
PICTURE = "spectrograms.png"  # beside WAV files: the first ones


def suffix_of(shape: Sequence[int], medium: Audio | Text | None) -> str:
    """The suffix of a file that shows samples of a shape, channels first."""
    if isinstance(medium, Text):
        return ".txt"
    return ".png" if len(shape) == 3 or medium is not None else ".npz"


def save_sequences(
    samples: Tensor,
    path: str | os.PathLike[str],
    medium: Audio | Text | None,
    labels: Sequence[int] | None,
    names: Sequence[str] | None,
) -> None:
    """Write one file that shows all samples [N, C, L]: texts one per line, sounds as spectrograms, numbers as an .npz.

    Args: labels: the class of each; names: of the classes.
    """
    if isinstance(medium, Text):
        with atomic(path) as file:
            file.write("".join(f"{text}\n" for text in medium.decode(samples)).encode())
    elif medium is None:
        images.save_npz(samples, path)
    else:
        titles = None if labels is None else titles_of(labels, names)
        audio.save_spectrograms(path, medium.decode(samples)[:, 0].cpu().numpy(), titles, medium.sample_rate)
