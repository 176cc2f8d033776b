"""Captures, with as much of torch.cuda as they use replaced by what tells in which order it was called."""

import threading
from contextlib import contextmanager

import pytest
import torch

from fastddpm import capture as module
from fastddpm.capture import CaptureError, StreamOrder, capture

DEVICE = torch.device("cpu", 0)  # in the place of a GPU
POOL = (0, 7)


class Stream:
    made = 0

    def __init__(self, device=None, priority=0):
        Stream.made += 1
        self.device, self.priority = device, priority


class FakeCuda:
    """torch.cuda and the functions of torch._C behind it.

    Attributes: calls: what was done, in order; at_end: raised by the end of a capture; capturing: whether one has begun
    whose end did not come, so that memory would go to its pool.
    """

    def __init__(self, monkeypatch):
        self.calls, self.at_end, self.capturing, self.current = [], None, False, Stream("default")
        cuda = {
            "CUDAGraph": object,
            "Stream": Stream,
            "graph": self.graph,
            "graph_pool_handle": lambda: POOL,
            "device": self.device,
            "stream": self.stream,
            "current_stream": lambda device=None: self.current,
            "default_generators": [torch.default_generator],
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name), raising=False)
        monkeypatch.setattr(module, "_streams", {})
        monkeypatch.setattr(module, "_failed", [])

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
    def graph(self, graph, pool, stream, *, capture_error_mode):
        assert (pool, capture_error_mode) == (POOL, "thread_local")
        self.calls.append("begin")
        self.capturing, self.current = True, stream
        try:
            yield
        finally:  # as torch does it: where the end fails, nothing is restored
            if self.at_end is not None:
                raise self.at_end
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


def test_workspaces_are_cleared_right_before_and_right_after(cuda):
    assert type(capture(cuda.run, DEVICE)) is object
    assert cuda.calls == ["clear", "begin", "run", "end", "clear"]
    assert module._failed == []


@pytest.mark.parametrize("name", ["clear_cublas_workspaces", "_clear_cublas_workspaces"])
def test_workspaces_are_cleared_by_newer_names(cuda, monkeypatch, name):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    monkeypatch.setattr(torch.cuda, name, cuda._cuda_clearCublasWorkspaces, raising=False)
    capture(cuda.run, DEVICE)
    assert cuda.calls == ["clear", "begin", "run", "end", "clear"]


def test_nothing_is_captured_where_workspaces_cannot_be_cleared(cuda, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    with pytest.raises(CaptureError, match="has none of _cuda_clearCublasWorkspaces, clear_cublas_workspaces"):
        capture(cuda.run, DEVICE)
    assert cuda.calls == []


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without CUDA")
def test_this_torch_has_a_function_that_clears_workspaces():
    assert any(hasattr(owner, name) for owner, name in module.CLEAR_WORKSPACES)


def test_captures_have_one_stream_that_nobody_else_is_given(cuda):
    """However many graphs there are: torch would give out its 32 streams again."""
    made, seen = Stream.made, []
    for _ in range(40):
        capture(lambda: seen.append(torch.cuda.current_stream()), DEVICE)
    assert Stream.made == made + 1
    assert len(set(seen)) == 1
    assert seen[0].priority == -1  # ordinary streams come from another pool
    assert torch.cuda.current_stream() is not seen[0]


def test_captures_take_turns(cuda):
    def capture_one():
        with pytest.raises(CaptureError):
            capture(lambda: barrier.wait(0.05), DEVICE)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=capture_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert barrier.broken  # the two never met
    assert cuda.calls == ["clear", "begin", "end", "clear"] * 2


@pytest.mark.parametrize(
    ("in_body", "at_end", "raised", "text"),
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
def test_a_capture_that_fails_says_why_and_leaves_nothing_behind(cuda, in_body, at_end, raised, text):
    def run():
        if in_body is not None:
            raise in_body

    before, state, cuda.at_end = torch.cuda.current_stream(), torch.get_rng_state(), at_end
    with pytest.raises(raised) as caught:
        capture(run, DEVICE)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cuda.calls[0] == cuda.calls[-1] == "clear"
    assert torch.cuda.current_stream() is before
    assert not cuda.capturing
    assert torch.equal(torch.get_rng_state(), state)
    undone = [("end", 0, POOL), ("release", 0, POOL)] if at_end is not None else ["end"]
    assert cuda.calls[2:-1] == undone
    assert len(module._failed) == (at_end is not None)  # torch holds a pointer to each
    cuda.at_end = None
    capture(cuda.run, DEVICE)


def test_random_numbers_work_again_after_a_capture_that_failed(cuda, monkeypatch):
    """As in torch 2.11, where the generator goes on to take itself to be captured."""

    class Generator:
        stuck, state = True, "seed and offset"

        def get_state(self):
            return self.state

        def set_state(self, state):
            raise AssertionError("its state was not changed")

        def clone_state(self):
            return Generator()

        def graphsafe_set_state(self, other):
            assert other is not self
            assert other.state == self.state
            self.stuck = False

    def draw(x):
        if generator.stuck:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    generator, cuda.at_end = Generator(), RuntimeError("invalidated")
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.Tensor, "uniform_", draw)
    with pytest.raises(CaptureError):
        capture(cuda.run, DEVICE)
    assert not generator.stuck


class Calls(list):
    """A stand-in for streams, events and tensors that notes what is called."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getattr__(self, method):
        return lambda *args: self.log.append((self.name, method, *(arg.name for arg in args)))

    def __eq__(self, other):
        return self.name == other.name

    __hash__ = None


def test_work_on_another_stream_waits_and_keeps_its_memory(monkeypatch):
    log = []
    one, two, tensor = (Calls(name, log) for name in ("one", "two", "tensor"))
    current = [one]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", lambda: Calls("done", log))
    order = StreamOrder(torch.device("cuda", 0))
    expected = [("done", "record", "one")]  # what was made there
    assert log == expected
    for stream in (one, two, two, one):
        moved = stream != current[0]
        current[0] = stream
        with order.working(iter([tensor])):
            expected += [(stream.name, "wait_event", "done"), ("tensor", "record_stream", stream.name)] * moved
            assert log == expected
        expected.append(("done", "record", stream.name))
        assert log == expected
    with pytest.raises(ZeroDivisionError), order.working([]):
        raise ZeroDivisionError
    assert log == [*expected, ("done", "record", "one")]


def test_order_costs_a_cpu_nothing():
    order = StreamOrder(torch.device("cpu"))
    with order.working(iter([None])):
        assert not hasattr(order, "done")
