"""Where a scheduler's noise comes from: a generator of torch, addressed noise of a seed, or nowhere."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddpm.core import noise as standard
from fastddpm.core.checks import is_whole
from fastddpm.core.memory import send
from fastddpm.diffusers.tables import CPU

Noise = str | int  # "generator", "philox", a seed, or False
Generators = torch.Generator | list[torch.Generator] | None

MAX_PENDING = 8  # host draws that a GPU has not copied yet; each holds pinned memory

_pending: "deque[torch.cuda.Event]" = deque()  # one for each such draw


def checked_noise(noise: Any) -> Noise:
    """Return noise. Raises: ValueError: the attribute `noise` of a `Scheduler` does not allow it."""
    is_seed = is_whole(noise) and 0 <= int(noise) < 1 << 64
    if noise is False or is_seed or (isinstance(noise, str) and noise in ("generator", "philox")):
        return noise
    raise ValueError(f"noise is {noise!r}; want 'generator', 'philox', a seed (0 <= seed < 2^64), or False for none")


def draw_normals(shape: Any, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw standard normals as diffusers does. For a CPU generator and a GPU the host does not wait for the copy."""
    first = generator[0] if isinstance(generator, list) else generator
    if device.type == "cuda" and first is not None and first.device.type == "cpu":
        z = send(randn_tensor(shape, generator=generator, device=CPU, dtype=dtype), device)
        _pending.append(torch.cuda.current_stream(device).record_event())
        if len(_pending) > MAX_PENDING:
            _pending.popleft().synchronize()
        return z
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


class RunAddresses(NamedTuple):
    """The noise addresses of a run.

    Attributes:
        key: what they depend on; it holds the `id` of some objects.
        address: [n, 2] int64: (seed, sample index) of each entry of the batch.
        referenced: those objects, kept alive so that no other object gets their `id`.
    """

    key: tuple[Any, ...]
    address: Tensor
    referenced: tuple[Any, ...]


def new_addresses(n: int, generators: Sequence[torch.Generator | None], noise: Noise) -> Tensor:
    """(seed, sample index) of each entry of a batch: [n, 2] int64.

    Args:
        generators: with "philox" one draws the seed of all entries; several draw one seed each for their entries, which
            all are sample 0 of their seed.
        noise: "philox", or the seed.
    """
    if noise != "philox":
        return standard.address(int(noise), n)
    if len(generators) == 1:
        seeds = _draw_seed(generators[0]).expand(n)
        return torch.stack([seeds, torch.arange(n, device=seeds.device)], 1)
    seeds = torch.cat([_draw_seed(generators[i]) for i in range(n)])
    return torch.stack([seeds, torch.zeros_like(seeds)], 1)


def _draw_seed(generator: torch.Generator | None) -> Tensor:
    """Draw a seed from a generator, or from torch's global one on the CPU: [1] int64."""
    device = CPU if generator is None else generator.device
    return torch.randint((1 << 63) - 1, (1,), generator=generator, device=device)
