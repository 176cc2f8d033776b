"""Bad arguments of the schedulers: they raise the same error as in the installed diffusers."""

from itertools import product

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from tests.support.beside_diffusers import (
    DDIM,
    DDPM,
    NAMES,
    OUTPUT,
    OUTPUT_WITH_VARIANCE,
    VARIANCES,
    X,
    assert_same,
    assert_same_outcome,
    named,
    outcome,
    scheduler_pair,
    with_steps,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [None, 10])
def test_a_bad_step_fails_as_in_diffusers(name, steps):
    """With the same error, and the generator in the same state afterwards."""
    for config in ({}, {"prediction_type": "another"}, {"thresholding": True}, {"clip_sample_range": None}):
        ours, theirs = scheduler_pair(name, **config)
        if steps:
            with_steps((ours, theirs), steps)
        failed = 0
        for model_output, t, x in (
            *((OUTPUT, t, X) for t in (1000, -1001, 17, 5.0, "5", None, torch.tensor(5.0), torch.tensor([5, 6]), True)),
            *((OUTPUT, t, X) for t in (torch.tensor(True), np.float32(5), torch.tensor([5, 6, 7]), [5], 10**30)),
            (OUTPUT_WITH_VARIANCE, 900, X),
            (OUTPUT[:1], 900, X),  # broadcast
            (OUTPUT, 900, X[:1]),
            (OUTPUT[:, :2], 900, X),
            (OUTPUT[:, :1], 900, X),
            (OUTPUT[0], 900, X[0]),
            (OUTPUT.flatten(), 900, X.flatten()),
            (OUTPUT[0, 0, 0, 0], 900, X[0, 0, 0, 0]),
            (None, 900, X),
            (OUTPUT, 900, None),
            (OUTPUT.tolist(), 900, X),
            (OUTPUT, 900, X.tolist()),
            (OUTPUT.numpy(), 900, X),
            (OUTPUT.long(), 900, X),
            (OUTPUT, 900, X.long()),
            (OUTPUT.to("meta"), 900, X),
            (OUTPUT.to("meta"), 900, X.to("meta")),
            (OUTPUT.to_sparse(), 900, X),
        ):
            shapes = [getattr(tensor, "shape", None) for tensor in (model_output, x)]
            with named((config, t, type(model_output), type(x), shapes)):
                assert_same_outcome(ours, theirs, "step", model_output, t, x)
            failed += isinstance(outcome(theirs.step, model_output, t, x)[0], str)
        assert failed >= 10


ODD_DDIM = (
    {"eta": None},
    {"eta": "much"},
    {"eta": torch.tensor(0.5)},
    {"eta": 2.0},
    {"eta": -0.5},
    {"eta": 1.0, "generator": torch.Generator(), "variance_noise": X},  # only one is allowed
    {"eta": 1.0, "variance_noise": X[:, :2]},
    {"eta": 1.0, "variance_noise": X[:1]},
    {"eta": 1.0, "variance_noise": 0.5},
    {"variance_noise": X},  # ignored without eta
)


@pytest.mark.parametrize("name", NAMES)
def test_odd_arguments_act_as_in_diffusers(name):
    ours, theirs = with_steps(scheduler_pair(name), 10)
    for kwargs in (
        {"generator": 3},
        {"generator": []},
        {"generator": [torch.Generator(), 3]},
        {"return_dict": None},
        *(ODD_DDIM if name in DDIM else ()),
    ):
        with named(kwargs):
            assert_same_outcome(ours, theirs, "step", OUTPUT, 900, X, **kwargs)
    few = [[torch.Generator().manual_seed(0) for _ in range(2)] for _ in range(2)]
    results = [
        outcome(scheduler.step, torch.cat([OUTPUT, OUTPUT]), 900, torch.cat([X, X]), generator=generators)
        for scheduler, generators in zip((ours, theirs), few, strict=True)
    ]
    assert_same(*results)
    for scheduler, bad in product((ours, theirs), ({}, {"unknown": 1})):
        with pytest.raises(TypeError, match="argument"):
            scheduler.step(**bad)


@pytest.mark.parametrize("name", DDPM)
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_a_wrong_number_of_channels_fails_as_in_diffusers(name, variance_type):
    """A learned variance needs 2 C channels (except at t = 0), a fixed one C."""
    ours, theirs = scheduler_pair(name, variance_type=variance_type)
    wrong = OUTPUT if variance_type.startswith("learned") else OUTPUT_WITH_VARIANCE
    for t in (500, 0):
        assert_same_outcome(ours, theirs, "step", wrong, t, X)
    assert isinstance(outcome(theirs.step, wrong, 500, X)[0], str)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_noising_fails_as_in_diffusers(name, method):
    ours, theirs = scheduler_pair(name)
    for x, eps, t in (
        *((X, OUTPUT, t) for t in (5, [5], None, torch.tensor([5.0]), torch.tensor([1000, 0]), torch.tensor([-1001]))),
        *((X, OUTPUT, torch.tensor(t)) for t in ([1, 2, 3], [[1, 2], [3, 4]], [True, False])),
        (X, OUTPUT[:1], torch.tensor([1, 2])),
        (X[:1], OUTPUT, torch.tensor([1, 2])),
        (X[:, :2], OUTPUT, torch.tensor([1, 2])),
        (X, 1.0, torch.tensor([1, 2])),
        (None, OUTPUT, torch.tensor([1, 2])),
        (X, None, torch.tensor([1, 2])),
        (X.long(), OUTPUT, torch.tensor([1, 2])),
        (X, OUTPUT.long(), torch.tensor([1, 2])),
        (X.to("meta"), OUTPUT.to("meta"), torch.tensor([1, 2])),
    ):
        with named((t, getattr(x, "shape", x), getattr(eps, "shape", eps))):
            assert_same_outcome(ours, theirs, method, x, eps, t)
            assert_same(ours.alphas_cumprod.device, theirs.alphas_cumprod.device)
