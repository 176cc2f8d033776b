"""The contents of records: the cases of each device, and the results of each case in the order of its runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from statistics import quantiles
from typing import Any

from bench.chart import BYTES, SECONDS, figure, percent, quantity
from bench.records import number

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A record and its meaning: seconds per call or, for a case of memory, the peak in bytes."""

    record: Record

    @cached_property
    def quartiles(self) -> tuple[float, float, float] | None:
        """The lower quartile, the median and the upper quartile; None if nothing was measured."""
        samples = self.record["samples_s"] or [self.peak] * (self.peak is not None)
        if self.record["outcome"] != "passed" or not samples:
            return None
        return tuple(quantiles(samples, method="inclusive")) if len(samples) > 1 else (samples[0],) * 3

    @property
    def peak(self) -> float | None:
        value = self.record["facts"].get("peak_bytes")
        return value if number(value) and value > 0 else None

    @property
    def units(self) -> Sequence[tuple[float, str]]:
        return SECONDS if self.record["samples_s"] else BYTES

    @property
    def median(self) -> float:
        return self.quartiles[1] if self.quartiles else math.nan

    @property
    def timed(self) -> bool:
        return bool(self.quartiles and self.record["samples_s"])

    @property
    def valid(self) -> bool:
        return bool(self.quartiles) and not self.record["invalid"]

    @property
    def state(self) -> str:
        """passed, invalid, failed or skipped."""
        return "invalid" if self.quartiles and self.record["invalid"] else self.record["outcome"]

    @property
    def trouble(self) -> str | None:
        """Why there is no figure, or no reliable one."""
        if self.record["outcome"] != "passed":
            return f"{self.record['outcome']}: {self.record['reason'] or 'no reason given'}"
        return f"invalid: {'; '.join(self.record['invalid'])}" if self.record["invalid"] else None

    @property
    def commit(self) -> str:
        """The short hash, with a star if the tree had changes."""
        return f"{(self.record['commit'] or 'unknown')[:7]}{'*' * bool(self.record['dirty'])}"

    @property
    def when(self) -> str:
        return when(self.record["run"])

    @property
    def images(self) -> float | None:
        """Images per second; None for a case that makes none or that times a start."""
        count = self.record["images"] if self.timed else 0
        first = (self.record["group"] or "").startswith("first image") and self.record["clock"] == "wall"
        return count / self.median if count > 0 and not first else None

    def ceiling(self, unit: str) -> str:
        """Return the ceiling that a rate in GB/s or TFLOP/s is compared with."""
        if unit == "GB/s":
            return "copy"
        precision = self.record["precision"] or "matmul"
        # a CPU has no TF32
        return "fp32" if precision == "tf32" and precision not in self.record["ceilings"] else precision

    def median_text(self, digits: int = 3) -> str:
        return quantity(self.median, self.units, digits) if self.quartiles else "–"

    def spread(self) -> str:
        return " – ".join(quantity(value, self.units, 4) for value in self.quartiles[::2]) if self.timed else "–"

    def about(self) -> str:
        """Return the lines of a tooltip."""
        lines = [f"{self.commit}, {self.when} UTC"]
        if self.timed:
            rounds = len(self.record["samples_s"])
            lines.insert(0, f"quartiles {self.spread()}, {rounds} round{'s' * (rounds != 1)}")
        if self.quartiles:
            lines.insert(0, self.median_text(4))
        lines += [
            f"{figure(of['rate'])} {unit}, {percent(of['share'])} of {self.ceiling(unit)}"
            for unit, of in self.record["shares"].items()
        ]
        return "\n".join([*lines, *filter(None, [self.trouble])])


@dataclass(frozen=True)
class Case:
    """All results of a case on a device, in order."""

    results: list[Result]

    @cached_property
    def ran(self) -> list[Result]:
        """The results with a figure or a failure."""
        return [result for result in self.results if result.quartiles or result.state == "failed"]

    @property
    def last(self) -> Result:
        """The last of them, or the last result if there are none."""
        return (self.ran or self.results)[-1]

    def of(self, run: str) -> Result | None:
        """Return the last result of a run."""
        return next((result for result in reversed(self.results) if result.record["run"] == run), None)

    @property
    def function(self) -> str:
        return self.last.record["case"]

    @property
    def name(self) -> str:
        return self.last.record["name"]

    @cached_property
    def group(self) -> str | None:
        return self._known("group")

    @cached_property
    def contender(self) -> str | None:
        return self._known("contender")

    def _known(self, field: str) -> str | None:
        """Return the latest value of a field, which failed cases do not record."""
        return next((r.record[field] for r in reversed(self.results) if r.record[field]), None)

    @property
    def ours(self) -> bool:
        """Whether it is fastddpm; a case without contenders is."""
        return (self.contender or "fastddpm").startswith("fastddpm")

    @property
    def variant(self) -> str:
        """The engine and the precision."""
        return " ".join((self.contender or "").split()[1:])

    @property
    def kind(self) -> str:
        return "ours" if self.ours else "other"

    @property
    def title(self) -> str:
        """The name that distinguishes it within its group, or else within its function."""
        return self.contender or self.name.removeprefix("test_")

    @property
    def words(self) -> str:
        """The text that the filter searches."""
        return " ".join(filter(None, [self.function, self.name, self.group, self.contender])).lower()


@dataclass(frozen=True)
class Device:
    """What was measured on one device at one scale."""

    cases: list[Case]  # sorted by function, and within it by group
    latest: Record  # of the latest run

    @property
    def name(self) -> str:
        machine = self.latest["machine"]
        name, threads = machine.get("gpu") or machine.get("cpu") or self.latest["device"], machine.get("threads")
        if threads and not machine.get("gpu"):
            name = f"{name}, {threads} thread{'s' * (threads != 1)}"
        return f"{name} (tiny sizes)" if self.latest["scale"] == "tiny" else name

    @property
    def functions(self) -> dict[str | None, list[Case]]:
        return group_by(attrgetter("function"), self.cases)

    @property
    def run(self) -> str:
        """The latest run."""
        return self.latest["run"]


def ceilings(record: Record) -> dict[str, float]:
    """Return GB/s of a copy, and TFLOP/s of a matrix product in each precision."""
    return {name: rate for name, rate in record["ceilings"].items() if rate > 0}


def doubts(record: Record) -> list[str]:
    """Return why the ceilings of a record are unreliable."""
    found = record.get("ceilings_invalid")
    return [str(reason) for reason in found] if isinstance(found, list) else []


def devices(found: Iterable[Record]) -> list[Device]:
    """Sort records, given in the order of their runs, into devices and cases. GPUs come first."""
    sorted_: dict[tuple[str, str], dict[tuple[str, str], list[Result]]] = {}
    for record in found:
        place = sorted_.setdefault((record["scale"], record["device"]), {})
        place.setdefault((record["case"], record["name"]), []).append(Result(record))
    scales = {"cuda": 0, "cpu": 1}
    return [_device(sorted_[key].values()) for key in sorted(sorted_, key=lambda key: (scales.get(key[0], 2), key))]


def _device(results: Iterable[list[Result]]) -> Device:
    cases = [Case(found) for found in results]
    places: dict[tuple[str, ...], int] = {}
    for case in cases:
        for key in ((case.function,), (case.function, case.group or case.name)):
            places.setdefault(key, len(places))
    cases.sort(key=lambda c: (places[(c.function,)], places[(c.function, c.group or c.name)]))
    latest = max((result.record for case in cases for result in case.results), key=lambda r: (r["run"], r["time"]))
    return Device(cases, latest)


def group_by(key: Callable[[Case], str | None], cases: Iterable[Case]) -> dict[str | None, list[Case]]:
    """Return {key: its cases}, in the order of the first case of each key."""
    found: dict[str | None, list[Case]] = {}
    for case in cases:
        found.setdefault(key(case), []).append(case)
    return found


def race(cases: Sequence[Case]) -> list[tuple[Case, Result]]:
    """Return the results of the latest run that measured one of ours and another, of the cases that ran; else []."""
    runs = [{r.record["run"] for c in cases if c.ours == ours for r in c.ran if r.quartiles} for ours in (True, False)]
    run = max(runs[0] & runs[1], default="")
    return [(case, result) for case in cases if (result := case.of(run)) in case.ran]


def when(time: str) -> str:
    """Format a time as 2026-11-22 21:00."""
    return time[:16].replace("T", " ")
