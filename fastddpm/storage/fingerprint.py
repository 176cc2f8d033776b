"""What decides the bits of a result, so that work is gone on with only as the same: weights, device, versions."""

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
    """Hexadecimal SHA-256 of a network: its modules as they print, its parameters and buffers.

    Of these names, shapes, dtypes and values. What a module has besides, and does not print, is not seen.
    """
    digest = hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(network)).encode())  # which each process has its own
    for name, value in chain(network.named_parameters(), network.named_buffers()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and the software that compute: with others a network may round otherwise."""
    versions = {"fastddpm": __version__, "torch": str(torch.__version__)}
    if device.type != "cuda":
        return {"device": f"cpu, {torch.backends.cpu.get_cpu_capability()}", "versions": versions}
    return {"device": torch.cuda.get_device_name(device), "versions": {**versions, "triton": installed("triton")}}


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What was given before where it is not what is given now, of nested mappings as well; None: nothing."""
    changed = {name: before.get(name) for name in {**before, **now} if before.get(name) != now.get(name)}
    for name, value in changed.items():
        if isinstance(value, dict) and isinstance(now.get(name), dict):
            changed[name] = differing(value, now[name])
    return changed
