"""Fixtures of the ladder's tests: a tiny checkpoint, and a ladder of some of the rungs."""

import pytest

from fastddpm.verify import rungs
from tests.verify.checkpoint import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of a random network, 8 x 8 grey."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def only(monkeypatch):
    """only(*names) leaves these rungs in the ladder, without the interpreter."""
    all_rungs = dict(rungs.RUNGS)

    def select(*names):
        monkeypatch.setattr(rungs, "RUNGS", {name: all_rungs[name] for name in names})
        monkeypatch.setattr(rungs, "OF_KERNELS", ())

    return select
