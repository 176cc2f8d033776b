"""The reverse step x_t -> x_{t-1}, in place."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.core.table import StepColumns, StepTable
from fastddpm.ops.backend import backend, launcher
from fastddpm.ops.checks import check_rows, check_state, check_step, tensor_summary
from fastddpm.ops.library import FLOATS, register
from fastddpm.reference.diffusion import update


def step(
    x: Tensor,
    m: Tensor,
    table: StepTable,
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
    `noise.normal(address, ..., stream=noise.STEP, t=table.timesteps[pos])`, which is not drawn for rows with S = 0.

    Args:
        x: [N, C, *spatial] or [N, D] fp32, channels-last, data units (images: [-1, 1]); overwritten with x_{t-1}.
        m: like x in fp16/bf16/fp32; the network's output (eps, x_0 or v, as the table was built for).
        table: StepTable of S rows on x's device.
        pos: [N] int32 on x's device, 0 <= pos < S: the row each entry is at; row S-1 is the first step taken.
            Unchecked on a GPU: reading it would sync.
        address: [N, 2] int64 on x's device; (seed, sample index) of each entry, see `noise.address`.
        out_dtype: also return x_{t-1} rounded to this dtype (bf16/fp16), for the network; in fp32 x is all it needs.
        out: like x in bf16/fp16: overwritten with the rounded x_{t-1} and returned, instead of a new tensor.
        bad: [N] int32 on x's device: if x_{t-1} of entry n holds a value that is not finite, bad[n] becomes
            max(bad[n], pos[n]). Positions descend, so an entry that starts at -1 keeps the row of its first bad step.
    Returns: x, or (x, x in out_dtype or out).
    Raises: ValueError: a shape, dtype, layout or device is not as above, pos is out of range on a CPU, out and
        out_dtype are both given, or an argument requires a gradient.
    """
    _check_arguments(x, m, table, pos, address, out_dtype, out, bad)
    if out_dtype is not None:
        out = layout.empty(len(x), x.shape[1:], dtype=out_dtype, device=x.device)
    torch.ops.fastddpm.step(x, m, table.rows, table.timesteps, pos, address, table.clip, out, bad)
    return x if out is None else (x, out)


def repeated_step(
    x: Tensor, table: StepTable, pos: Tensor, address: Tensor, *, out: Tensor | None = None, bad: Tensor | None = None
) -> Callable[[Tensor], None]:
    """Return a function of m that takes a `step` with these tensors. They are checked once, m in every call.

    A C++ kernel is called directly: for a small batch, torch's dispatch takes longer than the kernel. So torch.compile,
    autograd and torch's profiler do not see it.
    """
    _check_arguments(x, x, table, pos, address, None, out, bad)
    fixed = table.rows, table.timesteps, pos, address
    if backend(x.device) == "cpp" and (launch := launcher("repeated_step", x.device)):
        take_step = launch(x, *fixed, out, bad, clip=table.clip)

        def run(m: Tensor) -> None:
            take_step(m.resolve_neg())  # memory may hold the negative numbers

    else:

        def run(m: Tensor) -> None:
            torch.ops.fastddpm.step(x, m, *fixed, table.clip, out, bad)

    def take(m: Tensor) -> None:
        _check_model_output(x, m)
        run(m)

    return take


def _check_arguments(
    x: Tensor,
    m: Tensor,
    table: StepTable,
    pos: Tensor,
    address: Tensor,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    bad: Tensor | None,
) -> None:
    check_state("step", "x", x, (torch.float32,))
    _check_model_output(x, m)
    check_step("step", x, table, pos, address, bad)
    if out_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"step: out_dtype is {out_dtype}; want bfloat16, float16, or None: x itself is float32")
    if out is not None:
        if out_dtype is not None:
            raise ValueError(
                f"step: out_dtype is {out_dtype}, but out is given, {tensor_summary(out)}; give one of the two"
            )
        check_state("step", "out", out, FLOATS[1:])
        if out.shape != x.shape or out.device != x.device:
            raise ValueError(f"step: out is {tensor_summary(out)}; want {tuple(x.shape)} on {x.device}, like x")


def _check_model_output(x: Tensor, m: Tensor) -> None:
    if not isinstance(m, Tensor) or m.shape != x.shape or m.device != x.device:
        raise ValueError(
            f"step: m is {tensor_summary(m)}, but x is {tuple(x.shape)} on {x.device}; "
            "the network must return one value per element of x, on x's device"
        )
    check_state("step", "m", m, FLOATS)


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
    check_rows("step", "pos", pos, len(rows))
    if (launch := launcher("step", x.device)) is not None:
        written = [tensor for tensor in (x, copy, bad) if tensor is not None]
        torch.autograd.graph.increment_version(written)  # autograd does not see what a kernel writes
        return launch(x, m, rows, timesteps, pos, address, copy, bad, clip=clip)
    row, t = rows[pos], timesteps[pos]
    S = StepColumns.of(row).S
    # on a GPU the test would wait for the device
    draws = x.device.type != "cpu" or bool(S.any())
    z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=t) if draws else None
    x.copy_(update(x, m, row, z, clip=clip))
    if copy is not None:
        copy.copy_(x)
    if bad is not None:
        raise_flags(bad, x, pos)


def raise_flags(bad: Tensor, x: Tensor, pos: Tensor) -> None:
    """Raise the flag of each entry that holds a value that is not finite to its position: see `step`."""
    finite = x.isfinite().flatten(1).all(1)
    bad.copy_(torch.where(finite, bad, torch.maximum(bad, pos)))


register(
    "step(Tensor(a!) x, Tensor m, Tensor rows, Tensor timesteps, Tensor pos, Tensor address, bool clip,"
    " Tensor(b!)? copy, Tensor(c!)? bad) -> ()",
    _step,
    lambda *args: None,
)
