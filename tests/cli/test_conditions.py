"""The options that give samples something do what the arguments of `Sampler.sample` do."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import Schedule, UNet2D, checkpoints
from fastddpm.cli.main import main
from fastddpm.sampling.sampler import Sampler
from tests.support.jobs import save_tiny

GREY = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with a model and files to give to it."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    save_tiny(tmp_path / "classes", num_class_embeds=4)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(GREY):
        Image.fromarray(image).save(f"images/{i}.png")
    Image.fromarray(GREY[0]).save("one.png")
    Image.fromarray(np.array([[255, 255, 0, 0]] * 4, np.uint8)).save("mask.png")
    np.save("floats.npy", states(GREY).numpy())
    np.savez("floats.npz", states(GREY).numpy())
    np.savez("two.npz", a=GREY, b=GREY)
    return tmp_path


def states(images):
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1


def drawn(model, flags, status=0):
    assert main(["sample", model, "--num-samples", "3", "--out", "x.npz", "--quiet", *flags.split()]) == status
    return np.load("x.npz")["arr_0"]


def wanted(model, **given):
    return Sampler.from_pretrained(model).sample(3, output="uint8", progress=False, **given).numpy()


MASK = torch.tensor([[1, 1, 0, 0]] * 4)
EACH, ONE = states(GREY), states(GREY[:1]).expand(3, 1, 4, 4)
WAYS = [
    ("--init images --strength 0.5", {"init": EACH, "strength": 0.5}),
    ("--init floats.npy --strength 1", {"init": EACH, "strength": 1}),
    ("--init floats.npz --strength 0.7", {"init": EACH, "strength": 0.7}),
    ("--init one.png --strength 0.5", {"init": ONE, "strength": 0.5}),
    ("--known one.png --mask mask.png", {"known": ONE, "mask": MASK}),
    ("--known images --mask mask.png --resample 2", {"known": EACH, "mask": MASK, "resample": 2}),
]


@pytest.mark.parametrize(("flags", "given"), WAYS, ids=[flags for flags, _ in WAYS])
def test_files_are_what_arrays_are(flags, given):
    assert np.array_equal(drawn("tiny", flags), wanted("tiny", **given))


def test_guidance_needs_a_null_label():
    got = drawn("classes", "--class-labels 0-2 --guidance-scale 2 --null-label 3")
    assert np.array_equal(
        got, wanted("classes", class_labels=[0, 1, 2], guidance_scale=2, uncond_kwargs={"class_labels": 3})
    )


def test_other_channels_and_arguments(folder):
    torch.manual_seed(0)
    net = UNet2D(**{**checkpoint_config("classes"), "in_channels": 3, "class_embed_type": "identity"})
    checkpoints.save("wide", net.config, net.state_dict(), Schedule(num_train_timesteps=6))
    concat, embedding = torch.randn(3, 2, 4, 4), torch.randn(3, 32)
    np.save("concat.npy", concat.numpy())
    np.savez("cond.npz", class_labels=embedding.numpy())
    got = drawn("wide", "--concat concat.npy --cond cond.npz")
    assert np.array_equal(got, wanted("wide", concat=concat, class_labels=embedding))


def test_labels_may_come_from_the_file():
    np.savez("cond.npz", class_labels=np.array([2, 0, 1]))
    assert np.array_equal(drawn("classes", "--cond cond.npz"), wanted("classes", class_labels=[2, 0, 1]))


@pytest.mark.parametrize("name", ["mask.npy", "mask.npz", "masks"])
def test_masks_of_every_kind(name, folder):
    mask = MASK.numpy().astype(np.uint8)
    np.save("mask.npy", mask)
    np.savez("mask.npz", 255 * mask)
    (folder / "masks").mkdir()
    for i in range(3):
        Image.fromarray(255 * mask).save(f"masks/{i}.png")
    assert np.array_equal(drawn("tiny", f"--known images --mask {name}"), wanted("tiny", known=EACH, mask=MASK))


def checkpoint_config(name):
    return dict(Sampler.from_pretrained(name).model.config)


def test_a_folder_is_drawn_with_them_too(folder):
    flags = "--num-samples 3 --known images --mask mask.png --format npz --out out/ --shard-size 2 --quiet"
    assert main(["sample", "tiny", *flags.split()]) == 0
    shards = [np.load(path)["arr_0"] for path in sorted((folder / "out").glob("*.npz"))]
    want = [wanted("tiny", known=EACH, mask=MASK)[:2]]
    assert np.array_equal(shards[0], want[0])
    assert np.array_equal(np.concatenate(shards)[:, :, :2], GREY[:, :, :2, None])


MISTAKES = [
    (
        "tiny",
        "--init none.png --strength 1",
        r"--init: cannot read none.png \(.*\); want an image for all",
    ),
    ("tiny", "--init two.npz --strength 1", "--init is two.npz, which holds a, b; want a single array"),
    ("tiny", "--init images", "init is given, but strength is missing; give both"),
    ("tiny", "--strength 0.5", "strength is given, but init is missing; give both"),
    (
        "tiny",
        "--init wide.png --strength 1",
        r"--init is wide.png, which holds \(1, 4, 8\) per sample; want \(1, 4, 4\)",
    ),
    (
        "tiny",
        "--init colour.png --strength 1",
        "--init is colour.png, whose images have colour, but",
    ),
    (
        "tiny",
        "--init two.npy --strength 1",
        "--init is two.npy, which holds 2 entries for 3 samples; want one",
    ),
    ("tiny", "--known images", "known is given, but mask is missing; give both"),
    (
        "tiny",
        "--known images --mask wide.png",
        r"mask is \(4, 8\) for 3 samples of \(1, 4, 4\); want \(1, 4, 4\), \(4, 4\)",
    ),
    ("tiny", "--cond floats.npy", "--cond is floats.npy, a single array; want an .npz with named arrays"),
    ("tiny", "--cond two.npz", "model_kwargs has 'a', which this network does not take; it takes no model_kwargs"),
    ("classes", "--guidance-scale 2", "--guidance-scale is given, but the checkpoint names no null label"),
    ("classes", "--null-label 2", "--null-label is given without --guidance-scale; give both"),
]


@pytest.mark.parametrize(("model", "flags", "message"), MISTAKES, ids=[flags for _, flags, _ in MISTAKES])
def test_mistakes_are_explained(model, flags, message, capsys):
    Image.fromarray(np.zeros((4, 8), np.uint8)).save("wide.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save("colour.png")
    np.save("two.npy", states(GREY[:2]).numpy())
    assert main(["sample", model, "--num-samples", "3", "--out", "x.npz", "--quiet", *flags.split()]) == 2
    assert re.search(f"fastddpm: error: {message}", capsys.readouterr().err)
