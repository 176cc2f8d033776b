"""fastddpm: the fastest exact DDPM sampler for PyTorch."""

from fastddpm._version import __version__

__all__ = ["__version__"]
