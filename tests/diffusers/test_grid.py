"""The schedulers against those of the installed diffusers, bit for bit: a grid of options, any shape and dtype.

In half precision: the same dtypes and generator states as diffusers, and results at least as close to float64.
"""

import inspect
import math
import random
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.check import root_mean_square

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import (
    DDIM,
    DDPM,
    DOUBLE,
    HALF,
    PREDICTIONS,
    SINGLE,
    VARIANCES,
    assert_same,
    named,
    outcome,
    scheduler_pair,
    tensors,
)

LIMITS = (
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample_range": 0.5},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
)
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "trained")
LAPLACE = ("laplace",) if "laplace" in inspect.getsource(diffusers.DDPMScheduler) else ()  # 0.35 has none
STEPS = (
    {},
    {"n": 10},
    {"n": 7, "steps_offset": 1},
    {"n": 10, "timestep_spacing": "linspace"},
    {"n": 10, "timestep_spacing": "trailing"},
    {"n": 61, "timestep_spacing": "trailing"},  # 62 timesteps, the last is -1
)
FORMS = {
    "int": int,
    "int64": np.int64,
    "int32": np.int32,
    "tensor": torch.tensor,
    "int32 tensor": lambda t: torch.tensor(t, dtype=torch.int32),
    "one-element tensor": lambda t: torch.tensor([t]),
}
OPTIONS = {
    "DDPM": {
        "name": DDPM,
        "T": (50, 1000),
        "betas": (*BETAS, "sigmoid", *LAPLACE),
        "rescale_betas_zero_snr": (False, True),
        "variance_type": VARIANCES,
        "prediction_type": PREDICTIONS,
        "limit": LIMITS,
        "steps": (*STEPS, {"timesteps": [45, 30, 29, 3]}),
    },
    "DDIM": {
        "name": DDIM,
        "T": (50, 1000),
        "betas": BETAS,
        "rescale_betas_zero_snr": (False, True),
        "set_alpha_to_one": (True, False),
        "prediction_type": PREDICTIONS,
        "limit": LIMITS,
        "steps": STEPS,
    },
}
CALL = {
    "at": (0, 0.1, 0.5, 0.9, 0.999, 1),  # the position in the run: 0 is the first timestep, 1 the last
    "form": tuple(FORMS),
    "dtypes": tuple(product((SINGLE, DOUBLE), repeat=2)),
    "generators": (None, 1, [2], [1], [3]),  # None: torch's own, 1: one generator, [n]: a list of n
    "layout": ("contiguous", "channels-last", "strided"),
    "values": ("normal", "extreme"),
    "return_dict": (True, False),
}
CALLS = {
    "DDPM": CALL,
    "DDIM": CALL
    | {
        "eta": (0.0, 0.3, 1.0),
        "use_clipped_model_output": (False, True),
        "variance_noise": (False, True),
    },
}


def draw(rng, axes):
    return {axis: rng.choice(values) for axis, values in axes.items()}


def cases(kind, schedulers, calls):
    """A number of schedulers, and a number of calls for each; the same every time."""
    rng = random.Random(kind)
    for _ in range(schedulers):
        yield draw(rng, OPTIONS[kind]), [draw(rng, CALLS[kind]) for _ in range(calls)]


def build(name, T, betas, limit, steps, **config):
    """Our scheduler, diffusers', and the timesteps. Our fixed_large_log is compared with diffusers' fixed_large."""
    chosen = {key: value for key, value in steps.items() if key in ("steps_offset", "timestep_spacing")}
    config |= limit | chosen | {"num_train_timesteps": T}
    if betas == "trained":
        config["trained_betas"] = np.linspace(0.001, 0.2, T).tolist()
    else:
        config["beta_schedule"] = betas
    ours = getattr(fast, name)(**config)
    if config.get("variance_type") == "fixed_large_log":
        config["variance_type"] = "fixed_large"
    theirs = getattr(diffusers, name)(**config)
    for scheduler in (ours, theirs):
        if "n" in steps:
            scheduler.set_timesteps(min(steps["n"], T - 3))
        elif "timesteps" in steps:
            scheduler.set_timesteps(timesteps=steps["timesteps"])
    assert_same(ours.timesteps, theirs.timesteps)
    return ours, theirs, theirs.timesteps.tolist()


def step(scheduler, timesteps, learned, at, form, dtypes, generators, layout, values, variance_noise=False, **call):
    """The result of scheduler.step, and the states of the generators afterwards."""
    x = tensors((2, 3, 4, 4), dtypes[0], layout, values, seed=1)
    model_output = tensors((2, 3, 4, 4), dtypes[1], layout, values, seed=2)
    if learned:
        model_output = torch.cat([model_output, model_output.square()], 1)  # variances are not negative
    given = [torch.Generator() for _ in range(sum(generators) if isinstance(generators, list) else generators or 0)]
    if variance_noise:
        call["variance_noise"] = tensors((2, 3, 4, 4), dtypes[1], seed=3)
    elif given:
        call["generator"] = given if isinstance(generators, list) else given[0]
    t = FORMS[form](timesteps[round(at * (len(timesteps) - 1))])
    return outcome(scheduler.step, model_output, t, x, generators=given, **call)


@pytest.mark.parametrize(("kind", "schedulers", "calls"), [("DDPM", 500, 8), ("DDIM", 300, 8)])
def test_step_equals_diffusers(kind, schedulers, calls):
    errors = 0
    for options, asked in cases(kind, schedulers, calls):
        ours, theirs, timesteps = build(**options)
        learned = options.get("variance_type", "").startswith("learned")
        for call in asked:
            want = step(theirs, timesteps, learned, **call)
            with named((options, call)):
                assert_same(step(ours, timesteps, learned, **call), want)
            errors += isinstance(want[0], str)
    assert errors == (
        0 if kind == "DDPM" else sum(8 for options, _ in cases(kind, schedulers, 8) if not options["steps"])
    )


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_grid_covers_all_pairs_of_options(kind):
    drawn = list(cases(kind, 500 if kind == "DDPM" else 300, 8))
    for axes, chosen in (
        (OPTIONS[kind], [options for options, _ in drawn]),
        (CALLS[kind], [call for _, calls in drawn for call in calls]),
    ):
        for one, two in combinations(axes, 2):
            together = {repr((options[one], options[two])) for options in chosen}
            assert together == {repr(values) for values in product(axes[one], axes[two])}, (one, two)


# Half precision: noise and dtypes equal diffusers', errors are not larger, and results are rounded once


def assert_no_worse(got: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The error of got is at most that of theirs. In float32, where both round repeatedly, half an ulp is allowed."""
    assert got.dtype == theirs.dtype
    assert got.shape == theirs.shape
    free = torch.finfo(SINGLE).eps / 2 if got.dtype == SINGLE else 0
    for measure in (lambda error: error.abs().max(), root_mean_square):
        error, bound = measure(got.double() - exact), max(measure(theirs.double() - exact), free * measure(exact))
        assert error <= bound < math.inf, f"the error is {error:.4g}, diffusers' {bound:.4g}"


MIXED = [dtypes for dtypes in product((SINGLE, *HALF), repeat=2) if dtypes != (SINGLE, SINGLE)]


def wide_step(dtype, scheduler, model_output, t, x, z, monkeypatch, **call):
    """diffusers' step with the same inputs and noise in a wider dtype."""
    for part in ("ddpm", "ddpm_parallel", "ddim", "ddim_parallel"):
        module = getattr(diffusers.schedulers, f"scheduling_{part}")
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: z.to(dtype))
    try:
        return scheduler.step(model_output.to(dtype), t, x.to(dtype), **call)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_half_precision_step_is_as_accurate(name, dtypes, monkeypatch):
    x_dtype, output_dtype = dtypes
    x, model_output = tensors((2, 3, 16, 16), x_dtype, seed=1), tensors((2, 3, 16, 16), output_dtype, seed=2)
    ddpm = name == "DDPMScheduler"
    for prediction, limit, variance in product(
        PREDICTIONS, LIMITS[:4], VARIANCES[:3] + VARIANCES[4:6] if ddpm else ("",)
    ):
        ours, theirs = scheduler_pair(
            name, prediction_type=prediction, **limit, **({"variance_type": variance} if ddpm else {})
        )
        output = model_output
        if variance.startswith("learned"):
            output = torch.cat([model_output, tensors(model_output.shape, output_dtype, seed=4).square()], 1)
        for call in ({},) if ddpm else ({"eta": 0.0}, {"eta": 1.0, "use_clipped_model_output": True}):
            ours.set_timesteps(50)
            theirs.set_timesteps(50)
            for t in (980, 500, 20, 0):
                generator = torch.Generator()
                call |= {"generator": generator, "return_dict": False}
                (got, state), (plain, their_state) = (
                    outcome(scheduler.step, output, t, x, generators=[generator], **call)
                    for scheduler in (ours, theirs)
                )
                z = torch.randn(model_output.shape, dtype=output_dtype, generator=generator.manual_seed(1))
                single, exact = (
                    wide_step(dtype, theirs, output, t, x, z, monkeypatch, **call) for dtype in (SINGLE, DOUBLE)
                )
                with named((prediction, limit, variance, call, t)):
                    assert_same(state, their_state)
                    for one in zip(got, plain, exact, strict=True):
                        assert_no_worse(*one)
                    for result, wide in zip(got, single, strict=True):
                        assert_same(result, wide.to(result.dtype))


NOISED = [
    *(((4, 3, 8, 8), timesteps) for timesteps in ([0, 1, 500, 999], [999], 7, [-1, -1000, 3, 4])),
    *((shape, [3, 998]) for shape in ((2, 5), (2, 3, 7), (2, 3, 2, 4, 4), (2, 0, 3), (2,))),
    ((0, 3, 4, 4), []),
    ((4, 3, 8, 8), [[0, 1], [2, 3]]),
]


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("name", [*DDPM, *DDIM])
def test_noising_equals_diffusers(name, method):
    schedulers = [
        scheduler_pair(name, **config)
        for config in ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True})
    ]
    for (ours, theirs), (shape, timesteps), x_dtype, noise_dtype, kind, layout in product(
        schedulers, NOISED, (SINGLE, DOUBLE), (SINGLE, DOUBLE), (torch.int64, torch.int32), ("contiguous", "strided")
    ):
        t = torch.tensor(timesteps, dtype=kind)
        x, eps = tensors(shape, x_dtype, layout, seed=1), tensors(shape, noise_dtype, seed=2)
        with named((shape, timesteps, x_dtype, noise_dtype, kind, layout)):
            assert_same(outcome(getattr(ours, method), x, eps, t), outcome(getattr(theirs, method), x, eps, t))


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
def test_half_precision_noising_is_as_accurate(dtypes, method):
    ours, theirs = scheduler_pair("DDPMScheduler")
    x, eps = (tensors((16, 3, 16, 16), dtype, seed=seed) for seed, dtype in enumerate(dtypes))
    for t in (torch.linspace(0, 999, 16).long(), torch.tensor([999]), torch.tensor(0)):
        got, plain = (getattr(scheduler, method)(x, eps, t) for scheduler in (ours, theirs))
        single, exact = (getattr(theirs, method)(x.to(dtype), eps.to(dtype), t) for dtype in (SINGLE, DOUBLE))
        assert_no_worse(got, plain, exact)
        assert_same(got, single.to(got.dtype))


# Any shape, timestep and dtype


FEW = settings(max_examples=300, deadline=None, derandomize=True)
FLOATS = st.sampled_from((SINGLE, DOUBLE))
SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)


@FEW
@given(
    name=st.sampled_from((*DDPM, *DDIM)),
    shape=SHAPES,
    dtypes=st.tuples(FLOATS, FLOATS),
    steps=st.sampled_from((None, *range(1, 12))),
    spacing=st.sampled_from(("leading", "linspace", "trailing")),
    t=st.integers(-13, 13) | st.integers(0, 10).map(lambda place: (place,)),
    form=st.sampled_from(tuple(FORMS)),
    prediction=st.sampled_from((*PREDICTIONS, "another")),
    limit=st.sampled_from(LIMITS),
    eta=st.sampled_from((0, 0.0, 0.7, 1)),
)
def test_any_step_equals_diffusers(name, shape, dtypes, steps, spacing, t, form, prediction, limit, eta):
    ours, theirs = scheduler_pair(
        name, num_train_timesteps=11, prediction_type=prediction, timestep_spacing=spacing, **limit
    )
    call = {"eta": eta} if name in DDIM else {}
    if steps:
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
    if isinstance(t, tuple):  # a visited timestep
        t = theirs.timesteps.tolist()[t[0] % len(theirs.timesteps)]
    x, model_output = tensors(shape, dtypes[0], seed=1), tensors(shape, dtypes[1], seed=2)
    generator, t = torch.Generator(), FORMS[form](t)
    call["generator"] = generator
    assert_same(
        outcome(ours.step, model_output, t, x, generators=[generator], **call),
        outcome(theirs.step, model_output, t, x, generators=[generator], **call),
    )


@FEW
@given(
    name=st.sampled_from((*DDPM, *DDIM)),
    method=st.sampled_from(("add_noise", "get_velocity")),
    shape=SHAPES,
    dtypes=st.tuples(FLOATS, FLOATS),
    t=st.lists(st.integers(-12, 12), max_size=4) | st.integers(-12, 12),
)
def test_any_noising_equals_diffusers(name, method, shape, dtypes, t):
    ours, theirs = scheduler_pair(name, num_train_timesteps=11)
    x, eps = tensors(shape, dtypes[0], seed=1), tensors(shape, dtypes[1], seed=2)
    t = torch.tensor(t, dtype=torch.int64)
    assert_same(outcome(getattr(ours, method), x, eps, t), outcome(getattr(theirs, method), x, eps, t))


def test_a_damaged_result_is_detected():
    x = torch.tensor([1.0, math.nan, -0.0, math.inf])
    assert_same((x, "a"), (x.clone(), "a"))
    damaged = (
        x.double(),
        x[:3],
        x.half(),
        x[None],
        x * (1 + 2**-23),
        -x,
        x.nan_to_num(),
        x.clone().requires_grad_(),
        x.tolist(),
    )
    for other in damaged:
        with pytest.raises(AssertionError):
            assert_same((other, "a"), (x, "a"))
    with pytest.raises(AssertionError):
        assert_same((x, "b"), (x, "a"))
    exact = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    for dtype, ulp in ((SINGLE, 2**-23), (torch.float16, 2**-10)):
        ref = exact.to(dtype)
        assert_no_worse(ref + ulp, ref - ulp, exact)
        for worse in (ref + 2 * ulp, ref * math.nan, exact):
            with pytest.raises(AssertionError):
                assert_no_worse(worse, ref + ulp, exact)
