"""Tiny latent pipelines of diffusers with random weights: Stable Diffusion and its relatives."""

import json

import diffusers
import torch
import transformers

from tests.support.tiny_pipelines import seeded, without_progress

OPTIONS = {"clip_sample": False, "steps_offset": 1, "beta_schedule": "scaled_linear", "beta_end": 0.012}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def ddpm(**options):
    return diffusers.DDPMScheduler(**OPTIONS, **options)


def ddim(**options):
    return diffusers.DDIMScheduler(**OPTIONS, **options)


def conditional_unet(**options):
    """A network that attends to [N, length, 16]."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**UNET, **options}).eval()


def tiny_vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()


def tokenizer_in(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def stable_diffusion(folder, scheduler, kind=diffusers.StableDiffusionPipeline, **unet):
    """A pipeline of a class like `StableDiffusionPipeline`.

    Args: folder: for the tokenizer's files; unet: options of `conditional_unet`.
    """
    tokenizer = tokenizer_in(folder)
    torch.manual_seed(2)
    text = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pipe = kind(
        vae=tiny_vae(), text_encoder=transformers.CLIPTextModel(text).eval(), tokenizer=tokenizer,
        unet=conditional_unet(**unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return without_progress(pipe)


def stable_diffusion_xl(scheduler):
    """A `StableDiffusionXLPipeline` without text encoders, which takes embeddings instead: see `xl_embeddings`."""
    unet = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8
    )
    pipe = diffusers.StableDiffusionXLPipeline(tiny_vae(), None, None, None, None, unet, scheduler)
    return without_progress(pipe)


def xl_embeddings(seed):
    """The arguments of `stable_diffusion_xl` in place of a prompt and a negative prompt."""
    shapes = {"prompt_embeds": (1, 5, 16), "pooled_prompt_embeds": (1, 8)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    generator = seeded(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
