"""The report's tables: contenders next to each other, and all numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from statistics import median
from typing import Any

from bench import records
from bench.chart import BYTES, SECONDS, Markup, bar, figure, percent, quantity, tag
from bench.history import Case, Device, Result, group_by, race
from bench.report_parts import DASHED, LONGEST, html_table, trouble_note

Entry = tuple[Case, Result]

RACES = (
    "The best comes first. The last column compares with ours of the same engine and precision, or else with our best. "
    "Sampling is timed per step, and images/s are for 1,000 steps."
)

# Contenders next to each other


def races(device: Device) -> list[Markup]:
    groups = group_by(attrgetter("group"), (case for case in device.cases if case.group))
    found = [card for group, cases in groups.items() if (card := _race(group, cases, device.run))]
    found.sort(key=lambda card: not card[0])
    if not found:
        return [tag("p", "No run has measured ours and another at the same work.", class_="soft")]
    return [tag("p", f"{RACES} {DASHED}", class_="soft"), *(card for _, card in found)]


def _race(group: str, cases: Sequence[Case], latest: str) -> tuple[bool, Markup] | None:
    """Return (whether it makes images, its card), from the latest run that measured one of ours and another."""
    entries = race(cases)
    if not entries:
        return None
    entries.sort(key=lambda entry: entry[1].median if entry[1].quartiles else math.inf)
    best, rival = (next((e for e in entries if e[1].valid and e[0].ours == ours), None) for ours in (True, False))
    memory, most = not entries[0][1].timed, max(result.median for _, result in entries if result.quartiles)
    caption = [tag("h4", group)]
    if best and rival:
        caption.append(_claim(best, rival, memory))
    if entries[0][1].record["run"] != latest:
        caption.append(tag("p", f"{entries[0][1].commit}, {entries[0][1].when} UTC", class_="soft"))
    images = any(result.images for _, result in entries)
    what = ["peak memory"] if memory else ["time", *(["images/s"] if images else []), "of the ceiling"]
    rows = []
    for case, result in entries:
        beside = _beside(case, result, entries, best) if best and result.valid and not case.ours else ""
        rows.append(_contender(case, result, most, beside, images=images, memory=memory))
    table = html_table(["contender", "", *what, "ours beside it"], rows, kind="race", caption=tag("caption", *caption))
    return images, tag("article", table, class_="card", data_case=" ".join(case.words for case, _ in entries))


def _claim(best: Entry, rival: Entry, memory: bool) -> Markup:
    """Return how our best compares with the best of the others."""
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
    """Return how ours of the same engine and precision compares with it, or else our best."""
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
        tag("td", bar(result.median / most, kind) if result.quartiles else None, trouble_note(result)),
        tag("td", result.median_text() if result.quartiles else "", class_="time"),
        tag("td", figure(result.images) if result.images else "", data_unit="images/s") if images else None,
        None if memory else tag("td", share, data_unit="ceiling"),
        tag("td", beside, class_="beside"),
    ]
    return tag("tr", *cells, class_=case.kind)


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


def tables(device: Device) -> list[Markup]:
    latest, runs = [], {}
    for function, cases in device.functions.items():
        title = tag("tr", tag("th", function, colspan=len(NUMBERS), scope="rowgroup"))
        latest.append([title, *(_numbers(case, device.run) for case in cases)])
        for result in (result for case in cases for result in case.results):
            runs.setdefault(result.record["run"], []).append(result)
    past = [_past(case, result) for case in device.cases for result in reversed(case.results[-LONGEST:])]
    newest_first = sorted(runs, reverse=True)
    cut = f", the latest {LONGEST} of each case" * any(len(case.results) > LONGEST for case in device.cases)
    return [
        _wide("The latest of each case", html_table(NUMBERS, *latest, kind="numbers latest"), open_=""),
        _wide("All runs", html_table(RUNS, [_run(runs[run]) for run in newest_first], kind="numbers runs")),
        _wide(f"All medians{cut}", html_table(PAST, past, kind="numbers past")),
    ]


def _wide(title: str, table: Markup, **state: str) -> Markup:
    """Return a table that scrolls in its own box."""
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
        f"{result.median_text(4)}{'' if result.state == 'passed' else f', {result.state}'}",
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
    about = result.commit, result.when, result.record["hash"], result.median_text(4), result.spread(), rounds
    return _row(case, *about, result.trouble or "")


def _run(results: Sequence[Result]) -> Markup:
    first, states = results[0], Counter(result.state for result in results)
    versions = [str(first.record["machine"].get(name) or "–") for name in ("torch", "triton", "driver")]
    counts = [f"{states[state]}" for state in ("failed", "invalid", "skipped")]
    ceilings = ", ".join(f"{name} {figure(rate)}" for name, rate in first.record["ceilings"].items())
    return _row(None, first.when, first.commit, f"{len(results)}", *counts, *versions, ceilings)


def _gate(errors: dict[str, Any] | None) -> str:
    """Return the errors that it found, and their bounds."""
    found = []
    for name, of in (errors or {}).items():
        judged = isinstance(of, dict) and records.number(of.get("error")) and records.number(of.get("bound"))
        found.append(f"{name} {figure(of['error'], 2)} of {figure(of['bound'], 2)}" if judged else f"{name} {of}")
    return ", ".join(found)


def _meanwhile(watch: dict[str, Any]) -> str:
    """Return the main facts of what the machine did."""
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
    """Yield numbers, texts, dicts of numbers, and medians of lists of such dicts; names end with the unit."""
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
