"""`fastddpm verify`: does this machine compute the same function as the reference?

On a GPU the Triton kernels run compiled. On a CPU the C++ kernels run, or torch's functions if there are none; and if
Triton is installed, its interpreter runs the Triton kernels.
"""

import os
import time

import torch

from fastddpm import ops
from fastddpm.core import checks
from fastddpm.evaluate.terms import check_output_channels
from fastddpm.networks.fused import is_own
from fastddpm.sampling.sampler import Sampler
from fastddpm.verify import interpreter, rungs, sampling_rungs
from fastddpm.verify.accuracy import Record
from fastddpm.verify.case import BY_BACKEND, NetworkCase


def verify(
    source: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    device: torch.device | str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    damage: str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Climb the ladder with a checkpoint. With the bundled model it takes a minute or two on two cores.

    Args:
        source: folder or hub id, as `Sampler.from_pretrained` takes it; None: the bundled model.
        variant: of the weights, such as "fp16".
        device: None: the GPU if there is one, else the CPU.
        steps: of the trajectory; None: all T.
        seconds: shorten the trajectory so that all takes about as long. Twenty steps are taken in any case; if there
            is no time for it then, the distribution of samples is skipped.
        damage: a rung, one of RUNGS, whose side under test is made wrong; it must fail.
        progress: show a bar.
    Returns: the comparisons in order; `summary` and `table` format them.
    Raises: ValueError: an argument is not as above, the checkpoint cannot be read, its network does not fit its
        variance_type, or the rung to damage is skipped.
    """
    if damage is not None and damage not in rungs.RUNGS:
        raise ValueError(f"damage is {damage!r}; want one of the rungs {', '.join(rungs.RUNGS)}")
    if seconds is not None:
        seconds = checks.real("seconds", seconds, 0, above=True)
        if steps is not None:
            raise ValueError(f"steps is {steps!r} and seconds is {seconds:g}; give one of the two")
    deadline = None if seconds is None else time.monotonic() + seconds
    sampler = Sampler.from_pretrained(source, variant=variant, device=device, precision="fp32")
    schedule, net = sampler.schedule, sampler.model
    if not is_own(net):
        raise ValueError(
            f"the checkpoint holds a {type(net).__name__} of another package; want one of a UNet2D or UNet1D"
        )
    if (more := net.in_channels - sampler.shape[0]) > 0:
        raise ValueError(
            f"the network takes {more} channels more than a sample has (concat), which the ladder does not have; want "
            "a checkpoint without them"
        )
    check_output_channels(schedule, sampler.shape[0], net.out_channels)
    schedule.table(steps)  # raises if steps is wrong, before anything runs
    implementation = BY_BACKEND[ops.backend(sampler.device)]
    times = sampler.engine.prepared.times
    case = NetworkCase(schedule, sampler.device, implementation, net, sampler.shape, steps, progress, times=times)
    records = _climb_all(case, damage, deadline)
    damaged = [record for record in records if record.rung == damage]
    if damaged and all(record.verdict == "skipped" for record in damaged):
        raise ValueError(f"damage is {damage!r}, but that rung is skipped: {damaged[0].note}; choose another")
    return records


def _climb_all(case: NetworkCase, damage: str | None, deadline: float | None) -> list[Record]:
    """Climb all rungs.

    Args:
        damage: as of `verify`.
        deadline: when to have finished, as time.monotonic counts; None: at any time.
    """
    records: list[Record] = []
    interpreted: list[Record] = []
    for name in case.bar(rungs.RUNGS, "verify"):
        if deadline is not None and name in rungs.OF_SAMPLING and name not in rungs.OF_KERNELS:
            sampling_rungs.fit_into(case, deadline - time.monotonic())
            deadline = None
        records += rungs.climb(name, case, name == damage)
        if name in rungs.OF_KERNELS and case.device.type == "cpu":
            interpreted = interpreted or interpreter.interpreted_records(case.schedule, damage)
            records += [record for record in interpreted if record.rung == name]
    return records
