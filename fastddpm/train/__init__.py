"""Training: Algorithm 1 of Ho et al. 2020."""

from fastddpm.train.options import TrainOptions, check_options
from fastddpm.train.trainer import train

__all__ = ["TrainOptions", "check_options", "train"]
