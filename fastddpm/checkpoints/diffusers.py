"""Diffusers' DDPM checkpoints, read and written without diffusers.

A checkpoint is the configuration of a `UNet2DModel`, its parameters and the configuration of a scheduler. They lie in
`unet/` and `scheduler/` under a `model_index.json` (a saved `DDPMPipeline`), or in one folder (google/ddpm-cifar10-32).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.core.schedule import Schedule
from fastddpm.storage.files import atomic

_CONFIG, _SCHEDULER, _WEIGHTS = "config.json", "scheduler_config.json", "diffusion_pytorch_model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# attention's parameters in 2022
_LEGACY = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(
    source: str | os.PathLike[str], *, variant: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], Schedule]:
    """Read a checkpoint.

    Weights come from safetensors, one file or several under an index, or else from a `.bin`, in which a pickle of
    anything but tensors is refused unrun. Attention parameters that bear their names of 2022 get today's.

    Args:
        source: a folder, or the id of a model on the Hugging Face hub ("google/ddpm-cifar10-32"), downloaded once.
        variant: the variant of the weights, as "fp16" in diffusion_pytorch_model.fp16.safetensors.
    Returns: (options of `UNet2D`, parameters by name on the CPU in the dtype stored, schedule).
    Raises: ValueError: there is no checkpoint, or a file of it is missing, damaged or for another class.
    """
    if not os.fspath(source):
        raise ValueError("the checkpoint is named ''; name a folder, or a hub id such as google/ddpm-cifar10-32")
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(os.fspath(source), variant)
    unet, config = _read_config(folder, "unet", _CONFIG)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{unet / _CONFIG} is of a {config['_class_name']}; want a UNet2DModel, the network of DDPM")
    schedule = Schedule.from_config(_read_config(folder, "scheduler", _SCHEDULER)[1])
    return _options(config), _read_weights(unet, variant), schedule


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy parameters into module, in module's own dtype, device and memory format.

    Raises: ValueError: a parameter is missing, surplus or of another shape; nothing is copied then.
    """
    own = module.state_dict()
    missing, surplus = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    reshaped = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if state_dict[name].shape != own[name].shape
    ]
    found = (("missing", missing), ("surplus", surplus), ("of another shape", reshaped))
    if problems := [f"{len(names)} {what} ({_listed(names)})" for what, names in found if names]:
        raise ValueError(
            f"the parameters do not fit the network: {', '.join(problems)}; load them with their own config"
        )
    module.load_state_dict(state_dict)


def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    pipeline: bool = True,
) -> None:
    """Write a checkpoint that `load` and diffusers' `DDPMPipeline.from_pretrained` read.

    Each file appears whole or not at all, the weights last: an interrupted save leaves the weights that were there.

    Args:
        folder: made if missing; files of the same names are replaced.
        config: options of `UNet2D`.
        state_dict: the parameters, on any device and in any memory format.
        schedule: the noise schedule the network was trained for.
        dtype: of the parameters in the file; None keeps theirs.
        pipeline: files in `unet/` and `scheduler/`, as diffusers saves them; False puts all into the folder itself.
    """
    from safetensors.torch import save as serialise

    root = Path(folder)
    if not pipeline and (root / "unet").exists():
        raise ValueError(f"{root} holds a pipeline's unet/, which would be read in place of this; use another folder")
    unet, scheduler = (root / "unet", root / "scheduler") if pipeline else (root, root)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    _write_json(root / "model_index.json", index)
    _write_json(unet / _CONFIG, {"_class_name": "UNet2DModel", **_options(config)})
    _write_json(scheduler / _SCHEDULER, schedule.to_config())
    # safetensors wants each tensor alone in its memory, and in the order of its dimensions
    tensors = {
        name: value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in state_dict.items()
    }
    with atomic(unet / f"{_WEIGHTS}.safetensors") as file:
        file.write(serialise(tensors, metadata={"format": "pt"}))


def _weight_files(variant: str | None) -> tuple[str, str, str, str]:
    """Names of the one safetensors file, the index of several, those several, and the pickle."""
    dot = f".{variant}" if variant else ""
    return (
        f"{_WEIGHTS}{dot}.safetensors",
        f"{_WEIGHTS}.safetensors.index{dot}.json",
        f"{_WEIGHTS}{dot}-*.safetensors",
        f"{_WEIGHTS}{dot}.bin",
    )


def _download(hub_id: str, variant: str | None) -> Path:
    """The folder of a hub model in the local cache, with a `.bin` only where there is no safetensors file."""
    if os.path.exists(hub_id):
        raise ValueError(f"{hub_id} is a file; a checkpoint is a folder that holds {_CONFIG}, weights and {_SCHEDULER}")
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id} is no folder here; name a folder, or a hub id such as google/ddpm-cifar10-32")
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
        raise ValueError(f"{hub_id} is no folder here, and the Hugging Face hub gave none: {_line(error)}") from error
    return folder


def _read_config(folder: Path, part: str, name: str) -> tuple[Path, dict[str, Any]]:
    """(folder that holds it, content) of a configuration file under folder/part or in folder."""
    for holder in (folder / part, folder):
        if (holder / name).is_file():
            return holder, _read_json(holder / name)
    raise ValueError(f"{folder} is not a DDPM checkpoint of diffusers: it has no {part}/{name} and no {name}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; want an object of options")
    return content


def _read_weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    single, index, _, pickled = _weight_files(variant)
    readers: dict[str, Callable[[Path], dict[str, Any]]]
    readers = {single: _read_safetensors, index: _read_shards, pickled: _read_pickle}
    found = next((name for name in readers if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has no weights; looked for {', '.join(readers)}")
    path = folder / found
    content = readers[found](path)
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor) or not value.is_floating_point()]
    if odd:
        raise ValueError(f"{path} holds more than a network's parameters: {len(odd)} no float tensors ({_listed(odd)})")
    return {_renamed(key): value.detach() for key, value in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(path, "rb"):  # safetensors says of any file that it cannot open that there is none
            return load_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file; get it again (git lfs pull in a clone): {_line(error)}"
        ) from error


def _read_shards(path: Path) -> dict[str, Tensor]:
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} has no weight_map, which says what file each parameter is in")
    content: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        content |= _read_safetensors(path.parent / name)
    return content


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # whatever a damaged or hostile pickle comes to
        raise ValueError(f"{path} is not a file of weights alone, so it was not loaded: {_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not parameters by name; want a state_dict")
    return content


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot read {path}: {error.strerror or _line(error)}")


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what diffusers notes about itself."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _renamed(key: str) -> str:
    legacy = _LEGACY.fullmatch(key)
    return f"{legacy[1]}.{_RENAMED[legacy[2]]}.{legacy[3]}" if legacy else key


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _listed(names: Iterable[str], shown: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:shown] + ["..."] * (len(names) > shown))


def _line(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
