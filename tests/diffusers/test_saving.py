"""Saving and loading: both packages write the same files, read each other's, and make the same images."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddpm import Sampler
from fastddpm.checkpoints import shipped_model
from fastddpm.core import noise
from fastddpm.core.names import SHIPPED_IMAGES
from tests.support.check import TINY, assert_as_accurate

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
    without_progress,
)

PACKAGES = {"ours": fast, "diffusers": diffusers}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler")
OPTIONS = {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.9, "timestep_spacing": "trailing"}


def files(folder):
    """The bytes of each file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def bits(pipe):
    """Images by diffusers' forward, which have the same bits in both packages."""
    return sample(*hooked(pipe))


# Saved files


@pytest.mark.parametrize("dtype", [SINGLE, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_equals_diffusers(kind, dtype, tmp_path):
    for name, pipe in zip(PACKAGES, pipeline_pair(kind, dtype, scheduler=OPTIONS), strict=True):
        pipe.save_pretrained(tmp_path / name)
    assert files(tmp_path / "ours") == files(tmp_path / "diffusers")
    assert len(files(tmp_path / "ours")) == 4
    index = json.loads((tmp_path / "ours/model_index.json").read_text())
    assert index["_class_name"] == f"{kind}Pipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", f"{kind}Scheduler"]


def test_sampling_does_not_change_saved_files(tmp_path):
    for name, pipe in zip(PACKAGES, pipeline_pair(), strict=True):
        sample(pipe)
        if name == "ours":
            sample(pipe, noise=3)
            pipe.scheduler.noise = "philox"
        pipe.save_pretrained(tmp_path / name)
    assert files(tmp_path / "ours") == files(tmp_path / "diffusers")


def test_a_pipeline_of_mixed_parts_saves_the_same_files(tmp_path):
    fast.DDPMPipeline(tiny_unet(diffusers), fast.DDPMScheduler()).save_pretrained(tmp_path / "ours")
    diffusers.DDPMPipeline(tiny_unet(), fast.DDPMScheduler()).save_pretrained(tmp_path / "mixed")
    diffusers.DDPMPipeline(tiny_unet(diffusers), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "diffusers")
    assert files(tmp_path / "ours") == files(tmp_path / "mixed") == files(tmp_path / "diffusers")


@pytest.mark.parametrize(
    "options", [{}, {"safe_serialization": False}, {"max_shard_size": "40KB"}, {"variant": "half"}], ids=str
)
def test_a_saved_network_equals_diffusers(options, tmp_path):
    for name, package in PACKAGES.items():
        tiny_unet(package).save_pretrained(tmp_path / name, **options)
    ours, theirs = (files(tmp_path / name) for name in PACKAGES)
    assert list(ours) == list(theirs)
    assert all(ours[name] == theirs[name] for name in ours if not name.endswith(".bin"))  # pickles contain dates
    load = {"use_safetensors": options.get("safe_serialization", True), "variant": options.get("variant")}
    for writer in PACKAGES:
        loaded = [package.UNet2DModel.from_pretrained(tmp_path / writer, **load) for package in PACKAGES.values()]
        assert dict(loaded[0].config) == dict(loaded[1].config)
        for unet, package in zip(loaded, PACKAGES.values(), strict=True):
            assert type(unet) is package.UNet2DModel
            assert not unet.training
            for key, value in tiny_unet(diffusers).state_dict().items():
                assert torch.equal(unet.state_dict()[key], value)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_saved_scheduler_equals_diffusers(name, tmp_path):
    for writer, package in PACKAGES.items():
        getattr(package, name)(**OPTIONS).save_pretrained(tmp_path / writer)
        config = getattr(package, name).load_config(tmp_path / writer)
        for reader in PACKAGES.values():
            for loaded in (
                getattr(reader, name).from_pretrained(tmp_path / writer),
                getattr(reader, name).from_config(config),
            ):
                assert type(loaded) is getattr(reader, name)
                assert OPTIONS.items() <= dict(loaded.config).items()
    assert files(tmp_path / "ours") == files(tmp_path / "diffusers")


# Each package reads the other's files


@pytest.mark.parametrize("reader", PACKAGES)
@pytest.mark.parametrize("writer", PACKAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_package_loads_what_the_other_saved(kind, writer, reader, tmp_path):
    saved = pipeline(PACKAGES[writer], kind, scheduler=OPTIONS)
    saved.save_pretrained(tmp_path)
    pipe = without_progress(getattr(PACKAGES[reader], f"{kind}Pipeline").from_pretrained(tmp_path))
    assert type(pipe) is getattr(PACKAGES[reader], f"{kind}Pipeline")
    assert type(pipe.scheduler) is getattr(PACKAGES[reader], f"{kind}Scheduler")
    assert OPTIONS.items() <= dict(pipe.scheduler.config).items()
    if reader == "ours":
        assert torch.equal(sample(pipe), sample(pipeline(fast, kind, scheduler=OPTIONS)))
    assert torch.equal(bits(pipe), bits(saved))


@pytest.mark.parametrize("name", [name for name in fast.__all__ if hasattr(getattr(fast, name), "from_pretrained")])
def test_the_bundled_model_has_a_name(name, tmp_path, monkeypatch):
    """But a folder of this name is meant where there is one."""
    kind = getattr(fast, name)
    kind.from_pretrained("fashion-mnist").save_pretrained(tmp_path / "fashion-mnist")
    monkeypatch.chdir(tmp_path)
    assert type(kind.from_pretrained("fashion-mnist")) is kind
    for config in (tmp_path / "fashion-mnist").glob("*.json"):
        config.unlink()
    with pytest.raises(OSError, match="fashion-mnist"):
        kind.from_pretrained("fashion-mnist")


@pytest.mark.parametrize("reader", PACKAGES)
def test_from_pretrained_accepts_parts(reader, tmp_path):
    pipeline().save_pretrained(tmp_path)
    package = PACKAGES[reader]
    for maker in PACKAGES.values():
        unet, scheduler = tiny_unet(maker), maker.DDPMScheduler(**OPTIONS)
        pipe = without_progress(package.DDPMPipeline.from_pretrained(tmp_path, unet=unet, scheduler=scheduler))
        assert pipe.unet is unet
        assert pipe.scheduler is scheduler
        assert torch.equal(bits(pipe), bits(pipeline(diffusers, scheduler=OPTIONS)))


def test_parts_can_be_loaded_separately(tmp_path):
    saved = pipeline(diffusers, scheduler=OPTIONS)
    saved.save_pretrained(tmp_path)
    unet = fast.UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    scheduler = fast.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (type(unet), type(scheduler)) == (fast.UNet2DModel, fast.DDPMScheduler)
    assert torch.equal(bits(without_progress(fast.DDPMPipeline(unet, scheduler))), bits(saved))
    other = fast.DDIMScheduler.from_config(scheduler.config)
    assert type(other) is fast.DDIMScheduler
    assert other.config.clip_sample_range == 0.9


def test_a_checkpoint_loads_as_diffusion_pipeline(tmp_path):
    """DiffusionPipeline must find the saved class names in diffusers."""
    pipeline().save_pretrained(tmp_path)
    pipe = without_progress(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(pipe) is diffusers.DDPMPipeline
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert torch.equal(bits(pipe), bits(pipeline()))
    ddim = without_progress(fast.DDIMPipeline.from_pretrained(tmp_path))  # the checkpoint has another scheduler
    assert type(ddim.scheduler) is fast.DDIMScheduler
    theirs = without_progress(diffusers.DDIMPipeline.from_pretrained(tmp_path))
    assert torch.equal(bits(ddim), bits(theirs))


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")  # its successor is newer than 0.35
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_from_pretrained_accepts_a_dtype(dtype, tmp_path):
    pipeline().save_pretrained(tmp_path)
    pipe = without_progress(fast.DDPMPipeline.from_pretrained(tmp_path, torch_dtype=dtype))
    assert pipe.unet.dtype == dtype
    assert torch.equal(sample(pipe), sample(pipeline(dtype=dtype)))


def test_a_pipeline_of_components_shares_them():
    pipe = pipeline()
    other = without_progress(fast.DDIMPipeline(**pipe.components))
    assert other.unet is pipe.unet
    assert torch.equal(bits(other), bits(pipeline(diffusers, "DDIM")))
    assert list(inspect.signature(fast.DDPMPipeline.__init__).parameters) == ["self", "unet", "scheduler"]


# Old checkpoints, and the shipped one


def flat(folder):
    """A checkpoint like google/ddpm-*: all files in one folder, attention parameters with their names of 2022."""
    tiny_unet(diffusers).save_pretrained(folder)
    diffusers.DDPMScheduler(variance_type="fixed_large").save_pretrained(folder)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in load_file(path := folder / "diffusion_pytorch_model.safetensors").items():
        for new, old in names.items():
            name = name.replace(new, old)
        weights[name] = value
    assert sum(".query." in name for name in weights) > 0
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_a_flat_checkpoint_of_2022_loads(tmp_path):
    flat(tmp_path)
    ours, theirs = (without_progress(package.DDPMPipeline.from_pretrained(tmp_path)) for package in PACKAGES.values())
    assert ours.scheduler.config.variance_type == "fixed_large"
    assert type(ours.scheduler) is fast.DDPMScheduler
    assert torch.equal(sample(ours), sample(pipeline(scheduler={"variance_type": "fixed_large"})))
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("folder", ["flat", "shipped"])
def test_a_sampler_and_a_pipeline_of_one_checkpoint_make_the_same_images(folder, tmp_path, monkeypatch):
    """From the same noise; the sampler computes its coefficients in float64, diffusers in float32."""
    source, n = (flat(tmp_path), 16) if folder == "flat" else (shipped_model(), 4)
    sampler = Sampler.from_pretrained(source, device="cpu", precision="fp32")
    pipe, *twins = (
        without_progress(package.DDPMPipeline.from_pretrained(source)) for package in (fast, diffusers, diffusers)
    )
    address = noise.address(3, n)
    draws = [noise.normal(address, sampler.shape, stream=noise.START, t=1000)]
    draws += [noise.normal(address, sampler.shape, stream=noise.STEP, t=t) for t in (750, 500, 250)]
    twins[1].scheduler.alphas_cumprod = sampler.schedule.log_alphas_cumprod.exp()
    plain, ref = (images_of_noise(monkeypatch, draws, *one, n) for one in zip(twins, (SINGLE, DOUBLE), strict=True))
    assert_as_accurate(sample(pipe, n, noise=3), plain, ref)
    images = sampler.sample(n, seed=3, steps=STEPS, progress=False)
    assert_as_accurate((images / 2 + 0.5).clamp(0, 1), plain, ref)


@pytest.mark.parametrize("name", SHIPPED_IMAGES)
def test_the_shipped_models_load_by_name(name):
    got, want = fast.UNet2DModel.from_pretrained(name), diffusers.UNet2DModel.from_pretrained(shipped_model(name))
    assert all(torch.equal(value, got.state_dict()[key]) for key, value in want.state_dict().items())
    assert got.config.num_class_embeds == (None if name == SHIPPED_IMAGES[0] else 11)


def test_the_shipped_model_gives_diffusers_images():
    ours, theirs = (
        without_progress(package.DDPMPipeline.from_pretrained(shipped_model())) for package in PACKAGES.values()
    )
    assert sample(ours, 3, generator=seeded()).shape == (3, 1, 28, 28)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("unet", [diffusers.UNet2DModel, fast.UNet2DModel], ids=["theirs", "ours"])
@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_from_pipe_accepts_either_network(name, unet):
    """`from_pipe` compares the network's type with the annotation of the constructor."""
    pipe = diffusers.DDPMPipeline(unet(**TINY), fast.DDPMScheduler())
    made = getattr(fast, name).from_pipe(pipe)
    assert type(made) is getattr(fast, name)
    assert made.unet is pipe.unet
