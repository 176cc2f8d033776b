"""Sums in a specified order: a binary tree over the elements, neighbours first, zeros beyond the end.

A block of 2^k elements is a subtree: the same tree adds up the sums of the blocks, so the block size changes no bit.
Spec: fastddpm/reference/diffusion.py::tree_sum.
Proof: tests/ops/test_eps_loss.py (bits), tests/kernels/test_compiled.py.
"""

import triton
import triton.language as tl

from .block import block_of_entry
from .launch import launch

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def tree_sum(x, BLOCK: tl.constexpr):
    """The sum of [BLOCK], a scalar; BLOCK is a power of two.

    Each level reduces pairs, whose order does not matter: an addition in a thread, a shuffle between threads. With
    tl.split instead, Triton 3.6 gave every thread all elements of the block, and spilled 18 kB.
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
    n, block, at, mask = block_of_entry(count, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + n * tl.num_programs(1) + block, tree_sum(x, BLOCK))


def launch_tree_sum(x):
    """[N, count] fp32 contiguous, count >= 1 -> [N]: one launch per level of blocks, none if count is 1."""
    while x.shape[1] > 1:
        out = x.new_empty(len(x), triton.cdiv(x.shape[1], BLOCK))
        launch(tree_sum_kernel, tuple(out.shape), out, x, x.shape[1], BLOCK=BLOCK, **OPTIONS)
        x = out
    return x[:, 0]
