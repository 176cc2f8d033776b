"""`fastddpm likelihood`: what it prints and writes, which images and labels it uses, and its errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.cli import likelihood as command
from fastddpm.cli.main import main
from fastddpm.evaluate.likelihood import bound
from fastddpm.sampling.sampler import Sampler
from tests.support.command_line import error_line, record_calls
from tests.support.jobs import save_tiny


def total(arguments, capsys):
    """The bound that a command prints as JSON."""
    assert main(["likelihood", *arguments, "--quiet", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["total"]


def test_likelihood_prints_the_bound(tiny, images_with_labels, capsys):
    assert main(["likelihood", tiny, "images.npz", "--device", "cpu", "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    sampler = Sampler.from_pretrained(tiny, device="cpu", precision="fp32")
    summary = bound(sampler, images_with_labels, progress=False).summary()
    lines = out.splitlines()
    assert re.fullmatch(r"3 images of x, 5 of 5 terms each, fixed_small, [\d.]+ s", lines[0])
    for line, name in zip(lines[2:], ("rate", "prior", "distortion", "total"), strict=True):
        assert line.split()[-2:] == [f"{summary[name][0]:.5f}", f"{summary[name][1]:.2g}"]
    assert "18/18" in err


def test_likelihood_passes_all_options(tiny, images_with_labels, capsys, monkeypatch):
    loads = record_calls(monkeypatch, Sampler, "from_pretrained")
    bounds = record_calls(monkeypatch, command, "bound")
    flags = "--num-images 2 --terms 3 --seed 9 --batch-size 2 --precision fp32 --device cpu --engine eager"
    assert main(["likelihood", tiny, "images.npz", *flags.split(), "--variance-type", "fixed_large", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert loads == [((tiny,), {"variant": None, "device": "cpu", "precision": "fp32", "engine": "eager"})]
    [((sampler, x), options)] = bounds
    assert np.array_equal(x, images_with_labels[:2])
    assert options == {"terms": 3, "seed": 9, "batch_size": 2, "class_labels": None, "progress": False}
    assert sampler.schedule.variance_type == "fixed_large"


@pytest.fixture
def result(tiny, images_with_labels):
    """The bound that `reported` has."""
    sampler = Sampler.from_pretrained(tiny, device="cpu", precision="fp32")
    return bound(sampler, images_with_labels[:2], terms=3, seed=9, batch_size=2, progress=False)


@pytest.fixture
def reported(tiny, images_with_labels, capsys, monkeypatch):
    """(the object printed as JSON, the calls of the plot) of a command that also writes x.npz and x.png."""
    plots = record_calls(monkeypatch, command, "bound_terms")
    flags = "--num-images 2 --terms 3 --seed 9 --batch-size 2 --precision fp32 --device cpu --quiet"
    flags += " --out x.npz --plot x.png --json"
    assert main(["likelihood", tiny, "images.npz", *flags.split()]) == 0
    return json.loads(capsys.readouterr().out), plots


def test_json_has_the_bound_and_the_options(result, reported):
    record, _ = reported
    for name, (mean, standard_error) in result.summary().items():
        assert record[name] == {"mean": mean, "error": standard_error}
    want = {"data": "images.npz", "array": "x", "images": 2, "terms": 3, "timesteps": 6, "seed": 9}
    want |= {"variance_type": "fixed_small", "unit": "bits/dim"}
    assert {name: record[name] for name in want} == want
    assert record.keys() == want.keys() | result.summary().keys() | {"seconds"}


@pytest.mark.usefixtures("reported")
def test_out_has_every_term(result):
    t, mean, error = result.per_timestep()
    want = {name: result.bits(getattr(result, name)) for name in ("prior", "decoder", "terms")}
    want |= {"bits_per_dim": result.per_image, "timesteps": result.timesteps, "weights": result.weights, "t": t}
    want |= {"mean": mean, "error": error, "count": [(result.timesteps == timestep).sum() for timestep in t]}
    with np.load("x.npz") as arrays:
        assert {*arrays.files} == {*want}
        for name, array in want.items():
            assert np.array_equal(arrays[name], array, equal_nan=True)


def test_plot_has_the_terms_and_the_bound(result, reported):
    _, [(arrays, options)] = reported
    for got, want in zip(arrays, result.per_timestep(), strict=True):
        assert np.array_equal(got, want, equal_nan=True)
    summary = result.summary()
    ends = {"prior": summary["prior"], "decoder": summary["distortion"], "total": summary["total"]}
    assert options == {**ends, "num_train_timesteps": 6, "path": "x.png"}
    with Image.open("x.png") as image:
        assert image.format == "PNG"


def test_held_out_images_are_preferred(tiny, images_with_labels, capsys):
    x = images_with_labels
    np.savez("both.npz", x_train=x[:1], x_test=x[1:])
    np.savez("test.npz", x=x[1:])
    totals = []
    for name, array in (("both.npz", "x_test"), ("test.npz", "x")):
        assert main(["likelihood", tiny, name, "--quiet", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["array"] == array
        totals.append(record["total"])
    assert totals[0] == totals[1]


@pytest.mark.usefixtures("images_with_labels")
def test_likelihood_of_the_bundled_model(tiny, monkeypatch, capsys):
    monkeypatch.setattr("fastddpm.checkpoints.shipped.FOLDER", tiny)
    assert total(["fashion-mnist", "images.npz", "--num-images", "1"], capsys)["error"] == "nan"


@pytest.fixture
def conditional(tmp_path):
    """A checkpoint of a network for two classes."""
    return save_tiny(tmp_path / "conditional", num_class_embeds=2)


@pytest.mark.parametrize(
    ("labels", "same", "num_images"),
    [
        ([1, 0, 1], "1,0,1", 3),
        ([1, 1, 1], "1,1,1", 3),  # a class that does not occur keeps its number
        ([0, 1, 1], "0,1", 2),
    ],
)
def test_labels_come_from_the_data(conditional, images_with_labels, capsys, labels, same, num_images):
    np.savez("images.npz", x=images_with_labels, y=np.array(labels))
    run = [conditional, "images.npz", "--num-images", str(num_images)]
    from_data = total(run, capsys)
    assert from_data == total([*run, "--class-labels", same], capsys)
    assert from_data != total([*run, "--class-labels", ",".join("0" * num_images)], capsys)


def test_data_must_have_the_classes_of_the_model(conditional, images_with_labels, capsys):
    Path("folder", "b").mkdir(parents=True)
    Image.fromarray(images_with_labels[0, ..., 0]).save("folder/b/0.png")
    line = error_line(["likelihood", conditional, "folder", "--quiet"], capsys)
    assert "folder has 1 " in line
    assert "the model has 2 classes" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--terms 6", "terms is 6; want a whole number from 1 to T - 1 = 5"),
        ("--num-images 0", "--num-images is 0; want a whole number, at least 1"),
        ("--variance-type learned", "variance_type is 'learned', for which the network must return 2 channels"),
        ("--class-labels 1,0,1", "class_labels were given, but the model is not"),
        ("--out .", "--out is .; want a .npz file"),
        ("--out x.png --plot x.png", "--out is x.png; want a .npz file"),
        ("--plot x.jpg", "--plot is x.jpg; want a .png file"),
        ("--plot images.npz/x.png", "cannot write images.npz/x.png"),
        ("--variance-type big", "argument --variance-type: invalid choice: 'big'"),
    ],
)
@pytest.mark.usefixtures("images_with_labels")
def test_likelihood_errors(tiny, capsys, flags, message):
    assert message in error_line(["likelihood", tiny, "images.npz", "--quiet", *flags.split()], capsys)


def test_images_must_have_the_size_of_the_model(tiny, capsys):
    np.savez("wide.npz", x=np.full((2, 4, 8), 9, dtype=np.uint8))
    line = error_line(["likelihood", tiny, "wide.npz", "--quiet"], capsys)
    assert "data is (2, 4, 8, 1) torch.uint8; want [N, 4, 4, 1]" in line


def test_likelihood_needs_data(tiny, capsys):
    assert "required: DATA" in error_line(["likelihood", tiny], capsys)
