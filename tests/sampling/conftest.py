"""Fixtures of the tests of sampling."""

import pytest
import torch

from fastddpm import ops
from fastddpm.sampling.replay import Replay
from tests.support.graphs import Recording


@pytest.fixture
def graphs(monkeypatch):
    """Replaces captures by recordings on the CPU; returns the list of them."""
    captured, resets, prepare = [], {}, Replay.prepare

    def remember_reset(replay, run, reset, constants):
        resets[id(replay)] = reset
        prepare(replay, run, reset, constants)

    def capture(replay, run):
        resets.pop(id(replay))()  # unlike a capture, a recording executes the work
        graph = Recording()
        with graph:
            run(None)
        captured.append(graph)
        return graph

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # no packed weights, as on a GPU
    monkeypatch.setattr(Replay, "prepare", remember_reset)
    monkeypatch.setattr(Replay, "_captured", capture)
    with ops.forced_backend("torch"):  # whose operations can be recorded
        yield captured
