"""The bundled models: small DDPMs that draw garments of 28 x 28 pixels, spoken digits, and first names."""

from pathlib import Path

from fastddpm.core.checks import one_of
from fastddpm.core.names import SHIPPED_MODEL, SHIPPED_MODELS

FOLDERS = {name: Path(__file__).parents[1] / "models" / name for name in SHIPPED_MODELS}


def shipped_model(name: str = SHIPPED_MODEL) -> Path:
    """The folder of a bundled model.

    Args: name: one of SHIPPED_MODELS.
    Raises: ValueError: there is no such model, or the package was built without it, perhaps for its licence.
    """
    folder = FOLDERS[one_of("name", name, SHIPPED_MODELS)]
    if not folder.is_dir():
        raise ValueError(f"this build of fastddpm lacks the model '{name}'; install a build that has it, or train it")
    return folder
