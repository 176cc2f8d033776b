"""How samples are divided into batches and returned in order, and the evaluation mode of the model meanwhile."""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastddpm.core.checks import is_whole, shown
from fastddpm.core.memory import halved
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.reachable import modules

PIXELS_PER_BATCH = {"cpu": 1 << 16, "cuda": 1 << 20}  # by default: 64 and 1024 images of 32 x 32
PIXELS_PER_MICRO_BATCH = {"cpu": 1 << 12, "cuda": 1 << 16}  # 4 and 64
MOST_ENTRIES = 1 << 20  # of a batch of fixed size

_evaluated: dict[int, tuple[int, bool]] = {}  # id of a module: (runs in progress, its mode before)
_evaluated_lock = threading.Lock()


def default_size(shape: Sequence[int], pixels: int) -> int:
    """How many samples of a shape (channels first) have so many pixels in total; each counts as at least 256."""
    return max(1, pixels // max(math.prod(shape[1:]), 1 << 8))


def micro_batch(batch_invariant: bool | int, shape: Sequence[int], device: torch.device) -> int:
    """The fixed number of entries of every batch, or of chains if parallel in time; 0: it is not fixed.

    Raises: ValueError: batch_invariant is not a flag or such a number.
    """
    if isinstance(batch_invariant, bool):
        return default_size(shape, PIXELS_PER_MICRO_BATCH[device.type]) if batch_invariant else 0
    if not is_whole(batch_invariant) or not 1 <= batch_invariant <= MOST_ENTRIES:
        given = shown(batch_invariant)
        raise ValueError(f"batch_invariant is {given}; want True, False or a whole number, 1 to {MOST_ENTRIES}")
    return int(batch_invariant)


def split(samples: Tensor, size: int, micro_batch: int) -> list[Tensor]:
    """Divide samples into batches.

    Args:
        samples: [N] sample indices.
        size: of a batch, if micro_batch is 0.
        micro_batch: 0, or the size of every batch; sample i is then at entry i modulo micro_batch.
    Returns: for each batch, the position in `samples` of each entry, or -1 if the entry is empty.
    """
    if not micro_batch:
        return list(torch.arange(len(samples), device="cpu").split(size)) if len(samples) else []
    batches: list[Tensor] = []
    given: Counter[int] = Counter()  # entry: samples placed there so far
    for place, entry in enumerate((samples % micro_batch).tolist()):
        if given[entry] == len(batches):
            batches.append(torch.full((micro_batch,), -1, dtype=torch.int64, device="cpu"))
        batches[given[entry]][entry] = place
        given[entry] += 1
    return batches


class InOrder:
    """Returns samples in the order requested, each as soon as all samples before it are finished."""

    def __init__(self, samples: Tensor):
        self.samples, self.next = samples, 0
        self.waiting: dict[int, Tensor] = {}

    def put(self, batch: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Take a finished batch. Args: batch: as `split` returns it; x: its samples, without empty entries."""
        places = batch[batch >= 0]
        if places.tolist() == list(range(self.next, self.next + len(places))) and not self.waiting:
            self.next += len(places)
            yield self.samples[places], x
            return
        self.waiting |= dict(zip(places.tolist(), x, strict=True))
        first = self.next
        ready = []
        while self.next in self.waiting:
            ready.append(self.waiting.pop(self.next))
            self.next += 1
        if ready:
            yield self.samples[first : self.next].clone(), torch.stack(ready)


def size_after_failure(engine: Engine, size: int, failure: str, micro_batch: int = 0) -> int:
    """The batch size to try after one of `size` ran out of memory: the same if the engine could free memory.

    Raises: torch.OutOfMemoryError: there is no smaller one; the message begins with `failure`.
    """
    if engine.clear():
        return size
    if micro_batch or size == 1:
        way_out = f"batch_invariant={size // 2} (with other bits), " if size > 1 else ""
        raise torch.OutOfMemoryError(f"{failure} This was for a batch of {size}; use {way_out}fp16 or bf16, or the CPU")
    return halved(size, failure, stacklevel=5)  # the caller of a function that is wrapped by `checked_call`


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """A context in which every module that a network can reach is in evaluation mode: no dropout, no batch statistics.

    Runs may overlap, even in several threads. When the last one ends, every module is back in its previous mode.
    """
    parts = [part for part in modules(model) if hasattr(part, "training")]  # a frozen TorchScript module has no mode
    with _evaluated_lock:
        for part in parts:
            runs, mode = _evaluated.get(id(part), (0, part.training))
            _evaluated[id(part)] = runs + 1, mode
    try:
        for part in parts:  # only now: a compiled module passes its mode on to the one that it wraps
            part.training = False
        yield
    finally:
        with _evaluated_lock:
            ended = []
            for part in parts:
                runs, mode = _evaluated.pop(id(part))
                if runs > 1:
                    _evaluated[id(part)] = runs - 1, mode
                else:
                    ended.append((part, mode))
            for part, mode in ended:  # only now: a module may refuse it
                part.training = mode
