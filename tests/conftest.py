"""Where the operations are tested: in torch on the CPU, in the Triton interpreter, on a GPU."""

import os
import re
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastddpm import ops

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what the tests start and interrupt would inherit it

# A machine with a GPU may lack what some tests compare with, and can run all the others.
_needs = re.compile(r"^(?:from|import) (diffusers|hypothesis|onnx|onnxruntime|scipy)\b", re.MULTILINE)
collect_ignore = [
    str(file)
    for file in Path(__file__).parent.rglob("test_*.py")
    if not all(find_spec(package) for package in _needs.findall(file.read_text()))
]

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    """The device to put tensors on, for which `ops` runs in torch, interpreted or compiled."""
    return _device(request)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=needs_gpu)])
def kernel_device(request):
    """As `device`, but Triton everywhere."""
    return _device(request)


def _device(request):
    if request.param == "interpreter":
        request.getfixturevalue("interpreted")
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels on the CPU, for `ops` too."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source.name, target.name) == (
            "fp32",
            "bf16",
        ):  # the interpreter truncates; PTX rounds: tests/kernels/test_compiled.py
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(ops, "backend", lambda device: "triton")
