"""`StableDiffusionPipeline`, as it comes and accelerated: pytest bench/test_stable_diffusion.py

The network has the layout of Stable Diffusion 1.5 and random weights. It is timed from embeddings to latents, since the
text encoder and the VAE are the same on both sides. On a CPU nothing is captured, so nothing is timed there.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.machine import DEVICE, SCALE, judged
from fastddpm.core.precision import PRECISIONS

WHO = ("fastddpm", "diffusers")
LAYOUT: dict[str, Any] = {"cross_attention_dim": 768}  # the defaults of UNet2DConditionModel are the rest
if SCALE != "cuda":
    LAYOUT = {
        "cross_attention_dim": 32,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "sample_size": 8,
    }
BATCHES = (1, 4) if SCALE == "cuda" else (1,)
STEPS = 20 if SCALE == "cuda" else 2
WORDS = 77
GUIDANCE = 7.5


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("batch", BATCHES)
def test_stable_diffusion(measure, batch, precision, who):
    """DDIM with guidance, which evaluates the network for 2 x batch."""
    pipeline = pipeline_of(who, precision)
    errors = judged(*first_latents(pipeline, batch, precision))
    if DEVICE.type != "cuda":
        pytest.skip("there is no GPU, and on a CPU nothing is captured")

    def run() -> Tensor:
        return latents_of(pipeline, batch, precision, STEPS)

    run()  # captures
    case = f"StableDiffusionPipeline, batch {batch}, {precision}"
    contender = f"{who} pipeline {precision}"
    images, facts = batch / STEPS, {"steps": STEPS}
    measure(run, STEPS, group=case, contender=contender, images=images, precision=precision, errors=errors, facts=facts)


def first_latents(pipeline: Any, batch: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents after two steps: of a pipeline, of diffusers' own, and in float64."""
    for _ in range(2):  # the second time as replays alone
        ours = latents_of(pipeline, batch, precision, 2)
    return ours, *expected(batch, precision)


@cache
def expected(batch: int, precision: str) -> tuple[Tensor, Tensor]:
    """Return the latents after two steps of diffusers' own pipeline, in the precision and in float64."""
    pipeline = pipeline_of("diffusers", precision)
    plain = latents_of(pipeline, batch, precision, 2)
    pipeline.unet.double()
    return plain, latents_of(pipeline, batch, precision, 2)


def latents_of(pipeline: Any, batch: int, precision: str, steps: int) -> Tensor:
    """Return what a pipeline makes of fixed embeddings and x_T, which are exact in the precision."""
    generator = torch.Generator().manual_seed(0)
    config = pipeline.unet.config

    def normals(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float32).to(PRECISIONS[precision])
        return x.to(DEVICE, pipeline.unet.dtype)

    return pipeline(
        prompt_embeds=normals(batch, WORDS, config.cross_attention_dim),
        negative_prompt_embeds=normals(batch, WORDS, config.cross_attention_dim),
        latents=normals(batch, config.in_channels, config.sample_size, config.sample_size),
        height=8 * config.sample_size,
        width=8 * config.sample_size,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        output_type="latent",
    ).images


def pipeline_of(who: str, precision: str) -> Any:
    """Return a pipeline without text encoder and VAE; the same weights each time."""
    pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    diffusers.logging.set_verbosity_error()  # warns when a network is cast
    torch.manual_seed(0)
    with DEVICE:
        unet = diffusers.UNet2DConditionModel(**LAYOUT).to(PRECISIONS[precision]).eval()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if who == "fastddpm":
        import fastddpm

        fastddpm.accelerate(pipeline)
    return pipeline
