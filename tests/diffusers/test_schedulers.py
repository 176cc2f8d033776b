"""The schedulers against those of the installed diffusers: everything but the options of a step."""

import copy
import inspect
import json
import pickle
from itertools import product

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import (
    DDIM,
    DDPM,
    DOUBLE,
    NAMES,
    OUTPUT,
    OUTPUT_WITH_VARIANCE,
    SINGLE,
    X,
    apply_to_both,
    assert_same,
    assert_same_outcome,
    assert_same_steps,
    named,
    outcome,
    scheduler_pair,
    tensors,
    with_steps,
)

# The constructor and the attributes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.1, 0.2, 7)},  # T stays 1000
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3, "rescale_betas_zero_snr": True},
    ],
    ids=str,
)
def test_attributes_equal_diffusers(name, config):
    ours, theirs = scheduler_pair(name, **config)
    configs = [dict(scheduler.config) for scheduler in (ours, theirs)]
    for one in configs:
        one["_use_default_values"] = sorted(one["_use_default_values"])
        one.update({key: value.tolist() for key, value in one.items() if isinstance(value, np.ndarray)})
    assert configs[0] == configs[1]
    for attribute, want in vars(theirs).items():
        if attribute != "_internal_dict":
            with named(attribute):
                assert_same(getattr(ours, attribute), want)
    for attribute in ("order", "_compatibles", "config_name", "has_compatibles", "init_noise_sigma", "__module__"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert len(ours) == len(theirs) == theirs.config.num_train_timesteps
    assert repr(ours) == repr(theirs)
    assert type(ours).__name__ == name
    assert isinstance(ours, getattr(diffusers, name))
    assert ours.scale_model_input(X, 3) is X


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "step", "set_timesteps", "add_noise", "get_velocity", "_get_variance"])
def test_parameters_equal_diffusers(name, method):
    """Pipelines check by name whether a scheduler accepts eta or timesteps; callers may rely on the order."""
    ours, theirs = (getattr(getattr(module, name), method, None) for module in (fast, diffusers))
    if theirs is None:
        pytest.skip("diffusers does not have it")
    ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (ours, theirs))
    shape = lambda parameters: [(one.name, one.kind, one.default) for one in parameters]
    assert shape(ours[: len(theirs)]) == shape(theirs)
    assert {one.name for one in ours[len(theirs) :]} <= {"noise"}
    assert all(one.kind is one.KEYWORD_ONLY for one in ours[len(theirs) :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "cubic"},
        {"beta_schedule": "laplace"},  # DDIM does not have it
        {"unknown": 1},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": 0},
        {"beta_schedule": "scaled_linear", "beta_start": None},
        {"trained_betas": "none"},
        {"_private": 1},
    ],
    ids=str,
)
def test_a_constructor_fails_as_in_diffusers(name, config):
    """With the same text, except for the name of the class."""
    results = [outcome(getattr(module, name), **config)[0] for module in (fast, diffusers)]
    errors = [result if isinstance(result, str) else "none" for result in results]
    assert errors[0].replace(repr(getattr(fast, name)), repr(getattr(diffusers, name))) == errors[1]


# set_timesteps, previous_timestep


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "another"])
def test_timesteps_equal_diffusers(name, spacing):
    """For zero, negative, too many and no steps; trailing spacing can give one more than requested."""
    for offset, T in product((0, 1), (1000, 50)):
        ours, theirs = scheduler_pair(name, num_train_timesteps=T, timestep_spacing=spacing, steps_offset=offset)
        for steps in (1, 7, 10, 61, T - 1, T, T + 1, 0, -5, None, 2.5, "ten", np.int64(5)):
            with named((offset, T, steps)), np.errstate(all="ignore"):
                assert_same_outcome(ours, theirs, "set_timesteps", steps)
                assert_same(ours.timesteps, theirs.timesteps)
                assert_same(ours.num_inference_steps, theirs.num_inference_steps)
    if spacing == "trailing":
        assert len(theirs.timesteps) > 0


@pytest.mark.parametrize("name", DDPM)
def test_custom_timesteps_equal_diffusers(name):
    ours, theirs = scheduler_pair(name)
    for call in (
        {"timesteps": [999, 500, 3, 0]},
        {"timesteps": [999, 500, 3]},
        {"timesteps": np.array([40, 2])},
        {"timesteps": torch.tensor([41, 3])},
        {"timesteps": [3, -1]},
        {"timesteps": [5, 5]},  # not descending
        {"timesteps": [5, 6]},
        {"timesteps": [1000, 5]},  # not below T
        {"timesteps": []},
        {"timesteps": [7], "num_inference_steps": 3},  # both
        {"num_inference_steps": 4},
        {"timesteps": [9, 8], "device": "cpu"},
    ):
        with named(call):
            assert_same_outcome(ours, theirs, "set_timesteps", **call)
            for attribute in ("timesteps", "custom_timesteps", "num_inference_steps"):
                assert_same(getattr(ours, attribute), getattr(theirs, attribute))
            assert_same_steps(ours, theirs, [*theirs.timesteps.tolist(), 123])


@pytest.mark.parametrize("name", DDPM)
def test_previous_timestep_equals_diffusers(name):
    """It is t - 1, or the next element of timesteps; -1 after the last."""
    ours, theirs = scheduler_pair(name)
    for steps in ({}, {"num_inference_steps": 10}, {"timesteps": [30, 20, 3]}):
        if steps:
            with_steps((ours, theirs), **steps)
        for t in (0, 30, 3, 900, torch.tensor(20), np.int64(300), 17):
            with named((steps, t)):
                assert_same_outcome(ours, theirs, "previous_timestep", t)


# Shapes, gradients, modes


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_any_shape(name):
    """Empty batches, vectors, sequences, videos; the arguments do not change."""
    ours, theirs = with_steps(scheduler_pair(name), 10)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 5), (2, 3, 7), (2, 3, 2, 4, 4), (1, 1, 1, 1)):
        for dtype in (SINGLE, DOUBLE):
            x, model_output = (tensors(shape, dtype, seed=seed).clone() for seed in (1, 2))
            with named((shape, dtype)):
                assert_same_steps(ours, theirs, model_output=model_output, x=x, timesteps=(900, 0))
            assert torch.equal(x, tensors(shape, dtype, seed=1))
            assert torch.equal(model_output, tensors(shape, dtype, seed=2))


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_gradients_equal_diffusers(name, prediction):
    """With respect to the network's output, the sample and a learned variance."""
    ddpm = name in DDPM
    for variance in ("fixed_small", "learned", "learned_range") if ddpm else ("",):
        config = {"variance_type": variance} if ddpm else {}
        ours, theirs = with_steps(scheduler_pair(name, prediction_type=prediction, **config), 10)
        for t, wanted in product((900, 0), ((True, True), (True, False), (False, True))):
            grads = []
            for scheduler in (ours, theirs):
                model_output, x = leaves(OUTPUT_WITH_VARIANCE if variance.startswith("learned") else OUTPUT, X)
                model_output.requires_grad_(wanted[0])
                x.requires_grad_(wanted[1])
                result, state = outcome(scheduler.step, model_output, t, x, **({} if ddpm else {"eta": 0.5}))
                (result.prev_sample.square().sum() + result.pred_original_sample.sum()).backward()
                grads.append((result, state, model_output.grad, x.grad))
            with named((variance, t, wanted)):
                assert_same(*grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_gradients_of_noising_equal_diffusers(name, method):
    ours, theirs = scheduler_pair(name)
    for dtype in (SINGLE, DOUBLE):
        grads = []
        for scheduler in (ours, theirs):
            x, eps = leaves(X.to(dtype), OUTPUT)
            result = getattr(scheduler, method)(x, eps, torch.tensor([3, 900]))
            result.square().sum().backward()
            grads.append((result, x.grad, eps.grad))
        assert_same(*grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_in_another_mode_does_not_affect_later_ones(name, mode):
    """Gradients can pass through a table that was made in inference mode."""
    ours, theirs = scheduler_pair(name)
    with mode():
        with_steps((ours, theirs), 10)
        assert_same_steps(ours, theirs)
        assert_same_outcome(ours, theirs, "add_noise", X, OUTPUT, torch.tensor([3, 4]))
    grads = []
    for scheduler in (ours, theirs):
        model_output, x = leaves(OUTPUT, X)
        scheduler.step(
            model_output, 900, scheduler.add_noise(x, model_output, torch.tensor([3, 4])), generator=torch.Generator()
        ).prev_sample.sum().backward()
        grads.append((model_output.grad, x.grad))
    assert_same(*grads)


@pytest.mark.parametrize("name", ["DDPMParallelScheduler", "DDIMParallelScheduler"])
def test_batch_step_no_noise_equals_diffusers(name):
    ours, theirs = scheduler_pair(name)
    t = torch.tensor([900, 0])
    for _ in range(2):
        for prediction in ("epsilon", "sample", "v_prediction", "another"):
            apply_to_both(
                (ours, theirs), lambda scheduler, to=prediction: setattr(scheduler.config, "prediction_type", to)
            )
            assert_same_outcome(ours, theirs, "batch_step_no_noise", OUTPUT, t, X)
        with_steps((ours, theirs), 10)
    assert ours._is_ode_scheduler == theirs._is_ode_scheduler == (name in DDIM)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_diffusers(name):
    """Values can be read as attributes, by name, by position and as a tuple."""
    ours, theirs = with_steps(scheduler_pair(name), 10)
    got, want = (
        ours.step(OUTPUT, 900, X, generator=torch.Generator()),
        theirs.step(OUTPUT, 900, X, generator=torch.Generator()),
    )
    assert_same(got, want)
    assert_same(dict(got), dict(want))
    assert got[0] is got["prev_sample"] is got.prev_sample is got.to_tuple()[0]
    assert got[1] is got.pred_original_sample
    assert_same(ours.step(OUTPUT, 0, X, return_dict=False), theirs.step(OUTPUT, 0, X, return_dict=False))


# Saving and loading


CONFIG = {"num_train_timesteps": 20, "beta_end": 0.03, "prediction_type": "v_prediction", "trained_betas": [0.1] * 20}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [{}, CONFIG], ids=["default", "other"])
def test_saved_files_equal_diffusers(name, config, tmp_path):
    ours, theirs = scheduler_pair(name, **config)
    ours.noise = 3  # not saved
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [{file.name: file.read_bytes() for file in (tmp_path / side).iterdir()} for side in ("ours", "theirs")]
    assert files[0] == files[1]
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    for module, side in product((fast, diffusers), ("ours", "theirs")):
        loaded = getattr(module, name).from_pretrained(tmp_path / side)
        assert type(loaded) is getattr(module, name)
        assert_same(loaded.alphas_cumprod, theirs.alphas_cumprod)
        assert loaded.to_json_string() == theirs.to_json_string()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_works_in_either_package(name):
    ours, theirs = scheduler_pair(name, **CONFIG)
    for other, source in product((*NAMES, "DPMSolverMultistepScheduler"), (ours, theirs)):
        makers = (fast, diffusers) if hasattr(fast, other) else (diffusers,)
        made = [getattr(module, other).from_config(source.config, beta_start=0.002) for module in makers]
        for scheduler in made:
            assert scheduler.to_json_string() == made[-1].to_json_string()
            assert_same(scheduler.alphas_cumprod, made[-1].alphas_cumprod)
            assert scheduler.config.beta_start == 0.002
    foreign = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=30)
    made = [
        getattr(module, name).from_config(foreign.config, return_unused_kwargs=True, other=1)
        for module in (fast, diffusers)
    ]
    assert made[0][0].to_json_string() == made[1][0].to_json_string()
    assert made[0][1] == made[1][1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "copy", "pickle"]
)
def test_a_copy_is_independent(name, duplicate):
    """Even one made after some steps; changes to it affect the original exactly where they do in diffusers."""
    ours, theirs = with_steps(scheduler_pair(name, beta_end=0.03), 10)
    ours.noise = "philox"
    assert_same_steps(*scheduler_pair(name))
    ours.step(OUTPUT, 900, X)
    twins = [duplicate(ours), duplicate(theirs)]
    assert type(twins[0]) is type(ours)
    assert twins[0].__module__ == theirs.__module__
    assert twins[0].noise == "philox"
    assert twins[0].to_json_string() == twins[1].to_json_string()
    for scheduler in (twins[0], ours):
        scheduler.noise = "generator"
    assert_same_steps(*twins, (900, 500, 0))
    apply_to_both(twins, lambda scheduler: scheduler.alphas_cumprod.mul_(0.9))
    assert_same_steps(*twins, (900, 500, 0))
    assert_same_steps(ours, theirs, (900, 500, 0))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("mapped", ["vmap", "jvp"])
def test_a_step_supports_vmap_and_jvp(name, mapped):
    x, model_output, dx, dm = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for package in (diffusers, fast):
        scheduler = getattr(package, name)()
        scheduler.set_timesteps(10)
        step = lambda x, model_output: scheduler.step(model_output, 0, x, return_dict=False)[0]  # noqa: B023 (called immediately)
        if mapped == "vmap":
            results.append(torch.func.vmap(step)(x[:, None], model_output[:, None]))
        else:
            results.append(torch.stack(torch.func.jvp(step, (x, model_output), (dx, dm))))
    assert torch.equal(*results)


def test_a_whole_step_can_be_compiled():
    x, model_output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for package in (diffusers, fast):
        torch.manual_seed(1)
        step = torch.compile(package.DDPMScheduler().step, backend="eager", fullgraph=True)
        results.append(step(model_output, 500, x, return_dict=False)[0])
    assert torch.equal(*results)


def test_tables_made_in_inference_mode_can_be_used_outside():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler, t = fast.DDPMScheduler(), torch.tensor(5)
    with torch.inference_mode():
        scheduler.add_noise(x, x, t)
        scheduler.step(x, 5, x)
    leaf = x.clone().requires_grad_()
    (scheduler.add_noise(leaf, x, t) + scheduler.step(leaf, 0, leaf).prev_sample).sum().backward()
    assert leaf.grad.isfinite().all()
