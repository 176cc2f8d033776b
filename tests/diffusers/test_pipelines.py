"""The pipelines beside diffusers' own: the same arguments and noise, the same images up to the network's rounding."""

import inspect

import numpy as np
import pytest
import torch

from tests.support.check import assert_as_accurate, error_line

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.tiny_pipelines import (
    DOUBLE,
    KINDS,
    LOW,
    SINGLE,
    STEPS,
    TENSORS,
    both,
    hooked,
    of_noise,
    pipeline,
    sample,
    seeded,
    taken,
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
    """All that torch.randn returns."""
    found, randn = [], torch.randn

    def recording(*args, **kwargs):
        found.append(randn(*args, **kwargs))
        return found[-1].clone()

    monkeypatch.setattr(torch, "randn", recording)
    return found


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
def test_the_first_parameters_are_those_of_diffusers(kind):
    ours, theirs = (
        list(inspect.signature(getattr(package, f"{kind}Pipeline").__call__).parameters.values())
        for package in (fast, diffusers)
    )
    assert [(one.name, one.default, one.kind) for one in ours[: len(theirs)]] == [
        (one.name, one.default, one.kind) for one in theirs
    ]
    assert all(one.kind is one.KEYWORD_ONLY for one in ours[len(theirs) :])


@pytest.mark.parametrize("dtype", [SINGLE, *LOW], ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("kind", "call"), CALLS, ids=IDS)
def test_the_noise_is_that_of_diffusers(kind, call, source, dtype, draws):
    found = []
    for pipe in both(kind, dtype):
        torch.manual_seed(5)
        generator = SOURCES[source]()
        draws.clear()
        sample(pipe, generator=generator, **call)
        found.append((taken(draws), states(generator)))
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) > 0
        assert_equal(ours, theirs)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("kind", "call"), CALLS, ids=IDS)
def test_images_of_diffusers_forward_are_its_bits(kind, call, source):
    found = []
    for pipe in hooked(*both(kind)):
        torch.manual_seed(5)
        found.append(sample(pipe, generator=SOURCES[source](), **call))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", SCHEDULERS)
def test_images_of_other_schedules_are_the_same_bits(options):
    assert torch.equal(*(sample(pipe) for pipe in hooked(*both(scheduler=SCHEDULERS[options]))))


@pytest.mark.parametrize("dtype", [SINGLE, *LOW], ids=str)
@pytest.mark.parametrize(("kind", "call"), CALLS, ids=IDS)
def test_images_are_as_accurate_as_those_of_diffusers(kind, call, dtype, draws, monkeypatch):
    n = 16  # the largest error of few is one of chance
    ours = sample(pipeline(fast, kind, dtype), n, **call)
    found = taken(draws)
    plain, ref = (
        of_noise(monkeypatch, found, pipeline(diffusers, kind, dtype), computed, n, **call)
        for computed in (dtype, DOUBLE)
    )
    assert ((ref > 0) & (ref < 1)).double().mean() > 0.2  # the others could not be wrong
    assert_as_accurate(ours, plain, ref)


def test_the_first_input_of_the_network_is_diffusers_noise(draws):
    seen = []
    pipe = pipeline()
    sample(
        pipe,
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=["latents", "model_output"],
    )
    (start,) = taken(draws)
    assert_as_accurate(
        seen[0]["model_output"],
        *(tiny_unet(diffusers, SINGLE).to(dtype)(start.to(dtype), 0).sample.detach() for dtype in (SINGLE, DOUBLE)),
    )


def test_a_network_of_a_learned_variance_is_left_to_diffusers():
    how = {"out_channels": 6, "scheduler": {"variance_type": "learned_range"}}
    ours, theirs = (sample(pipe) for pipe in both(**how))
    assert torch.equal(ours, theirs)


def test_dropout_of_a_network_in_training_is_that_of_diffusers():
    found = []
    for pipe in both(dropout=0.5):
        pipe.unet.train()
        torch.manual_seed(7)
        found.append((sample(pipe), torch.get_rng_state()))
        assert pipe.unet.training
    assert_equal(*found)
    assert not torch.equal(found[0][0], sample(pipeline(dropout=0.5)))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, of NumPy
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_of_another_kind_works_as_in_diffusers(name, draws, monkeypatch):
    def with_it(package):
        pipe = package.DDPMPipeline(tiny_unet(package), getattr(diffusers, name)())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    assert torch.equal(*(sample(pipe) for pipe in hooked(with_it(fast), with_it(diffusers))))
    draws.clear()
    n, pipe = 64, with_it(fast)
    ours, found = sample(pipe, n), taken(draws)
    plain, ref = (of_noise(monkeypatch, found, with_it(diffusers), dtype, n) for dtype in (SINGLE, DOUBLE))
    assert_as_accurate(ours, plain, ref)
    text = error_line(sample, pipe, noise=3)
    assert text.startswith(f"noise is 3, but the scheduler is a {name}, which draws its own; leave it out")


def test_a_scheduler_that_takes_no_generator_fails_as_in_diffusers():
    for package in (fast, diffusers):
        pipe = package.DDPMPipeline(tiny_unet(package), diffusers.PNDMScheduler())
        with pytest.raises(TypeError, match="generator"):
            sample(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_generators_fail_as_in_diffusers(kind):
    found = []
    for pipe in both(kind):
        with pytest.raises((IndexError, ValueError)) as caught:
            sample(pipe, 3, generator=[seeded(1), seeded(2)])
        found.append(type(caught.value))
    assert found[0] is found[1]


# What comes back


@pytest.mark.parametrize("size", [8, (8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, *LOW], ids=str)
@pytest.mark.parametrize("hook", [False, True], ids=["fused", "hooked"])
def test_output_types(dtype, size, hook):
    pipes = both(dtype=dtype, sample_size=size)
    if hook:
        hooked(*pipes)
    height, width = (size, size) if isinstance(size, int) else size
    for kind in ("pt", "np", None, "other", "pil"):
        served = TENSORS if kind == "pt" else dtype != torch.bfloat16  # by diffusers
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


def test_diffusers_cannot_do_bfloat16_but_as_tensors():
    """The difference above is one of diffusers."""
    for kind in ("np", "pil"):
        with pytest.raises(TypeError, match="BFloat16"):
            sample(pipeline(diffusers, dtype=torch.bfloat16), output_type=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_without_return_dict_a_tuple_comes_back(kind):
    ours, theirs = (pipe(num_inference_steps=1, return_dict=False) for pipe in both(kind))
    assert type(ours) is type(theirs) is tuple
    assert len(ours) == len(theirs) == 1
    assert type(pipeline(fast, kind)(num_inference_steps=1)) is diffusers.ImagePipelineOutput


@pytest.mark.parametrize("kind", KINDS)
def test_the_progress_bar(kind, capfd):
    pipe = pipeline(fast, kind)
    sample(pipe)
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    sample(pipe)
    out, err = capfd.readouterr()
    assert out == ""
    assert "drawing" in err
    assert f"{STEPS}/{STEPS}" in err


# More arguments


def test_latents_are_the_start():
    pipe, generator = pipeline(), seeded()
    start = torch.randn(2, 3, 8, 8, generator=generator)
    kept = start.clone()
    assert torch.equal(sample(pipe, latents=start, generator=generator), sample(pipe))
    assert torch.equal(start, kept)
    text = error_line(sample, pipe, 3, latents=start)
    assert text == "latents are (2, 3, 8, 8); want (3, 3, 8, 8): batch_size and the unet's samples"


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
    if kind == "timestep":  # whose embedding diffusers leaves in float32
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
def test_a_callback_sees_each_step_and_may_change_it(kind):
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
    for _, i, t, tensors in seen:  # the network's outputs, put together by diffusers
        step = twin.step(tensors["model_output"], t, x, generator=generator)
        assert torch.equal(tensors["latents"], step.prev_sample)
        assert torch.equal(tensors["pred_original_sample"], step.pred_original_sample)
        x = step.prev_sample * 0.5 if i == 1 else step.prev_sample
    assert torch.equal(images, (x / 2 + 0.5).clamp(0, 1))
    text = error_line(sample, pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "z"])
    assert text == (
        "callback_on_step_end_tensor_inputs has z; want some of latents, model_output, pred_original_sample"
    )


def test_latents_of_another_shape_from_a_callback_are_refused():
    pipe = pipeline()
    text = error_line(pipe, 2, num_inference_steps=2, callback_on_step_end=lambda *a: {"latents": torch.zeros(1)})
    assert text.startswith("callback_on_step_end returned latents of (1,); want (2, ")


def test_a_callback_can_change_and_flatten_the_state():
    def halve(pipe, i, t, tensors):
        for tensor in tensors.values():
            tensor.view(-1)
        tensors["latents"].mul_(0.5)

    pipe = pipeline()
    how = {"callback_on_step_end_tensor_inputs": ("latents", "model_output", "pred_original_sample")}
    changed = sample(pipe, callback_on_step_end=halve, **how)
    assert torch.equal(changed, sample(pipe, callback_on_step_end=lambda *a: {"latents": a[3]["latents"] * 0.5}))
    assert not torch.equal(changed, sample(pipe))
