"""The fingerprint that decides whether a job may resume: weights, device and versions, which decide its bits."""

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from fastddpm._version import __version__


def weights_sha256(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of a network: its repr, and the name, shape, dtype and values of parameters and buffers.

    Other attributes of a module count only if its repr shows them.
    """
    without_addresses = re.sub(" at 0x[0-9a-f]+", "", repr(network))  # they differ between processes
    digest = hashlib.sha256(without_addresses.encode())
    for name, value in chain(network.named_parameters(), network.named_buffers()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software of this process; on others a network may round differently."""
    versions = {"fastddpm": __version__, "torch": str(torch.__version__)}
    if device.type != "cuda":
        return {"device": f"cpu, {torch.backends.cpu.get_cpu_capability()}", "versions": versions}
    return {"device": torch.cuda.get_device_name(device), "versions": {**versions, "triton": installed("triton")}}


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ, with their value before, or None if they were missing; nested mappings field by field."""
    changed = {name: before.get(name) for name in {**before, **now} if before.get(name) != now.get(name)}
    for name, value in changed.items():
        if isinstance(value, dict) and isinstance(now.get(name), dict):
            changed[name] = differing(value, now[name])
    return changed
