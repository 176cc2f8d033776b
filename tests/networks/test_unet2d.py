"""The fast U-Net equals diffusers' UNet2DModel: the same parameters, the same function, the same checkpoints."""

import json
import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from bench.layouts import CIFAR10
from fastddpm import checkpoints, ops
from fastddpm.core import layout
from fastddpm.core.schedule import Schedule
from fastddpm.networks.layers import GroupNorm
from fastddpm.networks.planned import fastest_forward
from fastddpm.networks.unet2d import UNet2D
from fastddpm.reference.unet import UNet, timestep_embedding
from tests.reference.test_unet import TrueTime
from tests.support import check
from tests.support.check import TINY, error_line

X = torch.ones(2, 3, 16, 16)
THREE = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
OPTIONS = {
    "defaults": {},
    "no attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "attention everywhere": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
    "attention on one side": {"up_block_types": ("UpBlock2D",) * 2},
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "three levels": THREE,
    "two layers": {**THREE, "layers_per_block": 2},
    "three layers": {"layers_per_block": 3},
    "one head": {"attention_head_dim": None},
    "heads of 4": {"attention_head_dim": 4},
    "downsample_padding 0": {**THREE, "downsample_padding": 0},
    "flip_sin_to_cos off": {"flip_sin_to_cos": False},
    "freq_shift 1": {"flip_sin_to_cos": False, "freq_shift": 1},
    "old names of blocks": {"down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D")},
    "heads as wide as the attended level": {"attention_head_dim": 16},
    "odd width": {"block_out_channels": (9, 12), "norm_num_groups": 3, "attention_head_dim": 3},
    "time_embedding_dim": {"time_embedding_dim": 20},
    "swish": {"act_fn": "swish"},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift, normed attention": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "attn_norm_num_groups": {"attn_norm_num_groups": 2},
    "no middle": {"mid_block_type": None},
    "no attention in the middle": {"add_attention": False},
    "mid_block_scale_factor": {"mid_block_scale_factor": math.sqrt(2)},
    "center_input_sample": {"center_input_sample": True},
    "channels": {"in_channels": 1, "out_channels": 4},
    "norm_eps": {"norm_eps": 0.5},
    "norm_num_groups": {"norm_num_groups": 8},
    "dropout": {"dropout": 0.5},
    "sample_size": {"sample_size": (8, 24)},
    "resnet samplers": {
        **THREE,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnet samplers of attended blocks": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "guided-diffusion": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "num_class_embeds": 10,
        "out_channels": 6,
    },
    "class embedding": {"num_class_embeds": 10},
    "class embedding as of t": {"class_embed_type": "timestep"},
    "class embedding given": {"class_embed_type": "identity"},
}
CELEBAHQ = {  # google/ddpm-celebahq-256, a quarter as wide and high
    **CIFAR10,
    "block_out_channels": (32, 32, 64, 64, 128, 128),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "sample_size": 64,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
BUTTERFLIES = {  # johnowhitaker/ddpm-butterflies-32px
    "attention_head_dim": 8,
    "block_out_channels": (64, 128, 128, 256),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 2,
    "sample_size": 32,
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}


class Case:
    """diffusers' network and ours with the same parameters, and an input whose values bfloat16 can represent."""

    def __init__(self, config: dict, n: int = 2, one_t: bool = False):
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.config, self.n = config, n
        self.theirs = UNet2DModel(**config).eval().requires_grad_(False)
        for parameter in self.theirs.parameters():
            if parameter.ndim == 1:  # norms and biases begin as 0, 1 or nearly 0
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        self.ours = UNet2D(**config).eval()
        checkpoints.load_into(self.ours, self.theirs.state_dict())
        size = config.get("sample_size", 16)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (n, config.get("in_channels", 3), height, width)
        self.x = torch.randn(shape, generator=generator).bfloat16().float()
        self.t = torch.randint(0, 1000, (1 if one_t else n,), generator=generator)
        self.labels = None
        if config.get("class_embed_type") == "identity":
            self.labels = torch.randn(n, 4 * config["block_out_channels"][0], generator=generator).bfloat16().float()
        elif config.get("num_class_embeds") or config.get("class_embed_type"):
            self.labels = torch.randint(0, 10, (n,), generator=generator)

    def diffusers(self, dtype: torch.dtype) -> Tensor:
        """diffusers' result in channels-last, because ours is compared with plain torch's kernels for that format.

        On a CPU their convolutions are less accurate than those for NCHW: at the cifar10-32 layout, diffusers' own rms
        error in float32 is 5.5e-7 in channels-last and 2.1e-7 in NCHW (a Xeon with AMX, 2026-11-22).
        """
        net = UNet2DModel(**self.config).eval().requires_grad_(False)
        net.load_state_dict(self.theirs.state_dict())
        if dtype == torch.float64:
            net.time_proj = TrueTime(net.config)
        # without this, class_embed_type "timestep" works only in float32
        net.time_proj.register_forward_hook(lambda module, args, waves: waves.to(dtype))
        for parameter in net.parameters():
            parameter.data = parameter.to(dtype)
        labels = self.labels.to(dtype) if self.config.get("class_embed_type") == "identity" else self.labels
        net.to(memory_format=torch.channels_last)
        return net(layout.channels_last(self.x.to(dtype)), self.t.expand(self.n), labels).sample

    def fast(self, dtype: torch.dtype) -> Tensor:
        """Our result as in the sampling loop: with a table of rows, if they depend on t alone."""
        net = self.ours.for_inference(dtype)
        labelled = self.labels is not None
        rows = net.time_rows(self.t, self.labels) if labelled else net.time_rows(torch.arange(1000))[self.t]
        kernels = ops.backend(self.x.device) != "torch"
        return fastest_forward(net)(self.x.to(dtype), rows if kernels else rows.to(dtype))

    def assert_as_accurate_as_diffusers(self) -> None:
        ref, plain = self.diffusers(torch.float64), self.diffusers(torch.float32)
        check.assert_as_accurate(self.ours(self.x, self.t, self.labels).detach(), plain, ref)
        check.assert_as_accurate(self.fast(torch.float32), plain, ref)
        check.assert_as_accurate(self.fast(torch.bfloat16), self.diffusers(torch.bfloat16), ref)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_as_accurate_as_diffusers(option):
    Case({**TINY, **OPTIONS[option]}, one_t=True).assert_as_accurate_as_diffusers()


@pytest.mark.parametrize("option", [
    "defaults", "three levels", "scale_shift", "class embedding", "no middle", "guided-diffusion"
])  # fmt: skip
def test_each_entry_may_have_its_own_t(option):
    Case({**TINY, **OPTIONS[option]}).assert_as_accurate_as_diffusers()


@pytest.mark.slow
@pytest.mark.parametrize("option", [
    "defaults", "two layers", "downsample_padding 0", "odd width", "mish", "scale_shift", "mid_block_scale_factor",
    "channels", "class embedding", "resnet samplers", "guided-diffusion"
])  # fmt: skip
def test_execution_with_kernels_is_as_accurate_as_diffusers(option, interpreted):
    """Skips without concatenation, shortcuts as matrix products, biases added in the norms and the residuals."""
    Case({**TINY, "sample_size": 8, **OPTIONS[option]}, one_t=option == "defaults").assert_as_accurate_as_diffusers()


@pytest.mark.slow
@pytest.mark.parametrize("config", [CIFAR10, CELEBAHQ, BUTTERFLIES], ids=["cifar10-32", "celebahq-256", "butterflies"])
def test_public_layouts_are_as_accurate_as_diffusers(config):
    Case(config, n=1, one_t=True).assert_as_accurate_as_diffusers()


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 12, 5, 7), (2, 32, 16, 16), (1, 8, 33, 33)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mean", [0, 1000])
def test_group_norm_is_accurate_far_from_zero(shape, groups, mean):
    """Compared with torch's NCHW kernel, which takes the variance about the mean."""
    torch.manual_seed(0)
    x = layout.channels_last(torch.randn(shape) + mean)
    norm = GroupNorm(groups, shape[1], 1e-6).requires_grad_(False)
    ref = norm.double()(x.double())
    plain = norm.float()(x.contiguous())
    with torch.no_grad():
        check.assert_as_accurate(norm(x), plain, ref)


def test_group_norm_in_one_pass_fails():
    torch.manual_seed(0)
    x = layout.channels_last(torch.randn(2, 32, 16, 16) + 1000)
    norm = torch.nn.GroupNorm(4, 32).requires_grad_(False)
    ref, plain = norm.double()(x.double()), norm.float()(x.contiguous())
    one_pass = x.square().unflatten(1, (4, 8)).mean((2, 3, 4)) - x.unflatten(1, (4, 8)).mean((2, 3, 4)).square()
    damaged = (x - 1000) / (one_pass.repeat_interleave(8, 1)[:, :, None, None] + 1e-5).sqrt()
    with pytest.raises(AssertionError, match="error is"):
        check.assert_as_accurate(damaged, plain, ref)


def test_a_wrong_option_fails():
    case = Case(TINY)
    ref, plain = case.diffusers(torch.float64), case.diffusers(torch.float32)
    for change in ({"norm_eps": 2e-5}, {"freq_shift": 1}, {"attention_head_dim": 4}, {"act_fn": "mish"}):
        other = UNet2D(**{**TINY, **change})
        checkpoints.load_into(other, case.theirs.state_dict())
        with pytest.raises(AssertionError):
            check.assert_as_accurate(other(case.x, case.t).detach(), plain, ref)


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_have_the_names_and_shapes_of_diffusers(option):
    config = {**TINY, **OPTIONS[option]}
    ours, theirs = ({k: v.shape for k, v in kind(**config).state_dict().items()} for kind in (UNet2D, UNet2DModel))
    assert ours == theirs


@pytest.mark.parametrize(
    "config", [CIFAR10, CELEBAHQ, BUTTERFLIES, {}], ids=["cifar10", "celebahq", "butterflies", "none"]
)
def test_public_layouts_have_the_parameters_of_diffusers(config):
    with torch.device("meta"):
        ours, theirs = ({k: v.shape for k, v in kind(**config).state_dict().items()} for kind in (UNet2D, UNet2DModel))
    assert ours == theirs
    if config is CIFAR10:
        assert sum(shape.numel() for shape in ours.values()) == 35_746_307


OWN = {  # options that diffusers lacks
    "heads": {"num_attention_heads": 2},
    "heads down and up": {**THREE, "num_attention_heads": (4, 2)},
    "time_proj_dim": {"time_proj_dim": 20},
    "no convolution": {**THREE, "downsample_type": "pool", "upsample_type": "nearest"},
    "no convolution in bf16's kernels": {"downsample_type": "pool", "upsample_type": "nearest", "dropout": 0.1},
}


@pytest.mark.parametrize("option", OWN)
def test_our_own_options_are_as_accurate_as_the_reference(option):
    torch.manual_seed(0)
    config, dtypes = {**TINY, **OWN[option]}, (torch.float32, torch.bfloat16)
    net, x, t = UNet2D(**config).eval(), torch.randn(2, 3, 16, 16).bfloat16().float(), torch.tensor([3, 700])
    plain = UNet(**config).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        ref = plain.double()(x.double(), t)
        results = {dtype: plain.to(dtype)(x.to(dtype), t) for dtype in dtypes}
        check.assert_as_accurate(net(x, t), results[torch.float32], ref)
        for dtype in dtypes:
            fast = net.for_inference(dtype)
            check.assert_as_accurate(fastest_forward(fast)(x.to(dtype), fast.time_rows(t)), results[dtype], ref)


def test_own_options_are_in_a_configuration_only_if_given():
    assert UNet2D(**TINY, num_attention_heads=None, time_proj_dim=None).config == UNet2D(**TINY).config
    assert UNet2D(**TINY, num_attention_heads=[2, 4]).config["num_attention_heads"] == (2, 4)


def test_configuration_is_completed_as_diffusers_does():
    assert {key: value for key, value in UNet2DModel(**TINY).config.items() if key[0] != "_"} == UNet2D(**TINY).config


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"flip_sin_to_cos": False, "freq_shift": 1}], ids=str)
def test_sinusoids_are_rounded_once(options, dtype):
    """Even of angles up to 4000, where the spacing of float32 numbers is 2.4e-4."""
    net, t = UNet2D(**{**TINY, **options}), torch.arange(0, 4000, 7).to(dtype)
    flip, shift = net.config["flip_sin_to_cos"], net.config["freq_shift"]
    want = timestep_embedding(t, 8, flip_sin_to_cos=flip, freq_shift=shift)
    assert torch.equal(net._sinusoid(t), want.float())


@pytest.mark.parametrize("option", ["defaults", "guided-diffusion"])
def test_gradients_equal_diffusers(option):
    case = Case({**TINY, **OPTIONS[option]})
    theirs, ours = case.theirs.double().requires_grad_(), case.ours.double().train()
    theirs.time_proj = TrueTime(theirs.config)
    args = case.x.double(), case.t, case.labels
    for y in (theirs(*args).sample, ours(*args)):
        y.square().sum().backward()
    got, want = ({k: v.grad for k, v in net.named_parameters()} for net in (ours, theirs))
    scale = torch.cat([gradient.flatten() for gradient in want.values()]).norm()
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-12 * scale, name


def test_one_t_may_be_an_int_or_a_tensor():
    case = Case(TINY, n=3)
    want = case.ours(case.x, torch.tensor([7]))
    for t in (7, torch.tensor(7), torch.tensor([7], dtype=torch.int32)):
        assert torch.equal(case.ours(case.x, t), want)


def test_result_is_channels_last_for_any_input_layout():
    case = Case(TINY)
    for net in (case.ours, case.ours.for_inference(torch.float32), case.ours.for_inference(torch.bfloat16)):
        x = case.x.to(net.conv_in.weight.dtype)
        y, z = net(x, 3), net(layout.channels_last(x), 3)
        assert torch.equal(y, z)
        assert layout.is_channels_last(y)
        assert layout.is_channels_last(z)
        assert y.dtype == z.dtype == x.dtype


def test_for_inference_does_not_change_the_network():
    case = Case({**TINY, "dropout": 0.5})
    before = {name: value.clone() for name, value in case.ours.state_dict().items()}
    net = case.ours.train().for_inference(torch.bfloat16)
    net(case.x.bfloat16(), 3)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert case.ours.training
    assert all(parameter.requires_grad for parameter in case.ours.parameters())
    assert before.keys() == case.ours.state_dict().keys()
    for name, value in case.ours.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_is_active_only_in_training_mode():
    case = Case({**TINY, "dropout": 0.5})
    want = case.ours.eval()(case.x, 3)
    assert torch.equal(case.ours(case.x, 3), want)
    assert not torch.equal(case.ours.train()(case.x, 3), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_network_serves_inputs_of_many_shapes(dtype):
    case = Case(TINY)
    net = case.ours.for_inference(dtype)
    for n, height, width in ((1, 16, 16), (2, 16, 16), (1, 8, 24), (3, 2, 2), (1, 16, 16)):
        x = torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(2)).to(dtype)
        assert torch.equal(net(x, 5), case.ours.for_inference(dtype)(x, 5))


# Checkpoints


@pytest.mark.parametrize("option", ["defaults", "scale_shift", "class embedding", "one level", "sample_size"])
def test_diffusers_loads_our_checkpoints(option, tmp_path):
    case = Case({**TINY, **OPTIONS[option]})
    checkpoints.save(tmp_path, case.ours.config, case.ours.state_dict(), Schedule(variance_type="fixed_large"))
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.variance_type == "fixed_large"
    case.theirs = loaded.unet.requires_grad_(False)
    for name, value in case.ours.state_dict().items():
        assert torch.equal(case.theirs.state_dict()[name], value)
    case.assert_as_accurate_as_diffusers()


@pytest.mark.parametrize("option", ["defaults", "scale_shift", "class embedding", "one level", "sample_size"])
def test_we_load_diffusers_checkpoints(option, tmp_path):
    case = Case({**TINY, **OPTIONS[option]})
    DDPMPipeline(case.theirs, DDPMScheduler()).save_pretrained(tmp_path)
    saved = checkpoints.load(tmp_path)
    net = UNet2D(**saved.config).eval()
    checkpoints.load_into(net, saved.parameters)
    assert json.dumps(net.config) == json.dumps(case.ours.config)  # JSON has no tuples
    assert torch.equal(net(case.x, case.t, case.labels), case.ours(case.x, case.t, case.labels))


# Bad input


@pytest.mark.parametrize(
    "option",
    [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned"},
        {"downsample_type": "fir"},
        {"upsample_type": "pool"},
        {"num_attention_heads": [1, 2, 3]},
        {"time_proj_dim": 1},
        {"down_block_types": ("ResnetUpsampleBlock2D", "DownBlock2D")},
        {"down_block_types": ("DownBlock2D", "AttnSkipDownBlock2D")},
        {"up_block_types": ("UpBlock2D", "SkipUpBlock2D")},
        {"down_block_types": ("UpBlock2D", "DownBlock2D")},
        {"downsample_padding": 2},
        {"act_fn": "tanh"},
        {"resnet_time_scale_shift": "spatial"},
        {"class_embed_type": "projection"},
        {"cross_attention_dim": 768},
    ],
)
def test_errors_name_the_unsupported_option(option):
    ((key, value),) = option.items()
    text = check.error_line(UNet2D, **{**TINY, **option})
    assert text.startswith("UNet2D: ")
    assert key in text
    if key in TINY or isinstance(value, str):
        odd = next(entry for entry in value if entry not in TINY[key]) if isinstance(value, tuple) else value
        assert repr(odd) in text


@pytest.mark.parametrize(
    ("option", "want"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types has 1 entries, but block_out_channels has 2"),
        ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types has 3 entries, but block_out_channels has 2"),
        ({"norm_num_groups": 3}, "norm_num_groups is 3; want a whole number that divides [8, 16]"),
        ({"norm_num_groups": None}, "norm_num_groups is None; want a whole number from 1 to 65536"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups is 3; want a whole number that divides [16]"),
        ({"attention_head_dim": 5}, "attention_head_dim is 5; want a whole number that divides [16]"),
        ({"num_attention_heads": (2, 3)}, "num_attention_heads is (2, 3); want a whole number that divides [16]"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; want a whole number from 1 to 65536"),
        ({"time_proj_dim": 8, "freq_shift": 4}, "freq_shift is 4; want less than 4"),
        ({"layers_per_block": [1, 1]}, "layers_per_block is [1, 1]; want a whole number from 1 to 100"),
        ({"layers_per_block": 0}, "layers_per_block is 0; want a whole number from 1 to 100"),
        ({"in_channels": "3"}, "in_channels is '3'; want a whole number from 1 to 65536"),
        ({"norm_eps": None}, "norm_eps is None; want a finite number, above 0, at most 1"),
        ({"dropout": "a"}, "dropout is 'a'; want a finite number, at least 0, at most 1"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor is 0; want a finite number, above 0"),
        ({"freq_shift": 4}, "freq_shift is 4; want less than 4"),
        (
            {"block_out_channels": (8, "16")},
            "block_out_channels: an entry is '16'; want a whole number from 2 to 65536",
        ),
        ({"block_out_channels": 8}, "block_out_channels is 8; want a list with one entry per level"),
    ],
)
def test_bad_options(option, want):
    assert want in check.error_line(UNet2D, **{**TINY, **option})


@pytest.mark.parametrize(
    "shape", [(3, 16, 16), (1, 2, 3, 16, 16), (2, 4, 16, 16), (2, 3, 15, 16), (2, 3, 16, 17), (2, 3, 0, 16)]
)
def test_input_of_a_wrong_shape_is_rejected(shape):
    want = f"x is {shape}; want [N, 3, H, W] with H and W multiples of 2 for this network"
    assert check.error_line(Case(TINY).ours, torch.zeros(shape), 0) == want


def test_wrong_numbers_of_timesteps_or_labels_are_rejected():
    net = Case(TINY).ours
    assert check.error_line(net, torch.zeros(2, 3, 16, 16), torch.zeros(3)).startswith(
        "t has length 3 for a batch of 2"
    )
    labelled = UNet2D(**TINY, num_class_embeds=10)
    assert check.error_line(labelled, torch.zeros(2, 3, 16, 16), 0, torch.zeros(3).long()).startswith(
        "class_labels has length 3 for a batch of 2"
    )


def test_a_bf16_network_is_widened_before_it_is_fused():
    case = Case(TINY, one_t=True)
    want = UNet2D(**TINY).eval()
    want.load_state_dict({name: value.bfloat16().float() for name, value in case.ours.state_dict().items()})
    net = case.ours.bfloat16().for_inference(torch.float32)
    fast = want.for_inference(torch.float32)
    assert torch.equal(net.denoise(case.x, net.time_rows(case.t)), fast.denoise(case.x, fast.time_rows(case.t)))


def test_for_inference_rejects_float64():
    assert check.error_line(UNet2D(**TINY).for_inference, torch.float64).startswith("dtype is torch.float64; want")


def test_class_labels_are_for_networks_with_classes():
    x, labels = torch.zeros(2, 3, 16, 16), torch.tensor([1, 2])
    assert check.error_line(UNet2D(**TINY), x, 0, labels).startswith("class_labels were given")
    assert check.error_line(UNet2D(**TINY, num_class_embeds=10), x, 0).startswith("this network is class-conditional")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 1), "x is None; want a dense tensor [N, C, H, W]"),
        ((X.to_sparse(), 1), "want a dense tensor [N, C, H, W]"),
        ((X.double(), 1), "x is torch.float64, but the network's parameters are torch.float32; convert one of them"),
        ((X, None), "t is None; want a number, or [N] of them"),
        ((X, "1"), "t is '1'; want a number, or [N] of them"),
        ((X, 1, "ab"), "class_labels is 'ab'; want a number, or [N] of them"),
        ((X, 1, torch.zeros(2)), "class_labels are torch.float32; want [N] int64"),
    ],
    ids=str,
)
def test_wrong_types_are_named(arguments, message):
    assert message in error_line(UNet2D(**TINY, num_class_embeds=3), *arguments)


def test_class_labels_may_be_a_list():
    net = UNet2D(**TINY, num_class_embeds=3)
    assert torch.equal(net(X, 1, [2, 0]), net(X, 1, torch.tensor([2, 0])))
    assert torch.equal(net(X, 1, 2), net(X, 1, torch.tensor([2])))


@pytest.mark.parametrize("device", ["tpu", 1.5, []], ids=str)
def test_a_device_that_is_none_is_named(device):
    assert f"device is {device!r}; want 'cpu'" in error_line(UNet2D(**TINY).for_inference, torch.float32, device)
