"""The buffers of a batch, and whole reverse steps on them.

Everything that a step reads and writes is in tensors at fixed addresses: the states, the table, and the position, seed
and sample index of each entry. So one captured CUDA graph serves every step of every schedule: it needs no argument, no
wait and no allocation.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.table import StepTable
from fastddpm.ops.conditional_step import model_outputs
from fastddpm.ops.step import repeated_step
from fastddpm.reference.diffusion import predicted_x_0, renoised
from fastddpm.sampling import own_network
from fastddpm.sampling.batch_network import BatchNetwork
from fastddpm.sampling.buffers import SampleBuffers
from fastddpm.sampling.conditions import NOTHING, Conditions, InputForm
from fastddpm.sampling.model import PreparedModel
from fastddpm.sampling.replay import Network


class Runner(SampleBuffers):
    """A batch of samples on its way from x_T to x_0.

    Attributes:
        network: evaluates the network. Its positions are the rows of the table that the entries are at; all are equal.
        x: [n, *shape] float32, channels-last: the states x_t; the same tensor as the network's input if shape and dtype
            agree.
    """

    def __init__(self, prepared: PreparedModel, n: int, *, capture: bool, form: InputForm = NOTHING.form):
        super().__init__(prepared, n, BatchNetwork(prepared, n, capture=capture, form=form))
        self.x = self.network.input
        if form != NOTHING.form or self.x.dtype != torch.float32:
            self.x = layout.empty(n, prepared.shape, dtype=torch.float32, device=prepared.device)
        self._one = torch.ones((), dtype=torch.int32, device=prepared.device)
        self._take_step = self._step_of_table()

    def load(
        self,
        table: StepTable,
        address: Tensor,
        conditions: Conditions = NOTHING,
        *,
        capture_step: bool = True,
    ) -> None:
        """Copy what decides a batch into the buffers; compile and capture a step if need be. Overwrites x.

        Args:
            table: S rows, on any device.
            address: [n, 2] int64, on any device.
            conditions: what the samples are given; of the form that the runner was made for.
            capture_step: capture a whole step; else only the network, for steps taken by `predict` and `update`.
        """
        self.network.load(table.timesteps, conditions, address[:, 1])
        self._load_samples(table, address, conditions)
        self._take_step = self._step_of_table()
        work = self._predict_and_update if capture_step else self._predict_into_output
        constants = (
            capture_step,
            table.clip,
            table.learned,
            conditions.guide_variance,
            self._addresses_in_graph(),
            self.network.constants(),
        )
        self.network.replay.prepare(work, self.start, constants)

    def start(self) -> None:
        """Draw x_T ~ N(0, I) of each entry, or begin with what is given, and go to the first step of the table."""
        self.first_visit()
        self.x.copy_(self._starting_states())
        if self.network.input is not self.x:
            self.network.read_states(self.x)
        self.network.positions.fill_(self.steps - 1)
        self.bad.fill_(-1)

    def step(self) -> None:
        """Take one reverse step, x_t -> x_{t-1}, and go to the next row."""
        self.network.replay(self._predict_and_update)

    def predict(self) -> Tensor:
        """The first half of a step: the model's output for x_t; for a batch loaded with capture_step=False.

        Raises: ValueError: the network returned something else than it should; the message names the step.
        """
        self.network.replay(self._predict_into_output)
        return self._output

    def x_0(self, model_output: Tensor) -> Tensor:
        """The clean samples that are predicted from x_t, as the step takes them: [n, *shape] float32."""
        m, _ = model_outputs(model_output, self.x, self.conditions.guidance)
        positions = self.network.positions
        c, scale = self.table.rows.index_select(0, positions), self.table.scale.index_select(0, positions)
        x_0 = predicted_x_0(self.x, m, torch.cat([c[:, :4], scale[:, None]], 1))
        change = self.conditions.x_0_fn
        if change is None:
            return x_0
        t = self.network.timesteps.index_select(0, positions).long()
        more = {own_network.INDEX: self.address[:, 1].clone()} if self._x_0_fn_takes_index else {}
        changed = change(x_0.contiguous(), t, **more)
        if not isinstance(changed, Tensor) or changed.shape != x_0.shape or not changed.is_floating_point():
            what = f"{tuple(changed.shape)} {changed.dtype}" if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"x_0_fn returned {what} for x_0 {tuple(x_0.shape)}; want float numbers of the same shape")
        return layout.channels_last(changed.detach().to(x_0.device, torch.float32))

    def update(self, model_output: Tensor, x_0: Tensor | None = None) -> None:
        """The second half of a step: x_t -> x_{t-1}, and on to the next row.

        Args: x_0: what `x_0` returned, if a function of the user's changes it.
        """
        if x_0 is not None:
            scale = self.table.scale.index_select(0, self.network.positions)
            self._conditional_step(model_output, layout.channels_last(x_0 / scale.view(-1, *[1] * (x_0.ndim - 1))))
        else:
            self._take_step(model_output)
        self.network.positions.sub_(self._one)

    def renoise(self) -> None:
        """Go back from x_{t-1} to x_t, whose next visit has other noise (RePaint, arXiv:2201.09865, Algorithm 1)."""
        self.network.positions.add_(self._one)
        t = self.table.timesteps.index_select(0, self.network.positions).long()
        z = ops.normal(self.address, self.x.shape[1:], stream=noise.RENOISE, t=t)
        self.x.copy_(renoised(self.x, self.table.rows.index_select(0, self.network.positions), z))
        if self.network.input is not self.x:
            self.network.read_states(self.x)
        self.table.timesteps.add_(noise.VISIT)

    def first_visit(self) -> None:
        """Let the next step be the first visit of its timestep, whose noise has the t of the timestep."""
        self.table.timesteps.copy_(self.network.timesteps)

    def _step_of_table(self) -> Callable[[Tensor], None]:
        """What takes a step without x_0_fn: the plain one, without guidance, a known part or a learned variance."""
        given, network = self.conditions, self.network
        plain = given.guidance is None and given.known is None and self.table.learned is None
        if not plain:
            return self._conditional_step
        copy = None if network.input is self.x or network.form != NOTHING.form else network.input
        take = repeated_step(self.x, self.table, network.positions, self.address, out=copy, bad=self.bad)
        if network.form == NOTHING.form:
            return take

        def take_and_read(model_output: Tensor) -> None:
            take(model_output)
            network.read_states(self.x)

        return take_and_read

    def _conditional_step(self, model_output: Tensor, x_0: Tensor | None = None) -> None:
        given, network = self.conditions, self.network
        ops.conditional_step(
            self.x,
            model_output,
            self.table,
            network.positions,
            self.address,
            guidance=given.guidance,
            guide_variance=given.guide_variance,
            known=given.known,
            mask=given.mask,
            x_0=x_0,
            bad=self.bad,
        )
        if network.input is not self.x:
            network.read_states(self.x)

    def _predict_into_output(self, network: Network | None) -> None:
        self._output = self._predict(network)

    def _predict_and_update(self, network: Network | None) -> None:
        self.update(self._predict(network))

    def _tensors(self) -> Iterator[Tensor]:
        yield from super()._tensors()
        yield self.x
