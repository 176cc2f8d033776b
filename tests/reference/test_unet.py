"""The plain U-Net equals diffusers' UNet2DModel in float64, with every option, and has its parameter names."""

import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from fastddpm.reference.unet import UNet, timestep_embedding
from tests.support import check

SMALL = {  # three levels, attention in the middle one
    "sample_size": 8,
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
OPTIONS = {  # what differs from SMALL and from diffusers' defaults
    "defaults": {},
    "cifar10": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "classes": {"num_class_embeds": 5},
    "classes_timestep": {"class_embed_type": "timestep"},
    "classes_identity": {"class_embed_type": "identity"},
    "center": {"center_input_sample": True, "norm_eps": 1e-2},
    "channels": {"in_channels": 1, "out_channels": 2, "layers_per_block": 1, "norm_num_groups": 4},
    "heads": {"attention_head_dim": 5},  # 24 = 4 heads of 5, and 4 channels that no head gets
    "no_mid": {"mid_block_type": None},
    "no_mid_attention": {"add_attention": False, "mid_block_scale_factor": math.sqrt(2)},
    "mid_scale": {"mid_block_scale_factor": math.sqrt(2)},
    "time_width": {"time_embedding_dim": 40},
    "attention_at_the_ends": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "one_level": {
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "resnet_samplers": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 5,
        "out_channels": 6,
    },
    "resnet_samplers_of_attended_blocks": {"downsample_type": "resnet", "upsample_type": "resnet"},
    **{act: {"act_fn": act} for act in ("swish", "mish", "gelu", "relu")},
}
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ = {
    **CIFAR10,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    "sample_size": 256,
}
BUTTERFLIES = {
    "block_out_channels": [64, 128, 128, 256],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "sample_size": 32,
}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value; NaN where got has one."""
    assert got.shape == want.shape
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def test_a_damaged_result_has_an_error():
    want = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    assert error(want, want) == 0
    assert error(want + torch.tensor([0, 0, 3e-12]), want) > 1e-12
    assert not error(want * math.nan, want) <= 1e-12
    with pytest.raises(AssertionError):
        error(want[:2], want)


class TrueTime(nn.Module):
    """Our sinusoids for diffusers, which computes its own in float32 even in a float64 network."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, t: Tensor) -> Tensor:
        width, flip, shift = (self.config[k] for k in ("block_out_channels", "flip_sin_to_cos", "freq_shift"))
        return timestep_embedding(t, width[0], flip_sin_to_cos=flip, freq_shift=shift)


def diffusers_unet(seed: int = 0, **config) -> diffusers.UNet2DModel:
    """A float64 network in which no parameter is still 0 or 1."""
    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(**config).double().eval()
    net.time_proj = TrueTime(net.config)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def plain_unet(net: diffusers.UNet2DModel) -> UNet:
    plain = UNet(**net.config).to(net.dtype).eval()
    plain.load_state_dict(net.state_dict(), strict=True)
    return plain


def inputs(net: diffusers.UNet2DModel, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, t, and class labels if the network takes them."""
    config = net.config
    x = torch.randn(2, config.in_channels, height, width, dtype=torch.float64)
    labels = {
        "timestep": torch.tensor([4, 700]),
        "identity": torch.randn(2, 4 * config.block_out_channels[0], dtype=torch.float64),
        None: torch.tensor([4, 1]) if config.num_class_embeds else None,
    }
    return x, torch.tensor([3, 977]), labels[config.class_embed_type]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_equals_diffusers_in_float64(options):
    """Within twice the error that diffusers' own network has when it sums in another order (channels-last)."""
    theirs = diffusers_unet(**{**SMALL, **options})
    x, t, labels = inputs(theirs, height=16)
    ours = plain_unet(theirs)(x, t, labels)
    want = theirs(x, t, labels).sample
    other = theirs.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, labels)
    assert 0 < error(other.sample, want) <= 1e-13
    assert error(ours, want) <= 2 * error(other.sample, want)
    assert want.std() > 0.1  # the output is not just a bias


@pytest.mark.parametrize("name", [
    "attention_at_the_ends", "scale_shift_norm", "classes", "classes_timestep", "resnet_samplers"
])  # fmt: skip
@torch.no_grad()
def test_every_parameter_matters(name):
    """Otherwise the comparison above could not detect a parameter in the wrong place."""
    theirs = diffusers_unet(**{**SMALL, **OPTIONS[name]})
    net = plain_unet(theirs)
    x, t, labels = inputs(theirs)
    want = net(x, t, labels)
    for name, parameter in net.named_parameters():
        if name.endswith("to_k.bias"):  # adds a constant to all scores of a query, which softmax ignores
            continue
        kept = parameter.clone()
        parameter += torch.randn_like(parameter)
        assert error(net(x, t, labels), want) > 1e-6, name
        parameter.copy_(kept)


# Options that diffusers lacks: its network, with the parts changed


@pytest.mark.parametrize("heads", [2, (2, 1), [1, 4]])
@torch.no_grad()
def test_num_attention_heads_is_the_number_of_heads(heads):
    everywhere = {kind: (value,) * 3 for kind, value in
                  (("down_block_types", "AttnDownBlock2D"), ("up_block_types", "AttnUpBlock2D"))}  # fmt: skip
    theirs = diffusers_unet(**SMALL | everywhere)
    down, up = (heads, heads) if isinstance(heads, int) else heads
    for name, module in theirs.named_modules():
        if hasattr(module, "to_q"):
            module.heads = up if "up_blocks" in name else down
            module.scale = (module.to_q.out_features / module.heads) ** -0.5
    ours = UNet(**{**theirs.config, "num_attention_heads": heads}).double()
    ours.load_state_dict(theirs.state_dict())
    x, t, _ = inputs(theirs)
    assert error(ours(x, t), theirs(x, t).sample) <= 1e-12
    assert error(plain_unet(theirs)(x, t), theirs(x, t).sample) > 1e-6


@torch.no_grad()
def test_time_proj_dim_is_the_number_of_sines_and_cosines():
    theirs = diffusers_unet(**SMALL, time_embedding_dim=64)
    wide = torch.randn(64, 32, dtype=torch.float64)
    theirs.time_embedding.linear_1.weight.data = wide
    theirs.time_proj = TrueTime({**theirs.config, "block_out_channels": (32,)})
    ours = UNet(**{**theirs.config, "time_proj_dim": 32}).double()
    ours.load_state_dict(theirs.state_dict())
    x, t, _ = inputs(theirs)
    assert error(ours(x, t), theirs(x, t).sample) <= 1e-12


@torch.no_grad()
def test_sizes_may_change_without_a_convolution():
    """As in diffusers' network whose convolutions are the identity: 2 x 2 means with stride 2, and one pixel."""
    theirs = diffusers_unet(**SMALL)
    ours = UNet(**{**theirs.config, "downsample_type": "pool", "upsample_type": "nearest"}).double()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "samplers" not in name})
    for name, module in theirs.named_modules():
        if name.endswith("samplers.0.conv"):
            size, taps = (2, slice(1, 3)) if "down" in name else (1, slice(1, 2))
            module.weight.zero_()
            module.bias.zero_()
            channels = range(len(module.bias))
            module.weight[channels, channels, taps, taps] = 1 / size**2
    x, t, _ = inputs(theirs)
    assert error(ours(x, t), theirs(x, t).sample) <= 1e-12


def test_gradients_equal_diffusers_in_float64():
    theirs = diffusers_unet(**SMALL, num_class_embeds=5)
    ours = plain_unet(theirs)
    x, t, labels = inputs(theirs)
    theirs(x, t, labels).sample.square().mean().backward()
    ours(x, t, labels).square().mean().backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith("to_k.bias"):  # exactly 0: only rounding is left
            assert parameter.grad.abs().max() <= 1e-12 * ours.conv_out.weight.grad.abs().max()
        else:
            assert error(parameter.grad, want[name].grad) <= 1e-12, name


@torch.no_grad()
def test_dropout_is_where_diffusers_drops(monkeypatch):
    theirs = diffusers_unet(**SMALL, dropout=0.25)
    ours = plain_unet(theirs)
    x, t, _ = inputs(theirs)
    kept = ours(x, t)
    # which elements are dropped depends on the memory layout too, so mark all of them instead
    monkeypatch.setattr(F, "dropout", lambda h, p, training, inplace: h.cos() if training and p == 0.25 else h)
    assert torch.equal(ours(x, t), kept)
    want = theirs.train()(x, t).sample
    assert error(ours.train()(x, t), want) <= 1e-12
    assert error(kept, want) > 1e-2


@torch.no_grad()
def test_one_t_serves_the_whole_batch():
    net = plain_unet(diffusers_unet(**SMALL))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = net(x, torch.tensor([7, 7]))
    for t in (7, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(net(x, t), want)
    assert not torch.equal(net(x, torch.tensor([7, 8])), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_is_as_accurate_as_diffusers_in_other_dtypes(dtype):
    theirs = diffusers_unet(**SMALL)
    x, t, _ = inputs(theirs)
    want = plain_unet(theirs)(x, t)
    theirs.to(dtype)
    got, yardstick = plain_unet(theirs)(x.to(dtype), t), theirs(x.to(dtype), t).sample
    assert got.dtype == dtype
    check.assert_as_accurate(got, yardstick, want)


@pytest.mark.parametrize(
    ("config", "millions"), [(CIFAR10, 35.7), (CELEBAHQ, 113.7), (BUTTERFLIES, 18.5), ({}, 274.1)],
    ids=["cifar10", "celebahq", "butterflies", "defaults"],
)  # fmt: skip
def test_public_configs_give_the_parameters_of_diffusers(config, millions):
    """The same names and shapes, from a configuration as config.json has it."""
    with torch.device("meta"):
        ours = UNet(**config).state_dict()
        theirs = diffusers.UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")}).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert round(sum(value.numel() for value in ours.values()) / 1e6, 1) == millions


# The time embedding


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("width", [8, 9])
def test_timestep_embedding_equals_its_formula(width, flip, shift):
    t = torch.tensor([0, 1, 500, 999, 12.5], dtype=torch.float64)
    got = timestep_embedding(t, width, flip_sin_to_cos=flip, freq_shift=shift)
    angles = [[each * 10000 ** (-i / (4 - shift)) for i in range(4)] for each in t.tolist()]
    first, second = (math.cos, math.sin) if flip else (math.sin, math.cos)
    want = [[*map(first, row), *map(second, row)] + [0] * (width - 8) for row in angles]
    assert got.dtype == torch.float64
    assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() <= 1e-12


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_timestep_embedding_equals_diffusers_within_its_rounding(flip, shift):
    """In diffusers' float32, the exponent e = -log(10000) i / (half - shift) is rounded three times by 2^-24, so its
    exponential is off by 3 |e| 2^-24 and by two ulps of its own; the product with t adds one, the sine two.
    """
    width, t = 128, torch.arange(1000)
    got = timestep_embedding(t, width, flip_sin_to_cos=flip, freq_shift=shift)
    theirs = get_timestep_embedding(t, width, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    exponent = math.log(10000) * torch.arange(64, dtype=torch.float64) / (64 - shift)
    angle = t.double()[:, None] * torch.exp(-exponent)
    bound = (angle * (3 * exponent + 6) + 2) * 2**-24
    assert ((theirs.double() - got).abs() <= torch.cat([bound, bound], 1)).all()


# Bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ("SkipDownBlock2D",) * 3}, "down_block_types has 'SkipDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D", "SkipUpBlock2D")}, "up_block_types has 'SkipUpBlock2D'"),
        ({"up_block_types": ("UpBlock2D",)}, "block_out_channels has 3 levels"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type has 'UNetMidBlock2DCrossAttn'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type has 'fourier'"),
        ({"downsample_type": "fir"}, "downsample_type has 'fir'"),
        ({"upsample_type": "pool"}, "upsample_type has 'pool'"),
        ({"downsample_padding": 2}, "downsample_padding has 2"),
        ({"act_fn": "tanh"}, "act_fn has 'tanh'"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift has 'ada_group'"),
        ({"class_embed_type": "projection"}, "class_embed_type has 'projection'"),
        ({"attention_head_dim": 64}, "attention_head_dim is 64"),
        ({"cross_attention_dim": 8}, "cross_attention_dim is 8"),
    ],
)
def test_errors_name_the_unknown_option(config, message):
    with pytest.raises(ValueError, match=f"^{message}.*(want|leave)[^\n]*$"):
        UNet(**{**SMALL, **config})


def test_class_labels_are_for_networks_with_classes():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^class_labels are missing[^\n]*$"):
        UNet(**SMALL, num_class_embeds=5)(x, 0)
    with pytest.raises(ValueError, match=r"^class_labels were given[^\n]*$"):
        UNet(**SMALL)(x, 0, torch.tensor([0, 1]))
