"""The fingerprint of a job changes with each weight, name and layer; `differing` reports what changed."""

import functools
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm import __version__
from fastddpm.storage import fingerprint
from fastddpm.storage.fingerprint import (
    code_sha256,
    differing,
    installed,
    machine,
    value_sha256,
    weights_sha256,
    weights_sums,
)
from tests.support.check import error_line
from tests.support.jobs import tiny_unet


class Net(nn.Module):
    def __init__(self, **changed):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("derived", torch.arange(6.0), persistent=False)
        self.layer = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Dropout(0.5))
        nn.init.ones_(self.layer[0].weight)
        self.layer[1].register_buffer("deep", changed.pop("deep", torch.ones(2)))
        for name, value in changed.items():
            setattr(self, name, value)

    def forward(self, x, t):
        return x


class Other(Net):
    pass


def scaled(weight):
    weight = weight.clone()
    weight[2, 3] = torch.nextafter(weight[2, 3], torch.tensor(10.0))
    return nn.Parameter(weight)


def changed_dropout():
    layer = Net().layer[1]
    layer.p = 0.25
    return layer


WEIGHT = Net().weight.detach()
CHANGED = {
    "one bit of a parameter": lambda: Net(weight=scaled(WEIGHT)),
    "the sign of a zero": lambda: Net(kept=torch.tensor([-0.0, 1, 2, 3])),
    "a buffer": lambda: Net(kept=torch.tensor([0.0, 1, 2, 4])),
    "a buffer that is not saved": lambda: Net(derived=torch.arange(1.0, 7.0)),
    "a buffer of a submodule": lambda: Net(deep=torch.zeros(2)),
    "a dtype": lambda: Net().double(),
    "a dtype of the same bytes": lambda: Net(kept=torch.arange(4.0).view(torch.int32)),
    "a shape of the same bytes": lambda: Net(weight=nn.Parameter(WEIGHT.reshape(4, 3))),
    "the class": Other,
    "a submodule": lambda: Net(layer=nn.Sequential(Net().layer[0], changed_dropout())),
    "an additional parameter": lambda: Net(more=nn.Parameter(torch.zeros(0))),
}


def test_same_network_has_the_same_fingerprint():
    """Whatever its memory layout, in training mode or not, and for any copy."""
    one, want = Net(), weights_sha256(Net())
    assert len(want) == 64
    assert set(want) <= set("0123456789abcdef")
    assert weights_sha256(one) == weights_sha256(one) == want
    assert weights_sha256(one.eval().requires_grad_(False)) == want
    one.weight.data = WEIGHT.T.contiguous().T
    assert not one.weight.is_contiguous()
    assert weights_sha256(one) == want


@pytest.mark.parametrize("what", CHANGED)
def test_any_change_changes_the_fingerprint(what):
    assert weights_sha256(CHANGED[what]()) != weights_sha256(Net())


@pytest.mark.parametrize("what", sorted(CHANGED.keys() - {"the class", "a submodule"}))
def test_any_change_of_a_tensor_changes_the_sums(what):
    assert weights_sums(CHANGED[what]()) != weights_sums(Net()) == weights_sums(Net())


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float16, torch.float64, torch.complex128]
)
def test_sums_see_one_bit_of_any_dtype(dtype):
    """Of an odd number of elements in any layout, and where values are not finite."""
    net = nn.Module()
    value = torch.ones(5, 3, device="cpu").to(dtype)
    net.register_buffer("value", value.t())
    before = weights_sums(net)
    value.view(torch.uint8).view(-1)[7] ^= 1
    assert weights_sums(net) != before
    if dtype.is_floating_point:
        net.value.fill_(math.nan)
        assert weights_sums(net) == weights_sums(net) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_see_every_bit(dtype):
    net = nn.Module()
    net.register_buffer("value", torch.ones(8, 8, dtype=dtype, device="cpu"))
    before, content = weights_sums(net), net.value.view(torch.uint8).view(-1)
    for place in range(len(content)):
        for bit in range(8):
            content[place] ^= 1 << bit
            assert weights_sums(net) != before
            content[place] ^= 1 << bit
    net.value.neg_()
    assert weights_sums(net) != before


@pytest.mark.parametrize("shape", [(6,), (4, 8)], ids=str)
def test_sums_see_values_that_change_places(shape):
    net = nn.Module()
    net.register_buffer("value", torch.randn(shape, dtype=torch.float32, device="cpu"))
    before = weights_sums(net)
    net.value.copy_(net.value.flip(0))
    assert weights_sums(net) != before


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 64])
def test_sums_of_tensors_anywhere_in_memory(offset, count):
    """A parameter may be a part of a larger tensor; only its own bits count."""
    whole = torch.zeros(100, dtype=torch.bfloat16, device="cpu")
    net = nn.Module()
    net.register_buffer("value", whole[offset : offset + count])
    before = weights_sums(net)
    for place in range(len(whole)):
        whole[place] = 1
        assert (weights_sums(net) == before) == (not offset <= place < offset + count)
        whole[place] = 0


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.ones(2, device="meta"),
        lambda: nn.UninitializedBuffer(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "meta", "not initialised", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_values_are_refused(made):
    net = nn.Module()
    net.register_buffer("value", made())
    for function in (weights_sha256, weights_sums):
        assert "want ordinary tensors, which tell whether a job is the same" in error_line(function, net)


def factor(value):
    return lambda module, inputs, output: value * output


class Caller:
    def __call__(self, module, inputs, output):
        return output


class Callee(Caller):
    def __call__(self, module, inputs, output):
        return 2 * output


SCALE = 2.0


def scaled_output(module, inputs, output):
    return SCALE * helped(output)


def helped(output):
    return output + 1


def forward_twice(self, x, t):
    return 2 * x


def hooked(hook):
    net = Net()
    net.register_forward_hook(hook)
    return net


def patched(net, name, value):
    setattr(net, name, value)
    return net


def subclassed(**methods):
    net = Net()
    net.__class__ = type("Other", (Net,), methods)
    return net


class Scaling:
    """A hook with a setting."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, module, inputs, output):
        return self.factor * output

    def method(self, module, inputs, output):
        return self.factor * output


class Activation(nn.Module):
    """A network of a class of fastddpm's user, whose repr does not show its setting."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.net = factor, Net()


def with_namespace(factor):
    space = types.SimpleNamespace(factor=factor)
    return hooked(lambda module, inputs, output: space.factor * output)


CODES = {
    "plain": Net,
    "a hook": lambda: hooked(factor(2.0)),
    "a hook with another constant": lambda: hooked(factor(3.0)),
    "a hook with a tensor": lambda: hooked(factor(torch.ones(2))),
    "a hook with another tensor": lambda: hooked(factor(torch.zeros(2))),
    "a hook with a network": lambda: hooked(factor(Net().layer)),
    "a hook with an array": lambda: hooked(factor(np.ones(2))),
    "a callable object": lambda: hooked(Caller()),
    "another callable object": lambda: hooked(Callee()),
    "a partial": lambda: hooked(functools.partial(factor(2.0), more=1)),
    "another partial": lambda: hooked(functools.partial(factor(2.0), more=2)),
    "globals": lambda: hooked(scaled_output),
    "an object with a number": lambda: hooked(Scaling(2.0)),
    "an object with another number": lambda: hooked(Scaling(3.0)),
    "a method of an object": lambda: hooked(Scaling(2.0).method),
    "a method of an object with another number": lambda: hooked(Scaling(3.0).method),
    "a namespace": lambda: with_namespace(2.0),
    "another namespace": lambda: with_namespace(3.0),
    "a function of torch": lambda: patched(Net(), "act", functools.partial(nn.functional.leaky_relu, negative_slope=1)),
    "another number for it": lambda: patched(
        Net(), "act", functools.partial(nn.functional.leaky_relu, negative_slope=2)
    ),
    "an object in a part": lambda: patched(Net(), "activation", Scaling(2.0)),
    "another object in a part": lambda: patched(Net(), "activation", Scaling(3.0)),
    "an object with a number of numpy": lambda: hooked(Scaling(np.float32(2))),
    "an object with another number of numpy": lambda: hooked(Scaling(np.float32(3))),
    "a patched method": lambda: patched(Net(), "forward", types.MethodType(forward_twice, Net())),
    "a patched function": lambda: patched(Net(), "activation", factor(2.0)),
    "a subclass": lambda: subclassed(forward=forward_twice),
    "another subclass": lambda: subclassed(forward=lambda self, x, t: 3 * x),
    "a property": lambda: subclassed(scale=property(lambda self: 2)),
    "a decorated method": lambda: subclassed(forward=torch.no_grad()(lambda self, x, t: 5 * x)),
}


def test_code_changes_the_fingerprint():
    """Each of these networks computes something else, with the same weights."""
    found = {what: str(code_sha256(make())) for what, make in CODES.items()}
    assert len(set(found.values())) == len(found), found
    assert found == {what: str(code_sha256(make())) for what, make in CODES.items()}


def test_code_that_is_called_by_name_counts(monkeypatch):
    before = code_sha256(hooked(scaled_output))
    with monkeypatch.context() as changed:
        changed.setitem(globals(), "SCALE", 3.0)
        assert code_sha256(hooked(scaled_output)) != before
    with monkeypatch.context() as changed:
        changed.setitem(globals(), "helped", lambda output: output - 1)
        assert code_sha256(hooked(scaled_output)) != before
    assert code_sha256(hooked(scaled_output)) == before


def test_code_of_fastddpm_and_torch_does_not_count(monkeypatch):
    """Their versions are in the manifest. But what was put in its place does."""
    net = tiny_unet()
    assert code_sha256(net) == code_sha256(nn.Sequential(nn.Linear(1, 1), nn.SiLU())) == {}
    monkeypatch.setattr(type(net.conv_in), "forward", forward_twice)
    (name,) = code_sha256(net)
    assert name == type(net.conv_in).__qualname__


def test_methods_that_libraries_add_to_every_module_do_not_count(monkeypatch):
    """As transformers adds smart_apply when it makes a model. But a replaced call does."""
    net = tiny_unet()
    monkeypatch.setattr(nn.Module, "smart_apply", forward_twice, raising=False)
    assert code_sha256(net) == {}
    monkeypatch.setattr(nn.Module, "__call__", forward_twice)
    assert code_sha256(net).keys() == {"Module"}


def test_code_that_refers_to_itself():
    net = Net()
    hook = lambda module, inputs, output: hook and net and output
    net.register_forward_hook(hook)
    assert code_sha256(net).keys() == {"Net", "hooks"}


def test_running_does_not_change_the_code():
    """Python specialises the code of functions that run often."""
    net, hook = Net(), factor(2.0)
    net.register_forward_hook(hook)
    before = code_sha256(net)
    for _ in range(1000):
        net(torch.zeros(1), None)
    assert code_sha256(net) == before


def test_numbers_of_modules_count_where_that_is_asked_for():
    """A network of the user's own may count its calls."""
    one, other = Activation(2.0), Activation(3.0)
    assert code_sha256(one) == code_sha256(other)
    assert code_sha256(one, numbers=True) != code_sha256(other, numbers=True)


class Attributes(dict):
    """A configuration, as many projects have it."""

    def __getattr__(self, name):
        return self[name]


class Strict(Scaling):
    def __getattribute__(self, name):
        if name != "__class__":
            raise RuntimeError(name)
        return Strict


def test_the_users_own_attributes_are_not_asked_for():
    net = Net()
    before = code_sha256(net)
    net.config, net.layer.config = Attributes(path="here"), Attributes()
    assert code_sha256(net) == before
    net.strict = Strict.__new__(Strict)
    assert code_sha256(net).keys() == {"Net", "strict"}


def test_the_version_of_an_installed_package_counts(monkeypatch):
    """Its code may hold what differs between processes, as diffusers' session has a number."""
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    before = code_sha256(net)
    assert before.keys() == {"diffusers"}
    monkeypatch.setattr(diffusers.utils.hub_utils, "SESSION_ID", "another")
    net.register_to_config(_name_or_path="elsewhere")
    assert code_sha256(net) == before
    monkeypatch.setattr(fingerprint, "installed", lambda package: f"another {package}")
    assert code_sha256(net) != before


def test_training_mode_and_records_do_not_change_the_code():
    net, hook = Net(), Scaling(2.0)
    net.register_forward_hook(hook)
    before = code_sha256(net)
    hook.seen, net.seen, net.output = [torch.ones(2)], [1.0], torch.ones(2)
    assert code_sha256(net.eval()) == before


def test_names_change_the_fingerprint():
    same = torch.ones(2)
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", same)
    other.register_buffer("b", same)
    assert weights_sha256(one) != weights_sha256(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_all_dtypes(dtype):
    """Tested with tensors without dimensions."""

    def net(value):
        made = nn.Module()
        made.register_buffer("value", torch.tensor(value).to(dtype))
        return made

    assert weights_sha256(net(1)) == weights_sha256(net(1)) != weights_sha256(net(0))


class Printed(nn.Module):
    """Its repr shows an address in memory."""

    def __init__(self):
        super().__init__()
        self.held = object()

    def extra_repr(self):
        return f"{self.held}, size=3"


def test_addresses_in_a_repr_do_not_count():
    one, other = Printed(), Printed()
    assert repr(one) != repr(other)
    assert weights_sha256(one) == weights_sha256(other)
    other.extra_repr = lambda: f"{one.held}, size=4"
    assert weights_sha256(one) != weights_sha256(other)


def test_other_processes_find_the_same_fingerprint():
    code = (
        "from tests.storage.test_fingerprint import *; print(weights_sha256(Net()), code_sha256(hooked(scaled_output)))"
    )
    root = __file__.rpartition("/tests/")[0]
    message = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert message.stdout.strip() == f"{weights_sha256(Net())} {code_sha256(hooked(scaled_output))}"


def test_machine_names_the_device_and_the_versions(monkeypatch):
    cpu = machine(torch.device("cpu"))
    assert cpu == {
        "device": f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"fastddpm": __version__, "torch": torch.__version__},
    }
    assert type(cpu["versions"]["torch"]) is str  # torch's own type has another repr
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(fingerprint, "installed", lambda package: f"{package} 3")
    assert machine(torch.device("cuda", 1)) == {
        "device": "GPU 1",
        "versions": {"fastddpm": __version__, "torch": torch.__version__, "triton": "triton 3"},
    }


def test_installed():
    assert torch.__version__.startswith(installed("torch"))  # whose metadata may leave out "+cu130"
    assert installed("there-is-no-such-package") is None


@pytest.mark.parametrize(
    ("before", "now", "want"),
    [
        ({}, {}, {}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {}),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, {"b": 2}),
        ({"a": 1}, {}, {"a": 1}),
        ({}, {"a": 1}, {"a": None}),
        ({"a": None}, {}, {}),
        ({"a": [1, 2]}, {"a": [1, 3]}, {"a": [1, 2]}),
        ({"a": {"b": 1, "c": {"d": 1, "e": 2}}}, {"a": {"b": 1, "c": {"d": 1, "e": 3}}}, {"a": {"c": {"e": 2}}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": 2}}),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, {"a": {"c": None}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": {"b": 1}}),
        ({"a": None}, {"a": {"b": 1}}, {"a": None}),
        ({"a": 0}, {"a": {"b": 1}}, {"a": 0}),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, {"z": 1, "a": 1}),
    ],
    ids=str,
)
def test_differing_fields(before, now, want):
    unchanged = str((before, now))
    got = differing(before, now)
    assert got == want
    assert list(got) == list(want)  # in the order of `before`
    assert str((before, now)) == unchanged


MEASURED, SETTINGS = torch.zeros(3), {"scale": [1.0, 2.0]}


def fits(x_0, t):
    return x_0 + MEASURED * SETTINGS["scale"][0]


class Towards:
    def __init__(self, target):
        self.target, self.weights = target, [1, 2]

    def __call__(self, x_0, t):
        return x_0 + self.target


def test_digest_of_a_function_depends_on_the_data_it_reads(monkeypatch):
    before = value_sha256(fits)
    assert value_sha256(fits) == before
    for name, other in (("MEASURED", torch.ones(3)), ("SETTINGS", {"scale": [1.0, 3.0]})):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, other)
            assert value_sha256(fits) != before


def test_digest_of_an_object_depends_on_what_it_holds():
    one, same, other = Towards(torch.zeros(2)), Towards(torch.zeros(2)), Towards(torch.ones(2))
    assert value_sha256(one) == value_sha256(same) != value_sha256(other)
    same.weights.append(3)
    assert value_sha256(one) != value_sha256(same)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([[1, 2], [3]], [[1], [2, 3]]),
        ({"y": torch.zeros(2)}, {"y": torch.zeros(2, 1)}),
        ({"y": torch.zeros(2)}, {"z": torch.zeros(2)}),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0])),
        (1, 1.0),
        (True, 1),
    ],
)
def test_digest_of_values_tells_them_apart(one, other):
    assert value_sha256(one) != value_sha256(other)
