"""Calls of a conditional network in an accelerated pipeline: one graph serves them, with the bits of diffusers."""

import copy
import gc
import inspect
import logging
import pickle
import threading
import weakref
from types import MethodType

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models.attention_processor import AttnProcessor2_0

from fastddpm.diffusers import accelerate
from fastddpm.diffusers.captured import capturing
from fastddpm.sampling.engine import KEPT
from tests.support.stable_diffusion import (
    conditional_unet,
    ddim,
    ddpm,
    stable_diffusion,
    stable_diffusion_xl,
    xl_embeddings,
)
from tests.support.tiny_pipelines import seeded

SCHEDULERS = {
    "DDPM": ddpm,
    "DDIM": ddim,
    "Euler": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="linspace", steps_offset=1),  # t = 499.5
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(steps_offset=1),
}
GUIDANCE = [1.0, 7.5]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "diffusers")


def images(pipe, prompts=("a cat", "a dog"), **options):
    generator = [seeded(i) for i in range(len(prompts))]
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": generator, **options}
    return pipe(list(prompts), **options).images


def pair(make):
    """A plain pipeline and an accelerated one with the same weights."""
    plain, fast = make(), make()
    accelerate(fast)
    return plain, fast


def normals(*shape, seed=1):
    return torch.randn(shape, generator=seeded(seed))


def assert_served(unet, twin, captured, *args, graphs=1, **kwargs):
    """In `capturing` three calls have the bits of the twin's; the last two of them by so many graphs."""
    before = len(captured)
    with torch.no_grad():
        expected = twin(*args, **kwargs)
        with capturing(unet):
            outputs = [unet(*args, **kwargs) for _ in range(3)]
    for output in outputs:
        assert type(output) is type(expected)
        assert torch.equal(output[0], expected[0])
    assert len(captured) - before == graphs
    assert len({output[0].data_ptr() for output in outputs}) == 3


# Pipelines


@pytest.mark.filterwarnings("ignore:__array")  # of numpy, about diffusers
@pytest.mark.parametrize("guidance_scale", GUIDANCE)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_graph_serves_all_steps_and_the_next_prompts(scheduler, guidance_scale, tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, SCHEDULERS[scheduler]()))
    for options in (
        {},
        {"prompts": ("a bird", "a bee")},
        {"negative_prompt": ["an owl", "fog"], "num_inference_steps": 4},
    ):
        expected = images(plain, guidance_scale=guidance_scale, **options)
        assert expected.std() > 0
        assert torch.equal(images(fast, guidance_scale=guidance_scale, **options), expected)
        assert len(captured) == 1


def test_image_to_image_and_inpainting(tmp_path, captured):
    start, mask = normals(2, 3, 8, 8).sigmoid(), (normals(2, 1, 8, 8, seed=2) > 0).float()
    for kind, channels, options in (
        (diffusers.StableDiffusionImg2ImgPipeline, 4, {"image": start, "strength": 0.9}),
        (diffusers.StableDiffusionInpaintPipeline, 9, {"image": start, "mask_image": mask, "height": 8, "width": 8}),
    ):
        plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim(), kind, in_channels=channels))  # noqa: B023
        options["num_inference_steps"] = 5
        assert torch.equal(images(fast, **options), images(plain, **options))
    assert len(captured) == 2


def test_stable_diffusion_xl(captured):
    plain, fast = pair(lambda: stable_diffusion_xl(ddim()))
    results = []
    for seed in (1, 2):
        options = {**xl_embeddings(seed), "num_inference_steps": 4, "output_type": "pt", "height": 8, "width": 8}
        first, second = (pipe(generator=seeded(), **options).images for pipe in (plain, fast))
        assert torch.equal(first, second)
        results.append(second)
    assert not torch.equal(*results)
    assert len(captured) == 1


def test_every_size_has_a_graph_of_its_own(tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    for prompts, size, graphs in ((("a", "b"), 8, 1), (("a", "b"), 16, 2), (("a",), 8, 3), (("c", "d"), 16, 3)):
        options = {"prompts": prompts, "height": size, "width": size}
        assert torch.equal(images(fast, **options), images(plain, **options))
        assert len(captured) == graphs


def test_a_callback_still_sees_and_changes_each_step(tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    seen = []

    def halve_guidance(pipe, i, t, tensors):
        seen.append(i)
        pipe._guidance_scale /= 2
        return {"latents": tensors["latents"] * 0.9}

    options = {"callback_on_step_end": halve_guidance, "guidance_rescale": 0.5, "eta": 0.3}
    assert torch.equal(images(fast, **options), images(plain, **options))
    assert seen == [0, 1, 2] * 2
    assert len(captured) == 1


def test_an_early_end_and_an_error_restore_the_network(tmp_path, captured):
    _, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))

    def fail(pipe, i, t, tensors):
        raise KeyError("fail")

    with pytest.raises(KeyError):
        images(fast, callback_on_step_end=fail)
    assert "forward" not in vars(fast.unet)


# Changes of the network


class LoRA(nn.Module):
    """Wraps a layer, as adapters do."""

    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scales = layer, {"default": scale}
        torch.manual_seed(7)
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x, *args):
        return self.layer(x) + self.scales["default"] * self.up(self.down(x))


class Processor(AttnProcessor2_0):
    """A user's attention processor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __call__(self, *args, **kwargs):
        return self.factor * super().__call__(*args, **kwargs)


def attention_of(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2


def in_place(unet):
    with torch.no_grad():
        unet.conv_in.weight.mul_(0.5)


def replaced(unet):
    unet.conv_in.weight = nn.Parameter(0.5 * unet.conv_in.weight.detach())


def loaded(unet):
    unet.load_state_dict({name: 0.9 * value for name, value in unet.state_dict().items()}, assign=True)


def adapter(unet):
    attention_of(unet).to_q = LoRA(attention_of(unet).to_q, 0.5)


CHANGES = {"in place": (in_place, 0), "replaced": (replaced, 1), "loaded": (loaded, 1), "adapter": (adapter, 1)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_noticed_by_the_next_call(change, tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    before = images(fast)
    change, graphs = CHANGES[change]
    for pipe in (plain, fast):
        change(pipe.unet)
    after = images(fast)
    assert torch.equal(after, images(plain))
    assert not torch.equal(after, before)
    assert len(captured) == 1 + graphs


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_a_callback_is_noticed(change, tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    change, graphs = CHANGES[change]
    options = {"num_inference_steps": 4}
    before = images(fast, **options)
    options["callback_on_step_end"] = lambda pipe, i, t, tensors: (i == 1 and change(pipe.unet)) or {}
    after = images(fast, **options)
    assert torch.equal(after, images(plain, **options))
    assert not torch.equal(after, before)
    assert len(captured) == 1 + graphs


def test_numbers_that_a_network_holds_are_noticed_by_the_next_call(tmp_path, captured):
    def change_scale(unet, factor):
        attention_of(unet).to_q.scales["default"] = factor

    def change_processor(unet, factor):
        attention_of(unet).set_processor(Processor(factor))

    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    for pipe in (plain, fast):
        adapter(pipe.unet)
    results = [images(fast)]
    for i, (change, factor) in enumerate([(change_scale, 2.0), (change_processor, 0.5), (change_processor, 0.25)], 2):
        for pipe in (plain, fast):
            change(pipe.unet, factor)
        results.append(images(fast))
        assert torch.equal(results[-1], images(plain))
        assert not torch.equal(*results[-2:])
        assert len(captured) == i


def test_another_network_is_captured_anew(tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    images(fast)
    for pipe in (plain, fast):
        pipe.unet = conditional_unet(norm_num_groups=2)
    assert torch.equal(images(fast), images(plain))
    assert len(captured) == 2


# Arguments

X, TEXT = normals(2, 4, 8, 8), normals(2, 5, 16, seed=2)
TIMESTEPS = {
    "int": 321,
    "float": 321.5,
    "0-d": torch.tensor(321),
    "0-d float": torch.tensor(321.5),
    "0-d of 16 bits": torch.tensor(321, dtype=torch.bfloat16),
    "one of each": torch.tensor([321, 4]),
    "one": torch.tensor([321]),
}


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_timesteps(timestep, captured):
    unet, twin = conditional_unet(), conditional_unet()
    assert_served(unet, twin, captured, X, TIMESTEPS[timestep], TEXT)
    assert_served(unet, twin, captured, X, TIMESTEPS[timestep] - 2, TEXT, graphs=0)


ARGUMENTS = {
    "tuple": ({}, {"return_dict": False}),
    "class labels": ({"num_class_embeds": 4}, {"class_labels": torch.tensor([1, 3])}),
    "guidance as a condition": ({"time_cond_proj_dim": 6}, {"timestep_cond": normals(2, 6)}),
    "mask": ({}, {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}),
    "image embeddings": (
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 6},
        {"added_cond_kwargs": {"image_embeds": normals(2, 6)}, "encoder_hidden_states": None},
    ),
    "residuals of a ControlNet": (
        {},
        {
            "down_block_additional_residuals": [
                normals(2, *shape) for shape in [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)]
            ],
            "mid_block_additional_residual": normals(2, 16, 4, 4),
        },
    ),
    "scale": ({}, {"cross_attention_kwargs": {"scale": 1.0}}),
    "another size": ({}, {"sample": normals(1, 4, 6, 10), "encoder_hidden_states": TEXT[:1]}),
    "expanded": ({}, {"encoder_hidden_states": TEXT[:1].expand(2, 5, 16)}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, captured):
    options, kwargs = ARGUMENTS[case]
    unet, twin = conditional_unet(**options), conditional_unet(**options)
    call = {"sample": X, "timestep": 5, "encoder_hidden_states": TEXT, **kwargs}
    assert_served(unet, twin, captured, **call)


def test_lists_of_residuals_are_not_used_up(captured):
    """diffusers takes them out of the caller's list, which a graph must not need."""
    unet, twin = conditional_unet(), conditional_unet()
    adapter_states = [normals(2, 8, 4, 4), normals(2, 16, 4, 4)]
    with torch.no_grad():
        for _ in range(3):
            with capturing(unet):
                ours, theirs = (
                    net(X, 5, TEXT, down_intrablock_additional_residuals=list(adapter_states)).sample
                    for net in (unet, twin)
                )
            assert torch.equal(ours, theirs)
    assert len(captured) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes(dtype, captured):
    unet, twin = (conditional_unet().to(dtype) for _ in range(2))
    assert_served(unet, twin, captured, X.to(dtype), 999, TEXT.to(dtype))  # 999 is no number of bfloat16


def test_autocast_is_part_of_the_graph(captured):
    unet, twin = conditional_unet(), conditional_unet()
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_served(unet, twin, captured, X, 5, TEXT)


def test_inference_mode(captured):
    unet, twin = conditional_unet(), conditional_unet()
    with torch.inference_mode():
        assert_served(unet, twin, captured, X + 0, 5, TEXT + 0)
    assert_served(unet, twin, captured, X, 6, TEXT, graphs=0)


def test_few_graphs_are_kept(captured):
    unet, twin = conditional_unet(), conditional_unet()
    for n in range(1, KEPT + 2):
        assert_served(unet, twin, captured, normals(n, 4, 8, 8), 5, normals(n, 5, 16))
    assert_served(unet, twin, captured, normals(3, 4, 8, 8), 5, normals(3, 5, 16), graphs=0)
    assert_served(unet, twin, captured, normals(1, 4, 8, 8), 5, normals(1, 5, 16), graphs=1)


def test_graphs_are_freed_with_their_network(captured):
    unet = conditional_unet()
    assert_served(unet, conditional_unet(), captured, X, 5, TEXT)
    captured.clear()
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None


# Calls that diffusers serves


def test_a_form_that_occurs_once_is_not_captured(captured):
    unet, twin = conditional_unet(), conditional_unet()
    with torch.no_grad(), capturing(unet):
        for scale in (1.0, 0.5, 0.25):
            given = {"cross_attention_kwargs": {"scale": scale}}
            assert torch.equal(unet(X, 5, TEXT, **given).sample, twin(X, 5, TEXT, **given).sample)
    assert captured == []


def test_gradients_objects_and_other_threads(captured):
    unet, twin = conditional_unet(), conditional_unet()
    with capturing(unet):
        for _ in range(3):
            x = X.clone().requires_grad_()
            unet(x, 5, TEXT).sample.sum().backward()
            assert x.grad is not None
    with torch.no_grad(), capturing(unet):
        for _ in range(3):
            given = {"added_cond_kwargs": {"unused": object()}}
            assert torch.equal(unet(X, 5, TEXT, **given).sample, twin(X, 5, TEXT, **given).sample)
    outputs = []

    def call():
        with torch.no_grad():
            outputs.extend(unet(X, 5, TEXT).sample for _ in range(3))

    with capturing(unet):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(output, twin(X, 5, TEXT).sample) for output in outputs)
    assert captured == []


def test_wrong_arguments_raise_the_errors_of_diffusers(captured):
    unet, twin = conditional_unet(), conditional_unet()
    for args in ((), (X,), (X, 5), (X, None, TEXT), (X, "5", TEXT), (X[0], 5, TEXT), (X, 5, TEXT[..., :3]), (X,) * 20):
        errors = []
        for net in (unet, twin):
            with capturing(net) if net is unet else torch.no_grad(), torch.no_grad():
                for _ in range(3):
                    with pytest.raises(Exception) as caught:  # noqa: PT011 (it is compared)
                        net(*args)
                    errors.append((type(caught.value), str(caught.value)))
        assert len(set(errors)) == 1
    assert captured == []


class Waiting(AttnProcessor2_0):
    """A user's attention processor that makes the host wait."""

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        return output if output.sum().item() else output + 1


def train_with_dropout(unet):
    unet.mid_block.resnets[0].dropout = nn.Dropout(0.1).train()


OBSTACLES = {
    "hook": (
        lambda unet: unet.conv_in.register_forward_hook(lambda module, args, output: 0.5 * output),
        "conv_in has hooks",
    ),
    "hook before": (
        lambda unet: unet.conv_in.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
        "conv_in has hooks",
    ),
    "forward": (
        lambda unet: setattr(
            unet.conv_in, "forward", MethodType(lambda self, x: 0.5 * type(self).forward(self, x), unet.conv_in)
        ),
        "conv_in has another forward, which was assigned to it",
    ),
    "own forward": (
        lambda unet: setattr(unet, "forward", MethodType(type(unet).forward, conditional_unet(norm_num_groups=2))),
        "it has another forward, which was assigned to it",
    ),
    "offload": (
        lambda unet: setattr(unet, "_hf_hook", None),
        "it is moved between devices in each run, as by enable_model_cpu_offload",
    ),
    "compiled": (lambda unet: unet.compile(backend="eager"), "it is compiled"),
    "compiled part": (lambda unet: unet.mid_block.compile(backend="eager"), "mid_block is compiled"),
    "dropout": (train_with_dropout, "mid_block.resnets.0.dropout is in training mode; call unet.eval()"),
    "waits": (lambda unet: attention_of(unet).set_processor(Waiting()), "cannot be captured"),
}


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in OBSTACLES if "compiled" in case]


@pytest.mark.parametrize("case", [*(case for case in OBSTACLES if "compiled" not in case), *SLOW])
def test_an_obstacle_is_logged_once_and_diffusers_forward_runs(case, tmp_path, captured, caplog):
    change, reason = OBSTACLES[case]
    plain, fast = (stable_diffusion(tmp_path, ddim()) for _ in range(2))
    for pipe in (plain, fast):
        change(pipe.unet)
    report = accelerate(fast)
    if case != "waits":  # which is not known before the network is called
        assert report.left["unet"] == reason
    caplog.clear()
    caplog.set_level(logging.WARNING, "fastddpm")
    for _ in range(2):
        results = []
        for pipe in (plain, fast):
            torch.manual_seed(5)  # of dropout
            results.append(images(pipe))
        assert torch.equal(*results)
    assert captured == []
    (record,) = (record for record in caplog.records if record.name.startswith("fastddpm"))
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("calls of this UNet2DConditionModel run as they are, without a CUDA graph: ")
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()


def test_an_obstacle_can_be_removed(captured):
    unet, twin = conditional_unet(), conditional_unet()
    handle = unet.conv_in.register_forward_hook(lambda *args: None)
    assert_served(unet, twin, captured, X, 5, TEXT, graphs=0)
    handle.remove()
    unet.forward = MethodType(type(unet).forward, unet)  # as accelerate leaves it behind when it removes a hook
    assert_served(unet, twin, captured, X, 5, TEXT)


def test_hooks_of_the_network_itself_run_in_each_call(captured):
    unet, twin = conditional_unet(), conditional_unet()
    seen = []
    unet.register_forward_hook(lambda *args: seen.append(1))
    assert_served(unet, twin, captured, X, 5, TEXT)
    assert len(seen) == 3


def test_the_signature_stays():
    unet = conditional_unet()
    before = inspect.signature(unet.forward)
    with capturing(unet):
        assert inspect.signature(unet.forward) == before


def test_contexts_can_be_nested(captured):
    unet, twin = conditional_unet(), conditional_unet()
    with capturing(unet):
        assert_served(unet, twin, captured, X, 5, TEXT)
        assert_served(unet, twin, captured, X, 6, TEXT, graphs=0)
    assert "forward" not in vars(unet)


# The pipeline stays an ordinary one


def test_nothing_is_captured_on_a_cpu(tmp_path, graphs):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    assert torch.equal(images(fast), images(plain))
    assert graphs == []


def test_the_report_says_what_a_gpu_does(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "device", torch.device("cuda"))
    pipe = stable_diffusion(tmp_path, ddim())
    loop = "StableDiffusionPipeline, whose loop replays the network as a CUDA graph on a GPU"
    network = "calls of the UNet2DConditionModel are replays of a CUDA graph"
    scheduler = "diffusers' DDIMScheduler is now fastddpm's"
    assert accelerate(pipe).replaced == {"scheduler": scheduler, "pipeline": loop, "unet": network}


def test_an_accelerated_pipeline_can_be_saved_copied_and_converted(tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    expected = images(plain)
    assert torch.equal(images(fast), expected)
    assert type(fast.unet) is diffusers.UNet2DConditionModel
    assert isinstance(fast, diffusers.StableDiffusionPipeline)
    for pipe, name in ((plain, "plain"), (fast, "fast")):
        pipe.save_pretrained(tmp_path / name)
    before, after = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "plain", tmp_path / "fast")
    )
    assert before == after
    loaded = type(fast).from_pretrained(tmp_path / "fast", safety_checker=None)
    for made in (loaded, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        made.set_progress_bar_config(disable=True)
        assert torch.equal(images(made), expected)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(fast)
    assert other.unet is fast.unet
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline


def test_the_network_can_still_be_trained(tmp_path, captured):
    plain, fast = pair(lambda: stable_diffusion(tmp_path, ddim()))
    images(fast)
    for pipe in (plain, fast):
        optimizer = torch.optim.SGD(pipe.unet.parameters(), 1e-2)
        pipe.unet(X, 5, TEXT).sample.square().mean().backward()
        optimizer.step()
    assert torch.equal(images(fast), images(plain))
    assert len(captured) == 1
