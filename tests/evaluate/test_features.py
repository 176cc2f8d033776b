"""Extractors: the bits that a network is given, what it may return, and the errors."""

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastddpm.evaluate import features
from fastddpm.evaluate.features import SCALES, extract, load_extractor, resize, shipped_classifier
from tests.support.check import error_line


def pictures(n=5, h=4, w=6, c=3):
    return np.random.default_rng(7).integers(0, 256, (n, h, w, c), np.uint8)


def saved(net: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(net), path)
    return path


class AsGiven(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float()


class Shape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.shape[1:]).expand(len(x), 3).float()


class Returns(nn.Module):
    """Returns [N, 2, 1, 1], or another shape, dtype or value of it."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        found = x[:, :2, :1, :1]
        if self.kind == "flat":
            found = found.flatten(1)
        if self.kind == "map":
            found = x
        if self.kind == "one":
            found = found[:, 0, 0, 0]
        if self.kind == "whole":
            found = found.flatten(1).long()
        if self.kind == "fewer":
            found = found.flatten(1)[1:]
        if self.kind == "double":
            found = found.flatten(1).double()
        if self.kind == "none":
            found = found.flatten(1)[:, :0]
        if self.kind == "sparse":
            found = found.flatten(1).to_sparse()
        if self.kind == "complex":
            found = torch.complex(found, found).flatten(1)
        if self.kind == "beyond":
            found = found.flatten(1).double() * 1e300
        if self.kind == "nan":
            found = found.flatten(1) / 0 * 0
        if self.kind == "inf":
            found = found.flatten(1).abs() / 0 + 1 / 0
        return found


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2, :1, :1], x


class Listed(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :2, 0, 0], x]


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x[:, :2, 0, 0]}


class Nvidia(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img[:, :2, 0, 0].float() if return_features else img[:, :1, 0, 0].float()


class Trained(nn.Module):
    """Depends on its batch and on chance while it is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(x)).mean((2, 3))


def loaded(net, tmp_path, *, input_size=0, scale=None):
    return load_extractor(saved(net, tmp_path / "net.pt"), device="cpu", input_size=input_size, scale=scale)


# Resizing


def by_definition(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow 1's compute_interpolation_weights and compute_lerp, pixel by pixel, in the dtype of x."""
    number, (h, w) = x.dtype.type, x.shape
    out = np.full((height, width), np.nan, x.dtype)
    for i in range(height):
        for j in range(width):
            y, at = number(i) * (number(h) / number(height)), number(j) * (number(w) / number(width))
            top, left = int(y), int(at)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            above = x[top, left] + (x[top, right] - x[top, left]) * (at - number(left))
            below = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * (at - number(left))
            out[i, j] = above + (below - above) * (y - number(top))
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 6), (7, 5), (1, 1), (9, 3), (3, 9), (1, 8)])
@pytest.mark.parametrize("size", [(4, 6), (11, 13), (3, 2), (1, 1)])
def test_resize_has_the_bits_of_tensorflow(shape, size, dtype):
    x = (np.random.default_rng(1).random((2, 3, *shape)) * 255).astype(dtype)
    want = np.stack([[by_definition(channel, *size) for channel in image] for image in x])
    got = resize(torch.from_numpy(x), *size)
    assert got.dtype == torch.from_numpy(x).dtype
    assert np.array_equal(got.numpy(), want)


def test_resize_does_not_shift_or_smooth_and_repeats_the_last_pixel():
    x = torch.tensor([[0.0, 1.0]])
    assert resize(x, 1, 4).tolist() == [[0, 0.5, 1, 1]]
    assert resize(torch.arange(8.0)[None], 1, 2).tolist() == [[0, 4]]  # no smoothing


# The input of the network


@pytest.mark.parametrize(
    ("scale", "formula"),
    [
        (None, lambda x: (x - 128) / 128),
        ("fid", lambda x: (x - 128) / 128),
        ("unit", lambda x: x / 255),
        ("signed", lambda x: x / 127.5 - 1),
        ("bytes", lambda x: x),
    ],
)
@pytest.mark.parametrize("c", [1, 3, 4])
def test_network_gets_three_scaled_channels(scale, formula, c, tmp_path):
    images = pictures(c=c)
    got = loaded(AsGiven(), tmp_path, scale=scale)(images)
    want = formula((np.repeat(images, 3, axis=3) if c == 1 else images[..., :3]).astype(np.float32))
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), want.transpose(0, 3, 1, 2).reshape(5, -1))


def test_scale_bytes_gives_uint8(tmp_path):
    class Kind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 2), float(x.dtype == torch.uint8))

    assert loaded(Kind(), tmp_path, scale="bytes")(pictures()).all()
    assert not loaded(Kind(), tmp_path, scale="unit")(pictures()).any()


def test_images_are_resized_before_they_are_scaled(tmp_path):
    images = pictures()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    got = loaded(AsGiven(), tmp_path, input_size=9)(images)
    assert torch.equal(got, ((resize(x, 9, 9) - 128) / 128).flatten(1))
    got = loaded(AsGiven(), tmp_path, input_size=9, scale="bytes")(images)
    assert torch.equal(got, resize(x, 9, 9).round().flatten(1))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, [3, 299, 299]),
        ({"scale": "bytes"}, [3, 4, 6]),
        ({"input_size": 0}, [3, 4, 6]),
        ({"input_size": 5}, [3, 5, 5]),
        ({"input_size": 5, "scale": "bytes"}, [3, 5, 5]),
    ],
)
def test_images_are_resized_to_299_by_default(options, shape, tmp_path):
    extractor = load_extractor(saved(Shape(), tmp_path / "net.pt"), device="cpu", **options)
    assert extractor(pictures(2)).tolist() == [shape, shape]


def test_the_network_evaluates_without_gradients(tmp_path):
    extractor = loaded(Trained().train(), tmp_path, scale="unit")
    got = extractor(pictures())
    want = Trained().eval()(torch.from_numpy(pictures()).permute(0, 3, 1, 2) / 255)
    assert torch.equal(got, extractor(pictures()))
    torch.testing.assert_close(got, want.detach())
    assert not got.requires_grad


# The output of the network


@pytest.mark.parametrize("net", [Returns("flat"), Returns("square"), Returns("double"), Pair(), Listed(), Nvidia()])
def test_networks_may_return_features_in_several_shapes(net, tmp_path):
    got = loaded(net, tmp_path, scale="bytes" if isinstance(net, Nvidia) else "unit")(pictures())
    want = torch.from_numpy(pictures()[:, 0, 0, :2]).float()
    assert got.dtype == torch.float32
    assert torch.equal(got, want if isinstance(net, Nvidia) else want / 255)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Returns("map"), "returns [5, 3, 4, 6] float32 for 5 images; want features [5, D], D >= 1"),
        (Returns("one"), "returns [5] float32 for 5 images; want features [5, D], D >= 1"),
        (Returns("whole"), "returns [5, 2] int64 for 5 images; want features [5, D], D >= 1"),
        (Returns("fewer"), "returns [4, 2] float32 for 5 images; want features [5, D], D >= 1"),
        (Returns("none"), "returns [5, 0] float32 for 5 images; want features [5, D], D >= 1"),
        (Returns("sparse"), "returns [5, 2] float32 sparse_coo for 5 images; want features [5, D], D >= 1"),
        (Returns("complex"), "returns [5, 2] complex64 for 5 images; want features [5, D], D >= 1"),
        (Returns("beyond"), "returns numbers beyond float32; see --scale, or name another extractor"),
        (Named(), "returns dict for 5 images; want features [5, D], D >= 1"),
        (Returns("nan"), "returns NaN or infinity; see --scale, or name another extractor"),
        (Returns("inf"), "returns NaN or infinity; see --scale, or name another extractor"),
    ],
)
def test_output_that_is_not_features_raises(net, message, tmp_path):
    extractor = loaded(net, tmp_path)
    assert error_line(extractor, pictures()) == f"{tmp_path / 'net.pt'} {message}"


def test_error_of_a_network_names_its_input(tmp_path):
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(7, 7)

    line = error_line(loaded(Fails(), tmp_path), pictures())
    assert line.startswith(f"{tmp_path / 'net.pt'} fails on [5, 3, 4, 6] float32: ")
    assert "shape '[7, 7]' is invalid for input of size 360" in line
    assert line.endswith("; see --input-size and --scale")


# Loading


def test_bundled_classifier_uses_its_own_scale():
    images = pictures(3, 28, 28, 1)
    extractor = load_extractor(device="cpu")
    with torch.inference_mode():
        want = shipped_classifier().features(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    got = extractor(images)
    assert got.shape == (3, 128)
    assert torch.equal(got, want)
    assert (extractor.name, extractor.scale, extractor.size) == ("fashion-mnist", "signed", None)


def test_bundled_classifier_is_the_one_that_was_measured():
    """bench.frechet trained it, and the distances in docs/sigma.md were computed with it."""
    model = shipped_classifier()
    assert not model.training
    path = Path(features.__file__).parents[1] / "models/fashion-mnist-classifier/classifier.safetensors"
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "f5ae56d9b2f404cc43869e6575c3c592b06f9c22d27d971842dac44440449e71"
    )
    assert sum(x.numel() for x in model.parameters()) == 421_834


@pytest.mark.parametrize("shape", [(28, 28, 3), (32, 32, 1), (28, 32, 1), (28, 28, 4)])
def test_bundled_classifier_takes_only_grey_28x28(shape):
    line = error_line(load_extractor(device="cpu"), pictures(2, *shape))
    h, w, c = shape
    assert line == (
        f"fashion-mnist takes grey images of 28x28, but these are {w}x{h} with {min(c, 3)} channels; name the file of "
        "another extractor, such as FID's Inception network, with --features"
    )


def test_identity_depends_on_the_network_and_the_preparation(tmp_path):
    one, copy = saved(AsGiven(), tmp_path / "one.pt"), tmp_path / "copy.pt"
    copy.write_bytes(one.read_bytes())
    other = saved(Shape(), tmp_path / "other.pt")
    same = [load_extractor(one, device="cpu", **options) for options in ({}, {"scale": "fid"}, {"input_size": 299})]
    same.append(load_extractor(copy, device="cpu"))
    assert len({extractor.identity for extractor in same}) == 1
    changes = ({"scale": "unit"}, {"input_size": 0}, {"input_size": 298})
    different = [load_extractor(one, device="cpu", **options) for options in changes]
    different += [same[0], load_extractor(other, device="cpu"), load_extractor(device="cpu")]
    assert len({extractor.identity for extractor in different}) == 6


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "absent.pt",
            {},
            "there is no file absent.pt; name a TorchScript or ONNX file, or fashion-mnist, which is bundled",
        ),
        (".", {}, ". is a folder; want a file"),
        ("text.pt", {}, "cannot load text.pt as TorchScript ("),
        ("weights.pt", {}, "cannot load weights.pt as TorchScript ("),
        ("net.pt", {"scale": "half"}, "scale is 'half'; want one of fid, unit, signed, bytes"),
        ("net.pt", {"input_size": -1}, "input_size is -1; want a whole number of pixels, at most 16384, or 0 to leave"),
        (
            "net.pt",
            {"input_size": 2.0},
            "input_size is 2.0; want a whole number of pixels, at most 16384, or 0 to leave",
        ),
        ("fashion-mnist", {"input_size": 28}, "input_size and scale do not apply to fashion-mnist; leave them out"),
        ("fashion-mnist", {"scale": "signed"}, "input_size and scale do not apply to fashion-mnist; leave them out"),
        ("net.pt", {"device": "abacus"}, "device is 'abacus'"),
        ("net.pt", {"device": 1.5}, "device is 1.5"),
        ("net.pt", {"scale": 0}, "scale is 0; want one of fid, unit, signed, bytes"),
        ("net.pt", {"input_size": 10**23}, "input_size is 100000000000000000000000; want a whole number of pixels"),
        (0, {}, "the extractor is 0; name a TorchScript or ONNX file, or fashion-mnist, which is bundled"),
        ("a\0b", {}, "the path to read is 'a\\x00b', which cannot be the name of a file"),
    ],
)
def test_wrong_sources_and_options_raise(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(AsGiven(), tmp_path / "net.pt")
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    assert message in error_line(load_extractor, source, **{"device": "cpu"} | options)


# Many images


class Counted:
    """An extractor that records the sizes of its batches, and has memory for `fits` images."""

    device, fits = torch.device("cpu"), 1000

    def __init__(self, error=torch.OutOfMemoryError("out of memory")):  # noqa: B008
        self.sizes, self.error = [], error

    def batch_size(self, images):
        return 4

    def __call__(self, images):
        if len(images) > self.fits:
            raise self.error
        self.sizes.append(len(images))
        return torch.from_numpy(images[:, 0, 0, :2]).float()


def test_batches_are_split_to_the_batch_size():
    images = pictures(15)
    extractor = Counted()
    got = extract(extractor, [images[:9], images[9:10], images[10:]], 15, progress=False)
    assert extractor.sizes == [4, 4, 1, 1, 4, 1]
    assert torch.equal(got, torch.from_numpy(images[:, 0, 0, :2]).float())
    extractor.sizes.clear()
    assert torch.equal(extract(extractor, [images[:9], images[9:]], 15, batch_size=7, progress=False), got)
    assert extractor.sizes == [7, 2, 6]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("The following operation failed in the TorchScript interpreter.\nCUDA out of memory. Tried"),
        RuntimeError("onnxruntime: Failed to allocate memory for requested buffer"),
    ],
)
def test_batch_size_is_halved_for_good_when_memory_runs_out(error):
    images, extractor = pictures(16), Counted(error)
    extractor.fits = 3
    with pytest.warns(UserWarning, match="out of memory; continuing with batches of") as warned:
        got = extract(extractor, [images[:12], images[12:]], 16, batch_size=10, progress=False)
    failure = " ".join(str(error).split())
    assert [str(each.message) for each in warned] == [
        f"out of memory; continuing with batches of {size}. {failure}" for size in (5, 3)
    ]
    assert {each.filename for each in warned} == {__file__}
    assert extractor.sizes == [3, 3, 3, 3, 3, 1]
    assert torch.equal(got, torch.from_numpy(images[:, 0, 0, :2]).float())
    extractor.fits = 0
    with pytest.raises(type(error)), pytest.warns(UserWarning, match="batches of 1"):
        extract(extractor, [images], 16, batch_size=2, progress=False)


def test_other_errors_do_not_halve_the_batch_size():
    extractor = Counted(RuntimeError("broken"))
    extractor.fits = 1
    with pytest.raises(RuntimeError, match="broken"):
        extract(extractor, [pictures()], 5, progress=False)


def test_out_of_memory_is_not_reported_as_a_broken_network():
    def network(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        features.Extractor("net", "", network, 3, None, "fid", torch.device("cpu"))(pictures())


def test_default_batch_size_is_a_number_of_pixels(tmp_path):
    extractor = loaded(AsGiven(), tmp_path, input_size=299)
    assert extractor.batch_size(pictures()) == 8
    as_they_are = loaded(AsGiven(), tmp_path)
    assert as_they_are.batch_size(np.empty((1, 299, 598, 3))) == 4
    assert as_they_are.batch_size(np.empty((1, 5000, 5000, 3))) == 1


def test_bar_counts_images(capfd, monkeypatch):
    updates = []
    monkeypatch.setattr(tqdm, "update", lambda bar, n: updates.append((bar.total, n)))
    extract(Counted(), [pictures(5), pictures(5)], 10)
    assert updates == [(10, 4), (10, 1), (10, 4), (10, 1)]
    assert "image/s" in capfd.readouterr().err
    extract(Counted(), [pictures(5)], 5, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_wrong_batch_sizes_raise(batch_size):
    line = error_line(extract, Counted(), [pictures()], 5, batch_size=batch_size, progress=False)
    assert line == f"batch_size is {batch_size!r}; want a whole number, at least 1"


@pytest.mark.parametrize("images", [[], [pictures(3)]])
def test_fewer_images_than_announced_raise(images):
    line = error_line(extract, Counted(), images, 5, progress=False)
    assert line == f"there are {sum(map(len, images))} images, not 5; they changed while they were read"


@pytest.mark.slow
def test_features_do_not_fragment_the_memory():
    """If the small features of each batch were kept, they would pin the memory of its images: 2 GB here."""
    code = """
import resource, sys
import numpy as np, torch
from fastddpm.evaluate.features import Extractor, extract
torch.set_num_threads(1)
network = lambda x: torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], 1)
extractor = Extractor("", "", network, 3, None, "fid", torch.device("cpu"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
extract(extractor, (np.zeros((128, 256, 256, 3), np.uint8) for _ in range(30)), 30 * 128, progress=False)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 10 * 128 * 256 * 256 * 3


def test_help_lists_the_scales():
    assert list(SCALES) == ["fid", "unit", "signed", "bytes"]
