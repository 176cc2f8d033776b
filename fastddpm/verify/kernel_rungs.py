"""The rungs of single operations, by the kernels or by torch: noise, steps, noising, losses, norms and sums."""

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.precision import PRECISIONS
from fastddpm.core.table import StepColumns, StepTable, step_rows, x_0_rows
from fastddpm.ops.conditional_step import model_outputs
from fastddpm.reference.diffusion import Diffusion, add_noise, predicted_x_0, replaced, squared_error, target, update
from fastddpm.verify.accuracy import Record, accuracy_records, unequal
from fastddpm.verify.case import (
    DAMAGE,
    INTERPRETED,
    SAME_CODE,
    SHAPE,
    Case,
    extreme_addresses,
    key_timesteps,
    normal_inputs,
    step_table,
)

# counter, key and words of Philox4x32-10: the known answers of Random123
PUBLISHED_WORDS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
# seed, stream, sample and t of the noise standard, and the bits of the first four normals
PUBLISHED_NORMALS = (
    (7, 0, 3, 999, "be320d1c bf0caa7e 3ef6351b bdaa61c2"),
    (1234567890123456789, 0, 49999, 500, "3ca8de7d c00618cb 3fe10400 3fa41a6c"),
    (2**64 - 1, 2, 2**40 + 17, 1, "3f90f173 3e6febf8 bf3cd59e be3c8b1e"),
)


class Images(NamedTuple):
    """Images that are noised as training or the likelihood noises them.

    Attributes:
        x_0: [4, *SHAPE] float32, or uint8 as bytes.
        values: x_0 in data units, float32.
        stream: of the noise.
        noise_t: the timestep in the noise's address: 0 in training, [4] in the likelihood.
    """

    x_0: Tensor
    values: Tensor
    stream: int
    noise_t: int | Tensor

    def eps(self, address: Tensor) -> Tensor:
        """The reference noise of these images, on the CPU."""
        return noise.normal(address, SHAPE, stream=self.stream, t=self.noise_t)


def words_rung(case: Case, damage: bool) -> Iterator[Record]:
    counters, keys, want = (hex_tensor(column).to(case.device) for column in zip(*PUBLISHED_WORDS, strict=True))
    counters[:, 0] += damage
    got = torch.stack(noise.philox(*counters.T, *keys.T), 1)
    yield Record("words", "Philox words with published vectors", unequal(got, want), 0)


def noise_rung(case: Case, damage: bool) -> Iterator[Record]:
    if case.implementation != INTERPRETED:
        differing = 0.0
        for seed, stream, sample, at, bits in PUBLISHED_NORMALS:
            got = noise.normal(noise.address(seed ^ damage, [sample], case.device), (4,), stream=stream, t=at)
            differing += unequal(got[0], hex_tensor([bits])[0].int().view(torch.float32))
        yield Record("noise", "torch's normals with published bits", differing, 0)

    compared = f"z and eps by {case.implementation} with torch's on the CPU"
    if case.is_reference and not damage:
        yield Record("noise", compared, note=SAME_CODE)
        return
    address, t = extreme_addresses(), torch.tensor([999, 0, 500, 2**31 - 1], dtype=torch.int64, device="cpu")
    used_address = torch.stack([address[:, 0] ^ damage, address[:, 1]], 1).to(case.device)
    z, zero = (torch.zeros_like(normal_inputs(4, SHAPE)).to(case.device) for _ in range(2))
    # x_prev = z
    only_z = torch.tensor(4 * [[0, 0, -math.inf, math.inf, 0, 0, 0, 1, *6 * [0]]], dtype=torch.float32, device="cpu")
    scale = torch.ones_like(only_z[:, 0])
    table = StepTable(only_z, scale, t.int(), clip=False, num_train_timesteps=1000).to(case.device)
    ops.step(z, zero, table, torch.arange(4, dtype=torch.int32, device=case.device), used_address)
    differing = unequal(z, noise.normal(address, SHAPE, stream=noise.STEP, t=t))
    only_eps = torch.tensor(1000 * [[0, 1]], dtype=torch.float32, device=case.device)  # x_t = eps
    for stream, noise_t in ((noise.TRAIN, 0), (noise.LIKELIHOOD, 999)):
        eps = ops.noising(zero, torch.full_like(used_address[:, 0], 999), used_address, only_eps, stream=stream)
        differing += unequal(eps, noise.normal(address, SHAPE, stream=stream, t=noise_t))
    yield Record("noise", compared, differing, 0)


def step_rung(case: Case, damage: bool) -> Iterator[Record]:
    table, address, t = case.fixed_schedule.table(), extreme_addresses(), key_timesteps(case.schedule)
    used_table = step_table(table, damage=damage).to(case.device)
    used_positions, used_address = t.int().to(case.device), address.to(case.device)
    x, z = 1.5 * normal_inputs(4, SHAPE), noise.normal(address, SHAPE, stream=noise.STEP, t=t)
    m, differing = normal_inputs(4, SHAPE, 4), 0.0
    same_code = case.is_reference and not damage
    for dtype in () if same_code else ops.FLOATS:
        m = normal_inputs(4, SHAPE, 4).to(dtype)
        want = update(x, m, table.rows[t], z, clip=table.clip)
        got = x.to(case.device, copy=True)
        rounded = torch.empty_like(got, dtype=dtype) if dtype != torch.float32 and dtype in case.dtypes else None
        ops.step(got, m.to(case.device), used_table, used_positions, used_address, out=rounded)
        differing += unequal(got, want)
        if rounded is not None:
            differing += unequal(rounded, want.to(dtype))
    compared = f"update by {case.implementation} with the float32 reference"
    yield Record("step", compared, note=SAME_CODE) if same_code else Record("step", compared, differing, 0)

    x[0, 2, 19, 19] = math.nan
    x[2, 0, 0, 0] = math.inf
    bad = torch.full((4,), -1, dtype=torch.int32, device=case.device)
    ops.step(x.to(case.device), m.to(case.device), used_table, used_positions, used_address, bad=bad)
    expected = torch.where(torch.tensor([True, False, True, False], dtype=torch.bool, device="cpu"), t.int(), -1)
    compared = f"rows with NaN or infinity flagged by {case.implementation} with those expected"
    yield Record("step", compared, unequal(bad, expected), 0)
    if not same_code:
        yield _conditional_step_record(case, damage)


def _conditional_step_record(case: Case, damage: bool) -> Record:
    """A step with all that it can be given: guidance, a part that is known, and a variance if it is learned."""
    table, address, t = case.schedule.table(), extreme_addresses(), key_timesteps(case.schedule)
    channels = SHAPE[0] * (1 if table.learned is None else 2)
    x, known = 1.5 * normal_inputs(4, SHAPE), normal_inputs(4, SHAPE, 5)
    z, known_z = (noise.normal(address, SHAPE, stream=stream, t=t) for stream in (noise.STEP, noise.KNOWN))
    m = normal_inputs(8, (channels, *SHAPE[1:]), 4)
    if table.learned == "learned":
        m[:, SHAPE[0] :].abs_()  # which is the variance
    guidance, mask = torch.tensor([1.0, 0.0, 7.5, -2.0], dtype=torch.float32, device="cpu"), known > 0
    of_mean, v = model_outputs(m, x, guidance)
    want = update(x, of_mean, table.rows[t], z, clip=table.clip, v=v, learned=table.learned)
    want = replaced(want, known, mask, table.rows[t], known_z)
    got = x.to(case.device, copy=True)
    ops.conditional_step(
        got,
        m.to(case.device),
        step_table(table, damage=damage).to(case.device),
        t.int().to(case.device),
        address.to(case.device),
        guidance=guidance.to(case.device),
        known=known.to(case.device),
        mask=mask.to(case.device),
    )
    variance = "" if table.learned is None else ", with a learned variance"
    compared = f"guided update by {case.implementation} with the float32 reference{variance}"
    return Record("step", compared, unequal(got, want), 0)


def noising_rung(case: Case, damage: bool) -> Iterator[Record]:
    compared = f"x_t by {case.implementation} with the float32 reference"
    if case.is_reference and not damage:
        yield Record("noising", compared, note=SAME_CODE)
        return
    table, address, t = case.schedule.noising_table(), extreme_addresses(), key_timesteps(case.schedule)
    used_table = (table * (DAMAGE if damage else 1)).to(case.device)
    differing = 0.0
    streams: tuple[tuple[int, int | Tensor], ...] = ((noise.TRAIN, 0), (noise.LIKELIHOOD, t))
    for (x_0, values), (stream, noise_t) in product(float_and_byte_images(), streams):
        want = add_noise(values, Images(x_0, values, stream, noise_t).eps(address), table[t])
        used_x_0, used_t, used_address = x_0.to(case.device), t.to(case.device), address.to(case.device)
        for dtype in case.dtypes:
            got = ops.noising(used_x_0, used_t, used_address, used_table, stream=stream, dtype=dtype)
            differing += unequal(got, want.to(dtype))
    yield Record("noising", compared, differing, 0)


def loss_rung(case: Case, damage: bool) -> Iterator[Record]:
    """The loss and its gradient, and the error of x_0. Damaged, the network's output has the wrong sign."""
    t, sign = key_timesteps(case.schedule), -1 if damage else 1
    floats, pixels = float_and_byte_images()
    images = (Images(*floats, noise.TRAIN, 0), Images(*pixels, noise.LIKELIHOOD, t))
    for i, predicts in enumerate(ops.PREDICTIONS):
        losses = gradients = 0.0
        for j, dtype in enumerate(ops.FLOATS):  # each dtype meets both kinds of images
            loss, gradient = unequal_in_loss(case, images[(i + j) % 2], t, predicts, dtype, sign)
            losses += loss
            gradients += gradient
        by_whom = f"by {case.implementation} with the float32 reference"
        yield Record("loss", f"{predicts}: loss {by_whom}", losses, 0)
        yield Record("loss", f"{predicts}: gradient {by_whom}", gradients, 0)

    noising_table, table, address = case.schedule.noising_table(), case.schedule.table(), extreme_addresses()
    rows = x_0_rows(table.rows, table.scale)
    used_rows = torch.cat([noising_table, rows], 1).to(case.device)
    differing = 0.0
    for j, dtype in enumerate(ops.FLOATS):
        x_0, values, stream, _ = images[j % 2]
        m = normal_inputs(4, SHAPE, 4).to(dtype)
        x_t = add_noise(values, images[j % 2].eps(address), noising_table[t])
        used_m, used_x_0 = (sign * m).to(case.device), x_0.to(case.device)
        got = ops.x_0_error(used_m, used_x_0, t.to(case.device), address.to(case.device), used_rows, stream=stream)
        differing += unequal(got, squared_error(predicted_x_0(x_t, m, rows[t]), values))
    yield Record("loss", f"the error of x_0 by {case.implementation} with the float32 reference", differing, 0)


def unequal_in_loss(
    case: Case, images: Images, t: Tensor, predicts: str, dtype: torch.dtype, sign: int
) -> tuple[float, float]:
    """How many losses, and how many elements of the gradient for a model output in a dtype, are not the reference's.

    Args: sign: of the output that `ops.eps_loss` gets; -1 damages it.
    """
    table, address = case.schedule.noising_table(), extreme_addresses()
    m, upstream = normal_inputs(4, SHAPE, 4).to(dtype), normal_inputs(4, (1,), 5)[:, 0]
    want = target(images.values, images.eps(address), table[t], predicts)
    used_x_0, used_t = images.x_0.to(case.device), t.to(case.device)
    used_address, used_table = address.to(case.device), table.to(case.device)
    with torch.enable_grad():
        used_m = (sign * m).to(case.device).requires_grad_()
        loss = ops.eps_loss(used_m, used_x_0, used_t, used_address, used_table, predicts=predicts, stream=images.stream)
        (gradient,) = torch.autograd.grad(loss, used_m, upstream.to(case.device))
    losses = unequal(loss.detach(), squared_error(m, want))
    if dtype not in case.dtypes:
        return losses, 0.0
    return losses, unequal(gradient, ((2 * upstream).view(4, 1, 1, 1) * (m.float() - want)).to(dtype))


def step64_rung(case: Case, damage: bool) -> Iterator[Record]:
    n, T, table = 16, case.schedule.num_train_timesteps, case.fixed_schedule.table()
    address, t = noise.address(0, n), torch.linspace(0, T - 1, n, dtype=torch.float32, device="cpu").round().long()
    z = noise.normal(address, SHAPE, stream=noise.STEP, t=t)
    rows, scale = step_rows(case.fixed_schedule, torch.arange(T, device="cpu"))
    rows, scale = rows[t], scale[t].view(-1, 1, 1, 1)
    x, x_0 = normal_inputs(n, SHAPE, 1), 0.3 * normal_inputs(n, SHAPE, 2)  # rarely clipped
    columns = StepColumns.of(rows)
    cx, cm = (column.view(-1, 1, 1, 1) for column in (columns.cx, columns.cm))
    m = ((x_0 / scale - cx * x) / cm).float()

    def plain(dtype: torch.dtype) -> Tensor:
        """By the paper's formulas, which predict epsilon, or else by the rows in float64."""
        schedule = case.fixed_schedule
        if schedule.prediction_type != "epsilon":
            return update(x.to(dtype), m.to(dtype), rows, z.to(dtype), clip=table.clip)
        small = schedule.variance_type.startswith("fixed_small")
        variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small" if small else "fixed_large"
        clip = schedule.clip_sample_range if schedule.clip_sample else None
        process = Diffusion(schedule.betas)
        return process.step(x.to(dtype), m.to(dtype), t, z.to(dtype), variance_type=variance_type, clip=clip)

    ours = x.to(case.device, copy=True)
    used_table, used_positions = step_table(table, damage=damage).to(case.device), t.int().to(case.device)
    ops.step(ours, m.to(case.device), used_table, used_positions, address.to(case.device))
    compared = f"update by {case.implementation} with float64"
    yield from accuracy_records("step64", compared, ours, plain(torch.float32), plain(torch.float64))


def norm_rung(case: Case, damage: bool) -> Iterator[Record]:
    groups, eps, damage_factor = 4, 1e-5, 1.01 if damage else 1
    weight, bias, *time_bias = normal_inputs(4, (32,), 1).to(case.device)
    scales_and_shifts = normal_inputs(2, (64,), 2).to(case.device)

    def plain(dtype: torch.dtype, x: Tensor, skip: Tensor | None, add: Tensor | None, rows: Tensor | None) -> Tensor:
        whole = (x if skip is None else torch.cat([x, skip], 1)).contiguous().to(dtype)
        whole = whole if add is None else whole + add.to(dtype)[:, :, None, None]
        y = F.group_norm(whole, groups, weight.to(dtype), bias.to(dtype), eps)
        if rows is not None:
            scale, shift = rows.to(dtype)[:, :, None, None].chunk(2, 1)
            y = y * (1 + scale) + shift
        return y if add is None else F.silu(y)

    # bare: without skip, time bias and SiLU; large: more than one program of the kernel can hold
    kinds = (("bare ", (9, 7), 0), ("", (9, 7), 0), ("", (9, 7), 1000), ("large ", (47, 45), 1000),
             ("scaled ", (9, 7), 0))  # fmt: skip
    for dtype, (kind, size, centre) in product(case.dtypes, kinds):
        x, rest = ((normal_inputs(2, (c, *size), c) + centre).to(case.device, dtype) for c in (24, 8))
        skip: Tensor | None = rest
        add: Tensor | None = torch.stack(time_bias)
        if kind == "bare ":
            x, skip, add = torch.cat([x, rest], 1), None, None
        x, rows = layout.channels_last(x), scales_and_shifts if kind == "scaled " else None
        factors, act = weight * damage_factor, None if add is None else "silu"
        ours = ops.group_norm(x, factors, bias, groups, eps=eps, skip=skip, add=add, scale_shift=rows, act=act)
        precision = next(name for name, value in PRECISIONS.items() if value == dtype)
        compared = f"{precision} {kind}group norm about {centre} by {case.implementation} with float64"
        theirs = plain(torch.float32, x, skip, add, rows).to(dtype)
        yield from accuracy_records("norm", compared, ours, theirs, plain(torch.float64, x, skip, add, rows))


def residual_rung(case: Case, damage: bool) -> Iterator[Record]:
    bias, differing = normal_inputs(1, (24,), 3)[0].to(case.device), 0.0
    for dtype in case.dtypes:
        h, other = (normal_inputs(2, (24, 9, 7), seed).to(case.device, dtype) for seed in (1, 2))
        want = ((h.float() + other.float()) + bias[:, None, None]).to(dtype)
        ops.residual(h, other, None if damage else bias)
        differing += unequal(h, want)
    yield Record("residual", f"residual sums by {case.implementation} with torch's in float32", differing, 0)


def float_and_byte_images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x_0, x_0 in data units): [4, *SHAPE] as float32, and as bytes."""
    x = normal_inputs(4, SHAPE)
    pixels = (x * 40 + 128).clamp(0, 255).to(torch.uint8)
    return (x, x), (pixels, (pixels.float() - 127.5) * (2 / 255))


def hex_tensor(lines: Iterable[str]) -> Tensor:
    """Lines of hexadecimal numbers as int64 [lines, numbers]."""
    return torch.tensor([[int(word, 16) for word in line.split()] for line in lines], dtype=torch.int64, device="cpu")
