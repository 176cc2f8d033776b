"""The rungs that need a network: the U-Net, engines, trajectories, batches, and the distribution of samples."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.core import noise
from fastddpm.core.precision import Compute
from fastddpm.core.table import StepTable, step_rows
from fastddpm.evaluate.frechet import frechet_distance, random_features
from fastddpm.sampling.conditions import NOTHING, Conditions
from fastddpm.sampling.engine import Engine
from fastddpm.verify.accuracy import Record, accuracy_records, root_mean_square, unequal
from fastddpm.verify.case import NetworkCase, step_table

LONG = 50  # steps of a trajectory from which on single steps can be judged
WINDOW = 8  # slots of a chain
SAMPLES = 64  # in each set whose distribution is compared
TRAJECTORY_BOUNDS = {"fp32": 2, "bf16": 4}  # of the median error, as multiples of plain torch's
SHORTEST = 20  # steps of a trajectory that is shortened to save time
ENOUGH = 4096  # elements of a batch whose largest error is compared: of a few hundred it is up to chance
COST_OF_SETS = 11  # a step of the rungs batch and distribution, in steps of the trajectory (two Xeon cores, batch 1)

Errors = list[tuple[int, float, float]]  # (t, error, error of plain torch) after each step, as root mean squares


def unet_rung(case: NetworkCase, damage: bool) -> Iterator[Record]:
    n, T = max(2, -(-ENOUGH // math.prod(case.shape))), case.schedule.num_train_timesteps
    x, given = noise.normal(noise.address(0, n), case.shape, stream=noise.START, t=T), case.given(range(n))
    for precision in case.bar(case.precisions, "U-Net"):
        compute = Compute(case.device, precision)
        engine = Engine(case.network(damage), case.shape, T, compute, "eager", times=case.times)
        ours, theirs, ref = [], [], []
        with engine.network(n, capture=False) as network:
            network.prepare(torch.arange(T, device="cpu"), given)
            with network.working():
                for t in (T - 1, T // 2, 0):
                    ours.append(network(x, t))
                    theirs.append(case.plain_output(precision, network.input, t, given))
                    ref.append(case.plain_output("fp64", network.input, t, given))
        compared = f"{precision} U-Net with the float64 reference"
        if torch.cat(theirs).isfinite().all():
            yield from accuracy_records("unet", compared, torch.cat(ours), torch.cat(theirs), torch.cat(ref))
        else:
            yield Record("unet", compared, note=f"plain torch overflows in {precision}")


def engines_rung(case: NetworkCase, damage: bool) -> Iterator[Record]:
    if case.device.type != "cuda":
        yield Record("engines", "samples of the CUDA graph with eager ones", note=f"{case.device} has no CUDA graphs")
        return

    def samples(precision: str, engine: str, damage: bool) -> Tensor:
        sampler = case.sampler(precision=precision, engine=engine, damage=damage)
        return sampler.sample(4, seed=3, steps=case.few_steps, model_kwargs=case.given(range(4)), progress=False)

    for precision in case.bar(case.precisions, "engines"):
        differing = unequal(samples(precision, "graph", damage), samples(precision, "eager", False))
        yield Record("engines", f"{precision} samples of the CUDA graph with eager ones", differing, 0)


def trajectory_rung(case: NetworkCase, damage: bool) -> Iterator[Record]:
    errors, x_0 = trajectory_errors(case, case.schedule.table(case.steps), tuple(TRAJECTORY_BOUNDS), damage)
    schedule = case.schedule
    peak = 2 * schedule.clip_sample_range if schedule.clip_sample else float(x_0.max() - x_0.min())
    for precision, along in errors.items():
        psnr, plain_psnr = (20 * math.log10(peak / max(error, 1e-300)) for error in along[-1][1:])
        note = f"PSNR of x_0 {psnr:.1f} dB, plain torch's {plain_psnr:.1f}"
        name = f"{precision} trajectory of {len(along)} steps"
        # Errors grow along a trajectory, until chance alone makes one of two equally good runs three times better at
        # the end. So the medians over all steps are compared. In bf16 the rounding of the weights shifts every step
        # alike. The shifts of the bundled model nearly cancel in plain torch, which rounds the biases too: there ours
        # was 1.1 to 3.0 times plain torch's in 26 runs of 16 to 250 steps. In float32 it was 0.3 to 1.1 times.
        ours, plain = torch.tensor(along, dtype=torch.float64, device="cpu")[:, 1:].unbind(1)
        median, bound = float(ours.median()), TRAJECTORY_BOUNDS[precision] * float(plain.median())
        yield Record("trajectory", f"{name} with float64, median rms", median, bound, note, along)
        if len(along) >= LONG:  # in a short run chance alone may multiply the error by eight in a step
            compared = f"{name}, largest growth of the error in one step"
            yield Record("trajectory", compared, largest_growth(ours, plain), 2)


def fit_into(case: NetworkCase, seconds: float) -> None:
    """Set the steps of the trajectory so that the rungs of sampling take about as long, but at least SHORTEST.

    If even the shortest run leaves no time for it, the distribution will be skipped.
    """
    began, T = time.monotonic(), case.schedule.num_train_timesteps
    case.steps, few = min(SHORTEST, T), min(2, T)
    with suppress(Exception), torch.no_grad():  # the rungs will record the error
        for _ in range(2):  # the first builds the networks
            trial = time.monotonic()
            trajectory_errors(case, case.schedule.table(few), tuple(TRAJECTORY_BOUNDS), False)
        now = time.monotonic()
        affordable = (seconds - (now - began)) / ((now - trial) / few)
        case.steps = int(min(max(affordable - COST_OF_SETS * case.few_steps, case.steps), T))
        case.has_time = affordable >= case.steps + COST_OF_SETS * case.few_steps


def trajectory_errors(
    case: NetworkCase, table: StepTable, precisions: Sequence[str], damage: bool
) -> tuple[dict[str, Errors], Tensor]:
    """The errors along one trajectory against float64, by precision, and the float64 result [1, *shape]."""
    exact_rows, _ = step_rows(case.schedule, table.timesteps.long())
    errors: dict[str, Errors] = {precision: [] for precision in precisions}
    with ExitStack() as stack:
        runners = []
        for precision in precisions:
            compute = Compute(case.device, precision)
            engine = Engine(case.net, case.shape, table.num_train_timesteps, compute, times=case.times)
            runner = stack.enter_context(engine.runner(1, capture=engine.captures(len(table))))
            runner.load(step_table(table, damage=damage), noise.address(0, 1), Conditions(case.given(range(1))))
            runner.start()
            runners.append(runner)
        exact = case.reference_trajectory("fp64", table, exact_rows, range(1))
        plain = [case.reference_trajectory(precision, table, table.rows, range(1)) for precision in precisions]
        for t in case.bar(table.timesteps.flip(0).tolist(), "trajectory"):
            ref = next(exact)
            half_ulp = torch.finfo(torch.float32).eps / 2 * root_mean_square(ref)
            for precision, runner, plain_trajectory in zip(precisions, runners, plain, strict=True):
                runner.step()
                error, plain_error = (root_mean_square(x.double() - ref) for x in (runner.x, next(plain_trajectory)))
                errors[precision].append((t, error, max(plain_error, half_ulp)))
    return errors, ref


def largest_growth(ours: Tensor, plain: Tensor) -> float:
    """By how much the error grows in a step at most, relative to the error before it: one wrong step doubles it.

    Where a schedule begins without a trace of x_0, all of it is clipped, and there is no error until chance lets the
    first element be clipped to the other side. That may happen in one run a few steps before the other. So an error of
    plain torch nearby counts as well.
    """
    near = len(ours) // 20
    plain_nearby = F.max_pool1d(plain[None], 2 * near + 1, 1, near)[0]
    return float((ours / torch.maximum(plain_nearby, torch.cat([plain[:1], ours[:-1]]))).max())


def batch_rung(case: NetworkCase, damage: bool) -> Iterator[Record]:
    sampler = case.sampler(batch_invariant=True)
    i = sampler.micro_batch + 1

    def draw(samples: Sequence[int]) -> Tensor:
        given = case.given(samples)
        return sampler.sample(samples, seed=5, steps=case.few_steps, model_kwargs=given, progress=False)

    alone = draw([1 if damage else i])[0]  # damaged: the noise of the entry's place in the batch, 1
    for where, samples in (("in a batch", range(i + 1)), ("at another place", [2 * i + 1, i, 0])):
        together = draw(samples)[samples.index(i)]
        yield Record("batch", f"a sample alone with itself {where}", unequal(alone, together), 0)


def parallel_rung(case: NetworkCase, damage: bool) -> Iterator[Record]:
    """Chains that take several steps per round have the bits of those that take one, whatever their drafts are."""
    table = case.schedule.table().last(case.few_steps)  # small steps, so that drafts are often right
    compute = Compute(case.device, "fp32")
    engine = Engine(case.net, case.shape, table.num_train_timesteps, compute, times=case.times)
    want, _ = _drawn_in_rounds(case, engine, table, "off")
    for what, wrong_drafts in (("sampling parallel in time", False), ("with wrong drafts", True)):
        got, rounds = _drawn_in_rounds(case, engine, table, "bits", wrong_drafts=wrong_drafts, wrong_commit=damage)
        note = f"{len(table) / rounds:.1f} steps per round"
        yield Record("parallel", f"{what}, against one step per round", unequal(got, want), 0, note)


def _drawn_in_rounds(
    case: NetworkCase,
    engine: Engine,
    table: StepTable,
    mode: str,
    *,
    wrong_drafts: bool = False,
    wrong_commit: bool = False,
) -> tuple[Tensor, int]:
    """Sample 0, drawn by one chain of WINDOW slots, and how many rounds it took.

    Args:
        wrong_drafts: forget the network's outputs before each round, so that drafts begin with x_0 = 0.
        wrong_commit: change one element of the state after the first round, as a wrong step would.
    """
    given = noise.address(0, 1), Conditions(case.given(range(1)))
    with engine.chains(1, WINDOW, capture=engine.captures(len(table)), form=NOTHING.form) as chains, chains.working():
        chains.load(table, *given, mode=mode)
        chains.start(torch.ones(1, dtype=torch.bool, device="cpu"), *given)
        rounds = 0
        while int(chains.pos) >= 0:
            if wrong_drafts:
                chains.seen.fill_(len(table) + 1)
            chains.round()
            rounds += 1
            if wrong_commit and rounds == 1:
                chains.x[(0,) * chains.x.ndim] += 2.0**-6
        return chains.x.clone(), rounds


def distribution_rung(case: NetworkCase, damage: bool) -> Iterator[Record]:
    """Fast samples are those of the reference one by one, and as near in distribution as other reference samples."""
    if not case.has_time:
        yield Record("distribution", "samples with the reference's", note="no time is left for it; give more seconds")
        return
    sampler, table = case.sampler(), case.schedule.table(case.few_steps)
    reference = []
    for start in case.bar(range(0, 2 * SAMPLES, 16), "reference samples"):
        *_, x_0 = case.reference_trajectory("fp32", table, table.rows, range(start, start + 16))
        reference.append(random_features(x_0.cpu()))
    same, others = torch.cat(reference).split(SAMPLES)
    given = case.given(range(SAMPLES))
    samples = sampler.sample(SAMPLES, steps=len(table), noise=not damage, model_kwargs=given, progress=case.progress)
    fast = random_features(samples)
    strangers = (torch.cdist(fast.double(), same.double()).argmin(1).cpu() != torch.arange(SAMPLES, device="cpu")).sum()
    kind = f"{sampler.precision} samples"
    yield Record("distribution", f"{kind} nearest to a reference sample of another index", float(strangers), 0)
    yield Record(
        "distribution",
        f"{kind} with the reference's, Fréchet distance",
        error=frechet_distance(fast, same),
        bound=frechet_distance(others, same),
        note=f"the bound is that of {SAMPLES} reference samples to {SAMPLES} others",
    )
