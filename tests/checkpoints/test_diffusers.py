"""Checkpoints of diffusers: read and written as diffusers itself does, and the errors for damaged or foreign files."""

import builtins
import copy
import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn

from fastddpm import checkpoints
from fastddpm.core.schedule import Schedule
from tests.support import check

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def options(unet) -> dict:
    return public(unet.config)


def as_pipeline(folder, unet, scheduler):
    DDPMPipeline(unet, scheduler).save_pretrained(folder)


def as_pipeline_of_pickles(folder, unet, scheduler):
    DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=False)


def at_the_root(folder, unet, scheduler):
    unet.save_pretrained(folder)
    scheduler.save_pretrained(folder)


def in_shards(folder, unet, scheduler):
    unet.save_pretrained(folder / "unet", max_shard_size="40KB")
    scheduler.save_pretrained(folder / "scheduler")
    assert len(list(folder.glob("unet/*.safetensors"))) > 1


def with_legacy_names(folder, unet, scheduler):
    at_the_root(folder, unet, scheduler)
    (folder / WEIGHTS).unlink()
    torch.save(legacy(unet.state_dict()), folder / PICKLE)
    assert_same_tensors(UNet2DModel.from_pretrained(folder).state_dict(), unet.state_dict())


def with_legacy_names_in_safetensors(folder, unet, scheduler):
    at_the_root(folder, unet, scheduler)
    save_file(legacy(unet.state_dict()), folder / WEIGHTS)


def with_parameters_of_2019(folder, unet, scheduler):
    at_the_root(folder, unet, scheduler)
    (folder / WEIGHTS).unlink()
    torch.save(dict(unet.named_parameters()), folder / PICKLE, _use_new_zipfile_serialization=False)


def with_a_damaged_pickle_beside(folder, unet, scheduler):
    as_pipeline(folder, unet, scheduler)
    (folder / "unet" / PICKLE).write_bytes(b"damaged")


def legacy(state: dict) -> dict:
    renamed = {}
    for name, value in state.items():
        for new, old in LEGACY.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert sum(".query." in name for name in renamed) == 2 * sum(".to_q.weight" in name for name in state) > 0
    return renamed


def public(config: dict) -> dict:
    """The options without diffusers' notes, as JSON would hold them."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


def assert_same_tensors(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


# Reading


@pytest.mark.parametrize(
    "write",
    [
        as_pipeline,
        as_pipeline_of_pickles,
        at_the_root,
        in_shards,
        with_legacy_names,
        with_legacy_names_in_safetensors,
        with_parameters_of_2019,
        with_a_damaged_pickle_beside,
    ],
)
def test_load_reads_what_diffusers_wrote(write, tmp_path, unet, scheduler, options):
    write(tmp_path, unet, scheduler)
    got = checkpoints.load(tmp_path)
    assert_same_tensors(got.parameters, unet.state_dict())
    assert not any(value.requires_grad for value in got.parameters.values())
    assert got.config == options
    assert got.schedule == Schedule.from_config(dict(scheduler.config))
    assert got.schedule.variance_type == "fixed_large"
    assert (got.classes, got.decoder, got.notes) == (None, None, ())
    assert checkpoints.load(str(tmp_path)).schedule == got.schedule


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}], ids=["one file", "shards"])
def test_load_reads_the_requested_variant(shards, tmp_path, unet, scheduler):
    half = UNet2DModel.from_config(unet.config).half()
    at_the_root(tmp_path, unet, scheduler)
    half.save_pretrained(tmp_path, variant="fp16", **shards)
    assert_same_tensors(checkpoints.load(tmp_path).parameters, unet.state_dict())
    assert_same_tensors(checkpoints.load(tmp_path, variant="fp16").parameters, half.state_dict())
    assert "no weights" in check.error_line(checkpoints.load, tmp_path, variant="non_ema")


# Writing


@pytest.mark.parametrize("pipeline", [True, False])
def test_diffusers_loads_what_save_wrote(pipeline, tmp_path, unet, scheduler, options):
    schedule = Schedule.from_config(dict(scheduler.config))
    checkpoints.save(tmp_path / "new" / "folder", options, unet.state_dict(), schedule, pipeline=pipeline)
    loaded = DDPMPipeline.from_pretrained(tmp_path / "new" / "folder")
    assert_same_tensors(loaded.unet.state_dict(), unet.state_dict())
    assert public(loaded.unet.config) == options
    assert type(loaded.scheduler) is DDPMScheduler
    assert public(loaded.scheduler.config).items() >= public(scheduler.config).items()
    alone = UNet2DModel.from_pretrained(tmp_path / "new" / "folder", subfolder="unet" if pipeline else None)
    assert_same_tensors(alone.state_dict(), unet.state_dict())
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    # the last bits depend on memory alignment, which is equal in deep copies
    theirs, ours = (copy.deepcopy(net).eval()(x, 5).sample for net in (alone, unet))
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("pipeline", [True, False])
def test_load_returns_what_was_saved(pipeline, tmp_path, unet, options):
    schedule = Schedule(beta_schedule="sigmoid", prediction_type="v_prediction", timestep_spacing="trailing")
    checkpoints.save(tmp_path, options, unet.state_dict(), schedule, pipeline=pipeline)
    got = checkpoints.load(tmp_path)
    assert got.config == options
    assert_same_tensors(got.parameters, unet.state_dict())
    assert got.schedule == schedule


def test_save_converts_to_the_requested_dtype(tmp_path, unet, options):
    checkpoints.save(tmp_path, options, unet.state_dict(), Schedule(), dtype=torch.float16)
    half = {name: value.half() for name, value in unet.state_dict().items()}
    assert_same_tensors(checkpoints.load(tmp_path).parameters, half)
    assert_same_tensors(UNet2DModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float16).state_dict(), half)


def test_save_accepts_any_memory_format_and_shared_memory(tmp_path):
    fused = nn.Linear(4, 12).requires_grad_(False)
    state = {
        "conv.weight": torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        "to_q.weight": fused.weight[:4],
        "to_k.weight": fused.weight[4:8],
        "scale": nn.Parameter(torch.ones(())),
    }
    checkpoints.save(tmp_path, {}, state, Schedule())
    assert_same_tensors(load_file(tmp_path / "unet" / WEIGHTS), {name: value.detach() for name, value in state.items()})
    assert not state["conv.weight"].is_contiguous()


def test_save_replaces_the_checkpoint_it_was_loaded_from(folder):
    old = checkpoints.load(folder)
    changed = {name: value + 1 for name, value in old.parameters.items()}
    checkpoints.save(folder, old.config, changed, old.schedule)
    assert_same_tensors(checkpoints.load(folder).parameters, changed)
    assert len(list(folder.rglob("*"))) == 6  # two folders, three configurations, the weights; no temporary files


def test_interrupted_save_keeps_the_old_weights(folder, unet, monkeypatch):
    old = checkpoints.load(folder)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save", interrupted)
    for place in (folder, folder.with_name("fresh")):
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(place, old.config, {}, old.schedule)
    assert_same_tensors(checkpoints.load(folder).parameters, unet.state_dict())
    assert "no weights" in check.error_line(checkpoints.load, folder.with_name("fresh"))
    assert not [path for path in folder.parent.rglob("*") if path.suffix == ".tmp"]


def test_save_refuses_a_folder_whose_pipeline_would_be_loaded_instead(folder, options, unet):
    text = check.error_line(checkpoints.save, folder, options, unet.state_dict(), Schedule(), pipeline=False)
    assert text.startswith(f"{folder} holds a pipeline's unet/")


# Damaged and foreign files


def test_source_that_is_not_a_folder(tmp_path):
    file = tmp_path / "model.bin"
    file.touch()
    assert check.error_line(checkpoints.load, file).startswith(f"{file} is a file; want the folder that holds")
    assert check.error_line(checkpoints.load, "").startswith("the checkpoint is ''; want a folder")
    for name in ("/no/such/folder", "no-such-folder", "a/b/c", "what is this?", "~/models", "../x/y"):
        text = check.error_line(checkpoints.load, name)
        assert text.startswith(f"there is no folder {name}; want a folder, one of fashion-mnist, ")


def test_empty_folder(tmp_path):
    text = check.error_line(checkpoints.load, tmp_path)
    assert text.startswith(f"{tmp_path} is not a DDPM checkpoint: it has no unet/config.json and no config.json, as")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("unet/config.json", "has no unet/config.json and no config.json"),
        ("scheduler/scheduler_config.json", "has no scheduler/scheduler_config.json and no scheduler_config.json"),
        (f"unet/{WEIGHTS}", f"has no weights; looked for {WEIGHTS}, {WEIGHTS}.index.json, {PICKLE}"),
    ],
)
def test_missing_file_is_named(folder, name, want):
    (folder / name).unlink()
    assert want in check.error_line(checkpoints.load, folder)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("content", "want"),
    [
        (b'{"in_channels": 3', "is not valid JSON: JSONDecodeError: Expecting"),
        (b"", "is not valid JSON: JSONDecodeError: Expecting value"),
        (b"\xff\xfe", "is not valid JSON: UnicodeDecodeError"),
        (b"[1, 2]", "holds a JSON list; want an object of options"),
    ],
)
def test_damaged_configuration(folder, name, content, want):
    (folder / name).write_bytes(content)
    assert check.error_line(checkpoints.load, folder).startswith(f"{folder / name} {want}")


@pytest.mark.parametrize(
    ("name", "class_name", "want"),
    [
        ("unet/config.json", "UNet2DConditionModel", "configures a UNet2DConditionModel; want a UNet2DModel"),
        ("scheduler/scheduler_config.json", "ScoreSdeVeScheduler", "_class_name is 'ScoreSdeVeScheduler'"),
    ],
)
def test_configuration_of_another_class(folder, name, class_name, want):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, "_class_name": class_name}))
    assert want in check.error_line(checkpoints.load, folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, 20_000, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert check.error_line(checkpoints.load, folder).startswith(f"{path} is not a complete safetensors file")


@pytest.mark.parametrize("name", ["unet/config.json", f"unet/{WEIGHTS}", f"unet/{PICKLE}"])
def test_unreadable_file_is_named(folder, unet, monkeypatch, name):
    if name.endswith(PICKLE):
        (folder / "unet" / WEIGHTS).rename(folder / name)

    def denied(path, *args, **kwargs):
        if path == folder / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *args, **kwargs)

    original = io.open
    monkeypatch.setattr(io, "open", denied)
    monkeypatch.setattr(builtins, "open", denied)
    assert check.error_line(checkpoints.load, folder) == f"cannot read {folder / name}: Permission denied"


def test_git_lfs_pointer(folder):
    path = folder / "unet" / WEIGHTS
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 143003468\n")
    assert "git lfs pull" in check.error_line(checkpoints.load, folder)


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": [WEIGHTS]}, "has no weight_map"),
        ({"weight_map": {"conv_in.weight": 1}}, "has no weight_map"),
        ({"weight_map": {"conv_in.weight": "gone.safetensors"}}, "gone.safetensors: No such file"),
    ],
)
def test_damaged_index(folder, content, want):
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
    assert want in check.error_line(checkpoints.load, folder)


class Touch:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_not_run(folder, dump):
    marker, path = folder / "was here", folder / "unet" / PICKLE
    (folder / "unet" / WEIGHTS).unlink()
    dump({"conv_in.weight": Touch(marker)}, path)
    text = check.error_line(checkpoints.load, folder)
    assert text.startswith(f"{path} is damaged or holds more than weights, so it was not loaded")
    assert not marker.exists()
    if dump is torch.save:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()  # the pickle would have run the code


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ([torch.zeros(2)], "holds a list, not parameters by name"),
        ("weights", "holds a str, not parameters by name"),
        ({1: torch.zeros(2)}, "holds a dict, not parameters by name"),
        ({"epoch": 3, "model": {}}, "holds entries that are not dense floating-point tensors (epoch, model); want"),
        ({"a": torch.zeros(2, dtype=torch.int8)}, "holds entries that are not dense floating-point tensors (a); want"),
        (nn.Linear(2, 2), "is damaged or holds more than weights, so it was not loaded"),
    ],
)
def test_pickle_of_something_else_is_refused(folder, content, want):
    path = folder / "unet" / PICKLE
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(content, path)
    assert check.error_line(checkpoints.load, folder).startswith(f"{path} {want}")


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_pickle(folder, unet, keep):
    path = folder / "unet" / PICKLE
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(unet.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert check.error_line(checkpoints.load, folder).startswith(f"{path} is damaged or holds more than weights")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that serves the folder `hub.repo`; downloaded files arrive in `hub.cache`."""

    class Hub:
        repo, cache = tmp_path / "repo", tmp_path / "cache"

        def fetched(self) -> list[str]:
            return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file())

    def snapshot_download(repo_id, *, allow_patterns):
        assert repo_id == "someone/ddpm"
        names = [str(path.relative_to(Hub.repo)) for path in Hub.repo.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (Hub.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Hub.repo / name, Hub.cache / name)
        return str(Hub.cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub()


def test_download_skips_files_it_does_not_need(hub, unet, scheduler):
    as_pipeline(hub.repo, unet, scheduler)
    as_pipeline_of_pickles(hub.repo, unet, scheduler)
    as_pipeline(hub.repo / "checkpoint-500", unet, scheduler)
    UNet2DModel.from_config(unet.config).save_pretrained(hub.repo / "unet", variant="fp16")
    assert_same_tensors(checkpoints.load("someone/ddpm").parameters, unet.state_dict())
    assert hub.fetched() == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
    ]


@pytest.mark.parametrize("write", [at_the_root, as_pipeline_of_pickles, with_legacy_names, in_shards])
def test_download_of_every_layout(hub, write, unet, scheduler):
    write(hub.repo, unet, scheduler)
    (hub.repo / "samples.png").touch()
    assert_same_tensors(checkpoints.load("someone/ddpm").parameters, unet.state_dict())
    assert "samples.png" not in hub.fetched()


def test_download_of_a_variant(hub, unet, scheduler):
    at_the_root(hub.repo, unet, scheduler)
    half = UNet2DModel.from_config(unet.config).half()
    half.save_pretrained(hub.repo, variant="fp16")
    assert_same_tensors(checkpoints.load("someone/ddpm", variant="fp16").parameters, half.state_dict())
    assert WEIGHTS not in hub.fetched()


@pytest.mark.parametrize("safe", [True, False])
def test_download_of_a_latent_pipeline_includes_its_decoder(hub, unet, safe):
    """Whose weights may be a pickle beside the safetensors of the network."""
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16)
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(hub.repo)
    if not safe:
        (hub.repo / "vqvae" / WEIGHTS).unlink()
        vae.save_pretrained(hub.repo / "vqvae", safe_serialization=False)
    (hub.repo / "samples.png").touch()
    assert checkpoints.load("someone/ddpm").decoder == hub.cache
    assert hub.fetched() == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
        "vqvae/config.json",
        f"vqvae/{WEIGHTS if safe else PICKLE}",
    ]


def test_download_of_a_model_without_weights(hub):
    hub.repo.mkdir()
    (hub.repo / "README.md").touch()
    hub.cache.mkdir()
    assert "is not a DDPM checkpoint of diffusers" in check.error_line(checkpoints.load, "someone/ddpm")


def test_failed_download_gives_the_reason(monkeypatch):
    def snapshot_download(repo_id, **_):
        raise LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nAn error happened while\ntrying")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    want = (
        "there is no folder someone/ddpm, and downloading it from the Hugging Face hub failed: "
        "LocalEntryNotFoundError: Got: ConnectError: Name or service not known"
    )
    assert check.error_line(checkpoints.load, "someone/ddpm") == want


def test_folder_wins_over_a_hub_id_of_the_same_name(hub, folder, unet, monkeypatch):
    shutil.copytree(folder, folder.parent / "someone" / "ddpm")
    monkeypatch.chdir(folder.parent)
    assert_same_tensors(checkpoints.load(os.path.join("someone", "ddpm")).parameters, unet.state_dict())
    assert not hub.cache.exists()
