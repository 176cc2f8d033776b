"""`fastddpm sample --trajectory`: which states it keeps, and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.cli import trajectory as command
from fastddpm.cli.main import main
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import trajectory
from fastddpm.storage.images import to_uint8
from tests.support.command_line import error_line, record_calls
from tests.support.jobs import save_tiny


def drawn(source, samples, **options):
    """{(step, index): x_t as an image} of a run, and the samples."""
    states = {}

    def keep(step, t, x_0, indices, *, x_t):
        states.update({(step, index): to_uint8(x)[0] for index, x in zip(indices.tolist(), x_t.split(1), strict=True)})

    x = Sampler.from_pretrained(source).sample(samples, callback=keep, progress=False, **options)
    return states, to_uint8(x)


@pytest.mark.parametrize("name", ["way.gif", "way.png", "a/way.PNG"])
def test_states_are_those_of_the_run(tiny, name, monkeypatch, capsys):
    calls = record_calls(monkeypatch, trajectory, "save_trajectory")
    flags = ["--indices", "5,2,9", "--batch-size", "2", "--steps", "4", "--seed", "3"]
    assert main(["sample", tiny, *flags, "--out", "x.png", "--trajectory", name]) == 0
    (((frames, timesteps, path, labels, classes), _),) = calls
    states, samples = drawn(tiny, [5, 2, 9], batch_size=2, steps=4, seed=3)
    want = [torch.stack([states[step, index] for index in (5, 2, 9)]) for step in range(4)]
    assert np.array_equal(frames, torch.stack([*want, samples]))
    assert timesteps == Sampler.from_pretrained(tiny).schedule.table(4).timesteps.flip(0).tolist()
    assert (path, labels, classes) == (name, None, None)
    assert Path("x.png").is_file()
    with Image.open(name) as picture:
        assert picture.format == name[-3:].upper()
    assert f"{name}: the way to 3 samples, in 5 pictures\n" in capsys.readouterr().out


def test_samples_are_the_same_with_a_trajectory(tiny):
    for flags in (["--out", "a.npz"], ["--out", "b.npz", "--trajectory", "way.png"]):
        assert main(["sample", tiny, "--quiet", *flags]) == 0
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


def test_batches_of_one_size_are_no_obstacle(tiny):
    flags = ["--batch-invariant", "--indices", "7,3", "--out", "x.png", "--trajectory", "way.gif", "--quiet"]
    assert main(["sample", tiny, *flags]) == 0


@pytest.mark.parametrize(
    ("shape", "gif", "png"), [((3, 32, 32), 64, 8), ((3, 256, 256), 16, 8), ((1, 4096, 4096), 1, 1)]
)
def test_few_large_samples_are_shown(tiny, shape, gif, png):
    sampler = Sampler(lambda x, t: x, shape=shape)
    for path, count in (("a.gif", gif), ("a.png", png)):
        assert len(command.Trajectory(sampler, range(100), None, 1000, path).samples) == count


def test_transparency_is_left_out(tmp_path):
    model = save_tiny(tmp_path / "rgba", in_channels=4, out_channels=4)
    assert main(["sample", model, "--num-samples", "2", "--quiet", "--trajectory", "way.png"]) == 0
    with Image.open("way.png") as picture:
        assert picture.mode == "RGB"


def test_classes_arrange_the_pictures(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", num_class_embeds=2)
    (tmp_path / "model" / "classes.json").write_text(json.dumps(["bag", "coat"]))
    calls = record_calls(monkeypatch, trajectory, "save_trajectory")
    assert main(["sample", model, "--num-samples", "3", "--quiet", "--trajectory", "way.gif"]) == 0
    assert calls[0][0][-2:] == ([0, 1, 0], ("bag", "coat"))


def test_nan_is_reported_by_the_sampler():
    sampler = Sampler(lambda x, t: x * float("nan"), shape=(1, 4, 4))
    way = command.Trajectory(sampler, range(2), None, 5, "way.png")
    with pytest.raises(ValueError, match="step 1 of 5"):
        sampler.sample(2, steps=5, callback=way, progress=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trajectory way.jpg", "--trajectory is way.jpg; want a .gif or a .png file"),
        ("--trajectory way", "--trajectory is way; want a .gif or a .png file"),
        ("--trajectory samples.png", "--trajectory and --out are both samples.png; want two files"),
        ("--trajectory ./x/../samples.png", "--trajectory and --out are both samples.png; want two files"),
        ("--trajectory file/way.gif", "cannot write file/way.gif"),
        ("--trajectory folder.gif", "cannot write folder.gif: it is a folder"),
        ("--trajectory way.gif --out x/", "--trajectory is for one file, not for a folder; use --out x.png"),
        ("--trajectory way.gif --steps 0", "steps is 0"),
        ("--trajectory way.gif --steps 9223372036854775808", "steps is 9223372036854775808"),
    ],
)
def test_trajectory_errors(tiny, flags, message, capsys):
    Path("file").touch()
    Path("folder.gif").mkdir()
    assert message in error_line(["sample", tiny, *flags.split()], capsys)
    assert not list(Path().glob("*.png"))
