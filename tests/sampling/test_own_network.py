"""A user's own network: in which dtype and memory it is handed x, and what it may return."""

import copy
import functools
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from fastddpm import Sampler, UNet2D
from fastddpm.evaluate.likelihood import bound
from tests.support.check import TINY, error_line

SHAPE, SETTINGS = (3, 4, 4), {"steps": 3, "progress": False}
HALVES = (torch.bfloat16, torch.float16)


class Network(nn.Module):
    """Views x as rows, as networks do that were written for ordinary memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.seen = nn.Linear(48, 48), []

    def forward(self, x, t):
        self.seen.append((x.dtype, x.is_contiguous()))
        return self.linear(x.view(len(x), -1)).view_as(x)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 3, 3, padding=1), []

    def forward(self, x, t):
        self.seen.append(x.is_contiguous())
        return self.conv(x)


def sampler_of(model, **options):
    return Sampler(model, **{"shape": SHAPE, "device": "cpu", **options})


def sampled(model, **options):
    return sampler_of(model, **options).sample(2, **SETTINGS)


WRAPPERS = {"module": lambda net: net, "lambda": lambda net: lambda x, t: net(x, t), "partial": functools.partial}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_x_has_the_dtype_of_the_network(dtype, wrap):
    net = Network().to(dtype)
    sampler = sampler_of(WRAPPERS[wrap](net))
    x = sampler.sample(2, **SETTINGS)
    assert sampler.dtype == dtype
    assert set(net.seen) == {(dtype, True)}
    assert x.dtype == torch.float32
    assert (x - sampled(Network())).abs().max() <= 16 * torch.finfo(dtype if dtype in HALVES else torch.float32).eps


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.bfloat16), ("fp32", torch.float64), ("bf16", torch.float64)]
)
def test_another_precision_than_the_networks_says_the_way_out(precision, dtype):
    message = error_line(sampled, Network().to(dtype), precision=precision)
    assert f"x is torch.float32, but the network's parameters are {dtype} (" in message
    assert "give them one dtype, as by network.float(), and make a new Sampler without a precision" in message


def test_parameters_of_several_dtypes_say_the_way_out():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    message = error_line(sampled, lambda x, t: net(x), shape=(4,))
    assert "x is torch.float32, but the network's parameters are torch.float32, torch.float64 (" in message


def test_other_errors_of_a_network_are_its_own():
    def model(x, t):
        raise RuntimeError("the wrong type of weather")

    with pytest.raises(RuntimeError, match=r"^the wrong type of weather$"):
        sampled(model)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_is_contiguous_unless_the_network_was_converted(memory_format):
    net = Convolution().to(memory_format=memory_format)
    sampler, states = sampler_of(net), []
    keep = lambda step, t, x_0, indices, x_t: states.extend([x_0, x_t])
    x = sampler.sample(2, callback=keep, **SETTINGS)
    assert set(net.seen) == {memory_format is torch.contiguous_format}
    batches = [batch for _, batch in sampler.batches(3, batch_size=2, **SETTINGS)]
    assert all(part.is_contiguous() for part in [x, *states, *batches])
    fixed = sampler_of(net, batch_invariant=2).sample([1, 4, 3], **SETTINGS)
    assert fixed.is_contiguous()
    net.seen.clear()
    net.to(memory_format=torch.channels_last)  # after it was sampled
    sampler.sample(2, **SETTINGS)
    assert set(net.seen) == {False}


RETURNS = {
    "object": lambda y: SimpleNamespace(sample=y),
    "output of diffusers": lambda y: UNet2DOutput(sample=y),
    "tuple": lambda y: (y, None),
    "list": lambda y: [y],
    "permuted": lambda y: y.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "float64": lambda y: y.double(),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_a_network_may_return_more_than_a_tensor(kind):
    net = Network()
    model = lambda x, t: RETURNS[kind](net(x, t))
    assert torch.equal(sampled(model), sampled(net))
    data = torch.rand(2, *SHAPE)
    assert torch.equal(*(bound(sampler_of(m), data, terms=2, progress=False).per_image for m in (model, net)))


def test_networks_of_diffusers_need_no_lambda():
    torch.manual_seed(0)
    options = {key: value for key, value in TINY.items() if key != "sample_size"}
    net = diffusers.UNet2DModel(**options, dropout=0.5).train()
    want = sampled(lambda x, t: net.eval()(x, t).sample, shape=(3, 8, 8))
    net.train()
    assert torch.equal(sampled(net, shape=(3, 8, 8)), want)
    assert net.training
    net = diffusers.UNet1DModel(block_out_channels=(32, 32, 64), extra_in_channels=64, in_channels=2, out_channels=2)
    assert sampled(net, shape=(2, 64)).isfinite().all()


def broken(net, value=math.nan):
    with torch.no_grad():
        next(net.parameters())[0, 0] = value
    return net


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_are_not_finite_are_named(precision, value):
    for net, name in ((Network(), "linear.weight"), (UNet2D(**TINY), "conv_in.weight")):
        net = broken(copy.deepcopy(net), value)
        message = error_line(sampled, net, precision=precision, shape=SHAPE if name[0] == "l" else (3, 16, 16))
        assert "step 1 of 3 (t = 666): the network returned NaN or infinity for samples [0, 1]; " in message
        assert message.endswith(f"its parameter {name} is not finite, so use another checkpoint")
        if precision == "fp32" and math.isnan(value):  # an infinite x_0 would be clipped
            data = torch.zeros(1, *(SHAPE if name[0] == "l" else (3, 16, 16)))
            sampler = sampler_of(net, precision=precision, shape=data.shape[1:])
            assert f"its parameter {name} is not finite" in error_line(bound, sampler, data, terms=1, progress=False)


def test_the_way_out_of_nan_depends_on_the_precision():
    net = Network()
    nan = lambda x, t: net(x, t) * math.nan
    assert error_line(sampled, nan).endswith("so look into the network itself, or try another checkpoint")
    assert error_line(sampled, nan, precision="bf16").endswith("try precision fp32, or another checkpoint")
    net.bfloat16()
    assert error_line(sampled, nan).endswith("try the network in float32, or another checkpoint")
