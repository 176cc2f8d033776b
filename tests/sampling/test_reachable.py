"""The modules of a network are found behind whatever calls them, and sample in evaluation mode."""

import functools
import threading
import warnings
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fastddpm import Sampler
from fastddpm.sampling.batches import evaluating
from fastddpm.sampling.reachable import LIMIT, modules, parameters, reachable

Pair = namedtuple("Pair", "net scale")
GLOBAL = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).requires_grad_(False)
NAMESPACE = SimpleNamespace(net=GLOBAL)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.dropout(self.linear(x))

    def predict(self, x, t):
        return self(x, t)


class Holder:
    """Calls a network that it keeps in an attribute."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x, t):
        return self.net(x, t)

    def predict(self, x, t):
        return self.net(x, t)


class Slots:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x, t):
        return self.net(x, t)


@dataclass(frozen=True)
class Data:
    net: nn.Module

    def __call__(self, x, t):
        return self.net(x, t)


class Unregistered(nn.Module):
    """A module that hides another one in a list."""

    def __init__(self, net):
        super().__init__()
        self.hidden = [net]

    def forward(self, x, t):
        return self.hidden[0](x, t)


def class_attribute(net):
    class OfClass:
        model = net

        def __call__(self, x, t):
            return self._call(x, t)

        def _call(self, x, t):
            return self.model(x, t)

        @classmethod
        def of_class(cls, x, t):
            return cls.model(x, t)

        @staticmethod
        def static(x, t):
            return OfClass.model(x, t)

    return OfClass


def by_default(net):
    def call(x, t, net=net):
        return net(x, t)

    return call


def by_keyword(net):
    def call(x, t, *, net=net):
        return net(x, t)

    return call


def by_attribute(net):
    def call(x, t):
        return call.net(x, t)

    call.net = net
    return call


def decorated(net):
    @functools.wraps(net.forward)
    def call(*args):
        return net(*args)

    return functools.lru_cache(call)


def by_inner_function(net):
    def outer(x, t):
        def inner():
            return net(x, t)

        return inner()

    return outer


def recursive(net):
    """A variable of its own closure is assigned later."""

    def call(x, t, again=True):
        return call(x, t, False) if again else net(x, t)

    return call


WRAPPERS = {
    "itself": lambda net: net,
    "lambda": lambda net: lambda x, t: net(x, t),
    "lambda in a lambda": lambda net: (lambda inner: lambda x, t: inner(x, t))(lambda x, t: net(x, t)),
    "partial": lambda net: functools.partial(net),
    "partial of a function": lambda net: functools.partial(lambda net, x, t: net(x, t), net),
    "partial by keyword": lambda net: functools.partial(lambda x, t, net: net(x, t), net=net),
    "bound method": lambda net: net.predict,
    "forward": lambda net: net.forward,
    "__call__": lambda net: net.__call__,
    "object": Holder,
    "method of an object": lambda net: Holder(net).predict,
    "slots": Slots,
    "dataclass": Data,
    "list": lambda net: (lambda nets: lambda x, t: nets[0](x, t))([net]),
    "dict": lambda net: (lambda nets: lambda x, t: nets["net"](x, t))({"net": net}),
    "ordered dict": lambda net: (lambda nets: lambda x, t: nets["net"](x, t))(OrderedDict(net=net)),
    "deque": lambda net: (lambda nets: lambda x, t: nets[0](x, t))(deque([net])),
    "named tuple": lambda net: (lambda pair: lambda x, t: pair.net(x, t) * pair.scale)(Pair(net, 1.0)),
    "namespace": lambda net: (lambda space: lambda x, t: space.net(x, t))(SimpleNamespace(net=net)),
    "weak reference": lambda net: (lambda ref: lambda x, t: ref()(x, t))(weakref.ref(net)),
    "class attribute": lambda net: class_attribute(net)(),
    "class method": lambda net: class_attribute(net).of_class,
    "static method": lambda net: class_attribute(net).static,
    "method by class attribute": lambda net: class_attribute(net)()._call,
    "default": by_default,
    "keyword default": by_keyword,
    "function attribute": by_attribute,
    "decorated": decorated,
    "inner function": by_inner_function,
    "recursive": recursive,
    "unregistered": Unregistered,
    "patched forward": lambda net: (lambda f: setattr(net, "forward", lambda x, t: f(x, t)) or net)(net.forward),
    "data parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled function": lambda net: torch.compile(lambda x, t: net(x, t), backend="eager"),
    "no_grad": lambda net: torch.no_grad()(lambda x, t: net(x, t)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_dropout_is_off_behind_any_wrapper(wrapper):
    torch.manual_seed(0)
    net = Network()
    want = Sampler(Network.eval(net), shape=(2,), device="cpu").sample(3, steps=3, progress=False)
    net.train()
    sampler = Sampler(WRAPPERS[wrapper](net), shape=(2,), device="cpu")
    for _ in range(2):
        assert torch.equal(sampler.sample(3, steps=3, progress=False), want)
        assert net.training
        assert net.dropout.training


@pytest.mark.parametrize(
    "model",
    [lambda x, t: GLOBAL(x), lambda x, t: NAMESPACE.net(x), functools.partial(lambda x, t: GLOBAL[0](GLOBAL(x)))],
    ids=["global", "attribute of a global", "partial"],
)
def test_dropout_of_a_global_network_is_off(model):
    with evaluating(model):
        assert not GLOBAL[1].training
    assert GLOBAL[1].training


OTHER = Network()  # of the script, not of the networks that are sampled


def call_by_another_name(x, t):
    other = package.inner  # noqa: F821
    return other.net(x, t)


@pytest.mark.parametrize("kind", ["another name", "attribute of the same name", "attribute of a module", "global"])
def test_a_function_reaches_the_globals_that_it_reads_alone(kind, monkeypatch):
    module = ModuleType("package.inner")
    module.net = Network()
    monkeypatch.setitem(globals(), "package", ModuleType("package"))
    package.inner = module  # noqa: F821
    monkeypatch.setitem(globals(), "net", OTHER)
    holder = Holder(Network())
    model, want = {
        "another name": (call_by_another_name, module.net),
        "attribute of the same name": (holder, holder.net),
        "attribute of a module": (lambda x, t: package.inner.net(x, t), module.net),  # noqa: F821
        "global": (lambda x, t: OTHER(x, t), OTHER),
    }[kind]
    assert [thing for _, thing in reachable(model) if type(thing) is Network] == [want]


def hidden(net):
    """A function whose network Python cannot be seen to reach."""
    local = threading.local()
    local.net = net
    return lambda x, t: local.net(x, t)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("warned", [True, False])
def test_dropout_that_stays_on_is_told_once_per_batch(engine, warned, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    net = Network().train(warned)
    sampler = Sampler(hidden(net), shape=(2,), device="cpu", engine=engine)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sampler.sample(4, batch_size=2, steps=3, progress=False)
    assert ["if it was for dropout, call eval()" in str(warning.message) for warning in told] == [True] * 2 * warned


def test_modes_are_restored_although_a_module_refuses_them():
    class Frozen(nn.Linear):
        def __setattr__(self, name, value):
            if name == "training" and "weight" in self._parameters:
                raise RuntimeError("frozen")
            super().__setattr__(name, value)

    net, frozen = Network(), Frozen(2, 2)
    with pytest.raises(RuntimeError, match="frozen"), evaluating([net, frozen]):
        pass
    with evaluating(net):
        assert not net.training
    assert net.training


def test_a_frozen_script_has_no_mode():
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()))
    with evaluating(script):
        script(torch.ones(1, 2))


def test_the_walk_runs_no_code_of_the_user():
    class Lazy(dict):
        def items(self):
            raise RuntimeError("loads everything")

    class Strict:
        def __getattribute__(self, name):
            if name in ("__dict__", "held"):
                raise RuntimeError(name)
            return super().__getattribute__(name)

        def __call__(self, x, t):
            return x

    net, strict = Network(), Strict()
    object.__setattr__(strict, "held", Lazy(net=net))
    assert net in [thing for _, thing in reachable(strict)]


def test_equal_modules_have_their_own_modes():
    class Equal(nn.Linear):
        def __eq__(self, other):
            return isinstance(other, Equal)

        def __hash__(self):
            return 0

    both = [Equal(2, 2), Equal(2, 2).eval()]
    with evaluating(both):
        assert [module.training for module in both] == [False, False]
    assert [module.training for module in both] == [True, False]


def test_modes_are_restored_part_by_part():
    net = Network()
    net.linear.eval()
    with evaluating(lambda x, t: net(x, t)):
        assert not any(part.training for part in net.modules())
        with evaluating(net):
            pass
        assert not net.dropout.training
    assert [part.training for part in net.modules()] == [True, False, True]


def test_parameters_have_names_and_modules_come_once():
    net = Network()
    both = lambda x, t: net(x, t) + holder(x, t)
    holder = Holder(net)
    assert len(modules(both)) == 3
    assert set(parameters(both)) == {"net.linear.weight", "net.linear.bias"}
    assert set(parameters(net)) == {"linear.weight", "linear.bias"}


def test_the_walk_ends():
    """With cycles, endless data and objects of all kinds."""
    cycle: dict = {"lock": threading.Lock(), "type": int, "module": functools, "text": "x" * 1000}
    cycle["self"] = [cycle]
    data = [[i] for i in range(20 * LIMIT)]
    net = Network()
    found = [thing for _, thing in reachable(lambda x, t: (cycle, data, net))]
    assert net in found
    assert net.dropout in found


def test_functions_of_installed_libraries_are_not_searched():
    """They lead to thousands of objects that hold nothing of the user's; replaced methods are found all the same."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = diffusers.UNet2DModel(block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2, **blocks)
    paths = dict(reachable(net))
    assert paths["class", "save_pretrained"] is diffusers.UNet2DModel.save_pretrained
    assert len(paths) < 2000  # of 8,500
