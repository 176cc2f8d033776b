"""Pictures of the way from noise to samples."""

import numpy as np
import pytest
from PIL import Image

from fastddpm.storage.class_grid import class_grid
from fastddpm.storage.images import grid
from fastddpm.storage.trajectory import GIF_FRAMES, PNG_FRAMES, save_trajectory, shown_steps


def states(frames, samples, channels=1):
    """uint8 [frames, samples, 6, 6, channels], each of one value."""
    values = np.arange(frames * samples, dtype=np.uint8).reshape(frames, samples, 1, 1, 1)
    return np.broadcast_to(10 + 5 * values, (frames, samples, 6, 6, channels)).copy()


def frames_of(path):
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield np.asarray(gif.convert("RGB")), gif.info["duration"]


@pytest.mark.parametrize(("path", "frames"), [("a.gif", GIF_FRAMES), ("a.GIF", GIF_FRAMES), ("a.png", PNG_FRAMES)])
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 59, 60, 61, 250, 1000])
def test_shown_steps_begin_with_noise_and_leave_a_frame_for_the_samples(path, frames, steps):
    shown = shown_steps(steps, path)
    assert shown[0] == 0
    assert shown == sorted(set(shown))
    assert shown[-1] < steps
    assert len(shown) == min(frames - 1, steps)


def test_shown_steps_are_evenly_spaced():
    assert shown_steps(1000, "a.png") == [0, 111, 222, 333, 444, 556, 667, 778, 889]


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_shows_a_grid_per_state_and_the_samples_longest(tmp_path, channels):
    x = states(4, 5, channels)
    save_trajectory(x, [9, 6, 3], tmp_path / "a.gif")
    shown = list(frames_of(tmp_path / "a.gif"))
    assert [duration for _, duration in shown] == [60, 60, 60, 2500]
    for (picture, _), frame in zip(shown, x, strict=True):
        assert np.array_equal(picture, np.broadcast_to(grid(frame, width=320), picture.shape))


def test_gif_of_classes_has_titled_rows(tmp_path):
    x, labels, names = states(2, 3), [1, 0, 1], ["bag", "coat"]
    save_trajectory(x, [9], tmp_path / "a.gif", labels, names)
    for (picture, _), frame in zip(frames_of(tmp_path / "a.gif"), x, strict=True):
        assert np.array_equal(picture[..., :1], class_grid(frame, labels, names, width=320))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_has_a_row_per_sample_and_a_headed_column_per_state(tmp_path, channels):
    x = states(4, 3, channels)
    save_trajectory(x, [9, 6, 3], tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    rows = grid(np.concatenate([x[:, i] for i in range(3)]), columns=4, width=900).squeeze()
    assert np.array_equal(picture[-len(rows) :], rows)
    headings = picture[: -len(rows)]
    assert all((part < 128).any() for part in np.array_split(headings, 4, axis=1))


def test_rows_of_a_png_are_titled_by_class(tmp_path):
    x = states(4, 3)
    save_trajectory(x, [9, 6, 3], tmp_path / "plain.png")
    save_trajectory(x, [9, 6, 3], tmp_path / "titled.png", [0, 1, 0], ["bag", "coat"])
    plain, titled = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "titled.png"))
    width, height = plain.shape[1], grid(x[0], columns=1, width=900 // 4).shape[0]
    assert np.array_equal(titled[-height:, -width:], plain[-height:])
    titles = titled[:, :-width]
    assert (titles[:-height] == 255).all()  # the headings are over the states
    first, second, third = np.array_split(titles[-height:][2:], 3)
    assert (first < 128).any()
    assert (first < 128).sum() == (third < 128).sum() != (second < 128).sum()
