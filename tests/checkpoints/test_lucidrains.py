"""Checkpoints of lucidrains' denoising-diffusion-pytorch. The package itself may not be installed: a stand-in is."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddpm import Sampler, checkpoints
from fastddpm.checkpoints.lucidrains import named_betas
from fastddpm.train.initial import load_initial
from tests.support import check
from tests.support.recorded import replay

FIXTURE = Path(__file__).parents[1] / "data" / "lucidrains-ddpm-2d"
EXPECTED = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "expected.npz").items()}
WEIGHTS = torch.load(FIXTURE / "model-1.pt", weights_only=True)


class StandIn(nn.Module):
    """A network with the parameters of the package's Unet, which keeps the options that it was built with."""

    def __init__(self, **options):
        super().__init__()
        self.options, prefix = options, "ema_model.model."
        for name, value in WEIGHTS["ema"].items():
            if name.startswith(prefix):
                *path, leaf = name.removeprefix(prefix).split(".")
                module = self
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module._modules[part]
                module.register_parameter(leaf, nn.Parameter(torch.zeros_like(value)))

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return 0.1 * x * self.final_conv.bias.view(-1, 1, 1)


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("denoising_diffusion_pytorch")
    module.Unet = StandIn
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", module)


def written(folder: Path, content: dict | None = None, **sections) -> Path:
    """A checkpoint in a folder of its own, with the fixture's configuration changed in some sections."""
    config = json.loads((FIXTURE / "config.json").read_text())
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(values, dict) else values
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(WEIGHTS if content is None else content, folder / "model-1.pt")
    return folder / "model-1.pt"


# With the package itself


@pytest.fixture(scope="module")
def sampler():
    pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)
    return Sampler.from_pretrained(FIXTURE, device="cpu")


def test_the_project_s_network_is_matched(sampler):
    for k, t in enumerate(EXPECTED["net_t"]):
        with torch.no_grad():
            got = sampler.model(EXPECTED["net_x"], t)
        check.assert_as_accurate(got, EXPECTED["net_out"][k], EXPECTED["net_out64_emb64"][k])


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("ddpm100", {}),
        ("ddim10", {"steps": 10, "sampler": "ddim"}),
        ("ddim10eta", {"steps": 10, "sampler": "ddim", "eta": 0.5}),
    ],
)
def test_the_project_s_loops_are_matched(sampler, prefix, options, monkeypatch):
    got, visited, states = replay(sampler, EXPECTED, prefix, monkeypatch, **options)
    assert visited == EXPECTED[f"{prefix}_t"].tolist()
    kept = EXPECTED.get(f"{prefix}_traj_index", torch.arange(len(visited))).tolist()
    after = [*states[1:], got]
    for index, want in zip(kept, EXPECTED[f"{prefix}_traj"], strict=True):
        assert (after[index] - want).abs().max() <= 1e-4
    assert (got - EXPECTED[f"{prefix}_x0"]).abs().max() <= 1e-4
    assert ((got + 1) / 2 - EXPECTED[f"{prefix}_sample01"]).abs().max() <= 1e-4


# With a stand-in for the package


def test_the_averaged_weights_and_all_options_are_read(package):
    found = checkpoints.load(FIXTURE)
    assert (found.notes, found.shape, found.config, found.parameters) == ((), (3, 8, 8), {}, {})
    assert not found.network.training
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, WEIGHTS["ema"][f"ema_model.model.{name}"])
    options = found.network.options
    assert {name: options[name] for name in ("dim", "init_dim", "dim_mults", "channels")} == {
        "dim": 8, "init_dim": 8, "dim_mults": (1, 2), "channels": 3
    }  # fmt: skip
    assert (options["full_attn"], options["attn_heads"], options["attn_dim_head"]) == ((False, True), (4, 4), (32, 32))


def test_the_schedule_is_that_of_the_package(package):
    schedule = checkpoints.load(FIXTURE).schedule
    assert (schedule.num_train_timesteps, schedule.prediction_type) == (100, "v_prediction")
    assert (schedule.variance_type, schedule.clip_sample, schedule.use_clipped_model_output) == (
        "fixed_small", True, True
    )  # fmt: skip
    assert torch.equal(schedule.betas.float(), WEIGHTS["ema"]["ema_model.betas"])
    assert torch.equal(schedule.alphas_cumprod.float(), WEIGHTS["ema"]["ema_model.alphas_cumprod"])
    assert schedule.timesteps(10).flip(0).tolist() == EXPECTED["ddim10_t"].tolist()


def state_of(name: str, objective: str, steps: int = 50, gamma: float | None = None, **options) -> dict:
    """The content of a file with another schedule."""
    betas = named_betas(name, steps, **options)
    abar = (1 - betas).cumprod(0)
    snr = abar / (1 - abar)
    weight = snr if gamma is None else snr.clamp(max=gamma)
    weight = weight / {"pred_noise": snr, "pred_x0": 1, "pred_v": snr + 1}[objective]
    buffers = {"ema_model.betas": betas.float(), "ema_model.loss_weight": weight.float()}
    return {**WEIGHTS, "ema": {**WEIGHTS["ema"], **buffers}}


@pytest.mark.parametrize("gamma", [None, 5])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_schedule_and_objective_show_in_the_file(name, objective, gamma, package, tmp_path):
    content = state_of(name, objective, gamma=gamma)
    path = tmp_path / "model-1.pt"
    torch.save(content, path)
    found = checkpoints.load(path)
    predicts = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}[objective]
    assert (found.schedule.prediction_type, found.shape, found.notes) == (predicts, None, ())
    assert torch.equal(found.schedule.betas, named_betas(name, 50))
    clipped = {"min_snr_loss_weight": gamma is not None}
    again = checkpoints.load(path, timesteps=50, beta_schedule=name, objective=objective, image_size=(8, 16), **clipped)
    assert (again.schedule, again.shape) == (found.schedule, (3, 8, 16))
    other = "pred_x0" if objective != "pred_x0" else "pred_v"
    text = check.error_line(checkpoints.load, path, objective=other, **clipped)
    assert text.startswith(f"objective is {other}, but the loss weights in {path} are those of {objective}")
    wrong = "cosine" if name != "cosine" else "linear"
    assert "holds other betas" in check.error_line(checkpoints.load, path, beta_schedule=wrong)


def test_schedules_have_options(package, tmp_path):
    options = {"start": -2, "end": 2, "tau": 0.9}
    path = tmp_path / "model-1.pt"
    torch.save(state_of("sigmoid", "pred_v", **options), path)
    found = checkpoints.load(path, beta_schedule="sigmoid", schedule_fn_kwargs=options)
    assert (found.notes, len(found.schedule.betas)) == ((), 50)
    assert torch.equal(found.schedule.betas, named_betas("sigmoid", 50, **options))
    (note,) = checkpoints.load(path).notes
    assert "match no known beta_schedule, so they were used as they are stored" in note
    text = check.error_line(checkpoints.load, path, beta_schedule="sigmoid", schedule_fn_kwargs={"s": 1})
    assert text.startswith("schedule_fn_kwargs of sigmoid is 's'; want one of start, end, tau")


def test_without_an_average_the_last_weights_are_read(package, tmp_path):
    state = {name.removeprefix("ema_model."): value for name, value in WEIGHTS["ema"].items()}
    state = {name: value for name, value in state.items() if name not in ("initted", "step")}
    found = checkpoints.load(written(tmp_path / "a", {"step": 1, "model": state}))
    assert "has no average of the weights" in found.notes[0]
    assert torch.equal(found.network.final_conv.bias, WEIGHTS["ema"]["ema_model.model.final_conv.bias"])


def test_a_sampler_runs_the_network(package):
    sampler = Sampler.from_pretrained(FIXTURE / "model-1.pt", device="cpu")
    assert sampler.shape == (3, 8, 8)
    assert sampler.sample(2, steps=3, progress=False).isfinite().all()


def test_unnormalised_data_is_said(package, tmp_path):
    (note,) = checkpoints.load(written(tmp_path / "a", diffusion={"auto_normalize": False})).notes
    assert "was trained without auto_normalize" in note


@pytest.mark.parametrize(
    ("sections", "want"),
    [
        ({"unet": {"self_condition": True}}, "self_condition is True, which is not supported"),
        ({"unet": {"learned_variance": True}}, "learned_variance is True, which is not supported"),
        ({"unet": {"dim": 16}}, "dim is 16, but {path} holds a network with dim 8; correct the option"),
        (
            {"unet": {"dim_mults": [1, 2, 4]}},
            "dim_mults is [1, 2, 4], but {path} holds a network with dim_mults (1, 2)",
        ),
        ({"unet": {"attn_heads": 8}}, "attn_heads is 8, but {path} holds a network with attn_heads (4, 4)"),
        ({"unet": {"full_attn": [True, True]}}, "full_attn is [True, True], but"),
        ({"diffusion": {"width": 3}}, "an option of lucidrains is 'width'; want one of dim,"),
        ({"unet": [8]}, "unet is [8]; want options by name"),
        ({"diffusion": {"timesteps": 1000}}, "timesteps is 1000, but {path} holds a schedule of 100 timesteps"),
        ({"diffusion": {"beta_schedule": "quadratic"}}, "beta_schedule is 'quadratic'; want one of linear, cosine"),
        ({"diffusion": {"objective": "pred_score"}}, "objective is 'pred_score'; want one of pred_noise"),
        ({"unet_class": "KarrasUnet"}, "unet_class is 'KarrasUnet'; of lucidrains' networks only Unet is supported"),
        ({"diffusion_class": "ElucidatedDiffusion"}, "diffusion_class is 'ElucidatedDiffusion'; of lucidrains'"),
    ],
    ids=str,
)
def test_what_the_file_contradicts_or_we_lack_is_an_error(sections, want, package, tmp_path):
    path = written(tmp_path / "a", **sections)
    assert check.error_line(checkpoints.load, path).startswith(want.format(path=path))


def test_options_that_the_file_shows_to_be_unsupported_are_refused(package, tmp_path):
    prefix = "ema_model.model."
    for name, repeats in (("init_conv.weight", (1, 2, 1, 1)), ("final_conv.weight", (2, 1, 1, 1))):
        ema = {**WEIGHTS["ema"], prefix + name: WEIGHTS["ema"][prefix + name].repeat(repeats)}
        text = check.error_line(checkpoints.load, written(tmp_path / "a", {**WEIGHTS, "ema": ema}))
        assert "self_condition and learned_variance are not supported" in text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    text = check.error_line(checkpoints.load, FIXTURE)
    assert text.startswith(f"{FIXTURE / 'model-1.pt'} holds the network of another package, which cannot be imported")
    assert text.endswith("pip install denoising-diffusion-pytorch")


def test_training_cannot_continue_from_it(package, tmp_path):
    assert "whose network is not a UNet2D" in check.error_line(load_initial, FIXTURE, tmp_path)
