"""`fastddpm sample` of a latent pipeline: latents as numbers, or images by --decode."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from PIL import Image

from fastddpm.cli.main import main
from fastddpm.diffusers import decode
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import images
from tests.support.command_line import error_line, record_calls
from tests.support.jobs import TINY


@pytest.fixture(params=[1, 3, 4], scope="module")
def latent(request, tmp_path_factory):
    """A pipeline whose VAE turns latents [C, 4, 4] into grey images of 8 x 8."""
    folder, channels = str(tmp_path_factory.mktemp("latent")), request.param
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY, in_channels=channels, out_channels=channels)
    vae = VQModel(
        in_channels=1, out_channels=1, latent_channels=channels, num_vq_embeddings=16, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler(num_train_timesteps=4)).save_pretrained(folder)
    return folder


def drawn(source, count=16):
    return Sampler.from_pretrained(source).sample(count, progress=False)


@pytest.mark.parametrize("flags", ["", "--out x.png", "--out x.npz --trajectory way.gif"])
def test_latents_are_no_pictures(latent, flags, capsys):
    line = error_line(["sample", latent, *flags.split()], capsys)
    assert "samples are latents" in line
    assert "use --decode for images (it needs diffusers), or --format npz for the latents" in line
    assert not list(Path().iterdir())


def test_a_folder_of_pictures_holds_no_latents(latent, capsys):
    line = error_line(["sample", latent, "--out", "x/", "--quiet"], capsys)
    assert "latents, which the VAE of the pipeline turns into images; write them as npz or webdataset" in line


@pytest.mark.parametrize("out", ["x.npz", "x/"])
def test_latents_are_written_as_numbers(latent, out):
    assert main(["sample", latent, "--format", "npz", "--batch-size", "16", "--out", out, "--quiet"]) == 0
    got = np.load("x.npz" if out == "x.npz" else "x/00000.npz")["arr_0"]
    assert got.dtype == np.float32
    assert np.array_equal(got, drawn(latent))


def test_decoded_images_are_those_of_the_vae(latent, capsys):
    want = images.to_uint8(decode(latent, drawn(latent), batch_size=64)).numpy()
    assert want.std() > 0
    assert main(["sample", latent, "--decode", "--out", "x.npz"]) == 0
    assert "fastddpm: decoding 16 latents\n" in capsys.readouterr().err
    assert np.array_equal(np.load("x.npz")["arr_0"], want)
    assert main(["sample", latent, "--decode", "--quiet"]) == 0
    with Image.open("samples.png") as picture:
        assert np.array_equal(np.asarray(picture), images.grid(want)[..., 0])
    assert capsys.readouterr().err == ""


def test_a_damaged_vae_is_found_before_the_work(latent, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(latent, tmp_path / "damaged")
    next((folder / "vqvae").glob("*.safetensors")).write_bytes(b"")
    calls = record_calls(monkeypatch, Sampler, "sample")
    line = error_line(["sample", str(folder), "--decode", "--quiet"], capsys)
    assert "cannot load the VQModel" in line
    assert not calls


def test_decode_without_diffusers(latent, capsys, monkeypatch):
    monkeypatch.setattr("fastddpm.cli.sample.find_spec", lambda name: None)
    line = error_line(["sample", latent, "--decode"], capsys)
    assert "--decode needs diffusers; install it: pip install diffusers" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out x/", "--decode is for one file, not for a folder; use --out x.png, or --out x.npz"),
        ("--trajectory way.gif", "--trajectory shows the states of the sampler, which --decode does not decode"),
    ],
)
def test_decode_errors(latent, flags, message, capsys):
    assert message in error_line(["sample", latent, "--decode", *flags.split()], capsys)


def test_likelihood_reads_no_latents(latent, capsys):
    line = error_line(["likelihood", latent, "x.npz"], capsys)
    assert f"{latent} is a model of latents, but DATA are images" in line
    assert "fastddpm.evaluate.likelihood.bound takes latents" in line


def test_images_are_not_decoded(tiny, capsys):
    line = error_line(["sample", tiny, "--decode"], capsys)
    assert "--decode is for a pipeline with a VAE, which this checkpoint does not have; leave it out" in line
