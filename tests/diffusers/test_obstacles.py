"""What keeps a network from being executed by us: it is named, and diffusers' own forward taken."""

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from fastddpm import diffusers as fast
from fastddpm.diffusers.unet import obstacle
from tests.support.tiny_pipelines import OPTIONS, both_networks, calls, plain_calls, seeded, tiny_unet

X = torch.randn(16, 3, 8, 8, generator=seeded(3))
T = 321


class Scaled(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


class Processor(AttnProcessor2_0):
    """One that is not diffusers'."""


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
    "forward": ({}, lambda unet: setattr(unet.conv_in, "forward", unet.conv_in.forward), "conv_in has hooks or a forw"),
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
def test_an_obstacle_is_named_and_diffusers_forward_taken(reason):
    options, change, text = OBSTACLES[reason]
    pair = both_networks(**options)
    for unet in pair:
        if change is not None:
            assert obstacle(unet) is None
            change(unet)
        why = obstacle(unet)
        assert why is not None
        assert text in why
        assert "\n" not in why
    if reason not in ("mixed", "compiled"):  # the first cannot be called, the second takes seconds
        found = []
        for call, unet in zip((calls, plain_calls), pair, strict=True):
            torch.manual_seed(1)
            found.append(call(unet, X.to(unet.dtype), T))
        assert torch.equal(*found)


def test_a_network_of_another_class_has_an_obstacle():
    torch.manual_seed(0)
    unet = Network(**OPTIONS).eval()
    assert obstacle(unet) == "it is a Network; only a plain UNet2DModel has another execution"
    assert torch.equal(calls(unet, X, T), plain_calls(tiny_unet(diffusers), X, T))
    assert "ModuleList" in obstacle(nn.ModuleList())


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_what_is_no_obstacle(processor):
    unet, twin = both_networks()
    for attention in (module for module in unet.modules() if isinstance(module, Attention)):
        attention.set_processor(processor())
    unet.train()  # without dropout it changes nothing
    unet.requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    assert obstacle(unet) is None
    assert obstacle(twin) is None
    assert not torch.equal(calls(unet, X, T), plain_calls(twin, X, T))
