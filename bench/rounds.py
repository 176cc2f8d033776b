"""One sample of the bundled model, step after step and parallel in time: what is timed, and how it is judged."""

from typing import Any

import torch
from torch import Tensor

from bench.contenders import SCHEDULE
from bench.layouts import network
from bench.machine import DEVICE, SCALE, same_bits
from fastddpm import Rounds, Sampler

STEPS = {"cuda": 1000, "cpu": 1000, "tiny": 6}[SCALE]
WINDOWS = {"cuda": (8, 16, 32, 64), "cpu": (16, 32), "tiny": (3,)}[SCALE]
SHORT = 60  # steps of the judgement: the last ones, from noise
LAW_PRECISION = "bf16" if DEVICE.type == "cuda" else "fp32"
CASES = [
    ("off", LAW_PRECISION, None),
    ("off", "fp32", None),
    *(("law", LAW_PRECISION, window) for window in WINDOWS),
    *(("bits", "fp32", window) for window in WINDOWS),
]  # (mode, precision, window)
CASES = list(dict.fromkeys(CASES))


def sampler(precision: str) -> Sampler:
    return Sampler(network("shipped"), SCHEDULE, device=DEVICE, precision=precision)


def draw(of: Sampler, mode: str, window: int | None, **options: Any) -> Tensor:
    """Draw one sample with all steps."""
    return of.sample(1, steps=STEPS, parallel=mode, window=window, progress=False, **options)


def judge(of: Sampler, mode: str, window: int | None) -> dict[str, float]:
    """The bits of a short run are those of the loop in the same layout; of "law", for one slot."""
    start = torch.randn(1, *of.shape, generator=torch.Generator().manual_seed(0))
    options = {"timesteps": range(SHORT - 1, -1, -1), "start": start, "start_timestep": SHORT - 1, "progress": False}
    slots, in_loop = (1, None) if mode == "law" else (window, window)
    return same_bits(*(of.sample(1, window=w, parallel=m, **options) for m, w in ((mode, slots), ("off", in_loop))))


def facts(of: Sampler, mode: str, window: int | None) -> dict[str, Any]:
    """The rounds of one sample."""
    if window is None:
        return {"calls": STEPS}
    draw(of, mode, window, rounds=(rounds := Rounds()))
    return {"calls": rounds.calls, "steps_per_round": rounds.steps_per_round, "full_rounds": rounds.full}
