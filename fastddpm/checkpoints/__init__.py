"""Checkpoints on the disk, one file per format."""

from fastddpm.checkpoints.diffusers import load, load_into, save

__all__ = ["load", "load_into", "save"]
