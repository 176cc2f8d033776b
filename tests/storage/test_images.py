"""Images: diffusers' rounding, every pixel of a grid, PNG and .npz files."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.storage import images


def pictures(n, h=4, w=3, c=3):
    return np.random.default_rng(n).integers(0, 256, (n, h, w, c), np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_is_diffusers_rounding(dtype):
    ties = (torch.arange(256, dtype=dtype) + 0.5) / 127.5 - 1
    x = torch.cat([torch.linspace(-1.5, 1.5, 10_000, dtype=dtype), ties, ties.nextafter(ties + 1)])
    x = x[:10_500].reshape(1, 2, 50, 105)
    diffusers = ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    got = images.to_uint8(x)
    assert np.array_equal(got.numpy(), diffusers)
    assert got.is_contiguous()


def test_to_uint8_equals_the_pipelines_own_conversion():
    from diffusers.image_processor import VaeImageProcessor

    x = torch.randn(3, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    pil = VaeImageProcessor.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(images.to_uint8(x).numpy(), np.stack([np.asarray(image) for image in pil]))


def test_to_uint8_undoes_dequantisation():
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x = (u.float() - 127.5) * (2 / 255)
    assert torch.equal(images.to_uint8(x.movedim(-1, 1)), u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_uint8_widens_half_precision_first(dtype):
    x = torch.linspace(-1, 1, 1000).reshape(1, 1, 10, 100).to(dtype)
    assert torch.equal(images.to_uint8(x), images.to_uint8(x.float()))


def test_to_uint8_clamps_infinities_and_names_samples_with_nan():
    x = torch.zeros(4, 1, 2, 2)
    x[1, 0, 0, 0], x[2, 0, 1, 1] = float("inf"), float("-inf")
    got = images.to_uint8(x)
    assert got[1, 0, 0, 0] == 255
    assert got[2, 1, 1, 0] == 0
    x[3, 0, 0, 1] = x[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN in samples \[1, 3\]"):
        images.to_uint8(x)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)])
def test_to_uint8_refuses_other_inputs(x):
    with pytest.raises(ValueError, match="want floating-point"):
        images.to_uint8(x)


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (16, 4, 4), (17, 4, 5)])
@pytest.mark.parametrize("c", [1, 3])
def test_grid_shows_every_image_enlarged_on_white(n, rows, columns, c):
    batch, scale = pictures(n, h=5, w=4, c=c), 2
    picture = images.grid(batch, margin=2, width=columns * 5 * scale + 4)
    want = np.full((rows * 12 + 2, columns * 10 + 2, c), 255, np.uint8)
    for i, image in enumerate(batch):
        top, left = 2 + i // columns * 12, 2 + i % columns * 10
        want[top : top + 10, left : left + 8] = np.kron(image, np.ones((scale, scale, 1), np.uint8))
    assert np.array_equal(picture, want)


def test_grid_with_a_number_of_columns():
    assert images.grid(pictures(7, h=5, w=4), columns=3, margin=1, width=12).shape == (3 * 6 + 1, 3 * 5 + 1, 3)
    assert images.grid(pictures(1, h=5, w=4), columns=3, margin=1, width=12).shape == (1 * 6 + 1, 3 * 5 + 1, 3)


@pytest.mark.parametrize("columns", [0, -1, 1.5, True])
def test_grid_refuses_other_numbers_of_columns(columns):
    with pytest.raises(ValueError, match=rf"columns is {columns}; want a whole number, at least 1"):
        images.grid(pictures(2), columns=columns)


def test_save_grid_with_a_number_of_columns(tmp_path):
    images.save_grid(pictures(7), tmp_path / "grid.png", columns=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), images.grid(pictures(7), columns=2))


def test_grid_never_shrinks_large_images():
    assert images.grid(pictures(4, h=50, w=60), width=64).shape == (2 * 52 + 2, 2 * 62 + 2, 3)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "no images"),
        (np.zeros((2, 4, 4, 3), np.float32), "want uint8"),
        (np.zeros((4, 4, 3), np.uint8), "want uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), "2 channels; want 1, 3 or 4"),
    ],
)
def test_grid_refuses_other_inputs(bad, match):
    with pytest.raises(ValueError, match=match):
        images.grid(bad)


@pytest.mark.parametrize("c", [1, 3, 4])
def test_saved_files_hold_the_images(tmp_path, c):
    batch = pictures(3, c=c)
    images.save_grid(batch, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), images.grid(batch).squeeze())
    images.save_pngs(torch.from_numpy(batch), tmp_path / "new" / "folder", indices=[0, 7, 123456])
    names = ["00000.png", "00007.png", "123456.png"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == names
    read = [np.asarray(Image.open(tmp_path / "new" / "folder" / name)) for name in names]
    assert np.array_equal(np.stack(read), batch.squeeze(-1) if c == 1 else batch)
    images.save_npz(torch.from_numpy(batch), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        assert np.array_equal(arrays["arr_0"], batch)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3), (2, 3, 4, 4)])
def test_npz_holds_floats_of_any_rank(tmp_path, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    images.save_npz(x, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], x.numpy())
        assert arrays["arr_0"].dtype == np.float32
    with pytest.raises(ValueError, match="or write"):
        images.save_pngs(x, tmp_path / "pngs")
    assert os.listdir(tmp_path) == ["x.npz"]


def test_png_is_written_whatever_the_suffix(tmp_path):
    images.save_grid(pictures(1), tmp_path / "no-suffix")
    assert Image.open(io.BytesIO((tmp_path / "no-suffix").read_bytes())).format == "PNG"


@pytest.mark.parametrize("c", [1, 3, 4])
def test_png_holds_the_image_in_the_same_bytes_each_time(c):
    picture = pictures(1, h=5, w=4, c=c)[0]
    content = images.png(picture)
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("PNG", {1: "L", 3: "RGB", 4: "RGBA"}[c])
    assert np.array_equal(np.asarray(image).reshape(picture.shape), picture)
    assert images.png(picture.copy()) == content


def test_are_pictures():
    assert all(images.are_pictures(pictures(2, c=c)) for c in (1, 3, 4))
    assert not any(images.are_pictures(pictures(2, c=c)) for c in (2, 5))
    for other in (pictures(2).astype(np.float32), pictures(2).view(np.int8), pictures(2)[0], pictures(2)[None]):
        assert not images.are_pictures(other)
