"""One small pipeline of diffusers, for all tests of checkpoints."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample_range=0.9)


@pytest.fixture
def folder(tmp_path, unet, scheduler) -> Path:
    """A saved pipeline."""
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
