"""A checkpoint that is one file of weights, such as `model.pt`, with its options in a JSON file beside it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.checkpoints.parameters import first_few
from fastddpm.checkpoints.reading import read_json, read_pickle, read_safetensors
from fastddpm.checkpoints.weights import is_plain
from fastddpm.core.checks import shown

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
CONFIG = "config.json"
_WAY_OUT = (  # for a `.ckpt` of diffusion_policy, which holds its configuration as Python objects
    "for a .ckpt of diffusion_policy, in the environment that trained it: torch.save(torch.load(path, "
    'pickle_module=dill, weights_only=False)["state_dicts"]["ema_model"], "model.pt")'
)


def weights_in(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """(the file of weights in a folder that is no checkpoint of diffusers, notes); None: there is none.

    Averages of the weights come first, then later steps, then slower averages.
    """
    pickles = [name for name in os.listdir(folder) if name.endswith(SUFFIXES[:3]) and not name.startswith("opt")]
    names = [name for name in pickles if not name.endswith(".ckpt")] or pickles  # a .ckpt often holds more than weights
    if not names:
        return None, ()
    configured = read_json(folder / CONFIG).get("checkpoint") if os.path.lexists(folder / CONFIG) else None
    if configured in names:
        return folder / configured, ()

    def rank(name: str) -> tuple[bool, int, float, str]:
        numbers, rate = re.findall(r"\d+", name), re.search(r"0\.\d+", name)
        return name.startswith("ema"), int(numbers[-1][:18]) if numbers else -1, float(rate[0]) if rate else 0.0, name

    best = max(names, key=rank)
    others = len(names) - 1
    note = f"{folder} holds {len(names)} weight files, of which {best} was read; to read another, pass its path"
    return folder / best, (note,) if others else ()


def read_content(path: Path) -> dict[str, Any]:
    """What a file of weights holds. Raises: ValueError: it cannot be read, or its pickle needs code."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    try:
        return read_pickle(path)
    except ValueError as error:
        if path.suffix != ".ckpt" or "it was not loaded" not in str(error):
            raise
        raise ValueError(f"{error}; {_WAY_OUT}") from error


def section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The options in a section of others; empty: there is none. Raises: ValueError: it is no object."""
    value = options.get(name, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shown(value)}; want options by name")
    return value


def read_options(path: Path) -> tuple[dict[str, Any], Path | None]:
    """(the options beside a file of weights, the JSON file that holds them): of its name, or else `config.json`."""
    for place in (path.with_suffix(".json"), path.parent / CONFIG):
        if os.path.lexists(place):
            return read_json(place), place
    return {}, None


def find_state(content: Mapping[str, Any], first: str) -> tuple[dict[str, Any], str] | None:
    """(the parameters among which `first` is, under their own names; where they were), or None.

    They may be in dictionaries within the content, and have a prefix, such as that of DistributedDataParallel. Averages
    of the weights are preferred.
    """
    found = []
    for place, state in [("", content), *content.items()]:
        names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
        for key in names:
            if key == first or key.endswith(f".{first}"):
                prefix = key.removesuffix(first)
                own = {name.removeprefix(prefix): state[name] for name in names if name.startswith(prefix)}
                found.append((own, ".".join(part for part in (place, prefix.rstrip(".")) if part)))
    return next((item for item in found if "ema" in item[1].lower()), found[0] if found else None)


def check_tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters, detached. Raises: ValueError: one is not a dense tensor of floating-point numbers."""
    if others := [name for name, value in state.items() if not is_plain(value)]:
        raise ValueError(f"{path} holds entries that are not dense floating-point tensors ({first_few(others)})")
    return {name: value.detach() for name, value in state.items()}
