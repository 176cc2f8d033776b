"""Parameters are copied into a network that they fit; otherwise the error lists what does not."""

import pytest
import torch
from torch import nn

from fastddpm import checkpoints
from tests.support import check


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).requires_grad_(False)


def test_load_into_keeps_dtype_and_memory_format():
    module = nn.Conv2d(4, 8, 3, dtype=torch.float16).to(memory_format=torch.channels_last)
    state = {"weight": torch.randn(8, 4, 3, 3), "bias": torch.randn(8)}
    checkpoints.load_into(module, state)
    assert torch.equal(module.weight, state["weight"].half())
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_load_into_takes_a_network_and_parameters():
    line = "load_into: the arguments are {} and {}; want a network and its parameters by name"
    assert check.error_line(checkpoints.load_into, 0, {}) == line.format("int", "dict")
    assert check.error_line(checkpoints.load_into, pair(), [1]) == line.format("Sequential", "list")


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"0.weight": None}, "1 missing (0.weight)"),
        ({"2.bias": (2,), "3.bias": (2,)}, "2 unexpected (2.bias, 3.bias)"),
        ({"0.weight": (3, 2)}, "1 of the wrong shape (0.weight (3, 2) instead of (2, 3))"),
        ({"1.bias": ()}, "1 of the wrong shape (1.bias () instead of (2,))"),
        (
            {"0.weight": None, "2.bias": (1,), "1.bias": (3,)},
            "1 missing (0.weight), 1 unexpected (2.bias), 1 of the wrong shape (1.bias (3,) instead of (2,))",
        ),
        (
            dict.fromkeys(["0.weight", "0.bias", "1.weight", "1.bias"]),
            "4 missing (0.bias, 0.weight, 1.bias, ...)",
        ),
    ],
)
def test_load_into_lists_parameters_that_do_not_fit(changes, want):
    module = pair()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    for name, shape in changes.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    text = check.error_line(checkpoints.load_into, module, state)
    assert text == f"the parameters do not fit the network: {want}; build it from the config they were saved with"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
