"""Captures CUDA graphs that other code in the process cannot invalidate, and orders work across streams.

cuBLAS keeps a workspace between calls, and a graph contains its address. If other code then freed the workspaces,
replays would write to freed memory. So the workspaces are freed before a capture, which gives the graph a workspace in
its own memory pool, and again afterwards, so that no later call uses that one.

Work that another thread submits to the stream of a capture would become part of the graph, so captures have a stream
of their own. torch does not clean up after a capture that fails; `capture` does.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm.core.memory import is_out_of_memory

CLEAR_WORKSPACES = (  # names in different versions of torch; 2.15 adds the public one
    (torch._C, "_cuda_clearCublasWorkspaces"),
    (torch.cuda, "clear_cublas_workspaces"),
    (torch.cuda, "_clear_cublas_workspaces"),
)

_lock = threading.Lock()  # held during a capture: excludes other captures and `empty_cache`
_capture_streams: dict[torch.device, torch.cuda.Stream] = {}
_failed_graphs: list[torch.cuda.CUDAGraph] = []  # kept alive: torch's allocators may hold pointers to them


class CaptureError(ValueError):
    """A capture failed. The cause may be temporary, so another attempt may succeed."""


def capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture run() as a CUDA graph that can be replayed on any stream.

    Call run() once beforehand: what libraries create at their first use cannot be created during a capture. The capture
    first waits for all work on the device.

    Args:
        run: launches kernels on the device's current stream; must not wait for the GPU.
        device: a CUDA device.
    Raises:
        CaptureError: the capture failed. torch's streams, allocator and default generator remain usable.
        torch.OutOfMemoryError: there was not enough memory.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    in_run: list[BaseException] = []  # a plain variable would keep the error, its traceback and the memory alive
    try:
        # restores the current stream, which torch does not do when a capture fails
        with _lock, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            _clear_cublas_workspaces()
            try:
                # thread_local: other threads may still allocate memory
                with torch.cuda.graph(graph, pool, _capture_stream(device), capture_error_mode="thread_local"):
                    try:
                        run()
                    except BaseException as error:
                        in_run.append(error)
                        raise
            except BaseException:
                _clean_up(graph, pool, device)
                raise
            finally:
                _clear_cublas_workspaces()
    except CaptureError:
        raise
    except Exception as error:
        if in_run and not isinstance(in_run[0], Exception):
            raise in_run.pop() from None  # KeyboardInterrupt, hidden by the error that ended the capture
        causes = [*in_run, error]  # ending a failed capture raises a second error
        in_run.clear()
        no_memory = any(map(is_out_of_memory, causes))
        why = str(causes[0]).partition("\n")[0]
        causes.clear()
        if no_memory:
            raise torch.OutOfMemoryError(str(error)) from error
        raise CaptureError(
            f"engine: the work could not be captured as a CUDA graph ({why}); perhaps it waits for the GPU, or another "
            "thread synchronized the device or ran out of memory during the capture; engine='eager' avoids captures"
        ) from error
    return graph


def empty_cache(device: torch.device) -> None:
    """Return torch's cached memory to the driver. Waits for a running capture, during which nothing would be freed."""
    if device.type == "cuda":
        with _lock:
            torch.cuda.empty_cache()


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for all captures on a device.

    torch hands out its 32 streams of each priority in rotation. Other code rarely asks for a high priority, so it is
    unlikely to share this stream. The kernels of a graph keep the priority wherever it is replayed.
    """
    if device not in _capture_streams:
        _capture_streams[device] = torch.cuda.Stream(device, priority=-1)
    return _capture_streams[device]


def _clear_cublas_workspaces() -> None:
    """Free the workspaces of cuBLAS; the next matrix product allocates a new one."""
    for owner, name in CLEAR_WORKSPACES:
        if (clear := getattr(owner, name, None)) is not None:
            return clear()
    names = ", ".join(name for _, name in CLEAR_WORKSPACES)
    raise CaptureError(f"engine: torch {torch.__version__} has none of {names}, without which a graph is not safe")


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Clean up after a failed capture: undo what torch leaves behind if ending it failed."""
    if not _end_allocation(graph, pool, device):
        return  # the capture itself ended properly, only run() failed
    for _ in range(10):  # in torch 2.11 the default generator stays in its capture state until a capture succeeds
        graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), _capture_stream(device)
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                torch.zeros(1, dtype=torch.float32, device=device)
            return
        except RuntimeError:
            _end_allocation(graph, pool, device)


def _end_allocation(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> bool:
    """Stop allocating from the pool of a capture that failed to end, and release it. Returns: whether it had failed."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        return False
    torch._C._cuda_releasePool(index, pool)
    _failed_graphs.append(graph)
    return True


class StreamOrder:
    """Keeps the work on some tensors in order across streams. Create it on the stream that they were created on."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.last_stream, self.last_work = torch.cuda.current_stream(device), torch.cuda.Event()
            self.last_work.record(self.last_stream)

    @contextmanager
    def on_current_stream(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """In this context, work on the tensors runs on the current stream, after earlier work on any other stream."""
        if self.device.type != "cuda":
            yield
            return
        current = torch.cuda.current_stream(self.device)
        if current != self.last_stream:
            current.wait_event(self.last_work)
            for tensor in tensors:
                tensor.record_stream(current)  # otherwise their memory could be reused while this stream still uses it
            self.last_stream = current
        try:
            yield
        finally:
            self.last_work.record(current)


class NoWaiting(TorchDispatchMode):
    """Raises ValueError for operations that make the host wait for the GPU. Used before a capture, which would fail."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tags, inputs = func.tags, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        by_mask = any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
        shapes = torch.Tag.dynamic_output_shape in tags and (func is not torch.ops.aten.index.Tensor or by_mask)
        if shapes or torch.Tag.data_dependent_output in tags:
            raise _waiting_error(f"{func} waits for the GPU")
        to, moves = kwargs.get("device"), func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        # scalars from the host can be launch arguments; outputs are not checked: one of attention's stays on the host
        places = {x.device.type for x in inputs if x.ndim or moves} | ({to.type} if moves and to else set())
        if places > {"cpu"}:
            raise _waiting_error(f"{func} copies between the host and the GPU")
        return func(*args, **kwargs)


def _waiting_error(why: str) -> ValueError:
    return ValueError(
        f"engine: a step of this network cannot be captured ({why}): it must not wait for the GPU; avoid .item(), "
        ".cpu() and `if` on a tensor, or use engine='eager'"
    )
