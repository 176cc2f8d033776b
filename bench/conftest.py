"""What the benchmarks share: their order, the time they may take, the ceilings, and a line for each of them."""

import json
import os
import time
from pathlib import Path
from statistics import median

import pytest

from bench import machine

HERE = Path(__file__).parent
FILES = ("test_kernels.py", "test_sampling.py", "test_races.py")  # in the order of importance: time may not suffice
COMPILING = 240  # seconds that torch.compile may take for a network
BEGAN, CEILINGS = pytest.StashKey[float](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    text = "start no benchmark later, and no compilation %d seconds before, so that the results are written (480)"
    parser.addoption("--seconds", type=float, default=480, help=text % COMPILING)


def pytest_configure(config):
    config.stash[BEGAN] = time.monotonic()


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        item.add_marker(pytest.mark.filterwarnings("default"))  # warnings of other packages end no benchmark
    # torch.compile takes minutes, so what is compiled comes last
    ours.sort(key=lambda item: (item.get_closest_marker("compiled") is not None, FILES.index(item.path.name)))
    items[:] = [item for item in items if item.path.parent != HERE] + ours


def pytest_runtest_setup(item):
    needs = COMPILING if item.get_closest_marker("compiled") else 0
    if time.monotonic() - item.config.stash[BEGAN] + needs > item.config.getoption("seconds"):
        pytest.skip(f"{item.name}: --seconds are over, or too few are left to compile")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info |= machine.description() | {"ceilings": config.stash.get(CEILINGS, None)}


def pytest_benchmark_update_commit_info(commit_info):
    commit_info["id"] = os.environ.get("COMMIT", commit_info["id"])  # for a copy of the tree without its repository


@pytest.fixture(scope="session")
def ceilings(pytestconfig):
    """`machine.ceilings`, measured once, before anything else."""
    pytestconfig.stash[CEILINGS] = rates = machine.ceilings()
    facts = machine.description() | {f"{name} (ceiling)": f"{rate:.4g}" for name, rate in rates.items()}
    machine.say(json.dumps(facts, indent=1))
    return rates


@pytest.fixture
def measure(benchmark, ceilings):
    """measure(run, n, ...): time run(), which is n calls, and record and print a call's share of the ceilings.

    Args: bytes_moved, flops: of a call; precision: whose ceiling counts; rounds: how often run() is timed;
        **facts: recorded besides.
    Returns: the seconds a call takes.
    """

    def measured(run, n, *, bytes_moved=0, flops=0, precision="fp32", rounds=20, **facts):
        benchmark.pedantic(run, rounds=rounds if machine.SCALE != "tiny" else 2, warmup_rounds=1)
        seconds = median(benchmark.stats.stats.data) / n
        line = f"{benchmark.name:<72} {1e6 * seconds:>10.1f} us"
        for rate, unit, ceiling in (
            (bytes_moved / seconds / 1e9, "GB/s", ceilings["copy"]),
            (flops / seconds / 1e12, "TFLOP/s", ceilings.get(precision, ceilings["fp32"])),
        ):
            if rate:
                facts |= {unit: rate, f"share of {unit}": rate / ceiling}
                line += f" {rate:>8.4g} {unit}, {rate / ceiling:.0%} of {ceiling:.4g}"
        benchmark.extra_info.update(seconds_per_call=seconds, **facts)
        machine.say(line)
        return seconds

    return measured
