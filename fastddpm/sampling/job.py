"""Jobs: many samples into a folder, by all processes that torchrun starts, through kills and restarts.

Each shard of the folder is drawn by one process, in separate batches. So its bits do not depend on which process
draws it, on the number of processes, or on earlier interruptions. A restart draws the shards that are missing.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.audio import Audio
from fastddpm.checkpoints.medium import Medium
from fastddpm.core.checks import checked_call, flag, shown, takes_options_of
from fastddpm.processes.displays import Stderr, check_log
from fastddpm.processes.distributed import AgreedError, Ranks, ranks
from fastddpm.processes.progress import JobProgress, LostError
from fastddpm.processes.signals import Stopped, stoppable
from fastddpm.sampling.beginning import steps_of_strength, with_visits
from fastddpm.sampling.condition_arguments import ConditionArguments, arguments
from fastddpm.sampling.conditions import Conditions
from fastddpm.sampling.manifest import Drawing, draws_images, manifest
from fastddpm.sampling.parallel import default_chains
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.files import as_path, check_writable, locked
from fastddpm.storage.fingerprint import weights_sums
from fastddpm.storage.indices import Indices
from fastddpm.storage.shards import ShardFolder, continued, is_shard_folder

WAITING = 2  # shards that may wait to be written before drawing waits too
PATIENCE = 600  # tenths of a second to wait for torch to report whether process 0 was lost or is done


@checked_call
@takes_options_of(ConditionArguments)
def sample_to(
    out: str | os.PathLike[str],
    from_sampler: Sampler,
    samples: int | Iterable[int],
    /,
    *,
    format: str = "png",
    class_labels: Iterable[int] | None = None,
    shard_size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    timesteps: Iterable[int] | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    noise: float = True,
    start_timestep: int | None = None,
    strength: float | None = None,
    trajectory: Iterable[int] | None = None,
    parallel: str = "off",
    window: int | None = None,
    progress: bool = True,
    json_log: str | os.PathLike[str] | None = None,
    **given: Any,
) -> ShardFolder:
    """Draw samples into a folder; if it already holds some of the same job, draw those that are missing.

    A folder may grow: the same job with further samples after those of the folder draws these. Finished samples keep
    their bits, and the further ones are in shards of their own.

    Args:
        out: the folder.
        from_sampler: its model must be a module, whose weights and code tell whether a job is the same. The weights
            must not change while the job runs.
        samples: how many, or which, as in `Sampler.sample`, without duplicates.
        format: "png" or "wav" (a file for each image or waveform), "npz" or "webdataset", as `ShardFolder` describes
            them. Samples that are not images, such as latents, are written as float32; for them PNGs are not available.
        class_labels: for a class-conditional `UNet2D`; repeated over the samples in order.
        shard_size: samples per shard; an unfinished shard is drawn again after a restart. None: as in the folder, else
            batch_size.
        batch_size: samples computed together; None: as in the folder, else the default of `Sampler.batches`. With
            batch_invariant it only sets the default of shard_size.
        seed: 0 <= seed < 2^64.
        steps, timesteps, sampler, eta, noise, start_timestep, strength: as in `Sampler.batches`.
        trajectory: as in `Sampler.batches`; the states are stored with the samples, as float32.
        parallel, window: as in `Sampler.batches`. A folder drawn with "bits" has the files of one with the same window
            and "off", and either may continue the other.
        given: other arguments of `Sampler.batches`, such as model_kwargs, guidance_scale or known. A folder cannot grow
            if these hold one entry per sample.
        progress: show the progress of all processes.
        json_log: a file to append the progress to, as a JSON line every ten seconds: a new one, or such a log.
    Returns: the folder with the finished samples, in every process.
    Raises:
        ValueError: an argument is not as above, the folder holds other samples (the message names what differs), is
            being written by another job, or cannot be written; the weights have changed, or files were deleted, while
            the job ran; or another process of this job has failed or was lost.
        OSError: a file could not be written, as on a full disk. Finished shards stay.
        Stopped: Ctrl-C or SIGTERM. Finished shards stay.
        RuntimeError: another process of this job was lost before the first sample.
    """
    _check_types(from_sampler, progress)
    with ranks(from_sampler.device.type) as group:
        with group.agree():
            _check_device(from_sampler, group)
            out = as_path("out", out)
            before = previous_manifest(out)
            if batch_size is None:
                default = default_chains(from_sampler.default_batch_size(), parallel, window)
                batch_size = before.get("batch_size") or default
            if shard_size is None:
                shard_size = before.get("shard_size") or batch_size
            drawing = Drawing(
                *(seed, batch_size, steps, timesteps, sampler, eta, noise, start_timestep, strength, trajectory),
                parallel=parallel,
                window=window,
            )
            conditions = _conditions(from_sampler, samples, class_labels, given)
            facts = manifest(
                from_sampler,
                drawing,
                samples,
                format=format,
                class_labels=class_labels,
                shard_size=shard_size,
                given={} if conditions is None else arguments(conditions),
            )
            shards = ShardFolder(out, continued(before, facts))
            drawer = _Drawer(from_sampler, drawing, conditions)
            from_sampler.batches(shards.indices(0), **drawer.options(shards, 0))  # checks them
            _check_log(json_log, shards)
        group.agree_on(shards.manifest)
        with stoppable(lambda: _how_to_resume(shards) if group.rank == 0 else "") as stopped:
            # kept until the processes part: others may still post to its board
            board = _draw_missing(drawer, shards, group, progress, json_log, stopped)
    del board
    return shards


def previous_manifest(out: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The manifest of the samples in a folder; empty if there are none."""
    return ShardFolder.open(out).manifest if is_shard_folder(out) else {}


def _draw_missing(
    drawer: "_Drawer",
    shards: ShardFolder,
    group: Ranks,
    progress: bool,
    json_log: str | os.PathLike[str] | None,
    stopped: list[Stopped],
) -> JobProgress:
    """Draw and write this process's share of the missing shards, then wait for the other processes."""
    with ExitStack() as lock:
        with group.agree():
            if group.rank == 0:
                check_writable(shards.path, folder=True)
                lock.enter_context(locked(shards.path))
                shards.begin()
        missing = _missing(shards, group, progress)
        mine = missing[group.rank :: group.size]
        if progress and group.rank == 0 and 0 < len(missing) < group.size:
            idle = f"there are {len(missing)} shards to draw for {group.size} processes"
            print(f"{shards.path}: {idle}; a smaller shard_size would give work to all", file=Stderr())
        meet = group.meeting()
        job_progress = JobProgress(
            group,
            sum(map(shards.count, mine)),
            total=len(shards.samples),
            before=len(shards.samples) - sum(map(shards.count, missing)),
            steps=drawer.steps,
            show=progress and bool(missing),
            json_log=json_log,
            stopped=stopped,
        )
        with job_progress:
            with _Writer(shards, drawer.sampler.medium, job_progress) as writer:
                for k in mine:
                    writer.put(k, drawer.draw(shards, k, job_progress))
            job_progress.done()
            _wait(meet(), job_progress)
        with group.agree():
            if group.rank == 0:
                shards.check_complete()
    return job_progress


def _check_device(sampler: Sampler, group: Ranks) -> None:
    if isinstance(group.device, torch.device) and group.device != sampler.device:
        way_out = "create it in `with ranks() as group`, on group.device"
        raise ValueError(f"the sampler is on {sampler.device}, this process's GPU is {group.device}; {way_out}")


def _check_types(sampler: Sampler, progress: bool) -> None:
    if not isinstance(sampler, Sampler):
        raise ValueError(f"from_sampler is {shown(sampler)}; want a Sampler")
    flag("progress", progress)


def _check_log(json_log: str | os.PathLike[str] | None, shards: ShardFolder) -> None:
    if json_log is None:
        return
    path, folder = as_path("json_log", json_log).resolve(), shards.path.resolve()
    if path == folder:
        raise ValueError(f"json_log is {json_log}, the folder of the samples; name a file")
    if path.is_relative_to(folder) and shards.owns(path.relative_to(folder)):
        raise ValueError(f"json_log is {json_log}, whose name the folder of the samples uses itself; name another file")
    check_log(json_log)


def _how_to_resume(shards: ShardFolder) -> str:
    return f"stopped: {shards.written()} of {len(shards.samples)} samples are done; the same command resumes the job"


def _missing(shards: ShardFolder, group: Ranks, progress: bool) -> list[int]:
    """The numbers of the shards that are not done. Each process checks its part of the shards."""
    from tqdm import tqdm

    numbers = range(group.rank, len(shards), group.size)
    silent = not progress or group.rank > 0
    with group.agree():
        how = {"leave": False, "delay": 1, "disable": silent, "file": Stderr(), "dynamic_ncols": True}
        bar = tqdm(numbers, desc="checking", unit="shard", **how)
        missing = [k for k in bar if not shards.is_done(k)]
    return sorted(k for part in group.gather(missing) for k in part)


def _conditions(
    sampler: Sampler, samples: int | Iterable[int], class_labels: Iterable[int] | None, given: Mapping[str, Any]
) -> Conditions | None:
    """What all samples are given; None: nothing but labels, which may be too many to list."""
    if not given:
        return None
    count = len(Indices.of(samples))
    if class_labels is None:
        return sampler.conditions(ConditionArguments(**given), count)
    labels = Indices.of(class_labels)
    repeated = labels.take(np.arange(count) % len(labels)) if labels else np.empty(0, np.int64)
    return sampler.conditions(ConditionArguments(class_labels=repeated, **given), count)


class _Drawer:
    """Draws shards with the weights that the sampler's model has now."""

    def __init__(self, sampler: Sampler, drawing: Drawing, conditions: Conditions | None):
        self.sampler, self.drawing, self.conditions = sampler, drawing, conditions
        self.weights = self._weights()

    @property
    def steps(self) -> int:
        """How many steps the samples of a batch take."""
        drawing = self.drawing
        table = self.sampler.table(drawing.steps, sampler=drawing.sampler, eta=drawing.eta, timesteps=drawing.timesteps)
        steps = len(table)
        if drawing.start_timestep is not None:
            steps = int((table.timesteps <= drawing.start_timestep).sum())
        elif drawing.strength is not None:
            steps = steps_of_strength(steps, drawing.strength)
        return with_visits(steps, 1 if self.conditions is None else self.conditions.resample)

    def options(self, shards: ShardFolder, k: int) -> dict[str, Any]:
        """The arguments of `Sampler.batches` for shard k."""
        if self.conditions is None:
            return {"class_labels": shards.labels(k), **vars(self.drawing)}
        places = torch.tensor(shards.places(k), dtype=torch.int64, device="cpu")
        return {**arguments(self.conditions.take(places)), **vars(self.drawing)}

    def draw(self, shards: ShardFolder, k: int, progress: JobProgress) -> Tensor:
        """The samples of shard k. Raises: ValueError: the weights are others now."""
        x = self.sampler.sample(
            shards.indices(k),
            output="uint8" if draws_images(self.sampler, self.drawing) else "float",
            progress=progress.stepped,
            **self.options(shards, k),
        )
        if self._weights() != self.weights:
            kept = f"shards of the old weights stay in {shards.path}"
            way_out = "give the job a copy of the model that nothing else changes"
            raise ValueError(f"the model's weights were changed while the job ran; {kept}, and no others: {way_out}")
        return x

    def _weights(self) -> object:
        model = self.sampler.model
        return weights_sums(model) if isinstance(model, nn.Module) else None


def _wait(arrived: Callable[[], bool], progress: JobProgress) -> None:
    """Wait for the other processes. Raises: AgreedError: one has failed, or was lost."""
    patience = PATIENCE
    try:
        while not arrived():  # torch's own wait does not react to signals
            try:
                progress.check()
            except LostError:  # process 0 may have finished; torch reports that soon
                patience -= 1
                if not patience:
                    raise
            time.sleep(0.1)
    except RuntimeError as error:
        progress.look()  # raises the reason that the process posted before it was lost, if any
        raise AgreedError("another process was lost") from error


class _Writer:
    """Decodes, encodes and writes shards while others are drawn. When the block ends, all of them are written."""

    def __init__(self, shards: ShardFolder, medium: Medium | None, progress: JobProgress):
        self.shards, self.medium, self.progress = shards, medium, progress
        self.pool, self.waiting = ThreadPoolExecutor(1, "writer"), deque[Future[None]]()

    def put(self, k: int, samples: Tensor) -> None:
        """Queue a shard for writing. Raises: the error of an earlier one."""
        while len(self.waiting) >= WAITING or (self.waiting and self.waiting[0].done()):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(self._write, k, samples))

    def _write(self, k: int, samples: Tensor) -> None:
        try:
            if self.shards.format == "wav" and isinstance(self.medium, Audio):
                samples = self.medium.decode(samples)
            self.shards.write(k, np.ascontiguousarray(samples.numpy()))
        except Exception as error:
            self.progress.fail(error)  # which ends the drawing of the current shard
            raise
        self.progress.stored(len(samples))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            for future in self.waiting:
                future.result()
