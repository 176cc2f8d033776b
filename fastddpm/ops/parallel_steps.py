"""The three operations of a round of sampling parallel in time: draft, compare, commit.

Arguments, for G chains with W slots each, all on one device:
    x: [G, C, *spatial] or [G, D] fp32, channels-last: the states of the chains.
    states: [G * W, ...] fp32, channels-last: the drafts; slot i mod W of a chain holds the state at row i of the table.
    m: like states: the network's outputs for them.
    table: StepTable of S rows, without a learned variance.
    pos: [G] int32: the row that each chain is at, -1 <= pos < S; -1: it is finished. Unchecked: reading it would
        sync.
    address: [G, 2] int64: (seed, sample index), see `noise.address`.
    ahead: the most rows that a round drafts, 1 <= ahead <= W.
All raise ValueError: a shape, dtype, layout or device is not as above.
"""

import torch
from torch import Tensor

from fastddpm.core import noise
from fastddpm.core.checks import whole
from fastddpm.core.table import COLUMNS, StepTable
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_address, check_state, check_tensor, tensor_summary
from fastddpm.ops.library import FLOATS
from fastddpm.ops.step import raise_flags
from fastddpm.reference import parallel
from fastddpm.reference.diffusion import update


def draft(
    states: Tensor,
    x: Tensor,
    m: Tensor,
    table: StepTable,
    pos: Tensor,
    seen: Tensor,
    address: Tensor,
    *,
    ahead: int,
    copy: Tensor | None = None,
    rounded: bool = True,
) -> None:
    """Overwrite the states at rows pos, pos - 1, ... with drafts, of which the first is x.

    Bit for bit `reference.parallel.draft`.

    Args:
        m: the outputs of the last round.
        seen: [G] int32: the lowest row that the last round drafted; more than S if there was none.
        copy: like states in fp16/bf16/fp32: also overwritten with the drafts: the network's input.
        rounded: round the copy to bf16 first, whatever its dtype.
    """
    _check("draft", x, states, m, table, pos, address, ahead)
    check_tensor("draft", "seen", seen, pos.shape, torch.int32, x.device, "the lowest row of each chain's last round")
    if copy is not None:
        check_state("draft", "copy", copy, FLOATS)
        if copy.shape != states.shape or copy.device != x.device:
            raise ValueError(f"draft: copy is {tensor_summary(copy)}; want {tuple(states.shape)} on {x.device}")
    if (launch := launcher("draft", x.device)) is not None:
        tensors = states, copy, x, m, table.rows, table.scale, table.timesteps, pos, seen, address
        return launch(*tensors, ahead=ahead, clip=table.clip, rounded=rounded)
    rows = parallel.Rows(table.rows, table.scale)
    step, chains = _step(table, address), (len(x), len(states) // len(x))
    old, outputs = states.unflatten(0, chains), m.unflatten(0, chains)
    states.copy_(parallel.draft(x, old, outputs, pos.long(), seen.long(), rows, step, ahead=ahead).flatten(0, 1))
    if copy is not None:
        copy.copy_(states.bfloat16() if rounded else states)


def first_difference(
    x: Tensor,
    states: Tensor,
    m: Tensor,
    table: StepTable,
    pos: Tensor,
    address: Tensor,
    *,
    ahead: int,
) -> Tensor:
    """The row of each chain to which `commit` can go: the highest whose draft, in bf16, differs from the exact state.

    Bit for bit `reference.parallel.first_difference`.

    Returns: [G] int32: max(pos - ahead, -1) if all drafts are right.
    """
    _check("first_difference", x, states, m, table, pos, address, ahead)
    if (launch := launcher("first_difference", x.device)) is not None:
        reached = (pos - ahead).clamp_(min=-1)
        launch(reached, x, states, m, table.rows, table.timesteps, pos, address, ahead=ahead, clip=table.clip)
        return reached
    chains = len(x), len(states) // len(x)
    drafts, outputs = states.unflatten(0, chains), m.unflatten(0, chains)
    step = _step(table, address)
    return parallel.first_difference(x, drafts, outputs, pos.long(), step, ahead=ahead).int()


def commit(
    x: Tensor,
    m: Tensor,
    table: StepTable,
    pos: Tensor,
    reached: Tensor,
    address: Tensor,
    *,
    ahead: int,
    bad: Tensor | None = None,
) -> None:
    """Take the steps from row pos to row `reached` of each chain, in place.

    Bit for bit `reference.parallel.commit`.

    Args:
        reached: [G] int32, max(pos - ahead, -1) <= reached <= pos. Unchecked: reading it would sync.
        bad: [G] int32: as in `ops.step`.
    """
    _check("commit", x, m, m, table, pos, address, ahead)
    check_tensor("commit", "reached", reached, pos.shape, torch.int32, x.device, "what first_difference returned")
    if bad is not None:
        check_tensor("commit", "bad", bad, pos.shape, torch.int32, x.device, "-1 for each chain to start with")
    if (launch := launcher("commit", x.device)) is not None:
        return launch(x, m, table.rows, table.timesteps, pos, reached, address, bad, clip=table.clip)
    return commit_by(_step(table, address), x, m, pos, reached, ahead=ahead, bad=bad)


def commit_by(
    step: parallel.Step, x: Tensor, m: Tensor, pos: Tensor, reached: Tensor, *, ahead: int, bad: Tensor | None
) -> None:
    """`commit` with a step of any kind. Args: step: see `reference.parallel`; the others as in `commit`."""
    outputs = m.unflatten(0, (len(x), len(m) // len(x)))
    for _ in range(ahead):  # one at a time, because each may be the first bad one
        target = torch.maximum(pos - 1, reached)
        x.copy_(parallel.commit(x, outputs, pos.long(), target.long(), step, ahead=1))
        if bad is not None:
            raise_flags(bad, x, pos)
        pos = target


def _step(table: StepTable, address: Tensor) -> parallel.Step:
    def step(x: Tensor, m: Tensor, row: Tensor) -> Tensor:
        z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=table.timesteps[row])
        return update(x, m, table.rows[row], z, clip=table.clip)

    return step


def _check(
    op: str, x: Tensor, states: Tensor, m: Tensor, table: StepTable, pos: Tensor, address: Tensor, ahead: int
) -> None:
    for name, tensor in (("x", x), ("m", m), ("states", states)):
        check_state(op, name, tensor, FLOATS[:1])
    G, W = len(x), len(states) // max(len(x), 1)
    wanted = G * W, *x.shape[1:]
    for name, tensor in (("m", m), ("states", states)):
        if tensor.shape != wanted or tensor.device != x.device or not W:
            raise ValueError(f"{op}: {name} is {tensor_summary(tensor)}; want [G * W, ...] like x, {tensor_summary(x)}")
    whole("ahead", ahead, 1, W)
    if table.learned not in (None, "unused"):
        raise ValueError(f"{op}: the table's variance is learned; want a table with fixed variances")
    hint = "Schedule.table(...).to(x.device) makes one"
    check_tensor(op, "pos", pos, (G,), torch.int32, x.device, "the table row that each chain is at")
    check_address(op, address, G, x.device)
    S = len(table)
    for name, tensor, shape, dtype in (
        ("rows", table.rows, (S, len(COLUMNS)), torch.float32),
        ("scale", table.scale, (S,), torch.float32),
        ("timesteps", table.timesteps, (S,), torch.int32),
    ):
        check_tensor(op, f"table.{name}", tensor, shape, dtype, x.device, hint)
