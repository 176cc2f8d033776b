"""CUDA graphs that the rest of the process cannot break: how a step is captured, and on which streams it runs.

Three things could break one. cuBLAS keeps a workspace between calls, and a graph holds its address: when somebody
clears the workspaces, the graph writes to freed memory. So they are cleared before and after a capture, and the graph
gets one in its own pool. Another thread's work on the stream of a capture would become part of the graph: captures use
a stream that nobody else is given. And torch does not recover from a capture that fails: `capture` does that for it.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLEAR_WORKSPACES = (  # by age; torch 2.15 adds the public name
    (torch._C, "_cuda_clearCublasWorkspaces"),
    (torch.cuda, "clear_cublas_workspaces"),
    (torch.cuda, "_clear_cublas_workspaces"),
)

_lock = threading.Lock()  # held during a capture: no two at a time, and nothing returns memory to the driver
_streams: dict[torch.device, torch.cuda.Stream] = {}
_failed: list[torch.cuda.CUDAGraph] = []  # the allocators of torch may still call them


class CaptureError(ValueError):
    """A capture failed, for a reason that may be gone at the next attempt."""


def capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture run() as a graph, which may be replayed on any stream.

    Call run() once before: what libraries create at their first use cannot be captured. This waits for all work on the
    device.

    Args:
        run: launches kernels on the current stream of the device, and does not wait for them.
        device: a CUDA device.
    Raises:
        CaptureError: the capture failed; torch, its memory and its random numbers work as before.
        torch.OutOfMemoryError: there was not enough memory.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # a capture that fails leaves its stream as the current one
        with _lock, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            _clear_cublas_workspaces()
            try:
                # thread_local: other threads may go on, and allocate
                with torch.cuda.graph(graph, pool, _stream(device), capture_error_mode="thread_local"):
                    run()
            except BaseException:
                _abandon(graph, pool, device)
                raise
            finally:
                _clear_cublas_workspaces()
    except Exception as error:
        cause = error.__context__ or error  # the end of a failed capture is an error of its own
        if not isinstance(cause, Exception):
            raise cause from None  # Ctrl-C
        if any(isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e) for e in (cause, error)):
            raise torch.OutOfMemoryError(str(error)) from error
        why = str(cause).partition("\n")[0]
        raise CaptureError(
            f"engine: a step could not be captured as a CUDA graph ({why}): the network waits for the GPU, or another "
            "thread waited for the whole device or ran out of memory meanwhile; try again, or use engine='eager'"
        ) from error
    return graph


def empty_cache(device: torch.device) -> None:
    """Return the memory that torch keeps for later to the driver; not during a capture, where it would free nothing."""
    if device.type == "cuda":
        with _lock:
            torch.cuda.empty_cache()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device.

    torch has 32 streams of each priority and gives them out in rotation. Programs rarely ask for a high priority, so
    nobody works on this one.
    """
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    return _streams[device]


def _clear_cublas_workspaces() -> None:
    """Free the workspaces of cuBLAS; its next product allocates one anew."""
    for owner, name in CLEAR_WORKSPACES:
        if (clear := getattr(owner, name, None)) is not None:
            return clear()
    names = ", ".join(name for _, name in CLEAR_WORKSPACES)
    raise RuntimeError(f"torch {torch.__version__} has none of {names}, without which a graph is not safe")


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Undo what torch leaves behind where the end of a capture fails."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        return  # the capture has ended, it was run() that failed
    torch._C._cuda_releasePool(index, pool)
    _failed.append(graph)
    generator = torch.cuda.default_generators[index]
    state = generator.get_state()
    try:
        torch.empty(1, device=device).uniform_()
    except RuntimeError:  # in torch 2.11 it is still in its state for captures
        generator.graphsafe_set_state(generator.clone_state())
    else:
        generator.set_state(state)


class StreamOrder:
    """Keeps the work on some tensors in order, whichever stream it is done on. They were made on the current one."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.stream, self.done = torch.cuda.current_stream(device), torch.cuda.Event()
            self.done.record(self.stream)

    @contextmanager
    def working(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Work with the tensors on the current stream, after what was done before on another one."""
        if self.device.type != "cuda":
            yield
            return
        now = torch.cuda.current_stream(self.device)
        if now != self.stream:
            now.wait_event(self.done)
            for tensor in tensors:
                tensor.record_stream(now)  # else their memory could be reused before this stream is done with it
            self.stream = now
        try:
            yield
        finally:
            self.done.record(now)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, before a capture that would fail of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tags, inputs = func.tags, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        by_mask = any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
        shapes = torch.Tag.dynamic_output_shape in tags and (func is not torch.ops.aten.index.Tensor or by_mask)
        if shapes or torch.Tag.data_dependent_output in tags:
            raise _waits(f"{func} waits")
        to, moves = kwargs.get("device"), func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        # a number may come from the host with a launch; results do not count: attention has one that stays there
        places = {x.device.type for x in inputs if x.ndim or moves} | ({to.type} if moves and to else set())
        if places > {"cpu"}:
            raise _waits(f"{func} copies between the host and the GPU")
        return func(*args, **kwargs)


def _waits(why: str) -> ValueError:
    return ValueError(
        f"engine: a step of this network cannot be captured ({why}): it must not wait for the GPU, as .item(), .cpu() "
        "and an if on a tensor do; use engine='eager'"
    )
