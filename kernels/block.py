"""What the programs of a grid (entries, blocks of an entry) have in common."""

import triton
import triton.language as tl


@triton.jit
def block_of_entry(per_sample, BLOCK: tl.constexpr):
    """The block of BLOCK consecutive elements of one entry that this program computes.

    Args: per_sample: elements of an entry.
    Returns: n: the entry, int64; block: which block of the entry, int32; at: [BLOCK] int64, the offsets of its elements
        in [N, per_sample]; mask: [BLOCK], which of them exist.
    """
    n = tl.program_id(0).to(tl.int64)  # axis 0: axes 1 and 2 stop at 65,535
    block = tl.program_id(1)
    offs = tl.arange(0, BLOCK)
    mask = offs < per_sample - block * BLOCK
    at = n * per_sample + block * BLOCK + offs
    return n, block, at, mask
