"""The manifest of a job: what decides where each sample is stored, and what decides its bits.

A job resumes only if its manifest is the same. Its keys and values are part of the file format.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from fastddpm.audio import Audio
from fastddpm.checkpoints.medium import MEDIUM
from fastddpm.core import checks
from fastddpm.core.checks import one_of, shown, whole
from fastddpm.core.schedule import elements
from fastddpm.networks.fused import is_own, obstacles_of
from fastddpm.sampling.parallel import checked_window
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.audio import check_soundfile
from fastddpm.storage.fingerprint import code_sha256, machine, value_sha256, weights_sha256
from fastddpm.storage.indices import LIMIT, Indices
from fastddpm.storage.shard_formats import FORMATS, are_images


@dataclass(frozen=True)
class Drawing:
    """The arguments of `Sampler.batches` that are the same for every shard, under the same names."""

    seed: int
    batch_size: int
    steps: int | None
    timesteps: Iterable[int] | None
    sampler: str
    eta: float
    noise: float
    start_timestep: int | None = None
    strength: float | None = None
    trajectory: Iterable[int] | None = None
    parallel: str = "off"
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("timesteps", "trajectory"):
            if isinstance(given := getattr(self, name), Iterator):
                object.__setattr__(self, name, tuple(given))  # it is read for each shard


def manifest(
    sampler: Sampler,
    drawing: Drawing,
    samples: int | Iterable[int],
    *,
    format: str,
    class_labels: Iterable[int] | None,
    shard_size: int,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The manifest of a job, with JSON's types.

    Args: given: what the samples are given besides labels, as `condition_arguments.arguments` returns it.
    Raises: ValueError: an argument is not as in `job.sample_to`.
    """
    where = _storage(sampler, samples, format, class_labels, shard_size, drawing)
    hashes = {name: value_sha256(value) for name, value in given.items()}
    return json.loads(json.dumps(where | _origin(sampler, drawing) | ({"given": hashes} if hashes else {})))


def _storage(
    sampler: Sampler,
    samples: int | Iterable[int],
    format: str,
    class_labels: Iterable[int] | None,
    shard_size: int,
    drawing: Drawing,
) -> dict[str, Any]:
    """What decides where each sample is stored; see `ShardFolder`."""
    indices = Indices.of(samples)
    classes = None if class_labels is None else _labels(class_labels)
    one_of("format", format, FORMATS)
    if format == "png" and not draws_images(sampler, drawing):
        what = f"samples are {sampler.shape}"
        if drawing.trajectory is not None:
            what = "samples are trajectories, of several images"
        elif sampler.decoder is not None:
            what = f"{what} latents, which the VAE of the pipeline turns into images"
        else:
            what = f"{what}, which are not images"
        raise ValueError(f"{what}; write them as npz or webdataset")
    medium = sampler.medium
    if format == "wav" and (not isinstance(medium, Audio) or sampler.shape[:-1] != (medium.channels,)):
        raise ValueError(
            f"format is wav, but the checkpoint's {MEDIUM} does not describe sounds (samples are "
            f"{sampler.shape}); use npz or webdataset"
        )
    if format == "wav":
        check_soundfile()  # before the work
    if format == "wav" and drawing.trajectory is not None:
        raise ValueError("format is wav, but each sample is a trajectory of several waveforms; use npz or webdataset")
    if not indices:
        raise ValueError("no samples were requested; want at least one")
    if (twice := indices.duplicate()) is not None:
        raise ValueError(f"sample {twice} is requested twice; want each once")
    whole("batch_size", drawing.batch_size, 1, LIMIT)
    shard_size = whole("shard_size", shard_size, 1, LIMIT)
    if classes is not None and len(classes) > len(indices):
        raise ValueError(f"there are {len(classes)} class labels for {len(indices)} samples; want at most one each")
    if classes is None:
        sampler.checked_labels(None, 0)
    else:  # the first and the last label of each run: all others are between
        ends = torch.from_numpy(np.unique([classes.starts, classes.starts + classes.lengths - 1]))
        sampler.checked_labels(ends, len(ends))
    return {
        "format": format,
        "samples": str(indices),
        "shard_size": shard_size,
        "class_labels": None if classes is None else str(classes),
        "shape": _stored_shape(sampler, drawing),
        **(_of_waves(medium, sampler.shape) if format == "wav" and isinstance(medium, Audio) else {}),
    }


def _of_waves(medium: Audio, shape: tuple[int, ...]) -> dict[str, Any]:
    """What decides a WAV file besides its sample, and the shape of its waveform."""
    decoded = {"shape": medium.shape_of_waveform(shape), "sample_rate": medium.sample_rate}
    return decoded | ({} if medium.code == "waveform" else {"audio": medium.code})


def _labels(given: Iterable[int]) -> Indices:
    try:
        return Indices.of(given if isinstance(given, Indices | range) else iter(given))
    except (ValueError, TypeError) as error:
        raise ValueError(f"class_labels are {shown(given)}; want a list of whole numbers, 0 <= label") from error


def _origin(sampler: Sampler, drawing: Drawing) -> dict[str, Any]:
    """What decides the bits of each sample."""
    if not isinstance(sampler.model, nn.Module):
        way_out = "want an nn.Module, whose weights tell whether a job is the same"
        raise ValueError(f"the sampler's model is a {type(sampler.model).__name__}; {way_out}")
    table = sampler.table(
        drawing.steps,
        sampler=drawing.sampler,
        eta=drawing.eta,
        timesteps=drawing.timesteps,
        noise=drawing.noise,
    )
    model = sampler.model
    changes = list(obstacles_of(model)) if is_own(model) else []
    return {
        "seed": checks.seed(drawing.seed),
        "sampler": {
            "kind": drawing.sampler,
            "eta": float(drawing.eta),
            "noise": float(drawing.noise),
            "steps": len(table),
            "timesteps": table.timesteps.tolist() if drawing.timesteps is not None else None,
            **_beginning_and_end(drawing),
        },
        **_parallel(drawing),
        "schedule": sampler.schedule.to_config(),
        **_unusual_settings(sampler),
        **({} if sampler.decoder is None else {"latents": True}),
        "model": {
            "class": type(model).__qualname__,
            "config": dict(model.config) if is_own(model) else None,
            "sha256": weights_sha256(model),
            **({"changes": changes} if changes else {}),  # such as another eps
        },
        "code": code_sha256(model, numbers=is_own(model)),
        "precision": sampler.precision,
        "compiled": sampler.engine.compiles,
        "batch_size": None if sampler.micro_batch else int(drawing.batch_size),
        "batch_invariant": sampler.micro_batch,
        **machine(sampler.device),
    }


def _parallel(drawing: Drawing) -> dict[str, Any]:
    """The window, which decides the layout. The mode only if it is "law": "bits" and "off" have the same bits."""
    if not (window := checked_window(drawing.parallel, drawing.window)):
        return {}
    return {"window": window} | ({"parallel": "law"} if drawing.parallel == "law" else {})


def _beginning_and_end(drawing: Drawing) -> dict[str, Any]:
    """Where the steps begin, and which states are kept, where these are not the defaults."""
    found: dict[str, Any] = {"start_timestep": drawing.start_timestep, "strength": drawing.strength}
    if drawing.trajectory is not None:
        found["trajectory"] = elements(drawing.trajectory)
    return {name: value for name, value in found.items() if value is not None}


def _unusual_settings(sampler: Sampler) -> dict[str, Any]:
    """`timestep_values` and `value_range`, where they are not the defaults."""
    times = sampler.engine.prepared.times
    found = {"timestep_values": times if times is None else value_sha256(times), "value_range": sampler.value_range}
    return {name: value for name, value in found.items() if value is not None}


def _stored_shape(sampler: Sampler, drawing: Drawing) -> tuple[int, ...]:
    """The shape of a sample; with a trajectory, of all its states."""
    frames = () if drawing.trajectory is None else (len(set(elements(drawing.trajectory))) + 1,)
    return frames + sampler.shape


def draws_images(sampler: Sampler, drawing: Drawing | None = None) -> bool:
    """Whether the samples of a sampler are stored as images."""
    shape = sampler.shape if drawing is None else _stored_shape(sampler, drawing)
    return are_images(shape, latents=sampler.decoder is not None)
