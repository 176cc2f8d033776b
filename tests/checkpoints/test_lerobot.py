"""Diffusion policies of lerobot and diffusion_policy: networks and loops as lerobot computes them, and what is refused.

lerobot's states are [N, horizon, action]; EXPECTED has them channels-first, as a `UNet1D`.
"""

import argparse
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastddpm import Sampler, Schedule, checkpoints
from fastddpm.checkpoints.lerobot import DEFAULTS, SCHEDULE
from fastddpm.networks.unet1d import UNet1D
from fastddpm.train.initial import load_initial
from tests.support import check
from tests.support.recorded import replay

FIXTURE = Path(__file__).parents[1] / "data" / "lerobot-diffusion"
LAYOUTS = ("net_x", "net_out", "net_out64_emb64", "_xT", "_z", "_traj")
EXPECTED = {
    name: torch.from_numpy(value).mT.contiguous() if name.endswith(LAYOUTS) else torch.from_numpy(value)
    for name, value in np.load(FIXTURE / "expected.npz").items()
}
CONFIG = json.loads((FIXTURE / "config.json").read_text())
WEIGHTS = load_file(FIXTURE / "model.safetensors")
PREFIX = "diffusion.unet."
NORMALISED = "the samples are normalised actions (MIN_MAX: to -1 ... 1): unnormalise them with the policy's statistics"
ENCODER = "global_cond is what the policy's encoder returns for the observations"
STEPS = "the policy of {path} takes 20 steps of DDPM: pass steps=20 to draw as it does"


def written(folder: Path, extra: dict[str, Tensor] | None = None, **config: object) -> Path:
    """A policy of lerobot in a folder, with other options and more tensors. Returns the file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({**WEIGHTS, **(extra or {})}, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_diffusion_policy(prefix: str = "") -> dict[str, Tensor]:
    """The network with diffusion_policy's names."""
    state = {}
    for name, value in WEIGHTS.items():
        own = name.removeprefix(PREFIX)
        own = re.sub(r"\.conv([12])\.", lambda found: f".blocks.{int(found[1]) - 1}.", own)
        state[prefix + re.sub(r"^((?:down|up)_modules\.\d+\.2)\.", r"\1.conv.", own)] = value
    return state


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def sampler_of(found: checkpoints.Checkpoint) -> Sampler:
    return Sampler(found.network, found.schedule, shape=found.shape, device="cpu", precision="fp32")


# What lerobot computes


def test_network_matches_lerobot():
    net = checkpoints.load(FIXTURE).network
    for k, t in enumerate(EXPECTED["net_t"]):
        with torch.no_grad():
            got = net(EXPECTED["net_x"], t, EXPECTED["net_global_cond"])
        check.assert_as_accurate(got, EXPECTED["net_out"][k], EXPECTED["net_out64_emb64"][k])


def test_the_project_s_network_is_matched_in_float64():
    net = checkpoints.load(FIXTURE).network.double()
    for k, t in enumerate(EXPECTED["net_t"]):
        with torch.no_grad():
            got = net(EXPECTED["net_x"].double(), t, EXPECTED["net_global_cond"].double())
        want = EXPECTED["net_out64_emb64"][k]
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("ddpm20", {"steps": 20}),
        ("ddpm100", {}),
        ("ddim20", {"steps": 20, "sampler": "ddim"}),
        ("ddim10", {"steps": 10, "sampler": "ddim"}),
    ],
)
def test_the_project_s_loops_are_matched(prefix, options, monkeypatch):
    sampler = sampler_of(checkpoints.load(FIXTURE))
    condition = {"global_cond": EXPECTED["sample_global_cond"]}
    got, visited, states = replay(sampler, EXPECTED, prefix, monkeypatch, model_kwargs=condition, **options)
    assert visited == EXPECTED[f"{prefix}_t"].tolist()
    assert len(states) == len(visited) == len(EXPECTED[f"{prefix}_traj"])
    for state, want in zip([*states[1:], got], EXPECTED[f"{prefix}_traj"], strict=True):
        assert (state - want).abs().max() <= 1e-4


def test_another_schedule_fails_the_comparison():
    """So the comparison of loops would detect an option that was not read."""
    sampler = sampler_of(checkpoints.load(FIXTURE, beta_schedule="linear"))
    with pytest.MonkeyPatch.context() as patch:
        condition = {"global_cond": EXPECTED["sample_global_cond"]}
        got, _, _ = replay(sampler, EXPECTED, "ddim10", patch, model_kwargs=condition, steps=10, sampler="ddim")
    assert (got - EXPECTED["ddim10_traj"][-1]).abs().max() > 1e-2


# What is read


def test_network_schedule_and_shape_are_read():
    found = checkpoints.load(FIXTURE)
    assert (found.shape, found.config, found.parameters) == ((2, 16), {}, {})
    assert isinstance(found.network, UNet1D)
    assert not found.network.training
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, WEIGHTS[PREFIX + name])
    options = {"input_dim": 2, "global_cond_dim": 14, "diffusion_step_embed_dim": 32, "down_dims": (32, 64),
               "kernel_size": 5, "n_groups": 8, "cond_predict_scale": True, "sample_size": 16}  # fmt: skip
    assert {name: found.network.config[name] for name in options} == options
    assert found.schedule == Schedule(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    assert (found.schedule.alphas_cumprod - EXPECTED["alphas_cumprod"].double()).abs().max() <= 1e-6
    assert checkpoints.load(FIXTURE, format="lerobot").schedule == found.schedule
    assert checkpoints.load(FIXTURE / "model.safetensors").shape == (2, 16)


def test_options_of_the_schedule_are_read_from_the_configuration(tmp_path):
    options = {"num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.03,
               "prediction_type": "sample", "clip_sample": False, "clip_sample_range": 2.0}  # fmt: skip
    assert options.keys() == SCHEDULE.keys()
    assert checkpoints.load(written(tmp_path, **options)).schedule == Schedule(**options)
    assert checkpoints.load(FIXTURE, **options).schedule == Schedule(**options)
    schedule = Schedule(num_train_timesteps=7)
    found = checkpoints.load(tmp_path, schedule=schedule)
    assert found.schedule == schedule
    assert not any("steps" in note for note in found.notes)  # num_inference_steps is for the other schedule


def test_keywords_come_before_the_configuration(tmp_path):
    path = written(tmp_path, n_groups=4, horizon=32)
    assert checkpoints.load(path).network.config["n_groups"] == 4
    found = checkpoints.load(path, n_groups=16, horizon=8)
    assert (found.network.config["n_groups"], found.shape) == (16, (2, 8))


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("condition", [None, 5])
def test_every_kind_of_network_shows_in_its_weights(scales, condition, tmp_path):
    torch.manual_seed(0)
    options = {"input_dim": 3, "global_cond_dim": condition, "diffusion_step_embed_dim": 8, "down_dims": (8, 16, 24),
               "kernel_size": 3, "n_groups": 4, "cond_predict_scale": scales}  # fmt: skip
    net = UNet1D(**options)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    got = checkpoints.load(tmp_path, n_groups=4).network
    assert got.config == net.config
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in got.state_dict().items())


def test_weights_of_16_bits_become_float32(tmp_path):
    path = written(tmp_path)
    save_file({name: value.bfloat16() for name, value in WEIGHTS.items()}, path)
    net = checkpoints.load(path).network
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    assert torch.equal(net.final_conv[1].bias, WEIGHTS[f"{PREFIX}final_conv.1.bias"].bfloat16().float())


@pytest.mark.parametrize("inside", ["pretrained_model", "."])
def test_folders_of_training_are_found(inside, tmp_path):
    path = written(tmp_path / "last" / inside)
    (tmp_path / "last" / "training_state").mkdir()
    assert checkpoints.load(tmp_path / "last").shape == (2, 16)
    assert checkpoints.load(path.parent).shape == (2, 16)


def test_configuration_of_2024_is_read(tmp_path):
    config = {name: value for name, value in CONFIG.items() if name not in ("type", "output_features")}
    config |= {"output_shapes": {"action": [2]}, "output_normalization_modes": {"action": "min_max"}}
    del config["normalization_mapping"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(FIXTURE / "model.safetensors") | {"unnormalize_outputs.buffer_action.max": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors")
    found = checkpoints.load(tmp_path)
    assert found.shape == (2, 16)
    assert found.notes[0].endswith(NORMALISED)
    (tmp_path / "config.json").write_text(json.dumps(config | {"output_shapes": {"action": [3]}}))
    assert check.error_line(checkpoints.load, tmp_path).startswith("output_features.action.shape is [3], but ")


def test_a_sampler_is_made_of_a_folder():
    with pytest.warns(UserWarning, match="policy") as caught:
        sampler = Sampler.from_pretrained(FIXTURE, device="cpu", precision="fp32")
    assert [str(warning.message) for warning in caught] == list(checkpoints.load(FIXTURE).notes)
    condition = {"global_cond": EXPECTED["sample_global_cond"]}
    got = sampler.sample(2, steps=3, model_kwargs=condition, progress=False)
    assert got.shape == (2, 2, 16)
    assert got.isfinite().all()


# What is said


def test_encoder_and_statistics_are_noted(tmp_path):
    path = FIXTURE / "model.safetensors"
    assert checkpoints.load(FIXTURE).notes == (STEPS.format(path=path),)
    extra = {
        name: torch.ones(2)
        for name in ("diffusion.rgb_encoder.backbone.0.weight", "normalize_inputs.buffer_observation_state.min",
                     "normalize_targets.buffer_action.min", "unnormalize_outputs.buffer_action.max")
    }  # fmt: skip
    extra["diffusion.rgb_encoder.backbone.1.num_batches_tracked"] = torch.tensor(3)
    path = written(tmp_path, extra)
    (tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors").touch()
    (tmp_path / "policy_preprocessor.json").touch()
    statistics = (
        "normalize_inputs, normalize_targets, policy_preprocessor_step_3_normalizer_processor.safetensors, "
        "unnormalize_outputs"
    )
    parts = f"the policy's vision encoder (diffusion.rgb_encoder) and normalisation statistics ({statistics})"
    first, _ = checkpoints.load(tmp_path).notes
    assert (
        first == f"{path} also holds {parts}, which are not part of the network and not loaded; {ENCODER}; {NORMALISED}"
    )


def test_identity_normalisation_is_not_noted(tmp_path):
    extra = {"diffusion.rgb_encoder.weight": torch.ones(2)}
    for mode, noted in (("IDENTITY", ""), ("MEAN_STD", "(MEAN_STD: to mean 0 and standard deviation 1)")):
        written(tmp_path, extra, num_inference_steps=None, normalization_mapping={"ACTION": mode})
        (note,) = checkpoints.load(tmp_path).notes
        assert noted in note
        assert ("normalised" in note) == bool(noted)


@pytest.mark.parametrize(
    ("scheduler", "steps", "want"),
    [
        ("DDPM", None, None),
        ("DDPM", 100, None),
        ("DDPM", 20, "takes 20 steps of DDPM: pass steps=20 to draw as it does"),
        ("DDIM", 10, 'takes 10 steps of DDIM: pass steps=10, sampler="ddim" to draw as it does'),
        ("DDIM", None, 'takes 100 steps of DDIM: pass sampler="ddim" to draw as it does'),
    ],
)
def test_how_the_policy_samples_is_noted(scheduler, steps, want, tmp_path):
    path = written(tmp_path, noise_scheduler_type=scheduler, num_inference_steps=steps)
    notes = checkpoints.load(path).notes
    assert notes == (() if want is None else (f"the policy of {path} {want}",))


# diffusion_policy


@pytest.mark.parametrize("layout", ["ema_model", "flat", "network", "one level"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_state_dicts_of_diffusion_policy_are_read(layout, suffix, tmp_path):
    policy = {
        **as_diffusion_policy("model."),
        "normalizer.params_dict.action.scale": torch.ones(2),
        "obs_encoder.obs_nets.rgb.0.weight": torch.ones(2, 2),
        "mask_generator._dummy_variable": torch.ones(0),
    }
    last = {name: value + 1 for name, value in policy.items()}
    contents = {
        "ema_model": {"state_dicts": {"model": last, "ema_model": policy, "optimizer": {"state": {}}}},
        "flat": policy,
        "network": as_diffusion_policy(),
        "one level": {"model": last, "ema_model": policy},
    }
    content, path = contents[layout], tmp_path / f"latest{suffix}"
    if suffix != ".safetensors":
        torch.save(content, path)
    elif layout in ("flat", "network"):
        save_file(content, path)
    else:
        return  # safetensors has no dictionaries
    found = checkpoints.load(path)
    assert (found.shape, found.schedule) == (None, Schedule(**SCHEDULE))
    want = checkpoints.load(FIXTURE).network.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in found.network.state_dict().items())
    *others, assumed = found.notes
    assert "so the defaults of diffusion_policy were assumed: num_train_timesteps 100, beta_schedule squared" in assumed
    assert "n_groups 8; if the policy was trained otherwise, pass them by these names" in assumed
    parts = "vision encoder (obs_encoder) and normalisation statistics (normalizer)"
    assert len(others) == (layout != "network")
    assert all(f"also holds the policy's {parts}" in note for note in others)
    folder = checkpoints.load(tmp_path) if suffix != ".safetensors" else found
    assert folder.notes == found.notes


def test_options_of_diffusion_policy_are_keywords_or_beside_it(tmp_path):
    torch.save(as_diffusion_policy(), path := tmp_path / "model.pt")
    options = {**DEFAULTS, "num_train_timesteps": 50, "beta_schedule": "linear", "prediction_type": "sample"}
    schedule = Schedule(**{name: options[name] for name in SCHEDULE})
    found = checkpoints.load(path, **options, horizon=16)
    assert (found.schedule, found.shape, found.notes) == (schedule, (2, 16), ())
    (tmp_path / "config.json").write_text(json.dumps({**options, "horizon": 8, "num_epochs": 3}))
    found = checkpoints.load(path)
    assert (found.schedule, found.shape) == (schedule, (2, 8))
    assert found.notes == (f"entries beside {path} that are not options of a policy were ignored: num_epochs",)
    assert checkpoints.load(path, num_train_timesteps=20).schedule.num_train_timesteps == 20


def test_only_assumed_defaults_are_noted(tmp_path):
    torch.save(as_diffusion_policy(), path := tmp_path / "model.pt")
    (note,) = checkpoints.load(path, **SCHEDULE).notes
    assert "were assumed: n_groups 8; if" in note
    (note,) = checkpoints.load(path, schedule=Schedule()).notes
    assert "were assumed: n_groups 8; if" in note
    assert checkpoints.load(path, schedule=Schedule(), n_groups=8).notes == ()


def test_without_horizon_shape_is_required(tmp_path):
    torch.save(as_diffusion_policy(), path := tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check.error_line(Sampler.from_pretrained, path, device="cpu").startswith("shape is missing")
        sampler = Sampler.from_pretrained(path, shape=(2, 8), device="cpu", precision="fp32")
    condition = {"global_cond": torch.zeros(1, 14)}
    assert sampler.sample(1, steps=2, model_kwargs=condition, progress=False).shape == (1, 2, 8)


# The hub


def test_a_policy_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    written(tmp_path / "repo")
    (tmp_path / "repo" / "optimizer.safetensors").touch()
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(repo_id, *, allow_patterns):
        assert repo_id == "lerobot/diffusion_pusht"
        names = [path.name for path in (tmp_path / "repo").iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(tmp_path / "repo" / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = checkpoints.load("lerobot/diffusion_pusht", noise_scheduler_type="DDIM")
    assert sorted(path.name for path in cache.iterdir()) == ["config.json", "model.safetensors"]
    assert found.shape == (2, 16)
    assert 'pass steps=20, sampler="ddim"' in found.notes[0]
    line = check.error_line(checkpoints.load, "lerobot/diffusion_pusht", horizont=16)
    assert line.startswith("there is no argument 'horizont'")


# What is refused


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (
            {"down_dims": [32, 64, 128]},
            "down_dims is (32, 64, 128), but {path} holds a network with down_dims (32, 64)",
        ),
        ({"kernel_size": 3}, "kernel_size is 3, but {path} holds a network with kernel_size 5; correct the option"),
        ({"diffusion_step_embed_dim": 128}, "diffusion_step_embed_dim is 128, but {path} holds a network with"),
        ({"use_film_scale_modulation": False}, "use_film_scale_modulation is False, but {path} holds a network with"),
        (
            {"output_features": {"action": {"type": "ACTION", "shape": [7]}}},
            "output_features.action.shape is [7], but {path} holds a network with output_features.action.shape [2]",
        ),
        ({"n_groups": 5}, "{path}: UNet1D: n_groups is 5; want a divisor of each of down_dims (32, 64)"),
        ({"n_groups": "8"}, "{path}: UNet1D: n_groups is '8'; want a whole number"),
        ({"horizon": 15}, "horizon is 15; want a multiple of 2 for the 2 levels of {path}"),
        ({"horizon": "16"}, "horizon is '16'; want a whole number, at least 1"),
        ({"noise_scheduler_type": "PNDM"}, "noise_scheduler_type is 'PNDM'; want one of DDPM, DDIM"),
        ({"num_inference_steps": 101}, "num_inference_steps is 101; want a whole number from 1 to 100"),
        ({"num_train_timesteps": 0}, "{path}: num_train_timesteps is 0; want a whole number from 1"),
        ({"beta_schedule": "cosine"}, "{path}: beta_schedule is 'cosine'; want one of linear,"),
        ({"prediction_type": "velocity"}, "{path}: prediction_type is 'velocity'; want one of epsilon"),
        ({"clip_sample": "yes"}, "{path}: clip_sample is 'yes'; want True or False"),
        ({"type": "act"}, "{folder} holds a policy of lerobot of type 'act'; only 'diffusion' is supported"),
    ],
    ids=str,
)
def test_options_that_the_file_contradicts_are_errors(options, want, tmp_path):
    path = written(tmp_path, **options)
    text = check.error_line(checkpoints.load, tmp_path)
    assert text.startswith(want.format(path=path, folder=tmp_path))
    if not options.keys() & {"output_features", "type"}:
        assert check.error_line(checkpoints.load, FIXTURE, **options).startswith(want.format(path=FIXTURE / path.name))


FIRST_CONV = f"{PREFIX}down_modules.0.0.conv1.block.0.weight"


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (
            lambda state: without(state, f"{PREFIX}final_conv.1.bias"),
            "{path}: the parameters do not fit the network: 1 missing (final_conv.1.bias)",
        ),
        (
            lambda state: {**state, f"{PREFIX}down_modules.5.0.extra": torch.ones(2)},
            "{path}: the parameters do not fit the network: 1 unexpected (down_modules.5.0.extra)",
        ),
        (
            lambda state: {**state, f"{PREFIX}mid_modules.0.conv1.block.1.bias": torch.ones(2)},
            "{path}: the parameters do not fit the network: 1 of the wrong shape (mid_modules.0.conv1.block.1.bias",
        ),
        (
            lambda state: without(state, FIRST_CONV),
            "{path} does not hold the 1-D U-Net of a diffusion policy: it has no parameter 'down_modules.0.0.conv1",
        ),
        (
            lambda state: {**state, FIRST_CONV: torch.ones(2)},
            "{path} does not hold the 1-D U-Net of a diffusion policy: a parameter has an unexpected shape:",
        ),
        (
            lambda state: {**state, FIRST_CONV: torch.ones(())},
            "{path} does not hold the 1-D U-Net of a diffusion policy: a parameter has an unexpected shape:",
        ),
        (
            lambda state: {**state, FIRST_CONV: torch.ones(32, 2, 4)},
            "kernel_size is 5, but {path} holds a network with kernel_size 4",
        ),
        (
            lambda state: {**state, f"{PREFIX}local_cond_encoder.0.cond_encoder.1.weight": torch.ones(2)},
            "{path} holds a network with local conditioning (local_cond_encoder), which is not supported",
        ),
        (
            lambda state: {**state, f"{PREFIX}down_modules.0.0.blocks.0.block.0.weight": torch.ones(32, 2, 5)},
            "{path} holds the same parameters under the names of diffusion_policy and of lerobot (",
        ),
        (
            lambda state: {name: value.int() for name, value in state.items()},
            "{path} holds entries that are not dense floating-point tensors",
        ),
    ],
)
def test_other_networks_are_refused(change: Callable[[dict], dict], want, tmp_path):
    path = written(tmp_path)
    save_file(change(WEIGHTS), path)
    assert check.error_line(checkpoints.load, path).startswith(want.format(path=path))


def test_a_file_that_asks_for_more_memory_than_it_holds_is_refused(tmp_path):
    """A network of 40,000 channels has 26 GB or more."""
    torch.save(
        {
            "diffusion_step_encoder.1.weight": torch.ones(16, 4),
            "down_modules.0.0.conv1.block.0.weight": torch.ones(40_000, 2, 1),
            "down_modules.0.0.cond_encoder.1.weight": torch.ones(40_000, 4),
        },
        path := tmp_path / "model.pt",
    )
    text = check.error_line(checkpoints.load, path)
    assert text.startswith(f"{path}: the parameters do not fit the network: ")
    assert " missing (" in text


def test_pickles_of_objects_are_refused_with_the_way_out(tmp_path):
    content = {"cfg": argparse.Namespace(horizon=16), "state_dicts": {"ema_model": as_diffusion_policy("model.")}}
    torch.save(content, path := tmp_path / "latest.ckpt")
    text = check.error_line(checkpoints.load, path)
    assert text.startswith(f"{path} is damaged or holds more than weights, so it was not loaded (it refers to argparse")
    assert 'pickle_module=dill, weights_only=False)["state_dicts"]["ema_model"], "model.pt")' in text
    torch.save(content, path := tmp_path / "latest.pt")
    assert "dill" not in check.error_line(checkpoints.load, path)


@pytest.mark.parametrize(
    "name", ["normalization", "normalization_mapping", "normalizer", "unnormalize", "dataset_stats", "statistics"]
)
def test_normalisation_options_are_refused(name):
    text = check.error_line(checkpoints.load, FIXTURE, **{name: {"action": {"min": [-1.0, -1.0]}}})
    assert text.startswith(f"there is no option '{name}', because normalisation is not part of the network; normalise")
    assert check.error_line(checkpoints.load, "lerobot/diffusion_pusht", **{name: 1}) == text


def test_unknown_options_are_refused_with_the_known_ones(tmp_path):
    torch.save(as_diffusion_policy(), path := tmp_path / "model.pt")
    for place in (path, FIXTURE):
        text = check.error_line(checkpoints.load, place, num_diffusion_iters=100)
        assert text.startswith(
            "there is no option 'num_diffusion_iters'; the options of a diffusion policy are num_train_timesteps, beta"
        )
        assert "n_groups" in text


@pytest.mark.parametrize("format", ["diffusers", "guided-diffusion", "lucidrains", "diffusion_policy"])
def test_another_format_is_refused(format):
    text = check.error_line(checkpoints.load, FIXTURE, format=format)
    assert str(FIXTURE) in text or "UNet2D" in text


def test_folder_without_weights_is_refused(tmp_path):
    shutil.copy(FIXTURE / "config.json", tmp_path)
    text = check.error_line(checkpoints.load, tmp_path)
    assert text == f"{tmp_path} holds the configuration of a lerobot policy, but no model.safetensors; copy it there"


def test_a_variant_is_refused():
    assert "is one file; leave it out" in check.error_line(checkpoints.load, FIXTURE, variant="fp16")


def test_training_from_a_policy_is_refused(tmp_path):
    assert check.error_line(load_initial, FIXTURE, tmp_path).startswith(f"init is {FIXTURE}, whose network ")
