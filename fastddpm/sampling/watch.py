"""Watching results on a GPU without making it wait."""

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastddpm.core.memory import HostCopy
from fastddpm.sampling.runner import Runner

OnSteps = Callable[[int, int], object]  # (steps since the last call, samples in their batch)

LOOK_EVERY = 16  # steps on a GPU


class Watch:
    """Judges flags that a device computes.

    Reading a flag makes the host wait until the work before it is done, and then the GPU has nothing to do. So flags
    are copied to the host behind the work that is under way, and are judged when `behind` newer ones have been copied.

    Args:
        judge: called as judge(flags on the host, *context); raises if they are bad.
        behind: how many looks later a look is judged; 0 judges at once.
    """

    def __init__(self, judge: Callable[..., None], *, behind: int):
        self.judge, self.behind = judge, behind
        self.pending: deque[tuple[HostCopy, tuple[Any, ...]]] = deque()

    def look(self, flags: Tensor, *context: Any) -> None:
        """Copy flags, to be judged later; judge those that are due."""
        self.pending.append((HostCopy(flags), context))
        while len(self.pending) > self.behind:
            self._judge_oldest()

    def finish(self) -> None:
        """Judge all that is left."""
        while self.pending:
            self._judge_oldest()

    def _judge_oldest(self) -> None:
        copy, context = self.pending.popleft()
        self.judge(copy.wait(), *context)


class StepWatch:
    """Stops a run whose network returned NaN or infinity, naming the first bad step and the samples; counts steps.

    On a GPU the host is at most two looks ahead.

    Args:
        occupied: [n] bool, on the CPU: which entries of the batch hold a sample.
        samples: [m] the indices of these samples.
        on_steps: called when steps are known to be good.
    """

    def __init__(self, runner: Runner, occupied: Tensor, samples: Tensor, on_steps: OnSteps):
        self.runner, self.occupied, self.samples, self.on_steps = runner, occupied, samples, on_steps
        on_gpu = runner.bad.device.type == "cuda"
        self.every, self.steps = (LOOK_EVERY if on_gpu else 1), 0
        self.watch = Watch(self._judge, behind=1 if on_gpu else 0)

    def after(self, row: int) -> None:
        """Call this after the step at a row of the table."""
        self.steps += 1
        if row % self.every == 0:
            self.watch.look(self.runner.bad, self.steps)
            self.steps = 0
        if row == 0:
            self.watch.finish()

    def _judge(self, bad: Tensor, steps: int) -> None:
        bad = bad[self.occupied]
        first = int(bad.max())
        if first >= 0:
            named = self.samples[bad == first].tolist()
            raise ValueError(
                f"{self.runner.describe_step(first)}: the network returned NaN or infinity for samples {named[:8]}"
                f"{' ...' * (len(named) > 8)}; try precision fp32, or another checkpoint"
            )
        self.on_steps(steps, len(self.samples))
