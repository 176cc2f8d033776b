"""Where a run begins: with pure noise, with a state x_t, or with a noised x_0; and which steps remain to be taken."""

import math
from typing import Any

from torch import Tensor

from fastddpm.core.checks import is_real, shown, whole
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import StepTable

LEAST_SIGNAL = 0.05  # sqrt(abar_t): a state with less of x_0 is almost pure noise


def remaining_steps(
    table: StepTable,
    schedule: Schedule,
    *,
    start: Any = None,
    start_timestep: Any = None,
    init: Any = None,
    strength: Any = None,
    listed: bool = False,
) -> tuple[StepTable, Tensor | None]:
    """The steps that a run takes.

    Args:
        table: all steps; listed: whether the user listed its timesteps.
        start, ..., strength: as in `Sampler.batches`.
    Returns: the last steps of the table; and [2] float32, sqrt(abar_t) and sqrt(1 - abar_t) of the first of them if
        there is an init.
    Raises: ValueError: the arguments do not fit each other; or the list begins late, but without a state.
    """
    for name, value, needed, other in (
        ("start", start, "start_timestep", start_timestep),
        ("init", init, "strength", strength),
    ):
        if (value is None) != (other is None):
            present, missing = (needed, name) if value is None else (name, needed)
            raise ValueError(f"{present} is given, but {missing} is missing; give both: start is x_t, init is x_0")
    if start is not None and init is not None:
        raise ValueError("start and init are both given; want one: start is x_t, init is an x_0 that is noised")
    if start is not None:
        return table.last(_steps_from(table, start_timestep)), None
    if init is not None:
        steps = steps_of_strength(len(table), strength)
        return table.last(steps), schedule.noising_table()[int(table.timesteps[steps - 1])]
    if listed:
        _check_begins_with_noise(table, schedule)
    return table, None


def _steps_from(table: StepTable, start_timestep: Any) -> int:
    visited = table.timesteps.tolist()
    t = whole("start_timestep", start_timestep, 0, table.num_train_timesteps - 1)
    if t not in visited:
        near = sorted(sorted(visited, key=lambda other: abs(other - t))[:2])
        raise ValueError(
            f"start_timestep is {t}, which these steps do not visit; want a visited one, such as "
            f"{' or '.join(map(str, near))}, or list the timesteps from {t} on: timesteps=[{t}, ...]"
        )
    return visited.index(t) + 1


def steps_of_strength(steps: int, strength: Any) -> int:
    """How many of so many steps are taken. Raises: ValueError: strength is not a share, or less than a step."""
    if not is_real(strength) or not 0 < strength <= 1:
        raise ValueError(f"strength is {shown(strength)}; want a number, 0 < strength <= 1: the share of the steps")
    taken = int(steps * strength + 1e-9)  # the product may be a whole number but for rounding
    if not taken:
        raise ValueError(f"strength is {strength}, less than one of {steps} steps; want at least {1 / steps:.3g}")
    return taken


def with_visits(steps: int, resample: int) -> int:
    """How many steps a run of so many timesteps takes, if it visits each but the last `resample` times."""
    return resample * (steps - 1) + 1


def _check_begins_with_noise(table: StepTable, schedule: Schedule) -> None:
    """A run that begins with pure noise should begin where x_t is almost that, or as near as its spacing allows."""
    visited = table.timesteps.long()
    first, T = int(visited[-1]), table.num_train_timesteps
    gap = first - int(visited[-2]) if len(visited) > 1 else 0
    signal = math.exp(schedule.log_alphas_cumprod[first] / 2)
    if T - 1 - first > 1.5 * gap and signal > LEAST_SIGNAL:
        raise ValueError(
            f"timesteps begins late: its first timestep is {first} of {T}, where x_t still contains {signal:.2g} x_0 "
            f"and is not pure noise; give the state there (start=x_t, start_timestep={first}), or an x_0 to be "
            f"noised (init=x_0, strength=1.0), or begin near {T - 1}"
        )
