"""One sample of the bundled model, one step at a time and parallel in time: what is timed, and how it is judged.

python -m bench.rounds rounds.png draws how many steps each round takes.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.contenders import SCHEDULE
from bench.layouts import network
from bench.machine import DEVICE, SCALE, same_bits
from fastddpm import Rounds, Sampler
from fastddpm.storage.plots import BLUE, ORANGE, figure_axes

STEPS = {"cuda": 1000, "cpu": 1000, "tiny": 6}[SCALE]
WINDOWS = {"cuda": (8, 16, 32, 64), "cpu": (16, 32), "tiny": (3,)}[SCALE]
SHORT = 60  # steps of the run that is compared: the last ones, from noise
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
    """Compare a short run bit for bit with "off" in the same layout; "law" with one slot, where it equals the loop."""
    start = torch.randn(1, *of.shape, generator=torch.Generator().manual_seed(0))
    options = {"timesteps": range(SHORT - 1, -1, -1), "start": start, "start_timestep": SHORT - 1, "progress": False}
    if window is None:
        return {"compared": "nothing: this is the loop"}
    slots, in_loop = (1, None) if mode == "law" else (window, window)
    return same_bits(*(of.sample(1, window=w, parallel=m, **options) for m, w in ((mode, slots), ("off", in_loop))))


def facts(of: Sampler, mode: str, window: int | None) -> dict[str, Any]:
    """The rounds of one sample."""
    if window is None:
        return {"calls": STEPS}
    draw(of, mode, window, rounds=(rounds := Rounds()))
    return {"calls": rounds.calls, "steps_per_round": rounds.steps_per_round, "full_rounds": rounds.full}


def plot(path: str | os.PathLike[str], found: dict[str, list[int]], window: int) -> None:
    """Plot how many steps each round took against the timestep at which it began."""
    with figure_axes(path) as axes:
        for (name, steps), color in zip(found.items(), (BLUE, ORANGE), strict=True):
            t = STEPS - 1 - np.cumsum([0, *steps[:-1]])
            axes.plot(t, steps, "o", color=color, markersize=3, alpha=0.35)
            mean = np.convolve(steps, np.ones(9), "same") / np.convolve(np.ones(len(steps)), np.ones(9), "same")
            label = f"{name}: {len(steps)} calls, {STEPS / len(steps):.1f} steps per round"
            axes.plot(t, mean, color=color, linewidth=1.8, label=label)
        axes.axhline(window, color="grey", linewidth=0.8, linestyle=":")
        axes.invert_xaxis()
        axes.set(xlabel="timestep t at which the round began", ylabel="steps in the round")
        axes.set_title(f"One garment in {STEPS} steps, a window of {window}; lines: running mean of nine rounds")
        axes.set_ylim(0, 1.35 * window)
        axes.legend(loc="upper right")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rounds", description=__doc__)
    parser.add_argument("out", help="a .png: the steps per round against the timestep")
    parser.add_argument("--window", type=int, default=32, help="slots (default: %(default)s)")
    options = parser.parse_args(arguments)
    of, found = sampler("fp32"), {}
    for mode in ("law", "bits"):
        draw(of, mode, options.window, rounds=(rounds := Rounds()))
        found[mode] = rounds.steps[0]
        print(f"{mode}, window {options.window}: {rounds}, {rounds.full:.0%} of the rounds full")
    plot(options.out, found, options.window)


if __name__ == "__main__":
    main()
