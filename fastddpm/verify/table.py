"""The comparisons of the ladder as text."""

from collections.abc import Sequence

from fastddpm.verify.accuracy import Record


def table(records: Sequence[Record]) -> str:
    """Format the comparisons, one per line, then the errors along the trajectories, then the verdict."""
    lines = [("rung", "compared", "error", "bound", "", "")]
    lines += [(r.rung, r.compared, *_numbers(r), r.verdict, r.note) for r in records]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for r in records:
        if r.steps:
            shown = sorted({round(i * (len(r.steps) - 1) / 10) for i in range(11)})
            along = ", ".join("{}: {:.1e} ({:.1e})".format(*r.steps[i]) for i in shown)
            text += [f"{r.compared.partition(' with ')[0]}, rms error after t (plain torch's):", f"  {along}"]
    judged = [r for r in records if r.verdict != "skipped"]
    failed = [r.rung for r in judged if r.verdict == "FAIL"]
    if failed:
        text.append(f"FAILED: {len(failed)} of {len(judged)} comparisons, in {', '.join(dict.fromkeys(failed))}")
    else:
        text.append(f"passed: all {len(judged)} comparisons; {len(records) - len(judged)} skipped")
    return "\n".join(text)


def _numbers(record: Record) -> tuple[str, str]:
    """Error and bound as the table shows them."""
    if record.error is None or record.bound is None:
        return "", ""
    if record.bound == 0:
        return f"{record.error:g} differ", "equal"
    return f"{record.error:.3g}", f"{record.bound:.3g}"
