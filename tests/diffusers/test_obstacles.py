"""Obstacles to fusing a network: each is reported, and diffusers' own forward runs."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from fastddpm import diffusers as fast
from fastddpm.diffusers.obstacles import obstacle
from tests.support.check import assert_as_accurate
from tests.support.tiny_pipelines import OPTIONS, fused_output, network_pair, plain_output, seeded, tiny_unet

X = torch.randn(16, 3, 8, 8, generator=seeded(3))
T = 321


class Scaled(nn.Module):
    """Wraps a layer, as LoRA does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


class Processor(AttnProcessor2_0):
    """A user's attention processor."""


class Network(fast.UNet2DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def replaced(name, wrap):
    def change(unet):
        owner, _, attribute = name.rpartition(".")
        owner = unet.get_submodule(owner)
        setattr(owner, attribute, wrap(getattr(owner, attribute)))

    return change


def one_by_one(conv):
    torch.manual_seed(2)
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1)


OBSTACLES = {
    "fourier": ({"time_embedding_type": "fourier"}, None, "time_embedding_type is 'fourier'"),
    "other blocks": (
        {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")},
        None,
        "SkipDownBlock2D",
    ),
    "channels": ({"out_channels": 6}, None, "6 channels for 3"),
    "hook": ({}, lambda unet: unet.register_forward_hook(lambda *args: None), "it has hooks"),
    "hook before": (
        {},
        lambda unet: unet.mid_block.attentions[0].to_q.register_forward_pre_hook(lambda *args: None),
        "mid_block.attentions.0.to_q has hooks",
    ),
    "forward": (
        {},
        lambda unet: setattr(unet.conv_in, "forward", unet.conv_in.forward),
        "conv_in.forward was replaced",
    ),
    "processor": (
        {},
        lambda unet: unet.mid_block.attentions[0].set_processor(Processor()),
        "mid_block.attentions.0.processor is Processor, not AttnProcessor2_0",
    ),
    "wrapped": ({}, replaced("mid_block.attentions.0.to_q", Scaled), "to_q is of the class Scaled, not Linear"),
    "no parameters": ({}, replaced("conv_act", lambda act: nn.ReLU()), "conv_act is of the class ReLU"),
    "foreign class": ({}, replaced("conv_act", lambda act: Scaled(act)), "conv_act is of the class Scaled"),
    "eps": ({}, lambda unet: setattr(unet.conv_norm_out, "eps", 10.0), "conv_norm_out.eps is 10.0, not 1e-05"),
    "groups": ({}, lambda unet: setattr(unet.conv_norm_out, "num_groups", 2), "conv_norm_out.num_groups is 2, not"),
    "kernel size": ({}, replaced("conv_out", one_by_one), "conv_out.kernel_size is (1, 1), not (3, 3)"),
    "weight_norm": ({}, lambda unet: weight_norm(unet.conv_in), "conv_in is of the class ParametrizedConv2d"),
    "prune": ({}, lambda unet: prune.l1_unstructured(unet.conv_in, "weight", 0.5), "conv_in has hooks"),
    "dropout": ({"dropout": 0.5}, lambda unet: unet.train(), "dropout is in training mode; call unet.eval()"),
    "dropout of a part": ({"dropout": 0.5}, lambda unet: unet.mid_block.train(), "dropout"),
    "float64": ({}, lambda unet: unet.double(), "float64"),
    "mixed": ({}, lambda unet: unet.conv_out.double(), "not all of one dtype"),
    "compiled": ({}, lambda unet: unet.compile(backend="eager"), "it is compiled"),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_an_obstacle_is_reported_and_diffusers_forward_runs(reason):
    options, change, text = OBSTACLES[reason]
    pair = network_pair(**options)
    for unet in pair:
        if change is not None:
            assert obstacle(unet) is None
            change(unet)
        why = obstacle(unet)
        assert why is not None
        assert text in why
        assert "\n" not in why
    if reason not in ("mixed", "compiled"):  # the first cannot be called, and the second takes seconds to compile
        results = []
        for call, unet in zip((fused_output, plain_output), pair, strict=True):
            torch.manual_seed(1)
            results.append(call(unet, X.to(unet.dtype), T))
        assert torch.equal(*results)


@pytest.mark.parametrize("kind", [nn.Conv2d, Attention, diffusers.UNet2DModel, fast.UNet2DModel])
def test_a_replaced_method_of_a_class_is_an_obstacle(kind, monkeypatch):
    unet, twin = network_pair()
    forward = kind.forward
    before = plain_output(twin, X, T)
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    assert obstacle(unet) == f"{kind.__name__}.forward was replaced"
    assert torch.equal(fused_output(unet, X, T), before)


def test_hooks_of_all_modules_are_an_obstacle():
    unet, twin = network_pair()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert obstacle(unet) == "torch has global module hooks"
        assert torch.equal(fused_output(unet, X, T), plain_output(twin, X, T))
    finally:
        handle.remove()


def test_tied_parameters_are_not_an_obstacle():
    pair = network_pair()
    for unet in pair:
        first, second = unet.mid_block.resnets
        second.conv1.weight = first.conv1.weight
        assert obstacle(unet) is None
    ours, theirs = fused_output(pair[0], X, T), plain_output(pair[1], X, T)
    assert_as_accurate(ours, theirs, plain_output(pair[1].double(), X.double(), T))


def test_an_obstacle_is_logged_once(caplog):
    unet = tiny_unet(fast)
    for eps in (10.0, 10.0, 1e-6):
        unet.conv_norm_out.eps = eps
        fused_output(unet, X, T)
    assert [record.message for record in caplog.records if record.name.startswith("fastddpm")] == [
        "this UNet2DModel is called as it is, which is slower than a fused copy, because "
        f"conv_norm_out.eps is {eps}, not 1e-05"
        for eps in (10.0, 1e-6)
    ]


def test_a_network_of_another_class_is_an_obstacle():
    torch.manual_seed(0)
    unet = Network(**OPTIONS).eval()
    assert obstacle(unet) == "it is a Network; only a plain UNet2DModel can be fused"
    assert torch.equal(fused_output(unet, X, T), plain_output(tiny_unet(diffusers), X, T))
    assert "ModuleList" in obstacle(nn.ModuleList())


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_processors_and_training_mode_are_not_obstacles(processor):
    unet, twin = network_pair()
    for attention in (module for module in unet.modules() if isinstance(module, Attention)):
        attention.set_processor(processor())
    unet.train()  # has no effect without dropout
    unet.requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    assert obstacle(unet) is None
    assert obstacle(twin) is None
    assert not torch.equal(fused_output(unet, X, T), plain_output(twin, X, T))
