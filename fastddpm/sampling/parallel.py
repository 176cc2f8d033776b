"""A checked call of `Sampler.batches` that samples parallel in time: chains run side by side, each in rounds."""

import warnings
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastddpm.core.checks import one_of, shown, whole
from fastddpm.core.names import PARALLEL
from fastddpm.core.table import StepTable
from fastddpm.sampling.batches import MOST_ENTRIES, InOrder, chains_after_failure, evaluating
from fastddpm.sampling.chains import Chains, Observe
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.own_network import takes
from fastddpm.sampling.run import Run
from fastddpm.sampling.watch import OnSteps, Watch, raise_if_bad

WINDOW = 16  # by default
EMPTY = -1  # instead of a sample's place, in a chain without one


@dataclass(eq=False)
class Rounds:
    """What sampling parallel in time has done; give an empty one to `Sampler.sample`, which fills it.

    Attributes:
        window: W: how many steps a round takes at most.
        calls: of the network, each for all chains.
        steps: {sample index: how many steps each of its rounds took}.
        rounds: of all samples together.
    """

    window: int = 0
    calls: int = 0
    steps: dict[int, list[int]] = field(default_factory=dict)
    rounds: int = 0
    _taken: int = 0
    _full: int = 0

    @property
    def steps_per_round(self) -> float:
        return self._taken / max(self.rounds, 1)

    @property
    def full(self) -> float:
        """The share of the rounds that took W steps."""
        return self._full / max(self.rounds, 1)

    def add(self, sample: int, steps: int) -> None:
        """Count a round of a sample."""
        self.steps.setdefault(sample, []).append(steps)
        self.rounds += 1
        self._taken += steps
        self._full += steps == self.window

    def __str__(self) -> str:
        return f"{self.calls} network calls, {self.steps_per_round:.1f} steps per round"


def default_chains(entries: int, parallel: str, window: int | None) -> int:
    """How many samples are side by side by default, in batches of so many entries; without a window all of them."""
    if parallel == "off" and window is None:
        return entries
    return max(1, entries // (window or WINDOW))


def in_rounds(
    run: Run, engine: Engine, parallel: Any, window: Any, rounds: Any, *, chains: int | None
) -> "Run | ParallelRun":
    """The same run parallel in time; or the run itself, without parallel and window.

    Args:
        parallel, window, rounds: as `Sampler.batches` takes them.
        chains: the number of samples side by side; None: so many that they fill the batches of the run.
    Raises: ValueError: an argument is not as `Sampler.batches` says, or the run cannot be parallel in time.
    """
    one_of("parallel", parallel, PARALLEL)
    if parallel == "off" and window is None:
        if rounds is not None:
            raise ValueError("rounds is given, but parallel is 'off'; leave it out, or use parallel='bits' or 'law'")
        return run
    window = WINDOW if window is None else whole("window", window, 1, MOST_ENTRIES)
    if rounds is not None and not isinstance(rounds, Rounds):
        raise ValueError(f"rounds is {shown(rounds)}; want a Rounds() to fill, or None")
    for name, is_given in (("x_0_fn", run.conditions.x_0_fn), ("resample", run.conditions.resample > 1)):
        if is_given:
            raise ValueError(f"{name} needs one step after the other; leave out {name}, or parallel and window")
    size = default_chains(run.size, parallel, window) if chains is None else run.size
    if (entries := window * (run.micro_batch or size)) > MOST_ENTRIES:
        raise ValueError(f"the network's batch would have {entries} entries; want at most {MOST_ENTRIES}: less window")
    _check_mode(parallel, run.table, engine)
    fields = {name: value for name, value in vars(run).items() if name != "size"}
    return ParallelRun(**fields, size=size, mode=parallel, window=window, rounds=rounds or Rounds())


def _check_mode(parallel: str, table: StepTable, engine: Engine) -> None:
    if (parallel == "bits" and (dtype := engine.prepared.dtype) != torch.float32) or engine.compute.precision == "tf32":
        rounds = "TF32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        warnings.warn(
            f"parallel is 'bits', but the network computes in {rounds}, whose rounding makes drafts wrong: about one "
            "step per round. Use precision='fp32', or parallel='law'",
            stacklevel=5,
        )
    if parallel != "law":
        return
    if table.learned not in (None, "unused"):
        raise ValueError("parallel is 'law', which needs fixed variances, but they are learned; use parallel='bits'")
    if not table.columns.S.any():
        raise ValueError("parallel is 'law', which needs noise, but these steps add none; use parallel='bits'")


@dataclass(eq=False)
class ParallelRun(Run):
    """What to draw in rounds. The size is that of the chains that run side by side.

    Attributes:
        mode: "bits", "law", or "off": one step in each round, in the same layout.
        window: W.
        rounds: records what happened.
    """

    mode: str = "bits"
    window: int = 1
    rounds: Rounds = field(default_factory=Rounds)

    def batches(self, engine: Engine) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Draw the samples; yields as `Sampler.batches`, each sample as soon as all before it are finished."""
        from tqdm import tqdm

        samples, steps = self.addresses[:, 1], len(self.table)
        size, in_order = self.micro_batch or min(self.size, len(samples)), InOrder(samples)
        waiting = list(range(len(samples)))
        self.rounds.window = self.window
        silent = callable(self.progress) or not self.progress
        bar = tqdm(total=len(samples) * steps, desc="sample", unit="step", disable=silent)
        on_steps = self.progress if callable(self.progress) else lambda steps, _: self._show(bar, steps)
        with bar, evaluating((engine.model, self.conditions.x_0_fn)):
            while waiting:
                done, failure = set[int](), None
                try:
                    for place, x in self._draw_in_chains(engine, size, waiting, bar, on_steps):
                        done.add(place)
                        yield from in_order.put(torch.tensor([place], device="cpu"), x[None])
                except torch.OutOfMemoryError as error:
                    failure = str(error).splitlines()[0]  # the error itself would keep the memory
                waiting = [place for place in waiting if place not in done]
                if failure is not None:
                    smaller = chains_after_failure(engine, size, self.window, failure, self.micro_batch)
                    if smaller < size:
                        self.on_smaller(smaller * self.window)
                    size, bar.n = smaller, (len(samples) - len(waiting)) * steps

    def _show(self, bar: Any, steps: int) -> None:
        bar.set_postfix_str(str(self.rounds), refresh=False)
        bar.update(steps)

    def _draw_in_chains(
        self, engine: Engine, size: int, places: Any, bar: Any, on_steps: OnSteps
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields: (place, sample [*shape] float32 on the CPU) as they are finished.

        Sample i is in chain i mod `micro_batch`, or by its place if there is none. So a chain that is finished takes
        the next sample of its own, and the layout does not depend on how long the others take.
        """
        queues: list[deque[int]] = [deque() for _ in range(size)]
        for place in places:
            queues[(int(self.addresses[place, 1]) if self.micro_batch else place) % size].append(place)
        captures = engine.captures(len(self.table))
        with engine.chains(size, self.window, capture=captures, form=self.conditions.form) as chains:
            session = _Session(self, chains, queues, on_steps)
            if engine.compiles:
                bar.set_description("compile")  # which takes minutes
            with chains.working():
                session.load()
            bar.set_description("sample", refresh=False)
            while session.is_busy:
                with chains.working():  # which changes torch's modes, and so must end before each yield
                    finished = session.run_until_finished()
                yield from finished


class _Session:
    """The samples that the chains hold, and their rounds."""

    def __init__(self, run: ParallelRun, chains: Chains, queues: list[deque[int]], on_steps: OnSteps):
        self.run, self.chains, self.queues, self.on_steps = run, chains, queues, on_steps
        self.places = [EMPTY] * len(queues)
        self.rows = [-1] * len(queues)  # that were seen last
        self.observe = self._observer() if run.callback is not None or run.frames else None
        self.frames: dict[int, list[Tensor]] = {}
        self.on_gpu = chains.x.device.type == "cuda"
        self.watch = Watch(behind=2 if self.on_gpu and self.observe is None else 0)

    @property
    def is_busy(self) -> bool:
        return any(place != EMPTY for place in self.places)

    def load(self) -> None:
        table, run = self.run.table, self.run
        self.chains.load(table, *self._given(), mode=run.mode, capture_round=self.observe is None)
        self._fill(range(len(self.places)))

    def run_until_finished(self) -> list[tuple[int, Tensor]]:
        """Take rounds until samples are finished, then let their chains begin with the next ones."""
        while True:
            if self.observe is None:
                self.chains.round()
            else:
                self.chains.observed_round(self.observe)
            self.run.rounds.calls += 1
            flags = torch.stack([self.chains.pos, self.chains.bad])
            for seen, places in self.watch.look(flags, list(self.places)):
                rows, bad = seen.tolist()
                if finished := self._judge(rows, bad, places):
                    result = [(self.places[chain], self._taken(chain)) for chain in finished]
                    self._fill(finished)
                    return result

    def _judge(self, rows: list[int], bad: list[int], places: list[int]) -> list[int]:
        """Count the steps of a round, seen late on a GPU. Returns: the chains that are finished."""
        current = [k for k, place in enumerate(places) if place != EMPTY and place == self.places[k]]
        samples = self.run.addresses[torch.tensor(places, device="cpu").clamp(min=0), 1]
        raise_if_bad(self.chains, [bad[k] if k in current else -1 for k in range(len(bad))], samples)
        total = 0
        for k in current:
            steps, self.rows[k] = self.rows[k] - rows[k], rows[k]
            if steps:
                self.run.rounds.add(int(samples[k]), steps)
                total += steps
        self.on_steps(total, 1)
        return [k for k in current if rows[k] < 0]

    def _taken(self, chain: int) -> Tensor:
        """The finished sample of a chain, with the frames before it."""
        x = self.chains.x[chain].to("cpu", copy=True, memory_format=torch.contiguous_format)
        frames = self.frames.pop(chain, [])
        return torch.stack([*frames, x]) if frames else x

    def _fill(self, numbers: Any) -> None:
        """Let chains begin with the next sample of their queues, if there is one."""
        new = torch.zeros(len(self.places), dtype=torch.bool, device="cpu")
        for chain in numbers:
            queue = self.queues[chain]
            self.places[chain] = queue.popleft() if queue else EMPTY
            if self.places[chain] != EMPTY:
                new[chain], self.rows[chain] = True, len(self.run.table) - 1
        if new.any():
            self.chains.start(new, *self._given())

    def _given(self) -> tuple[Tensor, Any]:
        """The addresses and the conditions of the samples in the chains; an empty chain has those of the first."""
        places = torch.tensor(self.places, dtype=torch.int64, device="cpu").clamp(min=0)
        return self.run.addresses[places], self.run.conditions.take(places)

    def _observer(self) -> Observe:
        """Keeps the frames, and calls the callback, for each step before it is taken."""
        run = self.run
        sees_x_t = run.callback is not None and takes(run.callback, "x_t")

        def observe(chain: int, row: int, x_t: Tensor, x_0: Tensor) -> None:
            if row in run.frames:
                frame = x_t[0].to("cpu", copy=True, memory_format=torch.contiguous_format)
                self.frames.setdefault(chain, []).append(frame)
            if run.callback is not None:
                place = self.places[chain]
                more = {"x_t": x_t.clone(memory_format=torch.contiguous_format)} if sees_x_t else {}
                index = run.addresses[place : place + 1, 1].clone()
                step = len(run.table) - 1 - row
                run.callback(step, self.chains.timestep(row), x_0.contiguous(), index, **more)

        return observe
