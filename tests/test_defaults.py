"""The process's defaults, torch.set_default_dtype and torch.set_default_device, change no result."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm import Sampler, Schedule
from fastddpm.evaluate.fid import fid
from fastddpm.evaluate.likelihood import bound
from fastddpm.sampling.job import sample_to
from fastddpm.train import TrainOptions, train
from fastddpm.verify import verify
from tests.support.defaults import defaults

ROOT = Path(__file__).parents[1]
PACKAGE = [*sorted((ROOT / "fastddpm").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]

# functions of torch whose result depends on a default, and the arguments that must therefore be given
BY_VALUE = {"arange", "asarray", "as_tensor", "from_file", "randint", "randperm", "tril_indices", "triu_indices"}
FLOATS = {"empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randn"}
FLOATS |= {"scalar_tensor", "tensor", "zeros", "sparse_coo_tensor", "hann_window", "hamming_window"}


def bare(source):
    """(line, name) of each call of a factory of torch without the dtype or the device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (call := ast.unparse(node.func)).startswith("torch."):
            name, given = call.removeprefix("torch."), {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if name in BY_VALUE else {"device", "dtype"} if name in FLOATS else set()
            if not wanted <= given and None not in given:
                yield node.lineno, name


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_tensor_has_a_dtype_and_a_device(path):
    assert list(bare(path.read_text())) == []


def images(count=8, side=28):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def draw(folder):
    network = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float32, device="cpu")
    nn.init.constant_(network.weight, 0.05)
    nn.init.zeros_(network.bias)
    sampler = Sampler(lambda x, t: network(x), Schedule(num_train_timesteps=20), shape=(1, 4, 4), device="cpu")
    yield sampler.sample(3, batch_size=2, callback=lambda *seen: None, progress=False)
    yield sampler.sample([5, 7], sampler="ddim", eta=0.3, steps=5, output="uint8", progress=False)


def draw_with_the_bundled_model(folder):
    sampler = Sampler.from_pretrained(device="cpu", precision="fp32", batch_invariant=2)
    yield sampler.model.conv_in.weight.detach().clone()
    yield sampler.sample(3, steps=2, progress=False)
    sample_to(folder / "job", sampler, 3, steps=2, shard_size=2, format="npz", progress=False)
    yield from (array for path in sorted((folder / "job").glob("*.npz")) for array in np.load(path).values())


def train_a_network(folder):
    options = TrainOptions(
        steps=3, batch_size=4, channels=(8, 16), attention=(1,), groups=4, precision="fp32", sample_every=2,
        schedule=Schedule(num_train_timesteps=5),
    )  # fmt: skip
    train(images(side=8), folder / "run", options, device="cpu", progress=False)
    yield from Sampler.from_pretrained(folder / "run", device="cpu").model.state_dict().values()


def evaluate(folder):
    sampler = Sampler.from_pretrained(device="cpu", precision="fp32")
    yield bound(sampler, images(3), terms=5, progress=False).per_image
    for name, pictures in (("a", images(6)), ("b", images(12)[6:])):
        np.savez(folder / f"{name}.npz", pictures)
    result = fid(folder / "a.npz", folder / "b.npz", device="cpu", cache=False, replicates=3, progress=False)
    yield [result.distance, result.error]


@pytest.mark.parametrize("work", [draw, draw_with_the_bundled_model, train_a_network, evaluate])
def test_defaults_change_no_bit(tmp_path, work):
    expected = [np.asarray(x) for x in work(tmp_path)]
    # on the meta device tensors have no values: one that is made there by mistake cannot become a result
    for dtype, device in ((torch.float64, "meta"), (torch.bfloat16, "meta")):
        (folder := tmp_path / str(dtype)).mkdir()
        with defaults(dtype, device):
            came = list(work(folder))
        for x, want in zip(came, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(x), want)


@pytest.mark.slow
def test_defaults_fail_no_rung():
    with defaults(torch.bfloat16, "meta"):
        assert [record for record in verify(device="cpu", steps=2, progress=False) if record.verdict == "FAIL"] == []
