"""The fingerprint of a job changes with each weight, name and layer; `differing` reports what changed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastddpm import __version__
from fastddpm.storage import fingerprint
from fastddpm.storage.fingerprint import differing, installed, machine, weights_sha256


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
    code = "from test_fingerprint import Net, weights_sha256; print(weights_sha256(Net()))"
    message = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0]
    )
    assert message.stdout.strip() == weights_sha256(Net())


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
    assert installed("torch") == torch.__version__
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
