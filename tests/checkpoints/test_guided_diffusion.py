"""Checkpoints of guided-diffusion and improved-diffusion: networks, flags and loops, as the projects compute them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm import Sampler, UNet2D, checkpoints
from fastddpm.checkpoints.flags import DEFAULTS
from fastddpm.networks.planned import fastest_forward
from fastddpm.reference.unet import UNet
from fastddpm.train.initial import load_initial
from tests.support import check
from tests.support.recorded import replay
from tests.support.unet_model import UNetModel

FIXTURE = Path(__file__).parents[1] / "data" / "guided-diffusion-cond-updown"
EXPECTED = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "expected.npz").items()}
SIZE = 8

# flags of the scripts; of image_size 8, attention is at 8 / resolution
FLAGS = {
    "defaults": {},
    "updown": {"resblock_updown": True, "use_scale_shift_norm": True, "num_head_channels": 16},
    "updown, attention everywhere": {"resblock_updown": True, "attention_resolutions": "8,4,2"},
    "updown, no attention": {"resblock_updown": True, "attention_resolutions": "1"},
    "no attention": {"attention_resolutions": "1"},
    "new order": {"use_new_attention_order": True, "num_heads": 4},
    "heads": {"num_heads": 4},
    "heads up": {"num_heads": 2, "num_heads_upsample": 4, "attention_resolutions": "8,4"},
    "channels of a head": {"num_head_channels": 8, "attention_resolutions": "8,4,2", "num_heads": 3},
    "two levels, one width": {"channel_mult": "1,1", "num_heads": 2},
    "one level": {"channel_mult": "1", "attention_resolutions": "8"},
    "one level of attention only in the middle": {"channel_mult": "2", "attention_resolutions": "4"},
    "three levels": {"channel_mult": "1,2,3", "num_res_blocks": 2, "attention_resolutions": "4,2", "num_heads": 2},
    "narrow first": {"num_channels": 64, "channel_mult": "0.5,1,2", "attention_resolutions": "2"},
    "wide first": {"channel_mult": "2,3", "num_heads": 2},
    "classes": {"class_cond": True, "NUM_CLASSES": 7},
    "classes, learned sigma": {"class_cond": True, "learn_sigma": True, "use_scale_shift_norm": True},
    "learned sigma": {"learn_sigma": True},
    "scale and shift": {"use_scale_shift_norm": True, "dropout": 0.1},
    "no convolution": {"conv_resample": False, "channel_mult": "1,2,2", "num_res_blocks": 2},
    "no convolution, attention": {"conv_resample": False, "attention_resolutions": "8,4,2", "num_heads": 2},
    "three blocks": {"num_res_blocks": 3, "resblock_updown": True},
}
TINY = {"image_size": SIZE, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4", "num_heads": 1,
        "channel_mult": "1,2", "use_scale_shift_norm": False}  # fmt: skip


def model(**flags) -> UNetModel:
    """A network of the project's kind, in which no parameter is 0 or 1."""
    f = {**DEFAULTS["guided-diffusion"], **TINY, **flags}
    torch.manual_seed(0)
    net = UNetModel(
        model_channels=f["num_channels"],
        out_channels=6 if f["learn_sigma"] else 3,
        num_res_blocks=f["num_res_blocks"],
        attention={SIZE // int(side) for side in f["attention_resolutions"].split(",")},
        channel_mult=[float(factor) for factor in f["channel_mult"].split(",")],
        num_classes=(f["NUM_CLASSES"] or 1000) if f["class_cond"] else None,
        **{name: f[name] for name in ("dropout", "conv_resample", "num_heads", "num_head_channels",
                                      "num_heads_upsample", "use_scale_shift_norm", "resblock_updown",
                                      "use_new_attention_order")},
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


def written(path: Path, net: nn.Module, flags: dict | None = None) -> Path:
    torch.save(net.state_dict(), path)
    if flags is not None:
        path.with_suffix(".json").write_text(json.dumps(flags))
    return path


@pytest.mark.parametrize("option", FLAGS)
def test_networks_are_as_accurate_as_the_original(option, tmp_path):
    flags = {**TINY, **FLAGS[option]}
    net = model(**FLAGS[option])
    found = checkpoints.load(written(tmp_path / "ema_0.9999_010000.pt", net, flags))
    assert found.notes == ()
    x, t, y = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 977]), torch.tensor([1, 6])
    labels = y if flags.get("class_cond") else None
    plain = net(x, t, y)
    want = net.double()(x.double(), t, y)
    reference = UNet(**found.config).double().eval()
    reference.load_state_dict(found.parameters)
    assert (reference(x.double(), t, labels) - want).abs().max() <= 1e-12 * want.abs().max()
    ours = UNet2D(**found.config).eval()
    checkpoints.load_into(ours, found.parameters)
    fast = ours.for_inference(torch.float32)
    check.assert_as_accurate(fastest_forward(fast)(x, fast.time_rows(t, labels)), plain, want)
    assert found.shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("option", ["updown", "new order", "heads up", "channels of a head", "three levels"])
def test_a_wrong_order_or_number_of_heads_fails(option, tmp_path):
    """What the file does not show decides the output: so the comparison above would detect it."""
    net, flags = model(**FLAGS[option]), {**TINY, **FLAGS[option]}
    path = written(tmp_path / "model.pt", net, flags)
    x, t = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64), torch.tensor([3, 977])
    heads = "num_head_channels" if "num_head_channels" in FLAGS[option] else "num_heads"
    wrong = [{heads: 32}] if heads == "num_head_channels" else [{heads: 8, "num_heads_upsample": 8}]
    if flags.get("num_heads", 1) > 1 or heads == "num_head_channels":
        wrong.append({"use_new_attention_order": not flags.get("use_new_attention_order", False)})
    for change in wrong:
        found = checkpoints.load(path, **change)
        reference = UNet(**found.config).double()
        reference.load_state_dict(found.parameters)
        want = net.double()(x, t)
        assert (reference(x, t) - want).abs().max() > 1e-6 * want.abs().max()


LOOPS = {
    "ddpm25": {"steps": 25},
    "ddim10": {"timesteps": range(900, -1, -100), "sampler": "ddim"},
    "ddim10eta": {"timesteps": range(900, -1, -100), "sampler": "ddim", "eta": 0.5},
}


def test_the_project_s_network_is_matched():
    found = checkpoints.load(FIXTURE)
    assert checkpoints.load(FIXTURE / "8x8_diffusion.pt").config == found.config
    ours = UNet2D(**found.config).eval()
    checkpoints.load_into(ours, found.parameters)
    fast, y = ours.for_inference(torch.float32), EXPECTED["net_y"]
    for k, t in enumerate(EXPECTED["net_t"]):
        got = fastest_forward(fast)(EXPECTED["net_x"], fast.time_rows(t, y))
        check.assert_as_accurate(got, EXPECTED["net_out"][k], EXPECTED["net_out64_emb64"][k])


@pytest.mark.parametrize("prefix", LOOPS)
def test_the_project_s_loops_are_matched(prefix, monkeypatch):
    sampler = Sampler.from_pretrained(FIXTURE, device="cpu", precision="fp32")
    labels = EXPECTED["sample_y"]
    got, visited, states = replay(sampler, EXPECTED, prefix, monkeypatch, class_labels=labels, **LOOPS[prefix])
    assert visited == EXPECTED[f"{prefix}_t"].tolist()
    want = EXPECTED[f"{prefix}_traj"]
    for state, before in zip(states[1:], want[:-1], strict=True):
        assert (state - before).abs().max() <= 1e-4
    assert (got - EXPECTED[f"{prefix}_x0"]).abs().max() <= 1e-4
    assert torch.equal(want[-1], EXPECTED[f"{prefix}_x0"])


def test_the_wrong_eps_fails(monkeypatch):
    """DDIM with the network's eps, though x_0 is clipped: what diffusers does by default."""
    schedule = replace(checkpoints.load(FIXTURE).schedule, use_clipped_model_output=False)
    sampler = Sampler.from_pretrained(FIXTURE, schedule=schedule, device="cpu", precision="fp32")
    labels = EXPECTED["sample_y"]
    got, _, _ = replay(sampler, EXPECTED, "ddim10", monkeypatch, class_labels=labels, **LOOPS["ddim10"])
    assert (got - EXPECTED["ddim10_x0"]).abs().max() > 1e-3


# Schedules


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({}, {"variance_type": "fixed_large", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ({"sigma_small": True}, {"variance_type": "fixed_small"}),
        ({"learn_sigma": True, "sigma_small": True}, {"variance_type": "learned_range"}),
        ({"noise_schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}),
        ({"predict_xstart": True}, {"prediction_type": "sample"}),
        ({"diffusion_steps": 4000}, {"num_train_timesteps": 4000, "beta_start": 0.1 / 4000, "beta_end": 20 / 4000}),
        ({"timestep_respacing": "250"}, {"timestep_spacing": "linspace"}),
        ({"timestep_respacing": "ddim50"}, {"timestep_spacing": "leading"}),
    ],
)
def test_flags_decide_the_schedule(flags, want, tmp_path):
    net = model(learn_sigma=flags.get("learn_sigma", False))
    schedule = checkpoints.load(written(tmp_path / "model.pt", net, {**TINY, **flags})).schedule
    for name, value in want.items():
        got = getattr(schedule, name)
        assert got == (pytest.approx(value) if isinstance(value, float) else value)
    assert schedule.clip_sample
    assert schedule.use_clipped_model_output


@pytest.mark.parametrize("steps", [1, 7, 25, 50, 250, 333])
def test_respacing_visits_the_timesteps_of_the_scripts(steps, tmp_path):
    """space_timesteps: the first, the last, and others as evenly as rounding allows."""
    schedule = checkpoints.load(written(tmp_path / "model.pt", model(), TINY)).schedule
    stride = 999 / (steps - 1) if steps > 1 else 1
    assert schedule.timesteps(steps).tolist() == [round(i * stride) for i in range(steps)]


def test_improved_diffusion_rescales_its_timesteps(tmp_path):
    flags = {**TINY, "diffusion_steps": 4000, "noise_schedule": "cosine"}
    path = written(tmp_path / "model.pt", model(), flags)
    assert checkpoints.load(path, format="improved-diffusion").timestep_scale == 0.25
    assert checkpoints.load(path, format="guided-diffusion").timestep_scale is None
    assert checkpoints.load(path, format="guided-diffusion", rescale_timesteps=True).timestep_scale == 0.25
    assert checkpoints.load(path, format="improved-diffusion", rescale_timesteps=False).timestep_scale is None
    assert checkpoints.load(path, format="improved-diffusion", diffusion_steps=1000).timestep_scale is None


def test_training_cannot_continue_from_scaled_timesteps(tmp_path):
    path = written(tmp_path / "model.pt", model(), {**TINY, "diffusion_steps": 500, "rescale_timesteps": True})
    assert "whose network is given t times 2" in check.error_line(load_initial, path, tmp_path / "out")


def test_the_network_of_improved_diffusion_is_given_scaled_timesteps(tmp_path):
    net, flags = model(), {**TINY, "diffusion_steps": 4000, "noise_schedule": "cosine"}
    path = written(tmp_path / "model.pt", net, flags)
    sampler = Sampler.from_pretrained(path, format="improved-diffusion", device="cpu", precision="fp32")
    seen = {}
    sampler.sample(
        2, timesteps=[3999, 1402], sampler="ddim", progress=False,
        callback=lambda step, t, x_0, indices, x_t: seen.update(x_0=x_0, x_t=x_t),
    )  # fmt: skip
    abar = sampler.schedule.alphas_cumprod[1402]

    def x_0_of(t):
        eps = net.double()(seen["x_t"].double(), torch.tensor([t, t]))
        return ((seen["x_t"] - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)

    assert (seen["x_0"] - x_0_of(350.5)).abs().max() <= 1e-5
    assert (seen["x_0"] - x_0_of(1402.0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"sigma_small": False}, 0.25),
        ({"project": "openai/improved-diffusion"}, 0.25),
        ({"sigma_small": True, "use_fp16": False}, None),
        ({"resblock_updown": False}, None),
        ({"rescale_timesteps": True}, 0.25),
    ],
)
def test_the_project_is_recognised_by_its_flags(options, scale, tmp_path):
    flags = {**{k: v for k, v in TINY.items() if k != "channel_mult"}, "diffusion_steps": 4000, **options}
    assert checkpoints.load(written(tmp_path / "model.pt", model(), flags)).timestep_scale == scale


def test_a_scale_that_depends_on_the_project_is_not_guessed(tmp_path):
    flags = {**{k: v for k, v in TINY.items() if k != "channel_mult"}, "diffusion_steps": 4000}
    path = written(tmp_path / "model.pt", model(), flags)
    assert check.error_line(checkpoints.load, path).startswith(
        "diffusion_steps is 4000, for which the network of guided"
    )
    assert checkpoints.load(path, format="improved-diffusion").timestep_scale == 0.25
    assert checkpoints.load(path, format="guided-diffusion").timestep_scale is None


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_super_resolution_is_told_by_its_flags(learn_sigma, tmp_path):
    out = 6 if learn_sigma else 3
    net = UNetModel(in_channels=6, out_channels=out, num_heads=1)
    flags = {"large_size": SIZE, "small_size": 4, "num_channels": 32, "num_res_blocks": 1, "num_heads": 1,
             "attention_resolutions": "4", "use_scale_shift_norm": False}  # fmt: skip
    found = checkpoints.load(written(tmp_path / "model.pt", net, flags))
    assert found.shape == (3, SIZE, SIZE)
    assert found.schedule.learns_variance == learn_sigma
    image = written(tmp_path / "image.pt", model(), {**TINY, "small_size": 4})
    assert check.error_line(checkpoints.load, image).startswith("large_size or small_size is given, but")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: [state.pop(k) for k in [*state] if k.startswith("output_blocks")],
            "does not hold the UNetModel",
        ),
        (
            lambda state: state.update({"middle_block.1.qkv.bias": torch.tensor(1.0)}),
            "is a number; want rows of queries",
        ),
        (lambda state: state.update({"first_stage_model.decoder.conv_in.weight": torch.ones(1)}), "a latent diffusion"),
    ],
)
def test_damaged_and_other_states_are_refused(change, message, tmp_path):
    state = model().state_dict()
    change(state)
    torch.save(state, tmp_path / "model.pt")
    assert message in check.error_line(checkpoints.load, tmp_path / "model.pt", **TINY)


def test_respacing_in_sections_is_warned_of(tmp_path):
    path = written(tmp_path / "model.pt", model(), {**TINY, "timestep_respacing": "10,5"})
    assert checkpoints.load(path).notes == (
        f"{path}: timestep_respacing 10,5 is not kept; list the timesteps when you sample",
    )


@pytest.mark.parametrize("steps", [0, 10])
def test_too_few_steps_are_refused(steps, tmp_path):
    path = written(tmp_path / "model.pt", model(), TINY)
    line = check.error_line(checkpoints.load, path, diffusion_steps=steps, rescale_timesteps=False)
    assert line == f"diffusion_steps is {steps}; want at least 1, and more than 20 for the linear noise_schedule"


# Files


def test_the_parameters_may_be_wrapped(tmp_path):
    net = model()
    state = net.state_dict()
    want = checkpoints.load(written(tmp_path / "model.pt", net, TINY)).parameters
    other = {name: value + 1 for name, value in state.items()}
    for content in (
        {"state_dict": state, "step": 7},
        {"model": other, "ema": state},
        {f"module.{name}": value for name, value in state.items()},
        {name: nn.Parameter(value) for name, value in state.items()},
    ):
        for zipped in (True, False):  # the format since torch 1.6, and that before
            torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
            found = checkpoints.load(tmp_path / "model.pt")
            assert found.parameters.keys() == want.keys()
            assert all(torch.equal(value, want[name]) for name, value in found.parameters.items())
            assert not any(value.requires_grad for value in found.parameters.values())


def test_flags_come_from_keywords_or_from_a_file_beside(tmp_path):
    net = model(num_heads=4)
    path = written(tmp_path / "model010000.pt", net)
    given = checkpoints.load(path, **{**TINY, "num_heads": 4})
    for place, content in (
        ("config.json", {"flags": {**TINY, "num_heads": "4"}}),
        ("config.json", {**TINY, "num_heads": 4, "batch_size": 16, "classifier_scale": 1.0}),
        ("model010000.json", {**TINY, "num_heads": 4}),
    ):
        (tmp_path / place).write_text(json.dumps(content))
        found = checkpoints.load(path)
        assert (found.config, found.schedule, found.notes) == (given.config, given.schedule, ())
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_heads": 2}))  # model010000.json comes first
    assert checkpoints.load(path).config == given.config
    assert checkpoints.load(path, num_heads=8).config["attention_head_dim"] == 8


def test_what_was_assumed_is_said(tmp_path):
    path = written(tmp_path / "64x64_diffusion.pt", model())
    (note,) = checkpoints.load(path).notes
    assert "the defaults of guided-diffusion were assumed (image_size 64, num_heads 4" in note
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_haeds": 4}))
    (note,) = checkpoints.load(path).notes
    assert note.startswith(
        f"{tmp_path / 'config.json'} has entries that are not flags of guided-diffusion and were ignored: 'n"
    )


def test_a_folder_of_checkpoints_gives_the_last_average(tmp_path):
    for step in (10000, 9000):
        for name in (f"model{step:06}.pt", f"ema_0.9999_{step:06}.pt", f"opt{step:06}.pt"):
            torch.save({"step": step}, tmp_path / name)
    written(tmp_path / "ema_0.9999_010000.pt", model())
    written(tmp_path / "ema_0.999_010000.pt", model(seed=2))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (note,) = checkpoints.load(tmp_path).notes
    assert "of which ema_0.9999_010000.pt was read" in note


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({"num_channels": 64}, "num_channels is 64, but {path} holds a network with num_channels 32; correct the flag"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2, but {path} holds a network with num_res_blocks 1"),
        ({"class_cond": True}, "class_cond is True, but {path} holds a network with class_cond False"),
        ({"learn_sigma": True}, "learn_sigma is True, but {path} holds a network with learn_sigma False"),
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm is True, but"),
        ({"resblock_updown": True}, "resblock_updown is True, but"),
        ({"conv_resample": False}, "conv_resample is False, but"),
        ({"channel_mult": "1,2,2"}, "channel_mult is 1,2,2, but {path} holds a network with channel_mult 1,2;"),
        ({"channel_mult": ""}, "channel_mult is empty, and image_size 8 has no default"),
        ({"channel_mult": "", "image_size": 64}, "channel_mult is 1,2,3,4, but"),
        ({"attention_resolutions": "8,4"}, "attention_resolutions is 8,4 at image_size 8, but {path} holds a network"),
        ({"image_size": 7}, "image_size is 7; want a multiple of 2"),
        ({"num_heads": 3}, "num_heads is 3; want a divisor of the attentions' widths"),
        ({"num_heads_upsample": 3}, "num_heads_upsample is 3; want a divisor"),
        ({"num_head_channels": 24}, "num_head_channels is 24; want a divisor"),
        ({"num_heads": "many"}, "a flag: num_heads is 'many'; want a number"),
        ({"class_cond": "maybe"}, "a flag: class_cond is 'maybe'; want true or false"),
        ({"noise_schedule": "sqrt"}, "noise_schedule is 'sqrt'; want one of linear, cosine"),
        ({"num_haeds": 3}, "there is no flag 'num_haeds'; did you mean num_heads?"),
    ],
    ids=str,
)
def test_a_flag_that_the_file_contradicts_is_an_error(flags, want, tmp_path):
    path = written(tmp_path / "model.pt", model(), TINY)
    assert check.error_line(checkpoints.load, path, **flags).startswith(want.format(path=path))


def test_the_number_of_classes_is_that_of_the_file(tmp_path):
    path = written(tmp_path / "model.pt", model(class_cond=True, NUM_CLASSES=7), TINY)
    assert checkpoints.load(path).config["num_class_embeds"] == 7
    text = check.error_line(checkpoints.load, path, NUM_CLASSES=1000)
    assert text.startswith(f"NUM_CLASSES is 1000, but {path} holds a network with NUM_CLASSES 7")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(2)}, path)
    text = check.error_line(checkpoints.load, path)
    assert text.startswith(
        f"{path} is not a checkpoint of a known format: it has no input_blocks.0.0.weight (guided-di"
    )
    assert "lucidrains" in text
    torch.save(nn.Linear(2, 2), path)  # a module, whose pickle needs code
    assert "holds more than weights, so it was not loaded (it refers to" in check.error_line(checkpoints.load, path)
    net = model()
    for damage in (lambda state: state.pop("out.2.weight"), lambda state: state.update(extra=torch.ones(1))):
        state = net.state_dict()
        damage(state)
        torch.save(state, path)
        assert str(path) in check.error_line(checkpoints.load, path, **TINY)
    torch.save({name: value.int() for name, value in net.state_dict().items()}, path)
    assert "holds entries that are not dense floating-point tensors" in check.error_line(checkpoints.load, path)
    assert check.error_line(checkpoints.load, path, format="ddpm").startswith(
        "format is 'ddpm'; want one of auto, diff"
    )


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a/\x1b[2Jb", "\ud800/x", "a\n/b"])
def test_odd_names_are_shown_short_and_printable(name):
    line = check.error_line(checkpoints.load, f"{name}.pt")
    assert line.startswith("there is no file ")
    assert line.isprintable()
    assert len(line) < 500


@pytest.mark.parametrize("damage", [
    lambda state: state.update({"time_embed.0.weight": torch.ones(())}),
    lambda state: state.update({"out.2.weight": torch.ones(())}),
    lambda state: state.update({"input_blocks.1.0.emb_layers.1.weight": torch.ones(5, 5)}),
    lambda state: state.update({"middle_block.1.qkv.weight": torch.ones(7, 64, 1)}),
    lambda state: state.update({"output_blocks.999.0.in_layers.0.weight": torch.ones(3)}),
    lambda state: state.pop("input_blocks.1.0.out_layers.0.weight"),
    lambda state: state.pop("output_blocks.1.0.in_layers.0.weight"),
])  # fmt: skip
def test_damaged_states_are_refused_in_one_line(damage, tmp_path):
    state = model().state_dict()
    damage(state)
    torch.save(state, tmp_path / "model.pt")
    assert check.error_line(Sampler.from_pretrained, tmp_path / "model.pt", **TINY)


@pytest.mark.parametrize("content", [{"flags": [1]}, {"flags": {"num_heads": [4]}}, [1], {"num_heads": 1e400}], ids=str)
def test_damaged_options_are_refused_in_one_line(content, tmp_path):
    path = written(tmp_path / "model.pt", model())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert check.error_line(checkpoints.load, path)


def test_super_resolution_networks_take_more_channels_than_they_return(tmp_path):
    """As guided-diffusion's SuperResModel: the enlarged image follows x_t's channels."""
    torch.manual_seed(0)
    net = UNetModel(in_channels=6, out_channels=6, num_heads=1).eval().requires_grad_(False)
    flags = {"large_size": SIZE, "small_size": 4, "num_channels": 32, "num_res_blocks": 1, "num_heads": 1,
             "attention_resolutions": "4", "use_scale_shift_norm": False, "learn_sigma": True}  # fmt: skip
    sampler = Sampler.from_pretrained(written(tmp_path / "model.pt", net, flags), device="cpu", precision="fp32")
    assert sampler.shape == (3, SIZE, SIZE)
    assert sampler.schedule.variance_type == "learned_range"
    x, t = torch.randn(2, 6, SIZE, SIZE), torch.tensor([3, 977])
    assert (sampler.model(x, t) - net(x, t)).abs().max() <= 1e-4
    assert sampler.sample(2, steps=2, concat=torch.zeros(2, 3, SIZE, SIZE), progress=False).shape == (2, 3, SIZE, SIZE)


def test_a_folder_without_checkpoint_says_what_was_looked_for(tmp_path):
    text = check.error_line(checkpoints.load, tmp_path)
    assert text.startswith(f"{tmp_path} is not a DDPM checkpoint: it has no unet/config.json and no config.json")
    assert text.endswith(
        "no .pt file of guided-diffusion, improved-diffusion, denoising-diffusion-pytorch or diffusion_policy"
    )


def test_sampler_loads_a_file(tmp_path):
    path = written(tmp_path / "model.pt", model(), TINY)
    sampler = Sampler.from_pretrained(path, device="cpu", num_heads=2)
    assert sampler.shape == (3, SIZE, SIZE)
    assert sampler.sample(1, steps=2, progress=False).isfinite().all()
