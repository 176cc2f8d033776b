"""Runs the C++ kernels with one of this CPU's instruction sets."""

from contextlib import contextmanager

import pytest

from fastddpm.kernels.cpu.native import native

INSTRUCTION_SETS = native().module.supported() if native().module else []
BFLOAT16 = [isa for isa in INSTRUCTION_SETS if isa in ("amx", "avx512_bf16")]  # which multiply bfloat16


@pytest.fixture
def use():
    """A context in which the kernels use an instruction set."""

    @contextmanager
    def using(isa):
        module, before = native()
        module.use(isa)
        try:
            yield
        finally:
            module.use(before)

    return using
