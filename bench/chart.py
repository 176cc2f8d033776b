"""Charts as inline SVG, and the HTML elements around them.

Charts fill the available width, while their text keeps its size: x positions are percentages of the plot, y positions
are pixels, and labels are in the padding of the box around the plot. Colours come from the style sheet.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Places = Sequence[tuple[float, float]]


# Markup


class Markup(str):
    """Text that is already HTML. Any other text is escaped when it becomes part of Markup."""

    __slots__ = ()


def tag(name: str, *content: str | None, **attributes: Any) -> Markup:
    """Return an element. None is left out of content and attributes; `class_` becomes class, `data_case` data-case."""
    found = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    text = "".join(f' {key}="{escape(str(value))}"' for key, value in found.items())
    return Markup(f"<{name}{text}>{join(content)}</{name}>")


def join(parts: Iterable[str | None]) -> Markup:
    """Join texts to Markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


# Numbers


SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
Units = Sequence[tuple[float, str]]  # the largest first


def figure(value: float, digits: int = 3) -> str:
    """Format with so many significant digits: 0.0123, 4.50, 1,230; 1.2e-7 instead of many zeros."""
    value = float(f"{value:.{digits - 1}e}")
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 9:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def quantity(value: float, units: Units, digits: int = 3) -> str:
    """Format in the unit that makes the number 1 to 1000, such as 4.52 ms."""
    size, unit = _unit(float(f"{value:.{digits - 1}e}"), units)
    return f"{figure(value / size, digits)} {unit}"


def percent(share: float) -> str:
    """Format as <0.01 %, 0.37 %, 4.2 %, 72 % or 108 %."""
    if 0 < share < 5e-5:
        return "<0.01 %"
    return f"{100 * share:,.{0 if share >= 0.0995 else 1 if share >= 0.00995 else 2}f} %"


def _unit(value: float, units: Units) -> tuple[float, str]:
    return next((unit for unit in units if abs(value) >= unit[0] * (1 - 1e-9)), units[-1])


# Axes


@dataclass(frozen=True)
class Scale:
    """An axis from its first to its last tick."""

    ticks: tuple[float, ...]  # at least two, ascending; positive on a logarithmic axis
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value: 0 at the first tick, 1 at the last."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def labels(self, units: Units = ((1.0, ""),)) -> list[str]:
        """Return the labels of the ticks.

        On a linear axis they have one unit and equally many decimals, on a logarithmic axis each has its own unit.
        """
        if self.log:
            parts = [(tick / size, unit) for tick in self.ticks for size, unit in [_unit(tick, units)]]
            return [f"{_exact(value)} {unit}".rstrip() for value, unit in parts]
        size, unit = _unit(max(map(abs, self.ticks)), units)
        decimals = max(len(_exact(tick / size).partition(".")[2]) for tick in self.ticks)
        return [f"{tick / size:,.{decimals}f} {unit}".rstrip() for tick in self.ticks]


def _exact(value: float) -> str:
    """Format a round number without trailing zeros."""
    return f"{value:,.12f}".rstrip("0").rstrip(".")


def linear(low: float, high: float, most: int = 5) -> Scale:
    """Return an axis that encloses low and high, with at most `most` ticks (3 or more) at multiples of 1, 2 or 5."""
    if high - low <= 1e-9 * abs(high):
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if high else (0.0, 1.0)
    exponent = math.floor(math.log10((high - low) / most))
    while True:
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first < most:
                return Scale(tuple(float(f"{i * step:.12g}") for i in range(first, last + 1)))
        exponent += 1


def logarithmic(low: float, high: float, most: int = 7) -> Scale:
    """Return a logarithmic axis that encloses low and high, with at most `most` ticks (3 or more).

    The ticks are at 1, 2 and 5 times powers of 10, else at powers of 10, else at every so many powers.
    """
    every = 1
    while True:
        for factors in ((1, 2, 5), (1,)) if every == 1 else ((1,),):
            first, last = (math.floor(math.log10(value) / every) * every for value in (low, high))
            ticks = [
                float(f"{factor}e{exponent}")
                for exponent in range(first, last + every + 1, every)
                for factor in factors
            ]
            below, above = [t for t in ticks if t <= low * (1 + 1e-9)], [t for t in ticks if t >= high * (1 - 1e-9)]
            first_tick, last_tick = below[-1], above[0] if above[0] > below[-1] else above[1]
            found = tuple(tick for tick in ticks if first_tick <= tick <= last_tick)
            if len(found) <= most:
                return Scale(found, log=True)
        every += 1


# Charts


@dataclass(frozen=True)
class Plot:
    """A chart with two axes and a height in pixels. Its methods turn values into elements for `svg`."""

    x: Scale
    y: Scale
    height: int

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return (percent from the left, pixels from the top)."""
        return round(100 * self.x.at(x), 2), round(self.height * (1 - self.y.at(y)), 2)

    def line(self, points: Places, kind: str) -> Markup:
        places = [self.place(*point) for point in points]
        return tag("path", class_=f"line {kind}", d=_path(places))

    def band(self, lower: Places, upper: Places, kind: str) -> Markup:
        places = [self.place(*point) for point in (*lower, *reversed(upper))]
        return tag("path", class_=f"band {kind}", d=f"{_path(places)}Z")

    def upright(self, x: float, kind: str, low: float | None = None, high: float | None = None) -> Markup:
        """Return a vertical line from low to high, or over the whole height."""
        low, high = self.y.ticks[0] if low is None else low, self.y.ticks[-1] if high is None else high
        (across, bottom), (_, top) = self.place(x, low), self.place(x, high)
        return tag("line", class_=kind, x1=f"{across}%", x2=f"{across}%", y1=top, y2=bottom)

    def mark(self, x: float, y: float, kind: str, title: str, case: str | None = None) -> Markup:
        """Return a point with a tooltip: a square if the kind contains "other", a cross if "failed", else a disc."""
        across, down = self.place(x, y)
        about = {"class_": f"mark {kind}", "data_case": case}
        if "failed" in kind:
            return tag("text", tag("title", title), "×", x=f"{across}%", y=down, **about)
        if "other" in kind:
            place = {"x": f"{across}%", "y": down, "width": 7, "height": 7, "transform": "translate(-3.5 -3.5)"}
            return tag("rect", tag("title", title), **place, **about)
        return tag("circle", tag("title", title), cx=f"{across}%", cy=down, r=3.5, **about)

    def text(self, x: float, y: float, text: str, kind: str) -> Markup:
        across, down = self.place(x, y)
        return tag("text", text, class_=kind, x=f"{across}%", y=down)

    def svg(
        self,
        paths: Iterable[Markup],
        marks: Iterable[Markup],
        *,
        label: str,
        x_labels: Iterable[tuple[float, str]],
        y_labels: Iterable[str],
    ) -> Markup:
        """Return the chart. Lines and bands are stretched to the width, marks and text are not.

        Args: label: what a screen reader says; x_labels: (value, text); y_labels: one for each tick.
        """
        grid = []
        for tick, text in zip(self.y.ticks, y_labels, strict=True):
            down = self.place(self.x.ticks[0], tick)[1]
            grid.append(tag("line", class_="grid", x1=0, x2="100%", y1=down, y2=down))
            grid.append(tag("text", text, class_="y", x=-8, y=down))
        for value, text in x_labels:
            across = f"{self.place(value, self.y.ticks[0])[0]}%"
            grid.append(tag("line", class_="tick", x1=across, x2=across, y1=self.height, y2=self.height + 4))
            grid.append(tag("text", text, class_="x", x=across, y=self.height + 18))
        about = {"class_": "plot", "role": "img", "aria_label": label}
        return tag("svg", *grid, stretched(paths, self.height), *marks, width="100%", height=self.height, **about)


def bar(share: float, kind: str, label: str | None = None, *, limit: float | None = None) -> Markup:
    """Return a horizontal bar over a share of the width, at most all of it; limit: the position of 100 %."""
    rect = lambda width, kind: tag("rect", class_=kind, width=f"{round(100 * width, 2)}%", height="100%", rx=2)
    parts = [rect(min(max(share, 0), 1), f"fill {kind}")]
    if limit is not None:
        across = f"{round(100 * limit, 2)}%"
        parts = [rect(limit, "track"), *parts, tag("line", class_="limit", x1=across, x2=across, y1=0, y2="100%")]
    about = {"aria_hidden": "true"} if label is None else {"role": "img", "aria_label": label}
    return tag("svg", *parts, class_="bar", width="100%", height=10, **about)


def stretched(paths: Iterable[Markup], height: int) -> Markup:
    """Stretch lines and bands over the whole width."""
    box = {"viewBox": f"0 0 100 {height}", "preserveAspectRatio": "none"}
    return tag("svg", *paths, class_="paths", width="100%", height=height, **box)


def _path(places: Places) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
