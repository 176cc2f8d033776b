"""Copies to a device that do not make the host wait, and what to do when a device runs out of memory."""

import warnings

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """Return x on a device. The host does not wait for a GPU: the copy is made from pinned memory."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class HostCopy:
    """A copy of a tensor on the host, queued behind the work that a GPU is doing; `wait` returns it."""

    def __init__(self, x: Tensor):
        self.event: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            self.host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            self.event = torch.cuda.current_stream(x.device).record_event()
        else:
            self.host = x.clone()

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.host


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory; TorchScript and ONNX Runtime raise their own types."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "Failed to allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def halved(size: int, failure: str, *, stacklevel: int) -> int:
    """Return the batch size to try after a batch of `size`, at least 2, ran out of memory; issues a warning.

    Args:
        failure: a text about the failure, with which the warning ends.
        stacklevel: of the warning, as `warnings.warn` counts it from the caller.
    """
    size = (size + 1) // 2
    warnings.warn(f"out of memory; continuing with batches of {size}. {failure}", stacklevel=stacklevel + 1)
    return size
