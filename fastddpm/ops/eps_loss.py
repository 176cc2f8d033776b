"""The training loss of each sample, differentiable in the network's output."""

from typing import Any

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.core.checks import one_of
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_model_output, check_noising, check_rows
from fastddpm.ops.library import LIBRARY, PREDICTIONS, register
from fastddpm.ops.noising import data_units, eps_of, has_t
from fastddpm.reference import diffusion
from fastddpm.reference.diffusion import squared_error


def eps_loss(
    m: Tensor,
    x_0: Tensor,
    t: Tensor,
    address: Tensor,
    table: Tensor,
    *,
    predicts: str = "epsilon",
    stream: int = noise.TRAIN,
) -> Tensor:
    """Squared error of the network's output, of each sample: |m - eps|^2 (Ho et al. 2020, eq. 14).

    eps is computed again from its address; the kernels store neither eps nor the images as floats. Bit for bit
    `reference.diffusion.squared_error` of `target` in fp32, a sum over the sample's elements. Differentiable in m,
    but only once: the gradient is ((2 g) (m - target)) in fp32, rounded once to m's dtype.

    Args:
        m: [N, C, *spatial] or [N, D] fp16/bf16/fp32, channels-last: the network's output.
        x_0: of m's shape, as `noising` takes it. Not read for eps prediction.
        t, address, table, stream: the ones that `noising` got for x_t.
        predicts: what m predicts: "epsilon", "sample" (x_0), or "v_prediction", sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
            (arXiv:2202.00512).
    Returns: [N] fp32; divided by N and the elements of a sample, its sum is L_simple.
    Raises: ValueError: a shape, dtype, layout, device or option is not as above, or x_0 requires a gradient.
    """
    check_noising("eps_loss", x_0, t, address, table, stream)
    check_model_output("eps_loss", m, x_0)
    one_of("eps_loss: predicts", predicts, PREDICTIONS)
    return torch.ops.fastddpm.eps_loss(layout.channels_last(m), x_0, t, address, table, predicts, stream)


def _eps_loss(m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, predicts: str, stream: int) -> Tensor:
    if not m.numel():
        return m.new_zeros(len(m), dtype=torch.float32)
    check_rows("eps_loss", "t", t, len(table))
    if (launch := launcher("eps_loss", m.device)) is not None:
        return launch(m, x_0, t, address, table, predicts=predicts, stream=stream, with_t=has_t(stream))
    return squared_error(m, _target(x_0, t, address, table, predicts, stream))


def _eps_loss_fake(m: Tensor, *args: Any) -> Tensor:
    return m.new_empty(len(m), dtype=torch.float32)


def _eps_loss_backward(
    grad: Tensor, m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, predicts: str, stream: int
) -> Tensor:
    out = _eps_loss_backward_fake(grad, m)
    grad = grad.contiguous()  # the gradient of a sum is one number, expanded
    if not m.numel():
        return out
    if (launch := launcher("eps_loss_backward", m.device)) is not None:
        launch(out, grad, m, x_0, t, address, table, predicts=predicts, stream=stream, with_t=has_t(stream))
        return out
    d = m.float() - _target(x_0, t, address, table, predicts, stream)
    return out.copy_((2 * grad).view(-1, *[1] * (m.ndim - 1)) * d)


def _eps_loss_backward_fake(grad: Tensor, m: Tensor, *args: Any) -> Tensor:
    return layout.empty(len(m), m.shape[1:], dtype=m.dtype, device=m.device)


def _target(x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, predicts: str, stream: int) -> Tensor:
    x = x_0 if predicts == "epsilon" else data_units(x_0)
    eps = x if predicts == "sample" else eps_of(x_0, t, address, stream)
    return diffusion.target(x, eps, table[t], predicts)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.predicts, ctx.stream = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise ValueError("eps_loss is differentiable only once; call backward() or grad() without create_graph")
    m = torch.ops.fastddpm.eps_loss_backward(grad, *ctx.saved_tensors, ctx.predicts, ctx.stream)
    return m, *[None] * 6


_ARGUMENTS = "Tensor x_0, Tensor t, Tensor address, Tensor table, str predicts, int stream"
register(f"eps_loss(Tensor m, {_ARGUMENTS}) -> Tensor", _eps_loss, _eps_loss_fake)
register(
    f"eps_loss_backward(Tensor grad, Tensor m, {_ARGUMENTS}) -> Tensor", _eps_loss_backward, _eps_loss_backward_fake
)
torch.library.register_autograd("fastddpm::eps_loss", _backward, setup_context=_setup_context, lib=LIBRARY)
