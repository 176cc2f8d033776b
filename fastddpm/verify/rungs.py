"""The rungs of the ladder, and how one is climbed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastddpm.verify import forward_rung, kernel_rungs, sampling_rungs
from fastddpm.verify.accuracy import Record
from fastddpm.verify.case import Case

# from the bottom up; called as rung(case, damage), where damage makes the side under test wrong
RUNGS: dict[str, Callable[[Any, bool], Iterator[Record]]] = {
    "words": kernel_rungs.words_rung,
    "noise": kernel_rungs.noise_rung,
    "step": kernel_rungs.step_rung,
    "noising": kernel_rungs.noising_rung,
    "forward": forward_rung.forward_rung,
    "loss": kernel_rungs.loss_rung,
    "step64": kernel_rungs.step64_rung,
    "norm": kernel_rungs.norm_rung,
    "residual": kernel_rungs.residual_rung,
    "unet": sampling_rungs.unet_rung,
    "engines": sampling_rungs.engines_rung,
    "trajectory": sampling_rungs.trajectory_rung,
    "batch": sampling_rungs.batch_rung,
    "parallel": sampling_rungs.parallel_rung,
    "distribution": sampling_rungs.distribution_rung,
}
OF_KERNELS = ("noise", "step", "noising", "loss", "step64", "norm", "residual")  # also run in Triton's interpreter
OF_SAMPLING = ("step", "step64", "engines", "trajectory", "batch", "parallel", "distribution")


def climb(name: str, case: Case, damage: bool) -> list[Record]:
    """The comparisons of a rung. An exception counts as a failed one, after those made before it."""
    records: list[Record] = []
    try:
        with torch.no_grad():
            for record in RUNGS[name](case, damage):
                records.append(record)
    except Exception as error:
        note = f"{type(error).__name__}: {' '.join(str(error).split())}"
        records.append(Record(name, "could not be compared", math.nan, 0, note))
    return records
