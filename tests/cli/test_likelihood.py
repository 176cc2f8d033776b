"""`fastddpm likelihood`: what it prints and writes, which images and labels it uses, and its errors."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.checkpoints import shipped
from fastddpm.cli import options
from fastddpm.cli.main import main
from fastddpm.evaluate import likelihood as module
from fastddpm.evaluate.likelihood import bound
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import plots
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
    bounds = record_calls(monkeypatch, module, "bound")
    flags = "--num-images 2 --terms 3 --seed 9 --batch-size 2 --precision fp32 --device cpu --engine eager"
    assert main(["likelihood", tiny, "images.npz", *flags.split(), "--variance-type", "fixed_large", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert loads == [((tiny,), {"variant": None, "device": "cpu", "precision": "fp32", "engine": "eager"})]
    [((sampler, x), options)] = bounds
    assert np.array_equal(x, images_with_labels[:2])
    assert options == {"terms": 3, "seed": 9, "batch_size": 2, "class_labels": None, "progress": False}
    assert sampler.schedule.variance_type == "fixed_large"


@pytest.mark.usefixtures("images_with_labels")
def test_one_image_has_no_standard_error(tiny, capsys):
    assert main(["likelihood", tiny, "images.npz", "--num-images", "1", "--device", "cpu", "--quiet"]) == 0
    _, titles, *rows = capsys.readouterr().out.splitlines()
    assert titles.endswith("standard error")
    assert [row.split()[-1] for row in rows] == ["-"] * 4


@pytest.fixture
def result(tiny, images_with_labels):
    """The bound that `reported` has."""
    sampler = Sampler.from_pretrained(tiny, device="cpu", precision="fp32")
    return bound(sampler, images_with_labels[:2], terms=3, seed=9, batch_size=2, progress=False)


@pytest.fixture
def reported(tiny, images_with_labels, capsys, monkeypatch):
    """(the object printed as JSON, the calls of the plot) of a command that also writes x.npz and x.png."""
    calls = record_calls(monkeypatch, plots, "bound_terms")
    flags = "--num-images 2 --terms 3 --seed 9 --batch-size 2 --precision fp32 --device cpu --quiet"
    flags += " --out x.npz --plot x.png --json"
    assert main(["likelihood", tiny, "images.npz", *flags.split()]) == 0
    return json.loads(capsys.readouterr().out), calls


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
    monkeypatch.setitem(shipped.FOLDERS, "fashion-mnist", Path(tiny))
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


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "npy", "named"])
def test_labels_come_from_every_kind_of_data(conditional, images_with_labels, capsys, kind):
    x, labels = images_with_labels, [0, 0, 1]
    for i, (image, label) in enumerate(zip(x[..., 0], labels, strict=True)):
        Path("folder", f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"folder/class {label}/{i}.png")
    shutil.make_archive("x", "zip", "folder")
    shutil.make_archive("x", "tar", "folder")
    np.save("x.npy", x)
    np.save("y.npy", np.array(labels))
    np.savez("named.npz", x_val=x, y_val=np.array(labels)[:, None], x_train=x[:1], y_train=[1])
    data = {"folder": "folder", "zip": "x.zip", "tar": "x.tar", "npy": "x.npy", "named": "named.npz:x_val"}[kind]
    np.savez("images.npz", x=x, y=np.array(labels))
    assert total([conditional, data], capsys) == total([conditional, "images.npz"], capsys)


def test_names_of_classes_are_labels(tiny, tmp_path, images_with_labels, capsys):
    named = save_tiny(tmp_path / "named", num_class_embeds=2)
    Path(named, "classes.json").write_text('["bag", "shoe"]')
    by_name = total([named, "images.npz", "--class-labels", "shoe,bag,shoe"], capsys)
    assert by_name == total([named, "images.npz", "--class-labels", "1,0,1"], capsys)


def test_folders_are_the_classes_without_the_null_label(tmp_path, images_with_labels, capsys):
    null = save_tiny(tmp_path / "null", num_class_embeds=3, null_label=2)
    for i, (image, label) in enumerate(zip(images_with_labels[..., 0], "aab", strict=True)):
        Path("folder", label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"folder/{label}/{i}.png")
    conditional = total([null, "folder"], capsys)
    assert conditional == total([null, "folder", "--class-labels", "0,0,1"], capsys)
    assert conditional != total([null, "folder", "--class-labels", "2,2,2"], capsys)


def test_a_class_conditional_model_needs_labels(conditional, images_with_labels, capsys):
    np.savez("unlabelled.npz", x=images_with_labels)
    line = error_line(["likelihood", conditional, "unlabelled.npz", "--quiet"], capsys)
    assert (
        "the model is class-conditional, but cannot load unlabelled.npz as .npz: it holds x; want labels of x" in line
    )
    assert line.endswith("; or give --class-labels\n")
    line = error_line(
        ["likelihood", conditional, "unlabelled.npz", "--quiet", "--class-labels", "0-99999999999"], capsys
    )
    assert "class_labels are (100000000000,) for 3 samples; want one each" in line


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


def written(*places):
    """The content of all files in these places."""
    files = [file for place in map(Path, places) for file in ([place] if place.is_file() else place.rglob("*"))]
    return {file: file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out images.npz", "--out is images.npz, which the command reads from (images.npz); name another file"),
        ("--out soft.npz", "--out is soft.npz, which the command reads from (images.npz)"),
        ("--out hard.npz", "--out is hard.npz, which the command reads from (images.npz)"),
        ("--plot soft.png", "--plot is soft.png, which the command reads from (images.npz)"),
        ("--out model.npz", "--out is model.npz, which the command reads from ("),
        ("--out x.npz --plot x.png", "--out and --plot are both x.npz; want two files"),
    ],
)
def test_no_output_replaces_an_input(tmp_path, images_with_labels, capsys, flags, message):
    model = save_tiny(tmp_path / "model")
    for link in ("soft.npz", "soft.png"):
        Path(link).symlink_to("images.npz")
    os.link("images.npz", "hard.npz")
    Path("model.npz").symlink_to(next(Path(model).rglob("config.json")))
    Path("x.png").symlink_to("x.npz")
    before = written(".")
    for data in ("images.npz", "images.npz:x"):
        assert message in error_line(["likelihood", model, data, "--quiet", *flags.split()], capsys)
    assert written(".") == before


@pytest.mark.parametrize(
    "plot", ["data/x.png", "data/below/x.png", "data/new/x.png", "linked/x.png", "linked/new/x.png"]
)
@pytest.mark.parametrize("name", ["data", "same"])
def test_a_plot_is_not_drawn_into_the_data(tiny, images_with_labels, capsys, plot, name):
    """Nor into a folder that is read through a link, which may lead back to where it is."""
    Path("data", "below").mkdir(parents=True)
    Path("linked").mkdir()
    Path("data", "link").symlink_to("../linked")
    Path("linked", "back").symlink_to("../data")
    Path("same").symlink_to("data")
    for i, image in enumerate(images_with_labels[..., 0]):
        Image.fromarray(image).save(f"data/{i}.png")
    line = error_line(["likelihood", tiny, name, "--plot", plot, "--quiet"], capsys)
    assert f"--plot is {plot}, in DATA, which would hold one more image; name another place" in line
    assert not list(Path().rglob("x.png"))
    assert not list(Path().rglob("new"))
    assert main(["likelihood", tiny, name, "--plot", "x.png", "--quiet"]) == 0


def test_it_says_first_what_it_will_do(tiny, images_with_labels, capsys, monkeypatch):
    arguments = ["likelihood", tiny, "images.npz", "--device", "cpu", "--precision", "fp32"]
    told = []
    for flags in ([], ["--terms", "2", "--num-images", "2"]):
        assert main([*arguments, *flags]) == 0
        told.append(capsys.readouterr().err.splitlines()[0])
    assert told[0] == "fastddpm: evaluating 6 terms of each of 3 images, fp32 on cpu"
    assert told[1] == "fastddpm: evaluating 3 terms of each of 2 images, fp32 on cpu"
    monkeypatch.setattr(options, "A_MINUTE", 18)
    assert main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{told[0]}; on a CPU this may take minutes or hours; the bar shows how long; "
        "--terms and --num-images shorten it"
    )


def test_a_result_comes_before_its_files(tiny, images_with_labels, capsys, monkeypatch):
    """A plot that fails does not lose it."""

    def fails(*_, **__):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(plots, "bound_terms", fails)
    assert main(["likelihood", tiny, "images.npz", "--plot", "x.png", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("bound ")
    assert "No space left on device: 'x.png'; free some space there" in err


def test_a_name_of_an_array_is_safe_to_print(tiny, images_with_labels, capsys):
    np.savez("images.npz", **{"x\x1b[2J\n" + "y" * 10_000: images_with_labels})
    assert main(["likelihood", tiny, "images.npz", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 6
    assert "\x1b" not in out
    assert len(out) < 1000


def test_images_must_have_the_size_of_the_model(tiny, capsys):
    np.savez("wide.npz", x=np.full((2, 4, 8), 9, dtype=np.uint8))
    line = error_line(["likelihood", tiny, "wide.npz", "--quiet"], capsys)
    assert "data is (2, 4, 8, 1) torch.uint8; want [N, 4, 4, 1]" in line


def test_likelihood_needs_data(tiny, capsys):
    assert "required: DATA" in error_line(["likelihood", tiny], capsys)
