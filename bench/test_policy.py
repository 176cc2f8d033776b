"""The latency of a robot's action sequence: pytest bench/test_policy.py"""

import pytest

from bench import policy


@pytest.mark.parametrize("name", policy.CONTENDERS)
def test_policy(measure, name):
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    run, errors = policy.action(name)
    group = "sampling, policy, batch 1"
    measure(run, policy.T, group=group, contender=name, precision=name.split()[2], images=1 / policy.T, errors=errors)
