"""The module of compiled C++ kernels: loads it, and chooses the instruction set."""

import importlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch  # noqa: F401  # the module takes OpenMP's functions from the library that torch loads

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")  # the fastest one first
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]  # of a source tree


class Native(NamedTuple):
    """The module, or None and the reason why there is none; and its instruction set."""

    module: ModuleType | None
    text: str


@cache
def native() -> Native:
    """Load the compiled kernels, once for the process.

    In a source tree, such as an editable install has, they are built anew if a source file is newer than they are. The
    environment variable FASTDDPM_ISA limits the instruction set.
    Raises: ValueError: FASTDDPM_ISA is unknown.
    """
    most = os.environ.get("FASTDDPM_ISA", INSTRUCTION_SETS[0])
    if most not in INSTRUCTION_SETS:
        raise ValueError(f"FASTDDPM_ISA is {most!r}; want one of {', '.join(INSTRUCTION_SETS)}")
    if sys.platform == "win32":
        return Native(None, "the C++ kernels are not built on Windows")
    if (failure := _rebuild_if_stale()) is not None:
        return Native(None, failure)
    try:
        module = importlib.import_module("fastddpm.kernels.cpu._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return Native(None, "the C++ kernels were not built when fastddpm was installed" if missing else str(error))
    if module.openmp() is None:
        return Native(None, "torch has loaded no OpenMP runtime, which the C++ kernels share")
    allowed = INSTRUCTION_SETS[INSTRUCTION_SETS.index(most) :]
    name = next(name for name in module.supported() if name in allowed)
    module.use(name)
    return Native(module, name)


def _rebuild_if_stale() -> str | None:
    """Build the module anew if its sources have changed. Returns: why that failed, or None."""
    built, sources = FOLDER / "_native.abi3.so", [*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), ROOT / "setup.py"]
    if not sources[:-1] or not sources[-1].is_file() or not built.is_file():
        return None  # an installed package, or one that could not be built
    if built.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in sources):
        return None
    failure = "the C++ kernels are older than their sources and could not be built again: "
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            command = [
                sys.executable,
                "setup.py",
                "build_ext",
                "--build-lib",
                folder,
                "--build-temp",
                f"{folder}/objects",
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            made = Path(folder, "fastddpm", "kernels", "cpu", built.name)
            if done.returncode or not made.is_file():
                return failure + " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:])
            os.replace(made, built)
    except OSError as error:  # such as a folder that belongs to another user
        return f"{failure}{error}"
    return None
