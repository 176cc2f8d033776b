"""`ops.step` in torch, in the Triton interpreter and on a GPU: the bits of the reference, and nothing else written."""

import math
from dataclasses import replace
from math import inf, nan, prod

import pytest
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import StepColumns
from fastddpm.ops.step import repeated_step
from fastddpm.reference.diffusion import update
from tests.support.bits import assert_same_bits
from tests.support.draws import POSITIONS, addresses, generator, numpy_warns, positions, step_inputs
from tests.support.guards import GUARD, Guards

TABLES = {clip: Schedule(clip_sample=clip).table() for clip in (True, False)}
# One block of the kernel is 1024 elements, one Philox call four.
SHAPES = [(1, 1, 1, 1), (2, 3, 32, 32), (3, 5, 7, 11), (4, 3, 50), (1, 1024), (1, 1023), (1, 1025), (1, 4, 257)]


def specified(x, m, table, pos, address) -> Tensor:
    """The specification, one entry at a time; rows with S = 0 draw no z."""
    out = []
    for i, p in enumerate(pos.tolist()):
        row, t = table.rows[p], int(table.timesteps[p])
        noisy = StepColumns.of(row).S != 0
        z = noise.normal(address[i : i + 1], x.shape[1:], stream=noise.STEP, t=t) if noisy else None
        out.append(update(x[i : i + 1], m[i : i + 1], row, z, clip=table.clip))
    return torch.cat(out)


def run_step(device, x, m, table, pos, address, **options):
    arguments = (m.to(device), table.to(device), pos.to(device), address.to(device))
    return ops.step(x.to(device, copy=True), *arguments, **options)


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
def test_step_equals_specification(shape, clip, dtype, out_dtype, device, guards):
    table, address, pos = TABLES[clip], addresses(shape[0]), positions(*POSITIONS[: shape[0]])
    x, m = step_inputs(shape, dtype)
    want = specified(x, m, table, pos, address)
    state = guards.holding(x, device)
    model_output = guards.holding(m, device)
    got = ops.step(state, model_output, table.to(device), pos.to(device), address.to(device), out_dtype=out_dtype)
    if out_dtype is not None:
        got, copy = got
        assert_same_bits(copy, want.to(out_dtype))
    assert got is state
    assert_same_bits(got, want)
    assert_same_bits(model_output, m)
    guards.check()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("pos", POSITIONS)
def test_step_at_one_position(pos, clip, device):
    x, m = step_inputs((2, 3, 32, 32), torch.bfloat16, seed=pos)
    pos, address = positions(pos, pos), addresses(2)
    want = specified(x, m, TABLES[clip], pos, address)
    assert_same_bits(run_step(device, x, m, TABLES[clip], pos, address), want)


def test_step_at_random_positions(device):
    x, m = step_inputs((8, 3, 8, 8), torch.float16)
    pos = torch.randint(1000, (8,), generator=generator(1), dtype=torch.int32)
    address = torch.randint(-(1 << 63), (1 << 63) - 1, (8, 2), generator=generator(2))
    address[:, 1] &= (1 << 56) - 1
    for table in (
        TABLES[True],
        Schedule(clip_sample=False, prediction_type="v_prediction").table(1000, eta=0.5, sampler="ddim"),
    ):
        assert_same_bits(run_step(device, x, m, table, pos, address), specified(x, m, table, pos, address))


def test_unaligned_memory(device):
    x, m = step_inputs((2, 16, 4, 4), torch.bfloat16)
    pos, address, table = positions(3, 700), addresses(2), TABLES[True]
    state = torch.full((x.numel() + 3,), nan, device=device)[3:].view(2, 4, 4, 16).movedim(-1, 1).copy_(x)
    model_output = (
        torch.full((x.numel() + 1,), nan, dtype=m.dtype, device=device)[1:].view(2, 4, 4, 16).movedim(-1, 1).copy_(m)
    )
    ops.step(state, model_output, table.to(device), pos.to(device), address.to(device))
    assert_same_bits(state, specified(x, m, table, pos, address))


def test_nothing_is_added_if_no_z_is_drawn(device):
    x = torch.full((2, 1, 2, 2), -0.0)
    pos, address = positions(0, 0), addresses(2)
    row = torch.tensor(
        [[1.0, 0.0, -inf, inf, 0.0, 1.0, 1.0, *7 * [0.0]]]
    )  # adding +0 would lose the sign of x_prev = -0
    table = replace(TABLES[False], rows=row, timesteps=torch.zeros(1, dtype=torch.int32))
    assert_same_bits(run_step(device, x, x.clone(), table, pos, address), x)


@numpy_warns
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_nan_and_inf_propagate(bad, device):
    x, m = step_inputs((1, 3, 8, 8))
    m[0, 1, 2, 3] = bad
    pos, address = positions(500), addresses(1)
    for table in TABLES.values():
        want = specified(x, m, table, pos, address)
        got = run_step(device, x, m, table, pos, address).cpu()
        assert not want[0, 1, 2, 3].isfinite()
        assert torch.equal(got.isnan(), want.isnan())
        assert_same_bits(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_writes_its_copy_into_out(shape, out_dtype, device):
    pos, address, guards = positions(*POSITIONS[: shape[0]]), addresses(shape[0]), Guards()
    x, m = step_inputs(shape, out_dtype)
    want = specified(x, m, TABLES[True], pos, address)
    out = guards.empty(len(x), shape[1:], dtype=out_dtype, device=device)
    got, copy = run_step(device, x, m, TABLES[True], pos, address, out=out)
    assert copy is out
    assert_same_bits(got, want)
    assert_same_bits(copy, want.to(out_dtype))
    guards.check()


FLAGS = [-1, 998, 1000, 7]  # before a step: no bad step yet; a bad step at a row before or after the current one


def flags_after(device, x, m, pos, bad, table=TABLES[True]):
    """The flags after a step, which writes nothing around them and the same x as without flags."""
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
def test_flags_do_not_change_if_all_values_are_finite(shape, clip, device):
    x, m = step_inputs(shape, torch.bfloat16)
    x[0, 0], m[-1, -1] = 1e38, -1e30  # large, but finite to the end
    n = shape[0]
    assert flags_after(device, x, m, positions(*[400] * n), FLAGS[:n], TABLES[clip]) == FLAGS[:n]


@numpy_warns
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["x", "m"])
def test_flags_hold_the_row_of_every_bad_entry(where, value, clip, device):
    x, m = step_inputs((4, 3, 20, 20), torch.float16)  # a block and a part of one
    damaged = {"x": x, "m": m}[where]
    damaged[0, 2, 19, 19] = damaged[1, 0, 0, 0] = damaged[2, 1, 10, 10] = value
    table = TABLES[clip]
    assert flags_after(device, x, m, positions(999, 40, 500, 1), [-1, -1, -1, -1], table) == [999, 40, 500, -1]
    assert flags_after(device, x, m, positions(999, 40, 500, 1), [998, 41, 500, 7], table) == [999, 41, 500, 7]


@numpy_warns
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (1, 1023), (1, 1024), (1, 1025), (1, 4, 257)], ids=str)
def test_one_bad_element_anywhere_sets_the_flag(shape, device):
    size = prod(shape)
    for element in {0, 1, 15, 16, 1000, 1022, 1023, 1024, 1027, size - 1}:
        if element < size:
            x, m = step_inputs(shape)
            x.movedim(1, -1).reshape(1, -1)[0, element] = nan  # a view: channels-last memory
            assert x.isnan().sum() == 1
            assert flags_after(device, x, m, positions(5), [-1]) == [5], element


@numpy_warns
def test_an_overflow_in_the_update_sets_the_flag(device):
    x, m = step_inputs((2, 3, 8, 8))
    x[1, 0, 0, 0] = m[1, 0, 0, 0] = 3e38  # -B x overflows, both inputs are finite
    rows = TABLES[False].rows.clone()
    StepColumns.of(rows).B.fill_(2)
    assert flags_after(device, x, m, positions(9, 9), [-1, -1], replace(TABLES[False], rows=rows)) == [-1, 9]


@numpy_warns
def test_flags_keep_the_row_of_the_first_bad_step(device):
    """Positions descend, and an entry that is not finite stays so."""
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
def test_flags_and_a_copy_together(out_dtype, device):
    x, m = step_inputs((2, 3, 20, 20), torch.bfloat16)
    pos, address = positions(4, 700), addresses(2)
    m[1, 2, 19, 19] = nan
    bad = torch.full((2,), -1, dtype=torch.int32, device=device)
    got = run_step(device, x, m, TABLES[True], pos, address, out_dtype=out_dtype, bad=bad)
    assert bad.tolist() == [-1, 700]
    want = specified(x, m, TABLES[True], pos, address)
    if out_dtype is not None:
        assert_same_bits(got[1].cpu().nan_to_num(), want.to(out_dtype).nan_to_num())
        got = got[0]
    assert_same_bits(got.cpu().nan_to_num(), want.nan_to_num())


@numpy_warns
def test_a_nan_inside_the_clamp_propagates(device):
    x, m = step_inputs((1, 3, 8, 8))
    x[0, 1, 2, 3], m[0, 1, 2, 3] = 1e37, 1e37
    pos, address, table = positions(999), addresses(1), replace(TABLES[True], rows=TABLES[True].rows.clone())
    for column in (table.columns.cx, table.columns.cm):
        column[999] *= 1e3  # cx x + cm m = inf - inf, while B x and C m are finite
    row = StepColumns.of(table.rows[999] * 1e37)
    assert (row.cx, row.cm) == (inf, -inf)
    assert row.B.isfinite()
    assert row.C.isfinite()
    got = run_step(device, x, m, table, pos, address).cpu()
    assert got.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


def test_empty_input_gives_empty_output(device):
    x = torch.empty(0, 3, 4, 4)
    assert run_step(device, x, x, TABLES[True], positions(), noise.address(0, 0)).shape == x.shape


# Invalid arguments

SHAPE = (2, 3, 4, 4)


def step_arguments(device="cpu"):
    x, m = (layout.channels_last(torch.randn(SHAPE, generator=generator(i))) for i in range(2))
    pos = torch.tensor([999, 3], dtype=torch.int32)
    arguments = {"x": x, "m": m.bfloat16(), "table": TABLES[True], "pos": pos, "address": noise.address(7, 2)}
    return {name: value.to(device) for name, value in arguments.items()}


BAD = [
    ("x", lambda x: x.half(), r"x is \(2, 3, 4, 4\) torch.float16 on cpu; want .* of float32"),
    ("x", lambda x: x[:, 0, 0, 0], r"x is \(2,\) torch.float32 on cpu; want \[N, C, \*spatial\] or \[N, D\]"),
    (
        "x",
        lambda x: x.contiguous(),
        r"x has strides \(48, 16, 4, 1\), not channels-last; use layout.channels_last\(x\)",
    ),
    ("x", lambda x: x.clone().requires_grad_(), r"x requires a gradient, .* call it under torch.no_grad\(\)"),
    (
        "x",
        lambda x: x[:1],
        r"m is \(2, 3, 4, 4\) .*, but x is \(1, 3, 4, 4\) on cpu; the network must return one value",
    ),
    ("m", lambda m: None, r"m is NoneType, but x is \(2, 3, 4, 4\) on cpu; the network must return one value"),
    ("m", lambda m: m[:, :2], r"m is \(2, 2, 4, 4\) torch.bfloat16 on cpu, but x is .*; the network must return one"),
    ("m", lambda m: m.to("meta"), r"m is .* on meta, but x is \(2, 3, 4, 4\) on cpu; .*, on x's device"),
    ("m", lambda m: m.double(), r"m is .* torch.float64 on cpu; want .* of float32, bfloat16, float16"),
    (
        "m",
        lambda m: m.contiguous(),
        r"m has strides \(48, 16, 4, 1\), not channels-last; use layout.channels_last\(m\)",
    ),
    ("m", lambda m: m.clone().requires_grad_(), r"m requires a gradient, .* call it under torch.no_grad\(\)"),
    ("x", lambda x: None, r"x is NoneType; want \[N, C, \*spatial\] or \[N, D\] of float32"),
    ("pos", lambda pos: pos.long(), r"pos is \(2,\) torch.int64 on cpu; want \(2,\) torch.int32 on cpu"),
    ("pos", lambda pos: pos[:1], r"pos is \(1,\) torch.int32 on cpu; want \(2,\) torch.int32 on cpu"),
    ("pos", lambda pos: pos[:1].expand(2), r"pos is .* contiguous"),
    ("pos", lambda pos: pos.to("meta"), r"pos is \(2,\) torch.int32 on meta; want .* on cpu"),
    ("address", lambda a: a[0], r"address is \(2,\) torch.int64 on cpu; want \(2, 2\) .*: noise.address\("),
    ("pos", lambda pos: pos + 1, "pos is 1000; want 0 to 999, the rows of the table"),
    ("address", lambda a: a.int(), r"address is \(2, 2\) torch.int32 on cpu; want \(2, 2\) torch.int64"),
    ("table", lambda table: table.to("meta"), r"table.rows is \(1000, 14\) .* on meta; want \(1000, 14\) .* on cpu"),
    ("table", lambda table: replace(table, rows=table.rows.double()), r"table.rows is .* torch.float64 .*; want"),
    ("table", lambda table: replace(table, rows=table.rows[:, :6]), r"table.rows is \(1000, 6\) .*; want \(1000, 14\)"),
    ("table", lambda table: replace(table, timesteps=table.timesteps[1:]), r"table.timesteps is \(999,\) .*; want"),
    ("out_dtype", lambda _: torch.float64, r"out_dtype is torch.float64; want bfloat16, float16, or None"),
    ("out_dtype", lambda _: torch.float32, r"out_dtype is torch.float32; want .* None: x itself is float32"),
    (
        "out",
        lambda _: output(torch.float32),
        r"out is \(2, 3, 4, 4\) torch.float32 on cpu; want .* of bfloat16, float16",
    ),
    (
        "out",
        lambda _: output()[:1],
        r"out is \(1, 3, 4, 4\) torch.bfloat16 on cpu; want \(2, 3, 4, 4\) on cpu, like x",
    ),
    ("out", lambda _: output(device="meta"), r"out is .* on meta; want \(2, 3, 4, 4\) on cpu, like x"),
    (
        "out",
        lambda _: output().contiguous(),
        r"out has strides .*, not channels-last; use layout.channels_last\(out\)",
    ),
    ("out", lambda _: 3, r"out is int; want \[N, C, \*spatial\]"),
    (
        "bad",
        lambda _: torch.zeros(2),
        r"bad is \(2,\) torch.float32 on cpu; want \(2,\) torch.int32 on cpu, contiguous",
    ),
    ("bad", lambda _: flags()[:1], r"bad is \(1,\) torch.int32 on cpu; want \(2,\) torch.int32 on cpu"),
    ("bad", lambda _: flags().repeat(2)[::2], r"bad is .* contiguous: torch.full\(\(n,\), -1, dtype=torch.int32\)"),
    ("bad", lambda _: flags().to("meta"), r"bad is \(2,\) torch.int32 on meta; want .* on cpu"),
]


def output(dtype=torch.bfloat16, device="cpu"):
    return layout.empty(SHAPE[0], SHAPE[1:], dtype=dtype, device=device)


def flags(device="cpu"):
    return torch.full(SHAPE[:1], -1, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_step_rejects_invalid_arguments(name, damage, message):
    arguments = step_arguments()
    before = arguments["x"].clone()
    damaged = arguments | {name: damage(arguments.get(name))}
    with pytest.raises(ValueError, match=f"^step: {message}") as error:
        ops.step(**damaged)
    assert "\n" not in str(error.value)
    assert torch.equal(arguments["x"], before)


def test_step_rejects_both_out_and_out_dtype():
    with pytest.raises(
        ValueError, match=r"^step: out_dtype is torch.float16, but out is given, .*; give one of the two$"
    ):
        ops.step(**step_arguments(), out_dtype=torch.float16, out=output())


def test_samples_too_large_for_the_grid_are_rejected():
    largest, beyond = (torch.empty(1, ops.MAX_PER_SAMPLE + i, device="meta") for i in range(2))
    others = TABLES[True].to("meta"), torch.zeros(1, dtype=torch.int32, device="meta"), noise.address(0, 1, "meta")
    assert ops.step(largest, largest, *others) is largest
    message = r"^step: x is \(1, 67107841\) .*; a sample may have at most 67107840 elements"
    with pytest.raises(ValueError, match=message):
        ops.step(beyond, beyond, *others)


# Autograd, torch.compile, graphs


def test_m_may_require_a_gradient_under_no_grad():
    arguments, others = step_arguments(), step_arguments()
    others["m"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(ops.step(**others), ops.step(**arguments))


@pytest.mark.parametrize("name", ["x", "out", "bad"])
def test_autograd_detects_what_was_overwritten(name, device):
    a = step_arguments(device)
    written = {"x": a["x"], "out": output(device=a["x"].device), "bad": flags(a["x"].device)}
    weight = torch.ones(written[name].shape, device=a["x"].device, requires_grad=True)
    loss = (weight * written[name]).sum()
    ops.step(**a | written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_in_inference_mode(device):
    want = ops.step(**step_arguments(device), out_dtype=torch.bfloat16)
    with torch.inference_mode():
        got = ops.step(**step_arguments(device), out_dtype=torch.bfloat16)
    assert all(map(torch.equal, got, want))


def test_repeated_step_takes_the_same_step():
    """Also if m's memory holds the negative numbers, as after torch._neg_view."""
    arguments = step_arguments()
    x, m = arguments["x"], arguments.pop("m")
    want, bad, want_bad = x.clone(memory_format=torch.preserve_format), flags(), flags()
    ops.step(**arguments | {"x": want, "m": m, "bad": want_bad})
    for negative in (False, True):
        state = x.clone(memory_format=torch.preserve_format)
        take = repeated_step(**arguments | {"x": state, "bad": bad})
        take(torch._neg_view(-m) if negative else m)
        assert_same_bits(state, want)
        assert torch.equal(bad, want_bad)
    with pytest.raises(ValueError, match="step: m is"):
        take(m[:1])


@pytest.mark.parametrize(("pos", "drawn"), [([0, 0], 0), ([0, 1], 1), ([999, 999], 1)])
def test_no_noise_is_drawn_if_all_rows_have_none(pos, drawn, monkeypatch):
    calls = []
    normal = noise.normal
    monkeypatch.setattr(noise, "normal", lambda *args, **kwargs: calls.append(args) or normal(*args, **kwargs))
    with ops.forced_backend("torch"):
        ops.step(**step_arguments() | {"pos": torch.tensor(pos, dtype=torch.int32)})
    assert len(calls) == drawn


@pytest.mark.slow
@numpy_warns
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_step(device, dynamic):
    def sample(x, m, table, pos, address, bad):
        for _ in range(2):
            x, low = ops.step(x, m, table, pos, address, out_dtype=torch.bfloat16)
            x, low = ops.step(x, m, table, pos, address, out=low, bad=bad)
            m, pos = low * 0.5, pos - 1
        return x, low, bad

    arguments, again = (step_arguments(device) | {"bad": flags(step_arguments(device)["x"].device)} for _ in range(2))
    arguments["m"][1, 0, 0, 0] = again["m"][1, 0, 0, 0] = math.inf
    want = sample(**arguments)
    assert want[2].tolist() == [-1, 3]
    got = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=dynamic)(**again)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True))
    assert got[0] is again["x"]
    assert torch.equal(again["x"].nan_to_num(), arguments["x"].nan_to_num())
    assert layout.is_channels_last(got[1])


@pytest.mark.slow
@pytest.mark.parametrize("written", [False, True])
def test_step_passes_opcheck(device, written):
    a = step_arguments(device)
    also = (output(device=a["x"].device), flags(a["x"].device)) if written else (None, None)
    arguments = (a["x"], a["m"], a["table"].rows, a["table"].timesteps, a["pos"], a["address"], True, *also)
    torch.library.opcheck(torch.ops.fastddpm.step.default, arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_captured_step_reads_current_values():
    table, first = TABLES[True], positions(999, 998, 40, 2)
    address = addresses(4)
    x, m = step_inputs((4, 3, 16, 16), torch.bfloat16)
    held = [a.to("cuda", copy=True) for a in (x, m, first, address)]
    state, model_output, pos, where = held
    rows = table.to("cuda")
    low, bad = torch.empty_like(state, dtype=torch.bfloat16), torch.full((4,), -1, dtype=torch.int32, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.step(state.clone(), model_output, rows, pos, where, out=low, bad=bad)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.step(state, model_output, rows, pos, where, out=low, bad=bad)
        pos.sub_(1)

    for k in range(3):
        x, m = specified(x, m, table, first - k, address), torch.randn(m.shape, generator=generator(k)).to(m)
        graph.replay()
        assert_same_bits(state, x)
        assert_same_bits(low, x.bfloat16())
        model_output.copy_(m)
    where.copy_(addresses(4).flip(0))
    pos.fill_(500)
    graph.replay()
    assert_same_bits(state, specified(x, m, table, positions(500, 500, 500, 500), addresses(4).flip(0)))
    assert bad.tolist() == [-1, -1, -1, -1]
    model_output[2].fill_(nan)
    graph.replay()
    graph.replay()
    assert bad.tolist() == [-1, -1, 499, -1]
