"""A captured network is captured again if it would read other memory or other numbers than its graph does."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastddpm import UNet2D
from fastddpm.sampling.fixed_reads import FixedReads
from fastddpm.sampling.reachable import reachable
from tests.support.check import TINY, error_line

X, T = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
LIVE = []  # keeps replaced tensors, so that a new one is at another address


class Network(nn.Module):
    """Reads tensors, numbers and functions from wherever they can be."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.plain, self.scale = torch.ones(3), 2.0
        self.register_buffer("shift", torch.arange(9.0).view(3, 3))
        self.array = np.ones(3)
        self.kept = {"list": [torch.ones(3)], "number": 3}
        self.inner = SimpleNamespace(gain=torch.ones(3), factor=np.float32(2), part=slice(0, 3), function=torch.relu)

    def forward(self, x, t):
        x = self.linear(x) * self.plain * self.scale + self.shift[0]
        x = x * self.kept["list"][0] * self.kept["number"] * self.inner.gain[self.inner.part]
        return self.inner.function(x * self.inner.factor * float(self.array[0]))


def fresh(*shape):
    LIVE.append(torch.rand(*shape))
    return LIVE[-1]


def run(network):
    """What `FixedReads` is given to call the network once."""

    def run_once(call):
        with torch.no_grad():
            call(X.clone(), T.clone())

    return run_once


def reads_of(network, device="cpu"):
    run(network)(network)
    return FixedReads(network, run(network), torch.device(device))


def transpose(buffer):
    return buffer.t()  # the same storage and shape


CHANGES = {
    "parameter": lambda net: setattr(net.linear, "weight", nn.Parameter(fresh(3, 3))),
    "data of a parameter": lambda net: setattr(net.linear.weight, "data", fresh(3, 3)),
    "module": lambda net: LIVE.append(net.linear) or setattr(net, "linear", nn.Linear(3, 3)),
    "buffer": lambda net: setattr(net, "shift", fresh(3, 3)),
    "strides": lambda net: setattr(net, "shift", transpose(net.shift)),
    "shape": lambda net: setattr(net, "shift", net.shift.view(1, 9)),
    "dtype": lambda net: setattr(net, "shift", net.shift.view(torch.int32)),
    "attribute": lambda net: setattr(net, "plain", fresh(3)),
    "item of a list": lambda net: net.kept["list"].__setitem__(0, fresh(3)),
    "item of a dict": lambda net: net.kept.__setitem__("list", [fresh(3)]),
    "attribute of an object": lambda net: setattr(net.inner, "gain", fresh(3)),
    "number": lambda net: setattr(net, "scale", 0.5),
    "number in a dict": lambda net: net.kept.__setitem__("number", 4),
    "number of numpy": lambda net: setattr(net.inner, "factor", np.float32(3)),
    "array": lambda net: setattr(net, "array", np.full(3, 2.0)),
    "value in an array": lambda net: net.array.__setitem__(0, 2.0),
    "slice": lambda net: setattr(net.inner, "part", slice(1, 2)),
    "function of torch": lambda net: setattr(net.inner, "function", torch.tanh),
    "tensor in place of a number": lambda net: setattr(net, "scale", torch.tensor(0.5)),
    "hook": lambda net: net.linear.register_forward_hook(lambda module, args, y: 0.5 * y),
    "forward": lambda net: setattr(net, "forward", lambda x, t: x),
}


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x, t: net(x, t)], ids=["module", "lambda"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_replaced_is_noticed(change, wrap):
    net = Network()
    model = wrap(net)
    reads = reads_of(model)
    assert reads.all_held
    assert reads.are_current(run(model))
    LIVE.append(net.linear.weight.data)
    CHANGES[change](net)
    assert not reads.are_current(run(model))


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_of_all_modules_is_noticed(register):
    net = Network()
    reads = reads_of(net)
    hook = getattr(nn.modules.module, register)(lambda *args: None)
    try:
        assert not reads.are_current(run(net))
    finally:
        hook.remove()
    assert reads.are_current(run(net))


def test_changes_in_place_need_no_other_graph():
    net = Network()
    reads = reads_of(net)
    with torch.no_grad():
        for x in (net.linear.weight, net.plain, net.shift, net.kept["list"][0], net.inner.gain):
            x.mul_(2)
    net.training = False
    assert reads.are_current(run(net))


def test_a_variable_of_a_closure_is_noticed():
    weight, scale = fresh(3), 2.0
    model = lambda x, t: x * weight * scale
    reads = reads_of(model)
    assert reads.are_current(run(model))
    weight = fresh(3)
    assert not reads.are_current(run(model))
    reads, scale = reads_of(model), 3.0
    assert not reads.are_current(run(model))


def test_a_number_on_the_host_is_compared_by_its_value():
    """As an argument of a launch, a graph keeps it; where it lies does not matter."""
    scale = torch.tensor(2.0)
    model = lambda x, t: x * scale
    reads = reads_of(model, device="cuda")
    LIVE.append(scale)
    scale = torch.tensor(2.0)
    assert reads.are_current(run(model))
    scale.fill_(3.0)
    assert not reads.are_current(run(model))


@pytest.mark.parametrize("hiding", ["thread", "weak"])
def test_memory_that_python_cannot_reach_is_noticed(hiding):
    """The network is then called once before each batch."""
    local, weak, key = threading.local(), WeakTensorKeyDictionary(), torch.zeros(1)

    def put(x):
        if hiding == "thread":
            local.x = x
        else:
            weak[key] = x

    put(fresh(3))
    calls = []
    model = lambda x, t: calls.append(1) or x * (local.x if hiding == "thread" else weak[key])
    reads = reads_of(model)
    assert not reads.all_held
    before = len(calls)
    assert reads.are_current(run(model))
    assert len(calls) == before + 1
    put(fresh(3))
    assert not reads.are_current(run(model))


def test_a_network_that_replaces_a_tensor_in_each_call_is_refused():
    net = Network()

    def forward(x, t):
        x = net.linear(x) * net.plain
        LIVE.append(net.plain)
        net.plain = net.plain.clone()
        return x

    message = error_line(reads_of, forward)
    assert "it reads a tensor that it replaces in each call" in message
    assert "change the tensor in place, or use engine='eager'" in message


def test_what_a_call_makes_and_counts_is_not_held():
    net = Network()
    net.calls = 0

    def forward(x, t):
        net.calls += 1
        net.last = x * torch.tensor([1.0, 2.0, 3.0]) + torch.zeros(3)  # made in the call
        return net.last

    reads = reads_of(forward)
    run(forward)(forward)
    assert reads.are_current(run(forward))


def test_sparse_tensors_are_compared():
    weight = torch.eye(3).to_sparse()
    model = lambda x, t: (weight @ x.T).T
    reads = reads_of(model)
    assert reads.are_current(run(model))
    LIVE.append(weight)
    weight = torch.eye(3).to_sparse()
    assert not reads.are_current(run(model))


def test_the_cost_of_a_large_network_is_that_of_its_attributes():
    """A comparison visits each module, tensor and plain attribute once: 1845 for the network of CIFAR-10, 10 ms."""
    net = UNet2D(**TINY)
    found = [path for path, _ in reachable(net)]
    attributes = sum(len(vars(module)) for module in net.modules())
    assert len(found) <= 1 + attributes
    assert len(found) == len(set(found))
