"""accelerate on Stable Diffusion: the scheduler is replaced, and the images have the same bits."""

import json
import logging

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from fastddpm import diffusers as fast
from fastddpm.diffusers import accelerate
from tests.support.tiny_pipelines import seeded

KEEPS_LOOP = "a StableDiffusionPipeline keeps its own loop, which calls the replaced parts"
REASON = "it is {}; only DDPM and DDIM schedulers and a UNet2DModel are replaced"


def stable_diffusion(folder, scheduler):
    """A tiny Stable Diffusion pipeline with random weights."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=transformers.CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_stable_diffusion_has_the_same_images(name, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    options = {"clip_sample": False, "steps_offset": 1, "beta_schedule": "scaled_linear", "beta_end": 0.012}
    pipe = stable_diffusion(tmp_path, getattr(diffusers, name)(**options))

    def images():
        return pipe(
            ["a cat", "a dog"], generator=[seeded(1), seeded(2)], num_inference_steps=3, output_type="pt",
            **({"eta": 0.5} if name == "DDIMScheduler" else {}),
        ).images  # fmt: skip

    before, scheduler, unet = images(), pipe.scheduler, pipe.unet
    assert before.std() > 0
    report = accelerate(pipe)
    assert pipe.scheduler is scheduler
    assert pipe.unet is unet
    assert type(scheduler) is getattr(fast, name)
    assert report.replaced == {"scheduler": f"diffusers' {name} is now fastddpm's"}
    assert report.left["pipeline"] == KEEPS_LOOP
    assert report.left["unet"] == REASON.format("a UNet2DConditionModel")
    assert report.left["safety_checker"] == REASON.format("None")
    assert set(report.left) | set(report.replaced) == {*pipe.components, "pipeline"}
    assert torch.equal(images(), before)
    assert accelerate(pipe, noise=3).replaced == {}
    seeded_images = images()
    assert not torch.equal(seeded_images, before)
    assert torch.equal(images(), seeded_images)
