"""The pipelines beside diffusers' own: the same arguments, noise and images, up to the rounding of the network."""

import inspect

import numpy as np
import pytest
import torch

from tests.support.check import assert_as_accurate, error_line

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import DOUBLE, HALF, SINGLE
from tests.support.tiny_pipelines import (
    KINDS,
    STEPS,
    SUPPORTS_PT,
    hooked,
    images_of_noise,
    pipeline,
    pipeline_pair,
    sample,
    seeded,
    take_all,
    tiny_unet,
)

SOURCES = {"one": seeded, "list": lambda: [seeded(1), seeded(2)], "global": lambda: None}
CALLS = [("DDPM", {}), ("DDIM", {}), ("DDIM", {"eta": 0.5, "use_clipped_model_output": True})]
IDS = ["DDPM", "DDIM", "DDIM-noisy"]
SCHEDULERS = {
    "fixed_large": {"variance_type": "fixed_large"},
    "cosine v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "trailing": {"timestep_spacing": "trailing"},
    "offset": {"steps_offset": 1},
    "thresholding": {"thresholding": True},
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "linspace", "prediction_type": "v_prediction"},
}


@pytest.fixture
def draws(monkeypatch):
    """A list of everything that torch.randn returns."""
    drawn, randn = [], torch.randn

    def recording(*args, **kwargs):
        drawn.append(randn(*args, **kwargs))
        return drawn[-1].clone()

    monkeypatch.setattr(torch, "randn", recording)
    return drawn


def states(generators):
    several = generators if isinstance(generators, list) else [generators]
    return [torch.get_rng_state() if one is None else one.get_state() for one in several]


def assert_equal(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


# The same noise, and the same images


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_parameters_equal_diffusers(kind):
    ours, theirs = (
        list(inspect.signature(getattr(package, f"{kind}Pipeline").__call__).parameters.values())
        for package in (fast, diffusers)
    )
    assert [(one.name, one.default, one.kind) for one in ours[: len(theirs)]] == [
        (one.name, one.default, one.kind) for one in theirs
    ]
    assert all(one.kind is one.KEYWORD_ONLY for one in ours[len(theirs) :])


@pytest.mark.parametrize("dtype", [SINGLE, *HALF], ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("kind", "call"), CALLS, ids=IDS)
def test_the_noise_equals_diffusers(kind, call, source, dtype, draws):
    results = []
    for pipe in pipeline_pair(kind, dtype):
        torch.manual_seed(5)
        generator = SOURCES[source]()
        draws.clear()
        sample(pipe, generator=generator, **call)
        results.append((take_all(draws), states(generator)))
    for ours, theirs in zip(*results, strict=True):
        assert len(ours) > 0
        assert_equal(ours, theirs)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("kind", "call"), CALLS, ids=IDS)
def test_images_by_diffusers_forward_have_its_bits(kind, call, source):
    results = []
    for pipe in hooked(*pipeline_pair(kind)):
        torch.manual_seed(5)
        results.append(sample(pipe, generator=SOURCES[source](), **call))
    assert torch.equal(*results)


@pytest.mark.parametrize("options", SCHEDULERS)
def test_images_of_other_schedules_have_the_same_bits(options):
    assert torch.equal(*(sample(pipe) for pipe in hooked(*pipeline_pair(scheduler=SCHEDULERS[options]))))


@pytest.mark.parametrize("dtype", [SINGLE, *HALF], ids=str)
@pytest.mark.parametrize(("kind", "call"), CALLS, ids=IDS)
def test_images_are_as_accurate(kind, call, dtype, draws, monkeypatch):
    n = 64  # the largest error of a few images is too random
    ours = sample(pipeline(fast, kind, dtype), n, **call)
    drawn = take_all(draws)
    plain, ref = (
        images_of_noise(monkeypatch, drawn, pipeline(diffusers, kind, dtype), computed, n, **call)
        for computed in (dtype, DOUBLE)
    )
    assert ((ref > 0) & (ref < 1)).double().mean() > 0.2  # clamped pixels would hide errors
    assert_as_accurate(ours, plain, ref)


def test_the_network_starts_from_diffusers_noise(draws):
    seen = []
    pipe = pipeline()
    sample(
        pipe,
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=["latents", "model_output"],
    )
    (start,) = take_all(draws)
    assert_as_accurate(
        seen[0]["model_output"],
        *(tiny_unet(diffusers, SINGLE).to(dtype)(start.to(dtype), 0).sample.detach() for dtype in (SINGLE, DOUBLE)),
    )


def test_a_learned_variance_runs_diffusers_forward():
    options = {"out_channels": 6, "scheduler": {"variance_type": "learned_range"}}
    ours, theirs = (sample(pipe) for pipe in pipeline_pair(**options))
    assert torch.equal(ours, theirs)


def test_dropout_in_training_mode_equals_diffusers():
    results = []
    for pipe in pipeline_pair(dropout=0.5):
        pipe.unet.train()
        torch.manual_seed(7)
        results.append((sample(pipe), torch.get_rng_state()))
        assert pipe.unet.training
    assert_equal(*results)
    assert not torch.equal(results[0][0], sample(pipeline(dropout=0.5)))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, of NumPy
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_of_another_kind_acts_as_in_diffusers(name, draws, monkeypatch):
    def pipeline_of(package):
        pipe = package.DDPMPipeline(tiny_unet(package), getattr(diffusers, name)())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    assert torch.equal(*(sample(pipe) for pipe in hooked(pipeline_of(fast), pipeline_of(diffusers))))
    draws.clear()
    n, pipe = 64, pipeline_of(fast)
    ours, drawn = sample(pipe, n), take_all(draws)
    plain, ref = (images_of_noise(monkeypatch, drawn, pipeline_of(diffusers), dtype, n) for dtype in (SINGLE, DOUBLE))
    assert_as_accurate(ours, plain, ref)
    text = error_line(sample, pipe, noise=3)
    assert text.startswith(f"noise is 3, but the scheduler is a {name}, which draws its own; leave it out")


def test_a_scheduler_without_a_generator_fails_as_in_diffusers():
    for package in (fast, diffusers):
        pipe = package.DDPMPipeline(tiny_unet(package), diffusers.PNDMScheduler())
        with pytest.raises(TypeError, match="generator"):
            sample(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_generators_fail_as_in_diffusers(kind):
    results = []
    for pipe in pipeline_pair(kind):
        with pytest.raises((IndexError, ValueError)) as caught:
            sample(pipe, 3, generator=[seeded(1), seeded(2)])
        results.append(type(caught.value))
    assert results[0] is results[1]


# Outputs


@pytest.mark.parametrize("size", [8, (8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, *HALF], ids=str)
@pytest.mark.parametrize("hook", [False, True], ids=["fused", "hooked"])
def test_output_types(dtype, size, hook):
    pipes = pipeline_pair(dtype=dtype, sample_size=size)
    if hook:
        hooked(*pipes)
    height, width = (size, size) if isinstance(size, int) else size
    for kind in ("pt", "np", None, "other", "pil"):
        served = SUPPORTS_PT if kind == "pt" else dtype != torch.bfloat16  # by diffusers
        ours, theirs = (
            None if pipe is pipes[1] and not served else sample(pipe, output_type=kind, num_inference_steps=2)
            for pipe in pipes
        )
        if kind == "pil":
            assert isinstance(ours, list)
            assert [(image.size, image.mode) for image in ours] == [((width, height), "RGB")] * 2
            arrays = np.stack([np.asarray(image) for image in ours])
            exact = sample(pipes[0], output_type="np", num_inference_steps=2).astype(np.float64) * 255
            assert np.abs(arrays - exact).max() <= 0.5 + 255 * torch.finfo(dtype).eps
            assert theirs is None or [image.size for image in theirs] == [image.size for image in ours]
        elif kind == "pt":
            assert (ours.shape, ours.dtype, ours.device.type) == ((2, 3, height, width), dtype, "cpu")
            assert ours.is_contiguous()
            assert theirs is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        else:
            assert ours.shape == (2, height, width, 3)
            assert ours.dtype == (np.float32 if theirs is None else theirs.dtype)
        if kind != "pil":
            assert 0 <= ours.min() < ours.max() <= 1


def test_diffusers_supports_bfloat16_only_as_tensors():
    """So the test above cannot compare these outputs."""
    for kind in ("np", "pil"):
        with pytest.raises(TypeError, match="BFloat16"):
            sample(pipeline(diffusers, dtype=torch.bfloat16), output_type=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_return_dict_false_returns_a_tuple(kind):
    ours, theirs = (pipe(num_inference_steps=1, return_dict=False) for pipe in pipeline_pair(kind))
    assert type(ours) is type(theirs) is tuple
    assert len(ours) == len(theirs) == 1
    assert type(pipeline(fast, kind)(num_inference_steps=1)) is diffusers.ImagePipelineOutput


@pytest.mark.parametrize("kind", KINDS)
def test_the_progress_bar_follows_its_config(kind, capfd):
    pipe = pipeline(fast, kind)
    capfd.readouterr()  # once a model was loaded, diffusers warns of each conversion
    sample(pipe)
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    sample(pipe)
    out, err = capfd.readouterr()
    assert out == ""
    assert "drawing" in err
    assert f"{STEPS}/{STEPS}" in err


# Arguments that diffusers does not have


def test_latents_are_the_starting_state():
    pipe, generator = pipeline(), seeded()
    start = torch.randn(2, 3, 8, 8, generator=generator)
    kept = start.clone()
    assert torch.equal(sample(pipe, latents=start, generator=generator), sample(pipe))
    assert torch.equal(start, kept)
    text = error_line(sample, pipe, 3, latents=start)
    assert text == "latents are (2, 3, 8, 8); want (3, 3, 8, 8), batch_size samples of the unet's shape"


LABELS = {
    "table": ({"num_class_embeds": 5}, [3, 1]),
    "timestep": ({"class_embed_type": "timestep"}, [30, 1]),
    "identity": ({"class_embed_type": "identity"}, torch.linspace(-1, 1, 64).view(2, 32)),
}


@pytest.mark.parametrize("hook", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize("kind", LABELS)
def test_class_labels(kind, hook):
    options, labels = LABELS[kind]
    pipe = pipeline(**options)
    if hook:
        hooked(pipe)
    seen = []
    ours = sample(
        pipe,
        class_labels=labels,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append((t, tensors)),
        callback_on_step_end_tensor_inputs=["latents", "model_output"],
    )
    networks = [tiny_unet(diffusers, dtype, **options).requires_grad_(False) for dtype in (SINGLE, DOUBLE)]
    if kind == "timestep":  # diffusers leaves its embedding in float32
        networks[1].class_embedding.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    for t, tensors in seen:
        plain, ref = (network(x.to(network.dtype), t, torch.as_tensor(labels)).sample for network in networks)
        if hook:
            assert torch.equal(tensors["model_output"], plain)
        assert_as_accurate(tensors["model_output"], plain, ref)
        x = tensors["latents"]
    assert not torch.equal(ours, sample(pipe, class_labels=torch.as_tensor(labels).flip(0)))
    assert torch.equal(ours, sample(pipe, class_labels=torch.as_tensor(labels)))
    with pytest.raises(ValueError, match="class_labels"):
        sample(pipe)
    with pytest.raises(ValueError, match="class"):
        sample(pipeline(), class_labels=[3, 1])
    with pytest.raises((ValueError, RuntimeError), match=r"3|4"):  # one too few
        sample(pipe, 3, class_labels=labels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_sees_and_can_change_each_step(kind):
    pipe = pipeline(fast, kind)
    seen = []

    def callback(*args):
        seen.append(args)
        return {"latents": args[3]["latents"] * 0.5} if args[1] == 1 else None

    names = ["latents", "model_output", "pred_original_sample"]
    images = sample(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [(one[0] is pipe, one[1], int(one[2])) for one in seen] == [(True, i, 750 - 250 * i) for i in range(STEPS)]
    assert all(list(one[3]) == names for one in seen)

    twin, x, generator = getattr(diffusers, f"{kind}Scheduler")(), torch.randn(2, 3, 8, 8, generator=seeded()), seeded()
    torch.randn(2, 3, 8, 8, generator=generator)
    twin.set_timesteps(STEPS)
    for _, i, t, tensors in seen:  # diffusers' steps from the same model outputs
        step = twin.step(tensors["model_output"], t, x, generator=generator)
        assert torch.equal(tensors["latents"], step.prev_sample)
        assert torch.equal(tensors["pred_original_sample"], step.pred_original_sample)
        x = step.prev_sample * 0.5 if i == 1 else step.prev_sample
    assert torch.equal(images, (x / 2 + 0.5).clamp(0, 1))
    text = error_line(sample, pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "z"])
    assert text == (
        "callback_on_step_end_tensor_inputs has z; want some of latents, model_output, pred_original_sample"
    )


def test_a_callback_cannot_change_the_shape_of_the_latents():
    pipe = pipeline()
    text = error_line(pipe, 2, num_inference_steps=2, callback_on_step_end=lambda *a: {"latents": torch.zeros(1)})
    assert text.startswith("callback_on_step_end returned latents of (1,); want (2, ")


def test_a_callback_can_modify_the_state_in_place():
    def halve(pipe, i, t, tensors):
        for tensor in tensors.values():
            tensor.view(-1)
        tensors["latents"].mul_(0.5)

    pipe = pipeline()
    names = ("latents", "model_output", "pred_original_sample")
    changed = sample(pipe, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(changed, sample(pipe, callback_on_step_end=lambda *a: {"latents": a[3]["latents"] * 0.5}))
    assert not torch.equal(changed, sample(pipe))
