"""What a run of a pipeline depends on: its source of noise, the current weights, and torch's modes."""

import pytest
import torch
from torch import nn

from fastddpm import Sampler, Schedule
from fastddpm.core import noise
from fastddpm.networks.unet2d import UNet2D
from tests.support.check import assert_as_accurate, at_once, error_line

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import DOUBLE, SINGLE
from tests.support.tiny_pipelines import (
    KINDS,
    STEPS,
    hooked,
    images_of_noise,
    pipeline,
    pipeline_pair,
    sample,
    seeded,
    tiny_unet,
)

SHAPE = (3, 8, 8)
NOISY = {"DDPM": {}, "DDIM": {"eta": 1.0}}


def with_zero_network(pipe):
    """A pipeline whose network returns zero, so that its images depend on the noise only, not on how a batch rounds."""
    with torch.no_grad():
        for parameter in pipe.unet.conv_out.parameters():
            parameter.zero_()
    return pipe


# Noise


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_only_the_start_is_drawn(kind):
    pipe, generator, other = pipeline(fast, kind), seeded(), seeded(2)
    call = {**NOISY[kind], "noise": False}
    images = sample(pipe, generator=generator, **call)
    start = torch.randn(2, *SHAPE, generator=(twin := seeded()))
    assert torch.equal(generator.get_state(), twin.get_state())
    assert torch.equal(sample(pipe, generator=other, latents=start, **call), images)
    assert torch.equal(other.get_state(), seeded(2).get_state())
    assert not torch.equal(images, sample(pipe, **NOISY[kind]))
    if kind == "DDIM":
        hooked(pipe)
        assert not torch.equal(sample(pipe, **call), sample(pipe))  # sigma still reduces the coefficient of eps


@pytest.mark.parametrize("where", ["call", "attribute"])
@pytest.mark.parametrize("kind", KINDS)
def test_seeded_noise_does_not_depend_on_the_batch(kind, where, monkeypatch):
    def images(pipe, n, seed=9):
        pipe.scheduler.noise = seed if where == "attribute" else "generator"
        return sample(pipe, n, **NOISY[kind], **({"noise": seed} if where == "call" else {}))

    zero = with_zero_network(pipeline(fast, kind))
    before = torch.get_rng_state()
    assert torch.equal(images(zero, 5)[:2], images(zero, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(images(zero, 2, 8), images(zero, 2))
    eight, all_of_them = (images(pipeline(fast, kind), n) for n in (8, 16))
    address = noise.address(9, 16)
    draws = [noise.normal(address, SHAPE, stream=noise.START, t=1000)]
    last = 250 if kind == "DDPM" else 0  # DDPM adds none at t = 0
    draws += [noise.normal(address, SHAPE, stream=noise.STEP, t=t) for t in range(750, last - 1, -250)]
    plain, ref = (
        images_of_noise(monkeypatch, draws, pipeline(diffusers, kind), dtype, 16, **NOISY[kind])
        for dtype in (SINGLE, DOUBLE)
    )
    assert_as_accurate(all_of_them, plain, ref)
    assert_as_accurate(eight, plain[:8], ref[:8])


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_seeded_noise_gives_the_starting_state_of_a_sampler(seed):
    starts = []
    pipe = with_zero_network(pipeline(scheduler={"prediction_type": "sample", "clip_sample": False}))
    sampler = Sampler(lambda x, t: starts.append(x.clone()) or x * 0, shape=SHAPE, device="cpu")
    sampler.sample(3, seed=seed, steps=1, progress=False)
    pipe.unet.register_forward_pre_hook(lambda module, args: starts.append(args[0]))
    sample(pipe, 3, noise=seed, num_inference_steps=1)
    assert len(starts) == 2
    assert torch.equal(*starts)


def test_a_sampler_and_a_pipeline_make_the_same_images(monkeypatch):
    """From the same noise; the sampler computes its coefficients in float64, diffusers in float32."""
    n, pipe = 16, pipeline()
    network = UNet2D(**pipe.unet.config)
    network.load_state_dict(pipe.unet.state_dict())
    schedule = Schedule.from_config(dict(pipe.scheduler.config))
    sampler = Sampler(network, schedule, device="cpu", precision="fp32")
    x = sampler.sample(n, seed=5, steps=STEPS, progress=False)
    address = noise.address(5, n)
    draws = [noise.normal(address, SHAPE, stream=noise.START, t=1000)]
    draws += [noise.normal(address, SHAPE, stream=noise.STEP, t=t) for t in (750, 500, 250)]
    plain, exact = pipeline(diffusers), pipeline(diffusers)
    exact.scheduler.alphas_cumprod = schedule.log_alphas_cumprod.exp()
    plain, ref = (images_of_noise(monkeypatch, draws, *one, n) for one in ((plain, SINGLE), (exact, DOUBLE)))
    assert_as_accurate(sample(pipe, n, noise=5), plain, ref)
    assert_as_accurate((x / 2 + 0.5).clamp(0, 1), plain, ref)


@pytest.mark.parametrize("kind", KINDS)
def test_philox_noise_is_seeded_by_the_generator(kind):
    pipe = pipeline(fast, kind)

    def images(n=2, generator=None):
        return sample(pipe, n, generator=seeded() if generator is None else generator, noise="philox", **NOISY[kind])

    first = images()
    assert torch.equal(images(), first)
    assert not torch.equal(images(generator=seeded(2)), first)
    generator = seeded()
    assert torch.equal(images(generator=generator), first)
    assert not torch.equal(images(generator=generator), first)  # each run draws a new seed
    assert not torch.equal(sample(pipe, **NOISY[kind]), first)
    zero = with_zero_network(pipe)
    assert torch.equal(images(5)[:2], images(2))
    listed = images(2, [seeded(4), seeded(6)])
    assert torch.equal(listed[:1], images(1, [seeded(4)]))
    assert torch.equal(listed[1:], images(1, [seeded(6)]))
    torch.manual_seed(3)
    free = sample(zero, generator=None, noise="philox", **NOISY[kind])
    assert not torch.equal(sample(zero, generator=None, noise="philox", **NOISY[kind]), free)
    torch.manual_seed(3)
    assert torch.equal(sample(zero, generator=None, noise="philox", **NOISY[kind]), free)


@pytest.mark.parametrize("bad", [True, -1, 2**64, 1.5, "Philox"], ids=str)
def test_an_unknown_noise_is_refused(bad):
    assert error_line(sample, pipeline(), noise=bad).startswith(f"noise is {bad!r}; want ")


# Weights


def change_data(unet):
    for parameter in unet.parameters():
        parameter.data.copy_(parameter.data * 0.5)


def change_in_place(unet):
    with torch.no_grad():
        unet.conv_in.weight.mul_(0.5)


def load(unet):
    unet.load_state_dict({name: value * 0.5 for name, value in unet.state_dict().items()})


def train(unet):
    unet(torch.ones(1, *SHAPE), 5).sample.square().sum().backward()
    torch.optim.SGD(unet.parameters(), 0.1).step()
    unet.zero_grad()


def replace(unet):
    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.detach() * 2)


def change_by_numpy(unet):
    unet.conv_in.weight.detach().numpy()[:] *= 0.5


def convert_to_bfloat16(unet):
    unet.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [change_data, change_in_place, load, train, replace, change_by_numpy, convert_to_bfloat16]
)
def test_a_call_uses_the_current_weights(change):
    pipe, fresh = pipeline(), pipeline()
    before = sample(pipe)
    change(pipe.unet)
    after = sample(pipe)
    assert not torch.equal(before, after)
    change(fresh.unet)
    assert torch.equal(after, sample(fresh))
    convert_to_bfloat16(pipe.unet)
    convert_to_bfloat16(fresh.unet)
    pipe.unet.float()
    fresh.unet.float()
    assert torch.equal(sample(pipe), sample(fresh))


def test_a_replaced_network_is_used():
    pipe, other = pipeline(), tiny_unet()
    before = sample(pipe)
    change_in_place(other)
    pipe.unet = other
    assert not torch.equal(sample(pipe), before)
    pipe.register_modules(unet=tiny_unet())
    assert torch.equal(sample(pipe), before)


# Modes and threads


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_has_no_effect_on_this_or_later_calls(kind):
    outside = sample(pipeline(fast, kind))
    pipe = pipeline(fast, kind)
    with torch.inference_mode():
        inside = sample(pipe)
    assert torch.equal(inside, outside)
    assert torch.equal(sample(pipe), outside)
    assert not outside.requires_grad
    with torch.enable_grad():
        assert torch.equal(sample(pipe), outside)


def test_autocast_of_the_caller_applies(monkeypatch):
    drawn, randn = [], torch.randn
    n = 16
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(randn(*args, **kwargs)) or drawn[-1])
        with torch.autocast("cpu", torch.bfloat16):
            ours = sample(pipeline(), n)
            count = len(drawn)
            sample(pipeline(diffusers), n)
    assert all(torch.equal(one, other) for one, other in zip(drawn[:count], drawn[count:], strict=True))
    ref = images_of_noise(monkeypatch, drawn[:count], pipeline(diffusers), DOUBLE, n)
    with torch.autocast("cpu", torch.bfloat16):
        plain = images_of_noise(monkeypatch, drawn[:count], pipeline(diffusers), SINGLE, n)
    assert ours.dtype == plain.dtype == SINGLE
    ulp = torch.finfo(torch.bfloat16).eps
    assert (ours - ref).abs().max() > ulp / 64  # the network ran in bfloat16
    assert_as_accurate(ours, plain, ref)
    pipe = pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        sample(pipe)
    assert torch.equal(sample(pipe), sample(pipeline()))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_can_share_a_pipeline(kind):
    pipe = pipeline(fast, kind)
    calls = [lambda n=n: sample(pipe, n, generator=seeded(n), **NOISY[kind]) for n in (1, 2)]
    alone = [call() for call in calls]
    for results, want in zip(at_once(*calls), alone, strict=True):
        assert all(torch.equal(result, want) for result in results)


# DDIM only


def test_ddim_keeps_our_scheduler_and_converts_any_other():
    unet = tiny_unet()
    for scheduler in (fast.DDIMScheduler(noise=3), fast.DDIMParallelScheduler()):
        assert fast.DDIMPipeline(unet, scheduler).scheduler is scheduler
    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.9, "timestep_spacing": "trailing"}
    for scheduler in (
        fast.DDPMScheduler(**config),
        diffusers.DDPMScheduler(**config),
        diffusers.DDIMScheduler(**config),
    ):
        ours, theirs = (package.DDIMPipeline(unet, scheduler).scheduler for package in (fast, diffusers))
        assert type(ours) is fast.DDIMScheduler
        assert ours is not scheduler
        assert dict(ours.config) == dict(theirs.config)
        assert config.items() <= dict(ours.config).items()


def test_ddpm_turns_diffusers_scheduler_into_ours():
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    pipe = fast.DDPMPipeline(tiny_unet(diffusers), scheduler)
    assert pipe.scheduler is scheduler
    assert type(scheduler) is fast.DDPMScheduler
    assert type(pipe.unet) is diffusers.UNet2DModel


def test_an_eta_out_of_range_warns(caplog):
    assert torch.equal(*(sample(pipe, eta=-0.5) for pipe in hooked(*pipeline_pair("DDIM"))))

    def warned():
        return [record.levelname for record in caplog.records if record.name == "fastddpm.diffusers.pipelines"]

    assert warned() == ["WARNING"]
    sample(pipeline(fast, "DDIM"), eta=1.0)
    assert warned() == ["WARNING"]


def test_ddim_needs_one_generator_per_image():
    for package in (fast, diffusers):
        text = error_line(sample, pipeline(package, "DDIM"), 3, generator=[seeded(), seeded()])
        assert "list of" in text
        assert "2" in text
        assert "3" in text


@pytest.mark.parametrize("steps", [0, 1001, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_number_of_steps_fails_as_in_diffusers(kind, steps):
    results = []
    for pipe in pipeline_pair(kind):
        with pytest.raises((TypeError, ValueError, ZeroDivisionError)) as caught:
            sample(pipe, num_inference_steps=steps)
        results.append((type(caught.value), str(caught.value)))
    assert results[0] == results[1]
