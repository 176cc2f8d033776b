"""Many samples into a folder, by all processes that torchrun starts, through kills and restarts.

Samples are drawn in shards (`store`), each by one process, in batches that are the shard's own: so a shard has the same
bits whichever process draws it, however many there are, and whatever was killed before. A restart draws what is not
done.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastddpm.networks.unet2d import UNet2D
from fastddpm.processes.distributed import AgreedError, Ranks, ranks
from fastddpm.processes.progress import LostError, Progress
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.files import check_writable, locked
from fastddpm.storage.fingerprint import machine, weights_sha256
from fastddpm.storage.images import CHANNELS
from fastddpm.storage.indices import Indices
from fastddpm.storage.shards import FORMATS, Store, is_store

WAITING = 2  # shards that may wait to be written before drawing waits, too
PATIENCE = 600  # tenths of a second to find out whether a process was lost or is done
ONCE = 1.0  # seconds in which signals are one
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(KeyboardInterrupt):
    """A job was asked to end, by Ctrl-C or SIGTERM: its message says how to go on, `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def sample_to(
    out: str | os.PathLike[str],
    sampler: Sampler,
    samples: int | Iterable[int],
    /,
    *,
    format: str = "png",
    class_labels: Iterable[int] | None = None,
    shard_size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    json_log: str | os.PathLike[str] | None = None,
    **how: Any,
) -> Store:
    """Draw samples into a folder; if it holds some of the same job already, those that it lacks.

    Args:
        out: the folder.
        sampler: of a network that is a module, by whose weights the folder can tell that the job is the same.
        samples: how many, or which, as of `Sampler.sample`; none twice.
        format: "png" (a file for each picture), "npz" or "webdataset", as `Store` describes them. Samples that are no
            pictures, which PNGs cannot hold, are float32.
        class_labels: of a class-conditional `UNet2D`; repeated over the samples in order.
        shard_size: samples in a shard, which is what a kill can cost each process; None: what the folder has, else a
            batch, or with batch_invariant what a batch would be.
        batch_size: samples computed together; None: what the folder has, else as of `Sampler.batches`.
        seed: 0 <= seed < 2^64.
        progress: show how all processes get on.
        json_log: a file to add a JSON line about that to, every ten seconds.
        **how: steps, timesteps, sampler, eta, noise, as of `Sampler.batches`.
    Returns: the finished samples, in all processes.
    Raises:
        ValueError: an argument is not as above, the folder holds other samples (the message names what differs), is
            being written by another job, or cannot be written; or another process of several has failed or was lost.
        OSError: a file could not be written, as on a full disk. Finished shards stay.
        Stopped: Ctrl-C or SIGTERM. Finished shards stay.
        RuntimeError: another process of several was lost before the first sample.
    """
    with ranks(sampler.device.type) as group, ExitStack() as held:
        with group.agree():
            if isinstance(group.device, torch.device) and group.device != sampler.device:
                way_out = "make it in `with ranks() as group`, for group.device"
                raise ValueError(f"the sampler is on {sampler.device}, this process's GPU is {group.device}; {way_out}")
            before = previous(out)
            if batch_size is None:
                batch_size = before.get("batch_size") or sampler.default_batch_size()
            if shard_size is None:
                shard_size = before.get("shard_size") or batch_size
            how |= {"seed": int(seed) if isinstance(seed, np.integer) else seed, "batch_size": batch_size}
            if isinstance(how.get("timesteps"), Iterator):
                how["timesteps"] = tuple(how["timesteps"])  # it is read for each shard
            placed = _placed(format, samples, class_labels, shard_size, batch_size, sampler)
            store = Store(out, json.loads(json.dumps(placed | _described(sampler, **how))))
            sampler.batches(store.indices(0), class_labels=store.labels(0), **how)  # which looks at the arguments
            if json_log is not None:
                if os.path.abspath(json_log) == os.path.abspath(out):
                    raise ValueError(f"json_log is {json_log}, the folder of the samples; name a file")
                check_writable(json_log)
        group.agree_on(store.manifest)
        with _stoppable(store, group) as stopped:
            with group.agree():
                if group.rank == 0:
                    check_writable(out, folder=True)
                    held.enter_context(locked(out))
                    store.begin()
            lacking = _lacking(store, group, progress)
            mine = lacking[group.rank :: group.size]
            if progress and group.rank == 0 and 0 < len(lacking) < group.size:
                idle = f"there are {len(lacking)} shards to draw for {group.size} processes"
                print(f"{out}: {idle}; a smaller shard_size would give work to all", file=sys.stderr)
            meet = group.meeting()
            told = Progress(
                group,
                sum(map(store.count, mine)),
                total=len(store.samples),
                before=len(store.samples) - sum(map(store.count, lacking)),
                steps=store.manifest["sampler"]["steps"],
                show=progress and bool(lacking),
                json_log=json_log,
                stopped=stopped,
            )
            with told:
                with _Writer(store, told) as writer:
                    for k in mine:
                        writer.put(k, _drawn(sampler, store, k, progress=told.stepped, **how))
                told.done()
                _wait(meet(), told)
    return store


def previous(out: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The manifest of the samples in a folder; empty if there are none."""
    return Store.open(out).manifest if is_store(out) else {}


def _placed(
    format: str,
    samples: int | Iterable[int],
    class_labels: Iterable[int] | None,
    shard_size: int,
    batch_size: int,
    sampler: Sampler,
) -> dict[str, Any]:
    """All that decides where samples lie, as of `Store`."""
    indices = Indices.of(samples)
    try:
        classes = None if class_labels is None else Indices.of(iter(class_labels))
    except ValueError as error:
        raise ValueError(f"class_labels are {str(class_labels)[:80]}; want whole numbers, 0 <= label") from error
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; want one of {', '.join(FORMATS)}")
    if format == "png" and not _draws_pictures(sampler):
        raise ValueError(f"samples are {sampler.shape}, no pictures; write them as npz or webdataset")
    if not indices:
        raise ValueError("no samples were asked for; want at least one")
    if (twice := indices.twice()) is not None:
        raise ValueError(f"sample {twice} is asked for twice; want each once")
    for name, size in (("batch_size", batch_size), ("shard_size", shard_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; want a whole number, at least 1")
    if classes is not None and len(classes) > len(indices):
        raise ValueError(f"there are {len(classes)} class labels for {len(indices)} samples; want at most one each")
    sampler.checked_labels(classes, 0 if classes is None else len(classes))
    return {
        "format": format,
        "samples": str(indices),
        "shard_size": shard_size,
        "class_labels": None if classes is None else str(classes),
    }


def _described(sampler: Sampler, /, *, seed: int, batch_size: int, **how: Any) -> dict[str, Any]:
    """All that decides the bits of samples."""
    if not isinstance(sampler.model, nn.Module):
        way_out = "want an nn.Module, whose weights tell whether a job is the same"
        raise ValueError(f"the sampler's model is a {type(sampler.model).__name__}; {way_out}")
    table = sampler.schedule.table(**how)
    return {
        "seed": seed,
        "sampler": {
            "kind": how.get("sampler", "ddpm"),
            "eta": float(how.get("eta", 0)),
            "noise": float(how.get("noise", True)),
            "steps": len(table),
            "timesteps": table.timesteps.tolist() if how.get("timesteps") is not None else None,
        },
        "schedule": sampler.schedule.to_config(),
        "shape": sampler.shape,
        "model": {
            "class": type(sampler.model).__qualname__,
            "config": dict(sampler.model.config) if isinstance(sampler.model, UNet2D) else None,
            "sha256": weights_sha256(sampler.model),
        },
        "precision": sampler.precision,
        "compiled": sampler.engine.compiles,
        "batch_size": None if sampler.micro_batch else batch_size,
        "batch_invariant": sampler.micro_batch,
        **machine(sampler.device),
    }


def _draws_pictures(sampler: Sampler) -> bool:
    return len(sampler.shape) == 3 and sampler.shape[0] in CHANNELS


def _lacking(store: Store, group: Ranks, progress: bool) -> list[int]:
    """The shards that are not done, each process having looked at its part of all."""
    from tqdm import tqdm

    shards = range(group.rank, len(store), group.size)
    silent = not progress or group.rank > 0
    with group.agree():
        looked = tqdm(shards, desc="checking", unit="shard", leave=False, delay=1, disable=silent)
        found = [k for k in looked if not store.is_done(k)]
    return sorted(k for part in group.gather(found) for k in part)


def _drawn(sampler: Sampler, store: Store, k: int, /, **how: Any) -> np.ndarray:
    """The samples of a shard."""
    output = "uint8" if _draws_pictures(sampler) else "float"
    x = sampler.sample(store.indices(k), output=output, class_labels=store.labels(k), **how)
    return np.ascontiguousarray(x.numpy())


def _wait(arrived: Callable[[], bool], told: Progress) -> None:
    """Wait for the other processes. Raises: AgreedError: one has failed, or was lost."""
    patience = PATIENCE
    try:
        while not arrived():  # a wait in torch would not hear signals
            try:
                told.check()
            except LostError:  # is process 0 through already? Soon torch knows
                patience -= 1
                if not patience:
                    raise
            time.sleep(0.1)
    except RuntimeError as error:
        told.look()  # it may have told why before it went
        raise AgreedError("another process was lost") from error


class _Writer:
    """Encodes and writes shards while others are drawn; what it was given is written when the block ends."""

    def __init__(self, store: Store, told: Progress):
        self.store, self.told = store, told
        self.pool, self.waiting = ThreadPoolExecutor(1, "writer"), deque[Future[None]]()

    def put(self, k: int, samples: np.ndarray) -> None:
        """Write a shard, soon. Raises: what an earlier one failed of."""
        while len(self.waiting) >= WAITING or (self.waiting and self.waiting[0].done()):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(self._write, k, samples))

    def _write(self, k: int, samples: np.ndarray) -> None:
        try:
            self.store.write(k, samples)
        except Exception as error:
            self.told.fail(error)  # before the shard at hand is drawn to its end
            raise
        self.told.stored(len(samples))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            for future in self.waiting:
                future.result()


@contextmanager
def _stoppable(store: Store, group: Ranks) -> Iterator[list[Stopped]]:
    """Ctrl-C and SIGTERM in this block raise `Stopped`, unless the program has handlers of its own; two kill.

    But not within a second: what a terminal or a scheduler sends to all processes, torchrun sends to its own again.

    Yields: what has been raised. Python ignores it where a finaliser happens to run, so it is to be looked at.
    """
    stopped: list[Stopped] = []
    first = 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if not stopped:
            first = time.monotonic()
            stopped.append(Stopped("", number))
            raise stopped[0]
        if time.monotonic() - first > ONCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    main = threading.current_thread() is threading.main_thread()
    usual = {number: handler for number, handler in _USUAL.items() if main and signal.getsignal(number) == handler}
    for number in usual:
        signal.signal(number, stop)
    try:
        yield stopped
    except KeyboardInterrupt as error:
        way_on = f"{store.written()} of {len(store.samples)} samples are done; the same command goes on from there"
        by = error.number if isinstance(error, Stopped) else signal.SIGINT
        raise Stopped(f"stopped: {way_on}" if group.rank == 0 else "", by) from None
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
