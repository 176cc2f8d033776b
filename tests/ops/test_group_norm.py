"""`ops.group_norm` in torch, in the Triton interpreter and on a GPU: as near to float64 as plain torch."""

import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import ops
from fastddpm.core import layout
from tests.support.bits import assert_same_bits
from tests.support.check import assert_as_accurate, error_line
from tests.support.draws import generator

# In the interpreter numpy warns of NaN, and of padding, which is computed but not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

# Means as far from 0, at a standard deviation of 1, as each format still resolves.
MEANS = {torch.float32: 1000.0, torch.float16: 100.0, torch.bfloat16: 10.0}


class Problem:
    """Arguments of `ops.group_norm`, and the result of plain torch."""

    def __init__(
        self, shape, skip=0, groups=1, *, dtype=torch.float32, mean=0.0, rows=0, scaled=0, act="silu", film=(0, 2),
        residual=False, seed=0,
    ):  # fmt: skip
        """Args: skip: number of channels to append to those of shape; rows: number of rows of add, 0 for no add;
        scaled: number of rows of scale_shift; film: number of rows of film, and 2 for scales and shifts, 1 for shifts.
        """
        n, channels, *spatial = shape
        channels += skip
        both = (torch.randn(n, channels, *spatial, generator=generator(seed)) + mean).to(dtype)
        self.x, self.skip = layout.channels_last(both[:, : channels - skip]), layout.channels_last(both[:, -skip:])
        self.skip = self.skip if skip else None
        self.weight, self.bias, shifts = torch.randn(3, channels, generator=generator(seed + 1)).unbind()
        self.table = torch.full((rows, channels + 5), nan)  # add is a slice of its columns
        self.table[:, 2:-3] = 3 * torch.randn(rows, channels, generator=generator(seed + 2)) + 5 * shifts
        self.scaled = torch.full((scaled, 2 * channels + 5), nan)  # scale_shift is a slice of its columns
        self.scaled[:, 2:-3] = 2 * torch.randn(scaled, 2 * channels, generator=generator(seed + 3))
        (count, parts), self.width = film, channels
        self.film = torch.full((count, parts * channels + 5), nan)  # film is a slice of its columns
        self.film[:, 2:-3] = 2 * torch.randn(count, parts * channels, generator=generator(seed + 4))
        other = torch.randn(n, channels, *spatial, generator=generator(seed + 5)).to(dtype) if residual else None
        self.residual = layout.channels_last(other) if residual else None
        self.groups, self.act, self.eps = groups, act, 1e-5

    def arguments(self, device="cpu"):
        """Positional and keyword arguments."""
        tables = {"add": self.table, "scale_shift": self.scaled, "film": self.film}
        rows = {name: table.to(device)[:, 2:-3] if len(table) else None for name, table in tables.items()}
        x, skip, weight, bias, residual = (
            None if a is None else a.to(device) for a in (self.x, self.skip, self.weight, self.bias, self.residual)
        )
        options = {"eps": self.eps, "skip": skip, "act": self.act, "residual": residual, **rows}
        return (x, weight, bias, self.groups), options

    def run(self, device="cpu") -> Tensor:
        args, options = self.arguments(device)
        return ops.group_norm(*args, **options)

    def plain(self, dtype, device="cpu") -> Tensor:
        """The result of torch, all in dtype; rounded to x's dtype at the end unless dtype is float64."""
        (x, weight, bias, groups), options = self.arguments(device)
        v = torch.cat([x] if options["skip"] is None else [x, options["skip"]], 1).to(dtype).contiguous()
        add, scale_shift, film = (
            None if rows is None else rows.to(dtype).view(*rows.shape, *[1] * (x.ndim - 2))
            for rows in (options["add"], options["scale_shift"], options["film"])
        )
        if add is not None:
            v = v + add
        y = torch.group_norm(v, groups, weight.to(dtype), bias.to(dtype), self.eps)
        if scale_shift is not None:
            scale, shift = scale_shift.chunk(2, 1)
            y = y * (1 + scale) + shift
        y = y if self.act is None else {"silu": F.silu, "mish": F.mish}[self.act](y)
        if film is not None:
            y = y * film[:, : self.width] + film[:, self.width :] if film.shape[1] > self.width else y + film
        y = y if self.residual is None else y + options["residual"].to(dtype)
        return y if dtype == torch.float64 else y.to(x.dtype)

    def check(self, y: Tensor) -> None:
        ref = self.plain(torch.float64, y.device)
        assert y.dtype == self.x.dtype
        assert layout.is_channels_last(y)
        assert_as_accurate(y, self.plain(torch.float32, y.device), ref)


SHAPES = [  # shape, channels of skip, groups
    ((2, 16, 4, 4), 0, 4),  # groups of 4
    ((1, 24, 3, 5), 8, 4),  # 8; 15 pixels, padded to 16
    ((2, 20, 5, 3), 16, 3),  # 12, not a power of two; one group has channels of both inputs
    ((2, 32, 2, 2), 0, 2),  # 16
    ((1, 40, 3, 3), 8, 2),  # 24
    ((2, 5, 2, 3), 7, 3),  # 4, of two inputs that are not aligned to 16 bytes
    ((2, 15, 3, 3), 0, 5),  # 3
    ((3, 12, 1, 1), 0, 4),  # one pixel
    ((3, 12), 0, 4),  # no pixels at all
    ((1, 7, 2, 2), 0, 7),  # one channel
    ((1, 7, 3, 3), 4, 1),  # one group
    ((1, 1, 1, 1), 1, 2),  # two elements
    ((2, 6, 11), 2, 2),  # sequences
    ((1, 8, 2, 3, 2), 0, 2),  # volumes
]


@pytest.fixture
def kernel():
    return pytest.importorskip("fastddpm.kernels.group_norm")


@pytest.fixture
def planned(monkeypatch, kernel):
    """A function that sets the plan of later launches."""
    return lambda plan: monkeypatch.setattr(kernel, "plan", lambda *shape: kernel.Plan(*plan))


@pytest.mark.parametrize(
    ("rows", "scaled", "act"),
    [(0, 0, None), (1, 0, "silu"), ("n", 0, "mish"), (1, "n", "silu"), (0, 1, None)],
    ids=["", "add, silu", "adds, mish", "add, scales and shifts, silu", "scale and shift"],
)
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize(("shape", "skip", "groups"), SHAPES, ids=str)
def test_group_norm_is_as_accurate_as_torch(shape, skip, groups, dtype, rows, scaled, act, device, guards):
    rows, scaled = (shape[0] if count == "n" else count for count in (rows, scaled))
    problem = Problem(shape, skip, groups, dtype=dtype, mean=MEANS[dtype], rows=rows, scaled=scaled, act=act)
    args, options = problem.arguments(device)
    x = guards.holding(problem.x, device)
    options["skip"] = None if problem.skip is None else guards.holding(problem.skip, device)
    y = ops.group_norm(x, *args[1:], **options)
    problem.check(y)
    guards.check()
    assert_same_bits(x, problem.x)
    if problem.skip is not None:
        assert_same_bits(options["skip"], problem.skip)


# activation, FiLM's rows and their parts, whether there is a residual
ENDS = [("mish", (1, 2), False), ("mish", ("n", 2), True), ("silu", (1, 1), True), (None, ("n", 1), False)]
ENDS += [("mish", (0, 2), True)]


@pytest.mark.parametrize(("act", "film", "residual"), ENDS, ids=str)
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize(("shape", "skip", "groups"), SHAPES[1:4] + SHAPES[8:9] + SHAPES[12:13], ids=str)
def test_film_and_residual_are_as_accurate_as_torch(shape, skip, groups, dtype, act, film, residual, device, guards):
    film = (shape[0] if film[0] == "n" else film[0]), film[1]
    problem = Problem(shape, skip, groups, dtype=dtype, mean=MEANS[dtype], act=act, film=film, residual=residual)
    args, options = problem.arguments(device)
    options["residual"] = None if problem.residual is None else guards.holding(problem.residual, device)
    problem.check(ops.group_norm(*args, **options))
    guards.check()
    if residual:
        assert_same_bits(options["residual"], problem.residual)


# Groups of 12 channels, one with channels of both inputs, over 15 pixels: held, then shared by 4, 2, 15 and 1.
PLANS = [(1, 16, 16, 4), (2, 16, 16, 4), (4, 16, 16, 4), (1, 2, 4, 4), (2, 4, 8, 4), (1, 1, 1, 4), (4, 4, 16, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_is_as_accurate_as_torch(plan, dtype, kernel_device, guards, planned):
    problem = Problem((2, 20, 5, 3), 16, 3, dtype=dtype, mean=MEANS[dtype], rows=2, scaled=2)
    planned(plan)
    problem.check(problem.run(kernel_device))
    guards.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_ends_with_film_and_residual(plan, parts, dtype, kernel_device, guards, planned):
    problem = Problem((2, 20, 5, 3), 16, 3, dtype=dtype, mean=MEANS[dtype], act="mish", film=(2, parts), residual=True)
    planned(plan)
    problem.check(problem.run(kernel_device))
    guards.check()


@pytest.mark.parametrize(
    ("pixels", "groups", "dtype"),
    [(1, 4, torch.bfloat16), (7, 3, torch.float32), (20, 4, torch.bfloat16), (20, 3, torch.float16)],
)
def test_every_candidate_is_as_accurate_as_torch(pixels, groups, dtype, kernel_device, planned, kernel, monkeypatch):
    for name, value in {
        "FULL": 4,
        "HELD": 64,
        "TILE": 16,
        "MAX_SLABS": 3,
    }.items():  # a small problem then has the plans of a large one
        monkeypatch.setattr(kernel, name, value)
    problem = Problem((1, 3 * groups, pixels), groups, groups, dtype=dtype, mean=MEANS[dtype], rows=1)
    plans = kernel.candidates(1, pixels, 4 * groups, groups, dtype.itemsize)
    if pixels == 20:
        assert {plan.rows < pixels for plan in plans} == {False, True}
        assert len({plan.groups for plan in plans}) > 1
    if kernel_device == "cpu":  # the interpreter has no warps
        plans = {plan[:3]: plan for plan in plans}.values()
    for plan in plans:
        planned(plan)
        problem.check(problem.run(kernel_device))


def test_a_group_far_from_zero_is_as_accurate_as_one_near_zero(kernel_device):
    """The second pass corrects the mean: around 2^24, neighbouring float32 numbers are 2 apart."""
    near, far = (Problem((2, 16, 64), groups=4, act=None) for _ in range(2))
    near.x = (near.x * 4).round() * 2
    far.x = near.x + 2**24
    assert torch.equal(far.x.double(), near.x.double() + 2**24)
    near_plain, ref = near.plain(torch.float32, kernel_device), far.plain(torch.float64, kernel_device)
    assert_as_accurate(far.run(kernel_device), near_plain, ref)
    with pytest.raises(AssertionError):
        assert_as_accurate(far.plain(torch.float32, kernel_device), near_plain, ref)


# Independent entries

HELD_AND_SHARED = [(4, 16, 16, 4), (2, 4, 8, 4)]


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_entries_do_not_depend_on_each_other(rows, plan, device, planned):
    planned(plan)
    y = Problem((2, 20, 3, 3), 16, 4, dtype=torch.bfloat16, rows=rows, scaled=rows).run(device)
    for i in range(2):
        problem = Problem((2, 20, 3, 3), 16, 4, dtype=torch.bfloat16, rows=rows, scaled=rows)
        for tensor in (problem.x, problem.skip, *[problem.table, problem.scaled] * (rows > 1)):
            tensor[1 - i] = nan
        got = problem.run(device)
        assert torch.equal(got[i], y[i])
        assert got[1 - i].isnan().all()
        problem.x, problem.skip = problem.x[i : i + 1], problem.skip[i : i + 1]
        if rows > 1:
            problem.table, problem.scaled = problem.table[i : i + 1], problem.scaled[i : i + 1]
        assert torch.equal(problem.run(device)[0], y[i])


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["x", "skip", "add"])
def test_nan_and_inf_stay_in_their_group(where, bad, plan, device, planned):
    problem = Problem((2, 20, 3, 3), 16, 3, rows=2)
    planned(plan)
    y = problem.run(device)
    if where == "x":
        problem.x[1, 13, 2, 2] = bad
    elif where == "skip":
        problem.skip[1, 3, 0, 0] = bad
    else:
        problem.table[1, 2 + 20] = bad
    expected_nan = torch.zeros_like(y, dtype=torch.bool)
    expected_nan[1, 12:24] = True  # the group of channel 13, of x, and channel 23, of skip
    got = problem.run(device)
    assert torch.equal(got[~expected_nan], y[~expected_nan])
    assert got[expected_nan].isnan().all()


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["film", "residual"])
def test_nan_and_inf_of_film_and_residual_stay_in_their_channel(where, bad, plan, device, planned):
    problem = Problem((2, 20, 3, 3), 16, 3, act="mish", film=(2, 1), residual=True)
    planned(plan)
    y = problem.run(device)
    expected = torch.zeros_like(y, dtype=torch.bool)
    if where == "film":
        problem.film[1, 2 + 13] = bad
        expected[1, 13] = True
    else:
        problem.residual[1, 13, 2, 2] = bad
        expected[1, 13, 2, 2] = True
    got = problem.run(device)
    assert torch.equal(got[~expected], y[~expected])
    assert ((got[expected] == bad) | got[expected].isnan()).all()
    assert not got[expected].isfinite().any()


# The time bias


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
def test_one_row_equals_the_same_row_for_each_entry(plan, device, planned):
    one, each = (Problem((2, 20, 3, 3), 16, 4, dtype=torch.bfloat16, rows=rows) for rows in (1, 2))
    each.table[:] = one.table
    planned(plan)
    y = one.run(device)
    one.check(y)
    one.check(each.run(device))
    args, options = one.arguments(device)
    assert torch.equal(ops.group_norm(*args, **options | {"add": options["add"].expand(2, -1)}), y)
    one.check(ops.group_norm(*args, **options | {"add": options["add"].contiguous()}))


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("skip", [0, 16])
def test_a_scale_of_minus_one_leaves_the_shift(skip, plan, device, planned):
    """Exactly: whatever the norm is, it is multiplied by 0."""
    planned(plan)
    problem = Problem((2, 20, 3, 3), skip, 4, scaled=2, act=None)
    channels = 20 + skip
    problem.scaled[:, 2 : 2 + channels] = -1
    shift = problem.scaled[:, 2 + channels : -3, None, None].expand(2, channels, 3, 3)
    assert torch.equal(problem.run(device).cpu(), shift)


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
def test_one_scale_equals_the_same_for_each_entry(plan, device, planned):
    planned(plan)
    one, each = (Problem((2, 20, 3, 3), 16, 4, rows=1, scaled=rows) for rows in (1, 2))
    each.scaled[:] = one.scaled
    assert torch.equal(one.run(device), each.run(device))


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("skip", [0, 16])
def test_a_film_scale_of_0_leaves_the_shift_and_the_residual(skip, plan, device, planned):
    """Exactly: FiLM and the residual come after everything else."""
    planned(plan)
    problem = Problem((2, 20, 3, 3), skip, 4, act="mish", film=(2, 2), residual=True)
    channels = 20 + skip
    problem.film[:, 2 : 2 + channels] = 0
    shift = problem.film[:, 2 + channels : -3, None, None]
    assert torch.equal(problem.run(device).cpu(), shift + problem.residual)


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_one_row_of_film_equals_the_same_for_each_entry(parts, plan, device, planned):
    planned(plan)
    one, each = (Problem((2, 20, 3, 3), 16, 4, act="mish", film=(rows, parts)) for rows in (1, 2))
    each.film[:] = one.film
    assert torch.equal(one.run(device), each.run(device))


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
def test_a_large_bias_is_as_accurate_as_in_torch(plan, device, planned):
    problem = Problem((2, 8, 3, 3), groups=4, rows=2)
    problem.table += 1000
    planned(plan)
    problem.check(problem.run(device))


# Extreme values


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("act", ["silu", "mish"])
def test_activations_of_large_numbers(act, dtype, plan, device, planned):
    problem = Problem((2, 8, 3, 3), groups=2, dtype=dtype, mean=MEANS[dtype], act=act)
    problem.weight *= 200
    planned(plan)
    problem.check(problem.run(device))
    problem.act = None
    y = problem.plain(torch.float64)
    assert y.min() < -200 < 200 < y.max()  # exp(-y) overflows from -89 down


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
@pytest.mark.parametrize("value", [0.0, 1000.0, -3e4])
def test_a_constant_group_gives_its_bias(value, plan, kernel_device, planned):
    problem = Problem((2, 8, 3, 3), groups=2, act=None)
    problem.x.fill_(value)
    planned(plan)
    want = problem.bias.view(8, 1, 1).expand(2, 8, 3, 3)
    assert_as_accurate(problem.run(kernel_device).cpu(), want, want.double())


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (0, 8)], ids=str)
def test_empty_input_gives_empty_output(shape, device):
    problem = Problem(shape, groups=2, rows=1)
    assert problem.run(device).shape == shape


# The kernels


FAR = """
import sys, torch
from fastddpm.kernels import group_norm as kernels

device, n, pixels, channels = sys.argv[1], 130, 2, 1 << 23  # 2^24 elements per sample; one group is computed
assert (n - 1) * pixels * (channels - 4) > 2**31
tile = {"PER_GROUP": 8, "WIDTH": 8, "GROUPS": 1, "STRIPES": 1, "num_warps": 1}

def far(columns, value=None):  # on a CPU, untouched memory takes no physical pages
    memory = torch.empty(n * pixels * columns, dtype=torch.float16, device=device)
    group = memory.view(n, pixels, columns)[:, :, :8]
    return memory, group if value is None else group[:, :, : value.shape[2]].copy_(value)

drawn = torch.randn(n, pixels, 8, generator=torch.Generator().manual_seed(0)).half()
x, skip = drawn[:, :, :4].to(device).contiguous(), far(channels - 4, drawn[:, :, 4:])[0]
weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
want = torch.group_norm(drawn.movedim(2, 1).double(), 1, eps=1e-5).movedim(1, 2)

def check(group):
    assert (group.cpu().double() - want).abs().max() <= torch.finfo(torch.float16).eps * want.abs().max()

inputs, sizes = (x, skip, None), (pixels, channels, 4, 0)
others = weight, bias, None, None, None, None
y, group = far(channels)
kernels.held_kernel[n,](y, *inputs, *others, *sizes, 0, 0, 1e-5, ACT=None, ROWS=2, **tile)
check(group)
statistics = torch.empty(n * 2 * 3 * (channels // 8), device=device)  # 2^31 bytes and more
tile |= {"ROWS": 1, "SLAB": 1}
y, group = far(channels)
kernels.statistics_kernel[2 * n,](statistics, *inputs, *sizes, 2, **tile)
kernels.apply_kernel[2 * n,](y, *inputs, *others, statistics, *sizes, 0, 0, 2, 1e-5, ACT=None, SLABS=2, **tile)
check(group)
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(kernel_device):
    """Computes the first group of 130 large samples, in a subprocess, as a wrong address may crash it."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9:
        pytest.skip("needs 16 GB of memory: it reserves 11 GB, though it touches little of it")
    subprocess.run([sys.executable, "-c", FAR, kernel_device], check=True)


@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
def test_kernels_are_launched_on_the_device_of_x(plan, interpreted, planned, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    planned(plan)
    problem = Problem((2, 8, 3, 3), groups=4)
    problem.run()
    assert len(seen) == 1
    assert seen[0] is problem.x


# The plans

CIFAR = [(1024, 128), (1024, 256), (1024, 384), (256, 128), (256, 256), (256, 384), (256, 512), (64, 256), (64, 512)]
CIFAR += [(16, 256), (16, 512)]
CELEBA = [(65_536, 128), (65_536, 256), (16_384, 128), (16_384, 256), (16_384, 384), (4096, 256), (4096, 512)]
CELEBA += [(4096, 384), (1024, 256), (1024, 512), (1024, 768), (256, 512), (256, 768), (256, 1024), (64, 1024)]
ODD = [(1, 32), (15, 96), (77, 288), (100_000, 32), (3, 32 * 8192)]


@pytest.mark.parametrize(("pixels", "channels"), CIFAR + CELEBA + ODD)
def test_plans_are_valid(pixels, channels, kernel):
    width = channels // 32
    for n, itemsize in product((1, 4, 64, 4096), (2, 4)):
        plans = kernel.candidates(n, pixels, channels, 32, itemsize)
        assert kernel.plan(n, pixels, channels, 32, itemsize) in plans
        assert len(set(plans)) == len(plans)
        for plan in plans:
            slabs = -(-pixels // plan.slab)
            assert plan.groups.bit_count() == plan.rows.bit_count() == plan.warps.bit_count() == 1
            assert plan.groups <= 32
            assert plan.warps <= 16
            assert plan.slab % plan.rows == 0
            assert plan.rows < pixels or slabs == 1
            assert slabs <= kernel.MAX_SLABS
            assert n * slabs * -(-32 // plan.groups) < 2**31
            assert plan.rows * plan.groups * width <= max(2 * kernel.HELD, width)
            assert plan.groups == 1 or plan.groups * width * itemsize % 16 == 0  # whole accesses of 16 bytes


@pytest.mark.parametrize(("pixels", "channels"), CIFAR)
def test_norms_of_a_small_model_take_one_launch(pixels, channels, kernel):
    for n, itemsize in product((1, 8, 64, 1024), (2, 4)):
        assert kernel.plan(n, pixels, channels, 32, itemsize).rows >= pixels


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("pixels", "channels"), CELEBA)
def test_programs_share_large_groups_so_that_one_sample_fills_a_gpu(pixels, channels, itemsize, kernel):
    plan = kernel.plan(1, pixels, channels, 32, itemsize)
    programs = -(-32 // plan.groups) * -(-pixels // plan.slab)
    assert (programs >= 132) == (pixels * channels > 32 * kernel.HELD)  # an H200's multiprocessors


# Invalid arguments


def damaged_arguments(name, damage):
    """Arguments of which one is damaged."""
    names = ("x", "weight", "bias", "groups")
    args, options = Problem((2, 8, 3, 3), 4, 3, rows=2, scaled=2, film=(2, 2), residual=True).arguments()
    named = dict(zip(names, args, strict=True)) | options
    return named | {name: damage(named[name])}


BAD = [
    ("x", lambda x: x.double(), "x is (2, 8, 3, 3) torch.float64 on cpu; want [N, C, *spatial] or [N, D] of float32,"),
    ("x", lambda x: x.contiguous(), "x has strides (72, 9, 3, 1), not channels-last; use layout.channels_last(x)"),
    (
        "x",
        lambda x: x.clone().requires_grad_(),
        "x requires a gradient, but group_norm is not differentiable in it; call it under",
    ),
    (
        "x",
        lambda x: x[:1],
        "skip is (2, 4, 3, 3) torch.float32 on cpu, x (1, 8, 3, 3) torch.float32 on cpu; only their",
    ),
    (
        "skip",
        lambda x: x.half(),
        "skip is (2, 4, 3, 3) torch.float16 on cpu, x (2, 8, 3, 3) torch.float32 on cpu; only",
    ),
    ("skip", lambda x: x[:, :, :2], "skip has strides (36, 1, 12, 4), not channels-last"),
    ("skip", lambda x: x.new_empty(2, 2, 3, 4).movedim(3, 1), "skip is (2, 4, 2, 3) torch.float32 on cpu, x (2, 8, 3,"),
    ("skip", lambda x: x.to("meta"), "skip is (2, 4, 3, 3) torch.float32 on meta, x (2, 8, 3, 3) torch.float32 on cpu"),
    ("skip", lambda x: 3, "skip is int; want [N, C, *spatial] or [N, D]"),
    (
        "groups",
        lambda groups: 5,
        "groups is 5; want a whole number that divides the 12 channels into groups of at most",
    ),
    ("groups", lambda groups: 0, "groups is 0; want a whole number"),
    ("groups", lambda groups: 3.0, "groups is 3.0; want a whole number"),
    ("weight", lambda w: w[:8], "weight is (8,) torch.float32 on cpu; want (12,) torch.float32 on cpu, contiguous"),
    ("weight", lambda w: w.half(), "weight is (12,) torch.float16 on cpu; want (12,) torch.float32"),
    ("weight", lambda w: None, "weight is NoneType; want (12,) torch.float32"),
    ("weight", lambda w: w.clone().requires_grad_(), "weight requires a gradient"),
    ("bias", lambda b: b.repeat(2)[::2], "bias is (12,) torch.float32 on cpu; want (12,) torch.float32 on cpu, contig"),
    ("bias", lambda b: b.to("meta"), "bias is (12,) torch.float32 on meta; want (12,) torch.float32 on cpu"),
    (
        "add",
        lambda add: add[:, 1:],
        "add is (2, 11) torch.float32 on cpu; want (1 or 2, 12) torch.float32 on cpu, each",
    ),
    ("add", lambda add: add.repeat(2, 1), "add is (4, 12) torch.float32 on cpu; want (1 or 2, 12)"),
    ("add", lambda add: add[0], "add is (12,) torch.float32 on cpu; want (1 or 2, 12)"),
    ("add", lambda add: add.double(), "add is (2, 12) torch.float64 on cpu; want (1 or 2, 12) torch.float32"),
    ("add", lambda add: add.to("meta"), "add is (2, 12) torch.float32 on meta; want (1 or 2, 12) torch.float32 on cpu"),
    (
        "add",
        lambda add: add.t().contiguous().t(),
        "add is (2, 12) torch.float32 on cpu; want (1 or 2, 12) torch.float32",
    ),
    ("add", lambda add: add.clone().requires_grad_(), "add requires a gradient"),
    ("add", lambda add: 1.0, "add is float; want (1 or 2, 12)"),
    ("scale_shift", lambda rows: rows[:, 1:], "scale_shift is (2, 23) torch.float32 on cpu; want (1 or 2, 24)"),
    (
        "scale_shift",
        lambda rows: rows.half(),
        "scale_shift is (2, 24) torch.float16 on cpu; want (1 or 2, 24) torch.fl",
    ),
    ("scale_shift", lambda rows: rows.clone().requires_grad_(), "scale_shift requires a gradient"),
    ("film", lambda rows: rows[:, 1:], "film is (2, 23) torch.float32 on cpu; want (1 or 2, 24 or 12) torch.float32"),
    ("film", lambda rows: rows.repeat(2, 1), "film is (4, 24) torch.float32 on cpu; want (1 or 2, 24 or 12)"),
    ("film", lambda rows: rows.half(), "film is (2, 24) torch.float16 on cpu; want (1 or 2, 24 or 12) torch.float32"),
    ("film", lambda rows: rows[:, ::2], "film is (2, 12) torch.float32 on cpu; want (1 or 2, 24 or 12) torch.float32"),
    ("film", lambda rows: rows.clone().requires_grad_(), "film requires a gradient"),
    (
        "residual",
        lambda x: x.half(),
        "residual is (2, 12, 3, 3) torch.float16 on cpu; want (2, 12, 3, 3) torch.float32 on cpu, like the result",
    ),
    ("residual", lambda x: x[:1], "residual is (1, 12, 3, 3) torch.float32 on cpu; want (2, 12, 3, 3) torch.float32"),
    ("residual", lambda x: x.contiguous(), "residual has strides (108, 9, 3, 1), not channels-last"),
    ("residual", lambda x: x.clone().requires_grad_(), "residual requires a gradient"),
    ("act", lambda act: "relu", "act is 'relu'; want 'silu', 'mish' or None"),
    ("act", lambda act: True, "act is True; want 'silu'"),
    ("eps", lambda eps: 0, "eps is 0; want a number > 0"),
    ("eps", lambda eps: nan, "eps is nan; want a number > 0"),
    ("eps", lambda eps: "1e-5", "eps is '1e-5'; want a number > 0"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_group_norm_rejects_invalid_arguments(name, damage, message):
    assert error_line(ops.group_norm, **damaged_arguments(name, damage)).startswith(f"group_norm: {message}")


def test_sizes_beyond_the_kernels_limits_are_rejected():
    def norm(x, groups=1, **options):
        weight = torch.empty(x.shape[1] + (options["skip"].shape[1] if options else 0), device="meta")
        return ops.group_norm(x, weight, weight, groups, eps=1e-5, **options)

    largest = layout.empty(1, (2, 1 << 14, 1 << 14), dtype=torch.float16, device="meta")
    assert norm(largest).shape == largest.shape
    assert norm(torch.empty(1, 1 << 13, device="meta")).shape == (1, 1 << 13)
    beyond = layout.empty(1, (1, (1 << 29) + 1), dtype=torch.float16, device="meta")
    assert "a sample may have at most 536870912 elements" in error_line(norm, beyond)
    more = layout.empty(1, (1, 1 << 14, 1 << 14), dtype=torch.float16, device="meta")
    assert "a sample of both may have at most 536870912 elements" in error_line(norm, largest, skip=more)
    assert "of at most 8192" in error_line(norm, torch.empty(1, (1 << 13) + 1, device="meta"))


def test_parameters_may_require_gradients_under_no_grad():
    problem = Problem((2, 8, 3, 3), groups=2)
    y = problem.run()
    problem.weight.requires_grad_()
    with torch.no_grad():
        assert torch.equal(problem.run(), y)


# torch.compile, fake tensors, graphs


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_group_norm(device, dynamic):
    def block(problem, x, skip, table):
        h = ops.group_norm(
            x, problem["weight"], problem["bias"], 3, eps=1e-5, skip=skip, add=table[:, 2:-3], act="silu"
        )
        return h * 2

    problem = Problem((2, 8, 3, 3), 4, 3, rows=2)
    (x, weight, bias, _), options = problem.arguments(device)
    arguments = ({"weight": weight, "bias": bias}, x, options["skip"], problem.table.to(device))
    y = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*arguments)
    assert torch.equal(y, block(*arguments))
    assert layout.is_channels_last(y)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_group_norm_passes_opcheck(full, device):
    problem = Problem((2, 8, 3, 3), 4 * full, 2, dtype=torch.bfloat16, rows=2 * full, scaled=2 * full,
                      act="mish" if full else None, film=(2 * full, 2), residual=full)  # fmt: skip
    args, o = problem.arguments(device)
    rest = 1e-5, o["skip"], o["add"], o["scale_shift"], o["act"], o["film"], o["residual"]
    torch.library.opcheck(torch.ops.fastddpm.group_norm.default, (*args, *rest))


def test_group_norm_supports_fake_tensors():
    with FakeTensorMode():
        x, skip = (torch.empty(2, 4, 4, c, dtype=torch.bfloat16, device="cuda").movedim(3, 1) for c in (8, 16))
        weight = torch.empty(24, device="cuda")
        y = ops.group_norm(x, weight, weight, 4, eps=1e-5, skip=skip, add=torch.empty(1, 24, device="cuda"))
        assert (y.shape, y.dtype, y.device) == ((2, 24, 4, 4), x.dtype, x.device)
        assert layout.is_channels_last(y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("plan", HELD_AND_SHARED, ids=str)
def test_captured_group_norm_reads_current_values(plan, planned):
    planned(plan)
    problem, later = (Problem((2, 20, 3, 3), 16, 4, dtype=torch.bfloat16, rows=1, seed=seed) for seed in (0, 10))
    args, options = problem.arguments("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.group_norm(*args, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.group_norm(*args, **options)
    graph.replay()
    assert torch.equal(y, ops.group_norm(*args, **options))
    args[0].copy_(later.x)
    options["skip"].copy_(later.skip)
    options["add"].copy_(later.table[:, 2:-3])
    graph.replay()
    assert torch.equal(y, ops.group_norm(*args, **options))
    later.weight, later.bias = problem.weight, problem.bias
    later.check(y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize(("pixels", "channels"), CIFAR + CELEBA)
def test_norms_of_the_models_are_as_accurate_as_torch(pixels, channels, n):
    skip = {384: 128, 512: 256, 768: 256, 1024: 512}.get(channels, 0)
    problem = Problem((n, channels - skip, pixels), skip, 32, dtype=torch.bfloat16, mean=10, rows=1)
    problem.check(problem.run("cuda"))
