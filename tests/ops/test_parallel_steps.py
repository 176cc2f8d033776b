"""The operations of a round in torch, C++, the Triton interpreter and on a GPU: the bits of the reference."""

from dataclasses import replace
from math import nan

import pytest
import torch

from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from fastddpm.ops.parallel_steps import commit, draft, first_difference
from fastddpm.reference import parallel
from fastddpm.reference.diffusion import update
from tests.support.bits import assert_same_bits
from tests.support.draws import addresses, generator, numpy_warns, positions
from tests.support.guards import Guards

SCHEDULES = {
    "clipped": Schedule(),
    "eps": Schedule(clip_sample=False),
    "v": Schedule(clip_sample=False, prediction_type="v_prediction"),
    "x_0": Schedule(prediction_type="sample"),
}
TABLES = {name: schedule.table() for name, schedule in SCHEDULES.items()}
TABLES["ddim"] = Schedule(clip_sample=False).table(50, sampler="ddim")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # table, shape of a sample, the network's input
    ("clipped", (3, 7, 11), BF16),
    ("clipped", (1, 1, 1), FP16),
    ("eps", (1, 1025), BF16),
    ("eps", (2, 3, 4, 5), FP32),
    ("v", (1024,), FP16),
    ("x_0", (3, 7, 11), FP32),
    ("ddim", (1, 257), BF16),
]


def step_of(table, address):
    def step(x, m, row):
        z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=table.timesteps[row])
        return update(x, m, table.rows[row], z, clip=table.clip)

    return step


def normal(*shape, seed=0):
    return layout.channels_last(torch.randn(shape, generator=generator(seed)) * 1.5)


def chains(shape, window, table, pos=None):
    """x, states, m, pos, address of chains at four positions: the first row, the last ones, finished, the middle."""
    S = len(table)
    pos = positions(S - 1, 2, -1, S // 2) if pos is None else pos
    G = len(pos)
    x, states, m = normal(G, *shape), normal(G * window, *shape, seed=1), normal(G * window, *shape, seed=2)
    return x, states, m, pos, addresses(G)


def exact_states(x, m, pos, address, table, window):
    """[G * W, ...]: the states of the sequential loop with these outputs, in their slots; others are noise."""
    states = normal(*m.shape, seed=3)
    for i in range(window):
        row = (pos.long() - i).clamp(min=0)
        at = torch.arange(len(x)) * window + row % window
        states[at] = torch.where((pos >= i).view(-1, *[1] * (x.ndim - 1)), x, states[at])
        x = step_of(table, address)(x, m[at], row)
    return states


def by_chain(x, window):
    return x.unflatten(0, (-1, window))


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_draft_equals_specification(name, shape, dtype, device):
    table, window, guards = TABLES[name], 5, Guards()
    x, states, m, pos, address = chains(shape, window, table)
    S = len(table)
    for ahead, seen, rounded in ((5, pos - 2, True), (3, pos + 1, False), (5, pos.clamp(min=S) + 1, True)):
        want = parallel.draft(
            *(x, by_chain(states, window), by_chain(m, window), pos.long(), seen.long()),
            parallel.Rows(table.rows, table.scale),
            step_of(table, address),
            ahead=ahead,
        ).flatten(0, 1)
        drafts = guards.holding(states, device)
        copy = guards.empty(len(m), shape, dtype=dtype, device=device).copy_(states.bfloat16() if rounded else states)
        given = (y.to(device) for y in (x, m))
        at = (y.to(device) for y in (pos, seen, address))
        draft(drafts, *given, table.to(device), *at, ahead=ahead, copy=copy, rounded=rounded)
        assert_same_bits(drafts, want)
        assert_same_bits(copy, (want.bfloat16() if rounded else want).to(dtype))
        guards.check()


@numpy_warns
@pytest.mark.parametrize("bad", [nan, float("inf")])
def test_draft_ignores_outputs_that_are_not_finite(bad, device):
    table, window, shape = TABLES["clipped"], 4, (2, 3, 3)
    x, states, m, pos, address = chains(shape, window, table, positions(500, 500))
    m[498 % window, 0, 1, 1] = bad  # of chain 0
    want = parallel.draft(
        *(x, by_chain(states, window), by_chain(m, window), pos.long(), (pos - 3).long()),
        parallel.Rows(table.rows, table.scale),
        step_of(table, address),
        ahead=window,
    ).flatten(0, 1)
    drafts = states.to(device)
    at = (y.to(device) for y in (pos, pos - 3, address))
    draft(drafts, x.to(device), m.to(device), table.to(device), *at, ahead=window)
    assert want.isfinite().all()
    assert_same_bits(drafts, want)


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_first_difference_equals_specification(name, shape, dtype, device):
    table, window = TABLES[name], 5
    x, _, m, pos, address = chains(shape, window, table)
    right = exact_states(x, m, pos, address, table, window)
    for row_of_damage in (None, 0, 2, 4):
        states = right.clone()
        if row_of_damage is not None:
            rows = (pos - row_of_damage).clamp(min=0)
            states[torch.arange(4) * window + rows % window, ..., -1] *= 1.5
        for ahead in (5, 2):
            want = parallel.first_difference(
                *(x, by_chain(states, window), by_chain(m, window), pos.long(), step_of(table, address)),
                ahead=ahead,
            )
            tensors = (y.to(device) for y in (x, states, m))
            at = (y.to(device) for y in (pos, address))
            got = first_difference(*tensors, table.to(device), *at, ahead=ahead).cpu()
            assert got.dtype == torch.int32
            assert got.tolist() == want.tolist()
            if row_of_damage in (None, 0):  # the state at pos itself is exact, whatever its slot holds
                assert got.tolist() == (pos - ahead).clamp(min=-1).tolist()
            elif row_of_damage < ahead:
                assert got[[0, 3]].tolist() == (pos - row_of_damage)[[0, 3]].tolist()  # the others are near row 0


def test_drafts_that_are_equal_in_bf16_are_right(device):
    """A draft need only equal the exact state after rounding to bf16."""
    table, window = TABLES["clipped"], 4
    x, _, m, pos, address = chains((3, 5, 7), window, table, positions(500))
    states = exact_states(x, m, pos, address, table, window)
    bits = states.view(torch.int32) ^ 1  # a rounding apart
    states = torch.where(bits.view(torch.float32).bfloat16() == states.bfloat16(), bits.view(torch.float32), states)
    tensors = (y.to(device) for y in (x, states, m))
    at = (y.to(device) for y in (pos, address))
    assert first_difference(*tensors, table.to(device), *at, ahead=window).tolist() == [496]


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_commit_equals_specification(name, shape, dtype, device):
    table, window, guards = TABLES[name], 5, Guards()
    x, _, m, pos, address = chains(shape, window, table)
    reached = torch.maximum(pos - torch.tensor([5, 1, 0, 3], dtype=torch.int32), positions(-1))
    want = parallel.commit(x, by_chain(m, window), pos.long(), reached.long(), step_of(table, address), ahead=window)
    state = guards.holding(x, device)
    bad = torch.full((4,), -1, dtype=torch.int32, device=device)
    at = (y.to(device) for y in (pos, reached, address))
    commit(state, m.to(device), table.to(device), *at, ahead=window, bad=bad)
    assert_same_bits(state, want)
    assert bad.tolist() == [-1] * 4
    guards.check()


@numpy_warns
def test_commit_flags_the_first_bad_row_of_the_steps_it_takes(device):
    table, window = TABLES["clipped"], 4
    x, _, m, pos, address = chains((2, 6, 6), window, table, positions(9, 9, 9))
    reached = positions(5, 5, 8)
    m[9 % 4 + 4, 0, 0, 0] = nan  # chain 1, row 9
    m[7 % 4, 0, 0, 0] = nan  # chain 0, row 7
    m[7 % 4 + 8, 0, 0, 0] = nan  # chain 2, row 7, which it does not reach
    bad = torch.full((3,), -1, dtype=torch.int32, device=device)
    at = (y.to(device) for y in (pos, reached, address))
    commit(x.to(device), m.to(device), table.to(device), *at, ahead=window, bad=bad)
    assert bad.tolist() == [7, 9, -1]


def test_arguments_are_checked(device):
    table = TABLES["clipped"].to(device)
    x, states, m, pos, address = (y.to(device) for y in chains((2, 3, 3), 4, TABLES["clipped"]))
    compare = lambda *tensors, ahead=4, table=table: first_difference(*tensors, table, pos, address, ahead=ahead)
    for tensors in ((x, states[:15], m), (x, states, m[:12]), (x, states[:2], m[:2]), (x, states, m.bfloat16())):
        with pytest.raises(ValueError, match=r"first_difference: (states|m) is"):
            compare(*tensors)
    for ahead in (0, 5):
        with pytest.raises(ValueError, match=f"ahead is {ahead}"):
            compare(x, states, m, ahead=ahead)
    with pytest.raises(ValueError, match="variance is learned"):
        compare(x, states, m, table=replace(table, learned="learned"))
    with pytest.raises(ValueError, match="draft: copy is"):
        draft(states, x, m, table, pos, pos, address, ahead=2, copy=states[:3].bfloat16())
    with pytest.raises(ValueError, match="draft: seen is"):
        draft(states, x, m, table, pos, pos.long(), address, ahead=2)
    with pytest.raises(ValueError, match="commit: reached is"):
        commit(x, m, table, pos, pos[:2], address, ahead=2)
