"""--class-labels: numbers, names, and every class in turn."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastddpm.checkpoints import shipped
from fastddpm.cli.labels import class_labels, parse_labels
from fastddpm.cli.main import main
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.indices import Indices
from tests.support.command_line import draw_uint8, error_line
from tests.support.jobs import save_tiny

GARMENTS = ("T-shirt/top", "trousers", "dress, long", "bag")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A class-conditional checkpoint that names its four classes."""
    folder = tmp_path_factory.mktemp("garments")
    save_tiny(folder, num_class_embeds=len(GARMENTS))
    (folder / "classes.json").write_text(json.dumps(GARMENTS))
    return str(folder)


@pytest.fixture(scope="module")
def with_null(tmp_path_factory):
    """Such a checkpoint with a null label, as training with --label-dropout makes it."""
    folder = tmp_path_factory.mktemp("dropout")
    save_tiny(folder, num_class_embeds=len(GARMENTS) + 1, null_label=len(GARMENTS))
    (folder / "classes.json").write_text(json.dumps(GARMENTS))
    return str(folder)


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("unnamed"), num_class_embeds=3)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("trousers", [1]),
        ("bag,trousers", [3, 1]),
        (" bag , trousers ,", [3, 1]),
        ("dress, long", [2]),
        ("bag,dress, long,trousers", [3, 2, 1]),
        ("bag,0-1,2", [3, 0, 1, 2]),
        ("0,3-5", [0, 3, 4, 5]),
        ("T-shirt/top", [0]),
    ],
)
def test_labels_are_names_or_numbers(text, labels):
    assert list(parse_labels(text, GARMENTS)) == labels


def test_names_that_are_numbers():
    """Classes that were folders 1, 2 and 10: 10 can only be a name, but 1 and 2 are ambiguous."""
    names = ("1", "2", "10")
    assert list(parse_labels("10", names)) == [2]
    for text in ("1", "10,2", "2"):
        with pytest.raises(ValueError, match=r"has \d, which is the name of class \d and the number of another; write"):
            parse_labels(text, names)
    assert list(parse_labels("1-1,2-2", names)) == [1, 2]
    assert list(parse_labels("01", ("01", "02"))) == [0]
    ages = ("0-9", "10-19", "1-2")
    assert list(parse_labels("10-19", ages)) == [1]
    for text in ("1-2", "10-19,1-2"):
        with pytest.raises(ValueError, match="has 1-2, which is the name of class 2 and a range of numbers"):
            parse_labels(text, ages)
    assert list(parse_labels("0,1,2", ("0", "1", "2"))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("trouser", GARMENTS, "has 'trouser'; want a number, or one of T-shirt/top, trousers, dress, long, bag"),
        ("bag,coat", GARMENTS, "has 'coat'; want a number, or one of T-shirt/top, trousers"),
        ("bag,0-999999999999", GARMENTS, "has '0-999999999999'; want a number, or one of"),
        ("trousers", None, "is 'trousers', but the checkpoint does not name its classes; want numbers, such as 0,3-5"),
        ("1-", None, "is '1-', but the checkpoint does not name its classes"),
        ("x" * 100_000, None, "xxx...xxx"),
    ],
)
def test_unknown_names_are_errors(text, names, message):
    with pytest.raises(ValueError, match=r"^--class-labels ") as error:
        parse_labels(text, names)
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def test_few_of_many_names_are_listed():
    with pytest.raises(ValueError, match=r"one of c0, .+, c19, \.\.\.$"):
        parse_labels("d", [f"c{i}" for i in range(1000)])


def test_every_class_in_turn_by_sample_index(unnamed):
    sampler = Sampler.from_pretrained(unnamed)

    def labels(text):
        samples = Indices.parse(text)
        given = class_labels(None, sampler, samples)
        return given.take(np.arange(min(len(samples), 9)) % len(given)).tolist()

    assert labels("0-7") == [0, 1, 2, 0, 1, 2, 0, 1]
    assert labels("0-1") == [0, 1]
    assert labels("7-12") == [1, 2, 0, 1, 2, 0]
    assert labels("4,0-1,9") == [1, 0, 1, 0]
    assert labels(f"5-{10**12}") == [2, 0, 1, 2, 0, 1, 2, 0, 1]


def test_the_null_label_is_not_a_class(tmp_path):
    """Without labels each sample is of a class; the null label can be asked for by its number."""
    sampler = Sampler.from_pretrained(save_tiny(tmp_path, num_class_embeds=3, null_label=2))
    assert list(class_labels(None, sampler, Indices.of(range(5)))) == [0, 1]
    assert list(class_labels(None, sampler, Indices.parse("0,4,7"))) == [0, 0, 1]
    assert list(class_labels("2", sampler, Indices.of(range(5)))) == [2]


def test_too_many_scattered_samples_need_labels(unnamed):
    sampler, samples = Sampler.from_pretrained(unnamed), Indices.parse("0,5-99999999999")
    with pytest.raises(ValueError, match="give --class-labels for so many samples, 99999999996"):
        class_labels(None, sampler, samples)
    assert list(class_labels("2,0", sampler, samples)) == [2, 0]


def test_a_model_without_classes_has_no_labels(tiny):
    assert class_labels(None, Sampler.from_pretrained(tiny), Indices.of(5)) is None


@pytest.mark.parametrize("out", ["x.npz", "x/"])
def test_samples_without_labels_are_those_of_every_class(model, out):
    flags = ["--indices", "2-7", "--batch-size", "6", "--format", "npz", "--out", out, "--quiet"]
    assert main(["sample", model, *flags]) == 0
    want = draw_uint8(model, range(2, 8), class_labels=[2, 3, 0, 1, 2, 3], batch_size=6)
    assert np.array_equal(np.load("x.npz" if out == "x.npz" else "x/00000.npz")["arr_0"], want)


def test_names_are_the_numbers_of_their_classes(model):
    for text, out in (("bag,dress, long", "names.npz"), ("3,2", "numbers.npz")):
        assert main(["sample", model, "--class-labels", text, "--out", out, "--quiet"]) == 0
    assert Path("names.npz").read_bytes() == Path("numbers.npz").read_bytes()


@pytest.mark.parametrize(
    "flags", [["--class-labels", "bag"], ["--class-labels", "1,3", "--guidance-scale", "2"], ["--guidance-scale", "2"]]
)
def test_classes_without_a_checkpoint_are_those_of_the_bundled_model(flags, with_null, monkeypatch):
    monkeypatch.setitem(shipped.FOLDERS, "fashion-mnist-classes", Path(with_null))
    files = []
    for source in ([], ["fashion-mnist-classes"], [with_null]):
        assert main(["sample", *source, *flags, "--num-samples", "3", "--out", "x.npz", "--quiet"]) == 0
        files.append(Path("x.npz").read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_folder_of_every_class_grows(model):
    """Labels of samples that are there do not change when there are more of them."""
    for count in (3, 6):
        flags = ["--num-samples", str(count), "--batch-size", "3", "--format", "npz", "--out", "x/", "--quiet"]
        assert main(["sample", model, *flags]) == 0
    labels = [np.load(f"x/0000{k}.npz")["arr_1"].tolist() for k in range(2)]
    assert labels == [[0, 1, 2], [3, 0, 1]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--class-labels 4", "class_labels are [4, 4]; want whole numbers, 0 <= label < 4"),
        ("--class-labels 2-5", "class_labels are [2, 5]; want whole numbers, 0 <= label < 4"),
        ("--class-labels 0-999999999999", "--class-labels lists 1000000000000 classes for 16 samples; want"),
        ("--class-labels 0-3 --num-samples 3", "--class-labels lists 4 classes for 3 samples; want"),
        ("--class-labels 9223372036854775808", "--class-labels has '9223372036854775808'; want a number"),
        ("--class-labels 0-999999999999 --out x/", "--class-labels lists 1000000000000 classes for 16 samples"),
        ("--class-labels ,", "--class-labels lists 0 classes for 16 samples"),
        ("--indices 0-999999999999", "1000000000000 samples are too many for one file, samples.png; write a folder"),
        ("--indices 0-999999999999 --class-labels 0,1", "1000000000000 samples are too many for one file"),
        ("--indices 0-999999999999 --out x/", "want at most 16777216"),
        ("--indices 1,5-999999999999 --out x/", "give --class-labels for so many samples"),
    ],
)
def test_errors_about_labels(model, flags, message, capsys):
    assert message in error_line(["sample", model, *flags.split(), "--quiet"], capsys)
