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
from fastddpm.sampling.batches import MOST_ENTRIES, InOrder, evaluating
from fastddpm.sampling.chains import Chains, Observe
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.own_network import takes
from fastddpm.sampling.run import Run
from fastddpm.sampling.watch import OnSteps, Watch, raise_if_bad

WINDOW = 16  # by default
EMPTY = -1  # the place of a chain that holds no sample


@dataclass(eq=False)
class Rounds:
    """Statistics of sampling parallel in time. Pass an empty one to `Sampler.sample`, which fills it.

    Attributes:
        window: W.
        calls: network calls; one call serves all samples side by side.
        steps: {sample index: how many steps each of its rounds took}.
        rounds: their number, summed over the samples.
    """

    window: int = 0
    calls: int = 0
    steps: dict[int, list[int]] = field(default_factory=dict)
    rounds: int = 0
    _taken: int = 0
    _full: int = 0

    @property
    def steps_per_round(self) -> float:
        """The mean over all rounds."""
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


def default_chains(entries: int, parallel: Any, window: Any) -> int:
    """The default number of samples side by side, if a batch of the network holds so many entries.

    Raises: ValueError: parallel or window is not as `Sampler.batches` says.
    """
    return max(1, entries // (checked_window(parallel, window) or 1))


def checked_window(parallel: Any, window: Any) -> int:
    """W; 0: the run has no window. Raises: ValueError: an argument is not as `Sampler.batches` says."""
    one_of("parallel", parallel, PARALLEL)
    if window is None:
        return 0 if parallel == "off" else WINDOW
    return whole("window", window, 1, MOST_ENTRIES)


def in_rounds(
    run: Run, engine: Engine, parallel: Any, window: Any, rounds: Any, *, chains: int | None
) -> "Run | ParallelRun":
    """The same run parallel in time; or the run itself, without parallel and window.

    Args:
        parallel, window, rounds: as `Sampler.batches` takes them.
        chains: the number of samples side by side; None: enough to fill the batches of the run.
    Raises: ValueError: an argument is not as `Sampler.batches` says, or the run cannot be parallel in time.
    """
    window = checked_window(parallel, window)
    if rounds is not None and not isinstance(rounds, Rounds):
        raise ValueError(f"rounds is {shown(rounds)}; want a Rounds() to fill, or None")
    if not window:
        if rounds is not None:
            way_out = "leave out rounds, or use parallel='bits' or 'law'"
            raise ValueError(f"rounds is given, but parallel is 'off' and there is no window; {way_out}")
        return run
    for name, is_given in (("x_0_fn", run.conditions.x_0_fn), ("resample", run.conditions.resample > 1)):
        if is_given:
            raise ValueError(f"{name} requires sequential steps; leave out {name}, or parallel and window")
    size = default_chains(run.size, parallel, window) if chains is None else chains
    size = max(1, min(size, len(run.addresses)))
    if (entries := window * (run.micro_batch or size)) > MOST_ENTRIES:
        way_out = "reduce window, or the number of samples side by side"
        raise ValueError(f"a batch of the network would have {entries} entries; want at most {MOST_ENTRIES}: {way_out}")
    _check_mode(parallel, run.table, engine)
    fields = {name: value for name, value in vars(run).items() if name != "size"}
    return ParallelRun(**fields, size=size, mode=parallel, window=window, rounds=rounds or Rounds())


def _check_mode(parallel: str, table: StepTable, engine: Engine) -> None:
    dtype, precision = engine.prepared.dtype, engine.compute.precision
    if parallel == "bits" and (dtype != torch.float32 or precision == "tf32"):
        arithmetic = "TF32" if precision == "tf32" else str(dtype).removeprefix("torch.")
        warnings.warn(
            f"parallel is 'bits', but the network computes in {arithmetic}, whose rounding makes drafts wrong: expect "
            "about one step per round. Use precision='fp32', or parallel='law'",
            stacklevel=7,  # the caller of `Sampler.sample`
        )
    if parallel != "law":
        return
    if table.learned not in (None, "unused"):
        raise ValueError("parallel is 'law', which needs fixed variances, but they are learned; use parallel='bits'")
    if not table.columns.S.any():
        raise ValueError("parallel is 'law', which needs noise, but these steps add none; use parallel='bits'")


@dataclass(eq=False)
class ParallelRun(Run):
    """A run drawn in rounds. Its size is the number of chains side by side.

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

        samples, in_order = self.addresses[:, 1], InOrder(self.addresses[:, 1])
        chains, before = self.micro_batch or self.size, self.rounds.calls
        self.rounds.window = self.window
        silent = callable(self.progress) or not self.progress
        bar = tqdm(total=len(samples) * len(self.table), desc="sample", unit="step", disable=silent)
        on_steps = self.progress if callable(self.progress) else lambda _, steps: self._show(bar, steps)
        with bar, evaluating((engine.model, self.conditions.x_0_fn)):
            failure = ""
            while len(samples):
                try:
                    for place, x in self._draw_in_chains(engine, chains, bar, on_steps):
                        yield from in_order.put(torch.tensor([place], dtype=torch.int64, device="cpu"), x[None])
                    return
                except torch.OutOfMemoryError as error:
                    failure = str(error).splitlines()[0]  # the error itself would keep the memory
                if self.rounds.calls > before or not engine.clear():
                    raise torch.OutOfMemoryError(f"{failure} {self._with_less_memory(chains)}")

    def _with_less_memory(self, chains: int) -> str:
        """What to do. The number of chains and the window are not changed, because both are part of the layout."""
        fewer = "batch_invariant" if self.micro_batch else "batch_size"
        ways_out = [f"{fewer}={chains // 2}"] * (chains > 1) + [f"window={self.window // 2}"] * (self.window > 1)
        others = f"use {' or '.join(ways_out)} (which may change the bits)" if ways_out else "use the CPU"
        return f"This was for {chains} samples side by side, with a window of {self.window}; {others}"

    def _show(self, bar: Any, steps: int) -> None:
        bar.set_postfix_str(str(self.rounds), refresh=False)
        bar.update(steps)

    def _draw_in_chains(self, engine: Engine, size: int, bar: Any, on_steps: OnSteps) -> Iterator[tuple[int, Tensor]]:
        """Yields: (place, sample [*shape] float32 on the CPU) as they are finished.

        Sample i is in chain i mod `micro_batch`; without one, the sample at place p is in chain p mod `size`. A chain
        that is finished takes the next sample of its own queue, so the layout does not depend on how long others take.
        """
        queues: list[deque[int]] = [deque() for _ in range(size)]
        for place, index in enumerate(self.addresses[:, 1].tolist()):
            queues[(index if self.micro_batch else place) % size].append(place)
        captures = engine.captures(len(self.table))
        with engine.chains(size, self.window, capture=captures, form=self.conditions.form) as chains:
            chain_run = _ChainRun(self, chains, queues, on_steps)
            if engine.compiles:
                bar.set_description("compile")  # which takes minutes
            with chains.working():
                chain_run.load()
            bar.set_description("sample", refresh=False)
            while chain_run.is_busy:
                with chains.working():  # which changes torch's modes, and so must end before each yield
                    finished = chain_run.run_until_finished()
                yield from finished


class _ChainRun:
    """The samples that the chains hold, and their rounds."""

    def __init__(self, run: ParallelRun, chains: Chains, queues: list[deque[int]], on_steps: OnSteps):
        self.run, self.chains, self.queues, self.on_steps = run, chains, queues, on_steps
        self.places = [EMPTY] * len(queues)
        self.rows = [-1] * len(queues)  # the last known row of each chain
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
        """Count the steps of a round, which a GPU reports with a delay. Returns: the chains that are finished."""
        current = [k for k, place in enumerate(places) if place != EMPTY and place == self.places[k]]
        samples = self.run.addresses[torch.tensor(places, dtype=torch.int64, device="cpu").clamp(min=0), 1]
        raise_if_bad(self.chains, [bad[k] if k in current else -1 for k in range(len(bad))], samples)
        total = 0
        for k in current:
            steps, self.rows[k] = self.rows[k] - rows[k], rows[k]
            if steps:
                self.run.rounds.add(int(samples[k]), steps)
                total += steps
        self.on_steps(1, total)
        return [k for k in current if rows[k] < 0]

    def _taken(self, chain: int) -> Tensor:
        """The finished sample of a chain, preceded by the frames of its trajectory."""
        x = self.chains.x[chain].to("cpu", copy=True, memory_format=torch.contiguous_format)
        frames = self.frames.pop(chain, [])
        return torch.stack([*frames, x]) if frames else x

    def _fill(self, numbers: Any) -> None:
        """Start the next queued sample in each of these chains, if there is one."""
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
        """A function that keeps the frame and calls the callback, for each step before it is taken."""
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
