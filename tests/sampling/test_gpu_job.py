"""Jobs on a GPU: shards drawn by replays of a graph, the same after a restart."""

import json

import numpy as np
import pytest
import torch

from fastddpm import Sampler, Schedule, UNet2D
from fastddpm.sampling.job import sample_to
from fastddpm.storage.shards import FORMATS
from tests.conftest import needs_gpu
from tests.support.check import TINY

pytestmark = needs_gpu


def sampler(**settings):
    torch.manual_seed(0)
    return Sampler(UNet2D(**TINY).eval(), Schedule(num_train_timesteps=20), device="cuda", precision="bf16", **settings)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_of_graph_and_eager_engines_are_equal_after_a_restart(tmp_path, format):
    settings = {"format": format, "shard_size": 8, "batch_size": 8, "progress": False}
    graph, eager = sampler(engine="graph"), sampler(engine="eager")
    want = eager.sample(20, output="uint8", batch_size=8, progress=False).numpy()
    store = sample_to(tmp_path, graph, 20, **settings)
    assert np.array_equal(np.concatenate(list(store.arrays())), want)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    next(tmp_path.glob("00001" + FORMATS[format])).write_bytes(b"torn")
    sample_to(tmp_path, eager, 20, **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["device"] == torch.cuda.get_device_name()


def test_batch_invariant_samples_do_not_depend_on_shard_size(tmp_path):
    invariant = sampler(batch_invariant=8)
    parts = [
        sample_to(tmp_path / str(k), invariant, 21, shard_size=k, format="npz", progress=False) for k in (21, 8, 5)
    ]
    one, *others = (np.concatenate(list(store.arrays())) for store in parts)
    assert all(np.array_equal(one, other) for other in others)
