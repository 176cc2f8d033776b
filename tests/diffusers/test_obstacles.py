"""Obstacles to fusing a network: each is reported, and diffusers' own forward runs."""

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from fastddpm import diffusers as fast
from fastddpm.diffusers.obstacles import obstacle
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


OBSTACLES = {
    "fourier": ({"time_embedding_type": "fourier"}, None, "time_embedding_type is 'fourier'"),
    "other blocks": (
        {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")},
        None,
        "ResnetDownsampleBlock2D",
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
        "conv_in has hooks, or its",
    ),
    "processor": (
        {},
        lambda unet: unet.mid_block.attentions[0].set_processor(Processor()),
        "mid_block.attentions.0 is not as configured: processor is",
    ),
    "wrapped": ({}, replaced("mid_block.attentions.0.to_q", Scaled), "parameters are not those of its configuration"),
    "no parameters": ({}, replaced("conv_act", lambda act: nn.ReLU()), "conv_act"),
    "foreign class": ({}, replaced("conv_act", lambda act: Scaled(act)), "conv_act is not as configured"),
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
