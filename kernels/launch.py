"""Launches kernels or, in the context `compiling`, compiles them on all cores for later launches."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import triton

_compiling = ContextVar("compiling", default=False)


def launch(kernel, grid, *args, **kwargs):
    """Call kernel[grid](*args, **kwargs); in `compiling`, only compile the kernel."""
    if _compiling.get():
        kernel.run(*args, grid=grid, warmup=True, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


@contextmanager
def compiling() -> Iterator[None]:
    """In this context `launch` compiles a kernel instead of running it. All are compiled when the context ends.

    A kernel takes a core about a second, and a network has dozens.
    """
    # errors are ignored because the later launch raises them again; one raised here would leave Triton in this mode
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)
