"""The sum of a block's output, its input and a bias, in place."""

import torch
from torch import Tensor

from fastddpm.ops.backend import backend
from fastddpm.ops.checks import check_no_gradients, check_state, check_tensor, tensor_summary
from fastddpm.ops.library import FLOATS, MAX_ACTIVATION, register


def residual(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """h = (h + residual) + bias in place, in fp32, rounded once.

    Args:
        h: [N, C, *spatial] or [N, D] fp32/bf16/fp16, channels-last; overwritten.
        residual: like h.
        bias: [C] fp32, or None.
    Returns: h.
    Raises: ValueError: a shape, dtype, layout or device is not as above, or an argument requires a gradient.
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
    torch.ops.fastddpm.residual(h, residual, bias)
    return h


def _residual(h: Tensor, residual: Tensor, bias: Tensor | None) -> None:
    if backend(h.device) == "triton":
        from fastddpm.kernels.residual import launch_residual  # type: ignore[import-not-found]

        torch.autograd.graph.increment_version(h)  # autograd does not see what a kernel writes
        return launch_residual(h, residual, bias)
    total = h.float() + residual.float()
    h.copy_(total if bias is None else total + bias.view(-1, *[1] * (h.ndim - 2)))


register("residual(Tensor(a!) h, Tensor residual, Tensor? bias) -> ()", _residual, lambda *args: None)
