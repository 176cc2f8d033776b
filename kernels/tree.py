"""Sums whose order is written down: a binary tree over the elements, neighbours first, zeros beyond the end.

A block of a power of two is a subtree, so the sums of blocks are summed by the same tree and the size of a block
changes no bit. Spec: reference/diffusion.py::tree_sum. Proof: tests/ops/test_eps_loss.py (bits),
tests/kernels/test_compiled.py.
"""

import triton
import triton.language as tl

from .launch import launch

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def tree_sum(x, BLOCK: tl.constexpr):
    """The sum of [BLOCK], a power of two: a scalar.

    A level is a reduction of two elements, whose order does not matter: in a thread an addition, between threads a
    shuffle. By tl.split, Triton 3.6 gave all elements of a block to each thread, and spilled 18 kB.
    """
    if BLOCK == 1:
        return tl.sum(x, 0)  # of one element
    else:
        return tree_sum(tl.sum(x.reshape(BLOCK // 2, 2), 1), BLOCK // 2)


@triton.jit
def tree_sum_kernel(
    out_ptr,  # [N, blocks] fp32
    x_ptr,  # [N, count] fp32
    count,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n * count + block * BLOCK + offs, mask=offs < count - block * BLOCK, other=0.0)
    tl.store(out_ptr + n * tl.num_programs(1) + block, tree_sum(x, BLOCK))


def launch_tree_sum(x):
    """[N, count] fp32 contiguous, count >= 1 -> [N]: a launch for each level of blocks, none where count is 1."""
    while x.shape[1] > 1:
        out = x.new_empty(len(x), triton.cdiv(x.shape[1], BLOCK))
        launch(tree_sum_kernel, tuple(out.shape), out, x, x.shape[1], BLOCK=BLOCK, **OPTIONS)
        x = out
    return x[:, 0]
