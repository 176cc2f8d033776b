"""Folders that diffusers' training examples leave: averages, states of accelerate, wrapped names, latents, variants."""

import json
import re
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from fastddpm import Sampler, Schedule, UNet1D, UNet2D, checkpoints
from fastddpm.audio import Audio
from fastddpm.checkpoints import SHIPPED_MODELS, shipped_model
from fastddpm.evaluate.likelihood import bound
from fastddpm.train.initial import load_initial
from tests.support.check import error_line

WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_same_tensors(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def options_of(unet: UNet2DModel) -> dict:
    return json.loads(json.dumps({key: value for key, value in unet.config.items() if not key.startswith("_")}))


@pytest.fixture
def average(unet) -> EMAModel:
    return EMAModel(
        [value + 1 for value in unet.parameters()], use_ema_warmup=True, model_cls=UNet2DModel, model_config=unet.config
    )


# Averages of the weights


def test_options_of_the_average_are_left_out(folder, unet, average):
    average.save_pretrained(folder / "unet")
    assert "inv_gamma" in json.loads((folder / "unet" / "config.json").read_text())
    got = checkpoints.load(folder)
    assert got.config == options_of(unet)
    assert torch.equal(got.parameters["conv_in.weight"], unet.conv_in.weight + 1)
    assert got.notes == ()


def test_average_alone_is_read(folder, unet, average):
    average.save_pretrained(folder / "unet_ema")
    shutil.rmtree(folder / "unet")
    got = checkpoints.load(folder)
    assert torch.equal(got.parameters["conv_in.weight"], unet.conv_in.weight + 1)
    assert got.notes == (f"{folder} has no unet/; the average of the weights, unet_ema/, was read instead",)


def test_average_beside_the_network_is_named_but_not_read(folder, unet, average):
    """As in diffusers."""
    average.save_pretrained(folder / "unet_ema")
    got = checkpoints.load(folder)
    assert_same_tensors(got.parameters, unet.state_dict())
    (note,) = got.notes
    assert note.endswith(f"it is the checkpoint {folder / 'unet_ema'}")
    averaged = checkpoints.load(folder / "unet_ema")
    assert torch.equal(averaged.parameters["conv_in.weight"], unet.conv_in.weight + 1)
    assert averaged.schedule == got.schedule


# Schedules elsewhere, or nowhere


@pytest.mark.parametrize("name", ["checkpoint-500", "checkpoint-500/unet_ema", "checkpoint-500/unet", "latest"])
def test_schedule_is_read_from_the_folder_above(folder, unet, name):
    unet.save_pretrained(folder / name if "unet" in name else folder / name / "unet")
    got = checkpoints.load(folder / name)
    assert got.schedule.variance_type == "fixed_large"
    (note,) = got.notes
    path = folder / "scheduler" / "scheduler_config.json"
    assert note == f"{folder / name} has no scheduler_config.json; that of {path} was read"


def test_folder_above_is_found_from_inside(folder, monkeypatch):
    monkeypatch.chdir(folder / "unet")
    assert checkpoints.load(".").schedule == checkpoints.load(folder).schedule


def test_schedule_of_the_folder_itself_comes_first(folder, unet):
    inner = folder / "checkpoint-500"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=7)).save_pretrained(inner)
    got = checkpoints.load(inner)
    assert (got.schedule.num_train_timesteps, got.notes) == (7, ())


def test_without_any_schedule_the_assumed_one_is_said(tmp_path, unet):
    unet.save_pretrained(tmp_path / "run" / "unet")
    got = checkpoints.load(tmp_path / "run")
    assert got.schedule == Schedule()
    (note,) = got.notes
    assert note.startswith(
        f"{tmp_path / 'run'} has no scheduler_config.json, so the defaults were assumed: T = 1000, linear"
    )
    given = checkpoints.load(tmp_path / "run", schedule=Schedule(num_train_timesteps=7))
    assert (given.schedule.num_train_timesteps, given.notes) == (7, ())
    with pytest.warns(UserWarning, match="so the defaults were assumed"):
        Sampler.from_pretrained(tmp_path / "run", device="cpu")
    sampler = Sampler.from_pretrained(tmp_path / "run", device="cpu", schedule=Schedule(num_train_timesteps=7))
    assert sampler.schedule.num_train_timesteps == 7


def test_given_schedule_replaces_the_stored_one(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text("damaged")
    assert checkpoints.load(folder, schedule=Schedule(num_train_timesteps=7)).schedule.num_train_timesteps == 7


# Names of the parameters


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "unet.", "model.module.unet.", "ema_model."],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_prefixes_of_wrappers_are_removed(folder, unet, prefix, pickled):
    path = folder / "unet" / WEIGHTS
    content = {f"{prefix}{name}": value for name, value in load_file(path).items()}
    path.unlink()
    if pickled:
        path = path.with_suffix(".bin")
        torch.save(content, path)
    else:
        save_file(content, path)
    got = checkpoints.load(folder)
    assert_same_tensors(got.parameters, unet.state_dict())
    (note,) = got.notes
    assert note.startswith(f"{path}: the names of the parameters have the prefix ")
    assert all(part in note for part in prefix.split("."))
    with pytest.warns(UserWarning, match=re.escape(note)):
        Sampler.from_pretrained(folder, device="cpu")


def test_parts_that_were_compiled_are_found(folder, unet):
    path = folder / "unet" / WEIGHTS
    content = load_file(path)
    save_file({name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in content.items()}, path)
    got = checkpoints.load(folder)
    assert_same_tensors(got.parameters, unet.state_dict())
    assert "_orig_mod." in got.notes[0]


def test_old_and_new_names_of_attention_are_refused(folder):
    path = folder / "unet" / WEIGHTS
    content = load_file(path)
    (name,) = [name for name in content if "mid_block" in name and "to_q.weight" in name]
    save_file(content | {name.replace("to_q", "query"): content[name] + 1}, path)
    assert "1 unexpected (mid_block.attentions.0.query.weight)" in error_line(
        Sampler.from_pretrained, folder, device="cpu"
    )


def test_names_that_would_collide_are_left_alone(folder):
    path = folder / "unet" / WEIGHTS
    content = load_file(path)
    save_file(content | {f"module.{name}": value.clone() for name, value in content.items()}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = error_line(Sampler.from_pretrained, folder, device="cpu")
    assert "unexpected (module.conv_in.bias, module.conv_in.weight" in line


def test_other_networks_beside_it_are_refused(folder):
    path = folder / "unet" / WEIGHTS
    content = {f"unet.{name}": value for name, value in load_file(path).items()}
    save_file(content | {"vae.weight": torch.zeros(2)}, path)
    assert "unexpected (unet.conv_in.bias" in error_line(Sampler.from_pretrained, folder, device="cpu")


# Variants


@pytest.mark.parametrize(
    "options",
    [{}, {"safe_serialization": False}, {"max_shard_size": "40KB"}],
    ids=["safetensors", "pickle", "shards"],
)
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_missing_weights_name_the_variant_that_is_there(folder, unet, variant, options):
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", variant=variant, **options)
    line = error_line(checkpoints.load, folder)
    assert line.endswith(f'it has those of variant {variant}: pass variant="{variant}" (--variant {variant})')
    assert_same_tensors(checkpoints.load(folder, variant=variant).parameters, unet.state_dict())


def test_missing_variant_names_the_weights_without_one(folder):
    line = error_line(checkpoints.load, folder, variant="fp16")
    assert line.endswith("it has weights without a variant: leave variant out")


@pytest.mark.parametrize("variant", ["../fp16", "a/b", "a\0b", "*", 16, "x" * 1000, b"fp16"])
def test_variant_is_part_of_a_name(folder, variant):
    line = error_line(checkpoints.load, folder, variant=variant)
    assert line.startswith("variant is ")
    assert line.endswith("want a name such as 'fp16', or None")
    assert len(line) < 300


def test_a_medium_must_fit_the_network(tmp_path):
    net, schedule = UNet1D(input_dim=128, down_dims=(8,), n_groups=4, sample_size=16), Schedule()
    wrong = "medium is an Audio, of samples (256, L), but these are (128, 16)"
    save = partial(checkpoints.save, tmp_path / "x", net.config, net.state_dict(), schedule)
    assert error_line(save, medium=Audio(16000, "spectrogram")) == wrong
    save(medium=Audio(8000, "spectrogram"))
    medium = tmp_path / "x" / "medium.json"
    medium.write_text(medium.read_text().replace("8000", "16000"))
    assert error_line(checkpoints.load, tmp_path / "x") == f"{medium}: {wrong}"


# The bundled model


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_bundled_models_have_names(name, tmp_path, monkeypatch, unet, scheduler):
    monkeypatch.chdir(tmp_path)
    want = checkpoints.load(shipped_model(name))
    got = checkpoints.load(name)
    for part in ("config", "schedule", "classes", "medium"):
        assert getattr(got, part) == getattr(want, part)
    assert_same_tensors(got.parameters, want.parameters)
    DDPMPipeline(unet, scheduler).save_pretrained(name)
    assert_same_tensors(checkpoints.load(name).parameters, unet.state_dict())


# Classes


@pytest.fixture
def with_classes(tmp_path, unet, scheduler):
    labelled = UNet2DModel(**options_of(unet) | {"num_class_embeds": 3})
    DDPMPipeline(labelled, scheduler).save_pretrained(tmp_path / "labelled")
    return tmp_path / "labelled"


def test_names_of_classes(with_classes):
    assert checkpoints.load(with_classes).classes is None
    (with_classes / "classes.json").write_text('["bag", "boot", "größe"]')
    assert checkpoints.load(with_classes).classes == ("bag", "boot", "größe")
    assert Sampler.from_pretrained(with_classes, device="cpu").classes == ("bag", "boot", "größe")


@pytest.mark.parametrize("content", ['["bag"]', '{"0": "bag"}', '["a", "b", 3]', '"abc"', "[]"])
def test_other_files_of_that_name_are_ignored(with_classes, content):
    (with_classes / "classes.json").write_text(content)
    got = checkpoints.load(with_classes)
    assert got.classes is None
    assert got.notes == (
        f"{with_classes / 'classes.json'} was ignored: it is not a list of names of the network's 3 classes",
    )


def test_null_label_is_the_last_one_and_has_no_name(with_classes):
    """diffusers ignores the key, and its save keeps the other options."""
    (with_classes / "classes.json").write_text('["bag", "boot"]')
    got = checkpoints.load(with_classes)
    assert (got.classes, got.null_label) == (None, None)
    checkpoints.save(with_classes, got.config, got.parameters, got.schedule, null_label=2)
    again = checkpoints.load(with_classes)
    assert (again.classes, again.null_label, again.notes) == (("bag", "boot"), 2, ())
    assert again.config == got.config
    assert json.loads((with_classes / "unet" / "config.json").read_text())["_null_label"] == 2
    pipeline = DDPMPipeline.from_pretrained(with_classes)
    assert pipeline.unet.config.num_class_embeds == 3
    assert_same_tensors(pipeline.unet.state_dict(), got.parameters)
    assert UNet2D(**again.config, _null_label=2).config == UNet2D(**again.config).config


@pytest.mark.parametrize("value", [0, 1, 3, -1, "2", 2.0, True, [2]])
def test_null_label_must_be_the_last(with_classes, value):
    path = with_classes / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_null_label": value}))
    line = error_line(checkpoints.load, with_classes)
    assert line == f"{path}: null_label is {value!r}; want the last label, 2"
    got = checkpoints.load("fashion-mnist")
    line = error_line(checkpoints.save, "x", got.config, got.parameters, got.schedule, null_label=value)
    assert line == f"null_label is {value!r}; want None: this network does not have two or more class embeddings"


def test_networks_without_classes_have_no_names(folder):
    (folder / "classes.json").write_text('["bag"]')
    got = checkpoints.load(folder)
    assert (got.classes, got.notes) == (None, ())


# Latents


def latent_pipeline(folder, unet, kind: str):
    torch.manual_seed(1)
    scheduler = DDIMScheduler(num_train_timesteps=4, clip_sample=False)
    if kind == "LDMPipeline":
        vae = VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                      up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16)  # fmt: skip
        LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler).save_pretrained(folder)
        return
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"vae": ["diffusers", "AutoencoderKL"], "_class_name": "MyPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["LDMPipeline", "MyPipeline"])
def test_pipeline_with_a_decoder_draws_latents(tmp_path, unet, kind):
    latent_pipeline(tmp_path, unet, kind)
    for place in (tmp_path, tmp_path / "unet"):  # of unet/ too, whose scheduler is that of the pipeline
        assert checkpoints.load(place).decoder == tmp_path
        assert checkpoints.load(place, schedule=Schedule(num_train_timesteps=4)).decoder == tmp_path
    sampler = Sampler.from_pretrained(tmp_path, device="cpu", precision="fp32")
    assert sampler.decoder == tmp_path
    line = error_line(sampler.sample, 1, output="uint8", progress=False)
    assert "latents" in line
    assert "output='float'" in line or "use 'float'" in line
    assert sampler.sample(1, progress=False).shape == (1, 3, 16, 16)


def test_images_are_no_data_of_a_latent_model(tmp_path, unet):
    latent_pipeline(tmp_path, unet, "LDMPipeline")
    sampler = Sampler.from_pretrained(tmp_path, device="cpu", precision="fp32")
    line = error_line(bound, sampler, np.zeros((1, 16, 16, 3), np.uint8), progress=False)
    assert line == "data are images, but the model is of latents; want its latents, as floating-point numbers"
    assert error_line(load_initial, str(tmp_path), tmp_path / "run").startswith(
        f"init is {tmp_path}, whose network draws"
    )


def test_pipeline_whose_decoder_is_missing_draws_latents(tmp_path, unet):
    latent_pipeline(tmp_path, unet, "LDMPipeline")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vqvae": [None, None]}))
    assert checkpoints.load(tmp_path).decoder == tmp_path


def test_pipeline_without_a_decoder_draws_images(folder):
    assert checkpoints.load(folder).decoder is None
    assert Sampler.from_pretrained(folder, device="cpu").decoder is None
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None], "safety": None}))
    assert checkpoints.load(folder).decoder is None
