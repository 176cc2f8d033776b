"""Sample indices as runs behave as a plain list, need little memory, and refuse anything else."""

import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.storage.indices import LIMIT, Indices
from tests.support.check import error_line

# Short runs, with gaps and without, and indices near both ends.
RUNS = st.lists(st.tuples(st.sampled_from([0, 5, 100, LIMIT - 40]), st.integers(0, 30), st.integers(1, 9)), max_size=6)
LISTS = RUNS.map(lambda runs: [base + first + i for base, first, length in runs for i in range(length)])


def assert_like(got, want):
    """got holds the indices of the list, in as few runs as possible."""
    assert list(got) == want
    assert len(got) == len(want)
    assert bool(got) == bool(want)
    assert all(type(index) is int for index in got)
    assert (got.starts.dtype, got.lengths.dtype) == (np.int64, np.int64)
    assert (got.lengths > 0).all()
    assert len(got.starts) == len(got.lengths)
    assert len(got.starts) == sum(i == 0 or want[i - 1] + 1 != want[i] for i in range(len(want)))


@given(LISTS, LISTS)
def test_indices_behave_as_a_list(one, other):
    indices = Indices.of(one)
    assert_like(indices, one)
    assert_like(Indices.parse(str(indices)), one)
    assert_like(Indices.joined([indices, Indices.of(other)]), one + other)
    assert [indices[place] for place in range(-len(one), len(one))] == one + one
    for place in (len(one), -len(one) - 1):
        with pytest.raises(IndexError):
            indices[place]
    if one:
        assert indices.largest() == max(one)
    duplicate = indices.duplicate()
    assert (duplicate is None) == (len(set(one)) == len(one))
    assert duplicate is None or one.count(duplicate) >= 2
    assert list(reversed(indices)) == one[::-1]


@given(LISTS, st.data())
def test_slices_behave_as_those_of_a_list(one, data):
    place = st.none() | st.integers(-len(one) - 2, len(one) + 2)
    part = slice(data.draw(place), data.draw(place), data.draw(st.sampled_from([None, 1])))
    assert_like(Indices.of(one)[part], one[part])


@given(LISTS, st.integers(1, 12))
def test_slices_joined_are_the_whole(one, size):
    indices = Indices.of(one)
    parts = [indices[k : k + size] for k in range(0, len(one), size)]
    assert [len(part) for part in parts] == [len(one[k : k + size]) for k in range(0, len(one), size)]
    if parts:
        assert_like(Indices.joined(parts), one)


def test_slices_with_steps_are_refused():
    for step in (2, -1):
        assert error_line(lambda step=step: Indices.of(5)[::step]) == f"the step of a slice is {step}; want 1"


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (0, []),
        (3, [0, 1, 2]),
        (np.int64(2), [0, 1]),
        (np.uint8(2), [0, 1]),
        (range(4, 7), [4, 5, 6]),
        (range(7, 4), []),
        (range(7, 4, -1), [7, 6, 5]),
        (range(0, 7, 3), [0, 3, 6]),
        ([], []),
        ((), []),
        ([5, 3, 4, 4], [5, 3, 4, 4]),
        (iter([2, 9]), [2, 9]),
        (np.array([250, 255], np.uint8), [250, 255]),
        (np.array([7, 6], np.int16), [7, 6]),
        (np.array([LIMIT - 1], np.uint64), [LIMIT - 1]),
        (torch.tensor([3, 1]), [3, 1]),
        ([LIMIT - 1, 0], [LIMIT - 1, 0]),
        (range(LIMIT - 2, LIMIT), [LIMIT - 2, LIMIT - 1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_accepted_samples(given, want):
    assert_like(Indices.of(given), want)


def test_indices_are_returned_unchanged():
    indices = Indices.of([3, 1])
    assert Indices.of(indices) is indices


def test_all_possible_indices_are_one_run():
    for every in (Indices.of(LIMIT), Indices.of(range(LIMIT)), Indices.parse(f"0-{LIMIT - 1}")):
        assert (len(every), every.largest(), every[-1], len(every.starts)) == (LIMIT, LIMIT - 1, LIMIT - 1, 1)
        assert list(every[LIMIT - 2 :]) == [LIMIT - 2, LIMIT - 1]


@pytest.mark.parametrize(
    "bad",
    [
        -1,
        LIMIT + 1,
        10**30,
        True,
        1.5,
        None,
        "12",
        [-1],
        [0, -1],
        [LIMIT],
        [2**63 - 1],
        [2**63],
        [2**64 - 1],
        [2**70],
        [0.5],
        [1, 2.0],
        ["1"],
        [True],
        [[1]],
        range(-1, 4),
        range(LIMIT, LIMIT + 1),
        range(LIMIT + 1),
        range(2**63, 2**63 + 1),
        range(2**70),
        np.array([-1], np.int8),
        np.array([2**64 - 1], np.uint64),
        np.zeros((2, 2), int),
        np.array(4),
        np.array([1.0]),
        np.array([1], object),
    ],
    ids=repr,
)
def test_refused_samples(bad):
    message = error_line(Indices.of, bad)
    assert message.startswith("samples are ")
    assert message.endswith("; want a count, or whole numbers 0 <= index < 2^56")


def test_errors_are_short():
    message = error_line(Indices.of, [*range(10**5), -1])
    assert message.startswith("samples are [0, 1, 2, ")
    assert len(message) < 200
    for text in ("1," * 10**5 + "x", "9" * 10**5, "5-3" + ",1" * 10**5):
        assert len(error_line(Indices.parse, text)) < 200


@pytest.mark.parametrize(
    ("text", "want", "again"),
    [
        ("", [], ""),
        (",", [], ""),
        (",,1,,3,", [1, 3], "1,3"),
        ("5,7,100-103", [5, 7, 100, 101, 102, 103], "5,7,100-103"),
        ("100-103,7,5", [100, 101, 102, 103, 7, 5], "100-103,7,5"),
        ("3-3", [3], "3"),
        ("4,5,6", [4, 5, 6], "4-6"),
        ("4-5,6-7,8", [4, 5, 6, 7, 8], "4-8"),
        ("1-2,2", [1, 2, 2], "1-2,2"),
        ("007", [7], "7"),
        ("0" * 5000 + "7-" + "0" * 20 + "8", [7, 8], "7-8"),
        (f"{LIMIT - 1},0", [LIMIT - 1, 0], f"{LIMIT - 1},0"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_parse(text, want, again):
    assert_like(Indices.parse(text), want)
    assert str(Indices.parse(text)) == again


NOT_LISTS = ["x", "1,x", "-", "-1", "1-", "1--2", "1-2-3", "1,-2", "1-,2", "5-3", "1,5-3,9", "1 2", " 1", "1\n", "1;2"]
NOT_LISTS += ["+1", "1e5", "0x10", "1_000", "1.5", "٣", "²", "1\0", "nan"]


@pytest.mark.parametrize("bad", NOT_LISTS, ids=ascii)
def test_parse_refuses_other_text(bad):
    assert error_line(Indices.parse, bad) == f"{bad!r} is not a list of whole numbers like 5,7,100-120"


@given(st.text("0123456789,- x", max_size=12))
def test_parse_of_arbitrary_text(text):
    """It is read as a plain implementation reads it, or refused."""
    texts = [part for part in text.split(",") if part]
    parts = [re.fullmatch("([0-9]+)(?:-([0-9]+))?", part) for part in texts]
    ends = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    if len(ends) < len(parts) or any(last < first for first, last in ends):
        message = error_line(Indices.parse, text)
        assert message == f"{','.join(texts)!r} is not a list of whole numbers like 5,7,100-120"
        return
    got = Indices.parse(text)
    assert len(got) == sum(last + 1 - first for first, last in ends)
    assert list(got[:50]) == [index for first, last in ends for index in range(first, min(last, first + 50) + 1)][:50]


@pytest.mark.parametrize(
    "number",
    [LIMIT, 10**17 - 1, 2**63 - 1, 2**63, 2**64, 10**30, f"1{'0' * 5000}", f"000{LIMIT}"],
    ids=lambda n: str(n)[:20],
)
def test_parse_refuses_large_numbers(number):
    named = str(number).lstrip("0")
    named = named if len(named) <= 80 else f"{named[:80]} ..."
    want = f"sample index is {named}; want a whole number, 0 <= index < 2^56"
    for text in (f"{number}", f"3,{number},5", f"1-{number}", f"{LIMIT},{number}"):
        assert error_line(Indices.parse, text) == want


def test_a_million_in_random_order_need_24_mb():
    """A start, a length and an end of eight bytes each; little more while they are parsed."""
    order = np.random.default_rng(0).permutation(10**6)
    text = ",".join(map(str, order.tolist()))
    tracemalloc.start()
    try:
        indices = Indices.parse(text)
        held, most = tracemalloc.get_traced_memory()
        assert held <= 24.1e6
        assert most <= 150e6  # a list of a million strings and one of numbers would be more
        row = Indices.of(10**6)
        assert tracemalloc.get_traced_memory()[0] - held <= 1e4
    finally:
        tracemalloc.stop()
    assert len(indices) == len(row) == 10**6
    assert np.array_equal(np.fromiter(indices, np.int64), order)
    assert indices.duplicate() is None
    assert Indices.joined([indices, Indices.of([77])]).duplicate() == 77
    places = [0, 1, 499_999, -1]
    assert [indices[place] for place in places] == order[places].tolist()
    assert list(indices[123_456:123_460]) == order[123_456:123_460].tolist()


@pytest.mark.parametrize(
    ("text", "duplicate"),
    [
        ("0-9,20-29,10-19", None),
        ("0-9,9", 9),
        ("9,0-9", 9),
        ("0-100,50-60,5-6", 5),
        ("3,1,3", 3),
        ("5-7,4-5", 5),
        ("", None),
    ],
)
def test_duplicate(text, duplicate):
    assert Indices.parse(text).duplicate() == duplicate


@given(LISTS)
def test_taken_indices_are_those_at_the_places(indices):
    places = np.arange(len(indices))[::-1].repeat(2)
    got = Indices.of(indices).take(places)
    assert got.dtype == np.int64
    assert got.tolist() == [indices[place] for place in places]


def test_more_indices_than_can_be_counted_are_refused():
    """A list of ten bytes stands for 2^56; a hundred of them would be more than a number of 64 bits can hold."""
    assert len(Indices.parse(f"0-{LIMIT - 1}")) == LIMIT
    for times in (2, 127, 128, 1000):
        message = error_line(Indices.parse, ",".join([f"0-{LIMIT - 1}"] * times))
        assert message == "there are more than 2^56 sample indices; want at most that many"


@pytest.mark.parametrize("text", [5, None, ["1"], b"1", 1.5])
def test_other_types_are_no_lists(text):
    assert (
        error_line(Indices.parse, text)
        == f"sample indices are {text!r}; want a list of whole numbers like '5,7,100-120'"
    )


@pytest.mark.parametrize(
    "samples", [[[1], [2, 3]], [[1], 2], [torch.ones(2), 1], 10**23, [10**23], 1 << 20000], ids=lambda x: ""
)
def test_lists_that_numpy_refuses(samples):
    message = error_line(Indices.of, samples)
    assert message.startswith("samples are ")
    assert message.endswith("; want a count, or whole numbers 0 <= index < 2^56")
