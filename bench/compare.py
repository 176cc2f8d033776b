"""Did it become slower? Two builds, measured here in turns, or two sets of records: python -m bench.compare --help"""

import argparse
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from bench import records, trees
from bench.judge import THRESHOLD, VERDICTS, Case, Comparison, P, Record, compare

EXAMPLES = """
examples:
  python -m bench.compare main HEAD --select "step or noising"     two git revisions of this repository
  python -m bench.compare ../fastddpm-before . --launches 5        another checkout and this one
  python -m bench.compare base/ head/ --markdown                   what `pip install --target base/ --no-deps .` made
  python -m bench.compare before.jsonl bench/results/nvidia-h200   stored records of the same device
  python -m bench.compare main HEAD -- -m "not compiled"           more options for pytest

exit status: 1 if a case became slower or is broken, 2 after an error or if nothing could be compared, else 0
"""
LAUNCHES = 3
HEADER = ("case", "base", "head", "ratio", "p", "verdict")


# Telling


def text(found: Comparison) -> str:
    """Tables of plain text."""
    lines = [*found.about, ""]
    if compared := _with(found, *VERDICTS[:-1]):
        rows = [HEADER, *([case.case, *_figures(case), _verdict(case, str)] for case in compared)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        for case, *figures, verdict in rows:
            aligned = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:-1], strict=True)]
            lines.append("  ".join([f"{case:<{widths[0]}}", *aligned, verdict]))
        lines.append("")
    if others := _with(found, "not compared"):
        lines += ["not compared:", *(f"  {case.case}: {case.reason}" for case in others), ""]
    for problem in found.problems:
        lines += [problem, ""]
    return "\n".join([*lines, summary(found)])


def as_json(found: Comparison) -> str:
    """All figures, and the exit status."""
    return json.dumps(asdict(found) | {"summary": summary(found), "status": found.status}, indent=1)


def markdown(found: Comparison) -> str:
    """A comment of a pull request: what changed in sight, the rest folded."""
    lines = [f"**{summary(found)}**", "", *(f"- {_code(line)}" for line in found.about), ""]
    for problem in found.problems:
        first, *output = problem.splitlines()
        lines += [f"**{_code(first)}**", "", *(f"    {line}" for line in output), ""]
    if changed := _with(found, "broken", "slower", "too few samples", "faster"):
        lines += _table(changed)
    if unchanged := _with(found, "unchanged"):
        lines += _folded(f"{len(unchanged)} unchanged", _table(unchanged))
    if others := _with(found, "not compared"):
        lines += _folded(f"{len(others)} not compared", [f"- {_code(c.case)}: {_code(c.reason)}" for c in others])
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Comparison], str]] = {"text": text, "json": as_json, "markdown": markdown}


def summary(found: Comparison) -> str:
    """One line."""
    counts = Counter(case.verdict for case in found.cases)
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]) or "no cases"
    return f"{listed} (threshold {100 * found.threshold:g} %, p < {found.p:g})"


def readable(seconds: float | None) -> str:
    """4 digits and a unit."""
    if seconds is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:.4g} {unit}"


def _with(found: Comparison, *verdicts: str) -> list[Case]:
    return [case for case in found.cases if case.verdict in verdicts]


def _figures(case: Case) -> list[str]:
    ratio = "-" if case.ratio is None else f"{case.ratio:.3f}"
    return [readable(case.base_s), readable(case.head_s), ratio, "-" if case.p is None else f"{case.p:.2g}"]


def _verdict(case: Case, quoted: Callable[[str], str], bold: str = "") -> str:
    return f"{bold}{case.verdict}{bold}" + (f": {quoted(case.reason)}" if case.reason else "")


def _table(cases: Sequence[Case]) -> list[str]:
    rows = [[_cell(case.case), *_figures(case), _verdict(case, _cell, "**")] for case in cases]
    return [f"| {' | '.join(row)} |" for row in [HEADER, ["---", *["--:"] * 4, "---"], *rows]] + [""]


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def _code(text: str) -> str:
    """Any text as code, where `[a](b)` is no link, @name tells nobody and <b> is not bold."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _cell(text: str) -> str:
    """The same in a table, where | would end the cell; with a space after what would escape the escape."""
    return re.sub(r"\\(?=\|)", r"\\ ", _code(text)).replace("|", r"\|")


# The command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench.compare: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    args = parser.parse_args(argv[:end])
    options = argv[end + 1 :] + (["-k", args.select] if args.select else [])
    try:
        found = _compared(args, options)
    except KeyboardInterrupt:
        print("\nbench.compare: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(FORMATS[args.format](found))
    return found.status


def _compared(args: argparse.Namespace, options: Sequence[str]) -> Comparison:
    kinds = [trees.kind(name) for name in (args.base, args.head)]
    if kinds.count("records") == 1:
        raise ValueError(f"base is {kinds[0]}, head is {kinds[1]}: give records twice, or twice a build to measure")
    limits = {"threshold": args.threshold, "p": args.p}
    if kinds[0] == "records":
        if options or args.keep or args.launches:
            raise ValueError(
                "stored records are not measured: leave out --select, --launches, --keep and what follows --"
            )
        return compare(_read(args.base), _read(args.head), **limits)
    if args.keep and args.keep.exists():
        raise ValueError(f"{args.keep} exists; --keep takes a new folder")
    with nullcontext(args.keep) if args.keep else TemporaryDirectory() as folder:
        out, suite = Path(folder).resolve(), args.suite and args.suite.resolve()
        problems = trees.measure(
            args.base, args.head, out, launches=args.launches or LAUNCHES, options=options, suite=suite
        )
        return compare(_read(out / "base"), _read(out / "head"), **limits, problems=problems)


def _read(path: str | Path) -> list[Record]:
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        found = records.read([Path(path)])
    for warning in skipped:
        print(f"bench.compare: {warning.message}", file=sys.stderr)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench.compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Compare the speed of BASE and HEAD. Both are builds of the package (a folder it is installed in, a\n"
            "source checkout or a git revision), to be measured here in turns by the benchmarks of this checkout,\n"
            "or both are stored records (a file or a folder of *.jsonl)."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD")
    percent = lambda text: _between(text, 0, 1000) / 100
    probability = lambda text: _between(text, 1e-12, 1)
    how = f"how much larger a median is a regression ({100 * THRESHOLD:g})"
    parser.add_argument("--threshold", type=percent, default=THRESHOLD, metavar="PERCENT", help=how)
    how = f"how likely chance makes such a difference at most ({P:g})"
    parser.add_argument("--p", type=probability, default=P, metavar="P", help=how)
    parser.add_argument("--select", metavar="EXPR", help="measure only these cases, as pytest -k")
    parser.add_argument(
        "--launches", type=_count, default=None, metavar="N", help=f"pairs of processes that measure ({LAUNCHES})"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what is measured in this new folder")
    parser.add_argument("--suite", type=Path, help=argparse.SUPPRESS)
    formats = parser.add_mutually_exclusive_group()
    for name, how in (("json", "print JSON"), ("markdown", "print Markdown as GitHub has it")):
        formats.add_argument(f"--{name}", dest="format", action="store_const", const=name, default="text", help=how)
    return parser


def _between(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < most:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
