"""`capture` with the parts of torch.cuda that it uses replaced by a fake that records the order of calls."""

import gc
import threading
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch

from fastddpm.sampling import capture as capture_module
from fastddpm.sampling.capture import CaptureError, StreamOrder, capture

DEVICE = torch.device("cpu", 0)  # stands in for a GPU
POOL = (0, 7)


class Stream:
    made = 0

    def __init__(self, device=None, priority=0):
        Stream.made += 1
        self.device, self.priority = device, priority


class FakeCuda:
    """Replaces torch.cuda and the functions of torch._C that it uses.

    Attributes:
        calls: what was called, in order.
        end_errors: what the next ends of captures raise, the last one first.
        capturing: whether a capture has begun and not ended, so that allocations would go to its pool.
    """

    def __init__(self, monkeypatch):
        self.calls, self.end_errors, self.capturing, self.current = [], [], False, Stream("default")
        cuda = {
            "CUDAGraph": object,
            "Stream": Stream,
            "graph": self.graph,
            "graph_pool_handle": lambda: POOL,
            "device": self.device,
            "stream": self.stream,
            "current_stream": lambda device=None: self.current,
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name), raising=False)
        monkeypatch.setattr(capture_module, "_capture_streams", {})
        monkeypatch.setattr(capture_module, "_failed_graphs", [])

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool=None, stream=None, *, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.calls.append("begin")
        self.capturing, self.current = True, stream
        try:
            yield
        finally:  # like torch: if ending the capture fails, nothing is restored
            if self.end_errors:
                raise self.end_errors.pop()  # no variable: it would be a reference cycle
            self.calls.append("end")
            self.capturing = False

    def run(self):
        self.calls.append("run")

    def _cuda_clearCublasWorkspaces(self):
        self.calls.append("clear")

    def _cuda_endAllocateToPool(self, index, pool):
        if not self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.calls.append(("end", index, pool))
        self.capturing = False

    def _cuda_releasePool(self, index, pool):
        self.calls.append(("release", index, pool))


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_workspaces_are_cleared_before_and_after_a_capture(cuda):
    assert type(capture(cuda.run, DEVICE)) is object
    assert cuda.calls == ["clear", "begin", "run", "end", "clear"]
    assert capture_module._failed_graphs == []


@pytest.mark.parametrize("name", ["clear_cublas_workspaces", "_clear_cublas_workspaces"])
def test_newer_names_of_the_clearing_function_are_found(cuda, monkeypatch, name):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    monkeypatch.setattr(torch.cuda, name, cuda._cuda_clearCublasWorkspaces, raising=False)
    capture(cuda.run, DEVICE)
    assert cuda.calls == ["clear", "begin", "run", "end", "clear"]


def test_capture_fails_if_workspaces_cannot_be_cleared(cuda, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    with pytest.raises(
        CaptureError, match=r"^engine: torch .* has none of _cuda_clearCublasWorkspaces, clear_cublas_workspaces"
    ):
        capture(cuda.run, DEVICE)
    assert cuda.calls == []


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without CUDA")
def test_this_torch_can_clear_workspaces():
    assert any(hasattr(owner, name) for owner, name in capture_module.CLEAR_WORKSPACES)


def test_all_captures_share_one_high_priority_stream(cuda):
    """Forty captures: with a new stream for each, torch would reuse those of its pool of 32."""
    made, seen = Stream.made, []
    for _ in range(40):
        capture(lambda: seen.append(torch.cuda.current_stream()), DEVICE)
    assert Stream.made == made + 1
    assert len(set(seen)) == 1
    assert seen[0].priority == -1  # streams of normal priority come from another pool
    assert torch.cuda.current_stream() is not seen[0]


def test_captures_do_not_overlap(cuda):
    def capture_one():
        with pytest.raises(CaptureError):
            capture(lambda: barrier.wait(0.05), DEVICE)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=capture_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert barrier.broken  # they never ran at the same time
    assert cuda.calls == ["clear", "begin", "end", "clear"] * 2


@pytest.mark.parametrize(
    ("run_error", "end_error", "raised", "text"),
    [
        (RuntimeError("operation not permitted\nmore"), None, CaptureError, "(operation not permitted)"),
        (
            RuntimeError("operation not permitted"),
            RuntimeError("invalidated"),
            CaptureError,
            "(operation not permitted)",
        ),
        (None, RuntimeError("invalidated\nmore"), CaptureError, "(invalidated)"),
        (torch.OutOfMemoryError("tried to allocate"), None, torch.OutOfMemoryError, "tried to allocate"),
        (torch.OutOfMemoryError("full"), RuntimeError("invalidated"), torch.OutOfMemoryError, "invalidated"),
        (None, RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError, "out of memory"),
        (KeyboardInterrupt("Ctrl-C"), RuntimeError("invalidated"), KeyboardInterrupt, "Ctrl-C"),
    ],
    ids=str,
)
def test_failed_capture_names_the_cause_and_is_cleaned_up(cuda, run_error, end_error, raised, text):
    def run():
        if run_error is not None:
            raise run_error

    before, cuda.end_errors = torch.cuda.current_stream(), [end_error] * (end_error is not None)
    with pytest.raises(raised) as caught:
        capture(run, DEVICE)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cuda.calls[0] == cuda.calls[-1] == "clear"
    assert torch.cuda.current_stream() is before
    assert not cuda.capturing
    # in torch 2.11 a capture that succeeds is what resets the generator
    undone = [("end", 0, POOL), ("release", 0, POOL), "begin", "end"] if end_error is not None else ["end"]
    assert cuda.calls[2:-1] == undone
    assert len(capture_module._failed_graphs) == (end_error is not None)  # kept alive: torch may hold a pointer to it
    capture(cuda.run, DEVICE)


def test_clean_up_repeats_until_a_capture_succeeds(cuda):
    cuda.end_errors = [RuntimeError("invalidated")] * 3
    with pytest.raises(CaptureError):
        capture(cuda.run, DEVICE)
    assert not cuda.capturing
    assert cuda.calls.count(("release", 0, POOL)) == len(capture_module._failed_graphs) == 3
    assert cuda.calls[-3:] == ["begin", "end", "clear"]


@pytest.mark.parametrize("handled", [KeyboardInterrupt("earlier"), torch.OutOfMemoryError("earlier")], ids=repr)
@pytest.mark.parametrize("run_error", [None, ValueError("of the network")], ids=repr)
def test_handled_exception_is_not_reported_as_the_cause(cuda, handled, run_error):
    def run():
        if run_error is not None:
            raise run_error

    cuda.end_errors = [RuntimeError("invalidated")]
    try:
        raise handled
    except BaseException:
        with pytest.raises(CaptureError, match="of the network" if run_error else "invalidated"):
            capture(run, DEVICE)


@pytest.mark.parametrize("raised", [RuntimeError, torch.OutOfMemoryError])
def test_failed_capture_keeps_no_memory_alive(cuda, raised):
    """Without a garbage collection: the next attempt needs the memory."""

    def run():
        tensor = torch.ones(1)
        alive.append(weakref.ref(tensor))
        raise raised("broken")

    alive = []
    for ends in (True, False):
        cuda.end_errors = [] if ends else [RuntimeError("invalidated")]
        gc.disable()
        try:
            with suppress(CaptureError, torch.OutOfMemoryError):
                capture(run, DEVICE)
            assert alive.pop()() is None
        finally:
            gc.enable()


class LoggedCalls:
    """A fake stream, event or tensor that logs the calls of its methods."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getattr__(self, method):
        return lambda *args: self.log.append((self.name, method, *(arg.name for arg in args)))

    def __eq__(self, other):
        return self.name == other.name

    __hash__ = None


def test_stream_order_waits_and_records_tensors_on_a_new_stream(monkeypatch):
    log = []
    one, two, tensor = (LoggedCalls(name, log) for name in ("one", "two", "tensor"))
    current = [one]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", lambda: LoggedCalls("done", log))
    order = StreamOrder(torch.device("cuda", 0))
    expected = [("done", "record", "one")]  # the tensors were created on stream one
    assert log == expected
    for stream in (one, two, two, one):
        moved = stream != current[0]
        current[0] = stream
        with order.on_current_stream(iter([tensor])):
            expected += [(stream.name, "wait_event", "done"), ("tensor", "record_stream", stream.name)] * moved
            assert log == expected
        expected.append(("done", "record", stream.name))
        assert log == expected
    with pytest.raises(ZeroDivisionError), order.on_current_stream([]):
        raise ZeroDivisionError
    assert log == [*expected, ("done", "record", "one")]


def test_stream_order_is_a_no_op_on_a_cpu():
    order = StreamOrder(torch.device("cpu"))
    with order.on_current_stream(iter([None])):
        assert not hasattr(order, "last_work")
