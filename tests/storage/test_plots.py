"""Plots: they show the numbers given, and the files are complete."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.storage.plots import bound_terms, loss_curve, with_error
from tests.support import check

T = 1000
TERMS = np.arange(1, T), 1.2 / np.arange(2, T + 1) ** 1.5 + 2e-5, np.full(T - 1, 1e-5)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of all plots."""
    import matplotlib.figure

    axes, add_subplot = [], matplotlib.figure.Figure.add_subplot

    def kept(figure, *args, **kwargs):
        axes.append(add_subplot(figure, *args, **kwargs))
        return axes[-1]

    monkeypatch.setattr(matplotlib.figure.Figure, "add_subplot", kept)
    return axes


def inked(path):
    """Whether the PNG shows something coloured."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return bool((pixels.max(2) - pixels.min(2) > 60).any())


def marks(axes):
    """(x, y) of each labelled line, by label."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("n", [1, 2, 9, 3000])
def test_loss_and_running_mean_are_plotted(n, tmp_path, drawn):
    generator = np.random.default_rng(0)
    records = [{"step": 5 * i + 5, "loss": float(loss)} for i, loss in enumerate(generator.uniform(0.1, 1, n))]
    loss_curve(reversed(records), tmp_path / "loss.png")
    assert inked(tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    losses = [record["loss"] for record in records]
    lines = marks(drawn[-1])
    assert lines["each record"] == [[record["step"] for record in records], losses]
    want = [np.mean(losses[i + 1 - max(1, (i + 1) // 10) : i + 1]) for i in range(n)]
    np.testing.assert_allclose(lines["running mean"][1], want, rtol=1e-12)
    assert drawn[-1].get_title() == f"Training loss: {want[-1]:.4g} at step {5 * n:,}"
    assert (drawn[-1].get_xscale(), drawn[-1].get_yscale()) == ("log" if n > 20 else "linear", "log")


def test_other_records_and_non_finite_losses_are_skipped(tmp_path, drawn):
    records = [{"step": 0, "loss": 0.5, "learning_rate": 1e-4}, {"step": 1, "loss": math.nan}, {"step": 2}]
    records += [{"step": 3, "loss": math.inf}, {"step": 4, "loss": 0.25}, {"time": 7.0}]
    loss_curve(records, tmp_path / "loss.png")
    assert marks(drawn[-1])["each record"] == [[0, 4], [0.5, 0.25]]


def test_loss_of_zero_is_plotted(tmp_path, drawn):
    loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.0}], tmp_path / "loss.png")
    assert drawn[-1].get_yscale() == "linear"
    assert marks(drawn[-1])["each record"] == [[1, 2], [1, 0]]


@pytest.mark.parametrize("losses", [[0.030, 0.0305], [2.01, 2.02], [1e-3, 1.0], [1e-9, 1.0]])
def test_axis_shows_at_least_two_numbers(losses, tmp_path, drawn):
    loss_curve([{"step": i, "loss": loss} for i, loss in enumerate(losses)], tmp_path / "loss.png")
    low, high = drawn[-1].get_ylim()
    assert low < min(losses) <= max(losses) < high
    assert sum(low <= tick <= high for tick in drawn[-1].get_yticks()) >= 2


@pytest.mark.parametrize(
    ("steps", "every"), [((50, 100), 50), ((5, 10, 50), 5), ((900, 1350), 50), ((50, 2000), 50), ((400, 10**6), 400)]
)
def test_steps_are_marked_at_round_numbers(steps, every, tmp_path, drawn):
    loss_curve([{"step": step, "loss": 0.1} for step in steps], tmp_path / "loss.png")
    low, high = drawn[-1].get_xlim()
    ticks = [tick for tick in drawn[-1].get_xticks() if low <= tick <= high]
    labels = [label.get_text() for label in drawn[-1].get_xticklabels() if label.get_text()]
    assert len(ticks) >= 3
    assert {f"{tick:,.0f}" for tick in ticks} <= {*labels}
    step = {"linear": np.diff(ticks).min(), "log": None}[drawn[-1].get_xscale()]
    for number in ticks if step is None else [step]:
        assert f"{number:.0e}"[0] in "125"
        assert float(f"{number:.0e}") == pytest.approx(number)


@pytest.mark.parametrize("records", [[], [{"step": 3}], [{"loss": 0.5}], [{"step": 3, "loss": math.nan}]], ids=repr)
def test_records_without_a_finite_loss_are_refused(records, tmp_path):
    text = check.error_line(loss_curve, records, tmp_path / "loss.png")
    assert text == "no record has a step and a finite loss; want at least one"
    assert list(tmp_path.iterdir()) == []


def terms(path, timesteps, mean, error, **given):
    parts = {"prior": (0.5, 0.01), "decoder": (1.75, 0.02), "total": (3.459, 0.028), "num_train_timesteps": T}
    bound_terms(timesteps, mean, error, **parts | given, path=path)


@pytest.mark.parametrize("count", [1, 3, 40, T - 1])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_all_terms_of_the_bound_are_plotted(kind, count, tmp_path, drawn):
    rows = np.random.default_rng(0).permutation(T - 1)[:count]
    timesteps, mean, error = (values[rows] for values in TERMS)
    terms(tmp_path / "terms.png", *map(kind, (timesteps, mean, error)))
    assert inked(tmp_path / "terms.png")
    assert [path.name for path in tmp_path.iterdir()] == ["terms.png"]
    [axes] = drawn
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("timestep t", "bits/dim")
    order = np.argsort(timesteps)
    lines = [line.get_xydata().T for line in axes.lines]
    assert any(np.array_equal(line, [timesteps[order] + 1, mean[order]]) for line in lines)
    ends = {label: place for label, place in marks(axes).items() if "_T" in label or "_0" in label}
    assert ends == {
        "$L_0$ (decoder): 1.750 ± 0.020": [[1], [1.75]],
        "$L_T$ (prior): 0.500 ± 0.010": [[T + 1], [0.5]],
    }
    assert axes.get_title() == "Variational bound: 3.459 ± 0.028 bits/dim"


@pytest.mark.parametrize("count", [3, 41])
def test_standard_errors_are_plotted_around_their_terms(count, tmp_path, drawn):
    """Unknown ones are left out."""
    timesteps, mean = np.arange(count, 0, -1), np.linspace(0.1, 0.5, count)
    error = 0.1 * mean
    error[1] = math.nan
    terms(tmp_path / "terms.png", timesteps, mean, error)
    [axes] = drawn
    t, mean, error = timesteps[::-1] + 1, mean[::-1], error[::-1]
    seen = np.isfinite(error)
    ends = np.array([[*t[seen], *t[seen]], [*(mean - error)[seen], *(mean + error)[seen]]])
    if count == 3:
        [bars] = axes.containers
        drawn_ends = np.concatenate([segment for segment in bars[2][0].get_segments() if len(segment)])
        assert bars.get_label() == "$L_{t-1}$ ± standard error"
    else:
        band = next(one for one in axes.collections if one.get_label() == "± standard error")
        drawn_ends = np.concatenate([path.vertices for path in band.get_paths()])
    drawn_ends = drawn_ends[np.isfinite(drawn_ends).all(1)]
    assert {tuple(end) for end in drawn_ends.round(12)} == {tuple(end) for end in ends.T.round(12)}


@pytest.mark.parametrize("count", [3, 41])
def test_unknown_standard_errors_are_not_mentioned(count, tmp_path, drawn):
    none = np.full(count, math.nan)
    given = dict.fromkeys(("prior", "decoder", "total"), (1.0, math.nan))
    terms(tmp_path / "terms.png", np.arange(1, count + 1), np.ones(count), none, **given)
    assert drawn[-1].get_title() == "Variational bound: 1 bits/dim"
    labels = [text.get_text() for text in drawn[-1].get_legend().get_texts()]
    assert labels == ["$L_{t-1}$", "$L_0$ (decoder): 1", "$L_T$ (prior): 1"]


@pytest.mark.parametrize("count", [3, 100])
def test_zeros_and_errors_larger_than_their_terms_are_plotted(count, tmp_path, drawn):
    mean = np.linspace(0, 0.5, count)
    terms(tmp_path / "terms.png", np.arange(1, count + 1), mean, 2 * mean, prior=(0.0, 0.0), decoder=(0.7, 0.1))
    assert inked(tmp_path / "terms.png")
    low, high = drawn[-1].get_ylim()
    assert 0 < low < mean[1]
    assert high > 3 * mean[-1]
    terms(tmp_path / "nothing.png", [1], [0.0], [0.0], prior=(0.0, 0.0), decoder=(0.0, 0.0))
    assert drawn[-1].get_yscale() == "linear"


@pytest.mark.parametrize(("T", "scale"), [(40, "linear"), (41, "log")])
def test_few_timesteps_have_a_linear_axis(T, scale, tmp_path, drawn):
    terms(tmp_path / "terms.png", [1, 2], [0.5, 0.4], [0.1, 0.1], num_train_timesteps=T)
    assert drawn[-1].get_xscale() == scale


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3.4589, 0.0284, "3.459 ± 0.028"),
        (416.2, 10.9, "416 ± 11"),
        (1084.4, 123.0, "1084 ± 123"),
        (2.0, 0.0, "2"),
        (6.02e-6, 1.1e-8, "6.02e-06 ± 1.1e-08"),
        (3.45678, math.nan, "3.457"),
    ],
)
def test_value_is_rounded_to_the_digits_of_its_error(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], [], []), "timesteps, mean, error are (0,), (0,), (0,); want [K] of each, K >= 1"),
        (([1], [1.0, 2.0], [0.1]), "timesteps, mean, error are (1,), (2,), (1,); want [K] of each, K >= 1"),
        ((1, 1.0, 0.1), "timesteps, mean, error are (), (), (); want [K] of each, K >= 1"),
        (([1], [math.nan], [0.1]), "mean holds a negative or non-finite value; want numbers >= 0"),
        (([1], [1.0], [-0.1]), "error holds a negative or non-finite value; want numbers >= 0"),
        (
            ([1], [1.0], [0], math.inf),
            "prior holds a negative or non-finite value; want numbers >= 0",
        ),
    ],
)
def test_bad_terms_are_refused(given, message, tmp_path):
    prior = ([*given[3:], 0.0][0], 0.0)
    assert check.error_line(terms, tmp_path / "terms.png", *given[:3], prior=prior) == message
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_settings_of_the_caller_do_not_matter(tmp_path):
    import matplotlib

    records = [{"step": i, "loss": 1 / i} for i in range(1, 50)]
    loss_curve(records, tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 20}):
        loss_curve(records, tmp_path / "other.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_pyplot_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import fails
    loss_curve([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
    assert inked(tmp_path / "loss.png")
