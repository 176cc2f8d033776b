"""Fixtures of the tests of the drop-in."""

import pytest

from tests.sampling.conftest import graphs

__all__ = ["captured", "graphs"]


@pytest.fixture
def captured(graphs, monkeypatch):
    """Captures the calls of conditional networks on the CPU, too, as recordings; returns the list of them."""
    from fastddpm.diffusers import captured

    monkeypatch.setattr(captured, "is_capturable", lambda device: True)
    return graphs
