"""`fastddpm convert`: what it writes is loaded by us and, where diffusers has the network, by diffusers."""

import json
import os

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from fastddpm import Sampler, UNet2D, checkpoints
from fastddpm.cli.main import main
from tests.checkpoints.test_guided_diffusion import EXPECTED, FIXTURE, SIZE, TINY, model, written
from tests.support.command_line import error_line


def converted(tmp_path, capsys, net, flags, *arguments):
    """(the folder, what was printed)."""
    path = written(tmp_path / "model.pt", net, flags)
    assert main(["convert", str(path), "--out", str(tmp_path / "out"), *arguments]) == 0
    return tmp_path / "out", capsys.readouterr()


def test_both_load_what_both_have(tmp_path, capsys):
    assert main(["convert", str(FIXTURE), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out'}: 0.4 million parameters\n"
    assert told.err == ""
    ours, original = checkpoints.load(tmp_path / "out"), checkpoints.load(FIXTURE)
    assert ours.schedule == original.schedule
    assert UNet2D(**ours.config).config == UNet2D(**original.config).config
    assert all(torch.equal(value, original.parameters[name]) for name, value in ours.parameters.items())
    theirs = UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").eval()
    with torch.no_grad():
        got = theirs(EXPECTED["net_x"], EXPECTED["net_t"][1], EXPECTED["net_y"]).sample
    assert (got - EXPECTED["net_out"][1]).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:The config attributes")
def test_a_pipeline_of_diffusers_samples(tmp_path, capsys):
    out, _ = converted(tmp_path, capsys, model(learn_sigma=True), TINY)
    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, SIZE, SIZE, 3)


LACKED = {
    "heads": ({"num_heads": 2, "attention_resolutions": "8,4"}, "has num_attention_heads 2"),
    "time": ({"num_channels": 64, "channel_mult": "0.5,1"}, "embeds t by 64 sines and cosines"),
    "no convolution": ({"conv_resample": False}, "has downsample_type 'pool', without a convolution"),
    "scaled t": ({"diffusion_steps": 500, "rescale_timesteps": True}, "is given t times 2"),
}


@pytest.mark.parametrize("option", LACKED)
def test_what_diffusers_lacks_is_said(option, tmp_path, capsys):
    flags, want = LACKED[option]
    given = {k: v for k, v in flags.items() if k not in ("diffusion_steps", "rescale_timesteps")}
    out, told = converted(tmp_path, capsys, model(**given), {**TINY, **flags})
    assert f"note: fastddpm loads {out}, but diffusers cannot, because the network {want}" in told.err
    found, original = checkpoints.load(out), checkpoints.load(tmp_path / "model.pt")
    assert (found.timestep_scale, found.schedule) == (original.timestep_scale, original.schedule)
    x = [Sampler.from_pretrained(place, device="cpu").sample(1, steps=3, progress=False) for place in
         (out, tmp_path / "model.pt")]  # fmt: skip
    assert torch.equal(*x)
    with pytest.raises((ValueError, ImportError, AttributeError, OSError, ModuleNotFoundError)):
        DDPMPipeline.from_pretrained(out)


def test_flags_may_be_set(tmp_path, capsys):
    path = written(tmp_path / "model.pt", model(num_heads=4), TINY)
    settings = ["--format", "improved-diffusion", "--set", "num_heads=4", "--set", "class_cond=False"]
    assert main(["convert", str(path), "--out", str(tmp_path / "out"), "--quiet", *settings]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["attention_head_dim"] == 16


def test_assumptions_are_told(tmp_path, capsys):
    _, told = converted(tmp_path, capsys, model(num_heads=4), None)
    assert "note: " in told.err
    assert "the defaults of guided-diffusion were assumed" in told.err


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--set", "num_heads"], "'num_heads' is not FLAG=VALUE"),
        (["--set", "num_haeds=4"], "did you mean num_heads?"),
        (["--set", "num_channels=64"], "num_channels is 64, but"),
        (["--format", "diffusers"], "is a file"),
    ],
)
def test_after_an_error_nothing_is_written(arguments, want, tmp_path, capsys):
    path = written(tmp_path / "model.pt", model(), TINY)
    before = sorted(os.listdir(tmp_path))
    assert want in error_line(["convert", str(path), "--out", str(tmp_path / "out"), *arguments], capsys)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_failed_write_leaves_nothing(tmp_path, capsys, monkeypatch):
    path = written(tmp_path / "model.pt", model(), TINY)
    before = sorted(os.listdir(tmp_path))

    def save(folder, *args, **options):
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", save)
    error_line(["convert", str(path), "--out", str(tmp_path / "out")], capsys)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_existing_folder_is_kept(tmp_path, capsys):
    path = written(tmp_path / "model.pt", model(), TINY)
    assert "which exists" in error_line(["convert", str(path), "--out", str(tmp_path)], capsys)
