"""One HTML page of all records, which loads nothing from the network: python -m bench.report --help

The page is complete without its script, which adds tooltips and a filter.
"""

import math
import os
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench import report_charts, report_tables
from bench.chart import Markup, figure, tag
from bench.commands import Parser, read_records
from bench.history import Case, Device, Record, Result, ceilings, devices, when
from bench.report_parts import counted, doubts_note

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MACHINE = {
    "gpu": "GPU", "gpu_memory_gb": "GPU memory, GB", "l2_mb": "L2 cache, MB", "driver": "driver", "cpu": "CPU",
    "threads": "threads", "python": "Python", "torch": "PyTorch", "triton": "Triton", "cuda": "CUDA", "cudnn": "cuDNN",
    "diffusers": "diffusers",
}  # fmt: skip


# The page


def page(found: Sequence[Record]) -> str:
    """Return the HTML page."""
    style, script = (Markup((HERE / f"report.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    sources = [f"{kind}-src {_hash(text)}" for kind, text in (("style", style), ("script", script))]
    policy = "; ".join(["default-src 'none'", *sources, "img-src data:", "base-uri 'none'", "form-action 'none'"])
    on = devices(found)
    runs = counted(len({(record["device"], record["run"]) for record in found}), "run")
    summary = f"{counted(len(found), 'record')} of {runs}, the latest of {when(found[-1]['run'])} UTC"
    links = [tag("a", device.name, href=f"#device-{number}") for number, device in enumerate(on, 1)]
    filter_ = Markup(
        '<label id="filter" hidden>Filter <input type="search" placeholder="step bf16" autocomplete="off"'
        ' spellcheck="false"></label><output id="count"></output>'
    )
    body = [
        tag("header", tag("h1", "fastddpm", tag("span", " benchmarks")), tag("p", summary, class_="soft")),
        tag("nav", tag("div", *links, class_="links"), filter_, aria_label="Devices"),
        tag("main", *(_section(device, number) for number, device in enumerate(on, 1))),
        tag("script", script),
    ]
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", "fastddpm benchmarks"),
        tag("style", style),
    ]
    html = tag("html", tag("head", *head), tag("body", *body), lang="en")
    return f"<!doctype html>\n{html}\n"


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _section(device: Device, number: int) -> Markup:
    parts = {
        "machine": _machine(device),
        "beside others": report_tables.races(device),
        "history": report_charts.history(device),
        "share of the ceiling": report_charts.shares(device),
        "roofline": report_charts.roofline(device),
        "numbers": report_tables.tables(device),
    }
    ids = {title: f"{title.split()[0]}-{number}" for title in parts}
    links = [tag("a", title.capitalize(), href=f"#{ids[title]}") for title in parts if title != "machine"]
    run, results = Result(device.latest), [result for case in device.cases for result in case.results]
    runs = counted(len({result.record["run"] for result in results}), "run")
    about = f"{counted(len(results), 'record')} of {runs}, the latest of {run.commit} on {run.when} UTC"
    head = tag("p", about, class_="soft")
    inside = [
        tag("section", tag("h3", title.capitalize()) if title != "machine" else None, *content, id=ids[title])
        for title, content in parts.items()
    ]
    heading = tag("div", tag("h2", device.name), head, tag("div", *links, class_="links"), class_="head")
    return tag("section", heading, *inside, class_="device", id=f"device-{number}")


# The machine


def _machine(device: Device) -> list[Markup]:
    states = Counter(case.last.state for case in device.cases)
    machine = {**dict.fromkeys(MACHINE), **device.latest["machine"]}
    facts = [
        tag(
            "tr",
            tag("th", MACHINE.get(key, key), scope="row"),
            tag("td", figure(value, 4) if _float(value) else str(value)),
        )
        for key, value in machine.items()
        if value is not None
    ]
    counts = [
        _tile("cases", f"{len(device.cases)}"),
        *(_tile(state, f"{states[state]}", state) for state in ("failed", "invalid", "skipped")),
    ]
    reached = [
        _tile(f"{name} ceiling", figure(rate), unit="GB/s" if name == "copy" else "TFLOP/s")
        for name, rate in ceilings(device.latest).items()
    ]
    trouble = [_trouble(case, device.run) for case in device.cases if case.last.state in ("failed", "invalid")]
    beside = [
        tag("div", *counts, class_="tiles"),
        tag("div", *reached, class_="tiles") if reached else None,
        doubts_note(device.latest),
        tag("ul", *trouble, class_="trouble") if trouble else None,
    ]
    about = tag("table", tag("caption", "Machine"), tag("tbody", *facts), class_="facts")
    return [tag("div", tag("div", *beside), about, class_="overview")]


def _trouble(case: Case, latest: str) -> Markup:
    """Return why the latest result of a case is no figure, and of which run it is, unless of the latest."""
    result = case.last
    older = "" if result.record["run"] == latest else f" ({result.commit}, {result.when} UTC)"
    return tag("li", tag("b", case.name), f" {result.trouble}{older}", class_=result.state, data_case=case.words)


def _tile(label: str, value: str, state: str = "", unit: str = "") -> Markup:
    number = tag("b", value, tag("small", f" {unit}") if unit else None)
    return tag("div", tag("span", label), number, class_=f"tile {state if value != '0' else ''}".rstrip())


def _float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns: the exit status."""
    parser = Parser(prog="python -m bench.report", description="Write all records as one HTML page.")
    default = RESULTS / "report.html"
    parser.add_argument("records", metavar="RECORDS", nargs="*", type=Path, help=f"files or folders ({RESULTS})")
    parser.add_argument("--out", metavar="FILE", type=Path, default=default, help="the page (%(default)s)")
    args = parser.parse_args(argv)
    places = args.records or [RESULTS]
    try:
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder; want a file, such as {args.out / default.name}")
        found = read_records(places, parser.name)
        if not found:
            raise ValueError(f"no records in {', '.join(map(str, places))}; make bench writes some to bench/results")
        write(args.out, page(found))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(args.out)
    return 0


def write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a reason may contain half a character
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
