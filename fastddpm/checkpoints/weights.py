"""The weights in a folder of diffusers: which files hold them, and the current names of the parameters."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.checkpoints.parameters import first_few
from fastddpm.checkpoints.reading import named, read_json, read_pickle, read_safetensors

WEIGHTS = "diffusion_pytorch_model"
_VARIANT = re.compile(r"[\w.-]{1,100}", re.ASCII)
_OF_A_VARIANT = re.compile(
    rf"{WEIGHTS}\.(?:safetensors\.index\.([\w.-]+)\.json|([\w.-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin))", re.ASCII
)
# the names of attention's parameters in 2022, and the current ones
_LEGACY = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# what torch.compile, DistributedDataParallel, FSDP and activation checkpointing insert into the names
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FIRST = "conv_in.weight"
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}


def weight_files(variant: str | None) -> tuple[str, str, str, str]:
    """Names of the single safetensors file, of the index of several, a pattern for those several, and of the pickle.

    Raises: ValueError: variant cannot be part of a file's name.
    """
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise ValueError(f"variant is {named(repr(variant))}; want a name such as 'fp16', or None")
    dot = f".{variant}" if variant else ""
    return (
        f"{WEIGHTS}{dot}.safetensors",
        f"{WEIGHTS}.safetensors.index{dot}.json",
        f"{WEIGHTS}{dot}-*.safetensors",
        f"{WEIGHTS}{dot}.bin",
    )


def read_weights(folder: Path, variant: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(parameters by name, notes) of the network in a folder.

    They are read from safetensors, one file or several under an index, or else from a `.bin`, whose pickle may hold
    nothing but tensors. Attention parameters that have their names of 2022 get the current ones, and what a wrapper
    such as torch.compile added to the names is removed.
    """
    single, index, _, pickled = weight_files(variant)
    readers: dict[str, Callable[[Path], dict[str, Any]]]
    readers = {single: read_safetensors, index: _read_indexed, pickled: read_pickle}
    name = next((name for name in readers if os.path.exists(folder / name)), None)
    if name is None:
        raise ValueError(f"{folder} has no weights; looked for {', '.join(readers)}{_way_out(folder, variant)}")
    content = readers[name](folder / name)
    if others := [key for key, value in content.items() if not is_plain(value)]:
        surplus = f"entries that are not dense floating-point tensors ({first_few(others)})"
        raise ValueError(f"{folder / name} holds {surplus}; want a network's parameters alone")
    content, removed = _with_current_names(content)
    note = f"{folder / name}: the names of the parameters have the prefix {named(removed)}, which was removed"
    return {key: value.detach() for key, value in content.items()}, (note,) if removed else ()


def _way_out(folder: Path, variant: str | None) -> str:
    """The end of the error that there are no weights: which there are instead."""
    if variant is not None and any(os.path.exists(folder / name) for name in weight_files(None)):
        return "; it has weights without a variant: leave variant out"
    found = sorted(match[1] or match[2] for match in map(_OF_A_VARIANT.fullmatch, os.listdir(folder)) if match)
    return f'; it has those of variant {found[0]}: pass variant="{found[0]}" (--variant {found[0]})' if found else ""


def is_plain(value: object) -> bool:
    """Whether value is a tensor of numbers that are all in memory: not sparse, quantised, on meta or expanded."""
    return (
        isinstance(value, Tensor)
        and value.dtype in _DTYPES
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _read_indexed(path: Path) -> dict[str, Tensor]:
    """The tensors of several safetensors files, named in an index."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path} has no weight_map; want one that names the file of each parameter")
    content: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if not name or len(name) > 255 or name in (".", "..") or re.search(r"[/\\:\0]", name):
            raise ValueError(f"{path} names the file '{named(name)}'; want names of files in the same folder")
        part = read_safetensors(path.parent / name)
        if twice := content.keys() & part.keys():
            raise ValueError(f"{path} names several files that hold {first_few(twice)}; want each parameter once")
        content |= part
    return content


def _with_current_names(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the parameters under their names in the network itself, the prefix that was removed from these names)."""
    names = {key: _renamed(".".join(part for part in key.split(".") if part not in _WRAPPERS)) for key in content}
    wrappers = dict.fromkeys(part for key in content for part in key.split(".") if part in _WRAPPERS)
    first = next((name for name in names.values() if name.endswith(f".{_FIRST}")), _FIRST)
    prefix = first.removesuffix(_FIRST)
    if all(name.startswith(prefix) for name in names.values()):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    else:
        prefix = ""
    if len(set(names.values())) < len(content):  # two would get the same name: leave all as they are
        return dict(content), ""
    return {names[key]: value for key, value in content.items()}, "".join(f"{part}." for part in wrappers) + prefix


def _renamed(key: str) -> str:
    """The current name of a parameter."""
    legacy = _LEGACY.fullmatch(key)
    return f"{legacy[1]}.{_RENAMED[legacy[2]]}.{legacy[3]}" if legacy else key
