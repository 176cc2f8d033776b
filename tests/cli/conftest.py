"""Fixtures for the tests of all commands."""

import numpy as np
import pytest

from tests.support.jobs import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint of a random network: 4 x 4 grey images, T = 6."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images_with_labels():
    """[3, 4, 4, 1] uint8, which is also in images.npz, with labels of two classes."""
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    np.savez("images.npz", x=x, y=np.array([1, 0, 1]))
    return x[..., None]
