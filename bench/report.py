"""One HTML page of all records, which asks nothing of the network: python -m bench.report --help

Everything is in the page without its script, which adds tooltips and a filter.
"""

import argparse
import math
import os
import sys
import warnings
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from bench import records
from bench.chart import (
    BYTES,
    SECONDS,
    Markup,
    Plot,
    Scale,
    bar,
    figure,
    linear,
    logarithmic,
    percent,
    quantity,
    stretched,
    tag,
)
from bench.history import Case, Device, Record, Result, by, ceilings, devices, doubts, when

Entry = tuple[Case, Result]

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LONGEST = 40  # points of a history, the latest
WIDE = ("fp32", "tf32")  # hollow points of a roofline
RACES = (
    "The best comes first. The last column compares our contender of the same engine and precision, or else our best. "
    "Sampling is timed by the step, and images/s are of 1,000 steps."
)
DASHED = "Dashed bars are invalid results."
APART = 18  # pixels between the labels of two roofs
MACHINE = {
    "gpu": "GPU", "gpu_memory_gb": "GPU memory, GB", "l2_mb": "L2 cache, MB", "driver": "driver", "cpu": "CPU",
    "threads": "threads", "python": "Python", "torch": "PyTorch", "triton": "Triton", "cuda": "CUDA", "cudnn": "cuDNN",
    "diffusers": "diffusers",
}  # fmt: skip


# The page


def page(found: Sequence[Record]) -> str:
    """The whole HTML page."""
    style, script = (Markup((HERE / f"report.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    sources = [f"{kind}-src {_hash(text)}" for kind, text in (("style", style), ("script", script))]
    policy = "; ".join(["default-src 'none'", *sources, "img-src data:", "base-uri 'none'", "form-action 'none'"])
    on = devices(found)
    runs = len({(record["device"], record["run"]) for record in found})
    summary = f"{len(found):,} records of {runs} run{'s' * (runs != 1)}, the latest of {when(found[-1]['run'])} UTC"
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
        "beside others": _races(device),
        "history": _history(device),
        "share of the ceiling": _shares(device),
        "roofline": _roofline(device),
        "numbers": _tables(device),
    }
    ids = {title: f"{title.split()[0]}-{number}" for title in parts}
    links = [tag("a", title.capitalize(), href=f"#{ids[title]}") for title in parts if title != "machine"]
    run = Result(device.latest)
    head = tag("p", f"{run.commit}, {run.when} UTC", class_="soft")
    inside = [
        tag("section", tag("h3", title.capitalize()) if title != "machine" else None, *content, id=ids[title])
        for title, content in parts.items()
    ]
    heading = tag("div", tag("h2", device.name), head, tag("div", *links, class_="links"), class_="head")
    return tag("section", heading, *inside, class_="device", id=f"device-{number}")


def _folded(function: str, cases: Sequence[Case], *content: Markup) -> Markup:
    """The cases of a function, under its name."""
    module, _, name = function.partition("::")
    many = f"{len(cases)} case{'s' * (len(cases) != 1)}"
    summary = tag(
        "summary",
        tag("h4", name.removeprefix("test_").replace("_", " ")),
        tag("span", f"{module}, {many}", class_="soft"),
    )
    return tag("details", summary, *content, class_="group", open_="")


def _table(head: Sequence[str], *bodies: Iterable[Markup], kind: str, caption: Markup | None = None) -> Markup:
    columns = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in head)))
    return tag("table", caption, columns, *(tag("tbody", *rows) for rows in bodies), class_=kind)


# The machine


def _machine(device: Device) -> list[Markup]:
    results = [(case, result) for case in device.cases if (result := case.of(device.run))]
    states = Counter(result.state for _, result in results)
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
        _tile("cases", f"{len(results)}"),
        *(_tile(state, f"{states[state]}", state) for state in ("failed", "invalid", "skipped")),
    ]
    reached = [
        _tile(f"{name} ceiling", figure(rate), unit="GB/s" if name == "copy" else "TFLOP/s")
        for name, rate in ceilings(device.latest).items()
    ]
    trouble = [
        tag("li", tag("b", case.name), " ", result.trouble, class_=result.state, data_case=case.words)
        for case, result in results
        if result.state in ("failed", "invalid")
    ]
    beside = [
        tag("div", *counts, class_="tiles"),
        tag("div", *reached, class_="tiles") if reached else None,
        _doubts(device.latest),
        tag("ul", *trouble, class_="trouble") if trouble else None,
    ]
    about = tag("table", tag("caption", "Machine"), tag("tbody", *facts), class_="facts")
    return [tag("div", tag("div", *beside), about, class_="overview")]


def _tile(label: str, value: str, state: str = "", unit: str = "") -> Markup:
    number = tag("b", value, tag("small", f" {unit}") if unit else None)
    return tag("div", tag("span", label), number, class_=f"tile {state if value != '0' else ''}".rstrip())


def _doubts(record: Record) -> Markup | None:
    """A warning, where the ceilings of a run are not to be trusted."""
    if found := doubts(record):
        return tag("p", f"The ceilings of this run are not to be trusted: {'; '.join(found)}.", class_="why invalid")
    return None


def _float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


# Contenders beside each other


def _races(device: Device) -> list[Markup]:
    groups = by(attrgetter("group"), (case for case in device.cases if case.group))
    found = [race for group, cases in groups.items() if (race := _race(group, cases, device.run))]
    found.sort(key=lambda race: not race[0])
    if not found:
        return [tag("p", "No run has measured one of ours and another at the same work.", class_="soft")]
    return [tag("p", f"{RACES} {DASHED}", class_="soft"), *(card for _, card in found)]


def _race(group: str, cases: Sequence[Case], latest: str) -> tuple[bool, Markup] | None:
    """(whether it makes images, its card): of the latest run that has measured one of ours and another."""
    runs = [{r.record["run"] for c in cases if c.ours == ours for r in c.ran if r.quartiles} for ours in (True, False)]
    run = max(runs[0] & runs[1], default=None)
    if run is None:
        return None
    entries = [(case, result) for case in cases if (result := case.of(run)) in case.ran]
    entries.sort(key=lambda entry: entry[1].median if entry[1].quartiles else math.inf)
    best, rival = (next((e for e in entries if e[1].valid and e[0].ours == ours), None) for ours in (True, False))
    memory, most = not entries[0][1].timed, max(result.median for _, result in entries if result.quartiles)
    caption = [tag("h4", group)]
    if best and rival:
        caption.append(_claim(best, rival, memory))
    if run != latest:
        caption.append(tag("p", f"{entries[0][1].commit}, {entries[0][1].when} UTC", class_="soft"))
    images = any(result.images for _, result in entries)
    what = ["peak memory"] if memory else ["time", *(["images/s"] if images else []), "of the ceiling"]
    rows = []
    for case, result in entries:
        beside = _beside(case, result, entries, best) if best and result.valid and not case.ours else ""
        rows.append(_contender(case, result, most, beside, images=images, memory=memory))
    table = _table(["contender", "", *what, "ours beside it"], rows, kind="race", caption=tag("caption", *caption))
    return images, tag("article", table, class_="card", data_case=" ".join(case.words for case, _ in entries))


def _claim(best: Entry, rival: Entry, memory: bool) -> Markup:
    """How our best compares with the best of the others."""
    (ours, mine), (other, theirs) = best, rival
    if memory:
        ratio = mine.median / theirs.median
        difference = f"{percent(abs(ratio - 1))} {'less' if ratio < 1 else 'more'}"
        text = f"{ours.title} takes ", f" the memory of {other.title}, the smallest other: {difference}"
    else:
        ratio = theirs.median / mine.median
        text = f"{ours.title} is ", f" as fast as {other.title}, the fastest other"
    better = mine.median < theirs.median
    number = tag("b", f"{figure(ratio)} ×")
    return tag("p", text[0], number, text[1], class_="claim" if better else "claim slower")


def _beside(case: Case, result: Result, entries: Iterable[Entry], best: Entry) -> str:
    """How one of ours compares with it: that of the same engine and precision, or else our best."""
    mates = (entry for entry in entries if entry[0].ours and entry[1].valid and entry[0].variant == case.variant)
    mate, own = next(mates, best)
    who = f"our {mate.variant}" if mate.variant else "ours"
    if result.timed:
        return f"{who} is {figure(result.median / own.median)} × as fast"
    return f"{who} takes {figure(own.median / result.median)} ×"


def _contender(case: Case, result: Result, most: float, beside: str, *, images: bool, memory: bool) -> Markup:
    share = ""
    if result.timed and result.record["shares"]:
        unit, of = max(result.record["shares"].items(), key=lambda item: item[1]["share"])
        share = f"{percent(of['share'])} of {result.ceiling(unit)}"
    kind = f"{case.kind} {result.state}"
    cells = [
        tag("th", case.title, scope="row"),
        tag("td", bar(result.median / most, kind) if result.quartiles else None, _why(result)),
        tag("td", result.said() if result.quartiles else "", class_="time"),
        tag("td", figure(result.images) if result.images else "", data_unit="images/s") if images else None,
        None if memory else tag("td", share, data_unit="ceiling"),
        tag("td", beside, class_="beside"),
    ]
    return tag("tr", *cells, class_=case.kind)


def _why(result: Result) -> Markup | None:
    return tag("p", result.trouble, class_=f"why {result.state}") if result.trouble else None


# History


def _history(device: Device) -> list[Markup]:
    key = Plot(linear(0, 1), linear(0, 1), 12)
    legend = [
        _legend("median", key.line([(0, 0.5), (1, 0.5)], "ours"), key.mark(0.5, 0.5, "ours", "a median")),
        _legend("quartiles", key.band([(0, 0), (1, 0)], [(0, 1), (1, 1)], "ours")),
        _legend("invalid", key.mark(0.5, 0.5, "ours invalid", "an invalid one")),
        _legend("failed", key.mark(0.5, 0.5, "failed", "a failure")),
        _legend("the case changed: not comparable", key.upright(0.5, "changed")),
        tag("span", tag("b", "%"), "since the one before"),
        tag("span", tag("b", "*"), "the commit had changes"),
    ]
    if any(len(case.ran) > LONGEST for case in device.cases):
        legend.append(tag("span", f"the latest {LONGEST} of each case"))
    groups = []
    for function, cases in device.functions.items():
        if ran := [case for case in cases if case.ran]:
            groups.append(_folded(function, ran, tag("div", *map(_card, ran), class_="cards")))
    return [tag("p", *legend, class_="legend"), *groups]


def _legend(text: str, *parts: Markup) -> Markup:
    """A line or band stretched, or a mark, before its name."""
    paths = [part for part in parts if part.startswith("<path")]
    marks = [part for part in parts if part not in paths]
    return tag("span", tag("svg", stretched(paths, 12), *marks, width=24, height=12, aria_hidden="true"), text)


def _card(case: Case) -> Markup:
    """Small: the latest figure of a case, how it differs from the one before, and all of them over commits."""
    points = case.ran[-LONGEST:]
    last = points[-1]
    before = next((r for r in reversed(points[:-1]) if r.valid and r.record["hash"] == last.record["hash"]), None)
    change = ""
    if before and last.valid:
        percents = round(100 * (last.median / before.median - 1), 1)
        change = f"{percents:+} %".replace("-", "−") if percents else "0 %"
    head = tag("div", tag("h5", case.title), tag("b", last.said()), class_="ends")
    about = tag("div", tag("span", case.group or ""), tag("span", change), class_="ends soft")
    return tag("article", head, about, _why(last), _timeline(case, points), class_="card", data_case=case.words)


def _timeline(case: Case, points: Sequence[Result]) -> Markup:
    n = len(points)
    values = [value for r in points if r.quartiles for value in (r.quartiles if r.valid else (r.median,))]
    low, high = (min(values), max(values)) if values else (0, 1)
    if high - low < 0.2 * high:  # noise is not to fill the chart
        low, high = min(low, 0.45 * (low + high)), max(high, 0.55 * (low + high))
    y = logarithmic(low, high, 6) if 0 < 10 * low < high else linear(low, high, 5)
    plot = Plot(Scale((-0.5, n - 0.5)), y, 96)
    changes = [at for at in range(1, n) if points[at].record["hash"] != points[at - 1].record["hash"]]
    paths, marks = [], [plot.upright(at - 0.5, "changed") for at in changes]
    for begin, end in zip([0, *changes], [*changes, n], strict=True):
        valid = [(at, points[at]) for at in range(begin, end) if points[at].valid]
        lower, middle, upper = ([(at, r.quartiles[q]) for at, r in valid] for q in range(3))
        if len(valid) > 1:
            paths += [plot.band(lower, upper, case.kind), plot.line(middle, case.kind)]
        elif valid:
            marks.append(plot.upright(valid[0][0], f"stroke {case.kind}", lower[0][1], upper[0][1]))
    for at, result in enumerate(points):
        height = result.median if result.quartiles else y.ticks[0]
        marks.append(plot.mark(at, height, f"{case.kind} {result.state}", result.about()))
    units = next((r.units for r in points if r.quartiles), SECONDS)
    return tag(
        "div",
        plot.svg(
            paths,
            marks,
            label=f"{case.name}: {n} run{'s' * (n != 1)}, the latest {points[-1].said(4)} at {points[-1].commit}",
            x_labels=[(at, points[at].commit) for at in range(n - 1, -1, -math.ceil(n / 4))],
            y_labels=y.labels(units) if values else [""] * len(y.ticks),
        ),
        class_="box",
    )


# Shares of the ceilings


def _shares(device: Device) -> list[Markup]:
    shown = [case for case in device.cases if case.last.timed and case.last.record["shares"]]
    if not shown:
        return [tag("p", "No case tells what it moves or computes.", class_="soft")]
    groups = []
    for function, cases in by(attrgetter("function"), shown).items():
        found = {unit: of["share"] for case in cases for unit, of in case.last.record["shares"].items()}
        units, bodies = [unit for unit in ("GB/s", "TFLOP/s") if unit in found], []
        limit = 1 / min(max(1, *(of["share"] for case in cases for of in case.last.record["shares"].values())), 1.5)
        for group, members in by(attrgetter("group"), cases).items():
            heading = tag("th", group, colspan=1 + len(units), scope="rowgroup", class_="soft")
            rows = [_share(case, units, limit) for case in members]
            bodies.append([tag("tr", heading), *rows] if group else rows)
        groups.append(_folded(function, cases, _table(["case", *units], *bodies, kind="shares")))
    text = "Of the rate of a copy, and of a matrix product in the same precision, measured in the same run."
    intro = tag("p", f"{text} {DASHED}", class_="soft")
    return [part for part in (intro, _doubts(device.latest), tag("div", *groups, class_="card")) if part]


def _share(case: Case, units: Sequence[str], limit: float) -> Markup:
    cells = []
    for unit in units:
        parts = []
        if of := case.last.record["shares"].get(unit):
            share, rate = percent(of["share"]), f"{figure(of['rate'])} {unit}"
            label = f"{share} of {case.last.ceiling(unit)}, {rate}"
            parts.append(bar(of["share"] * limit, f"{case.kind} {case.last.state}", label, limit=limit))
            parts.append(tag("span", tag("b", share), f" {rate}"))
        cells.append(tag("td", tag("div", *parts)))
    return tag("tr", tag("th", case.title, scope="row"), *cells, data_case=case.words)


# Roofline


def _roofline(device: Device) -> list[Markup]:
    """Log-log: the roofs are straight. Of the latest run with something to draw."""
    told = [(case, r) for case in device.cases for r in case.results if min(r.record["flops"], r.record["bytes"]) > 0]
    if not told:
        return [tag("p", "No case tells both what it moves and what it computes.", class_="soft")]
    run = max((result.record["run"] for _, result in told if result.timed and result.valid), default=None)
    if run is None:
        return [tag("p", "No case that tells what it moves and computes has a valid time.", class_="soft")]
    points = [
        (result.record["flops"] / result.record["bytes"], result.record["flops"] / result.median / 1e12, case, result)
        for case, result in told
        if result.record["run"] == run and result.timed and result.valid
    ]
    own = points[-1][-1]
    ceilings_ = ceilings(own.record)
    copy = ceilings_.pop("copy", 0) / 1e3  # TFLOP/s at one FLOP per byte
    if not copy or not ceilings_:
        return [tag("p", f"The run of {own.when} UTC tells no ceilings.", class_="soft")]
    across = [x for x, *_ in points] + [rate / copy for rate in ceilings_.values()]
    up, peak = [y for _, y, *_ in points] + list(ceilings_.values()), max(ceilings_.values())
    plot = Plot(logarithmic(min(across) / 2, 3 * max(across)), logarithmic(min(up) / 1.5, 1.2 * max(up)), 400)
    left, right, bottom = plot.x.ticks[0], plot.x.ticks[-1], plot.y.ticks[0]
    begin = max(left, bottom / copy)
    paths = [plot.line([(begin, begin * copy), (peak / copy, peak)], "roof")] if begin < peak / copy else []
    at = begin * max(peak / copy / begin, 1) ** 0.1  # clear of the axes
    labels = [plot.text(at, at * copy, f"copy {figure(1e3 * copy)} GB/s", "roof slope")]
    near: list[list[tuple[float, str]]] = []  # roofs too close for a label each
    for rate, name in sorted((rate, name) for name, rate in ceilings_.items()):
        paths.append(plot.line([(max(rate / copy, left), rate), (right, rate)], "roof"))
        if near and plot.place(left, near[-1][-1][0])[1] - plot.place(left, rate)[1] < APART:
            near[-1].append((rate, name))
        else:
            near.append([(rate, name)])
    for roofs in near:
        text = ", ".join(f"{name} {figure(rate)}" for rate, name in reversed(roofs))
        labels.append(plot.text(right, roofs[-1][0], f"{text} TFLOP/s", "roof"))
    marks = []
    for x, y, case, result in sorted(points, key=lambda point: point[2].ours):  # ours over others
        title = f"{case.name}\n{figure(y)} TFLOP/s at {figure(x)} FLOP/byte\n{result.about()}"
        wide = " wide" * (result.record["precision"] in WIDE)
        marks.append(plot.mark(x, y, f"{case.kind} passed{wide}", title, case.words))
    drawn = plot.svg(
        paths,
        marks + labels,
        label=f"Roofline of {device.name}: TFLOP/s over FLOP per byte, {len(points)} cases",
        x_labels=zip(plot.x.ticks, plot.x.labels(), strict=True),
        y_labels=plot.y.labels(),
    )
    key = Plot(linear(0, 1), linear(0, 1), 12)
    legend = [
        _legend("fastddpm", key.mark(0.5, 0.5, "ours passed", "one of ours")),
        _legend("others", key.mark(0.5, 0.5, "other passed", "another")),
        _legend(" and ".join(WIDE), key.mark(0.5, 0.5, "ours passed wide", "one in 32 bits")),
        _legend("what a copy and a matrix product reached", key.line([(0, 0.5), (1, 0.5)], "roof")),
    ]
    axes = tag("p", "TFLOP/s", class_="axis"), tag("p", "FLOP per byte", class_="axis end")
    chart = tag("div", axes[0], tag("div", drawn, class_="box"), axes[1], class_="card roofline")
    older = tag("p", f"{own.commit}, {own.when} UTC", class_="soft") if run != device.run else None
    return [part for part in (older, _doubts(own.record), tag("p", *legend, class_="legend"), chart) if part]


# Tables

NUMBERS = (
    "case", "contender", "median", "quartiles", "rounds × calls", "GB/s", "of copy", "TFLOP/s", "of matmul", "images/s",
    "FLOP/byte", "timed", "gate", "machine meanwhile", "facts", "commit", "notes",
)  # fmt: skip
PAST = ("case", "commit", "run (UTC)", "source", "median", "quartiles", "rounds", "notes")
RUNS = (
    "run (UTC)", "commit", "cases", "failed", "invalid", "skipped", "PyTorch", "Triton", "driver",
    "ceilings: GB/s, TFLOP/s",
)  # fmt: skip
MEANWHILE = (
    ("clock_sm_mhz", "median", "MHz"), ("power_w", "median", "W"), ("temperature_c", "max", "°C"),
    ("memory_used_gb", None, "GB"), ("energy_j", None, "J"), ("cpu_others", None, "cores of other work"),
)  # fmt: skip
FACTS = {"s": lambda v: quantity(v, SECONDS), "bytes": lambda v: quantity(v, BYTES), "j": lambda v: f"{figure(v)} J"}


def _tables(device: Device) -> list[Markup]:
    latest, runs = [], {}
    for function, cases in device.functions.items():
        title = tag("tr", tag("th", function, colspan=len(NUMBERS), scope="rowgroup"))
        latest.append([title, *(_numbers(case, device.run) for case in cases)])
        for result in (result for case in cases for result in case.results):
            runs.setdefault(result.record["run"], []).append(result)
    past = [_past(case, result) for case in device.cases for result in reversed(case.results[-LONGEST:])]
    cut = f", the latest {LONGEST} of each case" * any(len(case.results) > LONGEST for case in device.cases)
    return [
        _wide("The latest of each case", _table(NUMBERS, *latest, kind="numbers latest"), open_=""),
        _wide("All runs", _table(RUNS, [_run(runs[run]) for run in sorted(runs, reverse=True)], kind="numbers runs")),
        _wide(f"All medians{cut}", _table(PAST, past, kind="numbers past")),
    ]


def _wide(title: str, table: Markup, **state: str) -> Markup:
    """A table that scrolls in its own box."""
    box = {"class_": "card scroll", "tabindex": 0, "role": "region", "aria_label": title}
    return tag("details", tag("summary", tag("h4", title)), tag("div", table, **box), class_="group", **state)


def _row(case: Case | None, *cells: str) -> Markup:
    first = [tag("th", case.name, scope="row")] if case else []
    return tag("tr", *first, *(tag("td", cell) for cell in cells), data_case=case and case.words)


def _numbers(case: Case, run: str) -> Markup:
    result, record, now = case.last, case.last.record, case.of(run)
    notes = [result.trouble]
    if now != result:
        notes.insert(0, f"in the latest run {now.trouble or 'nothing measured'}" if now else "not in the latest run")
    of = [record["shares"].get(unit) for unit in ("GB/s", "TFLOP/s")]
    return _row(
        case,
        case.contender or "",
        f"{result.said(4)}{'' if result.state == 'passed' else f', {result.state}'}",
        result.spread(),
        f"{len(record['samples_s'])} × {record['calls']}" if result.timed else "",
        *(text for one in of for text in ((figure(one["rate"]), percent(one["share"])) if one else ("", ""))),
        figure(result.images) if result.images else "",
        figure(record["flops"] / record["bytes"]) if record["bytes"] > 0 and record["flops"] > 0 else "",
        ", ".join(filter(None, [record["clock"], record["cache"], record["precision"]])),
        _gate(record["errors"]),
        _meanwhile(record["watch"]),
        "; ".join(_facts(record["facts"])),
        f"{result.commit}, {result.when}",
        "; ".join(filter(None, notes)),
    )


def _past(case: Case, result: Result) -> Markup:
    rounds = f"{len(result.record['samples_s'])}" if result.timed else ""
    about = result.commit, result.when, result.record["hash"], result.said(4), result.spread(), rounds
    return _row(case, *about, result.trouble or "")


def _run(results: Sequence[Result]) -> Markup:
    first, states = results[0], Counter(result.state for result in results)
    versions = [str(first.record["machine"].get(name) or "–") for name in ("torch", "triton", "driver")]
    counts = [f"{states[state]}" for state in ("failed", "invalid", "skipped")]
    ceilings = ", ".join(f"{name} {figure(rate)}" for name, rate in first.record["ceilings"].items())
    return _row(None, first.when, first.commit, f"{len(results)}", *counts, *versions, ceilings)


def _gate(errors: dict[str, Any] | None) -> str:
    """The errors it found, and what they may be."""
    found = []
    for name, of in (errors or {}).items():
        judged = isinstance(of, dict) and records.number(of.get("error")) and records.number(of.get("bound"))
        found.append(f"{name} {figure(of['error'], 2)} of {figure(of['bound'], 2)}" if judged else f"{name} {of}")
    return ", ".join(found)


def _meanwhile(watch: dict[str, Any]) -> str:
    """The main facts of what the machine did."""
    found = []
    for name, which, unit in MEANWHILE:
        value = watch.get(name)
        value = value.get(which) if isinstance(value, dict) else value
        if records.number(value):
            found.append(f"{figure(value)} {unit}")
    throttle = watch.get("throttle")
    shares = throttle.items() if isinstance(throttle, dict) else ()
    return ", ".join(found + [f"{reason} {percent(share)}" for reason, share in shares if records.number(share)])


def _facts(facts: dict[str, Any], kind: str = "") -> Iterator[str]:
    """Numbers, texts, dicts of numbers and the medians of lists of them, in the units that end their names."""
    for key, value in facts.items():
        name, _, suffix = key.rpartition("_")
        name = (name if suffix in FACTS else key).replace("_", " ")
        if records.number(value):
            yield f"{name} {FACTS.get(kind or suffix, lambda v: figure(v, 4))(value)}"
        elif isinstance(value, str):
            yield f"{name} {value}"
        elif _parts(value):
            yield f"{name}: {', '.join(_facts(value, suffix))}"
        elif isinstance(value, list) and value and all(map(_parts, value)):
            medians = {key: median(parts[key] for parts in value if key in parts) for key in value[-1]}
            yield f"{name}, medians: {', '.join(_facts(medians, suffix))}"


def _parts(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(records.number, value.values()))


# The command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench.report: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = _Parser(prog="python -m bench.report", description="Write all records as one HTML page.")
    default = RESULTS / "report.html"
    parser.add_argument("records", metavar="RECORDS", nargs="*", type=Path, help=f"files or folders ({RESULTS})")
    parser.add_argument("--out", metavar="FILE", type=Path, default=default, help="the page (%(default)s)")
    args = parser.parse_args(argv)
    places = args.records or [RESULTS]
    try:
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder; want a file, such as {args.out / default.name}")
        found = _read(places)
        if not found:
            raise ValueError(f"no records in {', '.join(map(str, places))}; make bench adds some to bench/results")
        write(args.out, page(found))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(args.out)
    return 0


def _read(places: Iterable[Path]) -> list[Record]:
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        found = records.read(places)
    for warning in skipped:
        print(f"bench.report: {warning.message}", file=sys.stderr)
    return found


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a reason may hold half a character
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
