"""The module of C++ kernels: how it is chosen, loaded and rebuilt, and whose threads it uses."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastddpm import ops
from fastddpm.kernels.cpu import native as loader
from tests.kernels.cpu.conftest import INSTRUCTION_SETS

ROOT = Path(__file__).parents[3]
REPORT = "from fastddpm import ops; print(ops.backend('cpu'), ops.backend_reason('cpu'))"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("most", loader.INSTRUCTION_SETS)
def test_environment_limits_the_instruction_set(most):
    allowed = loader.INSTRUCTION_SETS[loader.INSTRUCTION_SETS.index(most) :]
    best = next(isa for isa in allowed if isa in INSTRUCTION_SETS)
    assert python(REPORT, FASTDDPM_ISA=most).stdout.split()[-1] == best


def test_unknown_instruction_set_is_an_error():
    done = python(REPORT, FASTDDPM_ISA="mmx")
    assert done.returncode == 1
    assert "ValueError: FASTDDPM_ISA is 'mmx'; want one of amx, avx512_bf16, avx512, avx2, portable" in done.stderr


def test_module_rejects_instruction_sets_and_arguments():
    module = loader.native().module
    with pytest.raises(ValueError, match="'mmx' is unknown, or this CPU does not have it"):
        module.use("mmx")
    with pytest.raises(TypeError, match="got 3 arguments, want 7"):
        module.activation(1, 1, 1)
    with pytest.raises(TypeError):
        module.activation(1, 1, 1, "x", 1, 1, 0)
    with pytest.raises(TypeError, match="no kernel has this name and 1 words"):
        module.record("activation", 1, 1)
    with pytest.raises(OverflowError):
        module.record("activation", 1, 1, 2**64, 0, 0, 0)


def test_without_a_module_torch_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastddpm.kernels.cpu._native", None)
    assert loader.native.__wrapped__() == (None, "the C++ kernels were not built when fastddpm was installed")


def test_without_openmp_torch_runs(monkeypatch):
    module = loader.native().module
    monkeypatch.setattr(module, "openmp", lambda: None)
    assert loader.native.__wrapped__() == (None, "torch has loaded no OpenMP runtime, which the C++ kernels share")


THREADS = """
import os, torch
from fastddpm import noise, ops
from fastddpm.kernels.cpu.native import native

def counted():
    return len(os.listdir("/proc/self/task"))

def libraries():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}

address, t = noise.address(0, 4), torch.zeros(4, dtype=torch.int64)
torch.set_num_threads(4)
a = torch.ones(1 << 22)
a.add_(a)
before, runtimes = counted(), libraries()
ops.normal(address, (1 << 18,), stream=0, t=t)
assert ops.backend("cpu") == "cpp"
assert counted() == before, (counted(), before)
assert libraries() == runtimes == {os.path.realpath(native().module.openmp())}, libraries()
print(before)
"""


def test_kernels_run_on_the_threads_of_torch():
    done = python(THREADS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


USED = """
import os, sys, time, torch
from fastddpm import noise, ops
address, t = noise.address(0, 16), torch.zeros(16, dtype=torch.int64)
def seconds():  # of each thread
    stats = (open(f"/proc/self/task/{task}/stat").read() for task in os.listdir("/proc/self/task"))
    return sorted(int(stat.rpartition(")")[2].split()[11]) for stat in stats)
if len(sys.argv) > 1:
    torch.set_num_threads(int(sys.argv[1]))
before = seconds()
begun = time.time()
while time.time() - begun < 0.5:
    ops.normal(address, (1 << 18,), stream=0, t=t)
after = seconds()
print(sum(now - then > 5 for now, then in zip(after[::-1], [*before[::-1], *[0] * 99])))
"""


@pytest.mark.parametrize(("arguments", "environment"), [(["1"], {}), ([], {"OMP_NUM_THREADS": "1"})])
def test_torch_and_openmp_decide_how_many_threads_work(arguments, environment):
    command = [sys.executable, "-c", USED, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1


def test_module_needs_neither_openmp_nor_torch_to_be_linked():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    file = loader.native().module.__file__
    needed = subprocess.run([readelf, "-d", file], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert libraries
    assert not [name for name in libraries if re.search("omp|torch|c10|python", name)]


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree with built kernels, and a function that reports from it."""
    for name in ("kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "fastddpm"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(
            source,
            tmp_path / name,
            **({"ignore": shutil.ignore_patterns("models", "__pycache__")} if source.is_dir() else {}),
        )
    os.utime(tmp_path / "kernels" / "cpu" / "_native.abi3.so")

    def report() -> str:
        code = f"""
import sys, types
package = types.ModuleType("fastddpm.kernels.cpu"); package.__path__ = [{str(tmp_path / "kernels" / "cpu")!r}]
import fastddpm
sys.modules["fastddpm.kernels.cpu"] = package
from fastddpm.kernels.cpu.native import native
found = native()
print(found.module and found.module.__file__, found.text)
"""
        done = python(code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return tmp_path, report


@pytest.mark.slow
def test_changed_sources_are_built_anew(tree):
    folder, report = tree
    built = folder / "kernels" / "cpu" / "_native.abi3.so"
    before = built.stat().st_mtime_ns
    assert report().startswith(str(built))
    assert built.stat().st_mtime_ns == before
    source = folder / "kernels" / "cpu" / "activation.cpp"
    source.write_text(source.read_text() + "\n// changed\n")
    assert report().startswith(str(built))
    assert built.stat().st_mtime_ns > before
    assert sorted(path.name for path in built.parent.iterdir() if path.is_dir()) in ([], ["__pycache__"])


@pytest.mark.slow
def test_sources_that_cannot_be_built_leave_torch(tree):
    folder, report = tree
    source = folder / "kernels" / "cpu" / "activation.cpp"
    source.write_text(source.read_text() + "\nthis is no C++\n")
    assert re.match("None the C\\+\\+ kernels are older than their sources and could not be built again: .", report())


def test_ops_say_which_backend_runs():
    assert ops.backend("cpu") == "cpp"
    assert torch.get_num_threads() >= 1


@pytest.mark.slow
def test_installation_without_a_compiler_succeeds(tree, tmp_path):
    folder, _ = tree
    (folder / "kernels" / "cpu" / "_native.abi3.so").unlink()
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", site, folder]
    without = os.environ | {"CC": "/no/compiler", "CXX": "/no/compiler"}
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "torch the C++ kernels were not built when fastddpm was installed"
