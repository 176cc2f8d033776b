"""Which implementation runs the operations on a device: Triton kernels or torch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["triton", "torch"]

_forced: Backend | None = None


def backend(device: torch.device | str) -> Backend:
    """What runs the operations on a device: the kernels on a GPU where Triton is installed, torch everywhere else."""
    if _forced is not None:
        return _forced
    return "triton" if torch.device(device).type == "cuda" and _has_triton() else "torch"


@contextmanager
def forced_backend(name: Backend) -> Iterator[None]:
    """In this context `backend` returns name for every device, in all threads of the process.

    Raises: ValueError: name is not a backend.
    """
    global _forced
    if name not in get_args(Backend):
        raise ValueError(f"forced_backend: name is {name!r}; want one of {', '.join(get_args(Backend))}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def compiling(device: torch.device) -> AbstractContextManager[None]:
    """A context in which kernels are compiled, on all cores at once, but not launched: nothing is computed."""
    if device.type != "cuda" or backend(device) != "triton":
        return nullcontext()
    from fastddpm.kernels.launch import compiling  # type: ignore[import-not-found]  # the installation maps it

    return compiling()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
