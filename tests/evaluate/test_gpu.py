"""The bound on a GPU: by replays of a CUDA graph, in each precision, with classes, in batches of unequal use.

And an extractor on a GPU in a process of its own.
"""

import pytest
import torch

from fastddpm import Sampler, Schedule, UNet2D
from fastddpm.core.precision import PRECISIONS, arithmetic
from fastddpm.evaluate import features, isolated
from fastddpm.evaluate.likelihood import bound
from fastddpm.reference.unet import UNet
from tests.conftest import needs_gpu
from tests.evaluate.test_isolated import IMAGES, Means, saved
from tests.evaluate.test_likelihood import OPTIONS, SMALL, T, by_reference, images
from tests.support.check import assert_as_accurate

pytestmark = needs_gpu
DEVICE = torch.device("cuda")
LABELS = torch.arange(16) % 3


def networks(variance):
    """A network, and a function that makes the reference of a precision: a model that works on tensors on the CPU."""
    config = {**SMALL, "out_channels": 2 if variance == "learned_range" else 1, "num_class_embeds": 3}
    torch.manual_seed(0)
    net = UNet2D(**config).eval()

    def plain(precision):
        dtype, network = PRECISIONS.get(precision, torch.float64), UNet(**config).eval()
        network.load_state_dict(net.state_dict())
        network.to(DEVICE, dtype)

        def model(x, t):
            with arithmetic(precision if precision in PRECISIONS else "fp32", DEVICE):
                return network(x.to(DEVICE, dtype), t.to(DEVICE), LABELS.to(DEVICE)).to(x)

        return model

    return net, plain


def gpu_bound(net, schedule, precision, engine, **options):
    sampler = Sampler(net, schedule, device=DEVICE, precision=precision, engine=engine)
    return bound(sampler, images(), seed=3, class_labels=LABELS, progress=False, **options)


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_terms_are_as_accurate_as_plain_torch(variance, precision, engine):
    (net, plain), schedule = networks(variance), Schedule(**OPTIONS, variance_type=variance)
    ours = gpu_bound(net, schedule, precision, engine, batch_size=7)
    (their_prior, theirs), (prior, exact) = (
        by_reference(plain(kind), schedule, images(), dtype)
        for kind, dtype in ((precision, torch.float32), ("fp64", torch.float64))
    )
    assert_as_accurate(ours.prior, their_prior, prior)
    terms = torch.cat([ours.decoder[:, None], ours.terms], 1) / exact
    assert_as_accurate(terms, (theirs / exact).float(), torch.ones_like(terms))


def test_subset_has_the_same_terms():
    (net, _), schedule = networks("fixed_small"), Schedule(**OPTIONS)
    whole, part = (gpu_bound(net, schedule, "fp32", "graph", batch_size=16, terms=K) for K in (None, 4))
    assert part.timesteps.shape == (16, 4)
    torch.testing.assert_close(part.terms, whole.terms.gather(1, part.timesteps - 1), rtol=1e-4, atol=0)
    assert whole.timesteps.tolist() == [list(range(1, T))] * 16


def test_images_on_the_gpu_work_with_a_model_on_the_cpu():
    (net, _), schedule = networks("fixed_small"), Schedule(**OPTIONS)
    sampler = Sampler(net, schedule, device="cpu", precision="fp32", engine="eager")
    rates = [
        bound(sampler, data, seed=3, class_labels=LABELS, progress=False, terms=2).rate
        for data in (images().to(DEVICE), images())
    ]
    assert torch.equal(*rates)


def test_a_confined_process_runs_its_extractor_on_the_gpu(tmp_path):
    path = saved(Means(), str(tmp_path / "net.pt"))
    one, other = (room.load_extractor(path, device=DEVICE, input_size=0) for room in (isolated, features))
    assert one.device == other.device
    assert torch.equal(one(IMAGES), other(IMAGES))
