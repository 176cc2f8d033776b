"""The network of the drop-in: in `sampling` as accurate as diffusers' forward; everywhere else that forward runs."""

import copy
import gc
import io
import pickle
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from tests.support.check import TINY, assert_as_accurate, at_once

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import HALF, SINGLE
from tests.support.tiny_pipelines import (
    fused_output,
    network_pair,
    plain_output,
    sample,
    seeded,
    tiny_unet,
)

X = torch.randn(16, 3, 8, 8, generator=seeded(3))
WIDE = torch.randn(2, 3, 4, 12, generator=seeded(4))
T = 321
TIMESTEPS = {
    "int": T,
    "float": T + 0.9,  # diffusers truncates it
    "numpy": np.int64(T),
    "0-d": torch.tensor(T),
    "0-d int32": torch.tensor(T, dtype=torch.int32),
    "0-d view": torch.arange(1000)[T],
    "0": 0,
    "999": torch.tensor(999),
}
CONFIGS = {
    "plain": {},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "google": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None},
    "resnet samplers": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "no middle": {"mid_block_type": None, "act_fn": "gelu", "center_input_sample": True},
    "other blocks": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "time_embedding_dim": 24,
        "norm_eps": 1e-3,
    },
}


def assert_fused(unet, twin, x, *args):
    """In `sampling` diffusers' forward does not run, and the output is as accurate; twin: diffusers' network."""
    ours, plain = fused_output(unet, x, *args), plain_output(twin, x, *args)
    exact = copy.deepcopy(twin).double()
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    assert not torch.equal(ours, plain)
    assert_as_accurate(ours, plain, plain_output(exact, x.double(), *args))


def assert_not_fused(unet, twin, x, *args):
    """In `sampling` diffusers' forward runs."""
    assert torch.equal(fused_output(unet, x, *args), plain_output(twin, x, *args))


# The fused copy


@pytest.mark.parametrize("dtype", [SINGLE, *HALF], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_sampling_is_as_accurate_as_diffusers(config, dtype):
    assert_fused(*network_pair(dtype, **CONFIGS[config]), X.to(dtype), T)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_timesteps_of_any_form(timestep):
    assert_fused(*network_pair(), X, TIMESTEPS[timestep])


def test_sizes_can_change_within_a_context():
    unet, twin = network_pair()
    inputs = X, X[:3], WIDE, X, X.to(memory_format=torch.channels_last), X[:1]
    with torch.no_grad(), unet.sampling():
        results = [unet(x, t).sample for x in inputs for t in (5, 600)]
    for model_output, (x, t) in zip(results, ((x, t) for x in inputs for t in (5, 600)), strict=True):
        assert torch.equal(model_output, fused_output(unet, x, t))
        assert_fused(unet, twin, x, t)
    assert torch.equal(results[0], results[6])


def test_outputs_have_diffusers_types():
    unet, twin = network_pair()
    with torch.no_grad(), unet.sampling():
        ours, first = unet(X, T), unet(X, T, return_dict=False)
    theirs = plain_output(twin, X, T)
    assert type(ours) is type(twin(X, T))
    assert type(first) is tuple
    assert torch.equal(first[0], ours.sample)
    assert ours.sample.is_contiguous() == theirs.is_contiguous()
    kept = ours.sample.clone()
    fused_output(unet, X * 2, T)
    assert torch.equal(ours.sample, kept)
    assert torch.equal(X, torch.randn(16, 3, 8, 8, generator=seeded(3)))


LABELS = {
    "table": ({"num_class_embeds": 5}, torch.arange(16) % 5, torch.arange(16) % 3),
    "identity": ({"class_embed_type": "identity"}, torch.linspace(-1, 1, 512).view(16, 32), torch.zeros(16, 32)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_class_labels_are_as_accurate(kind):
    options, labels, others = LABELS[kind]
    unet, twin = network_pair(**options)
    assert_fused(unet, twin, X, T, labels)
    with torch.no_grad(), unet.sampling():
        one, other = (unet(X, T, given).sample for given in (labels, others))
        changing = labels.clone()
        assert torch.equal(unet(X, T, changing).sample, one)
        changing.copy_(others)
        assert torch.equal(unet(X, T, changing).sample, other)
    assert not torch.equal(one, other)
    for network in (unet, twin):
        with pytest.raises(ValueError, match="class"):
            fused_output(network, X, T) if network is unet else plain_output(network, X, T)
        with pytest.raises(ValueError, match="class"):
            fused_output(tiny_unet(), X, T, labels)


def test_each_context_uses_the_current_weights():
    unet, twin = network_pair()
    before = fused_output(unet, X, T)
    with torch.no_grad():
        for network in (unet, twin):
            network.mid_block.resnets[0].conv1.weight.mul_(2)
    assert not torch.equal(fused_output(unet, X, T), before)
    assert_fused(unet, twin, X, T)


def test_sampling_does_not_change_the_network():
    unet = tiny_unet()
    unet.requires_grad_(False).conv_out.requires_grad_(True)
    before = {name: (id(value), value.requires_grad, value.clone()) for name, value in unet.named_parameters()}
    fused_output(unet, X, T)
    sample(fast.DDPMPipeline(unet, fast.DDPMScheduler()))
    for name, value in unet.named_parameters():
        identity, wants, kept = before[name]
        assert (id(value), value.requires_grad) == (identity, wants), name
        assert torch.equal(value, kept)


def test_a_network_that_has_sampled_can_be_freed():
    unet = tiny_unet()
    fused_output(unet, X, T)
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("entered", ["outside", "inside"])
def test_autocast_applies_inside_and_outside(entered):
    unet, twin = network_pair()
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    with torch.no_grad():
        if entered == "outside":
            with cast(), unet.sampling():
                ours = unet(X, T).sample
        else:
            with unet.sampling():
                unet(X, T)
                with cast():
                    ours = unet(X, T).sample
        with cast():
            plain = twin(X, T).sample
        ref = twin.double()(X.double(), T).sample
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert_as_accurate(ours, plain, ref)


# Calls that run diffusers' forward


@pytest.mark.parametrize(
    "timestep",
    [torch.tensor([T]), torch.full((16,), T), torch.arange(16) * 60, torch.tensor(T + 0.5), 1000, -1],
    ids=["[1]", "[N]", "each its own", "fraction", "too large", "negative"],
)
def test_other_timesteps_run_diffusers_forward(timestep):
    assert_not_fused(*network_pair(), X, timestep)


def test_other_calls_run_diffusers_forward():
    unet, twin = network_pair()
    with unet.sampling():
        assert torch.equal(unet(X, T).sample, twin(X, T).sample)  # gradients are enabled
        with torch.no_grad():
            fused = unet(X, T).sample
        ((elsewhere,),) = at_once(lambda: plain_output(unet, X, T), times=1)
    plain = plain_output(twin, X, T)
    assert torch.equal(elsewhere, plain)
    assert not torch.equal(fused, plain)
    assert torch.equal(plain_output(unet, X, T), plain)  # after the context
    for network in (unet, twin):
        with pytest.raises(RuntimeError, match="type"):
            (fused_output if network is unet else plain_output)(network, X.double(), T)


def test_an_error_ends_the_context():
    unet, twin = network_pair()
    with pytest.raises(KeyError), unet.sampling():
        raise KeyError
    assert torch.equal(plain_output(unet, X, T), plain_output(twin, X, T))
    with unet.sampling(), unet.sampling():
        pass
    assert_fused(unet, twin, X, T)


def test_threads_sample_independently():
    unet = tiny_unet()
    inputs = X[:2], X[2:5]
    want = [fused_output(unet, x, T) for x in inputs]
    for results, expected in zip(at_once(*(partial(fused_output, unet, x, T) for x in inputs)), want, strict=True):
        assert all(torch.equal(result, expected) for result in results)


# Everything else equals diffusers


def test_training_equals_diffusers():
    results = []
    for unet in network_pair(dropout=0.1):
        unet.train()
        optimizer = torch.optim.AdamW(unet.parameters(), 1e-2)
        torch.manual_seed(2)
        for step in range(2):
            loss = (unet(X, torch.arange(16) * 60).sample - X).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 0 and isinstance(unet, fast.UNet2DModel):
                pipe = fast.DDPMPipeline(unet, fast.DDPMScheduler())
                pipe.set_progress_bar_config(disable=True)
                state = torch.get_rng_state()
                unet.eval()
                sample(pipe)
                unet.train()
                torch.set_rng_state(state)
        results.append([loss, *(value.grad for value in unet.parameters()), *unet.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_names_and_values_equal_diffusers():
    unet, twin = network_pair()
    for names in ("named_parameters", "named_modules", "named_buffers"):
        assert [name for name, _ in getattr(unet, names)()] == [name for name, _ in getattr(twin, names)()]
    assert list(unet.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(one, twin.state_dict()[name]) for name, one in unet.state_dict().items())
    assert dict(unet.config) == dict(twin.config)
    assert isinstance(unet, diffusers.UNet2DModel)
    assert repr(unet) == repr(twin)
    twin.load_state_dict(unet.state_dict())
    with pytest.raises(TypeError):
        fast.UNet2DModel(unknown=1)


def through_torch(unet):
    file = io.BytesIO()
    torch.save(unet, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet)), through_torch],
    ids=["deepcopy", "pickle", "torch"],
)  # fmt: skip
def test_a_copy_is_independent(duplicate):
    unet = tiny_unet()
    want = fused_output(unet, X, T)
    twin = duplicate(unet)
    assert type(twin) is fast.UNet2DModel
    assert twin.__module__ == unet.__module__ == diffusers.UNet2DModel.__module__
    assert torch.equal(fused_output(twin, X, T), want)
    with torch.no_grad():
        twin.conv_in.weight.zero_()
    assert not torch.equal(fused_output(twin, X, T), want)
    assert torch.equal(fused_output(unet, X, T), want)


@torch.no_grad()
def test_a_network_made_in_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        unet = fast.UNet2DModel(**TINY).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    usual = fast.UNet2DModel(**TINY).eval()
    usual.load_state_dict(unet.state_dict())
    with unet.sampling(), usual.sampling():
        assert torch.equal(unet(x, 5).sample, usual(x, 5).sample)


@torch.no_grad()
def test_functional_call_uses_its_own_parameters():
    unet = fast.UNet2DModel(**TINY).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    others = {name: 1.5 * parameter for name, parameter in unet.named_parameters()}
    call = lambda: torch.func.functional_call(unet, others, (x, 5)).sample
    want = call()
    with unet.sampling():
        plain = unet(x, 5).sample
        assert torch.equal(call(), want)
        assert torch.equal(unet(x, 5).sample, plain)
    assert not torch.allclose(plain, want)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (1, 4, 16, 16), (1, 3, 15, 16), (3, 16, 16)])
def test_samples_that_do_not_fit_fail_as_in_diffusers(shape):
    torch.manual_seed(0)
    ours = fast.UNet2DModel(**TINY).eval()
    theirs = diffusers.UNet2DModel(**TINY).eval()
    theirs.load_state_dict(ours.state_dict())
    results = []
    for unet in (theirs, ours):
        with unet.sampling() if unet is ours else nullcontext():
            try:
                results.append(("fine", unet(torch.ones(shape), 5).sample.shape))
            except (RuntimeError, ValueError, IndexError) as error:
                results.append((type(error), str(error)))
    assert results[0] == results[1]
