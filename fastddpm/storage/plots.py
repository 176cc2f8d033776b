"""Pictures of numbers: the loss of a training run, and the terms of the variational bound."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from fastddpm.storage.files import atomic

Numbers = Sequence[float] | np.ndarray | Tensor

BLUE, PALE, ORANGE, GREEN = "#0072b2", "#b3d1e5", "#d55e00", "#009e73"  # told apart by the colour-blind, too
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
FEW = 40  # points, which are drawn one by one
LEAST = 6  # times its first value is the last of a logarithmic axis, so that two of 1, 2, 5, 10, ... stand on it


def loss_curve(records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the training loss over the steps, and its running mean over the last tenth of the records at each.

    Args:
        records: those of a run's log; "step" and "loss" are read where a record has both. Losses that are not finite
            are left out.
        path: of the PNG, which appears whole or not at all.
    Raises: ValueError: no record has a finite loss.
    """
    pairs = sorted((int(record["step"]), float(record["loss"])) for record in records if {"step", "loss"} <= {*record})
    finite = [pair for pair in pairs if math.isfinite(pair[1])]
    if not finite:
        raise ValueError(f"{len(pairs)} records have a step and a loss, none of them finite; want at least one")
    step, loss = np.array(finite, dtype=np.float64).T
    mean, dots = _running_mean(loss), "o" if len(step) <= FEW else None
    with _axes(path) as axes:
        axes.plot(step, loss, color=PALE, linewidth=0.7, marker=dots, markersize=4, label="each record")
        axes.plot(step, mean, color=BLUE, linewidth=1.8, marker=dots, markersize=2, label="running mean")
        _whole(axes, log=step[-1] >= 20 * step[0] > 0)
        if (loss > 0).all():
            _logarithmic(axes, loss.min(), loss.max())
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
    """Draw the terms of the variational bound over t, as Nichol & Dhariwal 2021 (arXiv:2102.09672) do in figure 2.

    t counts as in the papers: L_{t-1} stands at t = 2..T, the decoder's L_0 at 1 and the prior's L_T at T + 1. Of the
    L_{t-1} those that are 0 have no place on the logarithmic axis; L_0 or L_T of 0 stand at its lower end.

    Args:
        timesteps: [K] of the terms, counted from 0 (one less than the paper's t), in any order; some may be missing.
        mean, error: [K] each term in bits/dim, and its standard error; NaN where it is not known.
        prior, decoder, total: L_T, L_0 and the bound in bits/dim, each with its standard error or NaN.
        num_train_timesteps: T.
        path: of the PNG, which appears whole or not at all.
    Raises: ValueError: there are no terms, their numbers differ, or a value is negative or not finite.
    """
    t, term, spread = (np.asarray(values, dtype=np.float64) for values in (timesteps, mean, error))
    if t.ndim != 1 or not len(t) or not t.shape == term.shape == spread.shape:
        shapes = f"{t.shape}, {term.shape}, {spread.shape}"
        raise ValueError(f"timesteps, mean, error are {shapes}; want [K] of each, K >= 1")
    values: dict[str, Any] = {"timesteps": t, "mean": term, "prior": prior[0], "decoder": decoder[0]}
    for name, value in (values | {"error": np.nan_to_num(spread)}).items():
        if not (np.isfinite(value) & (np.asarray(value) >= 0)).all():
            raise ValueError(f"{name} is negative or not finite somewhere; want numbers >= 0, bits/dim of a bound")
    ends = [
        (1, *decoder, "$L_0$ (decoder)", ORANGE),
        (num_train_timesteps + 1, *prior, "$L_T$ (prior)", GREEN),
    ]
    order = np.argsort(t)
    t, term, spread = (values[order][term[order] > 0] for values in (t + 1, term, spread))
    positive = [*term, *(value for _, value, *_ in ends if value > 0)]
    known, name = np.isfinite(spread).any(), "$L_{t-1}$"
    with _axes(path) as axes:
        floor = _logarithmic(axes, min(positive), np.nanmax([*positive, *(term + spread)])) if positive else 0.0
        low = np.maximum(term - spread, floor)
        if len(t) <= FEW:
            bars = {"fmt": "o", "color": BLUE, "markersize": 4, "linewidth": 1, "capsize": 2}
            label = f"{name} ± standard error" if known else name
            legend = [axes.errorbar(t, term, (term - low, spread), label=label, **bars)]
        else:
            legend = axes.plot(t, term, color=BLUE, linewidth=1.5, label=name)
            band = {"color": PALE, "linewidth": 0, "label": "± standard error"}
            legend += [axes.fill_between(t, low, term + spread, **band)] if known else []
        for place, value, off, name, color in ends:
            spot = {"color": color, "marker": "D", "linestyle": "none", "zorder": 3, "clip_on": False}
            legend += axes.plot([place], [max(value, floor)], label=f"{name}: {measured(value, off)}", **spot)
        _whole(axes, log=num_train_timesteps > FEW)
        axes.set(xlabel="timestep t", ylabel="bits/dim", title=f"Variational bound: {measured(*total)} bits/dim")
        axes.legend(handles=legend)


def measured(value: float, error: float) -> str:
    """With two digits of the error, where it is known: 3.459 ± 0.028."""
    if not error > 0:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}" if decimals <= 5 else f"{value:.3g} ± {error:.2g}"


@contextmanager
def _axes(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Axes to draw on; the block's end without an exception writes the PNG."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
        yield figure.add_subplot()
        with atomic(path) as file:
            figure.savefig(file, format="png")


def _whole(axes: Any, *, log: bool) -> None:
    """Make the x axis one of whole numbers."""
    from matplotlib.ticker import MaxNLocator

    if log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _logarithmic(axes: Any, low: float, high: float) -> float:
    """Make the y axis logarithmic, from a little below low to a little above high; returns where it begins."""
    from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullFormatter

    room = max(1.3, math.sqrt(LEAST * low / high))
    low, high = low / room, high * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    if high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.yaxis.set_major_formatter(LogFormatterMathtext())
    axes.yaxis.set_minor_formatter(NullFormatter())
    return low


def _running_mean(values: np.ndarray) -> np.ndarray:
    """[N] at each place the mean of the last tenth of all values up to there."""
    end = np.arange(1, len(values) + 1)
    start = end - np.maximum(1, end // 10)
    total = np.concatenate([[0.0], values.cumsum()])
    return (total[end] - total[start]) / (end - start)
