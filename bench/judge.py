"""Is head slower than base? The verdict on each case of two sets of records.

A case is slower if its median is larger by more than a threshold, in every launch and in all launches together, and if
the samples differ by more than chance allows (Mann-Whitney's U test). So a certain but small difference does not count,
nor does a large one that may be noise, nor one that shows in some launches only: the core that a process runs on, or
the location of its memory, may make all of its rounds slower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from scipy.stats import mannwhitneyu

Record = dict[str, Any]
Runs = Sequence[Sequence[float]]  # seconds per call, of each process
VERDICTS = ("broken", "slower", "too few samples", "unchanged", "faster", "not compared")  # the worst first
THRESHOLD, P = 0.05, 0.002
EXACT = 2500  # pairs of samples up to which p is exact (a few ms); the asymptotic p of 9 and 9 never reaches 1e-4


@dataclass(frozen=True)
class Case:
    """The verdict on a case; medians are seconds per call, or None."""

    case: str  # module::name
    verdict: str  # one of VERDICTS
    reason: str | None = None  # for broken, too few samples and not compared
    base_s: float | None = None
    head_s: float | None = None
    ratio: float | None = None  # head / base
    p: float | None = None
    samples: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Comparison:
    about: list[str]  # lines: what was compared, and where
    cases: list[Case]  # the worst first
    threshold: float
    p: float
    problems: list[str]  # for each process that died: how, and the end of its output

    @property
    def status(self) -> int:
        """The exit status of the command: 1 for a regression, 2 if there is no verdict."""
        verdicts = {case.verdict for case in self.cases}
        if verdicts & {"slower", "broken"}:
            return 1
        return 2 if self.problems or not verdicts & {"unchanged", "faster"} else 0


def compare(
    base: Sequence[Record],
    head: Sequence[Record],
    *,
    threshold: float = THRESHOLD,
    p: float = P,
    problems: Sequence[str] = (),
) -> Comparison:
    """Judge all cases of two sets of records. Several runs of a case are pooled.

    Raises: ValueError: the sets are of different devices.
    """
    devices = [{record["device"] for record in side} for side in (base, head)]
    if all(devices) and not devices[0] & devices[1]:
        one, other = (", ".join(sorted(side)) for side in devices)
        raise ValueError(f"base was measured on {one}, head on {other}; want records of one device: measure both on it")
    one_device = len(devices[0] | devices[1]) == 1
    sides, cases = [_by_case(side) for side in (base, head)], []
    for device, name in dict.fromkeys([*sides[0], *sides[1]]):
        runs = [side.get((device, name), []) for side in sides]
        cases.append(_judge_case(name if one_device else f"{name} on {device}", *runs, threshold, p))
    cases.sort(key=lambda case: (VERDICTS.index(case.verdict), -(case.ratio or 0)))
    return Comparison(_about(base, head), cases, threshold, p, list(problems))


def judge(case: str, base: Runs, head: Runs, *, threshold: float, p: float) -> Case:
    """Return the verdict on the samples of one or more processes per side, in pairs if both sides have equally many.

    If the builds and their processes are equal, p is the probability of calling them different, and p / 2 of calling
    head slower.
    """
    pooled = [[seconds for run in side for seconds in run] for side in (base, head)]
    medians = [median(samples) for samples in pooled]
    n, m = map(len, pooled)
    verdict, reason, found, ratio = "unchanged", None, None, medians[1] / medians[0]
    if smallest_p(n, m) < p:
        method = "exact" if n * m <= EXACT else "asymptotic"
        found = float(mannwhitneyu(*pooled, alternative="two-sided", method=method).pvalue)
        pairs = zip(base, head, strict=True) if len(base) == len(head) else product(base, head)
        ratios = [ratio, *(median(after) / median(before) for before, after in pairs)]
        if found < p and min(ratios) > 1 + threshold:
            verdict = "slower"
        elif found < p and max(ratios) < 1 / (1 + threshold):
            verdict = "faster"
    else:
        times = next(times for times in range(2, 1000) if smallest_p(times * n, times * m) < p)
        verdict = "too few samples"
        reason = f"{n} and {m} samples never give p < {p:g}; take {times} runs (--launches {times})"
    return Case(case, verdict, reason, *medians, ratio, found, (n, m))


def smallest_p(n: int, m: int) -> float:
    """Return the two-sided p if all n samples are below all m others, the most extreme order."""
    return 2 / math.comb(n + m, n)


def _by_case(side: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return {(device, module::name): its runs}."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in side:
        name = f"{record['case'].partition('::')[0]}::{record['name']}"
        found.setdefault((record["device"], name), []).append(record)
    return found


def _judge_case(case: str, base: list[Record], head: list[Record], threshold: float, p: float) -> Case:
    if not base or not head:
        return Case(case, "not compared", f"only in {'base' if base else 'head'}")
    base, head = _of_one_kind(base), _of_one_kind(head)
    for field, differs in (
        ("hash", "the case itself differs"),
        ("scale", "scales differ"),
        ("params", "parameters differ"),
    ):
        if base[-1][field] != head[-1][field]:
            return Case(case, "not compared", f"{differs}: {base[-1][field]} and {head[-1][field]}")
    for side, runs in (("base", base), ("head", head)):
        if failed := next((run["reason"] for run in runs if run["outcome"] == "failed"), None):
            broken = side == "head" and any(run["outcome"] == "passed" for run in base)
            return Case(case, "broken" if broken else "not compared", f"failed in {side}: {failed}")
    if any(run["samples_s"] for run in base) and (short := [run for run in head if _ran_out(run)]):
        return Case(case, "broken", f"in head: {short[0]['reason']}")
    samples = []
    for side, runs in (("base", base), ("head", head)):
        valid = [run["samples_s"] for run in runs if run["samples_s"] and not run["invalid"]]
        if not valid:
            return Case(case, "not compared", f"{_why_none(runs)} in {side}")
        samples.append(valid)
    return judge(case, *samples, threshold=threshold, p=p)


def _of_one_kind(runs: list[Record]) -> list[Record]:
    """Return all runs if they measured the same, else the latest."""
    kinds = [[run[field] for field in ("hash", "scale", "params")] for run in runs]
    return runs if all(kind == kinds[0] for kind in kinds) else runs[-1:]


def _ran_out(run: Record) -> bool:
    return run["outcome"] == "skipped" and str(run["reason"]).startswith("out of memory")


def _why_none(runs: list[Record]) -> str:
    if invalid := next((run["invalid"] for run in runs if run["invalid"]), None):
        return f"invalid ({'; '.join(invalid)})"
    if skipped := next((run["reason"] for run in runs if run["outcome"] == "skipped"), None):
        return f"skipped ({skipped})"
    return "without timings"


def _about(base: Sequence[Record], head: Sequence[Record]) -> list[str]:
    """Return lines with the commits and devices, and what else differs."""
    devices = sorted({record["device"] for record in [*base, *head]})
    lines = [f"base {_commits(base)}, head {_commits(head)}, on {', '.join(devices) or 'no device'}"]
    if base and head:
        one, other = base[-1]["machine"], head[-1]["machine"]
        differ = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        lines += [f"{key} differs: {one.get(key)} and {other.get(key)}" for key in differ]
    return lines


def _commits(side: Sequence[Record]) -> str:
    names = dict.fromkeys(f"{(r['commit'] or 'unknown')[:12]}{'-dirty' if r['dirty'] else ''}" for r in side)
    return ", ".join(names) if len(names) < 4 else f"of {len(names)} commits"
