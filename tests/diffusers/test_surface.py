"""What users find on the classes: diffusers' attributes and arguments, output types, callbacks, copies of pipelines."""

import copy
import inspect
import io
import pickle
import runpy
from pathlib import Path

import pytest
import torch

from tests.support.check import error_line

diffusers = pytest.importorskip("diffusers")

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

import fastddpm
from fastddpm import diffusers as fast
from tests.support.beside_diffusers import HALF, SINGLE
from tests.support.defaults import defaults
from tests.support.tiny_pipelines import (
    KINDS,
    STEPS,
    hooked,
    pipeline,
    pipeline_pair,
    sample,
    seeded,
    tiny_unet,
    without_progress,
)

CLASSES = [name for name in fast.__all__ if hasattr(diffusers, name)]


# The classes beside diffusers'


def methods(kind):
    """The functions of a class that a user may call."""
    members = inspect.getmembers(kind, callable)
    return {name: value for name, value in members if not name.startswith("_") or name in ("__init__", "__call__")}


def test_each_class_replaces_the_one_of_its_name():
    assert len(CLASSES) == 7
    assert {theirs.__name__: ours for theirs, ours in fast.disguise.OURS.items()} == {
        name: getattr(fast, name) for name in CLASSES
    }


def test_as_diffusers_replaces_them(monkeypatch):
    for name in CLASSES:
        monkeypatch.setattr(diffusers, name, getattr(diffusers, name))  # so that they are put back afterwards
    runpy.run_path(str(Path(__file__).parents[1] / "support" / "as_diffusers.py"))
    assert all(getattr(diffusers, name) is getattr(fast, name) for name in CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_everything_of_diffusers_is_there_with_the_same_arguments(name):
    ours, theirs = getattr(fast, name), getattr(diffusers, name)
    assert set(dir(theirs)) <= set(dir(ours))
    for method, function in methods(theirs).items():
        wanted = list(inspect.signature(function).parameters.values())
        got = list(inspect.signature(getattr(ours, method)).parameters.values())
        assert [(one.name, one.default, one.kind) for one in got[: len(wanted)]] == [
            (one.name, one.default, one.kind) for one in wanted
        ], method
        assert all(one.kind is one.KEYWORD_ONLY for one in got[len(wanted) :]), method


@pytest.mark.parametrize("kind", KINDS)
def test_an_instance_has_what_diffusers_has(kind):
    """Instances of diffusers set attributes in their constructors."""
    ours, theirs = pipeline_pair(kind)
    assert set(dir(theirs)) <= set(dir(ours))
    for name in ("device", "dtype", "name_or_path", "model_cpu_offload_seq", "_optional_components"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.components.keys() == theirs.components.keys()
    for part in ("unet", "scheduler"):
        assert set(dir(getattr(theirs, part))) <= set(dir(getattr(ours, part)))


# Latents as output


@pytest.mark.parametrize("dtype", [SINGLE, *HALF], ids=str)
@pytest.mark.parametrize("hook", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_latent_returns_the_state(kind, hook, dtype):
    pipe = pipeline(fast, kind, dtype, scheduler={"clip_sample": False})
    if hook:
        hooked(pipe)
    states = []
    latents = sample(pipe, output_type="latent", callback_on_step_end=lambda *seen: states.append(seen[3]["latents"]))
    assert (latents.shape, latents.dtype) == ((2, 3, 8, 8), dtype)
    assert latents.is_contiguous()
    assert latents.abs().max() > 1  # neither scaled nor clipped
    assert torch.equal(latents, states[-1].to(dtype))
    (as_tuple,) = sample_tuple(pipe, output_type="latent")
    assert torch.equal(as_tuple, latents)


def sample_tuple(pipe, **call):
    return pipe(2, generator=seeded(), num_inference_steps=STEPS, return_dict=False, **call)


def test_latents_can_be_passed_on():
    pipe = pipeline()
    start = torch.randn(2, 3, 8, 8, generator=seeded())
    kept = start.clone()
    latents = sample(pipe, latents=start, output_type="latent", noise=False)
    assert torch.equal(start, kept)
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), sample(pipe, latents=start, noise=False))
    assert sample(pipe, latents=latents, output_type="latent", noise=False).shape == latents.shape


# What a callback may read and do


@pytest.mark.parametrize("hook", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_reads_the_number_of_steps(kind, hook):
    pipe = pipeline(fast, kind)
    if hook:
        hooked(pipe)
    assert (pipe.num_timesteps, pipe.current_timestep, pipe.interrupt) == (0, None, False)
    seen = []

    def zero_at_the_end(pipe, i, t, tensors):
        seen.append((pipe.num_timesteps, int(pipe.current_timestep) == int(t), pipe.interrupt))
        if i == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = pipe._callback_tensor_inputs
    call = {"callback_on_step_end": zero_at_the_end, "callback_on_step_end_tensor_inputs": names}
    assert not sample(pipe, output_type="latent", **call).any()
    assert seen == [(STEPS, True, False)] * STEPS
    assert (pipe.num_timesteps, pipe.current_timestep) == (STEPS, None)


def test_num_timesteps_counts_those_of_the_schedule():
    pipe = pipeline(scheduler={"timestep_spacing": "trailing"})
    sample(pipe, num_inference_steps=61)
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps) == 62


@pytest.mark.parametrize("hook", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_can_interrupt(kind, hook):
    pipe = pipeline(fast, kind)
    if hook:
        hooked(pipe)
    states = []

    def stop(pipe, i, t, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = i == 1

    stopped = sample(pipe, output_type="latent", callback_on_step_end=stop)
    assert len(states) == 2
    assert torch.equal(stopped, states[1])
    assert pipe.interrupt
    assert not torch.equal(sample(pipe, output_type="latent"), stopped)  # the next call is not interrupted
    assert not pipe.interrupt


class Halving(PipelineCallback):
    tensor_inputs = ["model_output", "latents"]  # noqa: RUF012 (as diffusers' own)

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        assert list(callback_kwargs) == self.tensor_inputs
        callback_kwargs["latents"] = callback_kwargs["latents"] * 0.5
        return callback_kwargs


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_of_diffusers_name_their_own_tensors(kind):
    pipe = pipeline(fast, kind)
    by_hand = sample(pipe, callback_on_step_end=lambda *seen: {"latents": seen[3]["latents"] * 0.5})
    assert torch.equal(sample(pipe, callback_on_step_end=Halving()), by_hand)
    twice = MultiPipelineCallbacks([PlainHalving(), PlainHalving()])
    by_hand = sample(pipe, callback_on_step_end=lambda *seen: {"latents": seen[3]["latents"] * 0.25})
    assert torch.equal(sample(pipe, callback_on_step_end=twice), by_hand)
    text = error_line(sample, pipe, callback_on_step_end=diffusers.callbacks.SDCFGCutoffCallback())
    assert text.startswith("callback_on_step_end_tensor_inputs has prompt_embeds; want some of latents, ")


class PlainHalving(PipelineCallback):
    tensor_inputs = ["latents"]  # noqa: RUF012

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        return {"latents": callback_kwargs["latents"] * 0.5}


def test_a_callback_may_ask_for_no_tensors():
    for names in (None, (), []):
        seen = []
        call = {"callback_on_step_end_tensor_inputs": names}
        ours = sample(pipeline(), callback_on_step_end=lambda *given, seen=seen: seen.append(given[3]), **call)
        assert seen == [{}] * STEPS
        assert torch.equal(ours, sample(pipeline()))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"callback_on_step_end": 0}, "callback_on_step_end is 0; want a function of (pipeline, i, t, tensors)"),
        ({"callback_on_step_end": lambda *_: [1]}, "callback_on_step_end returned a list; want a dictionary or None"),
        (
            {"callback_on_step_end": lambda *_: {"latents": None}},
            "callback_on_step_end returned latents of a NoneType; want (2, 3, 8, 8)",
        ),
        ({"latents": [1]}, "latents are a list; want (2, 3, 8, 8), batch_size samples of the unet's shape"),
        ({"class_labels": "cat"}, "class_labels is 'cat'; want numbers, one label for each image"),
    ],
)
def test_wrong_values_are_named(call, text):
    assert error_line(sample, pipeline(), **call) == text


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, of NumPy
def test_a_tensor_that_the_scheduler_does_not_return_is_named():
    pipe = without_progress(fast.DDPMPipeline(tiny_unet(), diffusers.DPMSolverMultistepScheduler()))
    names = ["latents", "pred_original_sample"]
    text = error_line(sample, pipe, callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=names)
    assert text == (
        "callback_on_step_end_tensor_inputs has pred_original_sample, which a step of the DPMSolverMultistepScheduler "
        "does not return; leave it out"
    )


# Copies, and the process's defaults


def through_torch(pipe):
    torch.save(pipe, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def accelerated(kind):
    pipe = pipeline(diffusers, kind)
    fastddpm.accelerate(pipe)
    return pipe


@pytest.mark.parametrize("make", [lambda kind: pipeline(fast, kind), accelerated], ids=["ours", "accelerated"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda pipe: pickle.loads(pickle.dumps(pipe)), through_torch],
    ids=["deepcopy", "copy", "pickle", "torch"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_used_pipeline_samples_and_saves_the_same(kind, duplicate, make, tmp_path):
    pipe = make(kind)
    want = sample(pipe)
    twin = duplicate(pipe)
    assert [type(one) for one in (twin, twin.unet, twin.scheduler)] == [
        type(one) for one in (pipe, pipe.unet, pipe.scheduler)
    ]
    assert torch.equal(sample(twin), want)
    for name, one in {"pipe": pipe, "twin": twin}.items():
        one.save_pretrained(tmp_path / name)
    for path in (tmp_path / "pipe").rglob("*.json"):
        assert path.read_bytes() == (tmp_path / "twin" / path.relative_to(tmp_path / "pipe")).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_the_process_change_no_image(kind, dtype):
    options = {"class_embed_type": "identity"}
    calls = [{}, {"noise": 3}, {"noise": "philox"}, {"output_type": "latent"}]
    labels = [[0.1 * i for i in range(32)]] * 2
    pipe, hooks = pipeline(fast, kind, **options), hooked(pipeline(fast, kind, **options))[0]
    want = [sample(one, class_labels=labels, **call) for one in (pipe, hooks) for call in calls]
    with defaults(dtype, "meta"):
        for one in (pipe, hooks):  # tables and engines are made anew
            one.scheduler.alphas_cumprod = one.scheduler.alphas_cumprod.clone()
        got = [sample(one, class_labels=labels, **call) for one in (pipe, hooks) for call in calls]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
