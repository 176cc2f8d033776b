"""What the samples of a checkpoint are, besides images: sounds or texts. `medium.json` beside it says which."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fastddpm.audio import Audio
from fastddpm.checkpoints.reading import read_json
from fastddpm.core.checks import one_of, shown
from fastddpm.storage.files import atomic
from fastddpm.text import Text

MEDIUM = "medium.json"
Medium = Audio | Text
_KINDS: dict[str, type[Medium]] = {"audio": Audio, "text": Text}


def read_medium(folder: Path) -> Medium | None:
    """The medium that the file in a folder describes; None: there is no such file.

    Raises: ValueError: the file is damaged, or describes a medium that is not known.
    """
    path = folder / MEDIUM
    if not path.exists():
        return None
    content: dict[str, Any] = read_json(path)
    kind = _KINDS[one_of(f"{path}: kind", content.pop("kind", None), tuple(_KINDS))]
    try:
        return kind(**content)
    except (TypeError, ValueError) as error:
        wanted = ", ".join(field.name for field in fields(kind))
        raise ValueError(
            f"{path} does not describe {kind.__name__.lower()}: {error}; want {wanted}: copy it from the checkpoint"
        ) from error


def check_medium(medium: Any, shape: tuple[int, ...]) -> None:
    """Raises: ValueError: this is no medium, or not one of samples of this shape."""
    if medium is not None and not isinstance(medium, Medium):
        raise ValueError(f"medium is {shown(medium)}; want an Audio, a Text or None")
    if isinstance(medium, Text) and shape != medium.shape:
        raise ValueError(f"medium is a Text of samples {medium.shape}, but these are {shape}")
    if isinstance(medium, Audio) and (len(shape) != 2 or shape[0] != medium.channels):
        raise ValueError(f"medium is an Audio, of samples ({medium.channels}, L), but these are {shape}")


def write_medium(folder: Path, medium: Medium) -> None:
    """Write the file into a folder, which exists."""
    kind = next(name for name, of in _KINDS.items() if isinstance(medium, of))
    with atomic(folder / MEDIUM) as file:
        file.write((json.dumps({"kind": kind, **asdict(medium)}, indent=1) + "\n").encode())
