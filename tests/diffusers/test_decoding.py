"""Latents are decoded as diffusers' `LDMPipeline` decodes them."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file

from fastddpm import Sampler
from fastddpm.diffusers import decode
from tests.support.check import error_line
from tests.support.defaults import defaults

VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


@pytest.fixture(params=[3, 4], scope="module")
def pipeline(request) -> LDMPipeline:
    torch.manual_seed(0)
    channels = request.param
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    vae = VQModel(latent_channels=channels, num_vq_embeddings=16, scaling_factor=0.25, **VAE)
    return LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler(num_train_timesteps=4, clip_sample=False))


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    return tmp_path


def latents(folder, count: int = 3) -> torch.Tensor:
    sampler = Sampler.from_pretrained(folder, device="cpu", precision="fp32")
    return sampler.sample(count, progress=False)


def test_images_equal_those_of_the_pipeline(pipeline, folder, monkeypatch):
    """Bit for bit: its own sampler is replaced by one that returns our latents."""
    x = latents(folder)
    monkeypatch.setattr(pipeline.scheduler, "step", lambda *args, **kwargs: SimpleNamespace(prev_sample=x.clone()))
    pipeline.set_progress_bar_config(disable=True)
    want = torch.from_numpy(pipeline(batch_size=3, num_inference_steps=1, output_type="np").images)
    got = decode(folder, x, batch_size=3)
    assert (got.dtype, tuple(got.shape), got.device.type) == (torch.float32, (3, 3, 16, 16), "cpu")
    assert torch.equal((got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), want)
    assert got.std() > 0


def test_batches_are_put_together_in_order(folder):
    x = latents(folder)
    got = decode(folder, x, batch_size=2)
    assert torch.equal(got[:2], decode(folder, x[:2], batch_size=2))
    assert torch.equal(got[2:], decode(folder, x[2:], batch_size=2))


def test_codebook_and_scaling_factor_matter(pipeline, folder):
    """A latent is replaced by the nearest entry of the codebook, after it was divided by the scaling factor."""
    x = latents(folder)
    with torch.no_grad():
        unscaled, unquantised = (
            pipeline.vqvae.decode(x).sample,
            pipeline.vqvae.decode(x / 0.25, force_not_quantize=True),
        )
    got = decode(folder, x, batch_size=3)
    assert not torch.equal(got, unscaled.clamp(-1, 1))
    assert not torch.equal(got, unquantised.sample.clamp(-1, 1))


def test_autoencoder_with_a_shift(folder):
    torch.manual_seed(2)
    vae = AutoencoderKL(latent_channels=4, scaling_factor=0.5, shift_factor=0.1, **VAE)
    vae.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    del index["vqvae"]
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = vae.eval().decode(x / 0.5 + 0.1).sample.clamp(-1, 1)
    assert torch.equal(decode(folder, x, batch_size=2), want)


def test_half_precision_files_are_decoded_in_float32(folder):
    path = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
    x = latents(folder)
    half = {name: value.half() for name, value in load_file(path).items()}
    path.unlink()  # it may be mapped
    save_file(half, path, metadata={"format": "pt"})
    got = decode(folder, x)
    assert got.dtype == torch.float32
    save_file({name: value.float() for name, value in half.items()}, path, metadata={"format": "pt"})
    assert torch.equal(got, decode(folder, x))


@pytest.mark.parametrize(
    "x",
    [None, 3, [1.0], torch.zeros(4, 8, 8), torch.zeros(1, 5, 8, 8), torch.zeros(2, 4), torch.zeros(0, 3, 8, 8)],
    ids=str,
)
def test_latents_that_do_not_fit(folder, x):
    line = error_line(decode, folder, x)
    assert line.startswith("latents are ")
    assert "want a tensor [N, " in line


def test_arguments(folder, tmp_path):
    x = torch.zeros(1, 3, 8, 8)
    assert error_line(decode, folder, x, batch_size=0) == "batch_size is 0; want a whole number, at least 1"
    assert error_line(decode, 0, x) == "folder is 0; want the path of a folder"
    assert error_line(decode, folder, x, device=1.5) == "device is 1.5; want 'cpu', 'cuda' or 'cuda:N'"
    assert "model_index.json: No such file" in error_line(decode, tmp_path / "gone", x)


def test_damaged_or_foreign_decoders(folder):
    x = torch.zeros(1, 3, 8, 8)
    (folder / "vqvae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert error_line(decode, folder, x).startswith(f"cannot load the VQModel in {folder / 'vqvae'}: ")
    index = json.loads((folder / "model_index.json").read_text())
    for foreign in ("VQNone", "VaeImageProcessor", "vae_decode"):
        (folder / "model_index.json").write_text(json.dumps(index | {"vqvae": ["os", foreign]}))
        assert error_line(decode, folder, x).startswith(f"{folder} has the decoder {foreign}, which diffusers ")
    (folder / "model_index.json").write_text(json.dumps(index | {"vqvae": [None, None]}))
    assert (
        error_line(decode, folder, x)
        == f"{folder} is a pipeline without a VAE, so its samples are not latents to decode"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_defaults_of_the_process_change_nothing(folder, dtype):
    x = latents(folder)
    want = decode(folder, x)
    with defaults(dtype, "meta"):
        got = decode(folder, x)
    assert torch.equal(got, want)


def test_ddpm_scheduler_of_a_latent_pipeline(folder):
    """Any scheduler that we read may stand beside the VAE."""
    DDPMScheduler(num_train_timesteps=4, clip_sample=False).save_pretrained(folder / "scheduler")
    assert decode(folder, latents(folder, 1)).isfinite().all()
