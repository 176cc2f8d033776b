"""Memory rates of the kernels next to that of a device copy: pytest bench/test_kernels.py -s

From 64 Mi elements the aim is 90 % of the copy's rate. The smaller ones are what sampling has, and hot in the cache.
"""

from functools import partial

import pytest
import torch

from bench.machine import DEVICE, SCALE, repeated
from fastddpm import layout, noise, ops
from fastddpm.reference.diffusion import add_noise, update
from fastddpm.schedule import Schedule

SHAPES = {
    "cuda": [(21_846, 3, 32, 32), (342, 3, 256, 256), (64, 3, 32, 32), (1, 3, 32, 32)],
    "cpu": [(64, 3, 32, 32)],
    "tiny": [(9, 3, 5, 7)],
}[SCALE]


def step_problem(shape, dtype):
    """A step of the middle of the schedule, gated on its first samples, and the bytes it moves."""
    table, address = Schedule().table().to(DEVICE), noise.address(0, shape[0], DEVICE)
    x, m = (layout.empty(shape[0], shape[1:], dtype=d, device=DEVICE).normal_() for d in (torch.float32, dtype))
    pos = torch.full(shape[:1], 500, dtype=torch.int32, device=DEVICE)
    z = noise.normal(address[:8], shape[1:], stream=noise.STEP, t=500)
    want = update(x[:8], m[:8], table.rows[500], z, clip=table.clip)
    out = None if dtype == torch.float32 else torch.empty_like(m)
    bad = torch.full_like(pos, -1)
    call = partial(ops.step, x, m, table, pos, address, out=out, bad=bad)
    call()
    assert torch.equal(x[:8], want)
    assert out is None or torch.equal(out, x.to(dtype))
    return call, 2 * x.nbytes + m.nbytes + (0 if out is None else out.nbytes)


def noising_problem(shape, dtype):
    """Noising to bfloat16, gated on its first samples, and the bytes it moves."""
    table, address = Schedule().noising_table().to(DEVICE), noise.address(0, shape[0], DEVICE)
    x_0 = layout.empty(shape[0], shape[1:], dtype=dtype, device=DEVICE).random_(256)
    t = torch.randint(1000, shape[:1], device=DEVICE)
    eps = noise.normal(address[:8], shape[1:], stream=noise.TRAIN, t=0)
    value = (x_0[:8].float() - 127.5) * (2 / 255) if dtype == torch.uint8 else x_0[:8].float()
    call = partial(ops.noising, x_0, t, address, table, dtype=torch.bfloat16)
    x_t = call()
    assert torch.equal(x_t[:8], add_noise(value, eps, table[t[:8]]).bfloat16())
    return call, x_0.nbytes + x_t.nbytes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_step(measure, shape, dtype):
    call, bytes_moved = step_problem(shape, dtype)
    measure(*repeated(call), bytes_moved=bytes_moved)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_noising(measure, shape, dtype):
    call, bytes_moved = noising_problem(shape, dtype)
    measure(*repeated(call), bytes_moved=bytes_moved)
