"""Networks of diffusers with conditions: loops that diffusers itself recorded, from the same noise.

tests/data/diffusers-*/README.md says what was recorded, and how.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from fastddpm import Sampler, Schedule, ops
from fastddpm.core import noise
from fastddpm.diffusers import accelerate, noise_sources
from tests.support.tiny_pipelines import without_progress

DATA = Path(__file__).parents[1] / "data"
TEXT, IMAGE = DATA / "diffusers-unet2d-condition-cfg", DATA / "diffusers-unet2d-concat-sr3"
GUIDANCE = 3.0
CLOSE = 1e-4  # float32 on another machine differs by 1.3e-5 in whole loops
TEXT_LOOPS = {"ddpm20": {}, "ddim10": {"eta": 0.0}, "ddim10eta": {"eta": 0.7}}
IMAGE_LOOPS = {"ddpm25": {}, "ddim10": {"eta": 0.0}, "ddim10clip": {"eta": 0.0}}


def recorded(folder, loop):
    """The arrays of a loop, by their names without its prefix, and those of the conditions."""
    arrays = np.load(folder / "expected.npz")
    own = {name.removeprefix(f"{loop}_"): arrays[name] for name in arrays if name.startswith(f"{loop}_")}
    shared = {name: arrays[name] for name in arrays if name.startswith(("cfg_", "sample_"))}
    return {name: torch.from_numpy(array) for name, array in {**own, **shared}.items() if array.ndim}


def scheduler_of(folder, loop):
    kind = diffusers.DDIMScheduler if loop.startswith("ddim") else diffusers.DDPMScheduler
    return kind.from_pretrained(folder, subfolder="scheduler_ddim" if loop.startswith("ddim") else "scheduler")


def text_network():
    return diffusers.UNet2DConditionModel.from_pretrained(TEXT, subfolder="unet", low_cpu_mem_usage=False)


def image_network():
    return diffusers.UNet2DModel.from_pretrained(IMAGE, low_cpu_mem_usage=False)


class Wrapped(nn.Module):
    """A network of one's own around that of diffusers."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, **kwargs):
        return self.unet(x, t, **kwargs).sample


WRAPPERS = {"lambda": lambda unet: lambda x, t, **kwargs: unet(x, t, **kwargs), "module": Wrapped}


@pytest.fixture
def replayed(monkeypatch):
    """Makes addressed noise what was recorded, by stream and t; call it with the arrays of a loop."""

    def use(arrays):
        steps = {int(t): z for t, z in zip(arrays["t"], arrays["z"], strict=False)}
        none = torch.zeros_like(arrays["xT"])  # is multiplied by zero in steps without noise

        def normal(address, shape, *, stream=noise.STEP, t=0):
            assert stream in (noise.START, noise.STEP)
            (t,) = set(t.tolist()) if isinstance(t, torch.Tensor) else {t}
            z = arrays["xT"] if stream == noise.START else steps.get(t, none)
            return z[address[:, 1]].clone()

        monkeypatch.setattr(noise, "normal", normal)

    with ops.forced_backend("torch"):
        yield use


def frames(arrays, loop):
    """[N, steps + 1, ...]: what a Sampler's trajectory should be; it adds no noise in the last step."""
    last, z = arrays["traj"][-1], arrays["z"]
    if len(z) == len(arrays["t"]):
        abar, eta = arrays["alphas_cumprod"].double(), TEXT_LOOPS[loop]["eta"]
        end, t = abar[0], abar[arrays["t"][-1]]  # set_alpha_to_one is False
        last = last - eta * ((1 - end) / (1 - t) * (1 - t / end)).sqrt().float() * z[-1]
    return torch.stack([arrays["xT"], *arrays["traj"][:-1], last], 1)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def sampled(network, folder, loop, arrays, schedule, **options):
    sampler = Sampler(network, schedule, shape=arrays["xT"].shape[1:], device="cpu")
    settings = {"sampler": "ddim", "eta": 0.0} if loop.startswith("ddim") else {}
    t = arrays["t"].tolist()
    return sampler.sample(2, steps=len(t), trajectory=t, progress=False, **{**settings, **options})


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("loop", TEXT_LOOPS)
def test_guided_loops_of_a_sampler(loop, wrap, replayed):
    arrays = recorded(TEXT, loop)
    replayed(arrays)
    ours = sampled(
        WRAPPERS[wrap](text_network()), TEXT, loop, arrays, Schedule.from_config(scheduler_of(TEXT, loop).config),
        model_kwargs={"encoder_hidden_states": arrays["cfg_cond_states"]},
        uncond_kwargs={"encoder_hidden_states": arrays["cfg_uncond_states"]},
        guidance_scale=GUIDANCE, **TEXT_LOOPS[loop],
    )  # fmt: skip
    assert error(ours, frames(arrays, loop)) <= CLOSE


@pytest.mark.parametrize("loop", IMAGE_LOOPS)
def test_loops_of_a_sampler_with_concatenated_channels(loop, replayed):
    arrays = recorded(IMAGE, loop)
    replayed(arrays)
    config = dict(scheduler_of(IMAGE, loop).config)
    schedule = Schedule.from_config(config | ({"use_clipped_model_output": True} if loop == "ddim10clip" else {}))
    ours = sampled(Wrapped(image_network()), IMAGE, loop, arrays, schedule, concat=arrays["sample_cond"])
    assert error(ours, frames(arrays, loop)) <= CLOSE


@pytest.mark.parametrize("loop", TEXT_LOOPS)
def test_guided_loops_of_an_accelerated_pipeline(loop, captured, monkeypatch):
    arrays = recorded(TEXT, loop)
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=text_network(), scheduler=scheduler_of(TEXT, "ddim10"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.scheduler = scheduler_of(TEXT, loop)  # the constructor would change its offset
    accelerate(without_progress(pipe))
    draws, states = iter(arrays["z"]), []
    monkeypatch.setattr(noise_sources, "randn_tensor", lambda *args, **kwargs: next(draws))

    def keep(pipe, i, t, tensors):
        states.append(tensors["latents"].clone())
        return {}

    result = pipe(
        prompt_embeds=arrays["cfg_cond_states"], negative_prompt_embeds=arrays["cfg_uncond_states"],
        latents=arrays["xT"], guidance_scale=GUIDANCE, num_inference_steps=len(arrays["t"]), output_type="latent",
        height=64, width=64, callback_on_step_end=keep, **TEXT_LOOPS[loop],
    )  # fmt: skip
    assert error(torch.stack(states), arrays["traj"]) <= CLOSE
    assert error(result.images, arrays["x0"]) <= CLOSE
    assert list(draws) == []
    assert len(captured) == 1


class Upscale(diffusers.DiffusionPipeline):
    """A custom pipeline whose network is also given an image, in further channels."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, image, x, num_inference_steps, **options):
        self.scheduler.set_timesteps(num_inference_steps)
        states = []
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(torch.cat([x, image], 1), t).sample, t, x, **options).prev_sample
            states.append(x)
        return torch.stack(states)


@pytest.mark.parametrize("loop", IMAGE_LOOPS)
def test_loops_of_an_accelerated_pipeline_with_concatenated_channels(loop, monkeypatch):
    arrays = recorded(IMAGE, loop)
    pipe = Upscale(image_network(), scheduler_of(IMAGE, loop))
    report = accelerate(pipe)
    assert report.left["unet"] == "it returns 3 channels for 6"
    draws = iter(arrays["z"])
    monkeypatch.setattr(noise_sources, "randn_tensor", lambda *args, **kwargs: next(draws))
    options = {"use_clipped_model_output": True} if loop == "ddim10clip" else {}
    states = pipe(arrays["sample_cond"], arrays["xT"], len(arrays["t"]), **options)
    assert error(states, arrays["traj"]) <= CLOSE
    assert list(draws) == []


def test_a_wrong_guidance_is_seen(replayed):
    arrays = recorded(TEXT, "ddim10")
    replayed(arrays)
    ours = sampled(
        Wrapped(text_network()), TEXT, "ddim10", arrays, Schedule.from_config(scheduler_of(TEXT, "ddim10").config),
        model_kwargs={"encoder_hidden_states": arrays["cfg_cond_states"]},
        uncond_kwargs={"encoder_hidden_states": arrays["cfg_uncond_states"]}, guidance_scale=GUIDANCE + 0.01,
    )  # fmt: skip
    assert error(ours, frames(arrays, "ddim10")) > CLOSE
