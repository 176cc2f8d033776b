"""The device and the precision that a network computes in, resolved once and passed on."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastddpm.core.checks import is_whole, one_of, shown

DEVICES = ("cpu", "cuda")
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_settings = threading.RLock()


@dataclass(frozen=True)
class Compute:
    """Where, and in which precision, a network computes.

    Attributes:
        device: a CPU, or one CUDA device.
        precision: one of PRECISIONS.
    """

    device: torch.device
    precision: str

    @classmethod
    def resolve(cls, device: torch.device | str | int | None = None, precision: str = "auto") -> "Compute":
        """Choose a device or a precision that is left open, and check the other.

        Args:
            device: a device or its name, or the number of a GPU; None: the GPU if there is one, else the CPU.
            precision: one of PRECISIONS, or "auto": bf16 where the device computes it natively, else fp32.
        Raises: ValueError: the device or the precision is unknown, or this machine does not have it.
        """
        device = _device(device)
        one_of("precision", precision, ("auto", *PRECISIONS))
        if precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision is 'tf32', which '{device}' does not have; use fp32 or bf16")
        if precision == "auto":
            precision = "bf16" if has_native_bf16(device) else "fp32"
        return cls(device, precision)

    def __reduce__(self) -> Any:
        return _on_this_machine, (str(self.device), self.precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of convolutions and matrix products."""
        return PRECISIONS[self.precision]

    def arithmetic(self) -> AbstractContextManager[None]:
        """A context in which products on a GPU have this precision: see `arithmetic`."""
        return arithmetic(self.precision, self.device)


def _on_this_machine(device: str, precision: str) -> Compute:
    """What a pickled `Compute` becomes: the same, or one on a CPU, with a warning, if this machine has no such GPU."""
    try:
        return Compute.resolve(device, precision)
    except ValueError as error:
        compute = Compute(torch.device("cpu"), "fp32" if precision == "tf32" else precision)
        warnings.warn(f"{error}; it is now on the CPU, in {compute.precision}", stacklevel=2)
        return compute


def named_device(device: Any) -> torch.device:
    """A device by its name, or a GPU by its number. Raises: ValueError: it is neither."""
    try:
        if not is_whole(device) and not isinstance(device, str | torch.device):
            raise TypeError
        return torch.device("cuda", int(device)) if is_whole(device) else torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"device is {shown(device)}; want 'cpu', 'cuda' or 'cuda:N'") from error


def _device(device: Any) -> torch.device:
    """The device that an argument names. Raises: ValueError: it names none, or one that this machine does not have."""
    has_cuda = torch.cuda.is_available()
    if device is None:
        device = "cuda" if has_cuda else "cpu"
    found = named_device(device)
    missing = found.type not in DEVICES or (found.type == "cuda" and not has_cuda)
    if missing or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is '{found}', which this machine does not have; use 'cpu'")
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())  # which may differ in another thread
    return found


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """In this context float32 on a GPU is IEEE float32, or TF32 if that is the precision.

    The end of the context restores torch's settings. By default cuDNN rounds the inputs of convolutions to TF32. The
    settings are those of the whole process, so one thread at a time holds them.
    """
    return _arithmetic_of_a_gpu(precision) if device.type == "cuda" else nullcontext()


@contextmanager
def arithmetic_as_set(device: torch.device) -> Iterator[None]:
    """In this context products on a GPU have the precision of torch's settings, which no `arithmetic` changes."""
    with _settings if device.type == "cuda" else nullcontext():
        yield


def float32_settings() -> list[Any]:
    """The values of torch's settings that decide how products of float32 are computed on a GPU."""
    return [get() for get, _, _ in _float32_settings(tf32=False)]


@contextmanager
def _arithmetic_of_a_gpu(precision: str) -> Iterator[None]:
    with _settings, ExitStack() as restore:
        for get, set_, value in _float32_settings(precision == "tf32"):
            restore.callback(set_, get())
            set_(value)
        yield


def _float32_settings(tf32: bool) -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """(get, set, value) of torch's settings, by their older names, or by the newer ones if those have been used."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    older: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high" if tf32 else "highest"),
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), tf32),
    ]
    try:
        for get, _, _ in older:
            get()
        return older
    except RuntimeError:
        owners, value = (matmul, cudnn.conv, cudnn.rnn), "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
        name = "fp32_precision"
        return [(partial(getattr, owner, name), partial(setattr, owner, name), value) for owner in owners]
