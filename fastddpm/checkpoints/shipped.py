"""The bundled model: a small DDPM of Fashion-MNIST, which draws garments of 28 x 28 pixels."""

from pathlib import Path

from fastddpm.core.names import SHIPPED_MODEL

FOLDER = Path(__file__).parents[1] / "models" / SHIPPED_MODEL


def shipped_model() -> Path:
    """The folder of the bundled model."""
    return FOLDER
