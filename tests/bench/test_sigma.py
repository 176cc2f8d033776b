"""The experiment about sigma_t z, with a tiny network and synthetic data: drawing, measuring and showing."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bench import frechet, sigma
from bench.sigma import SETTINGS, Measured
from fastddpm import checkpoints
from fastddpm.core.schedule import Schedule
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import images
from tests.support import check

SIDE = 28
N = 6


def saved(folder, seed=0, **config):
    torch.manual_seed(seed)
    grey = {"sample_size": SIDE, "in_channels": 1, "out_channels": 1}
    net = UNet2D(**check.TINY | grey | config)
    checkpoints.save(folder, net.config, net.state_dict(), Schedule(num_train_timesteps=4, beta_end=0.4))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return frechet.Classifier().eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the samples, four per file."""
    monkeypatch.setattr(sigma, "BATCH", 4)
    return tmp_path / "drawn"


def sampler(folder, **options):
    return Sampler.from_pretrained(folder, device="cpu", precision="fp32", **options)


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE), np.uint8)


# Drawing


def test_samples_of_every_setting_are_drawn_once(tiny, folder):
    drawer = sampler(tiny)
    sigma.draw(drawer, folder, N, seed=3, steps=3)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.npz")}
    assert names == {f"{name}/{part}.npz" for name in SETTINGS for part in ("00000-00003", "00004-00005")}
    for name, options in (
        ("full", {}),
        ("half", {"noise": 0.5}),
        ("none", {"noise": False}),
        ("ddim", {"sampler": "ddim"}),
        ("unclipped", {"sampler": "ddim"}),
    ):
        by = sampler(tiny)
        by.schedule = replace(by.schedule, clip_sample=name != "unclipped")
        draw = partial(by.sample, seed=3, steps=3, output="uint8", progress=False, **options)
        parts = [draw(range(4)), draw((4, 5))]
        assert np.array_equal(sigma.load(folder, name, N), torch.cat(parts)[..., 0].numpy())
    drawn = [sigma.load(folder, name, N) for name in SETTINGS]
    assert all((one != other).any() for i, one in enumerate(drawn) for other in drawn[:i])

    marked = folder / "half" / "00000-00003.npz"
    images.save_npz(np.zeros((4, SIDE, SIDE, 1), np.uint8), marked)
    (folder / "none" / "00004-00005.npz").unlink()
    sigma.draw(drawer, folder, N, seed=3, steps=3)
    assert not sigma.load(folder, "half", N)[:4].any()  # was there, and was not drawn again
    assert np.array_equal(sigma.load(folder, "none", N), drawn[2])


def test_parts_make_up_all_samples(tiny, folder):
    made = []
    for k in (1, 2, 3):
        sigma.draw(sampler(tiny), folder, N, part=(k, 3))
        made.append(set(folder.rglob("*.npz")) - set().union(*made))
    assert [len(part) for part in made] == [4, 3, 3]
    sigma.draw(sampler(tiny), folder.with_name("alone"), N)
    for name in SETTINGS:
        assert np.array_equal(sigma.load(folder, name, N), sigma.load(folder.with_name("alone"), name, N))


def test_samples_with_other_settings_are_rejected(tiny, folder, tmp_path):
    sigma.draw(sampler(tiny), folder, 1)
    other = saved(tmp_path / "other", seed=1)
    for drawer, options, what in (
        (sampler(tiny), {"seed": 1}, "seed"),
        (sampler(tiny), {"steps": 2, "seed": 1}, "seed, steps"),
        (sampler(other), {}, "model"),
        (Sampler.from_pretrained(tiny, device="cpu", precision="bf16"), {}, "precision"),
    ):
        message = check.error_line(sigma.draw, drawer, folder, 1, **options)
        assert message == f"{folder} has samples of another {what}; choose another folder for --samples"
    sigma.draw(sampler(tiny), folder, 1)


def test_model_with_another_shape_is_rejected(tmp_path, folder):
    drawer = sampler(saved(tmp_path / "other", sample_size=16))
    message = check.error_line(sigma.draw, drawer, folder, 1)
    assert message == "the model's samples are (1, 16, 16); want (1, 28, 28) for the classifier"
    assert not folder.exists()


# Measuring


def test_mean_distance_is_over_all_pairs():
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    value, error = sigma.pairwise(x)
    assert abs(value - float(torch.pdist(x.double()).mean())) <= 1e-6 * value
    rows = torch.stack([(x.double() - row).norm(dim=1).sum() / 39 for row in x.double()])
    assert abs(error - 2 * float(rows.std()) / math.sqrt(40)) <= 1e-6 * error
    assert sigma.pairwise(torch.ones(5, 3))[0] <= 1e-6


def test_standard_error_matches_repeated_draws():
    """The estimate from 400 sets has a relative standard deviation of 1/28; the mean of the errors far less."""
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([sigma.pairwise(torch.randn(100, 8, generator=generator)) for _ in range(400)])
    spread, error = float(found[:, 0].std()), float(found[:, 1].mean())
    assert abs(error / spread - 1) <= 5 / math.sqrt(2 * 399)


def test_entropy_of_the_classes():
    def of(classes):
        return Measured("", (0, 0), (0, 0), (0, 0), classes).entropy

    assert of([0, 7, 0]) == 0
    assert of([5] * 8 + [0, 0]) == 3
    assert abs(of([1, 3]) - (2 - 0.75 * math.log2(3))) <= 1e-12


def test_every_set_is_measured_like_the_real_images(classifier):
    real = pictures(40)
    same = np.repeat(real[:1], 9, 0)
    full, none, last = sigma.measure_all({"full": pictures(9, 1), "none": same}, real, classifier, splits=3)
    assert [one.name for one in (full, none, last)] == ["with σ_t z", "without σ_t z", "real images"]
    of_real = frechet.features(classifier, real)
    for one, of_these in ((full, pictures(9, 1)), (none, same)):
        distances = frechet.compare(frechet.features(classifier, of_these), of_real, splits=3)
        # the features' last bits depend on how memory is aligned
        assert one.distance == pytest.approx((np.mean(distances.samples), np.std(distances.samples, ddof=1)))
    assert last.distance[0] == pytest.approx(np.mean(distances.real))
    in_pixels = torch.pdist(torch.from_numpy(pictures(9, 1)).double().flatten(1) / 255).mean()
    assert full.in_pixels[0] == pytest.approx(float(in_pixels))
    assert none.in_pixels[0] <= 1e-6 < 1 < last.in_pixels[0]
    assert none.in_features[0] <= 1e-5 < full.in_features[0]
    assert [sum(one.classes) for one in (full, none, last)] == [9, 9, 9]
    assert none.entropy == 0


# Showing


def test_table_is_markdown():
    one = Measured("with σ_t z", (12.345, 0.67), (8.0, 0.0123), (0.5, 0.0), [4, 4])
    other = Measured("real images", (1234.5, 67.8), (8.0, 9.9), (0.5, 0.1), [8])
    assert sigma.markdown([one, other]).splitlines() == [
        "| images | Fréchet distance | distance of two: features | pixels | classes |",
        "|---|--:|--:|--:|--:|",
        "| with σ_t z | 12.35 ± 0.67 | 8.000 ± 0.012 | 0.5 | 1.00 bits |",
        "| real images | 1234 ± 68 | 8.0 ± 9.9 | 0.50 ± 0.10 | 0.00 bits |",
    ]


@pytest.mark.parametrize("n", [1, 64, 70])
def test_picture_shows_the_images_pixel_by_pixel(n, tmp_path):
    sets = [("one", pictures(n)), ("two\nlines $σ_t$", pictures(n, 1))]
    sigma.picture(sets, tmp_path / "grids.png")
    with Image.open(tmp_path / "grids.png") as image:
        shown = np.asarray(image.convert("L"))
    tiled = [images.grid(drawn[:64, ..., None], width=448)[..., 0] for _, drawn in sets]
    height, width = tiled[0].shape
    for i, grid in enumerate(tiled):
        left = 12 + i * (width + 12)
        # a grey level becomes one of matplotlib's 256 and back
        assert np.abs(shown[-12 - height : -12, left : left + width].astype(int) - grid).max() <= 1
    above = shown[: -12 - height]
    assert (above < 100).any()
    assert (above[0] == 255).all()


# The command


@pytest.fixture
def files(tmp_path, monkeypatch, classifier):
    """data.npz and classifier.pt in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sigma, "BATCH", 4)
    labels = np.arange(20) % 10
    np.savez("data.npz", x_train=pictures(20), y_train=labels, x_test=pictures(10, 1), y_test=labels[:10])
    torch.save(classifier.state_dict(), "classifier.pt")
    return tmp_path


def test_command_draws_measures_and_shows(tiny, files, capsys):
    run = ["data.npz", "--num-samples", str(N), "--samples", "drawn", "--checkpoint", tiny, "--steps", "2"]
    evaluate = ["--classifier", "classifier.pt", "--out", "docs/sigma.png", "--splits", "2", "--device", "cpu"]
    sigma.main([*run, *evaluate, "--part", "1/2"])
    assert capsys.readouterr().out == ""
    assert len(list((files / "drawn").rglob("*.npz"))) == 5
    assert not (files / "docs").exists()

    sigma.main([*run, *evaluate])
    out = capsys.readouterr().out
    found = json.loads((files / "docs/sigma.json").read_text())
    assert {name: found[name] for name in ("num_samples", "seed", "steps")} == {"num_samples": N, "seed": 0, "steps": 2}
    assert [one["name"] for one in found["images"]] == [title for *_, title in SETTINGS.values()] + ["real images"]
    table = sigma.markdown(
        [Measured(**{key: value for key, value in one.items() if key != "entropy"}) for one in found["images"]]
    )
    assert out == f"{table}\n\n6 images each; wrote docs/sigma.png and docs/sigma.json\n"
    with Image.open(files / "docs/sigma.png") as image:
        assert image.width > 3 * 28 * 8

    pages = {path: path.read_bytes() for path in (files / "docs").iterdir()}
    sigma.main([*run, *evaluate])
    assert capsys.readouterr().out == out
    assert {path: path.read_bytes() for path in (files / "docs").iterdir()} == pages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.npz"], "cannot load no.npz"),
        (["data.npz", "--num-samples", "1"], "--num-samples is 1; want at least 2"),
        (["data.npz", "--num-samples", "11"], "there are 11 samples; want 2 to 10, half of the 20 real images"),
        (["data.npz", "--steps", "5"], "steps is 5; want a whole number from 1 to 4"),
        (["data.npz", "--splits", "1"], "splits is 1; want at least 2: a single distance has no standard deviation"),
        (["data.npz", "--out", "a.json"], "the picture and the measures would both be a.json; choose another"),
        (["data.npz", "--part", "3/2"], "'3/2' is not a share K/N with 1 <= K <= N, such as 1/4"),
        (["data.npz", "--part", "half"], "'half' is not a share K/N with 1 <= K <= N, such as 1/4"),
        (["data.npz", "--checkpoint", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_invalid_input_is_one_line_and_exit_status_2(arguments, message, tiny, files, capsys):
    given = {"--num-samples": "2", "--samples": "drawn", "--checkpoint": tiny, "--classifier": "classifier.pt"}
    defaults = [part for name, value in given.items() if name not in arguments for part in (name, value)]
    with pytest.raises(SystemExit) as exit_:
        sigma.main([*arguments, *defaults, "--device", "cpu"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m bench.sigma: error: ")
    assert message in error


def test_help_explains_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        sigma.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for taught in ("--part K/N", "--samples FOLDER", "example:", "continues"):
        assert taught in text
