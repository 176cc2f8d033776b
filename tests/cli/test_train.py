"""`fastddpm train`: its options, what it prints, and its errors."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm import checkpoints
from fastddpm.cli.main import main
from fastddpm.cli.train import _OPTIONS
from fastddpm.core.schedule import Schedule
from fastddpm.train import TrainOptions, trainer
from tests.support.command_line import error_line


def test_train_passes_all_options(monkeypatch):
    given = {}

    def trained(data, out, options, **rest):
        given.update(options=options, out=out, **rest)

    monkeypatch.setattr(trainer, "train", trained)
    np.savez("data.npz", x_train=np.zeros((3, 4, 4), np.uint8), y_train=np.array([0, 1, 1]))
    assert main(["train", "data.npz", "--out", "run", "--quiet"]) == 0
    want = {
        "options": TrainOptions(),
        "out": "run",
        **dict.fromkeys(("labels", "classes", "medium", "device")),
        "progress": False,
    }
    assert given == want

    value_of_type = {int: 7, float: 0.25, bool: True, tuple: (4, 8)}
    want = {field.name: value_of_type.get(type(field.default)) for field in dataclasses.fields(TrainOptions)}
    want |= {"warmup": 7, "attention": (0, 1), "groups": 4, "precision": "fp32", "engine": "compiled"}
    del want["schedule"], want["init"]
    flags = ["--beta-schedule", "sigmoid", "--timesteps", "50", "--prediction", "v_prediction", "--device", "cpu"]
    flags += ["--variance-type", "learned_range"]
    for name, value in want.items():
        text = [] if value is True else [",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        flags += ["--" + name.replace("_", "-"), *text]
    assert main(["train", "data.npz", "--out", "run", "--class-conditional", *flags, "--quiet"]) == 0
    schedule = Schedule(beta_schedule="sigmoid", num_train_timesteps=50, prediction_type="v_prediction")
    schedule = dataclasses.replace(schedule, variance_type="learned_range")
    assert given["options"] == TrainOptions(**want, schedule=schedule)
    assert (given["device"], given["labels"].tolist()) == ("cpu", [0, 1, 1])
    assert main(["train", "data.npz", "--out", "run", "--init", "somewhere", "--quiet"]) == 0
    assert given["options"] == TrainOptions(init="somewhere")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--steps", "0"], "steps is 0"), (["--out", "/proc/run"], "cannot write /proc/run")],
)
def test_options_are_checked_before_images_are_read(flags, message, capsys):
    assert f"fastddpm: error: {message}" in error_line(["train", "nowhere", "--out", "run", *flags], capsys)
    assert not Path("run").exists()


TINY = "--steps 2 --batch-size 2 --channels 8 --attention 0 --groups 4 --timesteps 100 --warmup 1 --precision fp32"


def save_images(folder, count=6, shape=(4, 4)):
    Path(folder).mkdir(parents=True)
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)):
        Image.fromarray(image).save(f"{folder}/{i}.png")


def run_hint(printed: str, out: str) -> None:
    """Run the command that `train` prints, as a shell would."""
    hint = re.fullmatch(rf"{re.escape(out)}: trained for 2 steps; now `fastddpm (sample .+)`\n", printed)[1]
    assert main(shlex.split(hint)) == 0
    assert Path("samples.png").exists()


@pytest.mark.parametrize("shape", [(4, 4), (4, 8), (4, 4, 3), (4, 4, 4)], ids=str)
def test_train_then_sample(shape, capsys):
    """Grey, non-square, in colour, and RGBA, for which arrays are needed."""
    np.savez("x.npz", np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8))
    assert main(["train", "x.npz", "--out", "runs/a", *TINY.split()]) == 0
    out, err = capsys.readouterr()
    assert "2/2" in err
    run_hint(out, "runs/a")
    assert main(["sample", "runs/a", "--num-samples", "3", "--out", "y.npz", "--quiet"]) == 0
    assert np.load("y.npz")["arr_0"].shape == (3, *(shape if len(shape) == 3 else (*shape, 1)))


@pytest.mark.parametrize("out", ["-run", "a run", "it's", "fashion-mnist", "`$HOME`", "~", "Läufe/1"])
def test_hint_names_any_folder(out, capsys):
    save_images("images")
    assert main(["train", "images", f"--out={out}", *TINY.split()]) == 0
    run_hint(capsys.readouterr().out, out)


def test_class_conditional_model(capsys):
    """Its classes are printed and kept in natural order, and the hint draws all of them."""
    for name in ("1", "2", "10"):
        save_images(f"animals/{name}", 2)
    assert main(["train", "animals", "--out", "run", "--class-conditional", *TINY.split()]) == 0
    out, err = capsys.readouterr()
    assert "run: classes (kept in classes.json): 0 1, 1 2, 2 10\n" in err
    assert checkpoints.load("run").classes == ("1", "2", "10")
    run_hint(out, "run")
    assert main(["sample", "run", "--class-labels", "10", "--out", "x.npz", "--quiet"]) == 0


MORE = ["--variance-type learned_range", "--class-conditional --label-dropout 0.5"]


@pytest.mark.parametrize("flags", MORE)
def test_train_then_draw_and_evaluate(flags, capsys):
    """A model with a learned variance, and one with a null label."""
    for name in ("cat", "dog"):
        save_images(f"animals/{name}", 3)
    assert main(["train", "animals", "--out", "run", *TINY.split(), *flags.split(), "--sample-every", "1"]) == 0
    run_hint(capsys.readouterr().out, "run")
    assert Path("run/samples/step-0000002.png").exists()
    assert main(["likelihood", "run", "animals", "--num-images", "2", "--terms", "2", "--quiet"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", MORE)
def test_train_then_verify(flags):
    for name in ("cat", "dog"):
        save_images(f"animals/{name}", 3)
    assert main(["train", "animals", "--out", "run", *TINY.split(), *flags.split(), "--quiet"]) == 0
    assert main(["verify", "run", "--steps", "3", "--quiet"]) == 0


def test_classes_of_init_number_the_folders():
    for name in ("cat", "dog", "eel"):
        save_images(f"animals/{name}", 2)
    save_images("others/dog", 2)
    save_images("others/eel", 2)
    assert main(["train", "animals", "--out", "first", "--class-conditional", *TINY.split(), "--quiet"]) == 0
    flags = "--init first --class-conditional --steps 1 --batch-size 2 --sample-every 0 --quiet"
    assert main(["train", "others", "--out", "second", *flags.split()]) == 0
    assert checkpoints.load("second").classes == ("cat", "dog", "eel")


@pytest.mark.parametrize("conditional", ["", "--class-conditional"])
def test_command_for_a_longer_run_works(conditional, capsys):
    """It keeps the options, but for those that the checkpoint brings."""
    for name in ("cat", "dog"):
        save_images(f"some animals/{name}", 3)
    flags = f"{TINY} --steps 3 --flip --seed 7 --learning-rate 0.001 --sample-every 0 --quiet {conditional}".split()
    assert main(["train", "some animals", "--out=-run", *flags]) == 0
    Path("-run-more").mkdir()
    line = error_line(["train", "some animals", "--out=-run", *flags, "--steps", "5"], capsys)
    assert "-run holds a run of 3 steps, and the learning rates of its steps follow from that number" in line
    command = line.rpartition("; the command is: fastddpm ")[2]
    assert command == (
        "train 'some animals' --init ./-run --out ./-run-more-2 --steps 2 --batch-size 2 --learning-rate 0.001 "
        f"--warmup 1 --flip --seed 7 --sample-every 0 {conditional} --precision fp32 --quiet\n".replace("  ", " ")
    )
    assert main(shlex.split(command)) == 0
    assert checkpoints.load("-run-more-2").config["block_out_channels"] == [8]


def test_defaults_are_those_of_train_options():
    """The command line repeats them, so that --help does not import torch."""
    options = TrainOptions()
    assert {name: default for name, (default, _) in _OPTIONS.items()} == {n: getattr(options, n) for n in _OPTIONS}


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("nowhere", "", "cannot read nowhere"),
        ("empty", "", "empty "),
        ("corrupt", "", "corrupt/1.png"),
        ("mixed", "", "mixed/0.png is 4x4, mixed/1.png is 5x5"),
        ("file", "", "file is "),
        ("good.npz", "--steps 0", "steps is 0"),
        ("good.npz", "--batch-size -1", "batch_size is -1"),
        ("good.npz", "--precision fp8", "invalid choice: 'fp8'"),
        ("good.npz", "--precision fp16", "invalid choice: 'fp16'"),
        ("good.npz", "--channels 8,x", "'8,x' is not a list"),
        ("good.npz", "--channels 9223372036854775808", "'9223372036854775808' is not a list of whole numbers"),
        ("good.npz", "--timesteps 0", "num_train_timesteps is 0"),
        ("good.npz", "--out file/run", "cannot write file/run"),
        ("good.npz", "--out good.npz/run", "cannot write good.npz/run: Not a directory"),
        ("mixed", "--out mixed/run", "--out is mixed/run, where the run would write mixed/run, in DATA, mixed; want a"),
        ("mixed", "--out ./empty/../mixed", "where the run would write empty/../mixed, in DATA, mixed; want"),
        ("mixed/samples", "--out mixed", "where the run would write mixed/samples, in DATA, mixed/samples; want"),
        ("good.npz", "--out linked", "where the run would write linked/loss.png, in DATA, good.npz; want"),
        ("good.npz:arr_0", "--out linked", "linked/loss.png, in DATA, good.npz:arr_0; want"),
        ("x" * 300, "", "cannot read xxx"),
        ("good.npz", f"--out {'x' * 300}", "cannot write xxx"),
    ],
)
def test_train_errors(source, flags, message, capsys):
    for folder in ("empty", "corrupt", "mixed"):
        Path(folder).mkdir()
    Image.new("L", (4, 4)).save("corrupt/0.png")
    Path("corrupt/1.png").write_bytes(Path("corrupt/0.png").read_bytes()[:40])
    Image.new("L", (4, 4)).save("mixed/0.png")
    Image.new("L", (5, 5)).save("mixed/1.png")
    Path("file").write_text("hello")
    np.savez("good.npz", np.zeros((3, 4, 4), np.uint8))
    Path("mixed/samples").mkdir()
    Path("linked").mkdir()
    Path("linked/loss.png").symlink_to(Path("good.npz").resolve())
    assert message in error_line(["train", source, "--out", "run", *flags.split()], capsys)
    assert not Path("run").exists()


def test_quiet_train_prints_nothing(capfd):
    Path("images").mkdir()
    for i in range(1001):
        Image.new("L", (1, 1)).save(f"images/{i}.png")
    flags = "--steps 1 --batch-size 2 --channels 4 --attention , --groups 4 --timesteps 100 --quiet"
    assert main(["train", "images", "--out", "run", *flags.split()]) == 0
    assert capfd.readouterr() == ("", "")


def test_help_shows_the_defaults_of_the_schedule(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "(default: linear)" in text
    assert "(default: 1000)" in text
