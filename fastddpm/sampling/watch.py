"""Watching results on a GPU without making it wait."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fastddpm.core.memory import HostCopy
from fastddpm.sampling.buffers import SampleBuffers
from fastddpm.sampling.runner import Runner

OnSteps = Callable[[int, int], object]  # (steps since the last call, samples in their batch)

LOOK_EVERY = 16  # steps on a GPU


class Watch:
    """Returns flags that a device computes, once they can be read without making a GPU wait.

    Reading a flag makes the host wait until the work before it is done, and then the GPU has nothing to do. So flags
    are copied to the host behind the work that is under way, and are returned when `behind` newer ones were copied.

    Args: behind: how many newer copies are made before a copy is returned; 0: return it at once.
    """

    def __init__(self, *, behind: int):
        self.behind = behind
        self.pending: deque[tuple[HostCopy, tuple[Any, ...]]] = deque()

    def look(self, flags: Tensor, *context: Any) -> Iterator[tuple[Any, ...]]:
        """Copy flags. Yields: (flags on the host, *context) of each earlier look that is due."""
        self.pending.append((HostCopy(flags), context))
        yield from self._due(self.behind)

    def finish(self) -> Iterator[tuple[Any, ...]]:
        """Yields: (flags on the host, *context) of each remaining look."""
        yield from self._due(0)

    def _due(self, behind: int) -> Iterator[tuple[Any, ...]]:
        while len(self.pending) > behind:
            copy, context = self.pending.popleft()
            yield copy.wait(), *context


class StepWatch:
    """Stops a run whose network returned NaN or infinity, naming the first bad step and the samples; counts steps.

    On a CPU it looks after each step. On a GPU the host is at most two looks ahead.

    Args:
        occupied: [n] bool, on the CPU: which entries of the batch hold a sample.
        samples: [m] the indices of these samples.
        on_steps: called when steps are known to be good.
    """

    def __init__(self, runner: Runner, occupied: Tensor, samples: Tensor, on_steps: OnSteps):
        self.runner, self.occupied, self.samples, self.on_steps = runner, occupied, samples, on_steps
        self.on_gpu, self.steps = runner.bad.device.type == "cuda", 0
        self.watch = Watch(behind=1)  # no callback: a cycle would keep the runner and its memory

    def after(self, row: int) -> None:
        """Call this after the step at a row of the table."""
        if not self.on_gpu:
            self._judge(self.runner.bad, 1)
            return
        self.steps += 1
        if row % LOOK_EVERY == 0:
            steps, self.steps = self.steps, 0
            for due in self.watch.look(self.runner.bad, steps):
                self._judge(*due)
        if row == 0:
            for due in self.watch.finish():
                self._judge(*due)

    def _judge(self, bad: Tensor, steps: int) -> None:
        if max(bad.tolist()) >= 0:  # rare: selecting the occupied entries would take longer than a small network
            raise_if_bad(self.runner, bad[self.occupied].tolist(), self.samples)
        self.on_steps(steps, len(self.samples))


def raise_if_bad(buffers: SampleBuffers, bad: list[int], samples: Tensor) -> None:
    """Raises: ValueError: a sample has a bad row; the message names the first such step and its samples.

    Args: bad: the row at which a value of each sample first was not finite, or -1; samples: their indices.
    """
    first = max(bad, default=-1)
    if first >= 0:
        named = [sample for sample, row in zip(samples.tolist(), bad, strict=True) if row == first]
        who = "the network" if buffers.conditions.x_0_fn is None else "the network or x_0_fn"
        raise ValueError(
            f"{buffers.describe_step(first)}: {who} returned NaN or infinity for samples {named[:8]}"
            f"{' ...' * (len(named) > 8)}; {buffers.prepared.advice_on_nan()}"
        )
