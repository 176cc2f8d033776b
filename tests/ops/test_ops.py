"""The entry points of `ops`: what they refuse, what torch.compile makes of them, and what they leave undone."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule

TABLE = Schedule().table()
NOISING_TABLE = Schedule().noising_table()
SHAPE = (2, 3, 4, 4)


def step_arguments(device="cpu"):
    x, m = (layout.channels_last(torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))) for i in range(2))
    pos = torch.tensor([999, 3], dtype=torch.int32)
    arguments = {"x": x, "m": m.bfloat16(), "table": TABLE, "pos": pos, "address": noise.address(7, 2)}
    return {name: value.to(device) for name, value in arguments.items()}


def noising_arguments(device="cpu"):
    x_0 = layout.channels_last(torch.randint(256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    arguments = {"x_0": x_0, "t": torch.tensor([0, 999]), "address": noise.address(7, 2), "table": NOISING_TABLE}
    return {name: value.to(device) for name, value in arguments.items()}


# What is refused


def contiguous(x):
    return x.contiguous()


BAD_STEPS = [
    ("x", lambda x: x.half(), r"x is \(2, 3, 4, 4\) torch.float16 on cpu; want .* of float32"),
    ("x", lambda x: x[:, 0, 0, 0], r"x is \(2,\) torch.float32 on cpu; want \[N, C, \*spatial\] or \[N, D\]"),
    ("x", contiguous, r"x has strides \(48, 16, 4, 1\), not channels-last; use layout.channels_last\(x\)"),
    ("x", lambda x: x.clone().requires_grad_(), r"x requires a gradient, .* call it under torch.no_grad\(\)"),
    (
        "x",
        lambda x: x[:1],
        r"m is \(2, 3, 4, 4\) .*, but x is \(1, 3, 4, 4\) on cpu; the network must return one value",
    ),
    ("m", lambda m: None, r"m is NoneType, but x is \(2, 3, 4, 4\) on cpu; the network must return one value"),
    ("m", lambda m: m[:, :2], r"m is \(2, 2, 4, 4\) torch.bfloat16 on cpu, but x is .*; the network must return one"),
    ("m", lambda m: m.to("meta"), r"m is .* on meta, but x is \(2, 3, 4, 4\) on cpu; .*, where x is"),
    ("m", lambda m: m.double(), r"m is .* torch.float64 on cpu; want .* of float32, bfloat16, float16"),
    ("m", contiguous, r"m has strides \(48, 16, 4, 1\), not channels-last; use layout.channels_last\(m\)"),
    ("m", lambda m: m.clone().requires_grad_(), r"m requires a gradient, .* call it under torch.no_grad\(\)"),
    ("x", lambda x: None, r"x is NoneType; want \[N, C, \*spatial\] or \[N, D\] of float32"),
    ("pos", lambda pos: pos.long(), r"pos is \(2,\) torch.int64 on cpu; want \(2,\) torch.int32 on cpu"),
    ("pos", lambda pos: pos[:1], r"pos is \(1,\) torch.int32 on cpu; want \(2,\) torch.int32 on cpu"),
    ("pos", lambda pos: pos[:1].expand(2), r"pos is .* contiguous"),
    ("pos", lambda pos: pos.to("meta"), r"pos is \(2,\) torch.int32 on meta; want .* on cpu"),
    ("address", lambda a: a[0], r"address is \(2,\) torch.int64 on cpu; want \(2, 2\) .*: noise.address\("),
    ("address", lambda a: a.int(), r"address is \(2, 2\) torch.int32 on cpu; want \(2, 2\) torch.int64"),
    ("table", lambda table: table.to("meta"), r"table.rows is \(1000, 8\) .* on meta; want \(1000, 8\) .* on cpu"),
    ("table", lambda table: replace(table, rows=table.rows.double()), r"table.rows is .* torch.float64 .*; want"),
    ("table", lambda table: replace(table, rows=table.rows[:, :6]), r"table.rows is \(1000, 6\) .*; want \(1000, 8\)"),
    ("table", lambda table: replace(table, timesteps=table.timesteps[1:]), r"table.timesteps is \(999,\) .*; want"),
    ("out_dtype", lambda none: torch.float64, r"out_dtype is torch.float64; want bfloat16, float16, or None"),
    ("out_dtype", lambda none: torch.float32, r"out_dtype is torch.float32; want .* None: x itself is float32"),
    (
        "out",
        lambda none: output(torch.float32),
        r"out is \(2, 3, 4, 4\) torch.float32 on cpu; want .* of bfloat16, float16",
    ),
    (
        "out",
        lambda none: output()[:1],
        r"out is \(1, 3, 4, 4\) torch.bfloat16 on cpu; want \(2, 3, 4, 4\) on cpu, like x",
    ),
    ("out", lambda none: output(device="meta"), r"out is .* on meta; want \(2, 3, 4, 4\) on cpu, like x"),
    (
        "out",
        lambda none: contiguous(output()),
        r"out has strides .*, not channels-last; use layout.channels_last\(out\)",
    ),
    ("out", lambda none: 3, r"out is int; want \[N, C, \*spatial\]"),
    (
        "bad",
        lambda none: torch.zeros(2),
        r"bad is \(2,\) torch.float32 on cpu; want \(2,\) torch.int32 on cpu, contiguous",
    ),
    ("bad", lambda none: flags()[:1], r"bad is \(1,\) torch.int32 on cpu; want \(2,\) torch.int32 on cpu"),
    ("bad", lambda none: flags().repeat(2)[::2], r"bad is .* contiguous: torch.full\(\(n,\), -1, dtype=torch.int32\)"),
    ("bad", lambda none: flags().to("meta"), r"bad is \(2,\) torch.int32 on meta; want .* on cpu"),
]


def output(dtype=torch.bfloat16, device="cpu"):
    return layout.empty(SHAPE[0], SHAPE[1:], dtype=dtype, device=device)


def flags(device="cpu"):
    return torch.full(SHAPE[:1], -1, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_STEPS)
def test_step_refuses(name, spoil, message):
    arguments = step_arguments()
    before = arguments["x"].clone()
    spoilt = arguments | {name: spoil(arguments.get(name))}
    with pytest.raises(ValueError, match=f"^step: {message}") as error:
        ops.step(**spoilt)
    assert "\n" not in str(error.value)
    assert torch.equal(arguments["x"], before)


def test_step_refuses_two_places_for_its_copy():
    with pytest.raises(
        ValueError, match=r"^step: out_dtype is torch.float16, but out is given, .*; give one of the two$"
    ):
        ops.step(**step_arguments(), out_dtype=torch.float16, out=output())


BAD_NOISINGS = [
    (
        "x_0",
        lambda x: x.int(),
        r"x_0 is \(2, 3, 4, 4\) torch.int32 on cpu; want .* of float32, bfloat16, float16, uint8",
    ),
    ("x_0", lambda x: x[:, 0, 0, 0], r"x_0 is \(2,\) torch.uint8 on cpu; want \[N, C, \*spatial\] or \[N, D\]"),
    ("x_0", contiguous, r"x_0 has strides .*, not channels-last; use layout.channels_last\(x_0\)"),
    ("x_0", lambda x: x.float().requires_grad_(), r"x_0 requires a gradient"),
    ("t", lambda t: t.int(), r"t is \(2,\) torch.int32 on cpu; want \(2,\) torch.int64 on cpu"),
    ("t", lambda t: t[0], r"t is \(\) torch.int64 on cpu; want \(2,\)"),
    ("address", lambda a: a[:1], r"address is \(1, 2\) torch.int64 on cpu; want \(2, 2\)"),
    (
        "table",
        lambda table: table.double(),
        r"table is \(1000, 2\) torch.float64 on cpu; want \(1000, 2\) torch.float32",
    ),
    ("table", lambda table: table[:, 0], r"table is \(1000,\) .*; want \(1000, 2\) .*: Schedule.noising_table\(\)"),
    ("table", lambda table: table.to("meta"), r"table is .* on meta; want .* on cpu"),
    ("stream", lambda none: noise.STEP, r"stream is 0; want noise.TRAIN \(2\) or noise.LIKELIHOOD \(3\)"),
    ("stream", lambda none: 2.0, r"stream is 2.0; want noise.TRAIN \(2\)"),
    ("stream", lambda none: True, r"stream is True; want noise.TRAIN \(2\)"),
    ("dtype", lambda none: torch.uint8, r"dtype is torch.uint8; want one of float32, bfloat16, float16"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_NOISINGS)
def test_noising_refuses(name, spoil, message):
    arguments = noising_arguments()
    with pytest.raises(ValueError, match=f"^noising: {message}") as error:
        ops.noising(**arguments | {name: spoil(arguments.get(name))})
    assert "\n" not in str(error.value)


def test_samples_beyond_the_kernels_grid_are_refused():
    largest, beyond = (torch.empty(1, ops.MAX_PER_SAMPLE + i, device="meta") for i in range(2))
    step_from = TABLE.to("meta"), torch.zeros(1, dtype=torch.int32, device="meta"), noise.address(0, 1, "meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    noising_from = t, noise.address(0, 1, "meta"), NOISING_TABLE.to("meta")
    assert ops.step(largest, largest, *step_from) is largest
    assert ops.noising(largest, *noising_from).shape == largest.shape
    message = r"is \(1, 67107841\) .*; a sample may have at most 67107840 elements"
    with pytest.raises(ValueError, match=f"^step: x {message}"):
        ops.step(beyond, beyond, *step_from)
    with pytest.raises(ValueError, match=f"^noising: x_0 {message}"):
        ops.noising(beyond, *noising_from)


# Autograd


def test_no_gradient_is_asked_for_under_no_grad():
    arguments, spoilt = step_arguments(), step_arguments()
    spoilt["m"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(ops.step(**spoilt), ops.step(**arguments))


@pytest.mark.parametrize("name", ["x", "out", "bad"])
def test_autograd_sees_what_is_overwritten(name, device):
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


# What runs where


def test_backends():
    assert ops.backend("cpu") == ops.backend(torch.device("cpu")) == "torch"


@pytest.mark.parametrize(("installed", "backend"), [(True, "triton"), (False, "torch")])
def test_a_gpu_runs_triton_where_it_is_installed(installed, backend, monkeypatch):
    monkeypatch.setattr(ops, "_has_triton", lambda: installed)
    assert ops.backend("cuda") == ops.backend(torch.device("cuda", 1)) == backend


def test_triton_is_not_imported():
    code = """
import sys, torch
from fastddpm import noise, ops, schedule
x, pos, address = torch.zeros(1, 4), torch.tensor([5], dtype=torch.int32), noise.address(0, 1)
ops.step(x, x.clone(), schedule.Schedule().table(), pos, address)
ops.noising(x, pos.long(), address, schedule.Schedule().noising_table())
assert not {"triton", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize(("pos", "drawn"), [([0, 0], 0), ([0, 1], 1), ([999, 999], 1)])
def test_no_noise_is_made_where_all_rows_have_none(pos, drawn, monkeypatch):
    calls = []
    normal = noise.normal
    monkeypatch.setattr(noise, "normal", lambda *args, **kwargs: calls.append(args) or normal(*args, **kwargs))
    ops.step(**step_arguments() | {"pos": torch.tensor(pos, dtype=torch.int32)})
    assert len(calls) == drawn


# torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
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
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_noising(device, dynamic):
    def loss(x_0, t, address, table):
        x_t = ops.noising(x_0, t, address, table, dtype=torch.bfloat16)
        return x_t, (x_t.float() ** 2).mean()

    arguments = noising_arguments(device)
    want = loss(**arguments)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)(**arguments)
    assert all(map(torch.equal, got, want))
    assert layout.is_channels_last(got[0])


@pytest.mark.slow
@pytest.mark.parametrize("written", [False, True])
def test_step_is_registered_as_torch_expects(device, written):
    a = step_arguments(device)
    also = (output(device=a["x"].device), flags(a["x"].device)) if written else (None, None)
    arguments = (a["x"], a["m"], a["table"].rows, a["table"].timesteps, a["pos"], a["address"], True, *also)
    torch.library.opcheck(torch.ops.fastddpm.step.default, arguments)


@pytest.mark.slow
def test_noising_is_registered_as_torch_expects(device):
    arguments = (*noising_arguments(device).values(), noise.LIKELIHOOD, torch.float16)
    torch.library.opcheck(torch.ops.fastddpm.noising.default, arguments)
