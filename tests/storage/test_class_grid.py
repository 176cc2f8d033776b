"""Grids of class-conditional samples: a row per class, with its name."""

import numpy as np
import pytest
from PIL import Image

from fastddpm.storage.class_grid import MOST_ROWS, class_grid, picture, save_samples, with_titles
from fastddpm.storage.images import grid

LABELS = [2, 0, 2, 5, 0, 2]


def shades(count, channels=1, size=(4, 4)):
    """Images of one value each: 10, 20, ..."""
    values = np.arange(10, 10 * count + 1, 10, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, *size, channels)).copy()


def titles_and_rows(picture, rows):
    """(the titles on the left, the grid on the right) of a picture whose grid is `rows`."""
    width = rows.shape[1]
    assert np.array_equal(picture[:, -width:], rows)
    return picture[:, :-width], picture[:, -width:]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_each_class_has_a_row_in_the_order_of_the_labels(channels):
    x = shades(6, channels)
    blank = np.full_like(x[0], 255)
    rows = grid(np.stack([x[1], x[4], blank, x[0], x[2], x[5], x[3], blank, blank]), columns=3)
    titles, _ = titles_and_rows(class_grid(x, LABELS), rows)
    assert titles.shape[2] == channels
    assert (titles[..., 0] < 128).any()
    if channels == 4:
        assert (titles[..., 3] == 255).all()


def test_titles_are_beside_their_rows():
    x = shades(2, size=(64, 64))
    got = class_grid(x, [0, 1], ["i", "mmmmmm"])
    titles, rows = titles_and_rows(got, grid(x, columns=1, width=320))
    ink = [(half < 128).sum() for half in np.array_split(titles[..., 0], 2)]
    assert 0 < ink[0] < ink[1]
    assert (titles[:, :4] == 255).all()
    assert (titles[:, -4:] == 255).all()
    heights = [np.flatnonzero((half < 128).any(axis=(1, 2))).mean() for half in np.array_split(titles, 2)]
    assert heights == pytest.approx([len(rows) / 4] * 2, abs=4)


@pytest.mark.parametrize("name", ["two\nlines", "\udce9", "", " ", "n" * 100_000, "\x1b[31m", "図"])
def test_odd_names_are_drawn(name):
    got = class_grid(shades(2, size=(32, 32)), [0, 1], [name, "bag"])
    assert got.shape[1] < 640


def test_names_are_drawn_and_not_only_numbers():
    x = shades(2, size=(32, 32))
    assert not np.array_equal(class_grid(x, [0, 1], ["3", "4"]), class_grid(x, [0, 1]))
    assert np.array_equal(class_grid(x, [0, 1], ["0", "1"]), class_grid(x, [0, 1]))


@pytest.mark.parametrize(("columns", "rows"), [(1, 20), (20, 1), (3, 3)])
def test_no_side_is_much_longer_than_the_width(columns, rows):
    labels = [row for row in range(rows) for _ in range(columns)]
    assert max(class_grid(shades(1).repeat(len(labels), 0), labels, width=400).shape[:2]) < 500


@pytest.mark.parametrize(("count", "columns", "rows"), [(16, 16, 1), (20, 10, 2), (200, 20, 10), (3000, 77, 39)])
def test_many_images_of_a_class_take_several_rows(count, columns, rows):
    x = np.arange(count * 4, dtype=np.uint32).view(np.uint8).reshape(count, 2, 2, 4)
    blank = np.full((columns * rows - count, 2, 2, 4), 255, np.uint8)
    tiles = grid(np.concatenate([x, blank]), columns=columns, width=640 * columns // max(columns, rows))
    titles_and_rows(class_grid(x, [0] * count), tiles)


def test_titles_are_in_the_middle_of_several_rows():
    x = shades(1, size=(16, 16)).repeat(60, 0)
    got = class_grid(x, [0] * 40 + [1] * 20, ["x", "x"])
    titles = got[:, : got.shape[1] - grid(x[:60], columns=14, width=640).shape[1]]
    ink = np.flatnonzero((titles < 128).any(axis=(1, 2)))
    middle = np.split(ink, np.flatnonzero(np.diff(ink) > 1) + 1)
    rows = len(got) / 5  # three of the first class, and two of the second
    assert [part.mean() for part in middle] == pytest.approx([1.5 * rows, 4 * rows], abs=4)


def test_the_null_label_has_a_title_too():
    x, names = shades(3), ["bag", "shoe"]
    assert np.array_equal(class_grid(x, [1, 2, 0], names), class_grid(x, [1, 2, 0], [*names, "no class"]))


def test_many_classes_are_a_plain_grid():
    many = MOST_ROWS + 1
    x = np.zeros((many, 2, 2, 1), np.uint8)
    assert np.array_equal(picture(x, range(many)), grid(x))
    assert np.array_equal(picture(x, [3] * many), class_grid(x, [3] * many))
    assert np.array_equal(picture(x), grid(x))


def test_save_samples_writes_the_picture(tmp_path):
    x = shades(6, 3)
    names = ["dress", "coat", "sandal", "shirt", "sneaker", "bag"]
    save_samples(x, tmp_path / "x.png", LABELS, names)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), class_grid(x, LABELS, names))


def test_titles_of_rows():
    rows = np.zeros((60, 30, 3), np.uint8)
    titles, _ = titles_and_rows(with_titles(rows, [1, 1, 0], ["dress", "bag"]), rows)
    first, second, third = np.split(titles, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
