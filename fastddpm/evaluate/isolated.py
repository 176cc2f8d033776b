"""Extractors whose files are loaded, and run, in a process of their own.

TorchScript runs code. A file that crashes its process is an error here, and on Linux the process cannot write: the
kernel's Landlock (from 5.13 on) refuses it to open any file for writing, to make files and to remove them.
"""

import ctypes
import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.core.memory import is_out_of_memory
from fastddpm.core.names import SHIPPED_CLASSIFIER
from fastddpm.evaluate import features
from fastddpm.evaluate.features import Extractor

# stdout is for replies alone: what an import prints goes to stderr
_CHILD = """
import os, sys
replies = os.dup(1)
os.dup2(2, 1)
sys.path[:] = sys.argv[1:]
from fastddpm.evaluate.isolated import serve
serve(replies)
"""
# Linux's numbers: system calls, accesses to files, and an option of prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))  # folders, files, devices, sockets, pipes, links
_NO_NEW_PRIVILEGES = 38
_GPU_DEVICES = ("/dev/nvidia*", "/dev/dxg")  # which CUDA opens for writing


class _IsolatedExtractor(Extractor):
    """An extractor whose network is a function of images, in another process."""

    def __call__(self, images: np.ndarray) -> Tensor:
        return self.network(images)


def load_extractor(
    source: str | os.PathLike[str] = SHIPPED_CLASSIFIER,
    *,
    device: torch.device | str | None = None,
    input_size: int | None = None,
    scale: str | None = None,
) -> Extractor:
    """Load an extractor as `features.load_extractor` does, but run the network of a file in a process of its own.

    The process ends when the extractor is freed. A warning says if it runs TorchScript and could write files.
    """
    device, input_size = features.check_options(source, device, input_size, scale)
    if source == SHIPPED_CLASSIFIER:
        return features.load_extractor(source, device=device)
    process = _Process(os.fspath(source))
    options = {"device": str(device), "input_size": input_size, "scale": scale}
    here = {"source": os.fspath(source), "parent": os.getpid(), "threads": torch.get_num_threads()}
    loaded = process.ask(here | options)[0]
    if not loaded.pop("confined") and Path(source).suffix.lower() != ".onnx":
        warnings.warn(
            f"{source} is TorchScript, which can run any code, and this system cannot keep it from writing files; use "
            "only files of people you trust, or ONNX",
            stacklevel=2,
        )
    loaded["size"] = loaded["size"] and tuple(loaded["size"])
    return _IsolatedExtractor(**loaded, network=process.extract, device=device)


class _Process:
    """A process that runs `serve`. It ends with this object, and a kill of this process ends it, too."""

    def __init__(self, name: str):
        self.name, self.interrupted = name, False
        command = [sys.executable, "-c", _CHILD, *sys.path]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock = threading.Lock()  # the reply to a request is the next one
        weakref.finalize(self, _kill, self.process)

    def ask(self, request: dict[str, Any], content: Any = b"") -> tuple[dict[str, Any], bytearray]:
        """Send a request. Returns: the reply, and the bytes that came with it. Raises: ValueError: it is an error."""
        with self.lock:
            if self.interrupted:
                raise ValueError(f"an earlier call of {self.name} did not end; load the extractor again")
            try:
                _send(self.process.stdin, request, content)
                reply, content = _receive(self.process.stdout)
            except (OSError, EOFError):
                raise ValueError(
                    f"{self.name} crashed the process that ran it ({_end(self.process.wait())}): it is damaged, or "
                    "made for another version of its library, or memory ran out; name another file"
                ) from None
            except BaseException:  # Ctrl-C; a later call would be given the reply to this one
                self.interrupted = True
                _kill(self.process)
                raise
        if "error" in reply:
            raise (torch.OutOfMemoryError if reply["out_of_memory"] else ValueError)(reply["error"])
        return reply, content

    def extract(self, images: np.ndarray) -> Tensor:
        """What `Extractor` returns for images."""
        reply, content = self.ask({"shape": images.shape}, np.ascontiguousarray(images).data)
        return torch.frombuffer(content, dtype=torch.float32).view(reply["shape"])


def serve(replies_to: int) -> None:
    """Answer the requests of `_Process` on stdin: load an extractor, then extract the features of images.

    Args: replies_to: an open file, by its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    requests, replies = sys.stdin.buffer, os.fdopen(replies_to, "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # a network may print
    os.dup2(null, 2)
    extractor = None
    while True:
        try:
            request, content = _receive(requests)
        except EOFError:
            return
        try:
            if extractor is None:
                extractor, reply = _load(**request)
                _send(replies, reply)
            else:
                found = extractor(np.frombuffer(content, np.uint8).reshape(request["shape"]))
                _send(replies, {"shape": found.shape}, found.contiguous().numpy().data)
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            _send(replies, {"error": text, "out_of_memory": is_out_of_memory(error)})


def _end_after(parent: int) -> None:
    """End this process, whatever its network does, soon after the one that started it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _load(source: str, parent: int, threads: int, device: str, **options: Any) -> tuple[Extractor, dict[str, Any]]:
    """Load an extractor once this process can no longer write. Returns: it, and the reply about it."""
    torch.set_num_threads(threads)
    if device != "cpu":
        torch.zeros(1, dtype=torch.float32, device=device)  # starts CUDA, which may write
    confined = forbid_writing()
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    extractor = features.load_extractor(source, device=device, **options)
    names = ("name", "identity", "channels", "size", "scale")
    return extractor, {name: getattr(extractor, name) for name in names} | {"confined": confined}


def forbid_writing() -> bool:
    """Forbid this thread, and all that it will start, to open files for writing, to make and to remove them.

    Open files, and the devices of a GPU, can be written as before.

    Returns: whether the system can do so.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    accesses = _WRITE_FILE | _REMOVE_AND_MAKE | (_TRUNCATE if version >= 3 else 0)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(accesses)), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    try:
        for pattern in _GPU_DEVICES:
            for path in glob.glob(pattern):
                file = os.open(path, os.O_PATH)
                # a rule: the accesses that it allows, 64 bits, and the file's number, 32 bits
                rule = _WRITE_FILE.to_bytes(8, sys.byteorder) + file.to_bytes(4, sys.byteorder)
                libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
                os.close(file)
        return libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _send(file: Any, header: dict[str, Any], content: Any = b"") -> None:
    """Write a header, as a line of JSON with the number of bytes that follow, and these bytes: see `_receive`."""
    view = memoryview(content).cast("B")
    file.write(json.dumps(header | {"bytes": len(view)}).encode() + b"\n")
    file.write(view)
    file.flush()


def _receive(file: Any) -> tuple[dict[str, Any], bytearray]:
    """Raises: EOFError: the other side has closed the file."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    size = header.pop("bytes")
    content = bytearray(file.read(size))  # writable: torch warns of read-only arrays
    if len(content) < size:
        raise EOFError
    return header, content


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # a request that was not read
                pipe.close()


def _end(status: int) -> str:
    """How a process ended."""
    with suppress(ValueError):
        return signal.Signals(-status).name
    return f"exit status {status}"
