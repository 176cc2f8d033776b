"""Diffusers' DDPM checkpoints, read and written without diffusers.

A checkpoint consists of the configuration of a `UNet2DModel`, its parameters, and the configuration of a scheduler.
They are in `unet/` and `scheduler/` under a `model_index.json` (a saved `DDPMPipeline`), or together in one folder
(google/ddpm-cifar10-32).
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.checkpoints.parameters import first_few
from fastddpm.checkpoints.reading import in_one_line, read_json, read_pickle, read_safetensors
from fastddpm.core.schedule import Schedule
from fastddpm.storage.files import atomic

_CONFIG = "config.json"
_SCHEDULER = "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# the names of attention's parameters in 2022, and the current ones
_LEGACY = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read(folder: Path, variant: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor], Schedule]:
    """Read a checkpoint of diffusers: see `fastddpm.checkpoints.load`.

    Weights are read from safetensors, one file or several under an index, or else from a `.bin`, whose pickle may hold
    nothing but tensors. Attention parameters that have their names of 2022 get the current ones.
    """
    unet, config = _read_config(folder, "unet", _CONFIG)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{unet / _CONFIG} configures a {config['_class_name']}; want a UNet2DModel, DDPM's network")
    schedule = Schedule.from_config(_read_config(folder, "scheduler", _SCHEDULER)[1])
    return _options(config), _read_weights(unet, variant), schedule


def download(hub_id: str, variant: str | None = None) -> Path:
    """The folder of a hub model in the local cache; downloads a `.bin` only if there is no safetensors file.

    Raises: ValueError: hub_id is not the id of a hub model, or downloading failed.
    """
    if os.path.exists(hub_id):
        raise ValueError(f"{hub_id} is a file; want the folder that holds {_CONFIG}, weights and {_SCHEDULER}")
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"there is no folder {hub_id}; want a folder, or a hub id such as google/ddpm-cifar10-32")
    from huggingface_hub import snapshot_download

    configs = ["model_index.json", _CONFIG, f"unet/{_CONFIG}", _SCHEDULER, f"scheduler/{_SCHEDULER}"]
    *safe, pickled = _weight_files(variant)
    try:
        for names in (safe, [pickled]):
            weights = [part + name for part in ("", "unet/") for name in names]
            folder = Path(snapshot_download(hub_id, allow_patterns=configs + weights))
            if any(any(folder.glob(name)) for name in weights):
                break
    except Exception as error:
        reason = in_one_line(error)
        raise ValueError(
            f"there is no folder {hub_id}, and downloading it from the Hugging Face hub failed: {reason}"
        ) from error
    return folder


def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    pipeline: bool = True,
) -> None:
    """Write a checkpoint that `fastddpm.checkpoints.load` and diffusers' `DDPMPipeline.from_pretrained` read.

    Each file is replaced in one step, the weights last, so an interrupted save leaves the old weights in place.

    Args:
        folder: created if missing; files of the same names are replaced.
        config: options of `UNet2D`.
        state_dict: the parameters, on any device and in any memory format.
        schedule: the noise schedule the network was trained for.
        dtype: of the parameters in the file; None keeps theirs.
        pipeline: write into `unet/` and `scheduler/`, as diffusers does; False: write into the folder itself.
    Raises: ValueError: pipeline is False, but the folder holds a pipeline.
    """
    from safetensors.torch import save as serialise

    root = Path(folder)
    if not pipeline and (root / "unet").exists():
        raise ValueError(f"{root} holds a pipeline's unet/, which would be loaded instead; use another folder")
    unet, scheduler = (root / "unet", root / "scheduler") if pipeline else (root, root)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    _write_json(root / "model_index.json", index)
    _write_json(unet / _CONFIG, {"_class_name": "UNet2DModel", **_options(config)})
    _write_json(scheduler / _SCHEDULER, schedule.to_config())
    # safetensors wants tensors that are contiguous and share no memory
    tensors = {
        name: value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in state_dict.items()
    }
    with atomic(unet / f"{_WEIGHTS}.safetensors") as file:
        file.write(serialise(tensors, metadata={"format": "pt"}))


def _weight_files(variant: str | None) -> tuple[str, str, str, str]:
    """Names of the single safetensors file, of the index of several, a pattern for those several, and of the pickle."""
    dot = f".{variant}" if variant else ""
    return (
        f"{_WEIGHTS}{dot}.safetensors",
        f"{_WEIGHTS}.safetensors.index{dot}.json",
        f"{_WEIGHTS}{dot}-*.safetensors",
        f"{_WEIGHTS}{dot}.bin",
    )


def _read_config(folder: Path, part: str, name: str) -> tuple[Path, dict[str, Any]]:
    """(its folder, its content) of a configuration file in folder/part or else in folder."""
    for place in (folder / part, folder):
        if (place / name).is_file():
            return place, read_json(place / name)
    raise ValueError(f"{folder} is not a DDPM checkpoint of diffusers: it has no {part}/{name} and no {name}")


def _read_weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    single, index, _, pickled = _weight_files(variant)
    readers: dict[str, Callable[[Path], dict[str, Any]]]
    readers = {single: read_safetensors, index: _read_indexed, pickled: read_pickle}
    name = next((name for name in readers if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} has no weights; looked for {', '.join(readers)}")
    content = readers[name](folder / name)
    others = [key for key, value in content.items() if not isinstance(value, Tensor) or not value.is_floating_point()]
    if others:
        surplus = f"entries that are not floating-point tensors ({first_few(others)})"
        raise ValueError(f"{folder / name} holds {surplus}; want a network's parameters alone")
    return {_renamed(key): value.detach() for key, value in content.items()}


def _read_indexed(path: Path) -> dict[str, Tensor]:
    """The tensors of several safetensors files, named in an index."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path} has no weight_map; want one that names the file of each parameter")
    content: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        content |= read_safetensors(path.parent / name)
    return content


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without diffusers' notes, such as its version."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _renamed(key: str) -> str:
    """The current name of a parameter."""
    legacy = _LEGACY.fullmatch(key)
    return f"{legacy[1]}.{_RENAMED[legacy[2]]}.{legacy[3]}" if legacy else key


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
