"""The report's charts: histories over commits, shares of the ceilings, and the roofline."""

import math
from collections.abc import Sequence
from operator import attrgetter

from bench.chart import SECONDS, Markup, Plot, Scale, bar, figure, linear, logarithmic, percent, tag
from bench.history import Case, Device, Result, ceilings, group_by
from bench.report_parts import (
    DASHED,
    LONGEST,
    counted,
    doubts_note,
    folded_cases,
    html_table,
    legend_entry,
    trouble_note,
)

WIDE = ("fp32", "tf32")  # hollow points of a roofline
APART = 18  # pixels between the labels of two roofs
FEW = 2  # a history of so few points is folded: it shows no trend

# History


def history(device: Device) -> list[Markup]:
    key = Plot(linear(0, 1), linear(0, 1), 12)
    legend = [
        legend_entry("median", key.line([(0, 0.5), (1, 0.5)], "ours"), key.mark(0.5, 0.5, "ours", "a median")),
        legend_entry("quartiles", key.band([(0, 0), (1, 0)], [(0, 1), (1, 1)], "ours")),
        legend_entry("invalid", key.mark(0.5, 0.5, "ours invalid", "an invalid one")),
        legend_entry("failed", key.mark(0.5, 0.5, "failed", "a failure")),
        legend_entry("the case changed: not comparable", key.upright(0.5, "changed")),
        tag("span", tag("b", "%"), "change from the run before"),
        tag("span", tag("b", "*"), "the tree had uncommitted changes"),
    ]
    if any(len(case.ran) > LONGEST for case in device.cases):
        legend.append(tag("span", f"the latest {LONGEST} of each case"))
    groups = []
    for function, cases in device.functions.items():
        for few in (False, True):
            if shown := [case for case in cases if case.ran and (len(case.ran) <= FEW) == few]:
                groups.append(_histories(function, shown, unfolded=not few))
    return [tag("p", *legend, class_="legend"), *groups]


def _histories(function: str, cases: Sequence[Case], *, unfolded: bool) -> Markup:
    count = f"{counted(len(cases), 'case')}, {counted(sum(len(case.ran) for case in cases), 'result')}"
    return folded_cases(function, count, tag("div", *map(_card, cases), class_="cards"), unfolded=unfolded)


def _card(case: Case) -> Markup:
    """Return a small chart of a case over commits, its latest figure, and the difference from the one before."""
    points = case.ran[-LONGEST:]
    last = points[-1]
    before = next((r for r in reversed(points[:-1]) if r.valid and r.record["hash"] == last.record["hash"]), None)
    change = ""
    if before and last.valid:
        percents = round(100 * (last.median / before.median - 1), 1)
        change = f"{percents:+} %".replace("-", "−") if percents else "0 %"
    head = tag("div", tag("h5", case.title), tag("b", last.median_text()), class_="ends")
    about = tag("div", tag("span", case.group or ""), tag("span", change), class_="ends soft")
    return tag("article", head, about, trouble_note(last), _timeline(case, points), class_="card", data_case=case.words)


def _timeline(case: Case, points: Sequence[Result]) -> Markup:
    n, last = len(points), points[-1]
    values = [value for r in points if r.quartiles for value in (r.quartiles if r.valid else (r.median,))]
    low, high = (min(values), max(values)) if values else (0, 1)
    if high - low < 0.2 * high:  # noise must not fill the chart
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
            label=f"{case.name}: {n} run{'s' * (n != 1)}, the latest {last.median_text(4)} at {last.commit}",
            x_labels=[(at, points[at].commit) for at in range(n - 1, -1, -math.ceil(n / 4))],
            y_labels=y.labels(units) if values else [""] * len(y.ticks),
        ),
        class_="box",
    )


# Shares of the ceilings


def shares(device: Device) -> list[Markup]:
    shown = [case for case in device.cases if case.last.timed and case.last.record["shares"]]
    if not shown:
        return [tag("p", "No case has its bytes or operations counted.", class_="soft")]
    groups = []
    for function, cases in group_by(attrgetter("function"), shown).items():
        found = {unit: of["share"] for case in cases for unit, of in case.last.record["shares"].items()}
        units, bodies = [unit for unit in ("GB/s", "TFLOP/s") if unit in found], []
        limit = 1 / min(max(1, *(of["share"] for case in cases for of in case.last.record["shares"].values())), 1.5)
        for group, members in group_by(attrgetter("group"), cases).items():
            heading = tag("th", group, colspan=1 + len(units), scope="rowgroup", class_="soft")
            rows = [_share(case, units, limit) for case in members]
            bodies.append([tag("tr", heading), *rows] if group else rows)
        table = html_table(["case", *units], *bodies, kind="shares")
        groups.append(folded_cases(function, counted(len(cases), "case"), table))
    text = "Shares of the rate of a copy, and of a matrix product in the same precision, measured in the same run."
    intro = tag("p", f"{text} {DASHED}", class_="soft")
    return [part for part in (intro, doubts_note(device.latest), tag("div", *groups, class_="card")) if part]


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

RoofPoint = tuple[float, float, Case, Result]  # FLOP per byte, TFLOP/s


def roofline(device: Device) -> list[Markup]:
    """Return a log-log chart, on which the roofs are straight, of the latest run with points to draw."""
    counted = [
        (case, r) for case in device.cases for r in case.results if min(r.record["flops"], r.record["bytes"]) > 0
    ]
    if not counted:
        return [tag("p", "No case has both its bytes and its operations counted.", class_="soft")]
    run = max((result.record["run"] for _, result in counted if result.timed and result.valid), default=None)
    if run is None:
        return [tag("p", "No case with counted bytes and operations has a valid time.", class_="soft")]
    points = [
        (result.record["flops"] / result.record["bytes"], result.record["flops"] / result.median / 1e12, case, result)
        for case, result in counted
        if result.record["run"] == run and result.timed and result.valid
    ]
    own = points[-1][-1]
    rates = ceilings(own.record)
    copy = rates.pop("copy", 0) / 1e3  # TFLOP/s at one FLOP per byte
    if not copy or not rates:
        return [tag("p", f"The run of {own.when} UTC has no ceilings.", class_="soft")]
    key = Plot(linear(0, 1), linear(0, 1), 12)
    legend = [
        legend_entry("fastddpm", key.mark(0.5, 0.5, "ours passed", "one of ours")),
        legend_entry("others", key.mark(0.5, 0.5, "other passed", "another")),
        legend_entry(" and ".join(WIDE), key.mark(0.5, 0.5, "ours passed wide", "one in 32 bits")),
        legend_entry("what a copy and a matrix product reached", key.line([(0, 0.5), (1, 0.5)], "roof")),
    ]
    axes = tag("p", "TFLOP/s", class_="axis"), tag("p", "FLOP per byte", class_="axis end")
    drawn = _roofline_chart(device.name, points, rates, copy)
    chart = tag("div", axes[0], tag("div", drawn, class_="box"), axes[1], class_="card roofline")
    older = tag("p", f"{own.commit}, {own.when} UTC", class_="soft") if run != device.run else None
    return [part for part in (older, doubts_note(own.record), tag("p", *legend, class_="legend"), chart) if part]


def _roofline_chart(name: str, points: Sequence[RoofPoint], rates: dict[str, float], copy: float) -> Markup:
    across = [x for x, *_ in points] + [rate / copy for rate in rates.values()]
    up = [y for _, y, *_ in points] + list(rates.values())
    plot = Plot(logarithmic(min(across) / 2, 3 * max(across)), logarithmic(min(up) / 1.5, 1.2 * max(up)), 400)
    paths, labels = _roofs(plot, rates, copy)
    marks = []
    for x, y, case, result in sorted(points, key=lambda point: point[2].ours):  # ours over others
        title = f"{case.name}\n{figure(y)} TFLOP/s at {figure(x)} FLOP/byte\n{result.about()}"
        wide = " wide" * (result.record["precision"] in WIDE)
        marks.append(plot.mark(x, y, f"{case.kind} passed{wide}", title, case.words))
    return plot.svg(
        paths,
        marks + labels,
        label=f"Roofline of {name}: TFLOP/s over FLOP per byte, {len(points)} cases",
        x_labels=zip(plot.x.ticks, plot.x.labels(), strict=True),
        y_labels=plot.y.labels(),
    )


def _roofs(plot: Plot, rates: dict[str, float], copy: float) -> tuple[list[Markup], list[Markup]]:
    """Return the lines of the ceilings, and their labels; roofs that are close to each other share one."""
    left, right, bottom, peak = plot.x.ticks[0], plot.x.ticks[-1], plot.y.ticks[0], max(rates.values())
    begin = max(left, bottom / copy)
    paths = [plot.line([(begin, begin * copy), (peak / copy, peak)], "roof")] if begin < peak / copy else []
    at = begin * max(peak / copy / begin, 1) ** 0.1  # clear of the axes
    labels = [plot.text(at, at * copy, f"copy {figure(1e3 * copy)} GB/s", "roof slope")]
    groups: list[list[tuple[float, str]]] = []
    for rate, name in sorted((rate, name) for name, rate in rates.items()):
        paths.append(plot.line([(max(rate / copy, left), rate), (right, rate)], "roof"))
        if groups and plot.place(left, groups[-1][-1][0])[1] - plot.place(left, rate)[1] < APART:
            groups[-1].append((rate, name))
        else:
            groups.append([(rate, name)])
    for roofs in groups:
        text = ", ".join(f"{name} {figure(rate)}" for rate, name in reversed(roofs))
        labels.append(plot.text(right, roofs[-1][0], f"{text} TFLOP/s", "roof"))
    return paths, labels
