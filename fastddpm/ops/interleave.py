"""The last step of a polyphase upsampling: it interleaves four phases into one image."""

import torch
from torch import Tensor

from fastddpm.core import layout
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_no_gradients, check_state, check_tensor, tensor_summary
from fastddpm.ops.library import FLOATS, MAX_ACTIVATION, register


def interleave(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Interleave the four phases of a polyphase upsampling into one image, and add the bias.

    out[:, c, 2 i + a, 2 j + b] = y[:, (2 a + b) C + c, i + a, j + b] + bias[c]. The sum is computed in fp32 and rounded
    once. Without a bias the bits of y are copied.

    Args:
        y: [N, 4 C, H + 1, W + 1] fp32/bf16/fp16, channels-last: the output of a 2 x 2 convolution with padding 1 on an
            image of H x W pixels, H and W at least 1.
        bias: [C] fp32, or None.
    Returns: a new tensor, [N, C, 2 H, 2 W], in the dtype and layout and on the device of y.
    Raises: ValueError: a shape, dtype, layout or device is not as above, or an argument requires a gradient.
    """
    check_state("interleave", "y", y, FLOATS, MAX_ACTIVATION)
    if y.ndim != 4 or y.shape[1] % 4 or min(y.shape[2:]) < 2:
        raise ValueError(
            f"interleave: y is {tensor_summary(y)}; want [N, 4 C, H + 1, W + 1] for an image of H x W pixels"
        )
    if bias is not None:
        shape, hint = (y.shape[1] // 4,), "one value per channel of the result"
        check_tensor("interleave", "bias", bias, shape, torch.float32, y.device, hint)
        check_no_gradients("interleave", bias=bias)
    return torch.ops.fastddpm.interleave(y, bias)


def _interleave(y: Tensor, bias: Tensor | None) -> Tensor:
    out = _interleave_fake(y, bias)
    if out.numel() == 0:
        return out
    if (launch := launcher("interleave", y.device)) is not None:
        launch(out, y, bias)
        return out
    if bias is not None:
        y = layout.channels_last((y.float() + bias.repeat(4).view(-1, 1, 1)).to(y.dtype))
    n, c, height, width = len(y), out.shape[1], y.shape[2] - 1, y.shape[3] - 1
    pixel_stride, row_stride = 4 * c, 4 * c * (width + 1)
    strides = (height + 1) * row_stride, row_stride, row_stride + 2 * c, pixel_stride, pixel_stride + c, 1
    phases = y.as_strided((n, height, 2, width, 2, c), strides)  # [n, i, a, j, b, c]
    pixels = out.movedim(1, -1).view(phases.shape)
    for b in range(2):  # 134 us; a single copy takes 270 us (16 x 64 x 14 x 14, bf16, an EPYC core, 2026-11-28)
        pixels[:, :, :, :, b] = phases[:, :, :, :, b]
    return out


def _interleave_fake(y: Tensor, bias: Tensor | None) -> Tensor:
    shape = y.shape[1] // 4, 2 * (y.shape[2] - 1), 2 * (y.shape[3] - 1)
    return layout.empty(len(y), shape, dtype=y.dtype, device=y.device)


register("interleave(Tensor y, Tensor? bias) -> Tensor", _interleave, _interleave_fake)
