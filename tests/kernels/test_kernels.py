"""`ops` in torch, in the Triton interpreter and on a GPU: the bits of the reference, and nothing else written."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from math import inf, isfinite, nan, prod

import pytest
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from fastddpm.reference.diffusion import add_noise, update

TABLES = {clip: Schedule(clip_sample=clip).table() for clip in (True, False)}
NOISING_TABLE = Schedule().noising_table()
# One block of the kernels is 1024 elements, one Philox call four.
SHAPES = [(1, 1, 1, 1), (2, 3, 32, 32), (3, 5, 7, 11), (4, 3, 50), (1, 1024), (1, 1023), (1, 1025), (1, 4, 257)]
POSITIONS = [999, 0, 500, 1]  # both ends: S = 0 at 0; 1/sqrt(abar) = 157 at 999
SEEDS = [2**64 - 1, 0, 2**63, 12345]
SAMPLES = [2**56 - 1, 2**32, 7, 2**32 - 1]
GUARD = 64  # elements: keeps the alignment of the allocation

numpy_complains = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # in the interpreter


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def addresses(n: int) -> Tensor:
    return torch.cat([noise.address(seed, [sample]) for seed, sample in zip(SEEDS[:n], SAMPLES[:n], strict=True)])


def positions(*pos: int) -> Tensor:
    return torch.tensor(pos, dtype=torch.int32)


def step_inputs(shape, dtype=torch.float32, seed=0):
    x, m = (torch.randn(shape, generator=drawn(seed + i)) * 1.5 for i in range(2))
    return layout.channels_last(x), layout.channels_last(m.to(dtype))


def stepped(x, m, table, pos, address) -> Tensor:
    """The specification, one entry at a time; rows with S = 0 get no z."""
    out = []
    for i, p in enumerate(pos.tolist()):
        row, t = table.rows[p], int(table.timesteps[p])
        z = noise.normal(address[i : i + 1], x.shape[1:], stream=noise.STEP, t=t) if row[-1] != 0 else None
        out.append(update(x[i : i + 1], m[i : i + 1], row, z, clip=table.clip))
    return torch.cat(out)


def run_step(device, x, m, table, pos, address, **options):
    arguments = (m.to(device), table.to(device), pos.to(device), address.to(device))
    return ops.step(x.to(device, copy=True), *arguments, **options)


def run_noising(device, x_0, t, address, **options):
    return ops.noising(*(a.to(device) for a in (x_0, t, address, NOISING_TABLE)), **options)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert layout.is_channels_last(got)
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    assert torch.equal(got.cpu().view(kind), want.view(kind))


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("damage", ["last bit", "sign of zero", "not written", "shape", "dtype", "layout"])
def test_damaged_bits_are_seen(damage, dtype):
    want = layout.channels_last(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]], dtype=dtype))
    got = want.clone()
    assert_same_bits(got, want)
    if damage == "last bit":
        got[0, 1, 1] *= 1 + torch.finfo(dtype).eps
    elif damage == "sign of zero":
        got[0, 0, 0] = -0.0
    elif damage == "not written":
        got[0, 0, 1] = nan
    else:
        got = {"shape": got[:, :1], "dtype": got.double(), "layout": got.contiguous()}[damage]
    with pytest.raises(AssertionError):
        assert_same_bits(got, want)


class Guards:
    """Tensors amid memory filled with NaN, as `layout.empty` makes them; `check` finds what was written around them."""

    def __init__(self):
        self.buffers = []

    def empty(self, n, shape, *, dtype, device=None):
        size = n * prod(shape)
        buffer = torch.full((size + 2 * GUARD,), nan, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(n, *shape[1:], shape[0]).movedim(-1, 1)

    def holding(self, x, device):
        return self.empty(len(x), x.shape[1:], dtype=x.dtype, device=device).copy_(x)

    def check(self):
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[-GUARD:].isnan().all()


@pytest.fixture
def guards(monkeypatch):
    """Puts what `ops` allocates amid guards."""
    guards = Guards()
    monkeypatch.setattr(layout, "empty", guards.empty)
    return guards


@pytest.mark.parametrize("at", [0, GUARD - 1, -GUARD, -1])
def test_a_write_into_a_guard_is_seen(at):
    guards = Guards()
    guards.empty(2, (3, 4), dtype=torch.float32).zero_()
    guards.check()
    guards.buffers[0][at] = 0
    with pytest.raises(AssertionError):
        guards.check()


# The step


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_is_the_specification(shape, clip, dtype, out_dtype, device, guards):
    table, address, pos = TABLES[clip], addresses(shape[0]), positions(*POSITIONS[: shape[0]])
    x, m = step_inputs(shape, dtype)
    want = stepped(x, m, table, pos, address)
    state = guards.holding(x, device)
    network_output = guards.holding(m, device)
    got = ops.step(state, network_output, table.to(device), pos.to(device), address.to(device), out_dtype=out_dtype)
    if out_dtype is not None:
        got, copy = got
        assert_same_bits(copy, want.to(out_dtype))
    assert got is state
    assert_same_bits(got, want)
    assert_same_bits(network_output, m)
    guards.check()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("pos", POSITIONS)
def test_step_at_one_position(pos, clip, device):
    x, m = step_inputs((2, 3, 32, 32), torch.bfloat16, seed=pos)
    pos, address = positions(pos, pos), addresses(2)
    want = stepped(x, m, TABLES[clip], pos, address)
    assert_same_bits(run_step(device, x, m, TABLES[clip], pos, address), want)


def test_step_at_random_positions(device):
    x, m = step_inputs((8, 3, 8, 8), torch.float16)
    pos = torch.randint(1000, (8,), generator=drawn(1), dtype=torch.int32)
    address = torch.randint(-(1 << 63), (1 << 63) - 1, (8, 2), generator=drawn(2))
    address[:, 1] &= (1 << 56) - 1
    for table in (
        TABLES[True],
        Schedule(clip_sample=False, prediction_type="v_prediction").table(1000, eta=0.5, sampler="ddim"),
    ):
        assert_same_bits(run_step(device, x, m, table, pos, address), stepped(x, m, table, pos, address))


def test_step_of_memory_that_is_not_aligned(device):
    x, m = step_inputs((2, 16, 4, 4), torch.bfloat16)
    pos, address, table = positions(3, 700), addresses(2), TABLES[True]
    state = torch.full((x.numel() + 3,), nan, device=device)[3:].view(2, 4, 4, 16).movedim(-1, 1).copy_(x)
    output = (
        torch.full((x.numel() + 1,), nan, dtype=m.dtype, device=device)[1:].view(2, 4, 4, 16).movedim(-1, 1).copy_(m)
    )
    ops.step(state, output, table.to(device), pos.to(device), address.to(device))
    assert_same_bits(state, stepped(x, m, table, pos, address))


def test_step_where_no_z_is_drawn_adds_nothing(device):
    x = torch.full((2, 1, 2, 2), -0.0)
    pos, address = positions(0, 0), addresses(2)
    row = torch.tensor([[1.0, 0.0, -inf, inf, 0.0, 1.0, 1.0, 0.0]])  # adding +0 would lose the sign of x_prev = -0
    table = replace(TABLES[False], rows=row, timesteps=torch.zeros(1, dtype=torch.int32))
    assert_same_bits(run_step(device, x, x.clone(), table, pos, address), x)


@numpy_complains
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_step_keeps_what_is_not_finite(bad, device):
    x, m = step_inputs((1, 3, 8, 8))
    m[0, 1, 2, 3] = bad
    pos, address = positions(500), addresses(1)
    for table in TABLES.values():
        want = stepped(x, m, table, pos, address)
        got = run_step(device, x, m, table, pos, address).cpu()
        assert not want[0, 1, 2, 3].isfinite()
        assert torch.equal(got.isnan(), want.isnan())
        assert_same_bits(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_writes_its_copy_where_it_is_told(shape, out_dtype, device):
    pos, address, guards = positions(*POSITIONS[: shape[0]]), addresses(shape[0]), Guards()
    x, m = step_inputs(shape, out_dtype)
    want = stepped(x, m, TABLES[True], pos, address)
    out = guards.empty(len(x), shape[1:], dtype=out_dtype, device=device)
    got, copy = run_step(device, x, m, TABLES[True], pos, address, out=out)
    assert copy is out
    assert_same_bits(got, want)
    assert_same_bits(copy, want.to(out_dtype))
    guards.check()


FLAGS = [-1, 998, 1000, 7]  # before a step: none yet, one lower, one higher, one lower than POSITIONS' 999, 0, 500, 1


def watched(device, x, m, pos, bad, table=TABLES[True]):
    """What the flags are after a step, amid a guard, with every entry's own bits left as they would be without."""
    memory = torch.full((len(x) + 2 * GUARD,), -7, dtype=torch.int32, device=device)
    flags = memory[GUARD:-GUARD].copy_(torch.tensor(bad, dtype=torch.int32))
    address = addresses(len(x))
    got = run_step(device, x, m, table, pos, address, bad=flags).cpu()
    alone = run_step(device, x, m, table, pos, address).cpu()
    assert torch.equal(got.nan_to_num(), alone.nan_to_num())
    assert (memory[:GUARD] == -7).all()
    assert (memory[-GUARD:] == -7).all()
    return flags.tolist()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flags_are_left_alone_where_all_is_finite(shape, clip, device):
    x, m = step_inputs(shape, torch.bfloat16)
    x[0, 0], m[-1, -1] = 1e38, -1e30  # large, but finite to the end
    n = shape[0]
    assert watched(device, x, m, positions(*[400] * n), FLAGS[:n], TABLES[clip]) == FLAGS[:n]


@numpy_complains
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["x", "m"])
def test_flags_name_the_row_of_every_bad_entry(where, value, clip, device):
    x, m = step_inputs((4, 3, 20, 20), torch.float16)  # a block and a part of one
    spoilt = {"x": x, "m": m}[where]
    spoilt[0, 2, 19, 19] = spoilt[1, 0, 0, 0] = spoilt[2, 1, 10, 10] = value
    table = TABLES[clip]
    assert watched(device, x, m, positions(999, 40, 500, 1), [-1, -1, -1, -1], table) == [999, 40, 500, -1]
    assert watched(device, x, m, positions(999, 40, 500, 1), [998, 41, 500, 7], table) == [999, 41, 500, 7]


@numpy_complains
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (1, 1023), (1, 1024), (1, 1025), (1, 4, 257)], ids=str)
def test_flags_see_one_bad_element_wherever_it_is(shape, device):
    size = prod(shape)
    for element in {0, 1, 15, 16, 1000, 1022, 1023, 1024, 1027, size - 1}:
        if element < size:
            x, m = step_inputs(shape)
            x.movedim(1, -1).reshape(1, -1)[0, element] = nan  # a view: channels-last memory
            assert x.isnan().sum() == 1
            assert watched(device, x, m, positions(5), [-1]) == [5], element


@numpy_complains
def test_flags_see_what_overflows_in_the_update(device):
    x, m = step_inputs((2, 3, 8, 8))
    x[1, 0, 0, 0] = m[1, 0, 0, 0] = 3e38  # -B x overflows, both inputs are finite
    rows = TABLES[False].rows.clone()
    rows[:, 5] = 2
    assert watched(device, x, m, positions(9, 9), [-1, -1], replace(TABLES[False], rows=rows)) == [-1, 9]


@numpy_complains
def test_flags_stay_at_the_first_bad_step(device):
    """Positions descend, and what is bad once stays bad."""
    table, address, state = TABLES[True].to(device), addresses(3).to(device), step_inputs((3, 3, 8, 8))[0].to(device)
    bad, seen = torch.full((3,), -1, dtype=torch.int32, device=device), []
    for k in (999, 998, 997, 996):
        m = step_inputs((3, 3, 8, 8), seed=k)[1].to(device)
        if k == 998:
            m[1, 0, 3, 3] = inf
        if k == 997:
            m[0] = nan
        ops.step(state, m, table, positions(k, k, k).to(device), address, bad=bad)
        seen.append(bad.tolist())
    assert seen == [[-1, -1, -1], [-1, 998, -1], [997, 998, -1], [997, 998, -1]]


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_flags_and_a_copy_at_once(out_dtype, device):
    x, m = step_inputs((2, 3, 20, 20), torch.bfloat16)
    pos, address = positions(4, 700), addresses(2)
    m[1, 2, 19, 19] = nan
    bad = torch.full((2,), -1, dtype=torch.int32, device=device)
    got = run_step(device, x, m, TABLES[True], pos, address, out_dtype=out_dtype, bad=bad)
    assert bad.tolist() == [-1, 700]
    want = stepped(x, m, TABLES[True], pos, address)
    if out_dtype is not None:
        assert_same_bits(got[1].cpu().nan_to_num(), want.to(out_dtype).nan_to_num())
        got = got[0]
    assert_same_bits(got.cpu().nan_to_num(), want.nan_to_num())


@numpy_complains
def test_step_keeps_a_nan_that_only_the_clamp_sees(device):
    x, m = step_inputs((1, 3, 8, 8))
    x[0, 1, 2, 3], m[0, 1, 2, 3] = 1e37, 1e37
    pos, address, table = positions(999), addresses(1), replace(TABLES[True], rows=TABLES[True].rows.clone())
    table.rows[999, :2] *= 1e3  # cx x + cm m = inf - inf, while B x and C m are finite
    cx, cm, _, _, _, B, C, _ = (table.rows[999] * 1e37).tolist()
    assert (cx, cm) == (inf, -inf)
    assert isfinite(B)
    assert isfinite(C)
    got = run_step(device, x, m, table, pos, address).cpu()
    assert got.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


FAR = """
import sys, torch
from fastddpm import noise, ops
from fastddpm.kernels import eps_loss, noising, step, tree, x_0_error
from fastddpm.reference.diffusion import add_noise, predicted_x_0, squared_error, target, tree_sum, update
from fastddpm.core.schedule import Schedule

device, n, per_sample, block = sys.argv[1], 34, ops.MAX_PER_SAMPLE, 1024
assert (n - 1) * per_sample > 2**31
address, table, noising_table = noise.address(3, n), Schedule().table(), Schedule().noising_table()
pos = torch.arange(n, dtype=torch.int32)

def far(dtype, value=None):  # memory that nothing touches takes no room on a CPU
    memory = torch.empty((n - 1) * per_sample + block, dtype=dtype, device=device)
    blocks = memory.as_strided((n, block), (per_sample, 1))
    return memory, blocks if value is None else blocks.copy_(value)

drawn = torch.randn(2, n, block, generator=torch.Generator().manual_seed(0)).half()
(x, x_blocks), (m, _) = far(torch.float32, drawn[0]), far(torch.float16, drawn[1])
arguments = (a.to(device) for a in (table.rows, table.timesteps, pos, address))
bad = torch.full((n,), -1, dtype=torch.int32, device=device)
x_blocks[-1, -1] = float("nan")
step.step_kernel[n, 1](x, m, *arguments, None, bad, per_sample, CLIP=True, BLOCK=block, **step.OPTIONS)
z = noise.normal(address, (block,), stream=noise.STEP, t=pos)
want = update(drawn[0].float(), drawn[1], table.rows[pos], z, clip=True)
assert x_blocks[-1, -1].isnan()
x_blocks[-1, -1] = want[-1, -1]
assert torch.equal(x_blocks.cpu(), want)
assert bad.tolist() == [-1] * (n - 1) + [n - 1]
out = torch.empty(n, device=device)
tree.tree_sum_kernel[n, 1](out, x, per_sample, BLOCK=block, **tree.OPTIONS)
assert torch.equal(out.cpu(), tree_sum(want))

del x, x_blocks
x_t, x_t_blocks = far(torch.float16)
arguments = [a.to(device) for a in (pos.long(), address, noising_table)]
how = {"STREAM": noise.TRAIN, "WITH_T": False, "BLOCK": block}
noising.noising_kernel[n, 1](x_t, m, *arguments, per_sample, **how, **noising.OPTIONS)
eps = noise.normal(address, (block,), stream=noise.TRAIN, t=0)
noised = add_noise(drawn[1].float(), eps, noising_table[pos])
assert torch.equal(x_t_blocks.cpu(), noised.half())

x_0, m = m, x_t
given, want = noised.half().float(), target(drawn[1].float(), eps, noising_table[pos], "v_prediction")
v = {"PREDICTS": "v_prediction", **how, **eps_loss.OPTIONS}
eps_loss.eps_loss_kernel[n, 1](out, m, x_0, *arguments, per_sample, **v)
assert torch.equal(out.cpu(), squared_error(given, want))
gradient, gradient_blocks = far(torch.float16)
eps_loss.eps_loss_backward_kernel[n, 1](gradient, torch.ones_like(out), m, x_0, *arguments, per_sample, **v)
assert torch.equal(gradient_blocks.cpu(), (2 * (given - want)).half())
rows = torch.cat([noising_table, table.rows[:, :4], table.scale[:, None]], 1)
arguments[-1] = rows.to(device)
x_0_error.x_0_error_kernel[n, 1](out, m, x_0, *arguments, per_sample, **how, **x_0_error.OPTIONS)
assert torch.equal(out.cpu(), squared_error(predicted_x_0(noised, given, rows[pos, 2:]), drawn[1].float()))
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(kernel_device):
    """The first block of each of 34 samples of the largest size; a wrong address may well crash the process."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9:
        pytest.skip("it reserves 13 GB of memory, though it writes little of it")
    subprocess.run([sys.executable, "-c", FAR, kernel_device], check=True)


@pytest.mark.parametrize("operation", ["step", "noising", "eps_loss", "x_0_error"])
def test_kernels_are_launched_on_the_device_of_their_data(operation, interpreted, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    (x, m), t, table = step_inputs((2, 3, 4, 4)), torch.tensor([5, 5]), TABLES[True]
    if operation == "step":
        ops.step(x, m, table, positions(5, 5), addresses(2))
    elif operation == "noising":
        ops.noising(x, t, addresses(2), NOISING_TABLE)
    elif operation == "eps_loss":
        m = m.requires_grad_()
        torch.autograd.grad(ops.eps_loss(m, x, t, addresses(2), NOISING_TABLE).sum(), m)
    else:
        rows = torch.cat([NOISING_TABLE, table.rows[:, :4], table.scale[:, None]], 1)
        ops.x_0_error(m, x, t, addresses(2), rows)
    first = x if operation in ("step", "noising") else m
    assert [one.data_ptr() for one in seen] == [first.data_ptr()] * (2 if operation == "eps_loss" else 1)


def test_step_of_nothing(device):
    x = torch.empty(0, 3, 4, 4)
    assert run_step(device, x, x, TABLES[True], positions(), noise.address(0, 0)).shape == x.shape


# The noising


def noising_inputs(shape, dtype):
    """x_0, and what it stands for in fp32."""
    if dtype == torch.uint8:
        x_0 = torch.randint(256, shape, generator=drawn(0), dtype=dtype)
        return layout.channels_last(x_0), layout.channels_last((x_0.float() - 127.5) * (2 / 255))
    x_0 = layout.channels_last(torch.randn(shape, generator=drawn(0)).to(dtype))
    return x_0, x_0.float()


@pytest.mark.parametrize("stream", [noise.TRAIN, noise.LIKELIHOOD])
@pytest.mark.parametrize("dtype", [*ops.FLOATS, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noising_is_the_specification(shape, dtype, stream, device, guards):
    t, address = torch.tensor(POSITIONS[: shape[0]]), addresses(shape[0])
    x_0, value = noising_inputs(shape, dtype)
    eps = noise.normal(address, shape[1:], stream=stream, t=t if stream == noise.LIKELIHOOD else 0)
    want = add_noise(value, eps, NOISING_TABLE[t])
    assert_same_bits(run_noising(device, x_0, t, address, stream=stream), want)
    guards.check()


@pytest.mark.parametrize("out_dtype", ops.FLOATS)
@pytest.mark.parametrize("dtype", [*ops.FLOATS, torch.uint8])
def test_noising_rounds_once(dtype, out_dtype, device):
    t, address = torch.tensor([0, 999]), addresses(2)
    x_0, value = noising_inputs((2, 3, 20, 20), dtype)
    want = add_noise(value, noise.normal(address, (3, 20, 20), stream=noise.TRAIN, t=0), NOISING_TABLE[t])
    assert_same_bits(run_noising(device, x_0, t, address, dtype=out_dtype), want.to(out_dtype))


def test_noising_of_nothing(device):
    x_0 = torch.empty(0, 3, 4, 4)
    assert run_noising(device, x_0, torch.empty(0, dtype=torch.int64), noise.address(0, 0)).shape == x_0.shape


def test_bytes_become_numbers_from_minus_one_to_one(device):
    x_0 = torch.arange(256, dtype=torch.uint8).view(1, 256)
    table = torch.tensor([[1.0, 0.0]], device=device)
    x_t = ops.noising(x_0.to(device), torch.zeros(1, dtype=torch.int64, device=device), addresses(1).to(device), table)
    x_t = x_t[0].cpu()
    assert (x_t[0], x_t[255]) == (-1, 1)
    assert torch.equal(x_t, -x_t.flip(0))
    exact = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    assert (x_t - exact).abs().max() <= torch.finfo(torch.float32).eps  # two roundings: the constant, the product


# One captured graph


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_captured_step_follows_what_lies_on_the_device():
    table, first = TABLES[True], positions(999, 998, 40, 2)
    address = addresses(4)
    x, m = step_inputs((4, 3, 16, 16), torch.bfloat16)
    held = [a.to("cuda", copy=True) for a in (x, m, first, address)]
    state, output, pos, where = held
    rows = table.to("cuda")
    low, bad = torch.empty_like(state, dtype=torch.bfloat16), torch.full((4,), -1, dtype=torch.int32, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.step(state.clone(), output, rows, pos, where, out=low, bad=bad)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.step(state, output, rows, pos, where, out=low, bad=bad)
        pos.sub_(1)

    for k in range(3):
        x, m = stepped(x, m, table, first - k, address), torch.randn(m.shape, generator=drawn(k)).to(m)
        graph.replay()
        assert_same_bits(state, x)
        assert_same_bits(low, x.bfloat16())
        output.copy_(m)
    where.copy_(addresses(4).flip(0))
    pos.fill_(500)
    graph.replay()
    assert_same_bits(state, stepped(x, m, table, positions(500, 500, 500, 500), addresses(4).flip(0)))
    assert bad.tolist() == [-1, -1, -1, -1]
    output[2].fill_(nan)
    graph.replay()
    graph.replay()
    assert bad.tolist() == [-1, -1, 499, -1]
