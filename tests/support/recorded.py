"""Loops that other projects recorded, run by our sampler with their noises."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import Sampler, ops
from fastddpm.core import noise


def replay(
    sampler: Sampler, expected: Mapping[str, Tensor], prefix: str, monkeypatch: pytest.MonkeyPatch, /, **options: Any
) -> tuple[Tensor, list[int], list[Tensor]]:
    """(the samples, the timesteps visited, the states before each step).

    Args: expected: `PREFIX_xT`, `PREFIX_t` and `PREFIX_z`, the noises in the order of the steps; the last may lack one.
    """
    visited = [int(t) for t in expected[f"{prefix}_t"]]
    noises = dict(zip(visited, expected[f"{prefix}_z"], strict=False))

    def normal(address: Tensor, shape: object, *, stream: int, t: Tensor) -> Tensor:
        if stream == noise.START:
            return expected[f"{prefix}_xT"][address[:, 1]]
        assert stream == noise.STEP
        none = torch.zeros_like(expected[f"{prefix}_xT"])
        return torch.stack([noises.get(int(each), none)[i] for each, i in zip(t, address[:, 1], strict=True)])

    seen, states = [], []

    def callback(step: int, t: int, x_0: Tensor, indices: Tensor, x_t: Tensor) -> None:
        seen.append(t)
        states.append(x_t)

    monkeypatch.setattr(noise, "normal", normal)
    with ops.forced_backend("torch"):
        x = sampler.sample(2, callback=callback, progress=False, **options)
    return x, seen, states
