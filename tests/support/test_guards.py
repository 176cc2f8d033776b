"""The guard regions detect a write into them."""

import pytest
import torch

from tests.support.guards import GUARD, Guards


@pytest.mark.parametrize("at", [0, GUARD - 1, -GUARD, -1])
def test_a_write_into_a_guard_is_detected(at):
    guards = Guards()
    guards.empty(2, (3, 4), dtype=torch.float32).zero_()
    guards.check()
    guards.buffers[0][at] = 0
    with pytest.raises(AssertionError):
        guards.check()
