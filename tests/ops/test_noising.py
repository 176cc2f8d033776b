"""`ops.noising` in torch, in the Triton interpreter and on a GPU: the bits of the reference."""

import pytest
import torch

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from fastddpm.reference.diffusion import add_noise
from tests.support.bits import assert_same_bits
from tests.support.draws import POSITIONS, addresses, generator

NOISING_TABLE = Schedule().noising_table()
# One block of the kernel is 1024 elements, one Philox call four.
SHAPES = [(1, 1, 1, 1), (2, 3, 32, 32), (3, 5, 7, 11), (4, 3, 50), (1, 1024), (1, 1023), (1, 1025), (1, 4, 257)]


def run_noising(device, x_0, t, address, **options):
    return ops.noising(*(a.to(device) for a in (x_0, t, address, NOISING_TABLE)), **options)


def noising_inputs(shape, dtype):
    """x_0, and the same in data units in fp32."""
    if dtype == torch.uint8:
        x_0 = torch.randint(256, shape, generator=generator(0), dtype=dtype)
        return layout.channels_last(x_0), layout.channels_last((x_0.float() - 127.5) * (2 / 255))
    x_0 = layout.channels_last(torch.randn(shape, generator=generator(0)).to(dtype))
    return x_0, x_0.float()


@pytest.mark.parametrize("stream", [noise.TRAIN, noise.LIKELIHOOD])
@pytest.mark.parametrize("dtype", [*ops.FLOATS, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noising_equals_specification(shape, dtype, stream, device, guards):
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


def test_empty_input_gives_empty_output(device):
    x_0 = torch.empty(0, 3, 4, 4)
    assert run_noising(device, x_0, torch.empty(0, dtype=torch.int64), noise.address(0, 0)).shape == x_0.shape


def test_bytes_map_to_minus_one_to_one(device):
    x_0 = torch.arange(256, dtype=torch.uint8).view(1, 256)
    table = torch.tensor([[1.0, 0.0]], device=device)
    x_t = ops.noising(x_0.to(device), torch.zeros(1, dtype=torch.int64, device=device), addresses(1).to(device), table)
    x_t = x_t[0].cpu()
    assert (x_t[0], x_t[255]) == (-1, 1)
    assert torch.equal(x_t, -x_t.flip(0))
    exact = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    assert (x_t - exact).abs().max() <= torch.finfo(torch.float32).eps  # two roundings: the constant, the product


# Invalid arguments

SHAPE = (2, 3, 4, 4)


def noising_arguments(device="cpu"):
    x_0 = layout.channels_last(torch.randint(256, SHAPE, dtype=torch.uint8, generator=generator(0)))
    arguments = {"x_0": x_0, "t": torch.tensor([0, 999]), "address": noise.address(7, 2), "table": NOISING_TABLE}
    return {name: value.to(device) for name, value in arguments.items()}


BAD = [
    (
        "x_0",
        lambda x: x.int(),
        r"x_0 is \(2, 3, 4, 4\) torch.int32 on cpu; want .* of float32, bfloat16, float16, uint8",
    ),
    ("x_0", lambda x: x[:, 0, 0, 0], r"x_0 is \(2,\) torch.uint8 on cpu; want \[N, C, \*spatial\] or \[N, D\]"),
    ("x_0", lambda x: x.contiguous(), r"x_0 has strides .*, not channels-last; use layout.channels_last\(x_0\)"),
    ("x_0", lambda x: x.float().requires_grad_(), r"x_0 requires a gradient"),
    ("t", lambda t: t.int(), r"t is \(2,\) torch.int32 on cpu; want \(2,\) torch.int64 on cpu"),
    ("t", lambda t: t + 1, "t is 1000; want 0 to 999, the rows of the table"),
    ("t", lambda t: t - 1, "t is -1; want 0 to 999, the rows of the table"),
    ("t", lambda t: t[0], r"t is \(\) torch.int64 on cpu; want \(2,\)"),
    ("address", lambda a: a[:1], r"address is \(1, 2\) torch.int64 on cpu; want \(2, 2\)"),
    (
        "table",
        lambda table: table.double(),
        r"table is \(1000, 2\) torch.float64 on cpu; want \(1000, 2\) torch.float32",
    ),
    ("table", lambda table: table[:, 0], r"table is \(1000,\) .*; want \(1000, 2\) .*: Schedule.noising_table\(\)"),
    ("table", lambda table: table.to("meta"), r"table is .* on meta; want .* on cpu"),
    ("stream", lambda _: noise.STEP, r"stream is 0; want noise.TRAIN \(2\) or noise.LIKELIHOOD \(3\)"),
    ("stream", lambda _: 2.0, r"stream is 2.0; want noise.TRAIN \(2\)"),
    ("stream", lambda _: True, r"stream is True; want noise.TRAIN \(2\)"),
    ("dtype", lambda _: torch.uint8, r"dtype is torch.uint8; want one of float32, bfloat16, float16"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_noising_rejects_invalid_arguments(name, damage, message):
    arguments = noising_arguments()
    with pytest.raises(ValueError, match=f"^noising: {message}") as error:
        ops.noising(**arguments | {name: damage(arguments.get(name))})
    assert "\n" not in str(error.value)


def test_samples_too_large_for_the_grid_are_rejected():
    largest, beyond = (torch.empty(1, ops.MAX_PER_SAMPLE + i, device="meta") for i in range(2))
    t, table = torch.zeros(1, dtype=torch.int64, device="meta"), NOISING_TABLE.to("meta")
    others = t, noise.address(0, 1, "meta"), table
    assert ops.noising(largest, *others).shape == largest.shape
    message = r"^noising: x_0 is \(1, 67107841\) .*; a sample may have at most 67107840 elements"
    with pytest.raises(ValueError, match=message):
        ops.noising(beyond, *others)


# torch.compile


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
def test_noising_passes_opcheck(device):
    arguments = (*noising_arguments(device).values(), noise.LIKELIHOOD, torch.float16)
    torch.library.opcheck(torch.ops.fastddpm.noising.default, arguments)
