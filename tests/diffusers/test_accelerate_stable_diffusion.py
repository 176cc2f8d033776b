"""accelerate on Stable Diffusion on a CPU: the scheduler is replaced, and the images have the same bits."""

import logging

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fastddpm import diffusers as fast
from fastddpm.diffusers import accelerate
from tests.support.stable_diffusion import OPTIONS, stable_diffusion
from tests.support.tiny_pipelines import seeded

ON_CPU = "it is on a cpu, where diffusers' forward runs; on a GPU its calls replay a CUDA graph"
LOOP = "StableDiffusionPipeline, whose loop replays the network as a CUDA graph on a GPU"
REASON = "it is {}; only DDPM and DDIM schedulers and a UNet2DModel are replaced"


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_stable_diffusion_has_the_same_images(name, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    pipe = stable_diffusion(tmp_path, getattr(diffusers, name)(**OPTIONS))

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
    assert report.replaced == {"scheduler": f"diffusers' {name} is now fastddpm's", "pipeline": LOOP}
    assert report.left["unet"] == ON_CPU
    assert report.left["safety_checker"] == REASON.format("None")
    assert set(report.left) | set(report.replaced) == {*pipe.components, "pipeline"}
    assert torch.equal(images(), before)
    assert accelerate(pipe, noise=3).replaced == {}
    seeded_images = images()
    assert not torch.equal(seeded_images, before)
    assert torch.equal(images(), seeded_images)
