"""What a rung compares: a schedule on a device, perhaps with a network, and inputs that are equal on every machine."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core import noise
from fastddpm.core.precision import PRECISIONS, arithmetic
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import StepColumns, StepTable
from fastddpm.networks.fused import CONDITION, LABELS, Network, argument_of
from fastddpm.networks.unet1d import UNet1D
from fastddpm.reference import unet1d
from fastddpm.reference.diffusion import update
from fastddpm.reference.unet import UNet
from fastddpm.sampling.sampler import Sampler

FREE_STREAM = 128  # of the noise standard, for inputs
SHAPE = (3, 20, 20)  # of a sample in the rungs of kernels: more than one block of a kernel, and not a multiple of one
DAMAGE = 1 + 1e-4  # factor on damaged coefficients
FEW_STEPS = 20  # of runs that need not be complete
# implementations of `ops`
COMPILED, INTERPRETED, CPP, TORCH = "the kernel", "the interpreted kernel", "the C++ kernel", "torch"
BY_BACKEND = {"triton": COMPILED, "cpp": CPP, "torch": TORCH}
SAME_CODE = "same code here"  # why a comparison is skipped


@dataclass
class Case:
    """What the rungs without a network need.

    Attributes:
        schedule: the schedule under test.
        device: where `ops` computes.
        implementation: what `ops` runs there: COMPILED, INTERPRETED, CPP or TORCH.
    """

    schedule: Schedule
    device: torch.device
    implementation: str

    @property
    def fixed_schedule(self) -> Schedule:
        """The schedule, with a fixed variance: all else is the same."""
        return replace(self.schedule, variance_type="fixed_small") if self.schedule.learns_variance else self.schedule

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of results that can be compared: Triton's interpreter truncates to bfloat16 and does not round."""
        return [dtype for dtype in ops.FLOATS if dtype != torch.bfloat16 or self.implementation != INTERPRETED]

    @property
    def is_reference(self) -> bool:
        """Whether the noise, the update and the noising of `ops` are calls of the reference, in torch on the CPU."""
        return self.implementation == TORCH and self.device.type == "cpu"


@dataclass
class NetworkCase(Case):
    """What the rungs with a network need.

    Attributes:
        net: the network, in float32.
        shape: of a sample.
        steps: of the trajectory; None: all T.
        progress: show bars.
        has_time: whether there is time to compare the distribution of samples.
        plain_networks: the reference networks that `plain_output` has built, by dtype.
        times: [T]: what the network gets for each timestep; None: the timestep.
    """

    net: Network
    shape: tuple[int, ...]
    steps: int | None = None
    progress: bool = False
    has_time: bool = True
    plain_networks: dict[torch.dtype, nn.Module] = field(default_factory=dict)
    times: Tensor | None = None

    @property
    def precisions(self) -> list[str]:
        return [name for name in PRECISIONS if name != "tf32" or self.device.type == "cuda"]

    @property
    def few_steps(self) -> int:
        """The number of steps of runs that need not be complete."""
        T = self.schedule.num_train_timesteps
        return min(FEW_STEPS, self.steps or T, T)

    def network(self, damage: bool) -> Network:
        """The network; if damaged, a copy in which the largest weight of the first convolution is off by 1 %."""
        if not damage:
            return self.net
        net = copy.deepcopy(self.net)
        weight = next(parameter for parameter in net.parameters() if parameter.ndim > 2)
        weight[tuple((weight.abs() == weight.abs().max()).nonzero()[0])] *= 1.01
        return net

    def sampler(
        self, *, precision: str = "auto", engine: str = "auto", batch_invariant: bool = False, damage: bool = False
    ) -> Sampler:
        return Sampler(
            self.network(damage),
            self.schedule,
            shape=self.shape,
            device=self.device,
            precision=precision,
            engine=engine,
            batch_invariant=batch_invariant,
            timestep_values=self.times,
        )

    def given(self, samples: Iterable[int]) -> dict[str, Tensor]:
        """What the network is given besides x and t, for each sample index: a class label, a condition, or nothing."""
        config, argument = self.net.config, argument_of(self.net)
        if argument is None:
            return {}
        if argument == CONDITION:
            address = noise.address(0, samples)
            return {CONDITION: noise.normal(address, (config["global_cond_dim"],), stream=FREE_STREAM, t=1)}
        count = config["num_class_embeds"] or 10
        classes = torch.tensor([sample % count for sample in samples], dtype=torch.int64, device="cpu")
        if isinstance(self.net, UNet1D) or config["class_embed_type"] != "identity":
            return {LABELS: classes}
        return {LABELS: classes[:, None].expand(-1, self.net.time_embedding.linear_2.out_features).float() / 10}

    def plain_output(self, precision: str, x: Tensor, t: int, given: Mapping[str, Tensor]) -> Tensor:
        """The output for x at t of the reference network in plain torch, with channels-last weights.

        Args: precision: one of PRECISIONS, or "fp64"; given: as `given` returns it.
        """
        dtype = PRECISIONS.get(precision, torch.float64)
        if dtype not in self.plain_networks:
            with torch.device("meta"):
                is_sequence = isinstance(self.net, UNet1D)
                network = unet1d.UNet1D(self.net.config) if is_sequence else UNet(**self.net.config)
            network.to(dtype).to_empty(device=self.device)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.load_state_dict(self.net.state_dict())
            self.plain_networks[dtype] = network.eval()
        given = {name: x.to(self.device, dtype if x.is_floating_point() else None) for name, x in given.items()}
        with arithmetic(precision, self.device):
            told = torch.full((len(x),), t, dtype=torch.int64, device=self.device)
            told = told if self.times is None else self.times.to(self.device)[told]
            return self.plain_networks[dtype](x.to(dtype), told, **given)

    def reference_trajectory(
        self, precision: str, table: StepTable, rows: Tensor, samples: Iterable[int]
    ) -> Iterator[Tensor]:
        """Sample by the reference loop with seed 0, and yield x after each step.

        Args:
            precision: of the network, as `plain_output` takes it.
            rows: the coefficients of table's steps; x is computed in their dtype.
            samples: sample indices.
        """
        address = noise.address(0, samples, self.device)
        given = self.given(address[:, 1].tolist())
        x = noise.normal(address, self.shape, stream=noise.START, t=table.num_train_timesteps).to(rows.dtype)
        for row, t in zip(rows.to(self.device).flip(0), table.timesteps.flip(0).tolist(), strict=True):
            z = noise.normal(address, self.shape, stream=noise.STEP, t=t).to(rows.dtype)
            output = self.plain_output(precision, x, t, given)
            m, v = output[:, : self.shape[0]], output[:, self.shape[0] :]
            x = update(x, m, row, z, clip=table.clip, v=v, learned=table.learned)
            yield x

    def bar(self, steps: Iterable[Any], what: str) -> Iterable[Any]:
        from tqdm import tqdm

        return tqdm(steps, desc=what, leave=False, disable=not self.progress)


def extreme_addresses() -> Tensor:
    """[4, 2]: the largest seed and sample indices, and two ordinary ones."""
    both = ((2**64 - 1, [2**56 - 1, 2**32 - 1]), (12345, [7, 2**40 + 17]))
    return torch.cat([noise.address(seed, samples) for seed, samples in both])


def key_timesteps(schedule: Schedule) -> Tensor:
    """[4] int64: the first step taken, the middle, the last step that adds noise, and the last step."""
    T = schedule.num_train_timesteps
    return torch.tensor([T - 1, T // 2, min(1, T - 1), 0], dtype=torch.int64, device="cpu")


def normal_inputs(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """[n, *shape] float32 standard normals, channels-last."""
    return noise.normal(noise.address(seed, n), shape, stream=FREE_STREAM, t=0)


def step_table(table: StepTable, *, damage: bool) -> StepTable:
    """A copy of the table; if damaged, the coefficients of x_0, x and m are slightly wrong."""
    rows = table.rows.clone()
    columns = StepColumns.of(rows)
    for column in (columns.A, columns.B, columns.C):
        column *= DAMAGE if damage else 1
    return replace(table, rows=rows)
