"""Standard normals of many samples: writes them, reads nothing but addresses.

Traffic: 4 bytes per element. Precision: the noise standard.
Spec: fastddpm/core/noise.py::normal. Proof: tests/ops/test_normal.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .launch import launch
from .philox import entry_normals

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread share the work per entry


@triton.jit(do_not_specialize=["stream"])
def normal_kernel(
    z_ptr,  # [N, per_sample] fp32, channels-last
    t_ptr,  # [N] int64: timestep of each entry
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    per_sample,
    stream,
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)
    tl.store(z_ptr + at, entry_normals(n, stream, tl.load(t_ptr + n), block, address_ptr, BLOCK), mask=mask)


def launch_normal(z, t, address, *, stream):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample = z.shape[1:].numel()
    with torch.cuda.device_of(z):
        launch(
            normal_kernel,
            (len(z), triton.cdiv(per_sample, BLOCK)),
            z,
            t,
            address,
            per_sample,
            stream,
            BLOCK=BLOCK,
            **OPTIONS,
        )
