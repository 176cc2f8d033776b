"""Plots as PNG files: the loss of a training run, and the terms of the variational bound."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from fastddpm.storage.files import atomic

Numbers = Sequence[float] | np.ndarray | Tensor

BLUE, PALE, ORANGE, GREEN = "#0072b2", "#b3d1e5", "#d55e00", "#009e73"  # distinct to the colour-blind, too
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
FEW = 40  # up to this number, points are plotted one by one
LEAST_SPAN = 3  # a logarithmic axis spans at least this factor, so that it shows two of the numbers below
# numbers at a logarithmic axis, times powers of ten: (up to this span, the numbers)
ROUND_NUMBERS = ((20, (1, 2, 3, 4, 6, 8)), (1000, (1, 2, 5)))


def loss_curve(records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot the training loss over the steps, and its running mean over the last tenth of the records up to each step.

    Args:
        records: from a run's log, in any order. Records without "step" and "loss", and losses that are not finite, are
            skipped.
        path: of the PNG, which appears complete or not at all.
    Raises: ValueError: no record has a finite loss.
    """
    pairs = sorted((int(record["step"]), float(record["loss"])) for record in records if {"step", "loss"} <= {*record})
    finite = [pair for pair in pairs if math.isfinite(pair[1])]
    if not finite:
        raise ValueError("no record has a step and a finite loss; want at least one")
    step, loss = np.array(finite, dtype=np.float64).T
    mean = _running_mean(loss)
    dots = "o" if len(step) <= FEW else None
    with figure_axes(path) as axes:
        axes.plot(step, loss, color=PALE, linewidth=0.7, marker=dots, markersize=4, label="each record")
        axes.plot(step, mean, color=BLUE, linewidth=1.8, marker=dots, markersize=2, label="running mean")
        _use_whole_numbers(axes, log=step[-1] >= 20 * step[0] > 0)
        if (loss > 0).all():
            _use_logarithms(axes, loss.min(), loss.max())
        axes.set(xlabel="training step", ylabel="loss (mean squared error)")
        axes.set_title(f"Training loss: {mean[-1]:.4g} at step {step[-1]:,.0f}")
        axes.legend()


def bound_terms(
    timesteps: Numbers,
    mean: Numbers,
    error: Numbers,
    *,
    prior: tuple[float, float],
    decoder: tuple[float, float],
    total: tuple[float, float],
    num_train_timesteps: int,
    path: str | os.PathLike[str],
) -> None:
    """Plot the terms of the variational bound over t, as in figure 2 of Nichol & Dhariwal 2021 (arXiv:2102.09672).

    t counts as in the papers: L_{t-1} is plotted at t = 2..T, the decoder's L_0 at 1 and the prior's L_T at T + 1. The
    axis is logarithmic: an L_{t-1} of 0 is left out, an L_0 or L_T of 0 is plotted at the lower end.

    Args:
        timesteps: [K] of the terms, counted from 0 (one less than the paper's t), in any order; some may be missing.
            Or those of bins.
        mean: [K] the terms in bits/dim.
        error: [K] their standard errors; NaN if unknown.
        prior, decoder, total: L_T, L_0 and the bound in bits/dim, each with its standard error or NaN.
        num_train_timesteps: T.
        path: of the PNG, which appears complete or not at all.
    Raises: ValueError: there are no terms, the lengths differ, or a value is negative or not finite.
    """
    t, term, spread = (np.asarray(values, dtype=np.float64) for values in (timesteps, mean, error))
    _check_terms(t, term, spread, prior=prior[0], decoder=decoder[0])
    ends = [
        (1, *decoder, "$L_0$ (decoder)", ORANGE),
        (num_train_timesteps + 1, *prior, "$L_T$ (prior)", GREEN),
    ]
    order = np.argsort(t)
    t, term, spread = (values[order][term[order] > 0] for values in (t + 1, term, spread))
    positive = [*term, *(value for _, value, *_ in ends if value > 0)]
    known = np.isfinite(spread).any()
    with figure_axes(path) as axes:
        floor = _use_logarithms(axes, min(positive), np.nanmax([*positive, *(term + spread)])) if positive else 0.0
        low = np.maximum(term - spread, floor)
        if len(t) <= FEW:
            bars = {"fmt": "o", "color": BLUE, "markersize": 4, "linewidth": 1, "capsize": 2}
            label = "$L_{t-1}$ ± standard error" if known else "$L_{t-1}$"
            legend = [axes.errorbar(t, term, np.stack([term - low, spread]), label=label, **bars)]
        else:
            legend = axes.plot(t, term, color=BLUE, linewidth=1.5, label="$L_{t-1}$")
            band = {"color": PALE, "linewidth": 0, "label": "± standard error"}
            legend += [axes.fill_between(t, low, term + spread, **band)] if known else []
        for place, value, deviation, name, color in ends:
            spot = {"color": color, "marker": "D", "linestyle": "none", "zorder": 3, "clip_on": False}
            legend += axes.plot([place], [max(value, floor)], label=f"{name}: {with_error(value, deviation)}", **spot)
        _use_whole_numbers(axes, log=num_train_timesteps > FEW)
        axes.set(xlabel="timestep t", ylabel="bits/dim", title=f"Variational bound: {with_error(*total)} bits/dim")
        axes.legend(handles=legend)


def with_error(value: float, error: float) -> str:
    """A value and its error as text, to two digits of the error: 3.459 ± 0.028. An error of 0 or NaN is left out."""
    if not error > 0:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}" if decimals <= 5 else f"{value:.3g} ± {error:.2g}"


def _check_terms(t: np.ndarray, term: np.ndarray, spread: np.ndarray, *, prior: float, decoder: float) -> None:
    if t.ndim != 1 or not len(t) or not t.shape == term.shape == spread.shape:
        shapes = f"{t.shape}, {term.shape}, {spread.shape}"
        raise ValueError(f"timesteps, mean, error are {shapes}; want [K] of each, K >= 1")
    values: dict[str, Any] = {"timesteps": t, "mean": term, "prior": prior, "decoder": decoder}
    for name, value in (values | {"error": np.nan_to_num(spread)}).items():
        if not (np.isfinite(value) & (np.asarray(value) >= 0)).all():
            raise ValueError(f"{name} holds a negative or non-finite value; want numbers >= 0")


@contextmanager
def figure_axes(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Axes to plot on; writes the PNG when the block ends without an exception."""
    with new_figure(path, (7.2, 4.2), dpi=150, layout="constrained") as figure:
        yield figure.add_subplot()


@contextmanager
def new_figure(path: str | os.PathLike[str], inches: tuple[float, float], **options: Any) -> Iterator[Any]:
    """A matplotlib Figure of a width and height; writes the PNG when the block ends without an exception."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=inches, **options)
        yield figure
        with atomic(path) as file:
            figure.savefig(file, format="png")


def _use_whole_numbers(axes: Any, *, log: bool) -> None:
    """Make the x axis one of whole numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if subs := _round_numbers(low, high):
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _use_logarithms(axes: Any, low: float, high: float) -> float:
    """Make the y axis logarithmic, from a little below low to a little above high. Returns: its lower end."""
    from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullFormatter

    room = max(1.3, math.sqrt(LEAST_SPAN * low / high))
    low, high = low / room, high * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    if subs := _round_numbers(low, high):
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.yaxis.set_major_formatter(LogFormatterMathtext())
    axes.yaxis.set_minor_formatter(NullFormatter())
    return low


def _round_numbers(low: float, high: float) -> Sequence[int]:
    """The numbers from 1 to 9 that a logarithmic axis shows with each power of ten; none: the powers alone."""
    return next((numbers for span, numbers in ROUND_NUMBERS if high < span * low), ())


def _running_mean(values: np.ndarray) -> np.ndarray:
    """[N] for each value, the mean of the last tenth of all values up to it."""
    end = np.arange(1, len(values) + 1)
    start = end - np.maximum(1, end // 10)
    total = np.concatenate([[0.0], values.cumsum()])
    return (total[end] - total[start]) / (end - start)
