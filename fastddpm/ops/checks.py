"""Checks of tensors that several operations share. Each raises a ValueError that begins with the operation's name."""

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.core.table import COLUMNS, StepTable
from fastddpm.ops.library import FLOATS, MAX_PER_SAMPLE


def check_state(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], most: int = MAX_PER_SAMPLE) -> None:
    """Check that x is [N, C, *spatial] or [N, D] of one of dtypes, channels-last, and needs no gradient.

    Args: most: the largest number of elements that a sample may have.
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or x.dtype not in dtypes:
        raise ValueError(
            f"{op}: {name} is {tensor_summary(x)}; want [N, C, *spatial] or [N, D] of {dtype_names(dtypes)}"
        )
    if not layout.is_channels_last(x):
        raise ValueError(f"{op}: {name} has strides {x.stride()}, not channels-last; use layout.channels_last({name})")
    check_no_gradients(op, **{name: x})
    if x.shape[1:].numel() > most:
        raise ValueError(f"{op}: {name} is {tensor_summary(x)}; a sample may have at most {most} elements")


def check_tensor(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, hint: str
) -> None:
    """Check that x is contiguous and has this shape, dtype and device. hint: what makes or describes such a tensor."""
    right = isinstance(x, Tensor) and x.shape == shape and x.dtype == dtype and x.device == device
    if not right or not x.is_contiguous():
        raise ValueError(
            f"{op}: {name} is {tensor_summary(x)}; want {tuple(shape)} {dtype} on {device}, contiguous: {hint}"
        )


def check_address(op: str, address: Tensor, n: int, device: torch.device) -> None:
    """Check that address holds the noise addresses of n entries."""
    hint = "noise.address(seed, samples, device) makes one"
    check_tensor(op, "address", address, (n, 2), torch.int64, device, hint)


def check_step(op: str, x: Tensor, table: StepTable, pos: Tensor, address: Tensor, bad: Tensor | None) -> None:
    """Check what all steps of a state x take besides the network's output, as `ops.step` describes it."""
    n, rows, hint = len(x), table.rows, "Schedule.table(...).to(x.device) makes one"
    check_tensor(op, "pos", pos, (n,), torch.int32, x.device, "the table row each entry of x is at")
    check_address(op, address, n, x.device)
    check_tensor(op, "table.rows", rows, (*rows.shape[:1], len(COLUMNS)), torch.float32, x.device, hint)
    check_tensor(op, "table.timesteps", table.timesteps, rows.shape[:1], torch.int32, x.device, hint)
    if bad is not None:
        hint = "torch.full((n,), -1, dtype=torch.int32) makes one to start with"
        check_tensor(op, "bad", bad, (n,), torch.int32, x.device, hint)


def check_rows(op: str, name: str, rows: Tensor, count: int) -> None:
    """Check that these are rows of a table of so many, on a CPU: a GPU would have to be waited for."""
    if rows.device.type == "cpu" and len(rows):
        low, high = (int(row) for row in rows.aminmax())
        if low < 0 or high >= count:
            raise ValueError(
                f"{op}: {name} is {low if low < 0 else high}; want 0 to {count - 1}, the rows of the table"
            )


def check_noising(
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
    """Check the arguments that determine x_t, as `noising` takes them; the table has `columns` columns."""
    check_state(op, "x_0", x_0, (*FLOATS, torch.uint8))
    check_tensor(op, "t", t, (len(x_0),), torch.int64, x_0.device, "the timestep of each entry of x_0")
    check_address(op, address, len(x_0), x_0.device)
    check_tensor(op, "table", table, (*table.shape[:1], columns), torch.float32, x_0.device, hint)
    if not isinstance(stream, int) or stream not in (noise.TRAIN, noise.LIKELIHOOD):
        raise ValueError(f"{op}: stream is {stream!r}; want noise.TRAIN (2) or noise.LIKELIHOOD (3)")


def check_model_output(op: str, m: Tensor, x_0: Tensor) -> None:
    """Check that m has a float value for each element of x_0, on the same device."""
    if not isinstance(m, Tensor) or m.shape != x_0.shape or m.device != x_0.device or m.dtype not in FLOATS:
        raise ValueError(
            f"{op}: m is {tensor_summary(m)}, but x_0 is {tuple(x_0.shape)} on {x_0.device}; "
            f"the network must return one value of {dtype_names(FLOATS)} per element of x_0, on x_0's device"
        )


def check_no_gradients(op: str, **tensors: Tensor | None) -> None:
    """Check that none of the tensors requires a gradient, unless gradients are disabled."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires a gradient, but {op} is not differentiable in it; call it under torch.no_grad()"
            )


def tensor_summary(x: object) -> str:
    """The shape, dtype and device of a tensor; the type of anything else."""
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
