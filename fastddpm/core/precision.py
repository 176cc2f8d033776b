"""The device and the precision that a network computes in, resolved once and passed on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastddpm.core.checks import one_of

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
    def resolve(cls, device: torch.device | str | None = None, precision: str = "auto") -> "Compute":
        """Choose a device or a precision that is left open, and check the other.

        Args:
            device: None: the GPU if there is one, else the CPU.
            precision: one of PRECISIONS, or "auto": bf16 where the device computes it natively, else fp32.
        Raises: ValueError: the device or the precision is unknown, or this machine does not have it.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device is {device!r}; want 'cpu', 'cuda' or 'cuda:N'") from error
        if device.type not in DEVICES or (device.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device is '{device}', which this machine does not have; use 'cpu'")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # which may differ in another thread
        one_of("precision", precision, ("auto", *PRECISIONS))
        if precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision is 'tf32', which '{device}' does not have; use fp32 or bf16")
        if precision == "auto":
            precision = "bf16" if has_native_bf16(device) else "fp32"
        return cls(device, precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of convolutions and matrix products."""
        return PRECISIONS[self.precision]

    def arithmetic(self) -> AbstractContextManager[None]:
        """A context in which products on a GPU have this precision: see `arithmetic`."""
        return arithmetic(self.precision, self.device)


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """In this context float32 on a GPU is IEEE float32, or TF32 if that is the precision.

    The end of the context restores torch's settings. By default cuDNN rounds the inputs of convolutions to TF32. The
    settings are those of the whole process, so one thread at a time holds them.
    """
    if device.type != "cuda":
        yield
        return
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
