"""The command line: what it writes, what it says, and one line for each thing that can be wrong."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastddpm import __version__, checkpoints
from fastddpm.cli.main import main
from fastddpm.core.schedule import Schedule
from fastddpm.evaluate import likelihood
from fastddpm.evaluate.likelihood import bound
from fastddpm.networks.unet2d import UNet2D
from fastddpm.processes.distributed import Ranks
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import images
from fastddpm.storage.shards import FORMATS
from fastddpm.train.trainer import TrainOptions

command_line = sys.modules["fastddpm.cli.main"]
ROOT = Path(__file__).parents[2]
TINY = {"sample_size": 4, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
TINY |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}


def save_tiny(folder, channels=1):
    torch.manual_seed(0)
    net = UNet2D(**TINY, in_channels=channels, out_channels=channels)
    checkpoints.save(folder, net.config, net.state_dict(), Schedule(num_train_timesteps=6))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of a random network, 4 x 4 grey, T = 6."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error(arguments, capsys):
    """The one line on stderr of a command that fails with status 2."""
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"fastddpm: error: .+\n", err)
    return err


def drawn(tiny, samples, **how):
    return Sampler.from_pretrained(tiny).sample(samples, output="uint8", progress=False, **how).numpy()


def test_sample_writes_a_grid(tiny, capsys):
    assert main(["sample", tiny]) == 0
    assert np.array_equal(np.asarray(Image.open("samples.png")), images.grid(drawn(tiny, 16))[..., 0])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"samples.png: 16 samples in [\d.]+ s, [\d.e+]+ per second\n", out)
    assert "6/6" in err


def test_sample_uses_the_model_in_the_package_by_default(tiny, monkeypatch):
    monkeypatch.setattr("fastddpm.sampling.sampler.shipped_model", lambda: tiny)
    assert main(["sample", "--quiet", "--out", "x.npz"]) == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], drawn(tiny, 16))


def test_sample_passes_every_option_on(tiny):
    flags = "--num-samples 5 --seed 9 --steps 3 --sampler ddim --eta 0.5 --batch-size 2 --precision fp32 --device cpu"
    flags += " --engine eager"
    assert main(["sample", tiny, *flags.split(), "--out", "x.npz", "--quiet"]) == 0
    sampler = Sampler.from_pretrained(tiny, precision="fp32", device="cpu")
    how = {"seed": 9, "sampler": "ddim", "eta": 0.5, "batch_size": 2, "output": "uint8", "progress": False}
    assert np.array_equal(np.load("x.npz")["arr_0"], sampler.sample(5, steps=3, **how))
    assert main(["sample", tiny, "--no-noise", "--out", "x.npz", "--quiet"]) == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], drawn(tiny, 16, noise=False))


def test_sample_takes_the_machine_s_options(tiny, monkeypatch):
    given = []

    def noted(*args, **how):
        given.append(how)
        raise ValueError("enough")

    monkeypatch.setattr(Sampler, "from_pretrained", noted)
    for flags in ("", "--engine compiled --batch-invariant --precision fp16"):
        assert main(["sample", tiny, *flags.split()]) == 2
    default, other = given
    assert (default["engine"], default["batch_invariant"], default["precision"]) == ("auto", False, "auto")
    assert (other["engine"], other["batch_invariant"], other["precision"]) == ("compiled", True, "fp16")


def test_a_batch_size_that_would_be_ignored_is_refused(tiny, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert main(["sample", str(tiny), "--batch-invariant", "--batch-size", "5", "--out", str(out)]) == 2
    assert "--batch-size does not apply with --batch-invariant" in capsys.readouterr().err
    assert not out.exists()


def test_sample_in_a_batch_invariant_way(tiny):
    for indices, out in (("0-9", "many.npz"), ("7", "one.npz")):
        flags = ["--batch-invariant", "--indices", indices, "--out", out, "--quiet"]
        assert main(["sample", tiny, *flags]) == 0
    assert np.array_equal(np.load("many.npz")["arr_0"][7:8], np.load("one.npz")["arr_0"])


def test_sample_takes_a_variant(tiny, tmp_path):
    both = shutil.copytree(tiny, tmp_path / "both")
    weights = both / "unet" / "diffusion_pytorch_model.safetensors"
    halved = {name: value / 2 for name, value in load_file(weights).items()}
    save_file(halved, weights.with_suffix(".half.safetensors"))
    assert main(["sample", str(both), "--variant", "half", "--out", "x.npz", "--quiet"]) == 0
    want = Sampler.from_pretrained(both, variant="half").sample(16, output="uint8", progress=False)
    assert np.array_equal(np.load("x.npz")["arr_0"], want)
    assert not np.array_equal(want, drawn(tiny, 16))


def test_sample_writes_a_folder_named_by_index(tiny, capsys):
    assert main(["sample", tiny, "--indices", "7,2-3", "--batch-size", "2", "--out", "a/b", "--quiet"]) == 0
    assert sorted(os.listdir("a/b")) == [".shards", "00002.png", "00003.png", "00007.png", "manifest.json"]
    read = [np.asarray(Image.open(f"a/b/{i:05d}.png")) for i in (7, 2, 3)]
    assert np.array_equal(np.stack(read)[..., None], drawn(tiny, [7, 2, 3], batch_size=2))
    assert capsys.readouterr() == ("", "")


def test_finished_batches_outlive_an_interrupt(tiny, monkeypatch, capsys):
    to_uint8, batches = images.to_uint8, []

    def interrupted(x):
        batches.append(x)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return to_uint8(x)

    monkeypatch.setattr(images, "to_uint8", interrupted)
    assert main(["sample", tiny, "--num-samples", "9", "--batch-size", "2", "--out", "pngs", "--quiet"]) == 130
    assert sorted(os.listdir("pngs")) == [".shards", *(f"0000{i}.png" for i in range(4)), "manifest.json"]
    assert capsys.readouterr().err == (
        "\nfastddpm: stopped: 4 of 9 samples are done; the same command goes on from there\n"
    )
    monkeypatch.setattr(images, "to_uint8", to_uint8)
    assert main(["sample", tiny, "--num-samples", "9", "--out", "pngs"]) == 0
    assert re.fullmatch(r"pngs: all 9 samples are done; [\d.]+ s this time\n", capsys.readouterr().out)
    read = [np.asarray(Image.open(f"pngs/{i:05d}.png")) for i in range(9)]
    assert np.array_equal(np.stack(read)[..., None], drawn(tiny, 9, batch_size=2))


def test_samples_that_are_no_pictures_go_to_npz_as_floats(tmp_path, capsys):
    latent = save_tiny(tmp_path / "latent", channels=5)
    assert "5 channels" in error(["sample", latent], capsys)
    assert main(["sample", latent, "--format", "npz", "--num-samples", "2", "--quiet"]) == 0
    want = Sampler.from_pretrained(latent).sample(2, progress=False)
    assert np.array_equal(np.load("samples.npz")["arr_0"], want)


@pytest.mark.parametrize(
    ("flags", "path", "kind"),
    [
        ([], "samples.png", "grid"),
        (["--format", "png"], "samples", "png"),
        (["--format", "npz"], "samples.npz", "one npz"),
        (["--format", "webdataset"], "samples", "webdataset"),
        (["--out", "a/x.PNG"], "a/x.PNG", "grid"),
        (["--out", "x.npz"], "x.npz", "one npz"),
        (["--out", "x.npz", "--format", "npz"], "x.npz", "one npz"),
        (["--out", "x.npz/"], "x.npz", "png"),
        (["--out", "x.npz/", "--format", "npz"], "x.npz", "npz"),
        (["--out", "x", "--format", "npz"], "x", "npz"),
        (["--out", "folder.1", "--format", "npz"], "folder.1", "npz"),
        (["--out", "x", "--format", "webdataset"], "x", "webdataset"),
        (["--out", "x"], "x", "png"),
        (["--out", "new.samples/"], "new.samples", "png"),
        (["--out", "x.png/"], "x.png", "png"),
        (["--out", "folder.1"], "folder.1", "png"),
        (["--out", "x", "--format", "grid"], "x", "grid"),
        (["--out", "x.data", "--format", "npz"], "x.data", "one npz"),
    ],
)
def test_format_follows_from_out_and_the_other_way_round(tiny, flags, path, kind):
    Path("folder.1").mkdir()
    assert main(["sample", tiny, "--num-samples", "1", "--quiet", *flags]) == 0
    if kind in FORMATS:
        assert sorted(os.listdir(path)) == [".shards", f"00000{FORMATS[kind]}", "manifest.json"]
    else:
        kind = kind.removeprefix("one ")
        assert Path(path).read_bytes()[:2] == {"grid": b"\x89P", "npz": b"PK"}[kind]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--steps 0", "steps is 0"),
        ("--steps 7", "steps is 7"),
        ("--steps 2.5", "argument --steps: invalid int value: '2.5'"),
        ("--steps -3", "steps is -3"),
        ("--num-samples -1", "-1"),
        ("--num-samples few", "invalid int value"),
        ("--batch-size 0", "batch_size is 0"),
        ("--batch-size -2", "batch_size is -2"),
        ("--seed -1", "seed is -1"),
        ("--eta -1 --sampler ddim", "eta is -1"),
        ("--eta 1e200 --sampler ddim", "eta is 1e+200"),
        ("--eta inf --sampler ddim", "eta is inf"),
        ("--eta nan --sampler ddim", "eta is nan"),
        ("--sampler euler", "invalid choice: 'euler'"),
        ("--precision fp8", "invalid choice: 'fp8'"),
        ("--precision tf32 --device cpu", "precision is 'tf32', which 'cpu' does not have; use fp32 or bf16"),
        ("--engine steam", "invalid choice: 'steam'"),
        ("--engine graph --device cpu", "engine is 'graph', and 'cpu' has no CUDA graphs; use 'eager' or 'compiled'"),
        ("--device abacus", "device is 'abacus'"),
        ("--format gif", "invalid choice: 'gif'"),
        ("--indices 5-3", "'5-3' is not a list of whole numbers"),
        ("--indices 1,x", "'1,x' is not a list"),
        ("--indices 1 --num-samples 2", "not allowed with"),
        ("--class-labels 1,2", "class_labels"),
        ("--out x.jpg", "--out is x.jpg"),
        ("--out x.png --format npz", "--format npz does not go with --out x.png"),
        ("--out x.npz --format png", "--format png does not go with --out x.npz"),
        ("--out x.npz --format webdataset", "--format webdataset does not go with --out x.npz"),
        ("--out x/ --shard-size 0", "shard_size is 0"),
        ("--out x/ --indices 3,1-5", "sample 3 is asked for twice"),
        ("--out x/ --num-samples 0", "no samples"),
        ("--out x/ --steps 7", "steps is 7"),
        ("--out x/ --json-log file/log", "cannot write file/log"),
        ("--out file/x.png", "cannot write file/x.png"),
        ("--out file", "cannot write file"),
        ("--out folder.png --format grid", "cannot write folder.png: it is a folder"),
        ("--out /proc/x.png", "cannot write /proc/x.png"),
        ("--num-samples 0", "no samples"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_sample_refuses(tiny, flags, why, capsys):
    Path("file").touch()
    Path("folder.png").mkdir()
    assert why in error(["sample", tiny, "--quiet", *flags.split()], capsys)
    assert sorted(os.listdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("out", ["file/x.png", "file", "x.jpg"])
def test_an_output_that_cannot_be_written_fails_before_the_model_is_read(out, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "from_pretrained", None)
    Path("file").touch()
    assert out in error(["sample", "--out", out], capsys)


def test_not_a_checkpoint(capsys):
    Path("empty").mkdir()
    Path("file").write_text("no model")
    for source in ("empty", "file", "nowhere"):
        assert source in error(["sample", source], capsys)
    assert "the checkpoint is named ''" in error(["sample", ""], capsys)


def test_a_full_disk_is_one_line(tiny, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in error(["sample", tiny, "--quiet"], capsys)
    assert os.listdir() == []


def test_a_fault_of_ours_is_one_line_that_names_its_kind(tiny, capsys, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("on\ntwo lines")

    monkeypatch.setattr(images, "save_grid", broken)
    assert "ZeroDivisionError: on two lines (--debug shows where)" in error(["sample", tiny, "--quiet"], capsys)


def test_the_progress_bar_ends_before_an_error_is_told(tiny, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "to_uint8", full)
    assert main(["sample", tiny, "--out", "x.npz", "--batch-size", "8"]) == 2
    bar, line, end = capsys.readouterr().err.split("\n")
    assert "6/12" in bar
    assert line == "fastddpm: error: [Errno 28] No space left on device"
    assert end == ""


def test_classes_are_repeated_over_the_samples(tmp_path):
    torch.manual_seed(0)
    net = UNet2D(**TINY, in_channels=1, out_channels=1, num_class_embeds=3)
    checkpoints.save(tmp_path / "model", net.config, net.state_dict(), Schedule(num_train_timesteps=6))
    model = str(tmp_path / "model")
    want = drawn(model, 5, class_labels=[2, 0, 2, 0, 2], batch_size=5)
    for out in ("x.npz", "x/"):
        flags = ["--num-samples", "5", "--class-labels", "2,0", "--batch-size", "5", "--format", "npz", "--out", out]
        assert main(["sample", model, *flags, "--quiet"]) == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], want)
    with np.load("x/00000.npz") as shard:
        assert np.array_equal(shard["arr_0"], want)
        assert shard["arr_1"].tolist() == [2, 0, 2, 0, 2]


def test_merge(tiny, capsys):
    for out in ("one.npz", "shards/"):
        flags = ["--num-samples", "5", "--batch-size", "2", "--format", "npz", "--out", out, "--quiet"]
        assert main(["sample", tiny, *flags]) == 0
    assert main(["merge", "shards", "merged.npz"]) == 0
    assert Path("merged.npz").read_bytes() == Path("one.npz").read_bytes()
    assert capsys.readouterr().out == "merged.npz: 5 samples, each 4 x 4 x 1\n"
    assert "shards has" not in error(["merge", "shards", "merged.zip"], capsys)
    assert "nowhere has no manifest.json" in error(["merge", "nowhere", "merged.npz"], capsys)


def test_a_single_file_is_of_one_process_and_has_no_shards(tiny, capsys, monkeypatch):
    for flag in ("--shard-size", "--json-log"):
        told = error(["sample", tiny, "--out", "x.npz", flag, "3"], capsys)
        assert f"{flag} does not apply to one file, x.npz; name a folder, as --out x/ --format npz" in told

    @contextmanager
    def two(device):
        yield Ranks(0, 2, device)

    monkeypatch.setattr(command_line, "ranks", two)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    assert "2 processes cannot write one file, samples.png; name a folder" in error(["sample", tiny], capsys)


def test_debug_shows_the_traceback(tiny, capsys):
    assert main(["sample", tiny, "--steps", "0", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("fastddpm: error: steps is 0")


def test_train_takes_every_option_of_the_trainer(monkeypatch):
    given = {}

    def trained(data, out, options, **how):
        given.update(options=options, out=out, **how)

    monkeypatch.setattr(command_line, "train", trained)
    np.savez("data.npz", x_train=np.zeros((3, 4, 4), np.uint8), y_train=np.array([0, 1, 1]))
    assert main(["train", "data.npz", "--out", "run", "--quiet"]) == 0
    assert given == {"options": TrainOptions(), "out": "run", "labels": None, "device": None, "progress": False}

    other = {int: 7, float: 0.25, bool: True, tuple: (4, 8)}
    want = {field.name: other.get(type(field.default)) for field in dataclasses.fields(TrainOptions)}
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


def test_train_looks_at_options_before_images(capsys):
    for flags, told in ((["--steps", "0"], "steps is 0"), (["--out", "/proc/run"], "cannot write /proc/run")):
        assert main(["train", "nowhere", "--out", "run", *flags]) == 2
        assert f"fastddpm: error: {told}" in capsys.readouterr().err
    assert not Path("run").exists()


def test_train_then_sample(capsys):
    Path("pictures").mkdir()
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)):
        Image.fromarray(picture).save(f"pictures/{i}.png")
    flags = "--steps 2 --batch-size 2 --channels 8 --attention 0 --groups 4 --timesteps 100 --warmup 1"
    assert main(["train", "pictures", "--out", "runs/a", *flags.split()]) == 0
    out, err = capsys.readouterr()
    assert out == "runs/a: trained for 2 steps; now `fastddpm sample runs/a`\n"
    assert "2/2" in err
    assert main(["sample", "runs/a", "--num-samples", "3", "--out", "x.npz", "--quiet"]) == 0
    assert np.load("x.npz")["arr_0"].shape == (3, 4, 4, 1)


@pytest.mark.parametrize(
    ("source", "flags", "why"),
    [
        ("nowhere", "", "cannot read nowhere"),
        ("empty", "", "empty holds no images"),
        ("corrupt", "", "cannot read the image corrupt/1.png"),
        ("mixed", "", "mixed/0.png is 4x4, mixed/1.png is 5x5"),
        ("file", "", "file is of unknown type"),
        ("good.npz", "--steps 0", "steps is 0"),
        ("good.npz", "--batch-size -1", "batch_size is -1"),
        ("good.npz", "--precision fp8", "invalid choice: 'fp8'"),
        ("good.npz", "--precision fp16", "invalid choice: 'fp16'"),
        ("good.npz", "--channels 8,x", "'8,x' is not a list"),
        ("good.npz", "--timesteps 0", "num_train_timesteps is 0"),
        ("good.npz", "--out file/run", "cannot write file/run"),
        ("good.npz", "--out good.npz/run", "cannot write good.npz/run: Not a directory"),
        ("mixed", "--out mixed/run", "--out mixed/run is in DATA, mixed, whose pictures would grow; name another"),
        ("mixed", "--out ./empty/../mixed", "is in DATA, mixed, whose pictures would grow"),
    ],
)
def test_train_refuses(source, flags, why, capsys):
    for folder in ("empty", "corrupt", "mixed"):
        Path(folder).mkdir()
    Image.new("L", (4, 4)).save("corrupt/0.png")
    Path("corrupt/1.png").write_bytes(Path("corrupt/0.png").read_bytes()[:40])
    Image.new("L", (4, 4)).save("mixed/0.png")
    Image.new("L", (5, 5)).save("mixed/1.png")
    Path("file").write_text("hello")
    np.savez("good.npz", np.zeros((3, 4, 4), np.uint8))
    assert why in error(["train", source, "--out", "run", *flags.split()], capsys)
    assert not Path("run").exists()


def test_train_is_quiet_when_asked(capfd):
    Path("pictures").mkdir()
    for i in range(1001):
        Image.new("L", (1, 1)).save(f"pictures/{i}.png")
    flags = "--steps 1 --batch-size 2 --channels 4 --attention , --groups 4 --timesteps 100 --quiet"
    assert main(["train", "pictures", "--out", "run", *flags.split()]) == 0
    assert capfd.readouterr() == ("", "")


def test_info(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_report", lambda capabilities, *options: f"the report for {capabilities}")
    assert main(["info", "--cc", "80,90"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^version +fastddpm +{re.escape(__version__)}$", text, re.MULTILINE)
    assert text.endswith("the report for (80, 90)\n")
    for precision in ("bf16", "fp32"):
        monkeypatch.setattr(
            command_line, "device_and_precision", lambda *_, name=precision: (torch.device("cpu"), name)
        )
        assert main(["info"]) == 0
        assert re.search(rf"^default +precision +{precision}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_info_as_json_with_the_report_of_the_kernels(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # here kernels are interpreted, the report still compiles them
    assert main(["info", "--cc", "90", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"]["torch"] == torch.__version__
    assert facts["default"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert {(record["cc"], record["spill_bytes"]) for record in facts["kernels"]} == {(90, 0)}


def test_info_without_triton(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["info"]) == 0
    assert "Triton is not installed" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kernels"] is None


def test_info_names_a_capability_that_cannot_be_compiled_for(capsys):
    assert main(["info", "--cc", "1"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"fastddpm: error: RuntimeError: the kernels' report failed: .+\n", err)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--steps 7", "steps is 7; want a whole number from 1 to 6"),
        ("--steps few", "invalid int value"),
        ("--device abacus", "device is 'abacus'"),
        ("--damage glass", "damage is 'glass'; want one of the rungs words, noise, step,"),
        ("--precision fp32", "unrecognized arguments: --precision fp32"),
    ],
)
def test_verify_refuses(tiny, flags, why, capsys):
    assert why in error(["verify", tiny, "--quiet", *flags.split()], capsys)
    assert "nowhere" in error(["verify", "nowhere"], capsys)


def test_verify_passes_every_option_on(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(command_line, "verify", lambda source, **how: given.append((source, how)) or [])
    flags = "--variant fp16 --device cpu --steps 3 --damage step --quiet"
    assert main(["verify"]) == 0
    assert main(["verify", "a", *flags.split()]) == 0
    how = {"variant": None, "device": None, "steps": None, "damage": None, "progress": True}
    other = {"variant": "fp16", "device": "cpu", "steps": 3, "damage": "step", "progress": False}
    assert given == [(None, how), ("a", other)]


@pytest.mark.parametrize("command", ["sample", "train", "verify", "info"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fastddpm {command}")
    if command == "train":
        assert "(default: linear)" in text
        assert "(default: 1000)" in text


def examples():
    for text in (command_line._SAMPLE, command_line._TRAIN, command_line._VERIFY, (ROOT / "README.md").read_text()):
        yield from re.findall(r"^ *(fastddpm (?:sample|train|verify|info)\b.*?)(?:  .*)?$", text, re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_examples_of_help_and_readme_parse(line):
    command_line._parser().parse_args(shlex.split(line)[1:])


def readme_blocks():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_readme_runs(tiny, monkeypatch):
    monkeypatch.setattr("fastddpm.sampling.sampler.shipped_model", lambda: tiny)
    package, hub, dropin, own, gpu = readme_blocks()
    names: dict = {}
    exec(package, names)
    assert names["images"].shape == (16, 4, 4, 1)
    exec(hub.replace("google/ddpm-cifar10-32", tiny).replace("250", "5"), names)
    assert names["x"].shape == (64, 1, 4, 4)
    if importlib.util.find_spec("diffusers"):
        exec(dropin.replace("google/ddpm-cifar10-32", tiny).replace("250", "5"), names)
        assert [image.size for image in names["images"]] == [(4, 4)] * 4
    exec(own, names)
    assert names["points"].shape == (1000, 2)
    for there, here in (("google/ddpm-cifar10-32", tiny), ('"cuda"', '"cpu"'), ('"graph"', '"eager"')):
        gpu = gpu.replace(there, here)
    exec(gpu, names)
    assert names["sampler"].precision == "bf16"


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fastddpm {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["paint"], ["sample", "--help-me"]])
def test_misuse_is_one_line(arguments, capsys):
    assert "--help)" in error(arguments, capsys)


@pytest.mark.parametrize(
    "start", [[sys.executable, "-m", "fastddpm"], [str(Path(sys.executable).with_name("fastddpm"))]]
)
def test_a_reader_that_leaves_is_no_error(start, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # buffered, the text leaves at the end
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*start, "info", "--cc", "90"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "start", [[sys.executable, "-m", "fastddpm"], [str(Path(sys.executable).with_name("fastddpm"))]]
)
def test_installed_command(start, tiny):
    done = subprocess.run([*start, "sample", tiny, "--steps", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastddpm: error: steps is 0")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def pictures():
    """A file of three 4 x 4 pictures of two classes."""
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    np.savez("pictures.npz", x=x, y=np.array([1, 0, 1]))
    return x[..., None]


def test_likelihood_reports_the_bound(tiny, pictures, capsys):
    assert main(["likelihood", tiny, "pictures.npz", "--device", "cpu", "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    found = bound(Sampler.from_pretrained(tiny, device="cpu", precision="fp32"), pictures, progress=False).summary()
    lines = out.splitlines()
    assert re.fullmatch(r"3 images of x, 5 of 5 terms each, fixed_small, [\d.]+ s", lines[0])
    for line, name in zip(lines[2:], ("rate", "prior", "distortion", "total"), strict=True):
        assert line.split()[-2:] == [f"{found[name][0]:.5f}", f"{found[name][1]:.2g}"]
    assert "18/18" in err


def recording(monkeypatch, module, name):
    """What a function is called with, from now on."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **how: (calls.append((args, how)), function(*args, **how))[1])
    return calls


def test_likelihood_passes_every_option_on(tiny, pictures, capsys, monkeypatch):
    loaded = recording(monkeypatch, Sampler, "from_pretrained")
    asked, drawn = recording(monkeypatch, likelihood, "bound"), recording(monkeypatch, main, "bound_terms")
    flags = "--num-images 2 --terms 3 --seed 9 --batch-size 2 --precision fp32 --device cpu --engine eager --quiet"
    more = "--variance-type fixed_large --out x.npz --plot x.png --json"
    assert main(["likelihood", tiny, "pictures.npz", *flags.split(), *more.split()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert loaded == [((tiny,), {"variant": None, "device": "cpu", "precision": "fp32", "engine": "eager"})]
    [((used, x), how)] = asked
    assert np.array_equal(x, pictures[:2])
    assert how == {"terms": 3, "seed": 9, "batch_size": 2, "class_labels": None, "progress": False}
    assert used.schedule.variance_type == "fixed_large"

    told, found = json.loads(out), bound(used, pictures[:2], terms=3, seed=9, batch_size=2, progress=False)
    for name, (mean, standard_error) in found.summary().items():
        assert told[name] == {"mean": mean, "error": standard_error}
    want = {"data": "pictures.npz", "array": "x", "images": 2, "terms": 3, "timesteps": 6, "seed": 9}
    want |= {"variance_type": "fixed_large", "unit": "bits/dim"}
    assert {name: told[name] for name in want} == want

    t, mean, error = found.per_timestep()
    want = {name: found.bits(getattr(found, name)) for name in ("prior", "decoder", "terms")}
    want |= {"bits_per_dim": found.per_image, "timesteps": found.timesteps, "weights": found.weights, "t": t}
    want |= {"mean": mean, "error": error, "count": [(found.timesteps == at).sum() for at in t]}
    with np.load("x.npz") as arrays:
        assert {*arrays.files} == {*want}
        for name, array in want.items():
            assert np.array_equal(arrays[name], array, equal_nan=True)
    [(given, how)] = drawn
    for one, other in zip(given, (t, mean, error), strict=True):
        assert np.array_equal(one, other, equal_nan=True)
    summary = found.summary()
    ends = {"prior": summary["prior"], "decoder": summary["distortion"], "total": summary["total"]}
    assert how == {**ends, "num_train_timesteps": 6, "path": "x.png"}
    with Image.open("x.png") as image:
        assert image.format == "PNG"


def test_likelihood_is_of_images_that_were_held_out(tiny, pictures, capsys):
    np.savez("both.npz", x_train=pictures[:1], x_test=pictures[1:])
    np.savez("test.npz", x=pictures[1:])
    totals = []
    for name, of in (("both.npz", "x_test"), ("test.npz", "x")):
        assert main(["likelihood", tiny, name, "--quiet", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["array"] == of
        totals.append(told["total"])
    assert totals[0] == totals[1]


def test_likelihood_names_the_model_in_the_package(tiny, pictures, monkeypatch, capsys):
    monkeypatch.setattr("fastddpm.sampling.sampler.shipped_model", lambda: tiny)
    assert main(["likelihood", "fashion-mnist", "pictures.npz", "--num-images", "1", "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["error"] == "nan"


def test_likelihood_takes_the_classes_of_the_data(tmp_path, pictures, capsys):
    torch.manual_seed(0)
    net = UNet2D(**TINY, in_channels=1, out_channels=1, num_class_embeds=2)
    checkpoints.save(tmp_path / "classes", net.config, net.state_dict(), Schedule(num_train_timesteps=6))
    run = ["likelihood", str(tmp_path / "classes"), "pictures.npz", "--quiet", "--json"]
    totals = []
    for flags in ([], ["--class-labels", "1,0,1"], ["--class-labels", "0,0,0"]):
        assert main([*run, *flags]) == 0
        totals.append(json.loads(capsys.readouterr().out)["total"])
    assert totals[0] == totals[1] != totals[2]
    np.savez(
        "pictures.npz", x=pictures, y=np.ones(3, np.int64)
    )  # where a class is missing the others keep their numbers
    for flags in ([], ["--class-labels", "1,1,1"]):
        assert main([*run, *flags, "--num-images", "3"]) == 0
        totals.append(json.loads(capsys.readouterr().out)["total"])
    assert totals[3] == totals[4]
    np.savez("pictures.npz", x=pictures, y=np.array([0, 1, 1]))
    for flags in ([], ["--class-labels", "0,1"]):
        assert main([*run, *flags, "--num-images", "2"]) == 0
        totals.append(json.loads(capsys.readouterr().out)["total"])
    assert totals[5] == totals[6]
    Path("folder", "b").mkdir(parents=True)
    Image.fromarray(pictures[0, ..., 0]).save("folder/b/0.png")
    line = error(["likelihood", str(tmp_path / "classes"), "folder", "--quiet"], capsys)
    assert "folder has 1 folders with images, but the model has 2 classes" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--terms 6", "terms is 6; want a whole number from 1 to T - 1 = 5"),
        ("--num-images 0", "--num-images is 0; want a whole number, at least 1"),
        ("--variance-type learned", "variance_type is 'learned', for which the network must return 2 channels"),
        ("--class-labels 1,0,1", "class_labels were given, but the model is not"),
        ("--out .", "--out is .; name a .npz"),
        ("--out x.png --plot x.png", "--out is x.png; name a .npz"),
        ("--plot x.jpg", "--plot is x.jpg; name a .png"),
        ("--plot pictures.npz/x.png", "cannot write pictures.npz/x.png"),
        ("--variance-type big", "argument --variance-type: invalid choice: 'big'"),
    ],
)
def test_likelihood_errors(tiny, pictures, capsys, flags, message):
    assert message in error(["likelihood", tiny, "pictures.npz", "--quiet", *flags.split()], capsys)


def test_likelihood_of_other_pictures(tiny, capsys):
    np.savez("wide.npz", x=np.full((2, 4, 8), 9, dtype=np.uint8))
    line = error(["likelihood", tiny, "wide.npz", "--quiet"], capsys)
    assert "data is (2, 4, 8, 1) torch.uint8; want [N, 4, 4, 1]" in line
    assert "required: DATA" in error(["likelihood", tiny], capsys)
