"""The sum of a block's output, its input and a bias, divided by a scale, in place."""

from math import inf

import torch
from torch import Tensor

from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_no_gradients, check_state, check_tensor, tensor_summary
from fastddpm.ops.library import FLOATS, MAX_ACTIVATION, register


def residual(h: Tensor, residual: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """h = ((h + residual) + bias) / scale in place, in fp32, rounded once.

    Args:
        h: [N, C, *spatial] or [N, D] fp32/bf16/fp16, channels-last; overwritten.
        residual: like h.
        bias: [C] fp32, or None.
        scale: the divisor, rounded to fp32 first.
    Returns: h.
    Raises: ValueError: a shape, dtype, layout or device is not as above, scale is not positive, or an argument
        requires a gradient.
    """
    check_state("residual", "h", h, FLOATS, MAX_ACTIVATION)
    check_state("residual", "residual", residual, (h.dtype,), MAX_ACTIVATION)
    if residual.shape != h.shape or residual.device != h.device:
        raise ValueError(
            f"residual: residual is {tensor_summary(residual)}; want {tuple(h.shape)} on {h.device}, like h"
        )
    if bias is not None:
        check_tensor("residual", "bias", bias, h.shape[1:2], torch.float32, h.device, "one value per channel of h")
        check_no_gradients("residual", bias=bias)
    if not isinstance(scale, int | float) or not 0 < scale < inf:
        raise ValueError(f"residual: scale is {scale!r}; want a number > 0")
    torch.ops.fastddpm.residual(h, residual, bias, float(scale))
    return h


def _residual(h: Tensor, residual: Tensor, bias: Tensor | None, scale: float) -> None:
    if (launch := launcher("residual", h.device)) is not None:
        torch.autograd.graph.increment_version(h)  # autograd does not see what a kernel writes
        return launch(h, residual, bias, scale)
    total = h.float() + residual.float()
    total = total if bias is None else total + bias.view(-1, *[1] * (h.ndim - 2))
    h.copy_(total if scale == 1 else total / scale)


register("residual(Tensor(a!) h, Tensor residual, Tensor? bias, float scale) -> ()", _residual, lambda *args: None)
