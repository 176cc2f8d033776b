"""The C++ kernels have the same bits on every instruction set, and with any number of threads."""

import pytest
import torch

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from tests.kernels.cpu.conftest import INSTRUCTION_SETS
from tests.support.bits import same_bits
from tests.support.draws import generator

SHAPE = (3, 20, 33, 31)  # 20 blocks of the kernels and a part of one; 20 channels are not a multiple of any vector
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TABLE, NOISING = Schedule().table(), Schedule().noising_table()


def normal(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=generator(seed)).to(dtype)
    return layout.channels_last(x) if len(shape) > 1 else x


def step(dtype):
    x, m = normal(*SHAPE), normal(*SHAPE, seed=1, dtype=dtype)
    pos, bad = torch.tensor([999, 0, 3], dtype=torch.int32), torch.full((3,), -1, dtype=torch.int32)
    out = torch.empty_like(x, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)
    ops.step(x, m, TABLE, pos, noise.address(9, 3), out=out, bad=bad)
    return x, out, bad


def conditional_step(dtype):
    """With everything: two halves of channels, guidance, a learned variance, a known part."""
    x, m = normal(*SHAPE), normal(2 * SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], seed=1, dtype=dtype)
    pos, bad = torch.tensor([999, 0, 3], dtype=torch.int32), torch.full((3,), -1, dtype=torch.int32)
    given = {"known": normal(*SHAPE, seed=2), "mask": normal(*SHAPE, seed=3) > 0, "guidance": torch.tensor([2.0, 0, 9])}
    table = Schedule(variance_type="learned_range").table()
    ops.conditional_step(x, m, table, pos, noise.address(9, 3), guide_variance=True, bad=bad, **given)
    return x, bad


def losses(dtype):
    m, x_0 = normal(*SHAPE, dtype=dtype).requires_grad_(), normal(*SHAPE, seed=1)
    t = torch.tensor([999, 0, 500])
    loss = ops.eps_loss(m, x_0, t, noise.address(9, 3), NOISING, predicts="v_prediction")
    loss.sum().backward()
    table = torch.cat([NOISING, TABLE.rows[:, :4], TABLE.scale[:, None]], 1)
    return loss.detach(), m.grad, ops.x_0_error(m.detach(), x_0, t, noise.address(9, 3), table)


def noised(dtype):
    t, address = torch.tensor([999, 0, 500]), noise.address(2**63, [2**40, 5, 0])
    x_0 = normal(*SHAPE, dtype=dtype)
    z = ops.normal(address, SHAPE[1:], stream=noise.START, t=t)
    return ops.noising(x_0, t, address, NOISING, stream=noise.LIKELIHOOD, dtype=dtype), z


def activations(dtype):
    x, skip, add = normal(*SHAPE, dtype=dtype), normal(*SHAPE, seed=1, dtype=dtype), normal(3, 40, seed=2)
    rows, affine = {"add": add, "scale_shift": normal(3, 80, seed=7)}, (normal(40, seed=3), normal(40, seed=4))
    y = ops.group_norm(x, *affine, 5, eps=1e-5, skip=skip, **rows, act="silu")
    film, residual = normal(3, 80, seed=8), normal(3, 40, *SHAPE[2:], seed=9, dtype=dtype)
    end = {"film": film, "residual": residual}
    return (
        y,
        ops.group_norm(x, *affine, 5, eps=1e-5, skip=skip, act="mish", **end),
        ops.residual(x, skip, normal(20, seed=5), 3.0),
        ops.interleave(skip, normal(5, seed=6)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", [step, conditional_step, losses, noised, activations])
def test_bits_are_the_same_everywhere(kernels, dtype, use):
    with ops.forced_backend("cpp"):
        want = kernels(dtype)
        threads = torch.get_num_threads()
        for isa in INSTRUCTION_SETS:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                try:
                    with use(isa):
                        got = kernels(dtype)
                finally:
                    torch.set_num_threads(threads)
                assert all(map(same_bits, got, want)), (isa, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_norm_depend_on_no_other_entry(dtype):
    x, weight, bias = normal(*SHAPE, dtype=dtype), normal(20, seed=3), normal(20, seed=4)
    film, options = normal(3, 20, seed=5), {"eps": 1e-5, "act": "mish"}
    whole = ops.group_norm(x, weight, bias, 5, film=film, residual=x, **options)
    for n in range(len(x)):
        one = layout.channels_last(x[n : n + 1])
        alone = ops.group_norm(one, weight, bias, 5, film=film[n : n + 1], residual=one, **options)
        assert same_bits(alone, whole[n : n + 1])
