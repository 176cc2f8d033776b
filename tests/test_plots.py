"""Pictures of numbers: what is drawn is what was given, and the files are whole."""

import math
import sys

import check
import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.plots import bound_terms, loss_curve

T = 1000
TERMS = np.arange(1, T), 1.2 / np.arange(2, T + 1) ** 1.5 + 2e-5, np.full(T - 1, 1e-5)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last picture."""
    import matplotlib.figure

    axes, add_subplot = [], matplotlib.figure.Figure.add_subplot

    def kept(figure, *args, **kwargs):
        axes.append(add_subplot(figure, *args, **kwargs))
        return axes[-1]

    monkeypatch.setattr(matplotlib.figure.Figure, "add_subplot", kept)
    return axes


def inked(path):
    """Whether the PNG holds something in colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return bool((pixels.max(2) - pixels.min(2) > 60).any())


def marks(axes):
    """x, y of the lines that are labelled, by their labels."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("n", [1, 2, 9, 3000])
def test_the_loss_and_its_running_mean_are_drawn(n, tmp_path, drawn):
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


def test_other_records_and_losses_that_are_not_finite_are_left_out(tmp_path, drawn):
    records = [{"step": 0, "loss": 0.5, "learning_rate": 1e-4}, {"step": 1, "loss": math.nan}, {"step": 2}]
    records += [{"step": 3, "loss": math.inf}, {"step": 4, "loss": 0.25}, {"time": 7.0}]
    loss_curve(records, tmp_path / "loss.png")
    assert marks(drawn[-1])["each record"] == [[0, 4], [0.5, 0.25]]


def test_a_loss_of_zero_has_a_place(tmp_path, drawn):
    loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.0}], tmp_path / "loss.png")
    assert drawn[-1].get_yscale() == "linear"
    assert marks(drawn[-1])["each record"] == [[1, 2], [1, 0]]


@pytest.mark.parametrize("losses", [[0.030, 0.0305], [2.01, 2.02], [1e-3, 1.0], [1e-9, 1.0]])
def test_an_axis_has_at_least_two_numbers(losses, tmp_path, drawn):
    loss_curve([{"step": i, "loss": loss} for i, loss in enumerate(losses)], tmp_path / "loss.png")
    low, high = drawn[-1].get_ylim()
    assert low < min(losses) <= max(losses) < high
    assert sum(low <= tick <= high for tick in drawn[-1].get_yticks()) >= 2


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "0 records have a step and a loss, none of them finite; want at least one"),
        ([{"step": 3}], "0 records have a step and a loss, none of them finite; want at least one"),
        ([{"step": 3, "loss": math.nan}], "1 records have a step and a loss, none of them finite; want at least one"),
    ],
)
def test_no_loss_is_an_error(records, message, tmp_path):
    assert check.error_line(loss_curve, records, tmp_path / "loss.png") == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 3, 40, T - 1])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_all_terms_of_the_bound_are_drawn(kind, count, tmp_path, drawn):
    rows = np.random.default_rng(0).permutation(T - 1)[:count]
    timesteps, mean, error = (values[rows] for values in TERMS)
    bound_terms(*map(kind, (timesteps, mean, error)), prior=6e-6, decoder=1.75, path=tmp_path / "terms.png")
    assert inked(tmp_path / "terms.png")
    assert [path.name for path in tmp_path.iterdir()] == ["terms.png"]
    [axes] = drawn
    assert axes.get_yscale() == "log"
    order = np.argsort(timesteps)
    lines = [line.get_xydata().T for line in axes.lines]
    assert any(np.array_equal(line, [timesteps[order] + 1, mean[order]]) for line in lines)
    ends = {label: place for label, place in marks(axes).items() if "_T" in label or "_0" in label}
    assert ends == {"$L_0$ (decoder): 1.75": [[1], [1.75]], "$L_T$ (prior): 6e-06": [[max(timesteps) + 2], [6e-6]]}
    assert axes.get_title() == f"Variational bound: {6e-6 + 1.75 + mean.sum():.4g} bits/dim"


def test_the_total_of_some_terms_is_told(tmp_path, drawn):
    bound_terms([1, 500], [0.5, 0.001], [0.1, 0.0], prior=0.0, decoder=1.0, total=3.21, path=tmp_path / "terms.png")
    assert drawn[-1].get_title() == "Variational bound: 3.21 bits/dim"


@pytest.mark.parametrize("count", [3, 100])
def test_zeros_and_errors_larger_than_their_terms_have_a_place(count, tmp_path, drawn):
    mean = np.linspace(0, 0.5, count)
    bound_terms(np.arange(1, count + 1), mean, 2 * mean, prior=0.0, decoder=0.7, path=tmp_path / "terms.png")
    assert inked(tmp_path / "terms.png")
    low, high = drawn[-1].get_ylim()
    assert 0 < low < mean[1]
    assert high > 3 * mean[-1]
    bound_terms([1], [0.0], [0.0], prior=0.0, decoder=0.0, path=tmp_path / "nothing.png")
    assert drawn[-1].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], [], []), "timesteps, mean, error are (0,), (0,), (0,); want [K] of each, K >= 1"),
        (([1], [1.0, 2.0], [0.1]), "timesteps, mean, error are (1,), (2,), (1,); want [K] of each, K >= 1"),
        ((1, 1.0, 0.1), "timesteps, mean, error are (), (), (); want [K] of each, K >= 1"),
        (([1], [math.nan], [0.1]), "mean is negative or not finite somewhere; want numbers >= 0, bits/dim of a bound"),
        (([1], [1.0], [-0.1]), "error is negative or not finite somewhere; want numbers >= 0, bits/dim of a bound"),
        (
            ([1], [1.0], [0], math.inf),
            "prior is negative or not finite somewhere; want numbers >= 0, bits/dim of a bound",
        ),
    ],
)
def test_no_terms_are_an_error(given, message, tmp_path):
    terms, prior = given[:3], [*given[3:], 0.0][0]
    assert check.error_line(bound_terms, *terms, prior=prior, decoder=1.0, path=tmp_path / "terms.png") == message
    assert list(tmp_path.iterdir()) == []


def test_what_others_set_does_not_matter(tmp_path):
    import matplotlib

    records = [{"step": i, "loss": 1 / i} for i in range(1, 50)]
    loss_curve(records, tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 20}):
        loss_curve(records, tmp_path / "other.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_pyplot_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import fails
    loss_curve([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
    assert inked(tmp_path / "loss.png")
