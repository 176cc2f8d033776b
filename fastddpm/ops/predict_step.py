"""Prediction and reverse step of diffusers' schedulers, into new tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.ops.backend import backend
from fastddpm.ops.checks import check_address, tensor_summary
from fastddpm.ops.library import FLOATS, MAX_PER_SAMPLE
from fastddpm.ops.normal import normal
from fastddpm.reference import diffusion

Clip = float | Callable[[Tensor], Tensor] | None


def predict_step(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    at: int | Tensor,
    *,
    predicts: str = "epsilon",
    sampler: str = "ddpm",
    clip: Clip = None,
    v: Tensor | None = None,
    learned: str | None = None,
    z: Tensor | None = None,
    address: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict x_0 and take one reverse step, x_t -> x_{t-1}, as diffusers' schedulers do, into new tensors.

    `reference.diffusion.predict_step` in float32 (float64 if x or m is): 16-bit values are widened first, and the
    results are rounded once at the end. On a GPU one kernel computes the same bits, except for the roots and
    exponentials of a learned variance. If `clip` is a function, or a gradient is needed, torch's operations run
    instead, and these are differentiable. The host never waits for the device. This is not a torch.library operator,
    and does not support torch.compile.

    Args:
        x: [N, C, *spatial] or [N, D], fp16/bf16/fp32/fp64, any strides.
        m: like x, though its dtype and strides may differ: the network's output.
        rows: [R, 8] fp32 or fp64 on x's device: row i, of timestep i - 1, as `reference.diffusion.predict_step` has it.
        at: the row, 0 <= at < R, an int or a 0-dim int64 tensor on x's device. Unchecked: reading it would sync.
        predicts, sampler, clip, learned: as `reference.diffusion.predict_step` takes them.
        v: like m, for a learned variance.
        z: like m, standard normal; not together with address.
        address: [N, 2] int64 on x's device, (seed, sample index) of each entry: z is `noise.normal(address, ...,
            stream=noise.STEP, t=at - 1)`. Without z and address no noise is added.
    Returns: (x_prev in the dtype that x and m promote to, x_0 in the same; in m's dtype where predicts is "sample").
    Raises: ValueError: a shape or device is not as above, or z and address are both given.
    """
    given = [tensor for tensor in (x, m, v, z) if tensor is not None]
    if any(tensor.shape != x.shape or tensor.device != x.device for tensor in given) or x.ndim < 2:
        summaries = ", ".join(map(tensor_summary, given))
        wanted = "want [N, C, *spatial] or [N, D], all of one shape on one device"
        raise ValueError(f"predict_step: x, m, v and z are {summaries}; {wanted}")
    if rows.ndim != 2 or rows.shape[1] != 8 or rows.device != x.device or not rows.is_contiguous():
        raise ValueError(f"predict_step: rows are {tensor_summary(rows)}; want [R, 8] on {x.device}, contiguous")
    if address is not None:
        if z is not None:
            raise ValueError("predict_step: z and address are both given; give one of the two")
        check_address("predict_step", address, len(x), x.device)

    dtype = torch.promote_types(x.dtype, m.dtype)
    x_0_dtype = m.dtype if predicts == "sample" else dtype
    if backend(x.device) == "triton" and not callable(clip) and rows.dtype == torch.float32 and _fits_kernel(given):
        from fastddpm.kernels.predict_step import launch_predict_step  # type: ignore[import-not-found]

        x_prev, x_0 = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=x_0_dtype)
        launch_predict_step(
            x_prev, x_0, x, m, v, z, rows, at, address, predicts=predicts, sampler=sampler, clip=clip, learned=learned
        )
        return x_prev, x_0
    if address is not None:
        z = _addressed_noise(address, x, at, dtype)
    row = _coefficients(rows, at)
    x_prev, x_0 = _in_torch(x, m, row, predicts=predicts, sampler=sampler, clip=clip, v=v, learned=learned, z=z)
    return x_prev.to(dtype), x_0.to(x_0_dtype)


def _fits_kernel(tensors: list[Tensor]) -> bool:
    return (
        all(tensor.dtype in FLOATS and layout.has_one_pixel_stride(tensor) for tensor in tensors)
        and 0 < tensors[0].shape[1:].numel() <= MAX_PER_SAMPLE
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _addressed_noise(address: Tensor, x: Tensor, at: int | Tensor, dtype: torch.dtype) -> Tensor | None:
    """z of the step at row `at`, in fp32 or fp64; None for row 0, which has no timestep."""
    if isinstance(at, int) and at < 1:
        return None
    t = torch.empty_like(address[:, 0]).copy_(torch.as_tensor(at - 1, device=address.device).clamp(min=0))
    z = normal(address, x.shape[1:], stream=noise.STEP, t=t)
    return z.to(torch.promote_types(dtype, torch.float32))


def _coefficients(rows: Tensor, at: int | Tensor) -> Any:
    """The eight coefficients: numbers on a CPU, where that is faster; tensors on a GPU, so the host does not wait."""
    row = rows[at] if isinstance(at, int) else rows.index_select(0, at.reshape(1))[0]
    return row.tolist() if rows.device.type == "cpu" else row.unbind()


def _in_torch(
    x: Tensor,
    m: Tensor,
    row: Any,
    *,
    predicts: str,
    sampler: str,
    clip: Clip,
    v: Tensor | None,
    learned: str | None,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.diffusion.predict_step`, with 16-bit values widened to fp32."""
    x, m = _widened(x), _widened(m)
    v, z = (None if y is None else _widened(y) for y in (v, z))
    usual = predicts == "epsilon" and sampler != "ddim_clipped" and learned is None
    if usual and not callable(clip) and _can_write_into_buffers(x, m, z):
        return _predict_step_of_eps(x, m, row, z, x if sampler == "ddpm" else m, clip)
    return diffusion.predict_step(x, m, row, predicts=predicts, sampler=sampler, clip=clip, v=v, learned=learned, z=z)


def _predict_step_of_eps(
    x: Tensor, m: Tensor, row: list[float], z: Tensor | None, w: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """`reference.diffusion.predict_step` for the usual case, without allocating memory for each intermediate result.

    A step of 64 x 3 x 32 x 32: DDPM 1224 -> 1099 us, of which the noise takes 508, DDIM 491 -> 424 us (a core of a
    Xeon, 2026-11-23).
    """
    signal, noise, of_x_0, of_w, sigma, _, _, noisy = row
    x_0 = noise * m
    torch.sub(x, x_0, out=x_0).div_(signal)
    if clip is not None:
        x_0.clamp_(-clip, clip)
    x_prev, part = of_x_0 * x_0, of_w * w
    x_prev += part
    if z is not None and noisy:
        x_prev += torch.mul(z, sigma, out=part)
    return x_prev, x_0


def _can_write_into_buffers(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are on the CPU with one dtype and the same strides, and no derivative or vmap is being computed."""
    return (
        x.device.type == "cpu"
        and all(
            y is None or (y.dtype == x.dtype and y.stride() == x.stride() and not y.requires_grad) for y in (x, *others)
        )
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.element_size() == 2 else x
