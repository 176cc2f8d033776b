"""The schedulers against those of the installed diffusers: each behaviour beyond the options of a step."""

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
    BOTH,
    DDIM,
    DDPM,
    DOUBLE,
    NAMES,
    SINGLE,
    M,
    X,
    assert_same,
    assert_same_outcome,
    assert_same_steps,
    both,
    named,
    outcome,
    pair,
    tensors,
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
def test_the_attributes_are_those_of_diffusers(name, config):
    ours, theirs = pair(name, **config)
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
def test_the_parameters_are_those_of_diffusers(name, method):
    """Pipelines ask by name whether a scheduler takes eta, or timesteps; a caller may count on the order."""
    ours, theirs = (getattr(getattr(module, name), method, None) for module in (fast, diffusers))
    if theirs is None:
        pytest.skip("diffusers has none")
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
        {"beta_schedule": "laplace"},  # DDIM has none
        {"unknown": 1},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": 0},
        {"beta_schedule": "scaled_linear", "beta_start": None},
        {"trained_betas": "none"},
        {"_private": 1},
    ],
    ids=str,
)
def test_a_constructor_fails_as_that_of_diffusers(name, config):
    """With the same text, but for the name of the class in it."""
    results = [outcome(getattr(module, name), **config)[0] for module in (fast, diffusers)]
    errors = [result if isinstance(result, str) else "none" for result in results]
    assert errors[0].replace(repr(getattr(fast, name)), repr(getattr(diffusers, name))) == errors[1]


# set_timesteps, previous_timestep


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "another"])
def test_timesteps_are_those_of_diffusers(name, spacing):
    """Zero, negative, too many, none, and for trailing one more than was asked for."""
    for offset, T in product((0, 1), (1000, 50)):
        ours, theirs = pair(name, num_train_timesteps=T, timestep_spacing=spacing, steps_offset=offset)
        for steps in (1, 7, 10, 61, T - 1, T, T + 1, 0, -5, None, 2.5, "ten", np.int64(5)):
            with named((offset, T, steps)), np.errstate(all="ignore"):
                assert_same_outcome(ours, theirs, "set_timesteps", steps)
                assert_same(ours.timesteps, theirs.timesteps)
                assert_same(ours.num_inference_steps, theirs.num_inference_steps)
    if spacing == "trailing":
        assert len(theirs.timesteps) > 0


@pytest.mark.parametrize("name", DDPM)
def test_custom_timesteps_are_those_of_diffusers(name):
    ours, theirs = pair(name)
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
def test_the_previous_timestep_is_that_of_diffusers(name):
    """A number less by one, or the next element of timesteps; -1 after the last."""
    ours, theirs = pair(name)
    for steps in ({}, {"num_inference_steps": 10}, {"timesteps": [30, 20, 3]}):
        if steps:
            both((ours, theirs), lambda scheduler, steps=steps: scheduler.set_timesteps(**steps))
        for t in (0, 30, 3, 900, torch.tensor(20), np.int64(300), 17):
            with named((steps, t)):
                assert_same_outcome(ours, theirs, "previous_timestep", t)


# Shapes, gradients, modes


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_any_shape(name):
    """No entry at all, vectors, sequences, videos; the arguments are left as they are."""
    ours, theirs = both(pair(name), lambda scheduler: scheduler.set_timesteps(10))
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 5), (2, 3, 7), (2, 3, 2, 4, 4), (1, 1, 1, 1)):
        for dtype in (SINGLE, DOUBLE):
            x, m = (tensors(shape, dtype, seed=seed).clone() for seed in (1, 2))
            with named((shape, dtype)):
                assert_same_steps(ours, theirs, m=m, x=x, timesteps=(900, 0))
            assert torch.equal(x, tensors(shape, dtype, seed=1))
            assert torch.equal(m, tensors(shape, dtype, seed=2))


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_gradients_are_those_of_diffusers(name, prediction):
    """To what the network said, to the sample, and to a learned variance."""
    ddpm = name in DDPM
    for variance in ("fixed_small", "learned", "learned_range") if ddpm else ("",):
        config = {"variance_type": variance} if ddpm else {}
        ours, theirs = both(
            pair(name, prediction_type=prediction, **config), lambda scheduler: scheduler.set_timesteps(10)
        )
        for t, wanted in product((900, 0), ((True, True), (True, False), (False, True))):
            grads = []
            for scheduler in (ours, theirs):
                m, x = leaves(BOTH if variance.startswith("learned") else M, X)
                m.requires_grad_(wanted[0])
                x.requires_grad_(wanted[1])
                result, state = outcome(scheduler.step, m, t, x, **({} if ddpm else {"eta": 0.5}))
                (result.prev_sample.square().sum() + result.pred_original_sample.sum()).backward()
                grads.append((result, state, m.grad, x.grad))
            with named((variance, t, wanted)):
                assert_same(*grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_gradients_of_noising_are_those_of_diffusers(name, method):
    ours, theirs = pair(name)
    for dtype in (SINGLE, DOUBLE):
        grads = []
        for scheduler in (ours, theirs):
            x, eps = leaves(X.to(dtype), M)
            result = getattr(scheduler, method)(x, eps, torch.tensor([3, 900]))
            result.square().sum().backward()
            grads.append((result, x.grad, eps.grad))
        assert_same(*grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_of_another_mode_spoils_no_later_one(name, mode):
    """What was tabulated in inference mode can be trained through."""
    ours, theirs = pair(name)
    with mode():
        both((ours, theirs), lambda scheduler: scheduler.set_timesteps(10))
        assert_same_steps(ours, theirs)
        assert_same_outcome(ours, theirs, "add_noise", X, M, torch.tensor([3, 4]))
    grads = []
    for scheduler in (ours, theirs):
        m, x = leaves(M, X)
        scheduler.step(
            m, 900, scheduler.add_noise(x, m, torch.tensor([3, 4])), generator=torch.Generator()
        ).prev_sample.sum().backward()
        grads.append((m.grad, x.grad))
    assert_same(*grads)


@pytest.mark.parametrize("name", ["DDPMParallelScheduler", "DDIMParallelScheduler"])
def test_a_batch_of_timesteps_steps_without_noise_as_in_diffusers(name):
    ours, theirs = pair(name)
    t = torch.tensor([900, 0])
    for _ in range(2):
        for prediction in ("epsilon", "sample", "v_prediction", "another"):
            both((ours, theirs), lambda scheduler, to=prediction: setattr(scheduler.config, "prediction_type", to))
            assert_same_outcome(ours, theirs, "batch_step_no_noise", M, t, X)
        both((ours, theirs), lambda scheduler: scheduler.set_timesteps(10))
    assert ours._is_ode_scheduler == theirs._is_ode_scheduler == (name in DDIM)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_is_that_of_diffusers(name):
    """An attribute, an item by name and by number, a tuple."""
    ours, theirs = both(pair(name), lambda scheduler: scheduler.set_timesteps(10))
    got, want = ours.step(M, 900, X, generator=torch.Generator()), theirs.step(M, 900, X, generator=torch.Generator())
    assert_same(got, want)
    assert_same(dict(got), dict(want))
    assert got[0] is got["prev_sample"] is got.prev_sample is got.to_tuple()[0]
    assert got[1] is got.pred_original_sample
    assert_same(ours.step(M, 0, X, return_dict=False), theirs.step(M, 0, X, return_dict=False))


# Saving and loading


CONFIG = {"num_train_timesteps": 20, "beta_end": 0.03, "prediction_type": "v_prediction", "trained_betas": [0.1] * 20}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [{}, CONFIG], ids=["default", "other"])
def test_saved_files_are_those_of_diffusers(name, config, tmp_path):
    ours, theirs = pair(name, **config)
    ours.noise = 3  # is not saved
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
def test_a_config_makes_any_scheduler_of_either_package(name):
    ours, theirs = pair(name, **CONFIG)
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
def test_a_copy_is_as_good(name, duplicate):
    """Also one that was made after steps; what is then changed in it changes only it, where diffusers' is so."""
    ours, theirs = both(pair(name, beta_end=0.03), lambda scheduler: scheduler.set_timesteps(10))
    ours.noise = "philox"
    assert_same_steps(*pair(name))
    ours.step(M, 900, X)
    twins = [duplicate(ours), duplicate(theirs)]
    assert type(twins[0]) is type(ours)
    assert twins[0].__module__ == theirs.__module__
    assert twins[0].noise == "philox"
    assert twins[0].to_json_string() == twins[1].to_json_string()
    for scheduler in (twins[0], ours):
        scheduler.noise = "generator"
    assert_same_steps(*twins, (900, 500, 0))
    both(twins, lambda scheduler: scheduler.alphas_cumprod.mul_(0.9))
    assert_same_steps(*twins, (900, 500, 0))
    assert_same_steps(ours, theirs, (900, 500, 0))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("mapped", ["vmap", "jvp"])
def test_a_step_can_be_mapped_and_derived_forward(name, mapped):
    x, m, dx, dm = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for package in (diffusers, fast):
        scheduler = getattr(package, name)()
        scheduler.set_timesteps(10)
        step = lambda x, m: scheduler.step(m, 0, x, return_dict=False)[0]  # noqa: B023 (called at once)
        if mapped == "vmap":
            found.append(torch.func.vmap(step)(x[:, None], m[:, None]))
        else:
            found.append(torch.stack(torch.func.jvp(step, (x, m), (dx, dm))))
    assert torch.equal(*found)


def test_a_whole_step_can_be_compiled():
    x, m = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for package in (diffusers, fast):
        torch.manual_seed(1)
        step = torch.compile(package.DDPMScheduler().step, backend="eager", fullgraph=True)
        found.append(step(m, 500, x, return_dict=False)[0])
    assert torch.equal(*found)


def test_what_was_tabulated_in_inference_mode_serves_outside():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler, t = fast.DDPMScheduler(), torch.tensor(5)
    with torch.inference_mode():
        scheduler.add_noise(x, x, t)
        scheduler.step(x, 5, x)
    leaf = x.clone().requires_grad_()
    (scheduler.add_noise(leaf, x, t) + scheduler.step(leaf, 0, leaf).prev_sample).sum().backward()
    assert leaf.grad.isfinite().all()
