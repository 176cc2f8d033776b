"""The fused operations: checked entry points to one torch.library operator each (but for `predict_step`).

Triton on a GPU, torch elsewhere: the same bits on every device, but for `group_norm`, whose sums take another order.
The operators are opaque to torch.compile, which traces through the entry points without a graph break. `eps_loss` is
differentiable, nothing else.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.reference.diffusion import add_noise, predicted_x_0, squared_error, target, update
from fastddpm.reference.diffusion import predict_step as predict

if TYPE_CHECKING:
    from fastddpm.core.schedule import StepTable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
MAX_PER_SAMPLE = 65_535 * 1024  # elements: the kernels' grid has one axis of blocks of one sample
MAX_ACTIVATION = 1 << 29  # elements per sample: the kernels count them in 32 bits, with room to round up
MAX_GROUP = 8192  # channels of a group: the kernel holds all those of a pixel


def backend(device: torch.device | str) -> Literal["triton", "torch"]:
    """What runs the operations on a device: the kernels on a GPU where Triton is installed, torch everywhere else."""
    return "triton" if torch.device(device).type == "cuda" and _has_triton() else "torch"


def compiling(device: torch.device) -> AbstractContextManager[None]:
    """A context in which kernels are compiled, by all cores at once, and not launched: results are not computed."""
    if device.type != "cuda" or backend(device) != "triton":
        return nullcontext()
    from fastddpm.kernels.launch import compiling  # type: ignore[import-not-found]

    return compiling()


def step(
    x: Tensor,
    m: Tensor,
    table: "StepTable",
    pos: Tensor,
    address: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    bad: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Take one reverse step, x_t -> x_{t-1}, in place.

    Ho et al. 2020 (arXiv:2006.11239), Algorithm 2 line 4, with x_0 clipped as eq. 15 where the table says so; or any
    other affine sampler the table was built for. Bit for bit `reference.diffusion.update` with z =
    `noise.normal(address, ..., stream=noise.STEP, t=table.timesteps[pos])`, which rows with S = 0 do not draw.

    Args:
        x: [N, C, *spatial] or [N, D] fp32, channels-last, data units (images: [-1, 1]); overwritten with x_{t-1}.
        m: like x in fp16/bf16/fp32; the network's output (eps, x_0 or v, as the table was built for).
        table: StepTable of S rows on x's device.
        pos: [N] int32 on x's device, 0 <= pos < S: the row each entry is at; row S-1 is the first step taken.
            Unchecked: reading it would sync.
        address: [N, 2] int64 on x's device; (seed, sample index) of each entry, see `noise.address`.
        out_dtype: also return x_{t-1} rounded to this dtype (bf16/fp16), for the network; in fp32 x is all it needs.
        out: like x in bf16/fp16: overwritten with x_{t-1} rounded and returned, in place of a new tensor.
        bad: [N] int32 on x's device: where x_{t-1} of entry n holds a value that is not finite, bad[n] becomes
            max(bad[n], pos[n]). Positions descend: of what was -1 at the start, the row of the first bad step is left.
    Returns: x, or (x, x in out_dtype or out).
    Raises: ValueError: a shape, dtype, layout or device is not as above, out and out_dtype are both given, or a
        gradient is asked for.
    """
    _check_state("step", "x", x, (torch.float32,))
    if not isinstance(m, Tensor) or m.shape != x.shape or m.device != x.device:
        raise ValueError(
            f"step: m is {_describe(m)}, but x is {tuple(x.shape)} on {x.device}; "
            "the network must return one value per element of x, where x is"
        )
    _check_state("step", "m", m, FLOATS)
    n = len(x)
    _check("step", "pos", pos, (n,), torch.int32, x.device, "the table row each entry of x is at")
    _check("step", "address", address, (n, 2), torch.int64, x.device, "noise.address(seed, samples, device) makes one")
    rows, timesteps, hint = table.rows, table.timesteps, "Schedule.table(...).to(x.device) makes one"
    _check("step", "table.rows", rows, (*rows.shape[:1], 8), torch.float32, x.device, hint)
    _check("step", "table.timesteps", timesteps, rows.shape[:1], torch.int32, x.device, hint)
    if out_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"step: out_dtype is {out_dtype}; want bfloat16, float16, or None: x itself is float32")

    if out is not None:
        if out_dtype is not None:
            raise ValueError(f"step: out_dtype is {out_dtype}, but out is given, {_describe(out)}; give one of the two")
        _check_state("step", "out", out, FLOATS[1:])
        if out.shape != x.shape or out.device != x.device:
            raise ValueError(f"step: out is {_describe(out)}; want {tuple(x.shape)} on {x.device}, like x")
    elif out_dtype is not None:
        out = layout.empty(n, x.shape[1:], dtype=out_dtype, device=x.device)
    if bad is not None:
        _check("step", "bad", bad, (n,), torch.int32, x.device, "torch.full((n,), -1, dtype=torch.int32) starts one")
    torch.ops.fastddpm.step(x, m, rows, timesteps, pos, address, table.clip, out, bad)
    return x if out is None else (x, out)


def predict_step(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    at: int | Tensor,
    *,
    predicts: str = "epsilon",
    sampler: str = "ddpm",
    clip: float | Callable[[Tensor], Tensor] | None = None,
    v: Tensor | None = None,
    learned: str | None = None,
    z: Tensor | None = None,
    address: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict x_0 and take one reverse step, x_t -> x_{t-1}, as diffusers' schedulers do, into new tensors.

    `reference.diffusion.predict_step` in float32 (float64 where x or m is), 16-bit numbers widened before and results
    rounded once after. On a GPU it is one kernel, with the same bits but for the roots and exponentials of a learned
    variance; where `clip` is a function, or a gradient is asked for, it is torch's operations, which also carry one.
    The host never waits for the device. It is no operator of its own, and not for torch.compile.

    Args:
        x: [N, C, *spatial] or [N, D], fp16/bf16/fp32/fp64, any strides.
        m: like x, of any of these dtypes and of its own strides: what the network returned.
        rows: [R, 8] fp32 or fp64 on x's device: row i, of timestep i - 1, as `reference.diffusion.predict_step` has it.
        at: the row, an int or a 0-dim int64 tensor on x's device.
        predicts, sampler, clip, learned: as there.
        v: like m, for a learned variance.
        z: like m, standard normal; or
        address: [N, 2] int64 on x's device, (seed, sample index) of each entry: z is `noise.normal(address, ...,
            stream=noise.STEP, t=at - 1)`. Without either nothing is added.
    Returns: (x_prev in the dtype that x and m promote to, x_0 in the same; in m's dtype where predicts is "sample").
    Raises: ValueError: a shape or device is not as above, or z and address are both given.
    """
    given = [tensor for tensor in (x, m, v, z) if tensor is not None]
    if any(tensor.shape != x.shape or tensor.device != x.device for tensor in given) or x.ndim < 2:
        came = ", ".join(map(_describe, given))
        raise ValueError(f"predict_step: x, m, v and z are {came}; want [N, C, *spatial] or [N, D], all alike")
    if rows.ndim != 2 or rows.shape[1] != 8 or rows.device != x.device or not rows.is_contiguous():
        raise ValueError(f"predict_step: rows are {_describe(rows)}; want [R, 8] on {x.device}, contiguous")
    if address is not None:
        if z is not None:
            raise ValueError("predict_step: z and address are both given; give one of the two")
        hint = "noise.address(seed, samples, device) makes one"
        _check("predict_step", "address", address, (len(x), 2), torch.int64, x.device, hint)
    dtype = torch.promote_types(x.dtype, m.dtype)
    x_0_dtype = m.dtype if predicts == "sample" else dtype
    plain = not callable(clip) and rows.dtype == torch.float32
    how: dict[str, Any] = {"predicts": predicts, "sampler": sampler, "clip": clip, "learned": learned}
    if backend(x.device) == "triton" and plain and _fits_kernel(given):
        from fastddpm.kernels.predict_step import launch_predict_step  # type: ignore[import-not-found]

        x_prev, x_0 = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=x_0_dtype)
        launch_predict_step(x_prev, x_0, x, m, v, z, rows, at, address, **how)
        return x_prev, x_0
    if address is not None:
        t = at - 1 if isinstance(at, int) else (at - 1).clamp(min=0)
        if not isinstance(t, int) or t >= 0:
            z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=t).to(torch.promote_types(dtype, torch.float32))
    row: Any = rows[at] if isinstance(at, int) else rows.index_select(0, at.reshape(1))[0]
    # as numbers it costs less on a CPU; on a GPU that would wait for it
    row = row.tolist() if x.device.type == "cpu" else row.unbind()
    x, m = _widened(x), _widened(m)
    v, z = (None if y is None else _widened(y) for y in (v, z))
    if (
        predicts == "epsilon"
        and sampler != "ddim_clipped"
        and learned is None
        and not callable(clip)
        and _alike(x, m, z)
    ):
        x_prev, x_0 = _predict_step_of_eps(x, m, row, z, x if sampler == "ddpm" else m, clip)
    else:
        x_prev, x_0 = predict(x, m, row, v=v, z=z, **how)
    return x_prev.to(dtype), x_0.to(x_0_dtype)


def _predict_step_of_eps(
    x: Tensor, m: Tensor, row: list[float], z: Tensor | None, w: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """`reference.diffusion.predict_step` of what is most usual, without the memory of its intermediate results.

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


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are on the CPU in one dtype and one order, and nothing is derived or mapped over them."""
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


def _fits_kernel(tensors: list[Tensor]) -> bool:
    return (
        all(tensor.dtype in FLOATS and layout.is_strided(tensor) for tensor in tensors)
        and 0 < tensors[0].shape[1:].numel() <= MAX_PER_SAMPLE
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def noising(
    x_0: Tensor,
    t: Tensor,
    address: Tensor,
    table: Tensor,
    *,
    stream: int = noise.TRAIN,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise clean samples in one shot: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

    Bit for bit `reference.diffusion.add_noise` in fp32 with eps = `noise.normal(address, ..., stream=stream, t=...)`,
    rounded once to dtype. The timestep in the noise's address is 0 for stream TRAIN and t for LIKELIHOOD.

    Args:
        x_0: [N, C, *spatial] or [N, D], channels-last: fp16/bf16/fp32 in data units, or uint8, which becomes
            (u - 127.5) * (2 / 255) in fp32: 0..255 -> [-1, 1].
        t: [N] int64 on x_0's device, 0 <= t < T. Unchecked: reading it would sync.
        address: [N, 2] int64 on x_0's device; (seed, sample index), for TRAIN the running number of the example seen.
        table: [T, 2] fp32 on x_0's device: sqrt(abar_t), sqrt(1 - abar_t), from `Schedule.noising_table`.
        stream: noise.TRAIN or noise.LIKELIHOOD.
        dtype: of the result, fp32/bf16/fp16.
    Returns: x_t like x_0, in dtype.
    Raises: ValueError: a shape, dtype, layout, device or stream is not as above, or a gradient is asked for.
    """
    _check_noised("noising", x_0, t, address, table, stream)
    if dtype not in FLOATS:
        raise ValueError(f"noising: dtype is {dtype}; want one of {_names(FLOATS)}")
    return torch.ops.fastddpm.noising(x_0, t, address, table, stream, dtype)


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
    """Squared error of what the network returned, of each sample: |m - eps|^2 (Ho et al. 2020, eq. 14).

    eps is made anew from its address; the kernels store neither it nor the images as floats. Bit for bit
    `reference.diffusion.squared_error` of `target` in fp32, a sum over the sample's elements. Differentiable in m,
    once: the gradient is ((2 g) (m - target)) in fp32, rounded once to m's dtype.

    Args:
        m: [N, C, *spatial] or [N, D] fp16/bf16/fp32, channels-last: what the network returned.
        x_0: of m's shape, as `noising` takes it. Not read for eps prediction.
        t, address, table, stream: those that x_t was made of, by `noising`.
        predicts: what m is to be: "epsilon", "sample" (x_0), or "v_prediction", sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
            (arXiv:2202.00512).
    Returns: [N] fp32; divided by N and the elements of a sample, its sum is L_simple.
    Raises: ValueError: a shape, dtype, layout, device or option is not as above, or x_0 requires a gradient.
    """
    _check_noised("eps_loss", x_0, t, address, table, stream)
    _check_returned("eps_loss", m, x_0)
    if predicts not in PREDICTIONS:
        raise ValueError(f"eps_loss: predicts is {predicts!r}; want one of {', '.join(PREDICTIONS)}")
    return torch.ops.fastddpm.eps_loss(layout.channels_last(m), x_0, t, address, table, predicts, stream)


def x_0_error(
    m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, *, stream: int = noise.LIKELIHOOD
) -> Tensor:
    """Squared error of the predicted x_0, of each sample: all that a term of the variational bound asks of a network.

    |scale clamp(cx x_t + cm m, lo, hi) - x_0|^2 (Ho et al. 2020, eq. 15 in eq. 8), with x_t made of x_0 and of
    the noise at its address anew. Bit for bit `reference.diffusion.squared_error` of `predicted_x_0` in fp32, a sum
    over the sample's elements.

    Args:
        m: [N, C, *spatial] or [N, D] fp16/bf16/fp32, channels-last: what the network returned for x_t.
        x_0: of m's shape, as `noising` takes it.
        t, address, stream: those that x_t was made of, by `noising`.
        table: [T, 7] fp32 on x_0's device: sqrt(abar_t), sqrt(1 - abar_t), cx, cm, lo, hi, scale; infinite lo and
            hi clip nothing.
    Returns: [N] fp32.
    Raises: ValueError: a shape, dtype, layout, device or stream is not as above, or a gradient is asked for.
    """
    hint = "Schedule.noising_table() beside the first four columns of Schedule.table().rows and its scale"
    _check_noised("x_0_error", x_0, t, address, table, stream, columns=7, hint=hint)
    _check_returned("x_0_error", m, x_0)
    _check_gradients("x_0_error", m=m)
    return torch.ops.fastddpm.x_0_error(layout.channels_last(m), x_0, t, address, table, stream)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Group norm (Wu and He 2018, arXiv:1803.08494) of cat([x, skip], 1) + add, with SiLU after it if asked.

    In fp32, rounded once; the kernel makes neither the sum nor the whole of x and skip. An entry's bits depend on no
    other entry, but on the size of the batch, by which the kernel cuts its work.

    Args:
        x: [N, C1, *spatial] fp32/bf16/fp16, channels-last.
        weight, bias: [C] fp32, C = C1 + C2.
        groups: how many of equally many channels; one may hold channels of both x and skip.
        eps: added to the variance.
        skip: [N, C2, *spatial], the channels that follow x's, like x; or None.
        add: [1 or N, C] fp32 of any row stride, added before the statistics (the time bias, a slice of a table's
            columns); or None.
        silu: whether y * sigmoid(y) is returned for y.
    Returns: [N, C, *spatial] like x, new.
    Raises: ValueError: a shape, dtype, layout or device is not as above, groups do not divide the channels, eps is not
        positive, or a gradient is asked for.
    """
    _check_state("group_norm", "x", x, FLOATS, MAX_ACTIVATION)
    n, channels, device = len(x), x.shape[1], x.device
    if skip is not None:
        _check_state("group_norm", "skip", skip, FLOATS, MAX_ACTIVATION)
        if len(skip) != n or skip.shape[2:] != x.shape[2:] or skip.dtype != x.dtype or skip.device != device:
            raise ValueError(f"group_norm: skip is {_describe(skip)}, x {_describe(x)}; only their channels may differ")
        channels += skip.shape[1]
        if channels * x.shape[2:].numel() > MAX_ACTIVATION:
            raise ValueError(
                f"group_norm: x is {_describe(x)} and skip {_describe(skip)}; "
                f"a sample of both may have at most {MAX_ACTIVATION} elements"
            )
    if not isinstance(groups, int) or groups < 1 or channels % groups or channels > groups * MAX_GROUP:
        raise ValueError(
            f"group_norm: groups is {groups!r}; want a whole number that divides the {channels} channels into groups "
            f"of at most {MAX_GROUP}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check("group_norm", name, parameter, (channels,), torch.float32, device, "one value per channel of the result")
    if add is not None and (
        not isinstance(add, Tensor)
        or add.shape not in ((1, channels), (n, channels))
        or add.dtype != torch.float32
        or add.device != device
        or (add.stride(1) != 1 and channels > 1)
    ):
        raise ValueError(
            f"group_norm: add is {_describe(add)}; want (1 or {n}, {channels}) torch.float32 on {device}, "
            "each row contiguous: one for all entries of x or one for each"
        )
    if not isinstance(eps, int | float) or not 0 < eps < inf:
        raise ValueError(f"group_norm: eps is {eps!r}; want a number > 0")
    _check_gradients("group_norm", weight=weight, bias=bias, add=add)
    return torch.ops.fastddpm.group_norm(x, weight, bias, groups, float(eps), skip, add, silu)


def residual(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """h = (h + residual) + bias in place, in fp32, rounded once.

    Args:
        h: [N, C, *spatial] or [N, D] fp32/bf16/fp16, channels-last; overwritten.
        residual: like h.
        bias: [C] fp32, or None.
    Returns: h.
    Raises: ValueError: a shape, dtype, layout or device is not as above, or a gradient is asked for.
    """
    _check_state("residual", "h", h, FLOATS, MAX_ACTIVATION)
    _check_state("residual", "residual", residual, (h.dtype,), MAX_ACTIVATION)
    if residual.shape != h.shape or residual.device != h.device:
        raise ValueError(f"residual: residual is {_describe(residual)}; want {tuple(h.shape)} on {h.device}, like h")
    if bias is not None:
        _check("residual", "bias", bias, h.shape[1:2], torch.float32, h.device, "one value per channel of h")
        _check_gradients("residual", bias=bias)
    torch.ops.fastddpm.residual(h, residual, bias)
    return h


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
    _check_state("interleave", "y", y, FLOATS, MAX_ACTIVATION)
    if y.ndim != 4 or y.shape[1] % 4 or min(y.shape[2:]) < 2:
        raise ValueError(f"interleave: y is {_describe(y)}; want [N, 4 C, H + 1, W + 1] for an image of H x W pixels")
    if bias is not None:
        shape, hint = (y.shape[1] // 4,), "one value per channel of the result"
        _check("interleave", "bias", bias, shape, torch.float32, y.device, hint)
        _check_gradients("interleave", bias=bias)
    return torch.ops.fastddpm.interleave(y, bias)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check_state(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], most: int = MAX_PER_SAMPLE) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {_describe(x)}; want [N, C, *spatial] or [N, D] of {_names(dtypes)}")
    if not layout.is_channels_last(x):
        raise ValueError(f"{op}: {name} has strides {x.stride()}, not channels-last; use layout.channels_last({name})")
    _check_gradients(op, **{name: x})
    if x.shape[1:].numel() > most:
        raise ValueError(f"{op}: {name} is {_describe(x)}; a sample may have at most {most} elements")


def _check_noised(
    op: str,
    x_0: Tensor,
    t: Tensor,
    address: Tensor,
    table: Tensor,
    stream: int,
    *,
    columns: int = 2,
    hint: str = "Schedule.noising_table().to(device)",
) -> None:
    _check_state(op, "x_0", x_0, (*FLOATS, torch.uint8))
    n, device = len(x_0), x_0.device
    _check(op, "t", t, (n,), torch.int64, device, "the timestep of each entry of x_0")
    _check(op, "address", address, (n, 2), torch.int64, device, "noise.address(seed, samples, device) makes one")
    _check(op, "table", table, (*table.shape[:1], columns), torch.float32, device, hint)
    if not isinstance(stream, int) or stream not in (noise.TRAIN, noise.LIKELIHOOD):
        raise ValueError(f"{op}: stream is {stream!r}; want noise.TRAIN (2) or noise.LIKELIHOOD (3)")


def _check_returned(op: str, m: Tensor, x_0: Tensor) -> None:
    if not isinstance(m, Tensor) or m.shape != x_0.shape or m.device != x_0.device or m.dtype not in FLOATS:
        raise ValueError(
            f"{op}: m is {_describe(m)}, but x_0 is {tuple(x_0.shape)} on {x_0.device}; "
            f"the network must return one value of {_names(FLOATS)} per element of x_0, where x_0 is"
        )


def _check_gradients(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, and {op} has none; call it under torch.no_grad()")


def _check(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, hint: str
) -> None:
    right = isinstance(x, Tensor) and x.shape == shape and x.dtype == dtype and x.device == device
    if not right or not x.is_contiguous():
        raise ValueError(f"{op}: {name} is {_describe(x)}; want {tuple(shape)} {dtype} on {device}, contiguous: {hint}")


def _describe(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _step(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    timesteps: Tensor,
    pos: Tensor,
    address: Tensor,
    clip: bool,
    copy: Tensor | None,
    bad: Tensor | None,
) -> None:
    if backend(x.device) == "triton":
        from fastddpm.kernels.step import launch_step  # type: ignore[import-not-found]  # mapped by the installation

        written = [tensor for tensor in (x, copy, bad) if tensor is not None]
        torch.autograd.graph.increment_version(written)  # autograd does not see what a kernel writes
        return launch_step(x, m, rows, timesteps, pos, address, copy, bad, clip=clip)
    row, t = rows[pos], timesteps[pos]
    if x.device.type == "cpu" and not row[:, -1].any():
        z = None
    else:
        z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=t)
    x.copy_(update(x, m, row, z, clip=clip))
    if copy is not None:
        copy.copy_(x)
    if bad is not None:
        finite = x.isfinite().flatten(1).all(1)
        bad.copy_(torch.where(finite, bad, torch.maximum(bad, pos)))


def _noising(x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    x_t = layout.empty(len(x_0), x_0.shape[1:], dtype=dtype, device=x_0.device)
    if backend(x_0.device) == "triton":
        from fastddpm.kernels.noising import launch_noising  # type: ignore[import-not-found]

        launch_noising(x_t, x_0, t, address, table, stream=stream, with_t=stream == noise.LIKELIHOOD)
        return x_t
    return x_t.copy_(add_noise(_data_units(x_0), _eps(x_0, t, address, stream), table[t]))


def _data_units(x_0: Tensor) -> Tensor:
    return (x_0.float() - 127.5) * (2 / 255) if x_0.dtype == torch.uint8 else x_0.float()


def _eps(x_0: Tensor, t: Tensor, address: Tensor, stream: int) -> Tensor:
    return noise.normal(address, x_0.shape[1:], stream=stream, t=t if stream == noise.LIKELIHOOD else 0)


def _eps_loss(m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, predicts: str, stream: int) -> Tensor:
    if not m.numel():
        return m.new_zeros(len(m), dtype=torch.float32)
    if backend(m.device) == "triton":
        from fastddpm.kernels.eps_loss import launch_eps_loss  # type: ignore[import-not-found]

        with_t = stream == noise.LIKELIHOOD
        return launch_eps_loss(m, x_0, t, address, table, predicts=predicts, stream=stream, with_t=with_t)
    return squared_error(m, _target(x_0, t, address, table, predicts, stream))


def _eps_loss_backward(
    grad: Tensor, m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, predicts: str, stream: int
) -> Tensor:
    out = layout.empty(len(m), m.shape[1:], dtype=m.dtype, device=m.device)
    grad = grad.contiguous()  # that of a sum is one number, expanded
    if not m.numel():
        return out
    if backend(m.device) == "triton":
        from fastddpm.kernels.eps_loss import launch_eps_loss_backward

        how = {"predicts": predicts, "stream": stream, "with_t": stream == noise.LIKELIHOOD}
        launch_eps_loss_backward(out, grad, m, x_0, t, address, table, **how)
        return out
    d = m.float() - _target(x_0, t, address, table, predicts, stream)
    return out.copy_((2 * grad).view(-1, *[1] * (m.ndim - 1)) * d)


def _target(x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, predicts: str, stream: int) -> Tensor:
    x = x_0 if predicts == "epsilon" else _data_units(x_0)
    eps = x if predicts == "sample" else _eps(x_0, t, address, stream)
    return target(x, eps, table[t], predicts)


def _x_0_error(m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, stream: int) -> Tensor:
    if not m.numel():
        return m.new_zeros(len(m), dtype=torch.float32)
    if backend(m.device) == "triton":
        from fastddpm.kernels.x_0_error import launch_x_0_error  # type: ignore[import-not-found]

        return launch_x_0_error(m, x_0, t, address, table, stream=stream, with_t=stream == noise.LIKELIHOOD)
    x, rows = _data_units(x_0), table[t]
    x_t = add_noise(x, _eps(x_0, t, address, stream), rows[:, :2])
    return squared_error(predicted_x_0(x_t, m, rows[:, 2:]), x)


def _group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None,
    add: Tensor | None,
    silu: bool,
) -> Tensor:
    y = layout.empty(len(x), (len(weight), *x.shape[2:]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if backend(x.device) == "triton":
        from fastddpm.kernels.group_norm import launch_group_norm  # type: ignore[import-not-found]

        launch_group_norm(y, x, weight, bias, groups, eps, skip, add, silu=silu)
        return y
    v = x.float() if skip is None else torch.cat([x, skip], 1).float()
    if add is not None:
        v = v + add.view(*add.shape, *[1] * (x.ndim - 2))
    # contiguous, for in channels-last torch's CPU kernel takes E[x^2] - E[x]^2
    v = torch.group_norm(v.contiguous(), groups, weight, bias, eps)
    return y.copy_(F.silu(v) if silu else v)


def _residual(h: Tensor, residual: Tensor, bias: Tensor | None) -> None:
    if backend(h.device) == "triton":
        from fastddpm.kernels.residual import launch_residual  # type: ignore[import-not-found]

        torch.autograd.graph.increment_version(h)
        return launch_residual(h, residual, bias)
    total = h.float() + residual.float()
    h.copy_(total if bias is None else total + bias.view(-1, *[1] * (h.ndim - 2)))


def _interleave(y: Tensor, bias: Tensor | None) -> Tensor:
    out = _interleave_like(y, bias)
    if out.numel() == 0:
        return out
    if backend(y.device) == "triton":
        from fastddpm.kernels.interleave import launch_interleave  # type: ignore[import-not-found]

        launch_interleave(out, y, bias)
        return out
    if bias is not None:
        y = layout.channels_last((y.float() + bias.repeat(4).view(-1, 1, 1)).to(y.dtype))
    n, c, height, width = len(y), out.shape[1], y.shape[2] - 1, y.shape[3] - 1
    pixel_stride, row_stride = 4 * c, 4 * c * (width + 1)
    strides = (height + 1) * row_stride, row_stride, row_stride + 2 * c, pixel_stride, pixel_stride + c, 1
    phases = y.as_strided((n, height, 2, width, 2, c), strides)  # [n, i, a, j, b, c]
    pixels = out.movedim(1, -1).view(phases.shape)
    for b in range(2):  # not one copy: 270 us instead of 134 (16 x 64 x 14 x 14, bf16, one EPYC core, 2026-11-28)
        pixels[:, :, :, :, b] = phases[:, :, :, :, b]
    return out


_LIBRARY = torch.library.Library("fastddpm", "DEF")  # custom_op would import torch._dynamo, a second, at the first call
_LIBRARY.define(
    "step(Tensor(a!) x, Tensor m, Tensor rows, Tensor timesteps, Tensor pos, Tensor address, bool clip,"
    " Tensor(b!)? copy, Tensor(c!)? bad) -> ()"
)
_LIBRARY.define(
    "noising(Tensor x_0, Tensor t, Tensor address, Tensor table, int stream, ScalarType dtype) -> Tensor",
)
_LIBRARY.define(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? skip, Tensor? add, bool silu)"
    " -> Tensor"
)
_NOISED = "Tensor x_0, Tensor t, Tensor address, Tensor table, str predicts, int stream"
_LIBRARY.define(f"eps_loss(Tensor m, {_NOISED}) -> Tensor")
_LIBRARY.define(f"eps_loss_backward(Tensor grad, Tensor m, {_NOISED}) -> Tensor")
_LIBRARY.define("x_0_error(Tensor m, Tensor x_0, Tensor t, Tensor address, Tensor table, int stream) -> Tensor")
_LIBRARY.define("residual(Tensor(a!) h, Tensor residual, Tensor? bias) -> ()")
_LIBRARY.define("interleave(Tensor y, Tensor? bias) -> Tensor")
_LIBRARY.impl("step", _step, "CompositeExplicitAutograd")
_LIBRARY.impl("noising", _noising, "CompositeExplicitAutograd")
_LIBRARY.impl("eps_loss", _eps_loss, "CompositeExplicitAutograd")
_LIBRARY.impl("eps_loss_backward", _eps_loss_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("x_0_error", _x_0_error, "CompositeExplicitAutograd")
_LIBRARY.impl("group_norm", _group_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("residual", _residual, "CompositeExplicitAutograd")
_LIBRARY.impl("interleave", _interleave, "CompositeExplicitAutograd")
torch.library.register_fake("fastddpm::step", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fastddpm::residual", lambda *args: None, lib=_LIBRARY)


@torch.library.register_fake("fastddpm::noising", lib=_LIBRARY)
def _noising_like(x_0, t, address, table, stream, dtype):
    return layout.empty(len(x_0), x_0.shape[1:], dtype=dtype, device=x_0.device)


@torch.library.register_fake("fastddpm::group_norm", lib=_LIBRARY)
def _group_norm_like(x, weight, bias, groups, eps, skip, add, silu):
    return layout.empty(len(x), (len(weight), *x.shape[2:]), dtype=x.dtype, device=x.device)


@torch.library.register_fake("fastddpm::interleave", lib=_LIBRARY)
def _interleave_like(y, bias):
    shape = y.shape[1] // 4, 2 * (y.shape[2] - 1), 2 * (y.shape[3] - 1)
    return layout.empty(len(y), shape, dtype=y.dtype, device=y.device)


@torch.library.register_fake("fastddpm::eps_loss", lib=_LIBRARY)
@torch.library.register_fake("fastddpm::x_0_error", lib=_LIBRARY)
def _one_per_sample(m, *args):
    return m.new_empty(len(m), dtype=torch.float32)


@torch.library.register_fake("fastddpm::eps_loss_backward", lib=_LIBRARY)
def _eps_loss_backward_like(grad, m, *args):
    return layout.empty(len(m), m.shape[1:], dtype=m.dtype, device=m.device)


def _keep(ctx, inputs, output):
    *tensors, ctx.predicts, ctx.stream = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    if torch.is_grad_enabled():
        raise ValueError("eps_loss: it is differentiable once; call backward() or grad() without create_graph")
    m = torch.ops.fastddpm.eps_loss_backward(grad, *ctx.saved_tensors, ctx.predicts, ctx.stream)
    return m, *[None] * 6


torch.library.register_autograd("fastddpm::eps_loss", _gradients, setup_context=_keep, lib=_LIBRARY)
