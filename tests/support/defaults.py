"""The process's defaults for new tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def defaults(dtype: torch.dtype, device: str | None = None) -> Iterator[None]:
    """Set torch's default dtype and device; the block's end sets them back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
