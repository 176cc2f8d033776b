"""A checked call of `Sampler.batches`, and how it is carried out batch by batch."""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastddpm.core.table import StepTable
from fastddpm.sampling.batches import InOrder, evaluating, size_after_failure, split
from fastddpm.sampling.beginning import with_visits
from fastddpm.sampling.conditions import Conditions
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.loop import Observe, reverse_process
from fastddpm.sampling.own_network import takes
from fastddpm.sampling.runner import Runner
from fastddpm.sampling.watch import OnSteps, StepWatch

Callback = Callable[..., object]  # (step, t, x_0, sample indices), and x_t for one with an argument of this name


@dataclass(eq=False)
class Run:
    """What to draw.

    Attributes:
        table: the steps.
        addresses: [N, 2] int64: (seed, sample index).
        conditions: what the samples are given.
        size: of a batch at most; halved if memory runs out.
        micro_batch: 0, or the fixed number of entries of every batch.
        frames: rows of the table before whose steps the states are kept.
        progress, callback: as in `Sampler.batches`.
        on_smaller: called with the new size if memory runs out.
    """

    table: StepTable
    addresses: Tensor
    conditions: Conditions
    size: int
    micro_batch: int = 0
    frames: frozenset[int] = frozenset()
    progress: bool | OnSteps = True
    callback: Callback | None = None
    on_smaller: Callable[[int], object] = field(default=lambda size: None)

    def batches(self, engine: Engine) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Draw the samples; yields as `Sampler.batches`."""
        from tqdm import tqdm

        samples = self.addresses[:, 1]
        size = min(self.size, max(1, len(samples)))
        waiting, in_order = deque(split(samples, size, self.micro_batch)), InOrder(samples)
        silent, steps = callable(self.progress) or not self.progress, self._steps()
        bar = tqdm(total=len(waiting) * steps, desc="sample", unit="step", disable=silent)
        on_steps = self.progress if callable(self.progress) else lambda steps, _: bar.update(steps)
        with bar, evaluating((engine.model, self.conditions.x_0_fn)):
            while waiting:
                batch, done = waiting.popleft(), bar.n
                try:
                    x = self._draw(engine, batch, bar, on_steps)
                except torch.OutOfMemoryError as error:
                    failure, x = str(error).splitlines()[0], None  # the error itself would keep the memory
                if x is None:
                    size = size_after_failure(engine, len(batch), failure, self.micro_batch)
                    if size < len(batch):
                        self.on_smaller(size)
                    waiting = deque(torch.cat([batch, *waiting]).split(size))
                    bar.n, bar.total = done, done + len(waiting) * steps
                else:
                    yield from in_order.put(batch, x)

    def _steps(self) -> int:
        """How many steps a batch takes."""
        return with_visits(len(self.table), self.conditions.resample)

    def _draw(self, engine: Engine, batch: Tensor, bar: Any, on_steps: OnSteps) -> Tensor:
        """All steps of one batch: [n, *shape] float32 on the CPU, contiguous, without empty entries."""
        occupied = batch >= 0
        places = batch.clamp(min=0)  # an empty entry computes the first sample; the result is dropped
        capture_step = self.callback is None and self.conditions.x_0_fn is None
        capture = engine.captures(len(self.table))
        with engine.runner(len(batch), capture=capture, form=self.conditions.form) as runner:
            if engine.compiles:
                bar.set_description("compile")  # which takes minutes
            runner.load(
                self.table, self.addresses[places], conditions=self.conditions.take(places), capture_step=capture_step
            )
            bar.set_description("sample", refresh=False)
            samples = self.addresses[places, 1][occupied]
            watch = StepWatch(runner, occupied, samples, on_steps)
            observe = None if self.callback is None else _observer(self.callback, runner, occupied, samples)
            frames: list[Tensor] = []
            keep = lambda row: frames.append(runner.x.clone()) if row in self.frames else None
            resample = self.conditions.resample
            try:
                for row in reverse_process(runner, observe, before=keep if self.frames else None, resample=resample):
                    watch.after(row)
            finally:
                runner.forget_functions()  # a runner is kept for the next batch of its size
            x = torch.stack([*frames, runner.x], 1) if frames else runner.x
            x = x.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return x if occupied.all() else x[occupied]


def _observer(callback: Callback, runner: Runner, occupied: Tensor, samples: Tensor) -> Observe:
    """A function that calls the callback."""
    sees_x_t, steps = takes(callback, "x_t"), 0

    def observe(row: int, x_0: Tensor) -> None:
        nonlocal steps
        occupied_of = lambda x: x.contiguous() if occupied.all() else x[occupied.to(x.device)].contiguous()
        more = {"x_t": occupied_of(runner.x.clone())} if sees_x_t else {}
        callback(steps, runner.timestep(row), occupied_of(x_0.clone()), samples.clone(), **more)
        steps += 1

    return observe
