"""`fastddpm train`: its options, what it prints, and its errors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.cli import train as command
from fastddpm.cli.main import main
from fastddpm.core.schedule import Schedule
from fastddpm.train import TrainOptions
from tests.support.command_line import error_line


def test_train_passes_all_options(monkeypatch):
    given = {}

    def trained(data, out, options, **rest):
        given.update(options=options, out=out, **rest)

    monkeypatch.setattr(command, "train", trained)
    np.savez("data.npz", x_train=np.zeros((3, 4, 4), np.uint8), y_train=np.array([0, 1, 1]))
    assert main(["train", "data.npz", "--out", "run", "--quiet"]) == 0
    assert given == {"options": TrainOptions(), "out": "run", "labels": None, "device": None, "progress": False}

    value_of_type = {int: 7, float: 0.25, bool: True, tuple: (4, 8)}
    want = {field.name: value_of_type.get(type(field.default)) for field in dataclasses.fields(TrainOptions)}
    want |= {"warmup": 7, "attention": (0, 1), "groups": 4, "precision": "fp32", "engine": "compiled"}
    del want["schedule"], want["init"]
    flags = ["--beta-schedule", "sigmoid", "--timesteps", "50", "--prediction", "v_prediction", "--device", "cpu"]
    for name, value in want.items():
        text = [] if value is True else [",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        flags += ["--" + name.replace("_", "-"), *text]
    assert main(["train", "data.npz", "--out", "run", "--class-conditional", *flags, "--quiet"]) == 0
    schedule = Schedule(beta_schedule="sigmoid", num_train_timesteps=50, prediction_type="v_prediction")
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


def test_train_then_sample(capsys):
    Path("images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)):
        Image.fromarray(image).save(f"images/{i}.png")
    flags = "--steps 2 --batch-size 2 --channels 8 --attention 0 --groups 4 --timesteps 100 --warmup 1"
    assert main(["train", "images", "--out", "runs/a", *flags.split()]) == 0
    out, err = capsys.readouterr()
    assert out == "runs/a: trained for 2 steps; now `fastddpm sample runs/a`\n"
    assert "2/2" in err
    assert main(["sample", "runs/a", "--num-samples", "3", "--out", "x.npz", "--quiet"]) == 0
    assert np.load("x.npz")["arr_0"].shape == (3, 4, 4, 1)


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
        ("good.npz", "--timesteps 0", "num_train_timesteps is 0"),
        ("good.npz", "--out file/run", "cannot write file/run"),
        ("good.npz", "--out good.npz/run", "cannot write good.npz/run: Not a directory"),
        ("mixed", "--out mixed/run", "--out is mixed/run, a folder in DATA, mixed, where the run's own images would"),
        ("mixed", "--out ./empty/../mixed", "a folder in DATA, mixed, where"),
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
