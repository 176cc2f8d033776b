"""What all benchmarks share: their order, the time limit, the ceilings, the timing of a case, and its record."""

import gc
import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench import machine, records, turns
from bench.watch import Watch, gpu_uuid

HERE = Path(__file__).resolve().parent
# the most important first: the time may not suffice for all
FILES = tuple(
    f"test_{what}.py"
    for what in (
        "kernels",
        "unet",
        "sampling",
        "training",
        "diffusers",
        "output",
        "start",
        "parallel",
        "policy",
        "memory",
        "races",
    )
)
COMPILING = 240  # seconds that torch.compile may take for a network
MOST_ROUNDS = 200
BEGAN, CEILINGS, DRIVER = pytest.StashKey[float](), pytest.StashKey[dict](), pytest.StashKey[Any]()
RECORDS, RUN = pytest.StashKey[Path](), pytest.StashKey[dict]()
MEASURED = pytest.StashKey[dict]()  # of a case: the fields that it adds to its record


def pytest_addoption(parser):
    text = f"start no benchmark after this time, and nothing that compiles in its last {COMPILING} seconds (480)"
    parser.addoption("--seconds", type=float, default=480 if turns.PROCESSES == 1 else math.inf, help=text)
    parser.addoption("--records", type=Path, default=HERE / "results", help="folder for the records (bench/results)")


def pytest_configure(config):
    config.stash[BEGAN] = time.monotonic()


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        if not item.get_closest_marker("benchmark"):
            item.add_marker(pytest.mark.benchmark(timer=machine.clock))
    if turns.PROCESSES > 1:  # two builds are compared: other implementations are the same in both
        rivals = [item for item in ours if rival(params(item))]
        if rivals:
            items[0].config.hook.pytest_deselected(items=rivals)
        ours = [item for item in ours if item not in rivals]
    place = {name: number for number, name in enumerate(FILES)}
    # compiled cases come last, because torch.compile takes minutes
    ours.sort(key=lambda item: (bool(item.get_closest_marker("compiled")), place.get(item.path.name, len(FILES))))
    items[:] = [item for item in items if item.path.parent != HERE] + ours


def pytest_runtest_setup(item):
    needs = COMPILING if item.get_closest_marker("compiled") else 0
    if time.monotonic() - item.config.stash[BEGAN] + needs > item.config.getoption("seconds"):
        pytest.skip("no time is left of --seconds, or too little to compile")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {str(error).partition(chr(10))[0]}")
    finally:
        gc.collect()
        if machine.DEVICE.type == "cuda":
            torch.cuda.empty_cache()


# Records


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if (
        RUN in item.config.stash
        and item.path.parent == HERE
        and (call.when == "call" or (call.when == "setup" and not report.passed))
    ):
        record = (
            item.config.stash[RUN] | {"time": records.now()} | about(item) | {"outcome": report.outcome, "reason": None}
        )
        record |= item.stash.get(MEASURED, {}) if report.passed else {"reason": reason(call.excinfo.value)}
        try:
            records.append(item.config.stash[RECORDS], record)
        except OSError as error:  # results can still be printed
            report.outcome, report.longrepr = "failed", f"the record could not be written: {error}"
    return report


def about(item: pytest.Item) -> dict[str, Any]:
    """Return the fields of a record that describe a case, with defaults for those that it may fill in later."""
    return records.FIELD_DEFAULTS | {
        "case": f"{item.path.name}::{item.originalname}",
        "name": item.name,
        "params": {name: plain(value) for name, value in params(item).items()},
        "hash": records.source_hash(item.function),
    }


def params(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def rival(params: dict[str, Any]) -> bool:
    return str(params.get("who", params.get("name"))).startswith(("reference", "diffusers"))


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def reason(error: BaseException) -> str:
    return next(iter((str(error) or type(error).__name__).splitlines()))


@pytest.fixture(scope="session", autouse=True)
def run(pytestconfig) -> dict[str, Any]:
    """The fields that all records of this run share. Measures the ceilings first, and creates the file of records."""
    with Watch(gpu_uuid(machine.DEVICE), turns.PROCESSES) as watch:
        ceilings = machine.ceilings()
    facts = machine.description() | {"driver": watch.facts["driver"]}
    commit, dirty = records.commit()
    device, began = records.device_name(facts), records.now()
    pytestconfig.stash[RUN] = common = {
        "schema": records.SCHEMA, "run": began, "ceilings": ceilings, "ceilings_invalid": watch.invalid,
        "device": device, "scale": machine.SCALE, "machine": facts, "commit": commit, "dirty": dirty,
    }  # fmt: skip
    pytestconfig.stash[RECORDS] = path = records.new_file(pytestconfig.getoption("records"), device, began, commit)
    units = {name: f"{rate:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in ceilings.items()}
    machine.say(json.dumps(facts | {f"{name} (ceiling)": rate for name, rate in units.items()}, indent=1))
    for line in watch.invalid:
        machine.say(f"the ceilings are unreliable: {line}")
    yield common
    machine.say(f"records: {path}\n")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info |= {key: value for key, value in config.stash.get(RUN, {}).items() if key not in ("commit", "dirty")}


def pytest_benchmark_update_commit_info(commit_info):
    commit_info["id"], commit_info["dirty"] = records.commit()


@pytest.fixture
def record(request):
    """record(**fields): add fields to the record of this case."""
    request.node.stash[MEASURED] = fields = {}
    return fields.update


# Measuring


@pytest.fixture
def measure(benchmark, run, record, request):
    """measure(run, n, ...): time run(), which makes n calls; record and print a call's time and shares of the ceilings.

    Args:
        group, contender: see `bench.contenders`.
        bytes_moved, flops, images: of one call.
        precision: the precision whose ceiling counts.
        before: called before each round, untimed.
        cold: whether to empty the caches before each round.
        errors: those that the gate measured.
        facts: more facts to record.
    Returns: the median of the seconds per call.

    There are as many rounds as fit into --benchmark-max-time, but at least --benchmark-min-rounds.
    """

    def measured(
        work, n, *, group=None, contender=None, bytes_moved=0, flops=0, images=0, precision="fp32", cold=False,
        before=None, errors=None, facts=None,
    ):  # fmt: skip
        option = request.config.getoption
        most, least = float(option("benchmark_max_time")), option("benchmark_min_rounds")

        def before_each():
            machine.wait()
            turns.over(request.node.nodeid)
            if before:
                before()
            if cold:
                machine.empty_caches()

        before_each()
        work()
        before_each()
        fit = math.ceil(most / max(machine.timed(work), 1e-9))
        with Watch(gpu_uuid(machine.DEVICE), turns.PROCESSES) as watch:
            benchmark.pedantic(work, setup=before_each, rounds=max(least, min(fit, MOST_ROUNDS)))
        if benchmark.disabled:
            return math.nan
        marker = request.node.get_closest_marker("benchmark")
        clock = "wall" if marker.kwargs["timer"] is time.perf_counter else machine.CLOCK
        samples = [seconds / n for seconds in benchmark.stats.stats.data]
        seconds = median(samples)
        shares = {
            unit: {
                "rate": amount / seconds,
                "share": amount / seconds / run["ceilings"].get(name, run["ceilings"]["fp32"]),
            }
            for amount, unit, name in ((bytes_moved / 1e9, "GB/s", "copy"), (flops / 1e12, "TFLOP/s", precision))
            if amount
        }
        facts = dict(facts or {})
        energy_j = watch.facts["energy_j"]
        if images and energy_j is not None and turns.PROCESSES == 1:  # else it is the energy of both processes
            facts["energy_per_image_j"] = energy_j / (images * n * len(samples))
        record(
            samples_s=samples, calls=n, clock=clock, cache="cold" if cold else "hot", group=group,
            contender=contender, bytes=bytes_moved, flops=flops, images=images, precision=precision, shares=shares,
            errors=errors, facts=facts, watch=watch.facts, invalid=watch.invalid,
        )  # fmt: skip
        benchmark.group = group
        benchmark.extra_info.update(seconds_per_call=seconds, **facts)
        line = f"{request.node.name:<72} {1e6 * seconds:>10.1f} us"
        for unit, found in shares.items():
            line += f" {found['rate']:>8.4g} {unit}, {found['share']:.0%} of the ceiling"
        machine.say(line + "".join(f"; INVALID: {why}" for why in watch.invalid))
        return seconds

    return measured
