"""Reads the files of a checkpoint: JSON, safetensors and PyTorch's pickles. Every error names the file in one line."""

import errno
import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastddpm.core.checks import shown
from fastddpm.storage.files import as_path, check_regular

MOST_JSON = 1 << 24  # bytes; the index of a network of 10,000 parameters has 1 MB
_DOWNLOAD = "download it again (in a clone: git lfs pull)"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError: it cannot be read, or holds something else."""
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; want an object of options")
    return content


def read_any_json(path: Path) -> Any:
    """The content of a JSON file. Raises: ValueError: it cannot be read."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_JSON + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(text) > MOST_JSON:
        raise ValueError(f"{path} has more than {MOST_JSON >> 20} MB, which no configuration has; {_DOWNLOAD}")
    try:
        return json.loads(text.decode("utf-8"), parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {in_one_line(error)}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, on the CPU. Raises: ValueError: it cannot be read, or is damaged."""
    from safetensors.torch import load, load_file

    check_regular(path)
    try:
        with open(path, "rb") as file:  # safetensors reports any file that it cannot open as missing
            if str(path) != os.fsencode(path).decode("utf-8", "replace"):  # and it opens no names that are not UTF-8
                return load(file.read())
            return load_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # of safetensors; of torch, for a dtype that it does not have
        raise ValueError(f"{path} is not a complete safetensors file; {_DOWNLOAD}: {in_one_line(error)}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The entries of a state_dict that torch.save wrote, on the CPU. Code in the pickle is not run.

    Raises: ValueError: the file cannot be read, is damaged, or holds something else.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about kinds of tensors that are refused in any case
            content = load_archive(file)
    except Exception as error:  # damaged and hostile pickles raise errors of any kind, a truncated one OSError too
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise _unreadable(path, error) from error
        raise ValueError(
            f"{path} is damaged or holds more than weights, so it was not loaded{_foreign_name(error)}; {_DOWNLOAD}, "
            "or save the state_dict of the network alone, best as safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not parameters by name; want a state_dict")
    return content


def as_folder(name: str, value: Any) -> Path:
    """The folder that an argument names. Raises: ValueError: it is no path, or is empty."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not path or not isinstance(path, str):
        raise ValueError(f"{name} is {shown(value)}; want the path of a folder")
    return as_path(name, path)


def in_one_line(error: Exception) -> str:
    """The kind and the first line of an error."""
    return named(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 300)


def named(name: object, length: int = 200) -> str:
    """A name from a file or a user, for an error message: without control characters, and shortened in the middle."""
    text = str(name)
    if not text.isprintable():
        text = repr(text)[1:-1]
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _integer(text: str) -> int:
    if len(text) > 400:  # digits: beyond any float; Python's own limit depends on the environment
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)


def load_archive(file: BinaryIO) -> Any:
    """What torch.save wrote into a file, on the CPU. Code in the pickle is not run.

    Raises: an error of any kind: the file is damaged or hostile.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, size=file.seek(0, os.SEEK_END))
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Check what torch.load does not: that an archive of this size is as torch.save writes it, to the bit.

    It would return memory without values for an entry that is marked as a folder.
    """
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts are compressed or overlap")
    if any(entry.is_dir() or entry.external_attr & 0x10 for entry in entries):  # 0x10: a folder, in MS-DOS
        raise ValueError("an entry of the archive is a folder")
    if archive.testzip() is not None:
        raise ValueError("its checksum is wrong")


def _foreign_name(error: Exception) -> str:
    """What a pickle that was refused refers to, if torch's error says so; the error itself advises to run the code."""
    found = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
    return f" (it refers to {found[1]})" if found else ""


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot read {path}: {error.strerror or in_one_line(error)}")
