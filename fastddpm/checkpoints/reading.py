"""Reads the files of a checkpoint: JSON, safetensors and PyTorch's pickles. Every error names the file in one line."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError: it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {in_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; want an object of options")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, on the CPU. Raises: ValueError: it cannot be read, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(path, "rb"):  # safetensors reports any file that it cannot open as missing
            return load_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        way_out = "download it again (in a clone: git lfs pull)"
        raise ValueError(f"{path} is not a complete safetensors file; {way_out}: {in_one_line(error)}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The entries of a state_dict that torch.save wrote, on the CPU. Code in the pickle is not run.

    Raises: ValueError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # damaged and hostile pickles raise errors of any kind
        raise ValueError(
            f"{path} is damaged or holds more than weights, so it was not loaded: {in_one_line(error)}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not parameters by name; want a state_dict")
    return content


def in_one_line(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot read {path}: {error.strerror or in_one_line(error)}")
