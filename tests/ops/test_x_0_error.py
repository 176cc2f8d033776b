"""`ops.x_0_error` in torch, in the Triton interpreter and on a GPU: the bits of the reference."""

import math
from itertools import product

import pytest
import torch

from fastddpm import ops
from fastddpm.core import noise
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import x_0_rows
from fastddpm.reference.diffusion import add_noise, predicted_x_0, squared_error
from tests.support import losses
from tests.support.bits import same_bits
from tests.support.check import error_line
from tests.support.draws import numpy_warns
from tests.support.losses import SHAPES


def table_of(**options):
    schedule = Schedule(**options)
    table = schedule.table()
    return torch.cat([schedule.noising_table(), x_0_rows(table.rows, table.scale)], 1)


TABLES = {
    "clipped": table_of(),
    "unclipped": table_of(clip_sample=False),
    "v": table_of(prediction_type="v_prediction", clip_sample=False),
    "x_0": table_of(prediction_type="sample", clip_sample_range=0.5),
}


def inputs(shape, m_dtype=torch.float32, x_dtype=torch.uint8, table="clipped"):
    return losses.inputs(shape, m_dtype, x_dtype, TABLES[table])


def wanted(m, x_0, t, address, table, stream=noise.LIKELIHOOD):
    """The specification."""
    x = (x_0.float() - 127.5) * (2 / 255) if x_0.dtype == torch.uint8 else x_0.float()
    eps = noise.normal(address, m.shape[1:], stream=stream, t=t if stream == noise.LIKELIHOOD else 0)
    x_t = add_noise(x, eps, table[t][:, :2])
    return squared_error(predicted_x_0(x_t, m, table[t][:, 2:]), x)


def run(device, *arguments, **options):
    return ops.x_0_error(*(a.to(device) for a in arguments), **options)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_x_0_error_equals_specification(shape, table, device):
    for m_dtype, x_dtype in product(ops.FLOATS, (torch.uint8, torch.float32)):
        arguments = inputs(shape, m_dtype, x_dtype, table)
        assert same_bits(run(device, *arguments), wanted(*arguments))


def test_the_noise_may_be_that_of_training(device):
    arguments = inputs((3, 5, 7, 11))
    assert same_bits(run(device, *arguments, stream=noise.TRAIN), wanted(*arguments, stream=noise.TRAIN))


def test_x_t_is_that_of_noising(device):
    m, x_0, t, address, table = inputs((4, 3, 8, 8), table="v")
    x_t = ops.noising(*(a.to(device) for a in (x_0, t, address, table[:, :2].contiguous())), stream=noise.LIKELIHOOD)
    want = squared_error(predicted_x_0(x_t.cpu(), m, table[t][:, 2:]), (x_0.float() - 127.5) * (2 / 255))
    error = run(device, m, x_0, t, address, table)
    assert same_bits(error, want)


@numpy_warns
@pytest.mark.parametrize("table", ["clipped", "unclipped"])
def test_nan_propagates(table, device):
    m, *others = inputs((2, 3, 8, 8), table=table)
    m[1, 2, 3, 4] = math.nan
    assert run(device, m, *others).isnan().tolist() == [False, True]


def test_m_may_be_contiguous(device):
    m, *others = inputs((2, 3, 8, 8))
    assert same_bits(run(device, m.contiguous(), *others), run("cpu", m, *others))


def test_empty_input_gives_zero(device):
    for shape in ((0, 3, 4, 4), (2, 0)):
        n = shape[0]
        others = torch.empty(shape), torch.zeros(n, dtype=torch.int64), noise.address(0, n), TABLES["clipped"]
        assert run(device, torch.empty(shape), *others).tolist() == [0] * n


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("m", lambda m: m[:1], "m is (1, 3, 8, 8) torch.float32 on cpu, but x_0 is (2, 3, 8, 8) on cpu; the"),
        ("m", lambda m: m.requires_grad_(), "m requires a gradient, but x_0_error is not differentiable in it"),
        ("x_0", lambda x: x.int(), "x_0 is (2, 3, 8, 8) torch.int32 on cpu; want [N, C, *spatial] or [N, D] of"),
        ("t", lambda t: t * 0 + 1000, "t is 1000; want 0 to 999, the rows of the table"),
        ("t", lambda t: t.int(), "t is (2,) torch.int32 on cpu; want (2,) torch.int64 on cpu"),
        ("address", lambda a: a[:1], "address is (1, 2) torch.int64 on cpu; want (2, 2)"),
        ("table", lambda a: a[:, :2], "table is (1000, 2) torch.float32 on cpu; want (1000, 7) torch.float32"),
        ("stream", lambda _: 0, "stream is 0; want noise.TRAIN (2) or noise.LIKELIHOOD (3)"),
    ],
)
def test_x_0_error_rejects_invalid_arguments(name, damage, message):
    arguments = dict(zip(("m", "x_0", "t", "address", "table"), inputs((2, 3, 8, 8)), strict=True))
    line = error_line(ops.x_0_error, **arguments | {name: damage(arguments.get(name))})
    assert line.startswith(f"x_0_error: {message}")


@pytest.mark.slow
def test_x_0_error_passes_opcheck(device):
    arguments = tuple(a.to(device) for a in inputs((2, 3, 8, 8)))
    torch.library.opcheck(torch.ops.fastddpm.x_0_error.default, (*arguments, noise.LIKELIHOOD))


@pytest.mark.parametrize("damage", [lambda e: e * (1 + 1e-6), lambda e: e.roll(1, 0), lambda e: e * math.nan])
def test_a_damaged_error_is_detected(damage):
    arguments = inputs((3, 5, 7, 11))
    assert not same_bits(damage(run("cpu", *arguments)), wanted(*arguments))
