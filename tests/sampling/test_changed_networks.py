"""A `UNet2D` that was changed, in whatever way, is sampled as it is: with the bits of its own forward."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from fastddpm import Sampler, Schedule, UNet2D
from fastddpm.core import noise
from fastddpm.evaluate.likelihood import bound
from fastddpm.networks import layers
from fastddpm.networks.unet2d import network_obstacles
from fastddpm.reference.diffusion import update
from fastddpm.sampling.job import sample_to
from tests.support.check import TINY, assert_as_accurate, error_line

CONFIG = {**TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1, "attention_head_dim": 8}
SCHEDULE, STEPS, N = Schedule(num_train_timesteps=20), 3, 2
MID = "mid_block.resnets.0"
ATTENTION = "mid_block.attentions.0"


class HalvedForward(UNet2D):
    def forward(self, x, t, class_labels=None):
        return 0.5 * super().forward(x, t, class_labels)


class HalvedDenoise(UNet2D):
    def denoise(self, x, rows):
        return 0.5 * super().denoise(x, rows)


class HalvedRows(UNet2D):
    def time_rows(self, t, class_labels=None):
        return 0.5 * super().time_rows(t, class_labels)


class LoRA(nn.Module):
    """A parametrization: weight + a b."""

    def __init__(self, weight):
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(len(weight), 1))
        self.b = nn.Parameter(0.1 * torch.randn(1, weight[0].numel()))

    def forward(self, weight):
        return weight + (self.a @ self.b).view_as(weight)


def halving(function):
    return lambda *args, **kwargs: 0.5 * function(*args, **kwargs)


def hooked(name, **options):
    return lambda net: net.get_submodule(name).register_forward_hook(lambda module, args, y: 0.5 * y, **options)


def hooked_before(name):
    return lambda net: net.get_submodule(name).register_forward_pre_hook(
        lambda module, args: (0.5 * args[0], *args[1:])
    )


def patched(name, method):
    def change(net):
        module = net.get_submodule(name)
        setattr(module, method, halving(getattr(module, method)))

    return change


def put(name, attribute, value):
    return lambda net: setattr(net.get_submodule(name), attribute, value(net) if callable(value) else value)


def reverse(name):
    """Put the parts of a container in another order, each under its own name."""

    def change(net):
        parts = net.get_submodule(name)._modules
        for part in reversed(list(parts)):
            parts[part] = parts.pop(part)

    return change


def wrapped(name):
    """In a Sequential with tanh."""
    owner, _, attribute = name.rpartition(".")
    return lambda net: net.get_submodule(owner).register_module(
        attribute, nn.Sequential(net.get_submodule(name), nn.Tanh())
    )


def applied(function, name, *args, **options):
    return lambda net: function(net.get_submodule(name), *args, **options) and None


def lora(name):
    def change(net):
        part = net.get_submodule(name)
        parametrize.register_parametrization(part, "weight", LoRA(part.weight))

    return change


def conv(kernel_size):
    return lambda net: nn.Conv2d(8, 1, kernel_size, padding=kernel_size // 2)


PARTS = (
    *("conv_in", "time_embedding", "time_embedding.linear_1", f"{MID}.norm1", f"{MID}.conv1", f"{MID}.time_emb_proj"),
    *(f"{MID}.norm2", f"{MID}.dropout", f"{MID}.conv2", "down_blocks.1.resnets.0.conv_shortcut", MID, ATTENTION),
    *(f"{ATTENTION}.group_norm", f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "down_blocks.0.downsamplers.0"),
    *("up_blocks.0.upsamplers.0", "up_blocks.0.upsamplers.0.conv", "conv_norm_out", "conv_out"),
)
CHANGES = {  # how a network is changed, and what is said of it
    **{f"hook of {name}": (hooked(name), f"{name} has hooks") for name in PARTS},
    **{
        f"{name} in Sequential": (wrapped(name), f"{name} is of the class Sequential, not")
        for name in PARTS
        if name != MID
    },
    "hook": (hooked(""), "it has hooks"),
    "hook with keywords": (
        lambda net: net.conv_in.register_forward_hook(lambda module, args, kwargs, y: 0.5 * y, with_kwargs=True),
        "conv_in has hooks",
    ),
    "hook before": (hooked_before(""), "it has hooks"),
    "hook before a part": (hooked_before(f"{MID}.conv1"), f"{MID}.conv1 has hooks"),
    "hook of a container": (hooked("mid_block"), "mid_block has hooks"),
    "forward": (patched("", "forward"), "forward was replaced"),
    "denoise": (patched("", "denoise"), "denoise was replaced"),
    "time_rows": (patched("", "time_rows"), "time_rows was replaced"),
    "forward of a part": (patched("conv_in", "forward"), "conv_in.forward was replaced"),
    "helper of a part": (patched("conv_in", "_conv_forward"), "conv_in._conv_forward was replaced"),
    "weight_norm": (applied(parametrizations.weight_norm, "conv_in"), "conv_in is of the class ParametrizedConv2d"),
    "weight_norm of the time": (applied(parametrizations.weight_norm, f"{MID}.time_emb_proj"), "ParametrizedLinear"),
    "old weight_norm": (applied(nn.utils.weight_norm, f"{MID}.conv1"), f"{MID}.conv1 has hooks"),
    "spectral_norm": (applied(parametrizations.spectral_norm, f"{MID}.conv2"), "ParametrizedConv2d"),
    "old spectral_norm": (applied(nn.utils.spectral_norm, f"{ATTENTION}.to_q"), f"{ATTENTION}.to_q has hooks"),
    "pruned": (applied(prune.ln_structured, "conv_in", "weight", 0.5, 2, 0), "conv_in has hooks"),
    "pruned bias": (applied(prune.l1_unstructured, f"{MID}.time_emb_proj", "bias", 0.5), "time_emb_proj has hooks"),
    "LoRA": (lora(f"{ATTENTION}.to_q"), "ParametrizedLinear"),
    "LoRA of a convolution": (lora("up_blocks.0.upsamplers.0.conv"), "ParametrizedConv2d"),
    "1 x 1": (put("", "conv_out", conv(1)), "conv_out is of the class torch.nn.modules.conv.Conv2d, not fastddpm."),
    "5 x 5": (put("", "conv_out", conv(5)), "conv_out is of the class torch.nn.modules.conv.Conv2d, not fastddpm."),
    "class of a part": (put("conv_in", "__class__", lambda net: type("Mine", (layers.Conv2d,), {})), "class Mine"),
    "batch norm": (put(MID, "norm1", lambda net: nn.BatchNorm2d(16)), f"{MID}.norm1 is of the class BatchNorm2d"),
    "no attention": (put("mid_block", "attentions", lambda net: nn.ModuleList()), f"{ATTENTION} is missing"),
    "no middle": (put("", "mid_block", None), "mid_block is missing"),
    "quantized": (
        lambda net: torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, inplace=True),
        "is of the class torch.ao.nn.quantized.dynamic.modules.linear.Linear, not torch.nn.modules.linear.Linear",
    ),
    "eps": (put("conv_norm_out", "eps", 10.0), "conv_norm_out.eps is 10.0, not 1e-05"),
    "order": (reverse("mid_block.resnets"), "the parts of mid_block.resnets are in another order"),
    "groups": (put(f"{MID}.norm1", "num_groups", 2), f"{MID}.norm1.num_groups is 2, not 4"),
    "activation": (put(MID, "act", lambda net: nn.ReLU()), f"{MID}.act is None, not silu"),
    "activation function": (put(MID, "act", lambda net: torch.relu), f"{MID}.act is relu, not silu"),
    "activation of the configuration": (lambda net: net.config.update(act_fn="relu"), "act is silu, not relu"),
    "scale": (put(MID, "scale", 2.0), f"{MID}.scale is 2.0, not 1"),
    "heads": (put(ATTENTION, "head_dim", 4), f"{ATTENTION}.head_dim is 4, not 8"),
    "padding": (put("conv_in", "padding_mode", "circular"), "conv_in.padding_mode is 'circular', not 'zeros'"),
    "no bias": (put("conv_in", "bias", None), "conv_in.bias is None, not (8,)"),
    "no bias of the time": (put(f"{MID}.time_emb_proj", "bias", None), "time_emb_proj.bias is None, not (16,)"),
    "no bias before the time": (put(f"{MID}.conv1", "bias", None), f"{MID}.conv1.bias is None, not (16,)"),
    "buffer": (lambda net: net.conv_in.register_buffer("gain", torch.ones(1)), "conv_in.gain is not in its config"),
}
SUBCLASSES = {"forward": HalvedForward, "denoise": HalvedDenoise, "time_rows": HalvedRows}
CLASSES = {  # methods of classes that are replaced
    "UNet2D.forward": UNet2D,
    "UNet2D.denoise": UNet2D,
    "Conv2d.forward": layers.Conv2d,
    "Conv2d._conv_forward": nn.Conv2d,
    "GroupNorm.forward": layers.GroupNorm,
    "Attention.forward": layers.Attention,
    "Linear.forward": nn.Linear,
}


def network(kind=UNet2D, **options):
    torch.manual_seed(0)
    return kind(**{**CONFIG, **options})


def sampler_of(net):
    return Sampler(net, SCHEDULE, device="cpu", precision="fp32")


def sampled(sampler, **options):
    return sampler.sample(N, steps=STEPS, seed=1, progress=False, **options)


def own_loop(net, labels=None, dtype=torch.float32):
    """The samples by plain calls of the network."""
    table, address = SCHEDULE.table(STEPS), noise.address(1, N)
    x = noise.normal(address, (1, 8, 8), stream=noise.START, t=20).to(dtype)
    net = net.eval()
    for k in reversed(range(STEPS)):
        t = table.timesteps[k].long().expand(N)
        z = noise.normal(address, (1, 8, 8), stream=noise.STEP, t=t).to(dtype)
        with torch.no_grad():
            model_output = net(x.clone(), t, *([] if labels is None else [labels]))
        x = update(x, model_output, table.rows[k].to(dtype), z, clip=True)
    return x


def assert_sampled_as_it_is(sampler, net, text, labels=None):
    """With one warning, in the first of two runs."""
    with pytest.warns(UserWarning, match="this UNet2D is called as it is, which is slower") as warned:
        first = sampled(sampler, class_labels=labels)
    assert len(warned) == 1
    assert text in str(warned[0].message)
    assert "\n" not in str(warned[0].message)
    assert torch.equal(first, own_loop(net, labels))
    assert torch.equal(sampled(sampler, class_labels=labels), first)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*(weight_norm|quant).*")
def test_a_changed_network_is_sampled_as_it_is(change):
    """Also if it was changed after it was sampled as a fused copy."""
    net = network()
    sampler = sampler_of(net)
    before = sampled(sampler)
    CHANGES[change][0](net)
    assert_sampled_as_it_is(sampler, net, CHANGES[change][1])
    if change != "buffer" and "dropout" not in change and "class of" not in change:
        assert not torch.equal(sampled(sampler), before)


@pytest.mark.parametrize("method", SUBCLASSES)
def test_a_subclass_is_sampled_as_it_is(method):
    net = network(SUBCLASSES[method])
    assert_sampled_as_it_is(sampler_of(net), net, f"because it is a {type(net).__name__}, not a UNet2D")


@pytest.mark.parametrize("name", CLASSES)
def test_a_replaced_method_of_a_class_counts(name, monkeypatch):
    net, method = network(), name.rpartition(".")[2]
    sampler = sampler_of(net)
    before = sampled(sampler)
    monkeypatch.setattr(CLASSES[name], method, halving(getattr(CLASSES[name], method)))
    assert_sampled_as_it_is(sampler, net, f"because {name} was replaced")
    monkeypatch.undo()
    assert torch.equal(sampled(sampler), before)


def test_hooks_of_all_modules_count():
    net = network()
    sampler = sampler_of(net)
    handle = register_module_forward_hook(lambda module, args, y: 0.5 * y if isinstance(module, nn.Conv2d) else None)
    try:
        assert_sampled_as_it_is(sampler, net, "because torch has global module hooks")
    finally:
        handle.remove()


def test_a_network_is_fused_again_when_a_change_is_undone():
    net = network()
    sampler = sampler_of(net)
    fused = sampled(sampler)
    handle = net.conv_in.register_forward_hook(lambda module, args, y: 0.5 * y)
    assert_sampled_as_it_is(sampler, net, "conv_in has hooks")
    handle.remove()
    assert torch.equal(sampled(sampler), fused)
    handle = net.register_forward_hook(lambda module, args, y: 0.5 * y)
    assert_sampled_as_it_is(sampler, net, "it has hooks")


def test_one_hook_in_place_of_another_counts():
    net = network()
    sampler = sampler_of(net)
    handle = net.register_forward_hook(lambda module, args, y: 0.5 * y)
    assert_sampled_as_it_is(sampler, net, "it has hooks")
    handle.remove()
    net.register_forward_hook(lambda module, args, y: 0.25 * y)
    assert torch.equal(sampled(sampler), own_loop(net))


def tied(change):
    return lambda net: change(*net.mid_block.resnets)


FUSED = {  # changes that leave a network what its configuration and its parameters say
    "other weights": lambda net: net.conv_in.weight.data.mul_(2),
    "tied weights": tied(lambda first, second: setattr(second.conv2, "weight", first.conv2.weight)),
    "shared part": tied(lambda first, second: setattr(second, "conv2", first.conv2)),
    "shared block": lambda net: net.mid_block.resnets.__setitem__(1, net.mid_block.resnets[0]),
    "shared attention": lambda net: net.up_blocks[0].attentions.__setitem__(1, net.up_blocks[0].attentions[0]),
    "pruned for good": lambda net: prune.remove(prune.ln_structured(net.conv_in, "weight", 0.5, 2, 0), "weight"),
    "frozen": lambda net: net.requires_grad_(False),
    "contiguous": lambda net: net.to(memory_format=torch.contiguous_format),
    "training mode": lambda net: net.train(),
    "attributes of one's own": lambda net: setattr(net, "note", object()),
    "backward hook": lambda net: net.conv_in.register_full_backward_hook(lambda *args: None),
    "hook of state_dict": lambda net: net.register_state_dict_post_hook(lambda *args: None),
    "configuration": lambda net: net.config.update(flip_sin_to_cos=False),
}


@pytest.mark.parametrize("change", FUSED)
def test_a_network_that_is_still_as_configured_is_fused(change):
    net = network(dropout=0.5)
    FUSED[change](net)
    assert network_obstacles(net) == {}
    assert_as_accurate(
        sampled(sampler_of(net)),
        own_loop(copy.deepcopy(net)),
        own_loop(copy.deepcopy(net).double(), dtype=torch.double),
    )


@pytest.mark.parametrize("options", [{"num_class_embeds": 3}, {"class_embed_type": "timestep"}], ids=str)
def test_a_changed_class_conditional_network_gets_its_labels(options):
    net, labels = network(**options), torch.tensor([2, 0])
    net.register_forward_hook(lambda module, args, y: 0.5 * y)
    assert_sampled_as_it_is(sampler_of(net), net, "it has hooks", labels)


@pytest.mark.parametrize("classes", [2, 9])
def test_labels_are_those_of_the_embedding_that_the_network_has(classes):
    net = network(num_class_embeds=3)
    net.class_embedding = nn.Embedding(classes, net.class_embedding.embedding_dim)
    sampler = sampler_of(net)
    text = f"class_embedding.num_embeddings is {classes}, not 3"
    assert_sampled_as_it_is(sampler, net, text, torch.tensor([classes - 1, 0]))
    line = error_line(sampled, sampler, class_labels=[0, classes])
    assert line == f"class_labels are [0, {classes}]; want whole numbers, 0 <= label < {classes}, one per sample"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_changed_network_runs_under_autocast(precision):
    net = network()
    net.register_forward_hook(lambda module, args, y: 0.5 * y)
    with pytest.warns(UserWarning, match="it has hooks"):
        got = sampled(Sampler(net, SCHEDULE, device="cpu", precision=precision))
    as_function = Sampler(lambda x, t: net(x, t), SCHEDULE, shape=(1, 8, 8), device="cpu", precision=precision)
    assert torch.equal(got, sampled(as_function))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_changed_network_is_given_its_own_dtype(dtype):
    net, seen = network().to(dtype), set()
    net.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    with pytest.warns(UserWarning, match="it has hooks"):
        assert sampled(sampler_of(net)).isfinite().all()
    assert seen == {dtype}


def test_the_bound_is_that_of_the_changed_network():
    net = network()
    net.conv_out = nn.Sequential(net.conv_out, nn.Tanh())
    data = torch.randint(0, 256, (3, 8, 8, 1), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="conv_out is of the class Sequential"):
        changed = bound(sampler_of(net), data, progress=False)
    as_function = Sampler(lambda x, t: net(x, t), SCHEDULE, shape=(1, 8, 8), device="cpu")
    assert torch.equal(changed.per_image, bound(as_function, data, progress=False).per_image)


@pytest.mark.filterwarnings("ignore:this UNet2D is called as it is")
def test_a_job_of_a_changed_network_is_another_job(tmp_path):
    def job(out, change=None):
        net = network()
        if change is not None:
            CHANGES[change][0](net)
        return sample_to(tmp_path / out, sampler_of(net), 2, steps=STEPS, seed=1, format="npz", progress=False)

    job("plain")
    changed = job("scale", "scale")
    assert changed.manifest["model"]["changes"] == [f"{MID}.scale is 2.0, not 1"]
    for out, change in (("plain", "scale"), ("plain", "hook"), ("plain", "padding"), ("scale", None)):
        assert "holds samples with" in error_line(job, out, change)
    assert job("scale", "scale").manifest == changed.manifest


@pytest.mark.parametrize("change", ["weight_norm", "LoRA", "forward of a part", "eps"])
def test_a_copy_of_a_changed_network_is_changed_too(change):
    net = network()
    CHANGES[change][0](net)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sampled(sampler_of(copy.deepcopy(net)))
    assert CHANGES[change][1] in str(warned[0].message)


def test_a_changed_network_is_not_fused_by_hand():
    net = network()
    net.conv_norm_out.eps = 10.0
    assert (
        "the network cannot be fused: conv_norm_out.eps is 10.0, not 1e-05; call it as it is, or give it"
        in error_line(net.for_inference, torch.float32)
    )
