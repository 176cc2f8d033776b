"""What follows the gradient in a training step: clipping, the learning rate, and the average of the weights."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.train.options import TrainOptions, warmup_steps


def clip_gradients(weights: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`. Returns: the norm before that."""
    norm = nn.utils.get_total_norm([cast(Tensor, each.grad) for each in weights])
    # torch.compile may give several biases one gradient tensor, which must be scaled once
    distinct = {cast(Tensor, each.grad).data_ptr(): each for each in weights}
    nn.utils.clip_grads_with_norm_(distinct.values(), max_norm, norm)
    return norm


def learning_rate_at(k: int, options: TrainOptions) -> float:
    """The learning rate of step k: linear warm-up to the peak, then cosine decay to zero."""
    warmup = warmup_steps(options)
    progress = (k - warmup) / max(options.steps - warmup, 1)
    share = (k + 1) / warmup if k < warmup else 0.5 + 0.5 * math.cos(math.pi * progress)
    return options.learning_rate * share


@torch.no_grad()
def update_average(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the weights: ema = decay * ema + (1 - decay) * net, in place."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
