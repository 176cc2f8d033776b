"""The rungs of the equivalence ladder: what is compared with what, how far off it is, and how far off it may be.

A rung is a function of a case, and of whether its fast side shall be wrong, to see it fail; it yields records. Every
comparison holds only if error <= bound, which NaN does not. `fastddpm.verify.ladder` climbs.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule, StepTable, step_rows
from fastddpm.evaluate.frechet import frechet_distance, random_features
from fastddpm.networks.unet2d import UNet2D
from fastddpm.reference.diffusion import Diffusion, add_noise, predicted_x_0, squared_error, target, update
from fastddpm.reference.unet import UNet
from fastddpm.sampling.engine import PRECISIONS, Engine, arithmetic
from fastddpm.sampling.sampler import Sampler

# Counter, key and words of Philox4x32-10, the known answers of Random123; and of the noise standard seed, stream,
# sample, t, and the bits of the first four normals.
WORDS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
NORMALS = (
    (7, 0, 3, 999, "be320d1c bf0caa7e 3ef6351b bdaa61c2"),
    (1234567890123456789, 0, 49999, 500, "3ca8de7d c00618cb 3fe10400 3fa41a6c"),
    (2**64 - 1, 2, 2**40 + 17, 1, "3f90f173 3e6febf8 bf3cd59e be3c8b1e"),
)
FREE = 128  # a stream of noise, for the inputs
SHAPE = (3, 20, 20)  # of the kernels' samples: one of their blocks, and a part of the next
SLIGHTLY = 1 + 1e-4  # how wrong damaged coefficients are
LONG = 50  # steps, from which on one of them can be judged by itself
FEW = 20  # steps, where all of them are not the point
SURE = 5  # standard errors: chance is off by more once in two million times
SAMPLES = 64  # in each of the sets whose distributions are compared
INTERPRETED = "the interpreted kernel"


@dataclass(frozen=True)
class Record:
    """One comparison; without an error it was skipped, and note says why.

    error and bound are numbers of unequal elements where bound is 0, else errors, or squared Fréchet distances. steps
    are (t, error, error of plain torch) of each step of a trajectory, root mean squares.
    """

    rung: str
    compared: str
    error: float | None = None
    bound: float | None = None
    note: str = ""
    steps: Sequence[tuple[int, float, float]] = ()

    @property
    def verdict(self) -> str:
        """pass, FAIL or skipped."""
        if self.error is None or self.bound is None:
            return "skipped"
        return "pass" if self.error <= self.bound < math.inf else "FAIL"


@dataclass
class Case:
    """What the rungs of the kernels need: a schedule, where to compute, and what `ops` runs there."""

    schedule: Schedule
    device: torch.device
    kernels: str  # "the kernel", INTERPRETED or "torch"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What the kernels can be seen to return: Triton's interpreter does not round to bfloat16, but cuts off."""
        return [dtype for dtype in ops.FLOATS if dtype != torch.bfloat16 or self.kernels != INTERPRETED]


@dataclass
class Checkpoint(Case):
    """What all rungs need: also a network."""

    net: UNet2D
    shape: tuple[int, ...]
    steps: int | None = None  # of the trajectory
    progress: bool = False
    plain_networks: dict[torch.dtype, UNet] = field(default_factory=dict)

    @property
    def precisions(self) -> list[str]:
        return [name for name in PRECISIONS if name != "tf32" or self.device.type == "cuda"]

    def network(self, damage: bool) -> UNet2D:
        """The network; if it shall be, with one weight of its first convolution off by 1 %."""
        if not damage:
            return self.net
        net = copy.deepcopy(self.net)
        weight = net.conv_in.weight
        weight[tuple((weight.abs() == weight.abs().max()).nonzero()[0])] *= 1.01
        return net

    def sampler(self, damage: bool = False, **how: Any) -> Sampler:
        return Sampler(self.network(damage), self.schedule, shape=self.shape, device=self.device, **how)

    def labels(self, samples: Iterable[int]) -> Tensor | None:
        """What class the samples are of, where the network wants to know."""
        if self.net.class_embedding is None:
            return None
        classes = torch.tensor(list(samples)) % (self.net.config["num_class_embeds"] or 10)
        if self.net.config["class_embed_type"] != "identity":
            return classes
        return classes[:, None].expand(-1, self.net.time_embedding.linear_2.out_features) / 10

    def plain(self, precision: str, x: Tensor, t: int, labels: Tensor | None) -> Tensor:
        """What the reference U-Net, channels-last in memory, makes of x in plain torch, in a precision or in "fp64"."""
        dtype = PRECISIONS.get(precision, torch.float64)
        if dtype not in self.plain_networks:
            with torch.device("meta"):
                network = UNet(**self.net.config)
            network.to_empty(device=self.device).load_state_dict(self.net.state_dict())
            network.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.plain_networks[dtype] = network.eval()
        if labels is not None:
            labels = labels.to(self.device, dtype if labels.is_floating_point() else None)
        with arithmetic(precision, self.device):
            return self.plain_networks[dtype](x.to(dtype), torch.full((len(x),), t, device=self.device), labels)

    def walk(self, precision: str, table: StepTable, rows: Tensor, samples: Iterable[int]) -> Iterator[Tensor]:
        """The reference loop: x after each step, in the dtype of rows; the network in a precision."""
        address = noise.address(0, samples, self.device)
        labels = self.labels(address[:, 1].tolist())
        x = noise.normal(address, self.shape, stream=noise.START, t=table.num_train_timesteps).to(rows.dtype)
        for row, t in zip(rows.to(self.device).flip(0), table.timesteps.flip(0).tolist(), strict=True):
            z = noise.normal(address, self.shape, stream=noise.STEP, t=t).to(rows.dtype)
            x = update(x, self.plain(precision, x, t, labels), row, z, clip=table.clip)
            yield x

    def few(self) -> int:
        return min(FEW, self.steps or self.schedule.num_train_timesteps, self.schedule.num_train_timesteps)

    def bar(self, steps: Iterable[Any], what: str) -> Iterable[Any]:
        from tqdm import tqdm

        return tqdm(steps, desc=what, leave=False, disable=not self.progress)


# How far off


def accuracy(ours: Tensor, plain: Tensor, ref: Tensor) -> list[tuple[str, float, float]]:
    """How far from float64 ours and plain torch's results are, in one dtype: (measure, error, bound) for two measures.

    The bound is twice plain torch's error, of which less than half a unit in the last place counts as one.
    Raises: ValueError: the shapes differ.
    """
    if not ours.shape == plain.shape == ref.shape:
        raise ValueError(f"ours is {tuple(ours.shape)}, plain {tuple(plain.shape)}, ref {tuple(ref.shape)}; want one")
    half_ulp, found = torch.finfo(plain.dtype).eps / 2, []
    for name, measure in (("max", largest), ("rms", root_mean_square)):
        theirs, least = measure(plain.double() - ref), half_ulp * measure(ref)
        found.append((name, measure(ours.double() - ref), 2 * max(theirs, least)))
    return found


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def unequal(got: Tensor, want: Tensor) -> float:
    """How many elements have other bits; infinitely many where shape or dtype differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    return float((got.cpu().view(kind) != want.cpu().view(kind)).sum())


def _accurate(rung: str, compared: str, ours: Tensor, plain: Tensor, ref: Tensor) -> Iterator[Record]:
    for measure, error, bound in accuracy(ours.to(ref.device), plain, ref):
        yield Record(rung, f"{compared}, {measure}", error, bound)


def _standard(rung: str, compared: str, z: Tensor) -> Iterator[Record]:
    """Mean and variance of what shall be standard normal, as near as chance allows."""
    n = z.numel()
    yield Record(rung, f"{compared}, its mean with 0", abs(float(z.mean())), SURE / math.sqrt(n))
    yield Record(rung, f"{compared}, its variance with 1", abs(float(z.square().mean()) - 1), SURE * math.sqrt(2 / n))


# The rungs


def words(case: Case, damage: bool) -> Iterator[Record]:
    counters, keys, want = (_bits(column).to(case.device) for column in zip(*WORDS, strict=True))
    counters[:, 0] += damage
    got = torch.stack(noise.philox(*counters.T, *keys.T), 1)
    yield Record("words", "Philox words with published vectors", unequal(got, want), 0)


def normals(case: Case, damage: bool) -> Iterator[Record]:
    if case.kernels != INTERPRETED:
        differing = 0.0
        for seed, stream, sample, at, bits in NORMALS:
            got = noise.normal(noise.address(seed ^ damage, [sample], case.device), (4,), stream=stream, t=at)
            differing += unequal(got[0], _bits([bits])[0].int().view(torch.float32))
        yield Record("noise", "torch's normals with published bits", differing, 0)

    address, t = _addresses(), torch.tensor([999, 0, 500, 2**31 - 1])
    wrong = torch.stack([address[:, 0] ^ damage, address[:, 1]], 1).to(case.device)
    z, zero = (torch.zeros_like(_drawn(4, SHAPE)).to(case.device) for _ in range(2))
    rows = torch.tensor([[0.0, 0, -math.inf, math.inf, 0, 0, 0, 1]]).repeat(4, 1)  # x_{t-1} = z
    table = StepTable(rows, torch.ones(len(rows)), t.int(), False, 1000).to(case.device)
    ops.step(z, zero, table, torch.arange(4, dtype=torch.int32, device=case.device), wrong)
    differing = unequal(z, noise.normal(address, SHAPE, stream=noise.STEP, t=t))
    alone = torch.tensor([[0.0, 1]]).repeat(1000, 1).to(case.device)  # x_t = eps
    for stream, at in ((noise.TRAIN, 0), (noise.LIKELIHOOD, 999)):
        eps = ops.noising(zero, torch.full((4,), 999, device=case.device), wrong, alone, stream=stream)
        differing += unequal(eps, noise.normal(address, SHAPE, stream=stream, t=at))
    yield Record("noise", f"z and eps by {case.kernels} with torch's on the CPU", differing, 0)


def step(case: Case, damage: bool) -> Iterator[Record]:
    table, address, t = case.schedule.table(), _addresses(), _timesteps(case)
    pos, x, differing = t.int(), 1.5 * _drawn(4, SHAPE), 0.0
    how = _off(table, damage).to(case.device), pos.to(case.device), address.to(case.device)
    for dtype in ops.FLOATS:
        m = _drawn(4, SHAPE, 4).to(dtype)
        z = noise.normal(address, SHAPE, stream=noise.STEP, t=t)
        want = update(x, m, table.rows[t], z, clip=table.clip)
        got = x.to(case.device, copy=True)
        low = torch.empty_like(got, dtype=dtype) if dtype != torch.float32 and dtype in case.dtypes else None
        ops.step(got, m.to(case.device), *how, out=low)
        differing += unequal(got, want) + (0 if low is None else unequal(low, want.to(dtype)))
    yield Record("step", f"update by {case.kernels} with the float32 reference", differing, 0)

    x[0, 2, 19, 19], x[2, 0, 0, 0] = math.nan, math.inf
    flags = torch.full((4,), -1, dtype=torch.int32, device=case.device)
    ops.step(x.to(case.device), m.to(case.device), *how, bad=flags)
    due = torch.where(torch.tensor([True, False, True, False]), pos, -1)
    yield Record("step", f"first bad steps by {case.kernels} with those due", unequal(flags, due), 0)


def noising(case: Case, damage: bool) -> Iterator[Record]:
    table, address, t = case.schedule.noising_table(), _addresses(), _timesteps(case)
    wrong, x, differing = table * (SLIGHTLY if damage else 1), _drawn(4, SHAPE), 0.0
    pixels = (x * 40 + 128).clamp(0, 255).to(torch.uint8)
    for x_0, value in ((x, x), (pixels, (pixels.float() - 127.5) * (2 / 255))):
        for stream, at in ((noise.TRAIN, 0), (noise.LIKELIHOOD, t)):
            want = add_noise(value, noise.normal(address, SHAPE, stream=stream, t=at), table[t])
            for dtype in case.dtypes:
                inputs: Any = (tensor.to(case.device) for tensor in (x_0, t, address, wrong))
                differing += unequal(ops.noising(*inputs, stream=stream, dtype=dtype), want.to(dtype))
    yield Record("noising", f"x_t by {case.kernels} with the float32 reference", differing, 0)


def forward(case: Case, damage: bool) -> Iterator[Record]:
    """q(x_T | x_0): as the chain of all q(x_t | x_{t-1}) makes it (eq. 2), and in one shot (eq. 4)."""
    schedule, wrong = case.schedule, SLIGHTLY if damage else 1
    T, betas, log_abar = schedule.num_train_timesteps, schedule.betas, schedule.log_alphas_cumprod
    signal, var = schedule.alphas_cumprod.sqrt() * wrong, -log_abar.expm1() * wrong
    table, chain = schedule.noising_table() * wrong, _moments(betas)

    # In units of 2^-52, T steps put the chain's moments off by at most 5/4 T and 3/2 T, relative to them; and log(abar)
    # by T/2, relative to its size: an error of abar, half one of its root, and more than one of 1 - abar.
    unit, size = (T + 2) * torch.finfo(torch.float64).eps, float(-log_abar.nan_to_num(neginf=0).min())
    of_signal, of_var, of_table = (5 / 4 + size / 4) * unit, 2 * unit, torch.finfo(torch.float32).eps / 2
    for name, found, want, bound in (
        ("sqrt(abar_t)", signal, chain[:, 0], of_signal),
        ("1 - abar_t", var, chain[:, 1].square(), of_var),
        ("the float32 table", table.double(), chain, of_table + max(of_signal, of_var)),
    ):
        off = (found - want) / want.clamp(min=torch.finfo(torch.float32).tiny)  # below, float32 loses digits
        yield Record("forward", f"{name} with the moments of the chain at every t", largest(off), bound)

    x_0, steps = (_drawn(1, SHAPE, 1) / 2).clamp(-1, 1), Diffusion(betas[betas < 1])
    x, z = x_0.double(), noise.normal(noise.address(0, 1).expand(T, 2), SHAPE, stream=FREE, t=torch.arange(T)).double()
    for t in range(T):
        x = steps.diffuse(x, t, z[t : t + 1]) if betas[t] < 1 else z[t : t + 1]  # the last may forget all
    weights = betas.sqrt() * torch.cat([schedule.alphas.sqrt()[1:], torch.ones(1)]).flip(0).cumprod(0).flip(0)
    eps = torch.tensordot(weights / weights.norm(), z, 1)[None]
    shot = add_noise(x_0.double(), eps, torch.stack([signal[-1], var[-1].sqrt()]))
    terms = largest(signal[-1] * x_0.abs() + torch.tensordot(weights, z.abs(), 1))
    bound = (of_signal + of_var + 4 * unit) * terms  # each term passes T steps there, and two sums of T here
    note = f"{T} z's make one eps, with weights whose squares sum to 1"
    yield Record("forward", "x_T by all steps with that by one shot in float64", largest(x - shot), bound, note)
    yield from _standard("forward", "eps of all steps", eps)

    n = 256
    inputs: Any = (layout.channels_last(x_0.repeat(n, 1, 1, 1)), torch.full((n,), T - 1), noise.address(0, n), table)
    x = ops.noising(*(tensor.to(case.device) for tensor in inputs), stream=noise.LIKELIHOOD).double().cpu()
    yield from _standard("forward", f"eps of x_T by {case.kernels}", (x - chain[-1, 0] * x_0) / chain[-1, 1])
    energy = float(x_0.double().square().sum())
    off, error = (x * x_0).sum() / (n * energy) - chain[-1, 0], chain[-1, 1] / math.sqrt(n * energy)
    note = f"L_T is at most {0 - math.log2(-float(log_abar[-1].expm1())) / 2:.2g} bits/dim"
    yield Record("forward", f"what x_T by {case.kernels} holds of x_0", float(off.abs()), SURE * float(error), note)


def loss(case: Case, damage: bool) -> Iterator[Record]:
    table, address, t = case.schedule.noising_table(), _addresses(), _timesteps(case)
    x, g = _drawn(4, SHAPE), _drawn(4, (1,), 5)[:, 0]
    pixels = (x * 40 + 128).clamp(0, 255).to(torch.uint8)
    sign = -1 if damage else 1
    inputs: Any = ((x, x, noise.TRAIN, 0), (pixels, (pixels.float() - 127.5) * (2 / 255), noise.LIKELIHOOD, t))
    for i, predicts in enumerate(ops.PREDICTIONS):
        differing = [0.0, 0.0]
        for j, dtype in enumerate(ops.FLOATS):
            x_0, value, stream, at = inputs[(i + j) % 2]  # each dtype meets both kinds of images
            m = _drawn(4, SHAPE, 4).to(dtype)
            want = target(value, noise.normal(address, SHAPE, stream=stream, t=at), table[t], predicts)
            given: Any = (tensor.to(case.device) for tensor in (x_0, t, address, table))
            with torch.enable_grad():
                ours = (sign * m).to(case.device).requires_grad_()
                error = ops.eps_loss(ours, *given, predicts=predicts, stream=stream)
                (gradient,) = torch.autograd.grad(error, ours, g.to(case.device))
            differing[0] += unequal(error.detach(), squared_error(m, want))
            if dtype in case.dtypes:
                differing[1] += unequal(gradient, ((2 * g).view(4, 1, 1, 1) * (m.float() - want)).to(dtype))
        for what, count in zip(("loss", "its gradient"), differing, strict=True):
            yield Record("loss", f"{predicts}: {what} by {case.kernels} with the float32 reference", count, 0)

    steps = case.schedule.table()
    rows, count = torch.cat([table, steps.rows[:, :4], steps.scale[:, None]], 1), 0.0
    for j, dtype in enumerate(ops.FLOATS):
        (x_0, value, stream, at), m = inputs[j % 2], _drawn(4, SHAPE, 4).to(dtype)
        x_t = add_noise(value, noise.normal(address, SHAPE, stream=stream, t=at), table[t])
        given = (tensor.to(case.device) for tensor in (sign * m, x_0, t, address, rows))
        found = ops.x_0_error(*given, stream=stream)
        count += unequal(found, squared_error(predicted_x_0(x_t, m, rows[t, 2:]), value))
    yield Record("loss", f"the error of x_0 by {case.kernels} with the float32 reference", count, 0)


def step64(case: Case, damage: bool) -> Iterator[Record]:
    schedule, n = case.schedule, 16
    table, T, address = schedule.table(), schedule.num_train_timesteps, noise.address(0, n)
    t = torch.linspace(0, T - 1, n).round().long()
    (rows, scale), z = step_rows(schedule, torch.arange(T)), noise.normal(address, SHAPE, stream=noise.STEP, t=t)
    rows, scale = rows[t], scale[t].view(-1, 1, 1, 1)
    x, x_0 = _drawn(n, SHAPE, 1), 0.3 * _drawn(n, SHAPE, 2)  # seldom clipped
    cx, cm = (rows[:, i].view(-1, 1, 1, 1) for i in range(2))
    m = ((x_0 / scale - cx * x) / cm).float()

    def plain(dtype: torch.dtype) -> Tensor:
        """By the formulas of the paper where they are for this schedule, else by rows made in float64."""
        if schedule.prediction_type != "epsilon":
            return update(x.to(dtype), m.to(dtype), rows, z.to(dtype), clip=table.clip)
        kind: Any = "fixed_small" if schedule.variance_type.startswith("fixed_small") else "fixed_large"
        clip = schedule.clip_sample_range if schedule.clip_sample else None
        return Diffusion(schedule.betas).step(x.to(dtype), m.to(dtype), t, z.to(dtype), variance_type=kind, clip=clip)

    theirs, ref, ours = plain(torch.float32), plain(torch.float64), x.to(case.device, copy=True)
    inputs: Any = (m, _off(table, damage), t.int(), address)
    ops.step(ours, *(tensor.to(case.device) for tensor in inputs))
    yield from _accurate("step64", f"update by {case.kernels} with float64", ours, theirs, ref)


def norm(case: Case, damage: bool) -> Iterator[Record]:
    groups, eps, wrong = 4, 1e-5, 1.01 if damage else 1
    weight, bias, *add = _drawn(4, (32,), 1).to(case.device)
    time_bias = torch.stack(add)

    def plain(dtype: torch.dtype, x: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
        whole = (x if skip is None else torch.cat([x, skip], 1)).contiguous().to(dtype)
        whole = whole if add is None else whole + add.to(dtype)[:, :, None, None]
        y = F.group_norm(whole, groups, weight.to(dtype), bias.to(dtype), eps)
        return y if add is None else F.silu(y)

    # the last is too large for one program of the kernel to hold
    shapes = ("bare", (9, 7), 0), ("", (9, 7), 0), ("", (9, 7), 1000), ("shared", (47, 45), 1000)
    for dtype, (what, size, centre) in product(case.dtypes, shapes):
        x, rest = ((_drawn(2, (c, *size), c) + centre).to(case.device, dtype) for c in (24, 8))
        if what == "bare":
            x, skip, plus = torch.cat([x, rest], 1), None, None
        else:
            skip, plus = rest, time_bias
        x = layout.channels_last(x)
        how: Any = {"eps": eps, "skip": skip, "add": plus, "silu": plus is not None}
        ours = ops.group_norm(x, weight * wrong, bias, groups, **how)
        compared = f"{_name(dtype)} {f'{what} ' * bool(what)}group norm about {centre} by {case.kernels} with float64"
        theirs = plain(torch.float32, x, skip, plus).to(dtype)
        yield from _accurate("norm", compared, ours, theirs, plain(torch.float64, x, skip, plus))


def residual(case: Case, damage: bool) -> Iterator[Record]:
    bias, differing = _drawn(1, (24,), 3)[0].to(case.device), 0.0
    for dtype in case.dtypes:
        h, other = (_drawn(2, (24, 9, 7), seed).to(case.device, dtype) for seed in (1, 2))
        want = ((h.float() + other.float()) + bias[:, None, None]).to(dtype)
        ops.residual(h, other, None if damage else bias)
        differing += unequal(h, want)
    yield Record("residual", f"residual sums by {case.kernels} with torch's in float32", differing, 0)


def unet(case: Checkpoint, damage: bool) -> Iterator[Record]:
    T, n = case.schedule.num_train_timesteps, 2
    x, labels = noise.normal(noise.address(0, n), case.shape, stream=noise.START, t=T), case.labels(range(n))
    for precision in case.bar(case.precisions, "U-Net"):
        engine = Engine(case.network(damage), case.shape, T, case.device, precision, "eager")
        ours, theirs, ref = [], [], []
        with engine.forward(n, steps=1) as forward:
            forward.prepare(torch.arange(T), labels)
            with forward.working():
                for t in (T - 1, T // 2, 0):
                    ours.append(forward.at(x, t))
                    theirs.append(case.plain(precision, forward.low, t, labels))
                    ref.append(case.plain("fp64", forward.low, t, labels))
        compared = f"{precision} U-Net with the float64 reference"
        if torch.cat(theirs).isfinite().all():
            yield from _accurate("unet", compared, *map(torch.cat, (ours, theirs, ref)))
        else:
            yield Record("unet", compared, note=f"plain torch overflows in {precision}")


def engines(case: Checkpoint, damage: bool) -> Iterator[Record]:
    if case.device.type != "cuda":
        yield Record("engines", "samples of the CUDA graph with eager ones", note=f"{case.device} has no CUDA graphs")
        return
    how: dict[str, Any] = {"seed": 3, "steps": case.few(), "class_labels": case.labels(range(4)), "progress": False}
    for precision in case.bar(case.precisions, "engines"):
        graph = case.sampler(damage, precision=precision, engine="graph").sample(4, **how)
        eager = case.sampler(precision=precision, engine="eager").sample(4, **how)
        yield Record("engines", f"{precision} samples of the CUDA graph with eager ones", unequal(graph, eager), 0)


def trajectory(case: Checkpoint, damage: bool) -> Iterator[Record]:
    schedule, kinds = case.schedule, ("fp32", "bf16")
    table = schedule.table(case.steps)
    rows, _ = step_rows(schedule, table.timesteps.long())
    errors: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        fast = []
        for kind in kinds:
            engine = Engine(case.net, case.shape, table.num_train_timesteps, case.device, kind)
            fast.append(stack.enter_context(engine.slots(1, len(table))))
            fast[-1].load(_off(table, damage), noise.address(0, 1), case.labels(range(1)))
        exact = case.walk("fp64", table, rows, range(1))
        plain = [case.walk(kind, table, table.rows, range(1)) for kind in kinds]
        for t in case.bar(table.timesteps.flip(0).tolist(), "trajectory"):
            ref = next(exact)
            half_ulp = torch.finfo(torch.float32).eps / 2 * root_mean_square(ref)
            for kind, slots, walk in zip(kinds, fast, plain, strict=True):
                slots.advance()
                error, plain_error = (root_mean_square(x.double() - ref) for x in (slots.x, next(walk)))
                errors[kind].append((t, error, max(plain_error, half_ulp)))
    peak = 2 * schedule.clip_sample_range if schedule.clip_sample else float(ref.max() - ref.min())
    for kind, along in errors.items():
        # Errors grow on the way, until chance alone makes one of two equally good runs three times better at the end.
        # So the medians over all steps are compared: in 22 runs ours was never more than 1.3 times plain torch's. And a
        # single wrong step is seen by itself, for it more than doubles the error.
        ours, theirs = torch.tensor(along, dtype=torch.float64)[:, 1:].unbind(1)
        # Where a schedule begins without a trace of x_0, all of it is clipped, and there is no error until chance lets
        # the first element be clipped to the other side, in one run a few steps before the other.
        near = len(along) // 20
        nearby = F.max_pool1d(theirs[None], 2 * near + 1, 1, near)[0]
        growth = (ours / torch.maximum(nearby, torch.cat([theirs[:1], ours[:-1]]))).max()
        psnr, plain_psnr = (20 * math.log10(peak / max(e, 1e-300)) for e in along[-1][1:])
        note, name = (
            f"PSNR of x_0 {psnr:.1f} dB, plain torch's {plain_psnr:.1f}",
            f"{kind} trajectory of {len(along)} steps",
        )
        median, bound = float(ours.median()), 2 * float(theirs.median())
        yield Record("trajectory", f"{name} with float64, median rms", median, bound, note, along)
        if len(along) >= LONG:  # in a few steps the error of an equally good run may grow eightfold by chance
            yield Record("trajectory", f"{name}, growth of the error in one", float(growth), 2)


def batch(case: Checkpoint, damage: bool) -> Iterator[Record]:
    sampler = case.sampler(batch_invariant=True)
    i = sampler.micro_batch + 1

    def drawn(samples: Sequence[int]) -> Tensor:
        how: dict[str, Any] = {"seed": 5, "steps": case.few(), "progress": False}
        return sampler.sample(samples, class_labels=case.labels(samples), **how)

    alone = drawn([1 if damage else i])[0]  # 1: noise that is addressed by the place in the batch
    for what, samples in (("in a batch", range(i + 1)), ("at another place", [2 * i + 1, i, 0])):
        together = drawn(samples)[samples.index(i)]
        yield Record("batch", f"a sample alone with itself {what}", unequal(alone, together), 0)


def distribution(case: Checkpoint, damage: bool) -> Iterator[Record]:
    sampler, table, reference = case.sampler(), case.schedule.table(case.few()), []
    for part in case.bar(range(0, 2 * SAMPLES, 16), "reference samples"):
        *_, x = case.walk("fp32", table, table.rows, range(part, part + 16))
        reference.append(random_features(x.cpu()))
    one, other = torch.cat(reference).split(SAMPLES)
    labels = case.labels(range(SAMPLES))
    fast = sampler.sample(SAMPLES, steps=len(table), noise=not damage, class_labels=labels, progress=case.progress)
    found = random_features(fast)
    strangers = (torch.cdist(found.double(), one.double()).argmin(1).cpu() != torch.arange(SAMPLES)).sum()
    kind = f"{sampler.precision} samples"
    yield Record("distribution", f"{kind}, those nearest to another one of the reference's", float(strangers), 0)
    yield Record(
        *("distribution", f"{kind} with the reference's, Fréchet distance"),
        *(frechet_distance(found, one), frechet_distance(other, one)),
        note=f"the bound is that of {SAMPLES} reference samples to {SAMPLES} others",
    )


RUNGS: dict[str, Callable[[Any, bool], Iterator[Record]]] = {
    "words": words,
    "noise": normals,
    "step": step,
    "noising": noising,
    "forward": forward,
    "loss": loss,
    "step64": step64,
    "norm": norm,
    "residual": residual,
    "unet": unet,
    "engines": engines,
    "trajectory": trajectory,
    "batch": batch,
    "distribution": distribution,
}
OF_KERNELS = ("noise", "step", "noising", "loss", "step64", "norm", "residual")
OF_SAMPLING = ("step", "step64", "engines", "trajectory", "batch", "distribution")


# Their inputs


def _addresses() -> Tensor:
    """Four: of the largest and of other seeds and samples."""
    both = ((2**64 - 1, [2**56 - 1, 2**32 - 1]), (12345, [7, 2**40 + 17]))
    return torch.cat([noise.address(seed, samples) for seed, samples in both])


def _drawn(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """[n, *shape] standard normals, channels-last, the same on every machine."""
    return noise.normal(noise.address(seed, n), shape, stream=FREE, t=0)


def _moments(betas: Tensor) -> Tensor:
    """[T, 2] float64, walked step by step: what x_t holds of x_0, and the standard deviation of the rest."""
    signal, var, moments = 1.0, 0.0, []
    for beta in betas.tolist():
        signal, var = math.sqrt(1 - beta) * signal, (1 - beta) * var + beta
        moments.append((signal, math.sqrt(var)))
    return torch.tensor(moments, dtype=torch.float64)


def _timesteps(case: Case) -> Tensor:
    """[4]: both ends, the middle, and the last that adds noise."""
    T = case.schedule.num_train_timesteps
    return torch.tensor([T - 1, T // 2, min(1, T - 1), 0])


def _off(table: StepTable, damage: bool) -> StepTable:
    """The table; if it shall be, with the coefficients of x_0, x and m slightly wrong."""
    rows = table.rows.clone()
    rows[:, 4:7] *= SLIGHTLY if damage else 1
    return replace(table, rows=rows)


def _bits(words: Iterable[str]) -> Tensor:
    return torch.tensor([[int(word, 16) for word in line.split()] for line in words])


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in PRECISIONS.items() if value == dtype)
