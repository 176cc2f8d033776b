"""The bundled models: small DDPMs of Fashion-MNIST, which draw garments of 28 x 28 pixels; one is class-conditional."""

from pathlib import Path

from fastddpm.core.names import SHIPPED_MODEL, SHIPPED_MODELS

FOLDERS = {name: Path(__file__).parents[1] / "models" / name for name in SHIPPED_MODELS}


def shipped_model(name: str = SHIPPED_MODEL) -> Path:
    """The folder of a bundled model. Args: name: one of SHIPPED_MODELS."""
    return FOLDERS[name]
