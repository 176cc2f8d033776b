"""Launches of kernels: on the device of their data, with offsets of 64 bits."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from fastddpm import ops
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import x_0_rows
from tests.support.draws import addresses, positions, step_inputs

NOISING_TABLE = Schedule().noising_table()


FAR = """
import sys, torch
from fastddpm import noise, ops
from fastddpm.kernels import eps_loss, noising, step, tree, x_0_error
from fastddpm.reference.diffusion import add_noise, predicted_x_0, squared_error, target, tree_sum, update
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import x_0_rows

device, n, per_sample, block = sys.argv[1], 34, ops.MAX_PER_SAMPLE, 1024
assert (n - 1) * per_sample > 2**31
address, table, noising_table = noise.address(3, n), Schedule().table(), Schedule().noising_table()
pos = torch.arange(n, dtype=torch.int32)

def far(dtype, value=None):  # on a CPU, untouched memory takes no physical pages
    memory = torch.empty((n - 1) * per_sample + block, dtype=dtype, device=device)
    blocks = memory.as_strided((n, block), (per_sample, 1))
    return memory, blocks if value is None else blocks.copy_(value)

values = torch.randn(2, n, block, generator=torch.Generator().manual_seed(0)).half()
(x, x_blocks), (m, _) = far(torch.float32, values[0]), far(torch.float16, values[1])
arguments = (a.to(device) for a in (table.rows, table.timesteps, pos, address))
bad = torch.full((n,), -1, dtype=torch.int32, device=device)
x_blocks[-1, -1] = float("nan")
step.step_kernel[n, 1](x, m, *arguments, None, bad, per_sample, CLIP=True, BLOCK=block, **step.OPTIONS)
z = noise.normal(address, (block,), stream=noise.STEP, t=pos)
want = update(values[0].float(), values[1], table.rows[pos], z, clip=True)
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
constants = {"STREAM": noise.TRAIN, "WITH_T": False, "BLOCK": block}
noising.noising_kernel[n, 1](x_t, m, *arguments, per_sample, **constants, **noising.OPTIONS)
eps = noise.normal(address, (block,), stream=noise.TRAIN, t=0)
noised = add_noise(values[1].float(), eps, noising_table[pos])
assert torch.equal(x_t_blocks.cpu(), noised.half())

x_0, m = m, x_t
given, want = noised.half().float(), target(values[1].float(), eps, noising_table[pos], "v_prediction")
v = {"PREDICTS": "v_prediction", **constants, **eps_loss.OPTIONS}
eps_loss.eps_loss_kernel[n, 1](out, m, x_0, *arguments, per_sample, **v)
assert torch.equal(out.cpu(), squared_error(given, want))
gradient, gradient_blocks = far(torch.float16)
eps_loss.eps_loss_backward_kernel[n, 1](gradient, torch.ones_like(out), m, x_0, *arguments, per_sample, **v)
assert torch.equal(gradient_blocks.cpu(), (2 * (given - want)).half())
of_x_0 = x_0_rows(table.rows, table.scale)
arguments[-1] = torch.cat([noising_table, of_x_0], 1).to(device)
x_0_error.x_0_error_kernel[n, 1](out, m, x_0, *arguments, per_sample, **constants, **x_0_error.OPTIONS)
assert torch.equal(out.cpu(), squared_error(predicted_x_0(noised, given, of_x_0[pos]), values[1].float()))
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(kernel_device):
    """Computes the first block of 34 samples of the largest size, in a subprocess, as a wrong address may crash it."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9:
        pytest.skip("needs 16 GB of memory: it reserves 13 GB, though it touches little of it")
    subprocess.run([sys.executable, "-c", FAR, kernel_device], check=True)


@pytest.mark.parametrize("operation", ["step", "noising", "eps_loss", "x_0_error"])
def test_kernels_are_launched_on_the_device_of_their_data(operation, interpreted, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    (x, m), t, table = step_inputs((2, 3, 4, 4)), torch.tensor([5, 5]), Schedule().table()
    if operation == "step":
        ops.step(x, m, table, positions(5, 5), addresses(2))
    elif operation == "noising":
        ops.noising(x, t, addresses(2), NOISING_TABLE)
    elif operation == "eps_loss":
        m = m.requires_grad_()
        torch.autograd.grad(ops.eps_loss(m, x, t, addresses(2), NOISING_TABLE).sum(), m)
    else:
        rows = torch.cat([NOISING_TABLE, x_0_rows(table.rows, table.scale)], 1)
        ops.x_0_error(m, x, t, addresses(2), rows)
    first = x if operation in ("step", "noising") else m
    assert [one.data_ptr() for one in seen] == [first.data_ptr()] * (2 if operation == "eps_loss" else 1)
