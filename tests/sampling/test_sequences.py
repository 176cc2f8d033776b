"""Sampling with a `UNet1D`: the conditions, guidance, several steps per network call, and errors."""

import pytest
import torch
from torch import nn

from fastddpm import Sampler, Schedule
from fastddpm.networks.fused import obstacles_of
from fastddpm.networks.fused_unet1d import for_inference
from fastddpm.networks.unet1d import UNet1D
from tests.support.check import error_line
from tests.support.graphs import graphed
from tests.support.sequences import OPTIONS, TINY, Case, numbers


def plain_module(net):
    class Plain(nn.Module):  # which the sampler does not know
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, **given):
            return self.net(x, t, **given)

    return Plain()


@pytest.mark.parametrize("options", [{}, {"parallel": "bits", "window": 3}, {"parallel": "law", "window": 3}], ids=str)
@pytest.mark.parametrize("kind", ["condition that scales", "classes, scale", "no condition"])
def test_samples_are_those_of_the_plain_module(kind, options):
    case = Case(n=4, **OPTIONS[kind])
    settings = {"schedule": Schedule(num_train_timesteps=10, beta_end=0.3), "precision": "fp32"}
    call = {"samples": [3, 0, 7, 2], "model_kwargs": case.given, "progress": False, **options}
    got = Sampler(case.net, **settings).sample(**call)
    want = Sampler(plain_module(case.net), shape=(3, 16), **settings).sample(**call)
    assert (got - want).abs().max() <= (2e-5 if not options else 1.0)  # rounding decides which drafts are accepted
    if options.get("parallel") == "bits":
        off = Sampler(case.net, **settings).sample(**{**call, "parallel": "off"})
        assert torch.equal(got, off)


def test_guidance_of_a_condition_and_of_classes():
    for kind, uncond in (("condition that scales", 0.0), ("classes", 3)):
        case = Case(n=4, **OPTIONS[kind])
        ((name, given),) = case.given.items()
        without = torch.zeros(given.shape[1:]) if kind.startswith("condition") else uncond
        call = {"samples": 4, "model_kwargs": case.given, "guidance_scale": 2.0, "uncond_kwargs": {name: without}}
        settings = {"schedule": Schedule(num_train_timesteps=10, beta_end=0.3), "precision": "fp32"}
        got = Sampler(case.net, **settings).sample(**call, progress=False)
        want = Sampler(plain_module(case.net), shape=(3, 16), **settings).sample(**call, progress=False)
        assert (got - want).abs().max() <= 2e-5


def test_the_conditions_of_the_next_batch_replace_those_of_the_last(graphs):
    """In a graph, too: what depends on the condition is in a buffer."""
    case = Case(n=2, **OPTIONS["condition that scales"])
    sampler = graphed(case.net, Schedule(num_train_timesteps=20))
    conditions = numbers(6, 5, seed=3)
    call = {"batch_size": 2, "steps": 16, "progress": False}
    got = sampler.sample(6, model_kwargs={"global_cond": conditions}, **call)
    for i in (0, 2, 4):
        part = sampler.sample([i, i + 1], model_kwargs={"global_cond": conditions[i : i + 2]}, **call)
        assert torch.equal(part, got[i : i + 2])
    assert len(graphs) == 1


def test_a_changed_network_is_called_as_it_is():
    case = Case()
    case.net.mid_modules[0].conv1.block[2] = nn.SiLU()
    assert obstacles_of(case.net)
    sampler = Sampler(case.net, Schedule(num_train_timesteps=4), precision="fp32")
    with pytest.warns(UserWarning, match="this UNet1D is called as it is"):
        got = sampler.sample(2, progress=False)
    want = Sampler(plain_module(case.net), Schedule(num_train_timesteps=4), shape=(3, 16)).sample(2, progress=False)
    assert torch.equal(got, want)
    assert "cannot be fused" in error_line(for_inference, case.net, torch.float32)


def test_the_sampler_wants_the_condition():
    sampler = Sampler(UNet1D(**TINY, global_cond_dim=5), Schedule(num_train_timesteps=4))
    assert "want (2, 5), floating point" in error_line(sampler.sample, 2)
    wrong = {"model_kwargs": {"cond": torch.ones(2, 5)}}
    assert "it takes only 'global_cond'" in error_line(sampler.sample, 2, **wrong)
    assert "not a class-conditional" in error_line(
        sampler.sample, 2, model_kwargs={"global_cond": torch.ones(2, 5)}, class_labels=[0, 1]
    )
