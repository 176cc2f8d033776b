"""The comparisons of the ladder as text."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from fastddpm.verify.accuracy import Record


def table(records: Sequence[Record]) -> str:
    """Format the comparisons, one per line, then the errors along the trajectories, then the verdict."""
    text = _aligned([("rung", "compared", "error", "bound", "", ""), *map(_row, records)])
    for r in records:
        if r.steps:
            shown = sorted({round(i * (len(r.steps) - 1) / 10) for i in range(11)})
            along = ", ".join("{}: {:.1e} ({:.1e})".format(*r.steps[i]) for i in shown)
            text += [f"{r.compared.partition(' with ')[0]}, rms error after t (plain torch's):", f"  {along}"]
    return "\n".join([*text, _verdict(records)])


def summary(records: Sequence[Record]) -> str:
    """Format the rungs, one per line, then the comparisons that failed, then the verdict."""
    text = _aligned(_rung(name, list(of_rung)) for name, of_rung in groupby(records, lambda r: r.rung))
    failed = [_row(r) for r in records if r.verdict == "FAIL"]
    return "\n".join([*text, *(["", *_aligned(failed)] if failed else []), _verdict(records)])


def _rung(name: str, records: Sequence[Record]) -> tuple[str, str, str]:
    """The line of a rung: how many comparisons passed or failed, the nearest to its bound, and what was skipped."""
    judged = [r for r in records if r.verdict != "skipped"]
    failed = [r for r in judged if r.verdict == "FAIL"]
    notes = dict.fromkeys(r.note for r in records if r.verdict == "skipped")
    skipped = f"{len(records) - len(judged)} skipped: {'; '.join(notes)}" if judged else "; ".join(notes)
    if not judged:
        return name, "skipped", skipped
    count = f"{len(failed)} of {len(judged)}" if failed else str(len(judged))
    parts = [f"{count} comparison{'s' * (len(judged) > 1)}"]
    shares = [r.error / r.bound for r in judged if r.error is not None and r.bound]
    if shares and not failed:
        parts.append(f"errors at most {max(shares):.0%} of their bounds")
    return name, "FAIL" if failed else "pass", ", ".join([*parts, *([skipped] if notes else [])])


def _verdict(records: Sequence[Record]) -> str:
    judged = [r for r in records if r.verdict != "skipped"]
    failed = [r.rung for r in judged if r.verdict == "FAIL"]
    if failed:
        return f"FAILED: {len(failed)} of {len(judged)} comparisons, in {', '.join(dict.fromkeys(failed))}"
    return f"passed: all {len(judged)} comparisons; {len(records) - len(judged)} skipped"


def _row(record: Record) -> tuple[str, ...]:
    return record.rung, record.compared, *_numbers(record), record.verdict, record.note


def _numbers(record: Record) -> tuple[str, str]:
    """Error and bound as the table shows them."""
    if record.error is None or record.bound is None:
        return "", ""
    if record.bound == 0:
        return f"{record.error:g} differ", "equal"
    return f"{record.error:.3g}", f"{record.bound:.3g}"


def _aligned(lines: Iterable[tuple[str, ...]]) -> list[str]:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
