"""The specification of sampling parallel in time: several steps per network call.

A chain is one sample from x_T to x_0, with W slots; slot i mod W holds the step at row i of the table. A round drafts
the states of the next rows with the network's outputs of the last round, calls the network once on all slots, and
commits the steps whose drafts were right. There are two tests of a draft:

- bits (`first_difference`): the network's input has the bits of the sequential loop. The network reads x_t rounded to
  bfloat16, so that float32 states that differ only by rounding errors usually give the same input. It should compute in
  float32: a network that rounds internally turns the smallest change of its input into a change of the size of its
  rounding errors. Drafts never change the result.
- law (`accepted`): the reflection coupling of speculative sampling (De Bortoli et al. 2025, arXiv:2501.05370). Drafts
  never change the distribution of the result.

The idea is the fixed-point iteration of ParaDiGMS (Shih et al. 2023, arXiv:2305.16317), which accepts an error below a
tolerance.

Shapes: G chains; x [G, ...] their states; states [G, W, ...] the drafts, m [G, W, ...] the network's outputs for them;
pos [G] int64 the row of the next step of each chain, -1 when it is finished.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastddpm.reference.diffusion import predicted_x_0, tree_sum, update

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [G, ...], m [G, ...], row [G] >= 0) -> x_{t-1}


class Rows(NamedTuple):
    """The rows of a step table, on the states' device: rows [S, 14] and scale [S], float32."""

    rows: Tensor
    scale: Tensor

    def x_0(self, x: Tensor, m: Tensor, row: Tensor) -> Tensor:
        """The predicted x_0, clamped if the table clips."""
        columns = torch.cat([self.rows[row, :4], self.scale[row, None]], 1)
        return predicted_x_0(x, m, columns)

    def m_of_x_0(self, x: Tensor, x_0: Tensor, row: Tensor) -> Tensor:
        """The network's output that predicts x_0, in the written order."""
        cx, cm, scale = (_each(value, x) for value in (self.rows[row, 0], self.rows[row, 1], self.scale[row]))
        return (x_0 / scale - cx * x) / cm

    def kept(self, x: Tensor, old: Tensor, m: Tensor, row: Tensor) -> Tensor:
        """The output that predicts for x the x_0 that m predicts for old; m itself where they are equal."""
        cx, cm = self.rows[row, 0], self.rows[row, 1]
        return m + _each(cx / cm, x) * (old - x)


def draft(
    x: Tensor, states: Tensor, m: Tensor, pos: Tensor, seen: Tensor, table: Rows, step: Step, *, ahead: int
) -> Tensor:
    """The states at rows pos, pos - 1, ..., of which the first is x.

    The output at a row is guessed from that of the last round, adjusted so that it predicts the same x_0. At a row that
    the last round did not draft, it is the one that predicts the x_0 of the lowest row that was drafted.

    Args:
        states, m: of the last round.
        seen: [G] int64: the lowest row that the last round drafted; more than S if there was none.
        step: one step; the m that it is given is a guess.
        ahead: how many rows, 1 <= ahead <= W.
    Returns: [G, W, ...]: the new states; other slots are unchanged.
    """
    G, W = states.shape[:2]
    chain, states = torch.arange(G, device=x.device), states.clone()
    row = (pos + 1).clamp(max=len(table.scale) - 1)
    x_0 = table.x_0(states[chain, row % W], m[chain, row % W, : x.shape[1]], row)
    x_0 = torch.where(_each(pos + 1 >= seen, x), x_0, 0.0)
    old_states = states.clone()
    for i in range(ahead):
        row = (pos - i).clamp(min=0)
        slot, exists, was_seen = row % W, _each(pos >= i, x), _each(row >= seen, x)
        states[chain, slot] = torch.where(exists, x, states[chain, slot])
        old, output = old_states[chain, slot], m[chain, slot]
        of_mean = output[:, : x.shape[1]]
        kept = table.kept(x, old, of_mean, row)
        is_usable = was_seen & kept.isfinite()  # a network may overflow on a poor draft
        x_0 = torch.where(is_usable, table.x_0(old, of_mean, row), x_0)
        guess = torch.where(is_usable, kept, table.m_of_x_0(x, x_0, row))
        x = step(x, torch.cat([guess, output[:, x.shape[1] :]], 1), row)
    return states


def first_difference(x: Tensor, states: Tensor, m: Tensor, pos: Tensor, step: Step, *, ahead: int) -> Tensor:
    """The highest row whose draft, in bf16, differs from the exact state; if none does, max(pos - ahead, -1): [G]."""
    G, W = states.shape[:2]
    chain, reached = torch.arange(G, device=x.device), (pos - ahead).clamp(min=-1)
    for i in range(ahead):
        row = (pos - i).clamp(min=0)
        if i:
            differs = _bits(x.bfloat16()) != _bits(states[chain, row % W].bfloat16())
            here = differs.flatten(1).any(1) & (pos >= i)
            reached = torch.where(here, torch.maximum(reached, row), reached)
        x = step(x, m[chain, row % W], row)
    return reached


def commit(x: Tensor, m: Tensor, pos: Tensor, reached: Tensor, step: Step, *, ahead: int) -> Tensor:
    """The exact states at the rows `reached`: the steps from pos on, at most `ahead` of them."""
    chain = torch.arange(len(x), device=x.device)
    for i in range(ahead):
        row = (pos - i).clamp(min=0)
        x = torch.where(_each(pos - i > reached, x), step(x, m[chain, row % m.shape[1]], row), x)
    return x


class Coupled(NamedTuple):
    """The result of `accepted`: the states [G, ...] at the rows reached [G]."""

    x: Tensor
    reached: Tensor


def accepted(
    x: Tensor,
    states: Tensor,
    m: Tensor,
    pos: Tensor,
    table: Rows,
    z: Callable[[Tensor], Tensor],
    log_u: Callable[[Tensor], Tensor],
    *,
    clip: bool,
    ahead: int,
    mask: Tensor | None = None,
    finish: Callable[[Tensor, Tensor], Tensor] = lambda x, row: x,
) -> Coupled:
    """Accept drafts by the reflection coupling of two normal distributions of equal variance.

    The draft of x_{t-1} is q + S z, and p + S z is what the step would give. With g = (p - q) / S, the draft is taken
    with probability min(1, exp(<z, g> - |g|^2 / 2)); else p + S z', where z' is z reflected in the plane orthogonal to
    g. The result has the distribution N(p, S^2 I), whatever q is. A reflected step ends the round. A draft of a step
    with S = 0 is accepted if it has the bits of that step.

    Args:
        z, log_u: rows [G * ahead] -> their normals, and the logarithms of their uniform numbers; `ahead` consecutive
            rows per chain.
        mask: [G, ...]: where x_0 is known; the test ignores these elements.
        finish: replaces the known part of states after the step at such rows.
    """
    (G, W), i = states.shape[:2], torch.arange(ahead, device=x.device)
    chain = torch.arange(G, device=x.device)[:, None]
    row = (pos[:, None] - i).clamp(min=0)
    first = (i == 0).view(1, -1, *[1] * (x.ndim - 1))
    now = torch.where(first, x[:, None], states[chain, row % W]).flatten(0, 1)
    drafted = states[chain, (row - 1).clamp(min=0) % W].flatten(0, 1)
    rows, noise = row.flatten(), z(row.flatten())
    S = table.rows[rows, 7]
    each_S = _each(S, now)
    mean = update(now, m[chain, row % W].flatten(0, 1)[:, : x.shape[1]], table.rows[rows], None, clip=clip)
    plain = finish(torch.where(each_S == 0, mean, mean + each_S * noise), rows)
    gap = (mean - drafted) / each_S + noise
    if mask is not None:
        gap = gap.masked_fill(repeated(mask, ahead), 0.0)
    along, square = tree_sum(noise * gap), tree_sum(gap * gap)
    reflected = finish(mean + each_S * (noise - _each(2 * along / square, now) * gap), rows)
    same = (_bits(plain) == _bits(drafted)).flatten(1).all(1)
    has_draft = ((i < ahead - 1) & (row > 0)).flatten()
    takes = torch.where(S == 0, same, log_u(rows) <= along - square / 2) & has_draft
    taken = takes.view(G, ahead).int().cumprod(1).sum(1)  # the last of these rows has no draft
    is_plain = (S == 0) | ~has_draft | ~square.isfinite()  # without a usable draft
    other = torch.where(_each(is_plain, now), plain, reflected).unflatten(0, (G, ahead))
    moves = pos >= 0
    result = torch.where(_each(moves, x), other[chain[:, 0], taken], x)
    return Coupled(result, torch.where(moves, row[chain[:, 0], taken] - 1, pos))


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    table: Rows,
    timesteps: Tensor,
    step: Step,
    *,
    window: int,
) -> tuple[Tensor, list[int]]:
    """Take all steps of a table for one sample, with the bits of the sequential loop in the same layout.

    Args:
        model: (x_t [W, ...] bfloat16, t [W] int64) -> [W, ...]; entry i must not depend on the others.
        x: [1, ...] float32: the state to begin with.
        timesteps: [S].
        window: W.
    Returns: x_0 like x, and how many steps each round took.
    """
    S, steps = len(table.scale), []
    states, m = x.unsqueeze(1).repeat(1, window, *[1] * (x.ndim - 1)), None
    pos, seen = (torch.full_like(timesteps[:1], row, dtype=torch.int64) for row in (S - 1, S + 1))
    slots = torch.arange(window, device=x.device)
    while int(pos) >= 0:
        known = torch.zeros_like(states) if m is None else m
        states = draft(x, states, known, pos, seen, table, step, ahead=window)
        rows = (pos - (pos - slots) % window).clamp(min=0)  # of each slot
        m = model(states[0].bfloat16(), timesteps[rows].long()).to(x.dtype).unsqueeze(0)
        reached = first_difference(x, states, m, pos, step, ahead=window)
        x = commit(x, m, pos, reached, step, ahead=window)
        steps.append(int(pos - reached))
        pos, seen = reached, (pos - window + 1).clamp(min=0)
    return x, steps


def repeated(x: Tensor, n: int) -> Tensor:
    """[N, ...] -> [N * n, ...]: each entry n times, contiguous, without a device sync."""
    return x[:, None].expand(-1, n, *x.shape[1:]).flatten(0, 1).contiguous()


def _each(values: Tensor, x: Tensor) -> Tensor:
    """[G] values, broadcastable over the elements of each entry."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])
