"""Bad arguments of the schedulers: they fail as those of the installed diffusers, by the same error."""

from itertools import product

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from tests.support.beside_diffusers import (
    BOTH,
    DDIM,
    DDPM,
    NAMES,
    VARIANCES,
    M,
    X,
    assert_same,
    assert_same_outcome,
    both,
    named,
    outcome,
    pair,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [None, 10])
def test_a_bad_step_fails_as_that_of_diffusers(name, steps):
    """By the same error, and with the generator left in the same state."""
    for config in ({}, {"prediction_type": "another"}, {"thresholding": True}, {"clip_sample_range": None}):
        ours, theirs = pair(name, **config)
        if steps:
            both((ours, theirs), lambda scheduler: scheduler.set_timesteps(steps))
        failed = 0
        for m, t, x in (
            *((M, t, X) for t in (1000, -1001, 17, 5.0, "5", None, torch.tensor(5.0), torch.tensor([5, 6]), True)),
            *((M, t, X) for t in (torch.tensor(True), np.float32(5), torch.tensor([5, 6, 7]), [5], 10**30)),
            (BOTH, 900, X),
            (M[:1], 900, X),  # broadcast
            (M, 900, X[:1]),
            (M[:, :2], 900, X),
            (M[:, :1], 900, X),
            (M[0], 900, X[0]),
            (M.flatten(), 900, X.flatten()),
            (M[0, 0, 0, 0], 900, X[0, 0, 0, 0]),
            (None, 900, X),
            (M, 900, None),
            (M.tolist(), 900, X),
            (M, 900, X.tolist()),
            (M.numpy(), 900, X),
            (M.long(), 900, X),
            (M, 900, X.long()),
            (M.to("meta"), 900, X),
            (M.to("meta"), 900, X.to("meta")),
            (M.to_sparse(), 900, X),
        ):
            with named((config, t, type(m), getattr(m, "shape", None), type(x), getattr(x, "shape", None))):
                assert_same_outcome(ours, theirs, "step", m, t, x)
            failed += isinstance(outcome(theirs.step, m, t, x)[0], str)
        assert failed >= 10


ODD_DDIM = (
    {"eta": None},
    {"eta": "much"},
    {"eta": torch.tensor(0.5)},
    {"eta": 2.0},
    {"eta": -0.5},
    {"eta": 1.0, "generator": torch.Generator(), "variance_noise": X},  # one too many
    {"eta": 1.0, "variance_noise": X[:, :2]},
    {"eta": 1.0, "variance_noise": X[:1]},
    {"eta": 1.0, "variance_noise": 0.5},
    {"variance_noise": X},  # of no use without eta
)


@pytest.mark.parametrize("name", NAMES)
def test_odd_arguments_do_what_they_do_in_diffusers(name):
    ours, theirs = both(pair(name), lambda scheduler: scheduler.set_timesteps(10))
    for kwargs in (
        {"generator": 3},
        {"generator": []},
        {"generator": [torch.Generator(), 3]},
        {"return_dict": None},
        *(ODD_DDIM if name in DDIM else ()),
    ):
        with named(kwargs):
            assert_same_outcome(ours, theirs, "step", M, 900, X, **kwargs)
    few = [[torch.Generator().manual_seed(0) for _ in range(2)] for _ in range(2)]
    results = [
        outcome(scheduler.step, torch.cat([M, M]), 900, torch.cat([X, X]), generator=generators)
        for scheduler, generators in zip((ours, theirs), few, strict=True)
    ]
    assert_same(*results)
    for scheduler, bad in product((ours, theirs), ({}, {"unknown": 1})):
        with pytest.raises(TypeError, match="argument"):
            scheduler.step(**bad)


@pytest.mark.parametrize("name", DDPM)
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_a_variance_that_is_not_there_fails_as_in_diffusers(name, variance_type):
    """A learned one of C channels (but not at t = 0), a fixed one of 2 C."""
    ours, theirs = pair(name, variance_type=variance_type)
    wrong = M if variance_type.startswith("learned") else BOTH
    for t in (500, 0):
        assert_same_outcome(ours, theirs, "step", wrong, t, X)
    assert isinstance(outcome(theirs.step, wrong, 500, X)[0], str)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_noising_fails_as_that_of_diffusers(name, method):
    ours, theirs = pair(name)
    for x, eps, t in (
        *((X, M, t) for t in (5, [5], None, torch.tensor([5.0]), torch.tensor([1000, 0]), torch.tensor([-1001]))),
        *((X, M, torch.tensor(t)) for t in ([1, 2, 3], [[1, 2], [3, 4]], [True, False])),
        (X, M[:1], torch.tensor([1, 2])),
        (X[:1], M, torch.tensor([1, 2])),
        (X[:, :2], M, torch.tensor([1, 2])),
        (X, 1.0, torch.tensor([1, 2])),
        (None, M, torch.tensor([1, 2])),
        (X, None, torch.tensor([1, 2])),
        (X.long(), M, torch.tensor([1, 2])),
        (X, M.long(), torch.tensor([1, 2])),
        (X.to("meta"), M.to("meta"), torch.tensor([1, 2])),
    ):
        with named((t, getattr(x, "shape", x), getattr(eps, "shape", eps))):
            assert_same_outcome(ours, theirs, method, x, eps, t)
            assert_same(ours.alphas_cumprod.device, theirs.alphas_cumprod.device)
