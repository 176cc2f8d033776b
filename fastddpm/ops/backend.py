"""Which implementation runs the operations on a device: Triton kernels, C++ kernels or torch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

Backend = Literal["triton", "cpp", "torch"]

_forced: Backend | None = None


def backend(device: torch.device | str) -> Backend:
    """What runs the operations on a device.

    Triton kernels on a GPU if Triton is installed, C++ kernels on a CPU if they have been built, else torch.
    """
    return _forced or _chosen(torch.device(device).type)[0]


def backend_reason(device: torch.device | str) -> str:
    """Why `backend` returns what it does, and which instruction set C++ kernels use."""
    return "forced" if _forced else _chosen(torch.device(device).type)[1]


def launcher(operation: str, device: torch.device) -> Callable[..., Any] | None:
    """The function that launches a kernel of an operation on a device; None: torch's operations run."""
    name = backend(device)
    if name == "cpp" and device.type != "cpu":
        raise ValueError(f"{operation}: C++ kernels run on a CPU, but the tensors are on '{device}'")
    return None if name == "torch" else _launcher(name, operation)


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
def _chosen(kind: str) -> tuple[Backend, str]:
    """The backend of a kind of device, and why."""
    if kind == "cuda":
        return ("triton", "a GPU, with Triton installed") if _has_triton() else ("torch", "Triton is not installed")
    if kind != "cpu":
        return "torch", f"there are no kernels for '{kind}'"
    from fastddpm.kernels.cpu.native import native  # type: ignore[import-not-found]

    found = native()
    return ("torch", found.text) if found.module is None else ("cpp", f"C++ kernels, instruction set {found.text}")


@cache
def _launcher(name: Backend, operation: str) -> Callable[..., Any]:
    file = "cpu.launch" if name == "cpp" else operation.removesuffix("_backward")
    return getattr(import_module(f"fastddpm.kernels.{file}"), f"launch_{operation}")


def _has_triton() -> bool:
    return find_spec("triton") is not None
