"""Parts of the report that several of its sections use."""

from collections.abc import Iterable, Sequence

from bench.chart import Markup, stretched, tag
from bench.history import Record, Result, doubts

LONGEST = 40  # points of a history, the latest
DASHED = "Dashed bars are invalid results."


def folded_cases(function: str, count: str, *content: Markup, unfolded: bool = True) -> Markup:
    """Return cases of a function, under its name and their count, which can be folded away."""
    module, _, name = function.partition("::")
    summary = tag(
        "summary",
        tag("h4", name.removeprefix("test_").replace("_", " ")),
        tag("span", f"{module}, {count}", class_="soft"),
    )
    return tag("details", summary, *content, class_="group", open_="" if unfolded else None)


def counted(number: int, name: str) -> str:
    """Return "1 case", "2 cases"."""
    return f"{number:,} {name}{'s' * (number != 1)}"


def html_table(head: Sequence[str], *bodies: Iterable[Markup], kind: str, caption: Markup | None = None) -> Markup:
    """Return a table with a head and one or more bodies of rows."""
    columns = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in head)))
    return tag("table", caption, columns, *(tag("tbody", *rows) for rows in bodies), class_=kind)


def doubts_note(record: Record) -> Markup | None:
    """Return a warning if the ceilings of a run are unreliable."""
    if found := doubts(record):
        return tag("p", f"The ceilings of this run are unreliable: {'; '.join(found)}.", class_="why invalid")
    return None


def trouble_note(result: Result) -> Markup | None:
    """Return why there is no figure of a result, or no reliable one."""
    return tag("p", result.trouble, class_=f"why {result.state}") if result.trouble else None


def legend_entry(text: str, *parts: Markup) -> Markup:
    """Return the explanation of a stretched line or band, or of a mark."""
    paths = [part for part in parts if part.startswith("<path")]
    marks = [part for part in parts if part not in paths]
    return tag("span", tag("svg", stretched(paths, 12), *marks, width=24, height=12, aria_hidden="true"), text)
