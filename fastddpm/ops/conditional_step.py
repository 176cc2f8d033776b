"""The reverse step of a conditional network, in place: guidance, learned variances and known parts of x_0."""

import torch
from torch import Tensor

from fastddpm.core import noise
from fastddpm.core.table import StepTable
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_rows, check_state, check_step, check_tensor, tensor_summary
from fastddpm.ops.library import FLOATS, register
from fastddpm.ops.step import raise_flags
from fastddpm.reference.diffusion import guided, replaced, update

LEARNED = {None: 0, "unused": 0, "learned": 1, "learned_range": 2}


def conditional_step(
    x: Tensor,
    m: Tensor,
    table: StepTable,
    pos: Tensor,
    address: Tensor,
    *,
    guidance: Tensor | None = None,
    guide_variance: bool = False,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    x_0: Tensor | None = None,
    bad: Tensor | None = None,
) -> None:
    """Take one reverse step, x_t -> x_{t-1}, in place.

    Bit for bit `reference.diffusion.update`, with m = `guided(m_c, m_u, guidance)` and followed by `replaced`. z is the
    noise of `ops.step`; the noise of the known part has the stream noise.KNOWN and the same t.

    Args:
        x: [N, C, *spatial] or [N, D] fp32, channels-last, data units; overwritten with x_{t-1}.
        m: the network's output in fp16/bf16/fp32, channels-last: N entries, or 2N with guidance, m_c before m_u; of C
            channels, or 2C, the second half for the variance, unless table.learned is None.
        table: StepTable of S rows on x's device.
        pos: [N] int32 on x's device, 0 <= pos < S: the row each entry is at. Unchecked on a GPU: reading it would sync.
        address: [N, 2] int64 on x's device; (seed, sample index) of each entry, see `noise.address`.
        guidance: [N] fp32: the scale of each entry.
        guide_variance: combine the second half of the channels, too; else it is that of m_c.
        known, mask: like x, and like x in bool: where the mask is True, x_{t-1} is drawn from q(x_{t-1} | x_0 = known).
        x_0: like x: x_0 / scale, which the step takes instead of the one that is predicted; needs a table with clip.
        bad: [N] int32 on x's device: as in `ops.step`.
    Raises: ValueError: a shape, dtype, layout or device is not as above, or pos is out of range on a CPU.
    """
    _check_arguments(x, m, table, pos, address, guidance, known, mask, x_0, bad)
    learned = LEARNED[table.learned]
    tensors = x, m, table.rows, table.timesteps, pos, address, guidance, known, mask, x_0, bad
    torch.ops.fastddpm.conditional_step(*tensors, table.clip, guide_variance, learned)


def model_outputs(
    m: Tensor, like: Tensor, guidance: Tensor | None = None, *, guide_variance: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The outputs that a step uses, in float32: for x_0, eps or v, and for the variance if there is one.

    Args: m, guidance, guide_variance: as in `conditional_step`; like: [N, C, ...].
    """
    n, channels = like.shape[:2]
    m = m.to(torch.float32)
    of_mean, of_variance = m[:n, :channels], m[:n, channels:]
    if guidance is not None:
        both = guided(m[:n], m[n:], guidance.view(-1, *[1] * (m.ndim - 1)))
        of_mean, of_variance = both[:, :channels], both[:, channels:] if guide_variance else of_variance
    return of_mean, of_variance if of_variance.shape[1] else None


def _check_arguments(
    x: Tensor,
    m: Tensor,
    table: StepTable,
    pos: Tensor,
    address: Tensor,
    guidance: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    x_0: Tensor | None,
    bad: Tensor | None,
) -> None:
    op = "conditional_step"
    check_state(op, "x", x, (torch.float32,))
    n, channels, *spatial = x.shape
    entries = n if guidance is None else 2 * n
    wanted = entries, channels * (1 if table.learned is None else 2), *spatial
    if not isinstance(m, Tensor) or m.shape != wanted or m.device != x.device:
        raise ValueError(
            f"{op}: m is {tensor_summary(m)}; want {wanted} on {x.device}: with guidance 2N entries, and with a "
            "learned variance 2C channels"
        )
    check_state(op, "m", m, FLOATS)
    check_step(op, x, table, pos, address, bad)
    if guidance is not None:
        check_tensor(op, "guidance", guidance, (n,), torch.float32, x.device, "the scale of each entry of x")
    if (known is None) != (mask is None):
        raise ValueError(f"{op}: {'known' if known is None else 'mask'} is missing; give both, or neither")
    for name, tensor, dtype in (("known", known, torch.float32), ("mask", mask, torch.bool), ("x_0", x_0, x.dtype)):
        if tensor is not None:
            check_state(op, name, tensor, (dtype,))
            if tensor.shape != x.shape or tensor.device != x.device:
                raise ValueError(f"{op}: {name} is {tensor_summary(tensor)}; want {tuple(x.shape)} on {x.device}")
    if x_0 is not None and not table.clip:
        raise ValueError(
            f"{op}: x_0 is given, but the table has no rows for it; Schedule.table(with_x_0=True) makes some"
        )


def _conditional_step(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    timesteps: Tensor,
    pos: Tensor,
    address: Tensor,
    guidance: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    x_0: Tensor | None,
    bad: Tensor | None,
    clip: bool,
    guide_variance: bool,
    learned: int,
) -> None:
    check_rows("conditional_step", "pos", pos, len(rows))
    # a function of the user's made x_0 in torch, so that torch can take the step as well
    if x_0 is None and (launch := launcher("conditional_step", x.device)) is not None:
        torch.autograd.graph.increment_version([x] if bad is None else [x, bad])  # which autograd does not see
        tensors = x, m, rows, timesteps, pos, address, guidance, known, mask, bad
        return launch(*tensors, clip=clip, guide_variance=guide_variance, learned=learned)
    row, t = rows[pos], timesteps[pos]
    z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=t)
    of_mean, v = model_outputs(m, x, guidance, guide_variance=guide_variance)
    names = {number: name for name, number in LEARNED.items() if number}
    x_prev = update(x, of_mean, row, z, clip=clip, x_0=x_0, v=v, learned=names.get(learned))
    if known is not None and mask is not None:
        known_z = noise.normal(address, x.shape[1:], stream=noise.KNOWN, t=t)
        x_prev = replaced(x_prev, known, mask, row, known_z)
    x.copy_(x_prev)
    if bad is not None:
        raise_flags(bad, x, pos)


register(
    "conditional_step(Tensor(a!) x, Tensor m, Tensor rows, Tensor timesteps, Tensor pos, Tensor address,"
    " Tensor? guidance, Tensor? known, Tensor? mask, Tensor? x_0, Tensor(b!)? bad,"
    " bool clip, bool guide_variance, int learned) -> ()",
    _conditional_step,
    lambda *args: None,
)
