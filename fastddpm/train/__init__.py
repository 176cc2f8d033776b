"""Training: Algorithm 1 of Ho et al. 2020."""

from fastddpm.train.trainer import TrainOptions, check_options, train

__all__ = ["TrainOptions", "check_options", "train"]
