"""Checkpoints on disk, one file per format."""

from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.diffusers import beyond_diffusers, save
from fastddpm.checkpoints.loading import FORMATS, load
from fastddpm.checkpoints.parameters import load_into
from fastddpm.checkpoints.shipped import SHIPPED_MODELS, shipped_model

__all__ = ["FORMATS", "SHIPPED_MODELS", "Checkpoint", "beyond_diffusers", "load", "load_into", "save", "shipped_model"]
