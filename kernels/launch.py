"""How kernels are launched; or, in `compiling`, compiled on all cores for the launches that are to come."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import triton

_compiling = ContextVar("compiling", default=False)


def launch(kernel, grid, *args, **kwargs):
    if _compiling.get():
        kernel.run(*args, grid=grid, warmup=True, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


@contextmanager
def compiling() -> Iterator[None]:
    """What is launched in this context is not run but compiled, by the end of the context at the latest.

    A kernel takes a core a second, a network has dozens.
    """
    # an error is the launch's to tell: raised here, it would leave the mode on
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)
