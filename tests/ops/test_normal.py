"""`ops.normal` of every backend: the bits of `core.noise`."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import ops
from fastddpm.core import noise
from tests.support.bits import assert_same_bits
from tests.support.draws import POSITIONS, addresses

SHAPES = [(1, 1, 1, 1), (2, 3, 32, 32), (3, 5, 7, 11), (4, 3, 50), (1, 1024), (1, 1023), (1, 1025), (1, 4, 257), (1, 2)]


@pytest.mark.parametrize("stream", [noise.STEP, noise.START, 255])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normals_equal_specification(shape, stream, device, guards):
    address, t = addresses(shape[0]), torch.tensor(POSITIONS[: shape[0]]) + 2**31
    want = noise.normal(address, shape[1:], stream=stream, t=t)
    got = ops.normal(address.to(device), shape[1:], stream=stream, t=t.to(device))
    assert_same_bits(got, want)
    guards.check()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_empty_shapes_give_empty_results(shape, device):
    address, t = noise.address(0, shape[0], device), torch.zeros(shape[0], dtype=torch.int64, device=device)
    assert ops.normal(address, shape[1:], stream=0, t=t).shape == shape


BAD = [
    ({"address": None}, r"address is NoneType .*; want a tensor"),
    ({"address": torch.zeros(2, 2)}, r"address is \(2, 2\) torch.float32 on cpu; want \(2, 2\) torch.int64"),
    ({"address": torch.tensor(3)}, r"address is \(\) torch.int64 on cpu; want \(0, 2\)"),
    ({"shape": ()}, r"shape \(\); want .* the shape of a sample"),
    ({"shape": (1 << 20, 1 << 20)}, r"of at most 67107840 elements"),
    ({"t": 5}, r"t is int; want \(2,\) torch.int64 on cpu"),
    ({"t": torch.zeros(1, dtype=torch.int64)}, r"t is \(1,\) torch.int64 on cpu; want \(2,\)"),
    ({"stream": 256}, r"stream is 256; want a whole number, 0 to 255"),
    ({"stream": None}, r"stream is None"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=str)
def test_invalid_arguments(change, message):
    arguments = {"address": addresses(2), "shape": (3, 4), "stream": 0, "t": torch.zeros(2, dtype=torch.int64)}
    arguments |= change
    with pytest.raises(ValueError, match="^normal: .*" + message):
        ops.normal(arguments["address"], arguments["shape"], stream=arguments["stream"], t=arguments["t"])


@pytest.mark.slow
def test_normal_passes_opcheck(device):
    arguments = addresses(2).to(device), (3, 4, 5), 1, torch.tensor([7, 8], device=device)
    torch.library.opcheck(torch.ops.fastddpm.normal.default, arguments)


def test_normal_supports_fake_tensors():
    with FakeTensorMode():
        address, t = (torch.empty(2, *end, dtype=torch.int64, device="cuda") for end in ((2,), ()))
        z = ops.normal(address, (3, 4, 5), stream=1, t=t)
    assert (z.shape, z.device.type, z.stride()) == ((2, 3, 4, 5), "cuda", (60, 1, 15, 3))
