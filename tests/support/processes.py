"""Processes for tests: forked from one that has imported fastddpm, alone or as ranks that meet as torchrun's do."""

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_ranks", "start"]

_SERVER = get_context("forkserver")  # it has no threads, which pytest may have
_SERVER.set_forkserver_preload(["fastddpm.cli.main", "matplotlib.figure", "pytest", "torch._dynamo"])


def start(told: Path, target: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """A process that calls target, a function of a module, and exits with what it returns; all it says goes to told."""
    process = _SERVER.Process(target=_run, args=(told, target, args, environment))
    process.start()
    return process


def _run(told: Path, target: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(target(*args))


def run_ranks(folder: Path, size: int, target: Callable[..., Any], *args: Any) -> tuple[list[int], list[str]]:
    """Exit codes of so many ranks that call target, and what each said (files in the folder)."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told = [folder / f"told-{rank}" for rank in range(size)]
    processes = [
        start(file, target, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), **meet)
        for rank, file in enumerate(told)
    ]
    for process in processes:
        process.join(120)
        process.kill()  # one that hangs shows by its exit code, and is not left behind
        process.join()
    return [process.exitcode for process in processes], [file.read_text() for file in told]
