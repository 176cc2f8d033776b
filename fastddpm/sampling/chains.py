"""The buffers of chains that advance several steps per network call, and whole rounds on them.

A chain is one sample from x_T to x_0, with W slots in the batch of the network: see `reference.parallel`. As in
`Runner`, everything that a round reads and writes is at fixed addresses, so one captured CUDA graph serves all rounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.table import StepTable
from fastddpm.ops.conditional_step import conditional_step, model_outputs
from fastddpm.ops.parallel_steps import commit, commit_by, draft, first_difference
from fastddpm.ops.step import raise_flags
from fastddpm.reference import parallel
from fastddpm.reference.diffusion import predicted_x_0, replaced
from fastddpm.sampling.batch_network import BatchNetwork
from fastddpm.sampling.buffers import SampleBuffers
from fastddpm.sampling.conditions import NOTHING, Conditions, InputForm
from fastddpm.sampling.model import PreparedModel
from fastddpm.sampling.replay import Network

Observe = Callable[[int, int, Tensor, Tensor], object]  # (chain, row, x_t [1, *shape], predicted x_0)


class Chains(SampleBuffers):
    """G samples from x_T to x_0, each with W entries of the network's batch.

    Attributes:
        x: [G, *shape] float32, channels-last: the states of the chains.
        states: [G * W, *shape] float32, channels-last: the drafts; slot i mod W of a chain holds row i. The network
            reads them, rounded to bf16 unless the mode is "law".
        m: [G * W, C or 2C, ...] float32: the network's outputs for them, after guidance.
        pos: [G] int32: the row that each chain is at; -1: it is finished, or empty.
        seen: [G] int32: the lowest row of the last round; S + 1 if there was none.
    """

    def __init__(self, prepared: PreparedModel, n: int, *, window: int, capture: bool, form: InputForm = NOTHING.form):
        network = BatchNetwork(prepared, n * window, capture=capture, form=form, per_entry=True)
        super().__init__(prepared, n, network)
        device, self.window = prepared.device, window
        self.x = layout.empty(n, prepared.shape, dtype=torch.float32, device=device)
        self.states = layout.empty(n * window, prepared.shape, dtype=torch.float32, device=device)
        self.m = torch.empty(0, dtype=torch.float32, device=device)
        self.pos, self.seen = torch.empty(2, n, dtype=torch.int32, device=device)
        self._slots = torch.arange(window, dtype=torch.int32, device=device)

    def load(
        self,
        table: StepTable,
        address: Tensor,
        conditions: Conditions,
        *,
        mode: str,
        capture_round: bool = True,
    ) -> None:
        """Copy what decides a run into the buffers; compile and capture a round if need be. All chains are empty then.

        Args:
            table: S rows, on any device.
            address: [G, 2] int64; conditions: of G samples; as in `start`.
            mode: "bits", "law", or "off": one step in each round.
            capture_round: capture a whole round; else only the drafts and the network call, for `observed_round`.
        """
        self.mode, self.ahead = mode, 1 if mode == "off" else self.window
        channels, *spatial = self.prepared.shape
        values = 2 if table.learned in ("learned", "learned_range") else 1
        shape = len(self.states), channels * values, *spatial
        if self.m.shape != shape:
            self.m = layout.empty(shape[0], shape[1:], dtype=torch.float32, device=self.prepared.device)
        self._load(table, address, conditions)
        self._is_plain = values == 1 and conditions.known is None
        work = self._round if capture_round else self._draft_and_predict
        constants: tuple[Any, ...] = (mode, capture_round, table.clip, table.learned, conditions.guide_variance)
        constants += (self.m.data_ptr(), *self._addresses_in_graph(), self.network.constants())
        self.network.replay.prepare(work, self._reset, constants)
        self._reset()
        self.pos.fill_(-1)

    def start(self, new: Tensor, address: Tensor, conditions: Conditions) -> None:
        """Start new samples in some chains; the others continue.

        Args:
            new: [G] bool, on the CPU: the chains that start.
            address: [G, 2] int64; conditions: of G samples; both for all chains.
        """
        self._load(self._loaded, address, conditions)
        new = new.to(self.x.device)
        each = new.view(-1, *[1] * (self.x.ndim - 1))
        self.x.copy_(torch.where(each, self._starting_states(), self.x))
        self.pos.masked_fill_(new, self.steps - 1)
        self.seen.masked_fill_(new, self.steps + 1)
        self.bad.masked_fill_(new, -1)

    def round(self) -> None:
        """Draft, call the network once, and commit the steps whose drafts were right."""
        self.network.replay(self._round)

    def observed_round(self, observe: Observe) -> None:
        """A round that waits for the device and shows each step before it is taken; loaded with capture_round=False."""
        self.network.replay(self._draft_and_predict)
        law = self._accepted() if self.mode == "law" else None
        reached = self._first_difference() if law is None else law.reached.int()
        row = self.pos.clone()
        while moving := (row > reached).nonzero()[:, 0].tolist():
            for chain in moving:
                slot = chain * self.window + int(row[chain]) % self.window
                is_draft = law is not None and bool(row[chain] < self.pos[chain])
                x = self.states[slot : slot + 1] if is_draft else self.x[chain : chain + 1]
                observe(chain, int(row[chain]), x, self._x_0(x, slot, int(row[chain])))
            target = torch.maximum(row - 1, reached)
            if law is None:
                self._commit(row, target, ahead=1)
            row = target
        if law is not None:
            self._take(law)
        self._advance(reached)

    def _round(self, network: Network | None) -> None:
        self._draft_and_predict(network)
        if self.mode == "law":
            law = self._accepted()
            self._take(law)
            reached = law.reached.int()
        else:
            reached = self._first_difference()
            self._commit(self.pos, reached, ahead=self.ahead)
        self._advance(reached)

    def _draft_and_predict(self, network: Network | None) -> None:
        self._draft()
        slots = self.pos[:, None] - torch.remainder(self.pos[:, None] - self._slots, self.window)  # the row in each
        self.network.positions.copy_(slots.clamp(min=0).flatten())
        guidance = self.conditions.guidance
        if guidance is not None:
            guidance = parallel.repeated(guidance, self.window)
        output, guide_variance = self._predict(network), self.conditions.guide_variance
        of_mean, v = model_outputs(output, self.states, guidance, guide_variance=guide_variance)
        channels = of_mean.shape[1]
        self.m[:, :channels].copy_(of_mean)
        if v is not None and self.m.shape[1] > channels:
            self.m[:, channels:].copy_(v)

    def _draft(self) -> None:
        """Draft the states, and hand them to the network."""
        rounded, fused = self.mode != "law", self._is_plain and self.network.form == NOTHING.form
        if self._is_plain:
            tensors = self.states, self.x, self.m, self.table, self.pos, self.seen, self.address
            draft(*tensors, ahead=self.ahead, copy=self.network.input if fused else None, rounded=rounded)
        else:
            pos, seen = self.pos.long(), self.seen.long()
            chains = self._by_chain(self.states), self._by_chain(self.m)
            new = parallel.draft(self.x, *chains, pos, seen, self._rows, self._step, ahead=self.ahead)
            self.states.copy_(new.flatten(0, 1))
        if not fused:
            self.network.read_states(self.states.bfloat16() if rounded else self.states)

    def _first_difference(self) -> Tensor:
        if self._is_plain:
            tensors = self.x, self.states, self.m, self.table, self.pos, self.address
            return first_difference(*tensors, ahead=self.ahead)
        chains = self._by_chain(self.states), self._by_chain(self.m)
        reached = parallel.first_difference(self.x, *chains, self.pos.long(), self._step, ahead=self.ahead)
        return reached.int()

    def _commit(self, pos: Tensor, reached: Tensor, *, ahead: int) -> None:
        if self._is_plain:
            return commit(self.x, self.m, self.table, pos, reached, self.address, ahead=ahead, bad=self.bad)
        return commit_by(self._step, self.x, self.m, pos, reached, ahead=ahead, bad=self.bad)

    def _accepted(self) -> parallel.Coupled:
        """The states and rows to which mode "law" advances the chains."""
        known, mask = (
            None if y is None else parallel.repeated(y, self.ahead)
            for y in (self.conditions.known, self.conditions.mask)
        )
        address = parallel.repeated(self.address, self.ahead)
        t = lambda row: self.table.timesteps[row].long()
        normal = lambda stream, row: ops.normal(address, self.x.shape[1:], stream=stream, t=t(row))

        def finish(x: Tensor, row: Tensor) -> Tensor:
            if known is None or mask is None:
                return x
            return replaced(x, known, mask, self.table.rows[row], normal(noise.KNOWN, row))

        return parallel.accepted(
            *(self.x, self._by_chain(self.states), self._by_chain(self.m), self.pos.long(), self._rows),
            z=lambda row: normal(noise.STEP, row),
            log_u=lambda row: noise.uniform(address, stream=noise.COUPLING, t=t(row)).log(),
            clip=self.table.clip,
            ahead=self.ahead,
            mask=self.conditions.mask,
            finish=finish,
        )

    def _take(self, law: parallel.Coupled) -> None:
        self.x.copy_(law.x)
        raise_flags(self.bad, self.x, law.reached.int() + 1)

    def _advance(self, reached: Tensor) -> None:
        torch.sub(self.pos, self.ahead - 1, out=self.seen).clamp_(min=0)
        self.pos.copy_(reached)

    def _step(self, x: Tensor, m: Tensor, row: Tensor) -> Tensor:
        """The step of a conditional network, for the specification's loops."""
        x_prev, given = layout.channels_last(x.clone()), self.conditions
        conditional_step(
            x_prev,
            layout.channels_last(m),
            replace(self.table, learned=self.table.learned if m.shape[1] > x.shape[1] else None),
            row.int(),
            self.address,
            known=given.known,
            mask=given.mask,
        )
        return x_prev

    def _x_0(self, x: Tensor, slot: int, row: int) -> Tensor:
        """[1, *shape]: the clean sample that is predicted from x with the output of a slot."""
        columns = torch.cat([self.table.rows[row, :4], self.table.scale[row : row + 1]])
        return predicted_x_0(x, self.m[slot : slot + 1, : x.shape[1]], columns)

    @property
    def _rows(self) -> parallel.Rows:
        return parallel.Rows(self.table.rows, self.table.scale)

    def _by_chain(self, x: Tensor) -> Tensor:
        """[G, W, ...] of [G * W, ...]."""
        return x.unflatten(0, (len(self.x), self.window))

    def _load(self, table: StepTable, address: Tensor, conditions: Conditions) -> None:
        places = torch.arange(len(self.x), device="cpu").repeat_interleave(self.window)
        self.network.load(table.timesteps, conditions.take(places), address[places, 1])
        self._load_samples(table, address, conditions)
        self.table.timesteps.copy_(self.network.timesteps)

    def _reset(self) -> None:
        for tensor in (self.x, self.states, self.m, self.network.input, self.network.positions):
            tensor.zero_()
        self.pos.fill_(self.steps - 1)
        self.seen.fill_(self.steps + 1)
        self.bad.fill_(-1)

    def _tensors(self) -> Iterator[Tensor]:
        yield from super()._tensors()
        yield from (self.x, self.states, self.m, self.pos, self.seen, self._slots)
