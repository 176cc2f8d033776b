"""The bundled models: small DDPMs that draw garments of 28 x 28 pixels, spoken digits, and first names."""

from pathlib import Path

from fastddpm.core.names import SHIPPED_MODEL, SHIPPED_MODELS

FOLDERS = {name: Path(__file__).parents[1] / "models" / name for name in SHIPPED_MODELS}


def shipped_model(name: str = SHIPPED_MODEL) -> Path:
    """The folder of a bundled model.

    Args: name: one of SHIPPED_MODELS.
    Raises: ValueError: the package was built without it, perhaps for its licence.
    """
    if not FOLDERS[name].is_dir():
        raise ValueError(f"this build of fastddpm was made without the model {name}; install another, or train it")
    return FOLDERS[name]
