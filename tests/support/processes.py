"""Processes for tests, forked from one that has imported fastddpm: single ones, and ranks as torchrun starts them."""

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_ranks", "start"]

_SERVER = get_context("forkserver")  # unlike pytest, its server has no threads
_SERVER.set_forkserver_preload(["fastddpm.cli.main", "matplotlib.figure", "pytest", "torch._dynamo"])


def start(output: Path, target: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Start a process that calls a module's function and exits with its result; it prints to the file `output`."""
    process = _SERVER.Process(target=_run, args=(output, target, args, environment))
    process.start()
    return process


def _run(output: Path, target: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(target(*args))


def run_ranks(folder: Path, size: int, target: Callable[..., Any], *args: Any) -> tuple[list[int], list[str]]:
    """Run target in `size` ranks. Returns: their exit codes, and the output of each (from files in the folder)."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    outputs = [folder / f"output-{rank}" for rank in range(size)]
    processes = [
        start(file, target, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), **rendezvous)
        for rank, file in enumerate(outputs)
    ]
    for process in processes:
        process.join(120)
        process.kill()  # one that hangs is not left behind, and its exit code shows it
        process.join()
    return [process.exitcode for process in processes], [file.read_text() for file in outputs]
