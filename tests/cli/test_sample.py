"""`fastddpm sample`: the files it writes, what it prints, and its errors."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fastddpm.checkpoints import shipped
from fastddpm.cli.main import main
from fastddpm.processes.distributed import Ranks
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import images
from fastddpm.storage.shards import FORMATS
from tests.support.command_line import draw_uint8, error_line
from tests.support.jobs import save_tiny


def test_sample_writes_a_grid(tiny, capsys):
    assert main(["sample", tiny]) == 0
    assert np.array_equal(np.asarray(Image.open("samples.png")), images.grid(draw_uint8(tiny, 16))[..., 0])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"samples.png: 16 samples in [\d.]+ s, [\d.e+]+ per second\n", out)
    assert "6/6" in err


@pytest.mark.parametrize("source", [[], ["fashion-mnist"]])
def test_sample_uses_the_bundled_model_by_default_and_by_name(source, tiny, monkeypatch):
    monkeypatch.setitem(shipped.FOLDERS, "fashion-mnist", Path(tiny))
    assert main(["sample", *source, "--quiet", "--out", "x.npz"]) == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], draw_uint8(tiny, 16))


def test_sample_says_at_once_what_it_draws(tiny, capsys):
    drawing = "fastddpm: drawing {} samples of 1 x 4 x 4 in {} steps, fp32 on cpu, into {}"
    long = "; on a CPU this may take minutes or hours; the bar shows how long"
    for flags, count, steps, out, hint in (
        ("", 16, 6, "samples.png", ""),
        ("--num-samples 2 --steps 3 --out x/", 2, 3, "x", ""),
        ("--num-samples 1000 --out x.npz", 1000, 6, "x.npz", long),
    ):
        assert main(["sample", tiny, "--precision", "fp32", "--device", "cpu", *flags.split()]) == 0
        assert capsys.readouterr().err.splitlines()[0] == drawing.format(count, steps, out) + hint


def test_sample_passes_all_options_of_the_sampler(tiny):
    flags = "--num-samples 5 --seed 9 --steps 3 --sampler ddim --eta 0.5 --batch-size 2 --precision fp32 --device cpu"
    flags += " --engine eager"
    assert main(["sample", tiny, *flags.split(), "--out", "x.npz", "--quiet"]) == 0
    sampler = Sampler.from_pretrained(tiny, precision="fp32", device="cpu")
    want = sampler.sample(5, seed=9, steps=3, sampler="ddim", eta=0.5, batch_size=2, output="uint8", progress=False)
    assert np.array_equal(np.load("x.npz")["arr_0"], want)
    assert main(["sample", tiny, "--no-noise", "--out", "x.npz", "--quiet"]) == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], draw_uint8(tiny, 16, noise=False))


@pytest.mark.parametrize("mode", ["law", "bits"])
def test_sample_parallel_in_time(tiny, mode, capsys):
    flags = f"--num-samples 2 --steps 6 --parallel {mode} --window 3 --precision fp32 --device cpu --out x.npz"
    assert main(["sample", tiny, *flags.split()]) == 0
    assert re.search(r"x\.npz: 2 samples in .*; \d+ network calls, \d\.\d steps per round$", capsys.readouterr().out)
    options = {"steps": 6, "window": 3, "output": "uint8", "progress": False}
    sampler = Sampler.from_pretrained(tiny, precision="fp32", device="cpu")
    assert np.array_equal(np.load("x.npz")["arr_0"], sampler.sample(2, parallel=mode, **options))
    if mode == "bits":
        assert np.array_equal(np.load("x.npz")["arr_0"], sampler.sample(2, **options))


def test_sample_passes_all_options_of_the_job(tiny, monkeypatch):
    calls = []

    def sample_to(out, sampler, samples, /, **options):
        calls.append((str(out), list(samples), options))
        raise ValueError("enough")

    monkeypatch.setattr("fastddpm.sampling.job.sample_to", sample_to)
    flags = "--indices 3,5 --seed 9 --steps 3 --sampler ddim --eta 0.5 --no-noise --batch-size 2"
    flags += " --parallel law --window 8 --shard-size 4 --json-log log --format npz --out x/ --quiet"
    assert main(["sample", tiny, *flags.split()]) == 2
    [(out, samples, options)] = calls
    assert (out, samples) == ("x", [3, 5])
    assert options == {
        "format": "npz",
        "class_labels": None,
        "shard_size": 4,
        "batch_size": 2,
        "seed": 9,
        "steps": 3,
        "sampler": "ddim",
        "eta": 0.5,
        "noise": False,
        "parallel": "law",
        "window": 8,
        "progress": False,
        "json_log": "log",
    }


def test_sample_passes_all_options_of_the_model(tiny, monkeypatch):
    calls = []

    def from_pretrained(source, **options):
        calls.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(Sampler, "from_pretrained", from_pretrained)
    for flags in ("", "--engine compiled --batch-invariant --precision fp16"):
        assert main(["sample", tiny, *flags.split()]) == 2
    names = ("engine", "batch_invariant", "precision")
    assert [tuple(options[name] for name in names) for options in calls] == [
        ("auto", False, "auto"),
        ("compiled", True, "fp16"),
    ]


def test_batch_size_with_batch_invariant_is_an_error(tiny, capsys):
    line = error_line(["sample", tiny, "--batch-invariant", "--batch-size", "5", "--out", "x.png"], capsys)
    assert "--batch-size does not apply with --batch-invariant" in line
    assert not Path("x.png").exists()


def test_batch_invariant_sample_is_the_same_alone(tiny):
    for indices, out in (("0-9", "many.npz"), ("7", "one.npz")):
        flags = ["--batch-invariant", "--indices", indices, "--out", out, "--quiet"]
        assert main(["sample", tiny, *flags]) == 0
    assert np.array_equal(np.load("many.npz")["arr_0"][7:8], np.load("one.npz")["arr_0"])


def test_sample_reads_a_variant(tiny, tmp_path):
    both = shutil.copytree(tiny, tmp_path / "both")
    weights = both / "unet" / "diffusion_pytorch_model.safetensors"
    halved = {name: value / 2 for name, value in load_file(weights).items()}
    save_file(halved, weights.with_suffix(".half.safetensors"))
    assert main(["sample", str(both), "--variant", "half", "--out", "x.npz", "--quiet"]) == 0
    want = Sampler.from_pretrained(both, variant="half").sample(16, output="uint8", progress=False)
    assert np.array_equal(np.load("x.npz")["arr_0"], want)
    assert not np.array_equal(want, draw_uint8(tiny, 16))


def test_files_of_a_folder_are_named_by_index(tiny, capsys):
    assert main(["sample", tiny, "--indices", "7,2-3", "--batch-size", "2", "--out", "a/b", "--quiet"]) == 0
    assert sorted(os.listdir("a/b")) == [".shards", "00002.png", "00003.png", "00007.png", "manifest.json"]
    pngs = [np.asarray(Image.open(f"a/b/{i:05d}.png")) for i in (7, 2, 3)]
    assert np.array_equal(np.stack(pngs)[..., None], draw_uint8(tiny, [7, 2, 3], batch_size=2))
    assert capsys.readouterr() == ("", "")


def test_interrupted_folder_is_resumed(tiny, monkeypatch, capsys):
    to_uint8, batches = images.to_uint8, []

    def interrupted(x):
        batches.append(x)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return to_uint8(x)

    monkeypatch.setattr(images, "to_uint8", interrupted)
    assert main(["sample", tiny, "--num-samples", "9", "--batch-size", "2", "--out", "pngs", "--quiet"]) == 130
    assert sorted(os.listdir("pngs")) == [".shards", *(f"0000{i}.png" for i in range(4)), "manifest.json"]
    assert capsys.readouterr().err.startswith("\nfastddpm: stopped: 4 of 9 samples are done; ")
    monkeypatch.setattr(images, "to_uint8", to_uint8)
    assert main(["sample", tiny, "--num-samples", "9", "--out", "pngs"]) == 0
    assert re.fullmatch(r"pngs: all 9 samples are done; [\d.]+ s this time\n", capsys.readouterr().out)
    pngs = [np.asarray(Image.open(f"pngs/{i:05d}.png")) for i in range(9)]
    assert np.array_equal(np.stack(pngs)[..., None], draw_uint8(tiny, 9, batch_size=2))


def test_samples_that_are_not_images_are_written_as_floats(tmp_path, capsys):
    latent = save_tiny(tmp_path / "latent", in_channels=5, out_channels=5)
    assert "samples have the shape (5, 4, 4), which is not that of an image" in error_line(["sample", latent], capsys)
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
def test_out_and_format_imply_each_other(tiny, flags, path, kind):
    Path("folder.1").mkdir()
    assert main(["sample", tiny, "--num-samples", "1", "--quiet", *flags]) == 0
    if kind in FORMATS:
        assert sorted(os.listdir(path)) == [".shards", f"00000{FORMATS[kind]}", "manifest.json"]
    else:
        kind = kind.removeprefix("one ")
        assert Path(path).read_bytes()[:2] == {"grid": b"\x89P", "npz": b"PK"}[kind]


@pytest.mark.parametrize(
    ("flags", "message"),
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
        ("--precision tf32 --device cpu", "precision is 'tf32'"),
        ("--engine steam", "invalid choice: 'steam'"),
        ("--engine graph --device cpu", "engine is 'graph'"),
        ("--device abacus", "device is 'abacus'"),
        ("--format gif", "invalid choice: 'gif'"),
        ("--indices 5-3", "'5-3' is not a list of whole numbers"),
        ("--indices 1,x", "'1,x' is not a list"),
        ("--indices 1 --num-samples 2", "not allowed with"),
        ("--class-labels 1,2", "class_labels"),
        ("--out x.jpg", "--out is x.jpg; want a .png, an .npz, a .txt or a folder, or give --format"),
        ("--out x.png --format npz", "--format is npz, but --out is x.png, which means grid; leave --format out"),
        ("--out x.npz --format png", "--format is png, but --out is x.npz, which means npz"),
        ("--out x.npz --format webdataset", "--format is webdataset, but --out is x.npz, which means npz"),
        ("--out x.tar --format webdataset", "want a folder: --out x/, then `fastddpm merge x/ x.tar` joins them"),
        ("--out x/ --shard-size 0", "shard_size is 0"),
        ("--out x/ --indices 3,1-5", "sample 3 "),
        ("--out x/ --num-samples 0", "no samples"),
        ("--out x/ --steps 7", "steps is 7"),
        ("--out x/ --json-log file/log", "cannot write file/log"),
        ("--out file/x.png", "cannot write file/x.png"),
        ("--out file", "cannot write file"),
        ("--out folder.png --format grid", "cannot write folder.png: it is a folder"),
        ("--out /proc/x.png", "cannot write /proc/x.png"),
        ("--num-samples 0", "no samples were requested; give --num-samples or --indices"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--num-samples 9223372036854775808", "samples are 9223372036854775808; want a count"),
        ("--num-samples 999999999999", "999999999999 samples are too many for one file"),
        ("--num-samples 999999999999 --out x/", "want at most 16777216"),
        ("--indices 9223372036854775808", "sample index is 9223372036854775808; want a whole number"),
        ("--steps 9223372036854775808", "steps is 9223372036854775808; want a whole number from 1 to 6"),
        ("--seed 18446744073709551616", "seed is 18446744073709551616; want a whole number, 0 <= seed < 2^64"),
        ("--out x/ --shard-size 9223372036854775808", "shard_size is 9223372036854775808; want"),
        ("--device cuda:9223372036854775808", "device is 'cuda:9223372036854775808'"),
    ],
)
def test_sample_errors(tiny, flags, message, capsys):
    Path("file").touch()
    Path("folder.png").mkdir()
    assert message in error_line(["sample", tiny, "--quiet", *flags.split()], capsys)
    assert sorted(os.listdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("option", ["--out", "--trajectory", "--json-log"])
@pytest.mark.parametrize("name", ["n" * 100_000, "a\0b", "\ud800", "a/" * 5000 + "x"])
def test_names_that_no_file_can_have(tiny, option, name, capsys):
    flags = ["--out", "x/"] if option == "--json-log" else []
    line = error_line(["sample", tiny, "--quiet", *flags, option, f"{name}.png"], capsys)
    assert "; name another" in line
    assert "Errno" not in line
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", [b"a\xe9\xff", b"\x1b[31mred", b"n" * 250])
def test_odd_names_of_files_and_folders(tiny, name):
    """The checkpoint, the samples and their merged file may have any name that the system allows."""
    name = os.fsdecode(name)
    model = shutil.copytree(tiny, name)
    one, folder, merged = f"1{name}.npz", f"2{name}", f"3{name}.npz"
    for out in (one, f"{folder}/"):
        assert main(["sample", model, "--num-samples", "2", "--format", "npz", "--out", out]) == 0
    assert main(["merge", folder, merged]) == 0
    assert Path(one).read_bytes() == Path(merged).read_bytes()


@pytest.mark.parametrize("flags", ["--out LINK", "--out WEIGHTS --format npz", "--trajectory LINK"])
def test_output_does_not_replace_the_checkpoint(tiny, flags, capsys):
    shutil.copytree(tiny, "model")
    weights = Path("model/unet/diffusion_pytorch_model.safetensors")
    before = weights.read_bytes()
    Path("link.png").symlink_to(weights)
    flags = flags.replace("LINK", "link.png").replace("WEIGHTS", str(weights)).split()
    line = error_line(["sample", "model", *flags, "--quiet"], capsys)
    assert f"{flags[0]} is {flags[1]}, which the command reads from ({weights})" in line
    assert weights.read_bytes() == before


def test_empty_out_is_an_error(tiny, capsys):
    assert "--out is ''; want a .png, an .npz, a .txt or a folder" in error_line(["sample", tiny, "--out", ""], capsys)


@pytest.mark.parametrize("out", ["file/x.png", "file", "x.jpg"])
def test_output_is_checked_before_the_model_is_read(out, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "from_pretrained", None)
    Path("file").touch()
    assert out in error_line(["sample", "--out", out], capsys)


def test_sample_from_something_other_than_a_checkpoint(capsys):
    Path("empty").mkdir()
    Path("file").write_text("no model")
    for source in ("empty", "file", "nowhere"):
        assert source in error_line(["sample", source], capsys)
    assert "''" in error_line(["sample", ""], capsys)


def test_full_disk_is_an_error(tiny, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in error_line(["sample", tiny, "--quiet"], capsys)
    assert os.listdir() == []


def test_progress_bar_ends_before_an_error_is_printed(tiny, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "to_uint8", full)
    assert main(["sample", tiny, "--out", "x.npz", "--batch-size", "8"]) == 2
    told, bar, line, end = capsys.readouterr().err.split("\n")
    assert told.startswith("fastddpm: drawing 16 samples")
    assert "6/12" in bar
    way_out = "free some space there, or write to another place"
    assert line == f"fastddpm: error: [Errno 28] No space left on device; {way_out}"
    assert end == ""


def test_class_labels_are_repeated_over_the_samples(tmp_path):
    model = save_tiny(tmp_path / "model", num_class_embeds=3)
    want = draw_uint8(model, 5, class_labels=[2, 0, 2, 0, 2], batch_size=5)
    for out in ("x.npz", "x/"):
        flags = ["--num-samples", "5", "--class-labels", "2,0", "--batch-size", "5", "--format", "npz", "--out", out]
        assert main(["sample", model, *flags, "--quiet"]) == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], want)
    with np.load("x/00000.npz") as shard:
        assert np.array_equal(shard["arr_0"], want)
        assert shard["arr_1"].tolist() == [2, 0, 2, 0, 2]


def test_one_file_has_no_shards_and_one_process(tiny, capsys, monkeypatch):
    for flag in ("--shard-size", "--json-log"):
        line = error_line(["sample", tiny, "--out", "x.npz", flag, "3"], capsys)
        want = f"{flag} does not apply to one file, x.npz; write a folder instead: --out x/ --format npz"
        assert want in line

    @contextmanager
    def two(device):
        yield Ranks(0, 2, device)

    monkeypatch.setattr("fastddpm.processes.distributed.ranks", two)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    line = error_line(["sample", tiny], capsys)
    assert "2 processes cannot write one file, samples.png; write a folder instead" in line


def test_resumed_folder_keeps_its_precision(tiny, monkeypatch):
    assert main(["sample", tiny, "--num-samples", "2", "--precision", "fp16", "--out", "x/", "--quiet"]) == 0
    assert main(["sample", tiny, "--num-samples", "2", "--out", "x/", "--quiet"]) == 0
