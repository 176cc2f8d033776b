"""Fixtures that run the operations in torch on the CPU, in the Triton interpreter and on a GPU."""

import os
import re
import signal
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastddpm import ops
from fastddpm.core import layout
from tests.support.guards import Guards

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which reads it

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell ignores it in background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt processes, which inherit the handler

# A machine with a GPU may lack packages that some tests compare with. The other tests run there.
_needs = re.compile(r"^(?:from|import) (diffusers|hypothesis|onnx|onnxruntime|scipy)\b", re.MULTILINE)
collect_ignore = [
    str(file)
    for file in Path(__file__).parent.rglob("test_*.py")
    if not all(find_spec(package) for package in _needs.findall(file.read_text()))
]

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(params=["torch", "cpp", "interpreter", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    """The device for tensors: `ops` runs on it in torch, in C++, in Triton's interpreter or compiled by Triton."""
    yield from _device(request)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=needs_gpu)])
def kernel_device(request):
    """Like `device`, but only Triton."""
    yield from _device(request)


def _device(request):
    if request.param == "interpreter":
        request.getfixturevalue("interpreted")
    with ops.forced_backend(request.param) if request.param in ("torch", "cpp") else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def interpreted(monkeypatch):
    """Makes `ops` run the kernels in the interpreter, on the CPU."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            # the interpreter truncates; compiled kernels round: tests/kernels/test_compiled.py
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    with ops.forced_backend("triton"):
        yield


@pytest.fixture
def guards(monkeypatch):
    """Makes `ops` allocate between guard regions, all filled with NaN."""
    guards = Guards()
    monkeypatch.setattr(layout, "empty", guards.empty)
    return guards
