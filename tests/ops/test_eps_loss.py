"""`ops.eps_loss` in torch, in the Triton interpreter and on a GPU: it and its gradient have the reference's bits."""

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from fastddpm.reference.diffusion import Diffusion, squared_error, target, tree_sum
from tests.support.bits import same_bits
from tests.support.check import assert_as_accurate, error_line
from tests.support.draws import numpy_warns
from tests.support.losses import NOISING_TABLE, SHAPES, inputs, normal_tensor


def wanted(m, x_0, t, address, table, predicts="epsilon", stream=noise.TRAIN, dtype=torch.float32):
    """The target of m, computed in dtype from float32 draws."""
    value = (x_0.float() - 127.5) * (2 / 255) if x_0.dtype == torch.uint8 else x_0
    eps = noise.normal(address, m.shape[1:], stream=stream, t=t if stream == noise.LIKELIHOOD else 0)
    return target(value.to(dtype), eps.to(dtype), table[t], predicts)


def run(device, m, *others, **options):
    m = m.to(device, copy=True).requires_grad_(True)
    return m, ops.eps_loss(m, *(a.to(device) for a in others), **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tree_sum_adds_neighbours_first(shape):
    x = normal_tensor(shape, 0) + 3
    elements = x.movedim(1, -1).flatten(1).tolist()
    want = []
    for sample in elements:
        leaves = torch.tensor(sample + [0.0] * ((1 << (len(sample) - 1).bit_length()) - len(sample)))
        while len(leaves) > 1:
            leaves = torch.stack([leaves[i] + leaves[i + 1] for i in range(0, len(leaves), 2)])
        want.append(leaves[0])
    assert torch.equal(tree_sum(x), torch.stack(want))
    assert_as_accurate(tree_sum(x), x.flatten(1).sum(1), x.double().flatten(1).sum(1))


def test_tree_sum_of_empty_input():
    assert tree_sum(torch.empty(2, 0, 3)).tolist() == [0, 0]
    assert tree_sum(torch.empty(0, 4)).shape == (0,)


@pytest.mark.parametrize("stream", [noise.TRAIN, noise.LIKELIHOOD])
@pytest.mark.parametrize("predicts", ops.PREDICTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_equal_specification(shape, predicts, stream, device):
    for m_dtype, x_dtype in product(ops.FLOATS, (torch.uint8, torch.float32)):
        arguments = inputs(shape, m_dtype, x_dtype)
        target_of_m = wanted(*arguments, predicts, stream)
        m, loss = run(device, *arguments, predicts=predicts, stream=stream)
        assert same_bits(loss, squared_error(arguments[0], target_of_m))
        weights = normal_tensor((shape[0], 1), 3)[:, 0].clone()
        loss.backward(weights.to(device))
        scale = (2 * weights).view(-1, *[1] * (len(shape) - 1))
        assert same_bits(m.grad, (scale * (arguments[0].float() - target_of_m)).to(m_dtype))
        assert layout.is_channels_last(m.grad)


@pytest.mark.parametrize("predicts", ops.PREDICTIONS)
@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_gradient_is_as_accurate_as_torch(dtype, predicts, device):
    arguments = inputs((3, 5, 7, 11), dtype)
    m, loss = run(device, *arguments, predicts=predicts)
    (loss.sum() / m.numel()).backward()
    plain, exact = arguments[0].clone().requires_grad_(), arguments[0].double().requires_grad_()
    F.mse_loss(plain.float(), wanted(*arguments, predicts)).backward()
    F.mse_loss(exact, wanted(*arguments, predicts, dtype=torch.float64)).backward()
    assert_as_accurate(m.grad.cpu(), plain.grad, exact.grad)


@pytest.mark.parametrize("damage", [lambda g: g * 1.01, lambda g: g.roll(1, 0), lambda g: g * math.nan])
def test_a_damaged_gradient_is_detected(damage):
    arguments = inputs((3, 5, 7, 11), torch.bfloat16)
    m, loss = run("cpu", *arguments)
    loss.sum().backward()
    exact = 2 * (arguments[0].double() - wanted(*arguments, dtype=torch.float64))
    assert_as_accurate(m.grad, exact.bfloat16(), exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(damage(m.grad), exact.bfloat16(), exact)


def test_loss_equals_that_of_algorithm_1(device):
    process, (m, x_0, t, address, table) = Diffusion(Schedule().betas), inputs((4, 3, 8, 8))
    value = (x_0.double() - 127.5) / 127.5
    eps = noise.normal(address, (3, 8, 8), stream=noise.TRAIN, t=0)
    x_t = ops.noising(*(a.to(device) for a in (x_0, t, address, table)))
    network = lambda x, t: x * 0.3
    _, loss = run(device, network(x_t, t), x_0, t, address, table)
    plain = process.loss(network, value.float(), t, eps)
    assert_as_accurate((loss.sum() / m.numel()).detach().cpu(), plain, process.loss(network, value, t, eps.double()))


def test_x_0_is_not_read_for_eps_prediction(device):
    m, x_0, *others = inputs((2, 3, 8, 8), x_dtype=torch.float32)
    assert same_bits(run(device, m, x_0 * math.nan, *others)[1], run("cpu", m, x_0, *others)[1].detach())


@numpy_warns
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_loss_is_not_finite_if_m_is_not(value, device):
    m, *others = inputs((2, 3, 8, 8))
    m[1, 2, 3, 4] = value
    _, loss = run(device, m, *others)
    assert loss.isfinite().tolist() == [True, False]


def test_m_may_be_contiguous(device):
    m, *others = inputs((2, 3, 8, 8))
    want = run("cpu", m, *others)[1].detach()
    contiguous, loss = run(device, m.contiguous(), *others)
    assert same_bits(loss, want)
    loss.sum().backward()
    assert contiguous.grad.shape == m.shape


def test_empty_input_gives_zero(device):
    for shape in ((0, 3, 4, 4), (2, 0)):
        n = shape[0]
        others = torch.empty(shape), torch.zeros(n, dtype=torch.int64), noise.address(0, n), NOISING_TABLE
        m, loss = run(device, torch.empty(shape), *others)
        loss.sum().backward()
        assert loss.tolist() == [0] * n
        assert m.grad.shape == shape


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("m", lambda m: m[:1], "m is (1, 3, 8, 8) torch.float32 on cpu, but x_0 is (2, 3, 8, 8) on cpu; the"),
        (
            "m",
            lambda m: m.double(),
            "m is (2, 3, 8, 8) torch.float64 on cpu, but x_0 is (2, 3, 8, 8) on cpu; the netwo",
        ),
        ("m", lambda m: None, "m is NoneType, but x_0 is"),
        (
            "x_0",
            lambda x: x.int(),
            "x_0 is (2, 3, 8, 8) torch.int32 on cpu; want [N, C, *spatial] or [N, D] of float32",
        ),
        ("t", lambda t: t * 0 + 1000, "t is 1000; want 0 to 999, the rows of the table"),
        ("t", lambda t: t.int(), "t is (2,) torch.int32 on cpu; want (2,) torch.int64 on cpu"),
        ("address", lambda a: a[:1], "address is (1, 2) torch.int64 on cpu; want (2, 2)"),
        ("table", lambda a: a.double(), "table is (1000, 2) torch.float64 on cpu; want (1000, 2) torch.float32"),
        ("predicts", lambda _: "noise", "predicts is 'noise'; want one of epsilon, sample, v_prediction"),
        ("stream", lambda _: 0, "stream is 0; want noise.TRAIN (2) or noise.LIKELIHOOD (3)"),
    ],
)
def test_eps_loss_rejects_invalid_arguments(name, damage, message):
    arguments = dict(zip(("m", "x_0", "t", "address", "table"), inputs((2, 3, 8, 8)), strict=True))
    line = error_line(ops.eps_loss, **arguments | {name: damage(arguments.get(name))})
    assert line.startswith(f"eps_loss: {message}")


def test_second_derivatives_are_rejected():
    m, loss = run("cpu", *inputs((2, 3, 8, 8)))
    line = error_line(torch.autograd.grad, loss.sum(), m, create_graph=True)
    assert line == "eps_loss is differentiable only once; call backward() or grad() without create_graph"


def test_x_0_must_not_require_a_gradient():
    m, x_0, *others = inputs((2, 3, 8, 8), x_dtype=torch.float32)
    assert "x_0 requires a gradient, but eps_loss is not differentiable in it" in error_line(
        ops.eps_loss, m, x_0.requires_grad_(), *others
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_eps_loss_and_its_gradient(device, dynamic):
    def step(weight, x_0, t, address, table):
        x_t = ops.noising(x_0, t, address, table, dtype=torch.bfloat16)
        return ops.eps_loss(x_t * weight.bfloat16(), x_0, t, address, table, predicts="v_prediction").mean()

    others = [a.to(device) for a in inputs((2, 3, 8, 8))[1:]]
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        weight = torch.tensor(0.7, device=device, requires_grad=True)
        loss = function(weight, *others)
        loss.backward()
        grads.append((loss.detach(), weight.grad))
    assert grads[0] == grads[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by opcheck itself in torch 2.15
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
def test_eps_loss_passes_opcheck(device, predicts, dtype):
    m, *others = (a.to(device) for a in inputs((2, 3, 8, 8), dtype))
    torch.library.opcheck(torch.ops.fastddpm.eps_loss.default, (m.requires_grad_(), *others, predicts, noise.TRAIN))


MEMORIES = {
    "channels-last": layout.channels_last,
    "contiguous": torch.Tensor.contiguous,
    "every second": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda m: m[:1].expand_as(m),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 4, 4), (4, 3, 50), (2, 7)], ids=str)
@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
def test_fake_tensors_have_the_dtype_and_layout_of_real_ones(dtype, shape, memory):
    seen = []
    for mode in (None, FakeTensorMode()):
        given, *others = inputs(shape, dtype)
        m, *others = (one if mode is None else mode.from_tensor(one) for one in (memory(given), *others))
        with mode or nullcontext():
            error = ops.eps_loss(m.requires_grad_(), *others)
            # without autograd, which gives any gradient the strides of m
            with torch.no_grad():
                gradient = torch.ops.fastddpm.eps_loss_backward(error, m, *others, "epsilon", noise.TRAIN)
            results = error, gradient, *torch.autograd.grad(error.sum(), m)
            seen.append([(one.dtype, one.shape, one.stride()) for one in results])
    assert seen[0] == seen[1]
