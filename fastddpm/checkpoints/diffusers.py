"""Diffusers' DDPM checkpoints, read and written without diffusers.

A checkpoint consists of the configuration of a `UNet2DModel`, its parameters, and the configuration of a scheduler.
They are in `unet/` and `scheduler/` under a `model_index.json` (a saved `DDPMPipeline`), or together in one folder
(google/ddpm-cifar10-32). diffusers' training examples also write `unet_ema/`, the average of the weights, and folders
`checkpoint-500/` whose scheduler is in the folder above.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.checkpoints import lerobot
from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.medium import MEDIUM, Medium, check_medium, read_medium, write_medium
from fastddpm.checkpoints.reading import as_folder, in_one_line, named, read_any_json, read_json
from fastddpm.checkpoints.weights import WEIGHTS, read_weights, weight_files
from fastddpm.core.checks import checked_call, flag, is_whole, real, shown
from fastddpm.core.names import SHIPPED_MODELS
from fastddpm.core.schedule import Schedule
from fastddpm.networks.config import beyond_diffusers as config_beyond_diffusers
from fastddpm.networks.config import complete_config
from fastddpm.networks.fused import completed, kind_of
from fastddpm.networks.unet2d import UNet2D
from fastddpm.storage.files import atomic, check_regular

WANTED = f"want a folder, one of {', '.join(SHIPPED_MODELS)}, or a hub id such as google/ddpm-cifar10-32"
_INDEX = "model_index.json"
_CONFIG = "config.json"
_SCHEDULER = "scheduler_config.json"
_CLASSES = "classes.json"
_NULL_LABEL = "_null_label"  # in the options of the network, of which diffusers ignores those that begin with "_"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_DECODERS = re.compile("vae|vq|autoencoder", re.IGNORECASE)  # in the name or the class of a pipeline's component
# the state of diffusers' EMAModel, which it saves among the options of the network
_EMA_STATE = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
}  # fmt: skip
_SCALE = "timestep_scale"  # which we write among the options of a network that is given t times this
_OWN_CLASSES = ("UNet2D", "UNet1D")  # of the networks that diffusers does not have; so it does not load them as others


def read(folder: Path, variant: str | None = None, schedule: Schedule | None = None) -> Checkpoint:
    """Read a checkpoint of diffusers: see `fastddpm.checkpoints.load`."""
    unet, notes = _network_folder(folder)
    config = read_json(unet / _CONFIG)
    if config.get("_class_name", "UNet2DModel") not in ("UNet2DModel", *_OWN_CLASSES):
        class_name = named(config["_class_name"])
        raise ValueError(f"{unet / _CONFIG} configures a {class_name}; want a UNet2DModel, DDPM's network")
    options = {key: value for key, value in _options(config).items() if key not in (*_EMA_STATE, _SCALE)}
    scale = None if config.get(_SCALE) is None else real(f"{unet / _CONFIG}: {_SCALE}", config[_SCALE], 0, above=True)
    with _naming(unet / _CONFIG):
        complete, least = completed(options)
        null_label = _null_label(config.get(_NULL_LABEL), complete)
    home, scheduler = _home(folder)
    if schedule is None:
        schedule, assumed = _read_schedule(folder, home, scheduler)
        notes += assumed
    parameters, renamed = read_weights(unet, variant)
    saved = sum(value.numel() for value in parameters.values())
    if least > saved:
        raise ValueError(
            f"{unet / _CONFIG} configures a network of {least} parameters or more, but its weights are {saved} "
            "numbers; want the configuration that they were saved with"
        )
    classes, ignored = _read_classes(home, complete["num_class_embeds"] if null_label is None else null_label)
    decoder = home if _has_latents(home) else None
    notes = *notes, *renamed, *ignored
    with _naming(home / MEDIUM):
        check_medium(medium := read_medium(home), _shape(complete, medium))
    return Checkpoint(
        options, parameters, schedule, classes, decoder, notes, null_label, timestep_scale=scale, medium=medium
    )


def _shape(complete: Mapping[str, Any], medium: Medium | None) -> tuple[int, ...]:
    """The shape of a network's samples, as far as its options say; the length that a text has, if they do not."""
    if "input_dim" not in complete:
        return complete["in_channels"], 1, 1
    return complete["input_dim"], complete["sample_size"] or getattr(medium, "length", 1)


def decoder_of(folder: Path) -> tuple[str, str] | None:
    """(name, class) of the component of a pipeline that turns latents into images; None: the pipeline has none."""
    for name, value in read_json(folder / _INDEX).items():
        is_component = isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) and name.isidentifier()
        if is_component and _DECODERS.search(f"{name} {value[1]}"):
            return name, value[1]
    return None


def download(hub_id: str, variant: str | None = None) -> Path:
    """The folder of a hub model in the local cache, of diffusers or a diffusion policy of lerobot.

    Downloads a `.bin` only if there is no safetensors file.

    Raises: ValueError: hub_id is not the id of a hub model, or downloading failed.
    """
    if os.path.exists(hub_id):
        raise ValueError(f"{hub_id} is a file; want the folder that holds {_CONFIG}, weights and {_SCHEDULER}")
    if not _HUB_ID.fullmatch(hub_id) or len(hub_id) > 200:
        raise ValueError(f"there is no folder {named(hub_id)}; {WANTED}")
    from huggingface_hub import snapshot_download

    def fetch(parts: Sequence[str], configs: Sequence[str]) -> Path:
        *safe, pickled = weight_files(variant)
        for names in (safe, [pickled]):
            weights = [part + name for part in parts for name in names]
            folder = Path(snapshot_download(hub_id, allow_patterns=[*configs, *weights]))
            if any(any(folder.glob(name)) for name in weights):
                break
        return folder

    configs = [_INDEX, _CLASSES, MEDIUM, _CONFIG, f"unet/{_CONFIG}", _SCHEDULER, f"scheduler/{_SCHEDULER}"]
    try:
        folder = fetch(("", "unet/"), configs)
        if os.path.exists(folder / _CONFIG) and lerobot.is_policy(read_json(folder / _CONFIG)):
            snapshot_download(hub_id, allow_patterns=[_CONFIG, lerobot.WEIGHTS])
        if os.path.exists(folder / _INDEX) and (decoder := decoder_of(folder)) is not None:
            fetch([f"{decoder[0]}/"], [f"{decoder[0]}/{_CONFIG}"])
    except Exception as error:
        reason = in_one_line(error)
        raise ValueError(
            f"there is no folder {hub_id}, and downloading it from the Hugging Face hub failed: {reason}"
        ) from error
    return folder


@checked_call
def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    pipeline: bool = True,
    null_label: int | None = None,
    timestep_scale: float | None = None,
    medium: Medium | None = None,
) -> None:
    """Write a checkpoint that `fastddpm.checkpoints.load` and diffusers' `DDPMPipeline.from_pretrained` read.

    diffusers does not read a network that it lacks: see `beyond_diffusers`.
    Each file is replaced in one step, the weights last, so an interrupted save leaves the old weights in place.

    Args:
        folder: created if missing; files of the same names are replaced.
        config: options of `UNet2D` or `UNet1D`.
        state_dict: the parameters, on any device and in any memory format.
        schedule: the noise schedule the network was trained for.
        dtype: of the parameters in the file; None keeps theirs.
        pipeline: write into `unet/` and `scheduler/`, as diffusers does; False: write into the folder itself.
        null_label: the last label, if it stands for no class: see `Checkpoint`.
        timestep_scale: the network is given t times this; None: t itself.
        medium: what the samples are, if they are sounds or texts.
    Raises: ValueError: pipeline is False, but the folder holds a pipeline; or an argument is not as above.
    """
    root = as_folder("folder", folder)
    _check_content(config, state_dict, schedule, dtype)
    null_label = _null_label(null_label, config)
    if not flag("pipeline", pipeline) and os.path.exists(root / "unet"):
        raise ValueError(f"{root} holds a pipeline's unet/, which would be loaded instead; use another folder")
    unet, scheduler = (root / "unet", root / "scheduler") if pipeline else (root, root)
    options = _options(config)
    check_medium(medium, _shape(completed(options)[0], medium))
    known = not beyond_diffusers(config, timestep_scale)
    class_name = "UNet2DModel" if known else kind_of(config).__name__
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers" if known else "fastddpm", class_name],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    weights = unet / f"{WEIGHTS}.safetensors"
    for path in (root / _INDEX, unet / _CONFIG, scheduler / _SCHEDULER, weights):
        check_regular(path)  # writing into a pipe would wait for its reader
    _write_json(root / _INDEX, index)
    if medium is None:
        (root / MEDIUM).unlink(missing_ok=True)  # of a checkpoint that this one replaces
    else:
        write_medium(root, medium)
    private = {"_class_name": class_name} | ({} if null_label is None else {_NULL_LABEL: null_label})
    scale = {} if timestep_scale is None else {_SCALE: timestep_scale}
    _write_json(unet / _CONFIG, private | options | scale)
    _write_json(scheduler / _SCHEDULER, schedule.to_config())
    _write_weights(weights, state_dict, dtype)


def _write_weights(path: Path, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write parameters as safetensors, which wants tensors that are contiguous and share no memory."""
    from safetensors.torch import save as serialise

    tensors = {
        name: value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in state_dict.items()
    }
    with atomic(path) as file:
        file.write(serialise(tensors, metadata={"format": "pt"}))


def _check_content(config: Any, state_dict: Any, schedule: Any, dtype: Any) -> None:
    """Check arguments of `save`. Raises: ValueError: one is not as described there."""
    if not isinstance(config, Mapping):
        raise ValueError(f"config is {shown(config)}; want the options of a UNet2D by name")
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"state_dict is {shown(state_dict)}; want parameters by name, such as unet.state_dict()")
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}; want a Schedule")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype is {shown(dtype)}; want that of floating-point numbers, such as torch.float16, or None"
        )


def beyond_diffusers(config: Mapping[str, Any], timestep_scale: float | None = None) -> list[str]:
    """Why diffusers cannot load a checkpoint, as sentences without a subject; empty: it can."""
    if kind_of(config) is not UNet2D:
        return ["is a UNet1D, for sequences"]
    found = config_beyond_diffusers(complete_config(dict(config)))
    return found if timestep_scale is None else [*found, f"is given t times {timestep_scale:g}"]


def _network_folder(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """(the folder of the network, notes) of a checkpoint."""
    unet, ema = folder / "unet", folder / "unet_ema"
    for place in (unet, folder, ema):
        if os.path.lexists(place / _CONFIG):
            note = ""
            if place == ema:
                note = f"{folder} has no unet/; the average of the weights, unet_ema/, was read instead"
            elif place == unet and os.path.lexists(ema / _CONFIG):
                note = f"{folder} also holds an average of the weights, which was not read; it is the checkpoint {ema}"
            return place, (note,) if note else ()
    raise ValueError(f"{folder} is not a DDPM checkpoint of diffusers: it has no unet/{_CONFIG} and no {_CONFIG}")


def _home(folder: Path) -> tuple[Path, Path | None]:
    """(the folder of the pipeline, its scheduler's configuration): the folder itself, or else one above it."""
    here = Path(os.path.abspath(folder))
    for place in (folder, *here.parents[: 2 if here.name.startswith("unet") else 1]):
        found = (path for path in (place / "scheduler" / _SCHEDULER, place / _SCHEDULER) if os.path.lexists(path))
        scheduler = next(found, None)
        if scheduler is not None or os.path.lexists(place / _INDEX):
            return place, scheduler
    return folder, None


def _read_schedule(folder: Path, home: Path, scheduler: Path | None) -> tuple[Schedule, tuple[str, ...]]:
    """(the schedule, notes)."""
    if scheduler is not None:
        with _naming(scheduler):
            schedule = Schedule.from_config(read_json(scheduler))
        return schedule, () if home == folder else (f"{folder} has no {_SCHEDULER}; that of {scheduler} was read",)
    if os.path.lexists(home / _INDEX):
        raise ValueError(f"{home} is not a DDPM checkpoint: it has no scheduler/{_SCHEDULER} and no {_SCHEDULER}")
    schedule = Schedule()
    return schedule, (
        f"{folder} has no {_SCHEDULER}, so the defaults were assumed: T = {schedule.num_train_timesteps}, "
        f"{schedule.beta_schedule} betas from {schedule.beta_start} to {schedule.beta_end}, "
        f"prediction_type {schedule.prediction_type}; if the model was trained with another schedule, pass schedule=, "
        f"or put its {_SCHEDULER} there",
    )


def _read_classes(home: Path, count: int | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(the names of the classes, notes)."""
    path = home / _CLASSES
    if count is None or not os.path.exists(path):
        return None, ()
    names = read_any_json(path)
    if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
        return tuple(names), ()
    return None, (f"{path} was ignored: it is not a list of names of the network's {count} classes",)


def _null_label(value: Any, config: Mapping[str, Any]) -> int | None:
    """The null label of a network. Raises: ValueError: it is not the last label of the network's classes."""
    last = (config.get("num_class_embeds") or 0) - 1
    if value is None:
        return None
    if not is_whole(value) or value != last or last < 1 or config.get("class_embed_type") is not None:
        wanted = (
            f"the last label, {last}" if last > 0 else "None: this network does not have two or more class embeddings"
        )
        raise ValueError(f"null_label is {shown(value)}; want {wanted}")
    return int(value)


def _has_latents(home: Path) -> bool:
    """Whether a pipeline's network draws latents, which another of its models turns into images."""
    if not os.path.lexists(home / _INDEX):
        return False
    return read_json(home / _INDEX).get("_class_name") == "LDMPipeline" or decoder_of(home) is not None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """In this block, errors about options name the file that holds them."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without diffusers' notes, such as its version."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True, default=_number) + "\n").encode())


def _number(value: Any) -> int | float:
    """A number of numpy, which json does not write. Raises: ValueError: it is none."""
    return int(value) if is_whole(value) else real("config: a value", value)
