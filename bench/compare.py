"""Is a build slower than another? Measures two builds in turns, or compares records: python -m bench.compare --help"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import trees
from bench.commands import Parser, read_records
from bench.judge import THRESHOLD, VERDICTS, Case, Comparison, P, Record, compare

EXAMPLES = """
examples:
  python -m bench.compare main HEAD --select "step or noising"     two git revisions of this repository
  python -m bench.compare ../fastddpm-before . --launches 5        another checkout and this one
  python -m bench.compare base/ head/ --markdown                   folders of `pip install --target base/ --no-deps .`
  python -m bench.compare before.jsonl bench/results/nvidia-h200   stored records of the same device
  python -m bench.compare main HEAD -- -m "not compiled"           more options for pytest

exit status: 1 if a case became slower or is broken, 2 after an error or if nothing could be compared, else 0
"""
LAUNCHES = 3
HEADER = ("case", "base", "head", "ratio", "p", "verdict")


# Formats


def text(comparison: Comparison) -> str:
    """Format as tables of plain text."""
    lines = [*comparison.about, ""]
    if compared := _with(comparison, *VERDICTS[:-1]):
        rows = [HEADER, *([case.case, *_figures(case), _verdict(case, str)] for case in compared)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        for case, *figures, verdict in rows:
            aligned = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:-1], strict=True)]
            lines.append("  ".join([f"{case:<{widths[0]}}", *aligned, verdict]))
        lines.append("")
    if others := _with(comparison, "not compared"):
        lines += ["not compared:", *(f"  {case.case}: {case.reason}" for case in others), ""]
    for problem in comparison.problems:
        lines += [problem, ""]
    return "\n".join([*lines, summary(comparison)])


def as_json(comparison: Comparison) -> str:
    """Format all figures and the exit status."""
    return json.dumps(asdict(comparison) | {"summary": summary(comparison), "status": comparison.status}, indent=1)


def markdown(comparison: Comparison) -> str:
    """Format as a comment for a pull request: changes are visible, the rest is folded."""
    lines = [f"**{summary(comparison)}**", "", *(f"- {_code(line)}" for line in comparison.about), ""]
    for problem in comparison.problems:
        first, *output = problem.splitlines()
        lines += [f"**{_code(first)}**", "", *(f"    {line}" for line in output), ""]
    if changed := _with(comparison, "broken", "slower", "too few samples", "faster"):
        lines += _table(changed)
    if unchanged := _with(comparison, "unchanged"):
        lines += _folded(f"{len(unchanged)} unchanged", _table(unchanged))
    if others := _with(comparison, "not compared"):
        lines += _folded(f"{len(others)} not compared", [f"- {_code(c.case)}: {_code(c.reason)}" for c in others])
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Comparison], str]] = {"text": text, "json": as_json, "markdown": markdown}


def summary(comparison: Comparison) -> str:
    """Return one line that counts the verdicts."""
    counts = Counter(case.verdict for case in comparison.cases)
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]) or "no cases"
    return f"{listed} (threshold {100 * comparison.threshold:g} %, p < {comparison.p:g})"


def readable(seconds: float | None) -> str:
    """Format with 4 digits and a unit."""
    if seconds is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:.4g} {unit}"


def _with(comparison: Comparison, *verdicts: str) -> list[Case]:
    return [case for case in comparison.cases if case.verdict in verdicts]


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
    """Quote any text as code, in which `[a](b)` is not a link, @name notifies nobody and <b> is not bold."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _cell(text: str) -> str:
    """Quote any text as code in a table cell: escape |, and keep a backslash before it from escaping the escape."""
    return re.sub(r"\\(?=\|)", r"\\ ", _code(text)).replace("|", r"\|")


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns: the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    args = parser.parse_args(argv[:end])
    options = argv[end + 1 :] + (["-k", args.select] if args.select else [])
    try:
        comparison = _comparison_of(args, options)
    except KeyboardInterrupt:
        print("\nbench.compare: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(FORMATS[args.format](comparison))
    return comparison.status


def _comparison_of(args: argparse.Namespace, options: Sequence[str]) -> Comparison:
    kinds = [trees.kind(name) for name in (args.base, args.head)]
    if kinds.count("records") == 1:
        raise ValueError(f"base is {kinds[0]}, head is {kinds[1]}; want records for both, or a build for both")
    limits = {"threshold": args.threshold, "p": args.p}
    if kinds[0] == "records":
        if options or args.keep or args.launches:
            raise ValueError(
                "stored records are not measured again; leave out --select, --launches, --keep and options after --"
            )
        return compare(_read(args.base), _read(args.head), **limits)
    if args.keep and args.keep.exists():
        raise ValueError(f"--keep is {args.keep}, which exists; want a new folder")
    with nullcontext(args.keep) if args.keep else TemporaryDirectory() as folder:
        out, suite = Path(folder).resolve(), args.suite and args.suite.resolve()
        problems = trees.measure(
            args.base, args.head, out, launches=args.launches or LAUNCHES, options=options, suite=suite
        )
        return compare(_read(out / "base"), _read(out / "head"), **limits, problems=problems)


def _read(path: str | Path) -> list[Record]:
    return read_records([Path(path)], "bench.compare")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Compare the speed of BASE and HEAD. Both are builds of the package (a folder it is installed in, a\n"
            "source checkout or a git revision), which the benchmarks of this checkout measure in turns on this\n"
            "machine. Or both are stored records (a file or a folder of *.jsonl).\n\n"
            "The benchmarks of this checkout must be able to import both builds. They cannot import builds from\n"
            "before the package was divided into folders (fastddpm.core and so on): for such a build, run make\n"
            "bench in a checkout of each revision, and compare the records."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD")
    percent = lambda text: _between(text, 0, 1000) / 100
    probability = lambda text: _between(text, 1e-12, 1)
    text = f"ignore differences of medians up to this ({100 * THRESHOLD:g})"
    parser.add_argument("--threshold", type=percent, default=THRESHOLD, metavar="PERCENT", help=text)
    text = f"ignore differences with this p-value or a larger one ({P:g})"
    parser.add_argument("--p", type=probability, default=P, metavar="P", help=text)
    parser.add_argument("--select", metavar="EXPR", help="measure only these cases, as with pytest -k")
    parser.add_argument("--launches", type=_count, metavar="N", help=f"pairs of processes to start ({LAUNCHES})")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep records and logs in this new folder")
    parser.add_argument("--suite", type=Path, help=argparse.SUPPRESS)
    formats = parser.add_mutually_exclusive_group()
    for name, text in (("json", "print JSON"), ("markdown", "print Markdown for GitHub")):
        formats.add_argument(f"--{name}", dest="format", action="store_const", const=name, default="text", help=text)
    return parser


def _between(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
