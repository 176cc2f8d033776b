"""Sample indices as runs, such as 5,7,100-120: a million in a row need one run, a million in random order 24 MB."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import cast, overload

import numpy as np

from fastddpm.core.checks import shown

LIMIT = 1 << 56  # the noise standard's limit of sample indices

_NUMBER = re.compile("[0-9]+")
_LONG = re.compile("0*([0-9]{17,})")  # numbers that may exceed the limit
_NOT_A_LIST = re.compile("[^0-9,-]|-(?![0-9])|(?<![0-9])-|-[0-9]+-")


class Indices(Sequence[int]):
    """A sequence of sample indices, stored as runs of consecutive ones.

    Args:
        starts: [R] int64, the first index of each run.
        lengths: [R] int64, the number of indices in each run, at least 1. No run continues the one before it.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray):
        self.starts, self.lengths = starts, lengths
        self._ends = lengths.cumsum()  # the number of indices up to the end of each run

    @classmethod
    def _from_runs(cls, starts: np.ndarray, lengths: np.ndarray) -> "Indices":
        """The indices of runs that may be empty or continue each other.

        Raises: ValueError: there are more than 2^56, which cannot be counted.
        """
        if lengths.sum(dtype=np.float64) > LIMIT:
            raise ValueError("there are more than 2^56 sample indices; want at most that many")
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        first = np.ones(len(starts), bool)
        first[1:] = starts[1:] != starts[:-1] + lengths[:-1]
        return cls(starts[first], np.add.reduceat(lengths, np.flatnonzero(first)) if len(starts) else lengths)

    @classmethod
    def of(cls, samples: "int | Iterable[int]") -> "Indices":
        """The indices that `Sampler.sample` is given: a count N for 0, 1, ... N - 1, or the indices themselves.

        Raises: ValueError: they are not whole numbers, 0 <= index < 2^56.
        """
        if isinstance(samples, Indices):
            return samples
        if isinstance(samples, int | np.integer) and not isinstance(samples, bool) and 0 <= samples <= LIMIT:
            samples = range(int(samples))
        if isinstance(samples, range) and samples.step == 1:
            starts, lengths = np.array([samples.start]), np.array([max(samples.stop - samples.start, 0)])
        else:
            as_given = isinstance(samples, np.ndarray) or not isinstance(samples, Iterable)
            try:
                starts = np.array(samples if as_given else tuple(cast(Iterable[int], samples)))
            except (ValueError, TypeError):  # lists of different lengths, or other things that numpy refuses
                starts = np.array(None)
            starts = starts if starts.size else starts.astype(np.int64)
            lengths = np.ones_like(starts)
        if starts.ndim != 1 or not (_in_range(starts) and _in_range(lengths)) or (starts + lengths > LIMIT).any():
            given = " ".join(shown(samples).split())
            raise ValueError(f"samples are {given}; want a count, or whole numbers 0 <= index < 2^56")
        return cls._from_runs(starts.astype(np.int64), lengths.astype(np.int64))

    @classmethod
    def joined(cls, parts: "Sequence[Indices]") -> "Indices":
        """The indices of all parts, in the order of the parts."""
        return cls._from_runs(
            np.concatenate([part.starts for part in parts]), np.concatenate([part.lengths for part in parts])
        )

    @classmethod
    def parse(cls, text: str) -> "Indices":
        """Read a list such as 5,7,100-103, which stands for 5, 7, 100, 101, 102, 103.

        Raises: ValueError: the text is not such a list, or an index is 2^56 or more.
        """
        if not isinstance(text, str):
            raise ValueError(f"sample indices are {shown(text)}; want a list of whole numbers like '5,7,100-120'")
        text = re.sub(",+", ",", text).strip(",")
        if _NOT_A_LIST.search(text):
            raise ValueError(f"{_shortened(text)!r} is not a list of whole numbers like 5,7,100-120")
        large = [number for number in _LONG.findall(text) if len(number) > 17 or int(number) >= LIMIT]
        if large:
            largest = max(large, key=lambda number: (len(number), number))  # int() refuses 5000 digits
            raise ValueError(f"sample index is {_shortened(largest)}; want a whole number, 0 <= index < 2^56")
        numbers = np.fromstring(text.replace("-", ","), np.int64, sep=",")  # without a million strings
        ends_run = np.frombuffer(_NUMBER.sub("", text).encode() + b",", np.uint8) == ord(",")
        ends_run = ends_run[: len(numbers)]
        starts, lasts = numbers[np.roll(ends_run, 1)], numbers[ends_run]
        if (lasts < starts).any():
            raise ValueError(f"{_shortened(text)!r} is not a list of whole numbers like 5,7,100-120")
        return cls._from_runs(starts, lasts + 1 - starts)

    def __str__(self) -> str:
        """The shortest text that `parse` reads as these indices."""
        runs = zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        return ",".join(f"{start}-{start + length - 1}" if length > 1 else str(start) for start, length in runs)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[int]:
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield from range(start, start + length)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> "Indices": ...
    def __getitem__(self, place: int | slice) -> "int | Indices":
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                raise ValueError(f"the step of a slice is {step}; want 1")
            return self._between(start, stop)
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return next(iter(self._between(place % len(self), place % len(self) + 1)))

    def _between(self, start: int, stop: int) -> "Indices":
        at = slice(np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left") + 1)
        ends = self._ends[at]
        begins = ends - self.lengths[at]
        starts = self.starts[at] + np.maximum(start - begins, 0)
        return self._from_runs(starts, np.minimum(ends, stop) - np.maximum(begins, start))

    def take(self, places: np.ndarray) -> np.ndarray:
        """[n] int64: the indices at these places, [n] int64, each 0 <= place < len(self)."""
        runs = np.searchsorted(self._ends, places, "right")
        return self.starts[runs] + places - (self._ends - self.lengths)[runs]

    def largest(self) -> int:
        """The largest index; there must be at least one."""
        return int((self.starts + self.lengths).max()) - 1

    def duplicate(self) -> int | None:
        """An index that occurs more than once; None if there is none."""
        order = self.starts.argsort()
        starts, stops = self.starts[order], (self.starts + self.lengths)[order]
        overlap = np.flatnonzero(starts[1:] < stops[:-1])
        return int(starts[1:][overlap[0]]) if len(overlap) else None


def _in_range(numbers: np.ndarray) -> bool:
    """Whether all are whole numbers from 0 to LIMIT."""
    return numbers.dtype.kind in "iu" and not ((numbers < 0) | (numbers > LIMIT)).any()


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]} ..."
