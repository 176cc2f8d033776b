"""fastddpm fid: every kind of set, the cache, statistics, and what the command prints."""

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastddpm.cli.main import main
from fastddpm.evaluate import features
from fastddpm.evaluate import fid as module
from fastddpm.evaluate.features import load_extractor
from fastddpm.evaluate.fid import Statistics, fid
from fastddpm.evaluate.frechet import bootstrap, frechet_distance, gaussian_distance, moments
from fastddpm.storage import shards
from fastddpm.storage.files import atomic
from tests.support.check import error_line

N, M = 40, 30
LARGEST = np.longdouble(np.finfo(np.float64).max)


class Net(nn.Module):
    """Five features: the mean of each channel, and two pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x[:, 0, :2, 1]], 1)


def pictures(n, seed, shape=(6, 5, 3)):
    random = np.random.default_rng(seed)
    return (random.integers(0, 200, (n, *shape)) + random.integers(0, 50 + seed, (n, 1, 1, 1))).astype(np.uint8)


A, B = pictures(N, 0), pictures(M, 5)


def seen(images) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return Net()((x - 128) / 128)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of the test, with a network, which runs in this process, and two sets; the cache is in it, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_extractor", load_extractor)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cached"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Net()), "net.pt")
    np.savez("a.npz", A)
    np.savez("b.npz", B)
    return tmp_path


def pack_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.name)


def measure(a="a.npz", b="b.npz", **options):
    defaults = {"features": "net.pt", "input_size": 0, "device": "cpu", "progress": False, "replicates": 0}
    return fid(a, b, **defaults | options)


def kept(folder="cached/fastddpm/fid"):
    return sorted(Path(folder).glob("*"))


@pytest.fixture
def runs(monkeypatch):
    """The number of images of each set that went through a network."""
    counts, extract = [], module.extract

    def counted(*args, **kwargs):
        found = extract(*args, **kwargs)
        counts.append(len(found))
        return found

    monkeypatch.setattr(module, "extract", counted)
    return counts


# The distance


def test_the_distance_is_that_of_the_features(here):
    found = measure(replicates=4, seed=3)
    assert found.distance == pytest.approx(frechet_distance(seen(A), seen(B)), rel=1e-4)  # rounding of batches
    known = [Statistics.load(path) for path in found.statistics]
    assert found.distance == frechet_distance(known[0].features, known[1].features)
    want = bootstrap(known[0].features, known[1].features, replicates=4, seed=3, progress=False).std()
    assert found.error == float(want)
    assert found.counts == (N, M)
    assert found.dimension == 5
    assert found.extractor == "net.pt"
    assert found.notes == ()


def test_bundled_classifier_is_the_default(here):
    garments = [pictures(3, seed, (28, 28, 1)) for seed in (0, 1)]
    for name, images in zip("ab", garments, strict=True):
        np.savez(f"{name}.npz", images)
    found = fid("a.npz", "b.npz", device="cpu", replicates=0, progress=False)
    a, b = map(load_extractor(device="cpu"), garments)
    assert found.distance == frechet_distance(a, b)
    assert (found.extractor, found.dimension) == ("fashion-mnist", 128)
    line = error_line(fid, "a.npz", "net.pt", device="cpu", progress=False)
    assert "net.pt" in line


def test_distance_of_a_set_to_itself_is_0(here):
    assert measure("a.npz", "a.npz").distance <= 1e-12
    assert measure("a.npz", "a.npz").distance >= 0


def test_every_kind_of_set_gives_the_same_distance(here):
    want = measure().distance
    np.savez("both.npz", x_train=A, x_test=B)
    shutil.copy("both.npz", "with:colon.npz")
    header = struct.pack(f">BBBB{B.ndim}I", 0, 0, 8, B.ndim, *B.shape)
    Path("b-idx4").write_bytes(header + B.tobytes())
    Path("b-idx4.gz").write_bytes(gzip.compress(header + B.tobytes()))
    Path("folder").mkdir()
    for i, image in enumerate(B):
        Image.fromarray(image).save(f"folder/{i:03d}.png")
    shutil.copytree("folder", "x.npz:folder")
    shutil.make_archive("archive", "zip", "folder")
    pack_tar("archive.tar", sorted(Path("folder").iterdir()))
    np.save("b.npy", B)
    names = ["both.npz:x_test", "with:colon.npz:x_test", "b-idx4", "b-idx4.gz", "folder", "x.npz:folder", "b.npy"]
    not_utf8 = os.fsdecode(b"\xe9.npy")
    shutil.copy("b.npy", not_utf8)
    for b in (*names, "archive.zip", "archive.tar", not_utf8):
        assert measure(b=b).distance == want, ascii(b)
    assert measure("both.npz:x_train", "both.npz:x_test").distance == want
    assert measure("both.npz", "both.npz:x_test").distance == want


@pytest.mark.parametrize("kind", ["npz", "png", "webdataset"])
def test_a_finished_job_is_a_set(kind, here, monkeypatch):
    manifest = {"format": kind, "samples": f"0-{M - 1}", "shard_size": 8, "class_labels": None, "shape": [3, 6, 5]}
    samples = shards.ShardFolder("samples", manifest)
    samples.begin()
    parts = [B[start : start + 8] for start in range(0, M, 8)]
    for k, part in enumerate(parts[:-1]):
        samples.write(k, part)
    done = f"{M - len(parts[-1])} of its {M} samples"
    want = f"samples holds {done}; rerun the command that wrote them to draw the others"
    with monkeypatch.context() as patched:
        patched.setattr(module, "extract", None)  # the error comes before a network sees an image
        assert error_line(measure, "samples") == want
    samples.write(len(parts) - 1, parts[-1])
    assert measure(b="samples").distance == pytest.approx(measure().distance, rel=1e-4)
    assert measure(b="samples").counts == (N, M)
    file = next(file for file in sorted(Path("samples").iterdir()) if file.suffix in (".npz", ".png", ".tar"))
    file.write_bytes(file.read_bytes() + b"x")
    assert "is damaged" in error_line(measure, b="samples")


def test_a_job_inside_the_named_folder_raises(here):
    manifest = {"format": "png", "samples": "0-3", "shard_size": 2, "class_labels": None, "shape": [3, 6, 5]}
    samples = shards.ShardFolder("all/run", manifest)
    samples.begin()
    samples.write(0, B[:2])
    want = "all holds a folder that `fastddpm sample` wrote, all/run; name that one"
    assert error_line(measure, b="all") == want


def test_a_set_that_changes_meanwhile_raises_and_is_not_cached(here, monkeypatch):
    extract = module.extract

    def changing(*args, **kwargs):
        found = extract(*args, **kwargs)
        np.savez("b.npz", B[::-1])
        return found

    np.savez("b.npz", B)
    measure()
    before = kept()
    np.savez("b.npz", np.roll(B, 1, 0))
    monkeypatch.setattr(module, "extract", changing)
    assert error_line(measure).startswith("b.npz was changed while it was read; ")
    assert kept() == before


@pytest.mark.parametrize("size", [7, None])
def test_images_are_read_in_batches(here, monkeypatch, size):
    sizes = []
    stream = module.datasets.stream_images

    def noting(*args, batch, **options):
        sizes.append(batch)
        return stream(*args, batch=batch, **options)

    monkeypatch.setattr(module.datasets, "stream_images", noting)
    measure(batch_size=size)
    assert sizes == [size or 256] * 2


def test_images_of_several_sizes_are_resized_one_by_one(here):
    """Also where grey images are among coloured ones, and the sizes change within a batch."""
    sizes = [(6, 5), (4, 9), (6, 5), (12, 3)]
    images = [pictures(1, i, (*size, 1 if i == 2 else 3))[0] for i, size in enumerate(sizes)]
    Path("folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(f"folder/{i}.png")
    extractor = load_extractor("net.pt", device="cpu", input_size=8)
    want = moments(torch.cat([extractor(image[None]) for image in images]))
    for batch_size in (None, 3, 1):
        found = Statistics.load(measure("folder", input_size=8, batch_size=batch_size).statistics[0])
        torch.testing.assert_close((found.mu, found.sigma), want, rtol=1e-6, atol=1e-7)


def test_images_of_several_sizes_as_they_are_raise_if_their_features_differ(here):
    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Pixels()), "net.pt")
    Path("folder").mkdir()
    for i, size in enumerate([(6, 5), (4, 9)]):
        Image.fromarray(pictures(1, i, (*size, 3))[0]).save(f"folder/{i}.png")
    want = "net.pt returns 90 features of some images and 108 of others; see --input-size"
    assert error_line(measure, "folder") == want
    assert not kept()


def test_numbers_may_be_numpys(here):
    whole = {"batch_size": 7, "replicates": 3, "seed": 5, "input_size": 6}
    assert measure(**whole) == measure(**{name: np.int64(value) for name, value in whole.items()})


def test_samples_that_are_not_pictures_raise(here):
    manifest = {"format": "npz", "samples": "0-2", "shard_size": 3, "class_labels": None, "shape": [2]}
    samples = shards.ShardFolder("samples", manifest)
    samples.begin()
    samples.write(0, np.zeros((3, 2), np.float32))
    assert error_line(measure, b="samples") == "samples holds [2] float32; want pictures, uint8 [H, W, C]"


# The cache


def test_network_sees_a_set_only_once(here, runs):
    first = measure(replicates=3)
    assert runs == [N, M]
    assert kept() == sorted(path.relative_to(here) for path in first.statistics)
    assert measure(replicates=3) == first
    assert measure("b.npz", "a.npz").distance == pytest.approx(first.distance, rel=1e-12)
    Path("a.npz").rename("renamed.npz")
    assert measure("renamed.npz", replicates=3) == first
    assert runs == [N, M]


def test_cache_depends_on_options_and_content(here, runs):
    first = measure()
    for options in ({"scale": "unit"}, {"input_size": 9}):
        assert measure(**options).distance != first.distance
    assert runs == [N, M] * 3
    changed = A.copy()
    changed[-1, -1, -1] ^= 255
    np.savez("a.npz", changed)
    assert measure().distance != first.distance
    assert runs[6:] == [N]
    np.savez("a.npz", x_train=A, x_test=changed)
    assert measure("a.npz:x_test").distance != measure("a.npz").distance
    assert measure("a.npz:x_train").distance == measure("a.npz").distance
    assert runs[7:] == [N, N]


def test_pictures_in_another_order_are_another_set(here, runs):
    """Features are kept in the order of the files, so a file that is added or renamed counts."""
    Path("folder").mkdir()
    for i in range(3):
        Image.fromarray(A[i]).save(f"folder/{i}.png")
    measure("folder")
    Path("folder/2.png").rename("folder/3.png")
    measure("folder")
    Image.fromarray(A[3]).save("folder/2.png")
    measure("folder")
    assert runs == [3, M, 3, 4]


def test_another_network_of_the_same_name_is_another_extractor(here, runs):
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 0, 0]

    measure()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Other()), "net.pt")
    assert measure().dimension == 3
    assert runs == [N, M] * 2


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "text", "other"])
def test_damaged_statistics_are_computed_again(here, runs, damage):
    first = measure()
    path = first.statistics[0]
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "other":
        np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    else:
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"truncate": whole[:-50], "empty": b"", "flip": flipped, "text": b"text"}[damage])
    assert measure() == first
    assert runs == [N, M, N]
    assert measure() == first
    assert runs == [N, M, N]


def test_cache_folder_can_be_chosen(here, runs, monkeypatch):
    found = measure(cache="elsewhere")
    assert [Path("elsewhere") / path.name for path in found.statistics] == list(found.statistics)
    assert len(kept("elsewhere")) == 2
    assert not kept()
    assert measure(cache=False).statistics == (None, None)
    assert runs == [N, M] * 2
    assert not kept()
    measure(cache=True)
    assert len(kept()) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(here / "home"))
    assert module.cache_folder() == here / "home" / ".cache" / "fastddpm" / "fid"


def test_a_cache_that_cannot_be_written_warns(here, runs):
    Path("taken").touch()
    with pytest.warns(
        UserWarning, match=r"^the statistics of [ab]\.npz are not kept: .*; name another folder"
    ) as warned:
        found = measure(cache="taken")
    assert [each.filename for each in warned] == [__file__] * 2
    assert found.statistics == (None, None)
    assert found.distance == measure(cache=False).distance


@pytest.mark.parametrize("net", ["nothing", "beyond"])
def test_nothing_of_an_extractor_that_fails_is_cached(here, net):
    class Wrong(nn.Module):
        def __init__(self, empty: bool):
            super().__init__()
            self.empty = empty

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :0] if self.empty else x.flatten(1)[:, :4].double() * 1e300

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Wrong(net == "nothing")), "net.pt")
    line = error_line(measure)
    assert line.startswith("net.pt returns [40, 0] float32" if net == "nothing" else "net.pt returns numbers beyond")
    assert not kept()


def test_a_cache_never_replaces_what_is_read(here):
    """Nor does it wait for a pipe."""
    file = measure().statistics[0]
    file.unlink()
    file.symlink_to(here / "a.npz")
    before = Path("a.npz").read_bytes()
    want = f"the cache is {file}, which the command reads from (a.npz); name another file"
    assert error_line(measure) == want
    assert Path("a.npz").read_bytes() == before
    file.unlink()
    os.mkfifo(file)
    assert error_line(measure) == f"{file} is a pipe or a device; want a file"


def test_a_cache_deletes_what_killed_runs_left(here):
    """Also for other sets, but no files of others, and none that are being written."""
    measure(cache="elsewhere")
    here = Path("elsewhere")
    for file in kept("elsewhere"):
        file.unlink()
    dead = [f".{'0' * 32}.npz.{slot}.fastddpm-tmp" for slot in ("0", "3", "00ff00ff00ff00ff")]
    others = [".mine.npz.0.fastddpm-tmp", f".{'0' * 32}.npz.tmp"]
    for name in (*dead, *others):
        (here / name).touch()
    with atomic(here / f"{'1' * 32}.npz"):
        writing = next(here.glob(f".{'1' * 32}.npz.*")).name
        measure(cache="elsewhere")
        left = [file.name for file in kept("elsewhere") if file.name[0] == "."]
        assert sorted(left) == sorted([*others, writing])


# Statistics


def test_statistics_have_the_usual_names(here):
    found = measure()
    mu, sigma = moments(seen(A))
    with np.load(found.statistics[0], allow_pickle=False) as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["mu"], mu, atol=1e-6)
        np.testing.assert_allclose(file["sigma"], sigma, atol=1e-6)
        np.testing.assert_allclose(file["features"], seen(A), atol=1e-6)
        assert file["count"] == N


def test_statistics_without_features_are_taken_as_exact(here):
    mu, sigma = moments(seen(A))
    np.savez("stats.npz", mu=mu, sigma=sigma)
    found = measure("stats.npz", replicates=4)
    known = Statistics.load(found.statistics[1])
    assert found.distance == gaussian_distance(mu, sigma, known.mu, known.sigma)
    want = bootstrap((mu, sigma), known.features, replicates=4, progress=False).std()
    assert found.error == float(want)
    assert found.counts == (None, M)
    assert found.notes == ("A is a mean and a covariance alone, taken as exactly known",)
    assert found.statistics[0] == Path("stats.npz")
    both = measure("stats.npz", "stats.npz", replicates=4)
    assert both.error is None
    assert both.extractor is None
    assert len(both.notes) == 2


def test_statistics_of_two_files_need_no_network(here, monkeypatch):
    found = measure(replicates=4)
    monkeypatch.setattr(module, "load_extractor", None)
    a, b = map(str, found.statistics)
    again = fid(a, b, replicates=4, progress=False)
    assert (again.distance, again.error, again.counts) == (found.distance, found.error, (N, M))


def test_sets_of_different_extractors_raise(here):
    one, other = measure().statistics, measure(scale="unit").statistics
    line = error_line(fid, str(one[0]), str(other[1]), progress=False)
    assert line.endswith("have features of different extractors; compare sets by one extractor")
    line = error_line(measure, str(other[0]))
    assert line.startswith(f"{other[0]} has features of another extractor than net.pt, or of other options; compare")
    np.savez("three.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert error_line(measure, "three.npz") == "three.npz has 3 features, b.npz has 5; compare sets by one extractor"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "has mu [3] and sigma [2, 2]; want [D] and [D, D], D >= 1"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, "has mu [1, 3] and sigma [3, 3]"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "has mu [0] and sigma [0, 0]"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) * np.nan}, "has a mu or a sigma that is not finite"),
        ({"mu": np.full(3, np.inf), "sigma": np.eye(3)}, "has a mu or a sigma that is not finite"),
        ({"mu": np.full(3, 10 * LARGEST), "sigma": np.eye(3)}, "has a mu or a sigma that is not finite"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "has mu [1] <U1; want real numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) * (1 + 1j)}, "has sigma [3, 3] complex128; want real numbers"),
        ({"mu": np.zeros(3, bool), "sigma": np.eye(3)}, "has mu [3] bool; want real numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 4.5}, "has count [] float64; want a whole number"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": [4, 5]}, "has count [2] int64; want a whole number"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "extractor": 3}, "has extractor [] int64; want a string"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "mu holds Python objects, which are not loaded because"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((4, 3))}, "has features [4, 3]; want [None, 3]"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "has a sigma that is not a covariance"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "has a sigma that is not a covariance"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": -5}, "has count -5; want the number of images, at least 2"),
        (
            {"mu": np.zeros(1), "sigma": np.eye(1), "count": 2, "features": np.full((2, 1), np.nan)},
            "has features that are not finite",
        ),
    ],
)
def test_wrong_statistics_raise(here, arrays, message):
    np.savez("stats.npz", **arrays)
    line = error_line(measure, "stats.npz", "stats.npz")
    assert message in line
    assert "allow_pickle" not in line


@pytest.mark.parametrize("name", ["mu", "sigma", "features"])
def test_statistics_that_are_not_those_of_their_features_raise(here, name):
    found = measure().statistics[0]
    with np.load(found) as file:
        arrays = dict(file)
    arrays[name].flat[0] += 1e-6 * np.abs(arrays[name]).max()
    np.savez("edited.npz", **arrays)
    want = "edited.npz has a mu or a sigma that is not that of its features"
    assert error_line(fid, "edited.npz", "edited.npz", progress=False).startswith(want)
    del arrays["features"]
    if name == "mu":
        np.savez("edited.npz", **arrays)
        assert fid("edited.npz", "edited.npz", progress=False).distance == 0


def test_rounding_below_0_is_taken_for_0(here):
    mu, sigma = moments(seen(A))
    sigma[2], sigma[:, 2] = 0, 0
    np.savez("zero.npz", mu=mu, sigma=sigma)
    sigma[2, 2] = -1e-14
    np.savez("below.npz", mu=mu, sigma=sigma)
    assert measure("below.npz").distance == pytest.approx(measure("zero.npz").distance, rel=1e-9)


def test_statistics_are_not_unpacked_before_their_headers_are_checked(here):
    """Features that claim to be 4 GB are refused for their shape."""
    np.savez_compressed("bomb.npz", mu=np.zeros(3), sigma=np.eye(3), count=4)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**3)})
    with zipfile.ZipFile("bomb.npz", "a", zipfile.ZIP_DEFLATED) as archive, archive.open("features.npy", "w") as file:
        file.write(header.getvalue() + bytes(10**6))
    name = b"features.npy"
    content = bytearray(Path("bomb.npz").read_bytes())
    claimed = struct.pack("<I", 4 * 10**9 + len(header.getvalue()))
    size_at = content.rindex(b"PK\1\2", 0, content.rindex(name)) + 24
    content[size_at : size_at + 4] = claimed
    Path("bomb.npz").write_bytes(content)
    assert error_line(measure, "bomb.npz").endswith("bomb.npz has features [1000000, 1000]; want [4, 3], count and D")


# Limits and errors


def test_a_singular_covariance_is_noted(here):
    for n, notes in ((5, 1), (6, 0)):
        np.savez("few.npz", A[:n])
        assert len(measure("few.npz").notes) == notes
    np.savez("few.npz", A[:5])
    want = "B has 5 images for 5 features: its covariance is singular, and the distance strongly biased upwards"
    assert measure(b="few.npz").notes == (want,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": "one.npz"}, "one.npz holds 1 image; want at least 2, better thousands"),
        ({"a": "absent.npz"}, "cannot read absent.npz: No such file or directory"),
        ({"a": "a.npz:x_test"}, "cannot load a.npz as .npz: it holds arr_0, but no x_test"),
        ({"replicates": 1}, "replicates is 1; want 0, or at least 2, which have a standard deviation"),
        ({"replicates": -2}, "replicates is -2; want 0, or at least 2"),
        ({"replicates": 10**23}, "replicates is 100000000000000000000000; want a whole number from 0 to 1000000"),
        ({"batch_size": 2.5}, "batch_size is 2.5; want a whole number, at least 1"),
        ({"progress": 0}, "progress is 0; want True or False"),
        ({"seed": -1}, "seed is -1; want a whole number, 0 <= seed < 2^64"),
        ({"seed": 1 << 64}, "want a whole number, 0 <= seed < 2^64"),
        ({"features": "absent.pt"}, "there is no file absent.pt"),
        ({"batch_size": 0}, "batch_size is 0; want a whole number, at least 1"),
        ({"a": 0}, "a is 0; want a path, that of images or of an .npz with statistics"),
        ({"b": "x\0"}, "b is 'x\\x00', which cannot be the name of a file; name another"),
        ({"cache": 0}, "cache is 0; want a folder, True or False"),
        ({"cache": "x\0"}, "cache is 'x\\x00', which cannot be the name of a file; name another"),
        ({"seeed": 0}, "fid: there is no argument 'seeed'; did you mean 'seed'?; want a, b, features"),
    ],
)
def test_wrong_arguments_raise(here, options, message):
    np.savez("one.npz", A[:1])
    assert message in error_line(measure, **options)


# The command


COMMAND = ["fid", "a.npz", "b.npz", "--features", "net.pt", "--input-size", "0", "--device", "cpu"]


def test_command_prints_the_result(here, capsys):
    want = measure(replicates=20)
    assert main([*COMMAND, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"Fréchet distance {want.distance:.6g} ± {want.error:.2g} (standard error, 20 replicates)",
        f"A: {N} images of a.npz, statistics in {want.statistics[0]}",
        f"B: {M} images of b.npz, statistics in {want.statistics[1]}",
        "features: 5 of net.pt",
    ]
    assert err == ""
    assert main([*COMMAND, "--bootstrap", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"Fréchet distance {want.distance:.6g}"


def test_command_passes_every_option(here, capsys):
    options = ["--scale", "unit", "--bootstrap", "3", "--seed", "7", "--batch-size", "9", "--cache", "other", "--quiet"]
    assert main([*COMMAND, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    want = measure(scale="unit", replicates=3, seed=7, batch_size=9, cache="other")
    assert found == {
        "distance": want.distance,
        "error": want.error,
        "counts": [N, M],
        "dimension": 5,
        "extractor": "net.pt",
        "statistics": [str(path) for path in want.statistics],
        "notes": [],
        "a": "a.npz",
        "b": "b.npz",
        "bootstrap": 3,
        "seed": 7,
    }
    assert not kept()
    assert main([*COMMAND, "--no-cache", "--quiet"]) == 0
    assert not kept()
    assert "statistics in" not in capsys.readouterr().out


def test_command_prints_notes(here, capsys):
    mu, sigma = moments(seen(A))
    np.savez("a.npz", mu=mu, sigma=sigma)
    np.savez("b.npz", B[:4])
    assert main([*COMMAND, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "A: a.npz, statistics in a.npz"
    assert [line.split()[1] for line in lines if line.startswith("note: ")] == ["A", "B"]


def test_command_shows_progress(here, capfd):
    assert main(COMMAND) == 0
    err = capfd.readouterr().err
    assert "image/s" in err
    assert "bootstrap" in err
    assert f"a.npz: {N} images go through net.pt\n" in err
    assert main(COMMAND) == 0
    assert "go through" not in capfd.readouterr().err  # the statistics are kept


def test_command_says_first_what_will_take_minutes(here, monkeypatch, capfd):
    monkeypatch.setattr(module, "INCEPTION_PER_S", N / 300 / torch.get_num_threads())
    monkeypatch.setattr(module, "_MANY_FEATURES", 5)
    command = [word for word in COMMAND if word not in ("--input-size", "0")]
    assert main([*command, "--bootstrap", "3"]) == 0
    err = capfd.readouterr().err
    assert f"a.npz: {N} images go through net.pt; if that is an Inception network, it takes about 5 minutes" in err
    assert "the standard error takes 3 replicates with 5 features, of some seconds each; without" in err


def test_command_errors_are_one_line(here, capsys):
    assert main(["fid", "a.npz", "b.npz", "--quiet"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "fastddpm: error: fashion-mnist takes grey images of 28x28, but these are 5x6 with 3 channels"
    )
    with pytest.raises(SystemExit):
        main(["fid", "a.npz", "b.npz", "--cache", "x", "--no-cache"])
    with pytest.raises(SystemExit):
        main(["fid", "a.npz", "b.npz", "--scale", "half"])
    capsys.readouterr()
    assert main(["fid", "a.npz", "b.npz", "--cache", "", "--quiet"]) == 2
    assert capsys.readouterr().err == "fastddpm: error: cache is ''; want a folder, True or False\n"


def test_help_names_the_default_extractor(here, capsys):
    with pytest.raises(SystemExit):
        main(["fid", "--help"])
    text = capsys.readouterr().out
    assert f"default: {features.SHIPPED_CLASSIFIER}, the bundled classifier" in " ".join(text.split())
    assert "The distance is biased upwards" in text
