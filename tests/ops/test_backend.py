"""Which implementation of the operations runs, and that a CPU's need no Triton."""

import importlib
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastddpm import ops
from fastddpm.kernels.cpu.native import Native, native


@pytest.mark.parametrize("name", [name for name in ops.__all__ if not name.isupper()])
def test_public_names_are_functions(name):
    """`fastddpm.ops.step` is the function, though its file is fastddpm/ops/step.py."""
    assert inspect.isfunction(getattr(ops, name))


@pytest.fixture
def chosen_anew():
    """Forget the backends that were chosen, before and after a test."""
    backend = importlib.import_module("fastddpm.ops.backend")
    backend._chosen.cache_clear()
    yield
    backend._chosen.cache_clear()


def test_cpp_runs_on_the_cpu():
    assert ops.backend("cpu") == ops.backend(torch.device("cpu")) == "cpp"
    assert ops.backend_reason("cpu") == f"C++ kernels, instruction set {native().text}"


def test_torch_runs_on_the_cpu_without_kernels(chosen_anew, monkeypatch):
    monkeypatch.setattr("fastddpm.kernels.cpu.native.native", lambda: Native(None, "there is no compiler"))
    assert ops.backend("cpu") == "torch"
    assert ops.backend_reason("cpu") == "there is no compiler"


def test_torch_runs_on_other_devices():
    assert ops.backend("meta") == "torch"
    assert ops.backend_reason("meta") == "there are no kernels for 'meta'"


@pytest.mark.parametrize(("installed", "backend"), [(True, "triton"), (False, "torch")])
def test_triton_runs_on_a_gpu_if_installed(installed, backend, chosen_anew, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastddpm.ops.backend"), "_has_triton", lambda: installed)
    assert ops.backend("cuda") == ops.backend(torch.device("cuda", 1)) == backend
    assert ("not installed" in ops.backend_reason("cuda")) == (not installed)


def test_forced_backend_holds_for_all_devices_and_threads():
    with ThreadPoolExecutor(1) as pool, ops.forced_backend("triton"):
        assert ops.backend("cpu") == ops.backend("cuda") == "triton"
        assert pool.submit(ops.backend, "cpu").result() == "triton"
        with ops.forced_backend("torch"):
            assert ops.backend("cuda") == "torch"
        assert ops.backend("cpu") == "triton"
        assert ops.backend_reason("cpu") == "forced"
    assert ops.backend("cpu") == "cpp"


def test_forced_backend_ends_with_an_error():
    with pytest.raises(KeyError), ops.forced_backend("triton"):
        raise KeyError
    assert ops.backend("cpu") == "cpp"


def test_forced_backend_rejects_unknown_names():
    with pytest.raises(ValueError, match=r"^forced_backend: name is 'cuda'; want one of triton, cpp, torch$"):
        ops.forced_backend("cuda").__enter__()


def test_nothing_is_compiled_ahead_on_the_cpu():
    with ops.forced_backend("triton"), ops.compiling(torch.device("cpu")):
        pass


def test_triton_is_not_imported():
    code = """
import sys, torch
from fastddpm import Schedule, noise, ops
from fastddpm.core import layout
x, pos, address = torch.zeros(1, 4), torch.tensor([5], dtype=torch.int32), noise.address(0, 1)
ops.step(x, x.clone(), Schedule().table(), pos, address)
ops.noising(x, pos.long(), address, Schedule().noising_table())
y = layout.channels_last(torch.ones(1, 4, 2, 2))
ops.residual(y, ops.group_norm(y, torch.ones(4), torch.ones(4), 2, eps=1e-5, act="silu"), torch.ones(4))
assert not {"triton", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
