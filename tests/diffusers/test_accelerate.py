"""accelerate: the objects stay the same and become fast; the report says what was replaced or left alone, and why."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import fastddpm
from tests.support.check import assert_as_accurate, error_line

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from fastddpm.diffusers import Accelerated, accelerate
from tests.support.beside_diffusers import DOUBLE, SINGLE
from tests.support.tiny_pipelines import KINDS, STEPS, hooked, pipeline, sample, seeded, tiny_unet

REASON = "it is a {}; only DDPM and DDIM schedulers and a UNet2DModel are replaced"


class Walk(diffusers.DiffusionPipeline):
    """A custom pipeline with a loop of its own."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, n=2, *, generator=None, num_inference_steps=STEPS, output_type="pt", fail=False):
        """Walk."""
        x = torch.randn(n, 3, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x, generator=generator).prev_sample
            if fail:
                raise KeyError("fail")
        return diffusers.ImagePipelineOutput(images=x)


class MyPipeline(diffusers.DDPMPipeline):
    """A user's class; plain diffusers does not have a class of this name."""


class MyScheduler(diffusers.DDPMScheduler):
    """A user's class."""


def walk(scheduler="DDPMScheduler", **options):
    pipe = Walk(tiny_unet(diffusers, **options), getattr(diffusers, scheduler)())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The two pipelines


@pytest.mark.parametrize("kind", KINDS)
def test_parts_stay_the_same_objects_and_become_ours(kind):
    pipe = pipeline(diffusers, kind)
    held = pipe, pipe.unet, pipe.scheduler, pipe.unet.conv_in, pipe.scheduler.betas
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    report = accelerate(pipe)
    assert (pipe, pipe.unet, pipe.scheduler, pipe.unet.conv_in, pipe.scheduler.betas) == held
    assert [type(part) for part in held[:3]] == [
        getattr(fast, f"{kind}Pipeline"),
        fast.UNet2DModel,
        getattr(fast, f"{kind}Scheduler"),
    ]
    assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())
    assert torch.equal(sample(pipe), sample(pipeline(fast, kind)))
    names = {"unet": "UNet2DModel", "scheduler": f"{kind}Scheduler", "pipeline": f"{kind}Pipeline"}
    assert report == Accelerated(
        replaced={part: f"diffusers' {name} is now fastddpm's" for part, name in names.items()}, left={}
    )
    assert str(report).splitlines() == [f"{part}: {what}" for part, what in report.replaced.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_images_by_diffusers_forward_have_its_bits(kind):
    before, after = pipeline(diffusers, kind), pipeline(diffusers, kind)
    accelerate(after)
    assert not torch.equal(sample(before), sample(after))  # they round differently
    assert torch.equal(*(sample(pipe) for pipe in hooked(before, after)))


def test_accelerate_is_exported():
    assert fastddpm.accelerate is accelerate
    assert str(fastddpm.accelerate(pipeline(diffusers))).count("\n") == 2


@pytest.mark.parametrize("make", [pipeline, lambda: pipeline(diffusers), walk], ids=["ours", "diffusers", "walk"])
def test_accelerating_twice_changes_nothing(make):
    pipe = make()
    accelerate(pipe)
    images, kind = sample(pipe), type(pipe)
    report = accelerate(pipe)
    assert type(pipe) is kind
    assert report.replaced == {}
    assert report.left == dict.fromkeys(("unet", "scheduler", "pipeline"), "it is already fastddpm's")
    assert str(report).splitlines()[0].endswith(": left alone (it is already fastddpm's)")
    assert torch.equal(sample(pipe), images)


def test_a_partly_accelerated_pipeline_is_completed():
    pipe = pipeline()
    pipe.register_modules(unet=tiny_unet(diffusers))
    report = accelerate(pipe)
    assert list(report.replaced) == ["unet"]
    assert report.left == dict.fromkeys(("scheduler", "pipeline"), "it is already fastddpm's")
    assert torch.equal(sample(pipe), sample(pipeline()))


def test_a_shared_network_is_fast_in_every_pipeline():
    first = pipeline(diffusers)
    unet = first.unet
    second = diffusers.DDIMPipeline(unet, first.scheduler)
    accelerate(first)
    assert second.unet is unet
    assert type(second.unet) is fast.UNet2DModel
    assert type(second.scheduler) is diffusers.DDIMScheduler
    assert accelerate(second).left == {"unet": "it is already fastddpm's"}


def test_a_scheduler_of_another_kind_is_left_alone():
    pipe = pipeline(diffusers)
    pipe.scheduler = scheduler = diffusers.DPMSolverMultistepScheduler()
    report = accelerate(pipe)
    assert report.left == {"scheduler": REASON.format("DPMSolverMultistepScheduler")}
    assert list(report.replaced) == ["unet", "pipeline"]
    assert type(scheduler) is diffusers.DPMSolverMultistepScheduler
    assert str(report).splitlines()[-1] == f"scheduler: left alone ({report.left['scheduler']})"


def test_a_scheduler_of_a_user_class_is_left_alone():
    pipe = pipeline(diffusers)
    pipe.scheduler = MyScheduler()
    report = accelerate(pipe)
    assert report.left == {"scheduler": REASON.format("MyScheduler")}
    plain = pipeline(diffusers)
    assert torch.equal(*(sample(one) for one in hooked(pipe, plain)))


@pytest.mark.parametrize("make", [lambda **options: pipeline(diffusers, **options), walk], ids=["DDPM", "walk"])
def test_a_network_that_cannot_be_replaced_is_left_alone(make):
    pipe, plain = (make(down_block_types=("SkipDownBlock2D", "AttnDownBlock2D")) for _ in range(2))
    report = accelerate(pipe)
    assert "unet" in report.left
    assert "SkipDownBlock2D" in report.left["unet"]
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert type(pipe.scheduler) is fast.DDPMScheduler
    assert torch.equal(sample(pipe), sample(plain))


# Other pipelines


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler"])
def test_a_custom_loop_is_accelerated(scheduler):
    pipe, plain = walk(scheduler), walk(scheduler)
    held = pipe.unet, pipe.scheduler
    report = accelerate(pipe)
    assert (pipe.unet, pipe.scheduler) == held
    assert report.left == {}
    assert report.replaced["pipeline"] == "Walk, whose loop now calls the fused network"
    assert isinstance(pipe, Walk)
    assert (type(pipe).__name__, type(pipe).__module__, type(pipe).__doc__) == ("Walk", Walk.__module__, Walk.__doc__)
    assert type(pipe).__call__.__doc__ == "Walk."

    assert not torch.equal(sample(pipe), sample(plain))  # they round differently
    assert torch.equal(*(sample(one) for one in hooked(pipe, plain)))


def test_a_custom_loop_is_as_accurate():
    n = 16
    pipe, plain, exact = (walk("DDIMScheduler") for _ in range(3))  # deterministic after x_T
    accelerate(pipe)
    exact.unet.double()
    forward = exact.unet.forward
    exact.unet.forward = lambda x, t: forward(x.double(), t)
    exact_images = sample(exact, n)
    assert exact_images.dtype == DOUBLE
    ours, theirs = sample(pipe, n), sample(plain, n)
    assert ours.dtype == theirs.dtype == SINGLE
    assert_as_accurate(ours, theirs, exact_images)


def test_a_failing_loop_leaves_the_network_unchanged():
    pipe, plain = walk(), walk()
    accelerate(pipe)
    with pytest.raises(KeyError):
        pipe(fail=True)
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, 5).sample, plain.unet(x, 5).sample)


def test_a_user_subclass_of_a_pipeline_keeps_its_loop():
    plain = MyPipeline(tiny_unet(diffusers), diffusers.DDPMScheduler())
    pipe = MyPipeline(tiny_unet(diffusers), diffusers.DDPMScheduler())
    for one in (plain, pipe):
        one.set_progress_bar_config(disable=True)
    assert accelerate(pipe).replaced["pipeline"] == "MyPipeline, whose loop now calls the fused network"
    assert isinstance(pipe, MyPipeline)
    assert not torch.equal(sample(pipe), sample(plain))
    assert torch.equal(*(sample(one) for one in hooked(pipe, plain)))


@pytest.mark.parametrize("make", [lambda: pipeline(diffusers), walk], ids=["DDPM", "walk"])
def test_saved_files_do_not_change(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "before")
    accelerate(pipe, noise=3)
    sample(pipe)
    pipe.save_pretrained(tmp_path / "after")
    before, after = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "before", tmp_path / "after")
    )
    assert before == after
    assert json.loads(before["model_index.json"])["unet"] == ["diffusers", "UNet2DModel"]
    loaded = type(pipe).from_pretrained(tmp_path / "after")
    loaded.set_progress_bar_config(disable=True)
    pipe.scheduler.noise = "generator"
    assert torch.equal(*(sample(one) for one in hooked(pipe, loaded)))


@pytest.mark.parametrize("make", [lambda: pipeline(diffusers), walk], ids=["DDPM", "walk"])
def test_the_network_can_be_replaced_later(make):
    pipe, plain = make(), make()
    accelerate(pipe)
    pipe.unet = tiny_unet(diffusers)
    assert torch.equal(*(sample(one) for one in hooked(pipe, plain)))


@pytest.mark.parametrize("make", [lambda: pipeline(diffusers), walk], ids=["DDPM", "walk"])
def test_a_deepcopy_is_independent(make):
    pipe = make()
    accelerate(pipe)
    images = sample(pipe)
    twin = copy.deepcopy(pipe)
    assert twin.unet is not pipe.unet
    assert torch.equal(sample(twin), images)
    with torch.no_grad():
        twin.unet.conv_in.weight.zero_()
    assert not torch.equal(sample(twin), images)
    assert torch.equal(sample(pipe), images)


# Training


@pytest.mark.parametrize("make", [lambda: pipeline(diffusers), walk], ids=["DDPM", "walk"])
def test_the_network_can_still_be_trained(make):
    x = torch.randn(4, 3, 8, 8, generator=seeded())
    results, images = [], []
    for accelerated in (True, False):
        pipe = make()
        if accelerated:
            accelerate(pipe)
            images.append(sample(pipe))
        optimizer = torch.optim.AdamW(pipe.unet.parameters(), 1e-2)
        for t in torch.tensor([[3, 400, 999, 0], [0, 0, 500, 1]]):
            noised = pipe.scheduler.add_noise(x, x.flip(0), t)
            loss = (pipe.unet(noised, t).sample - x.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([loss, *(value.grad for value in pipe.unet.parameters()), *pipe.unet.state_dict().values()])
        images.append(sample(pipe) if accelerated else sample(*hooked(pipe)))
        if accelerated:
            images.append(sample(*hooked(pipe)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    before, after, by_forward, theirs = images
    assert not torch.equal(before, after)
    assert torch.equal(by_forward, theirs)


# Noise, and refused arguments


@pytest.mark.parametrize("noise", ["philox", 0, 2**64 - 1, False, "generator"], ids=str)
def test_noise_is_set_on_the_scheduler(noise):
    pipe = pipeline(diffusers)
    accelerate(pipe, noise=noise)
    assert pipe.scheduler.noise is noise
    assert torch.equal(sample(pipe), sample(pipeline(), noise=noise))
    accelerate(pipe)
    assert pipe.scheduler.noise is noise
    again = accelerate(pipe, noise="generator")
    assert again.replaced == {}
    assert torch.equal(sample(pipe), sample(pipeline()))


class Another(diffusers.DDPMPipeline):
    """A user's class."""


@pytest.mark.parametrize("pipe", [None, nn.Identity(), "google/ddpm-cifar10-32"], ids=["None", "module", "name"])
def test_anything_but_a_pipeline_is_refused(pipe):
    text = error_line(accelerate, pipe)
    assert text == f"pipe is a {type(pipe).__name__}; want a pipeline of diffusers, such as a DDPMPipeline"


def test_a_refused_call_changes_nothing():
    pipe = pipeline(diffusers)
    assert error_line(accelerate, pipe, noise=-1).startswith("noise is -1; want ")
    assert type(pipe) is diffusers.DDPMPipeline
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert type(pipe.scheduler) is diffusers.DDPMScheduler
    pipe.scheduler = MyScheduler()
    text = error_line(accelerate, pipe, noise=3)
    assert text == "noise is 3, but the scheduler is a MyScheduler, which draws its own; leave it out"
    assert type(pipe.unet) is diffusers.UNet2DModel


def test_a_custom_accelerated_pipeline_can_be_pickled_and_copied():
    pipe = pipeline(diffusers)
    pipe.__class__ = Another
    accelerate(pipe)
    for made in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert isinstance(made, Another)
        assert type(made) is not Another
        assert torch.equal(sample(made), sample(pipe))
