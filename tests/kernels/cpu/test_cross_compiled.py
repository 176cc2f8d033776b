"""The C++ kernels compile for 64-bit ARM, to vector instructions, and the noise standard's are never fused."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

COMPILER, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-fPIC"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
FUSED = {"attention", "convolution"}
VECTOR = r"\bf(?:mul|add)\s+v\d+\.4s"

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


def machine_code(source: Path, folder: Path, *flags: str) -> str:
    target = folder / f"{source.stem}.o"
    subprocess.run([COMPILER, *FLAGS, *flags, "-c", source, "-o", target], check=True)
    return subprocess.run([OBJDUMP, "-d", target], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in SOURCES.glob("*.cpp") if path.stem != "module"))
def test_kernel_compiles_to_vector_instructions(name, tmp_path):
    contract = "fast" if name in FUSED else "off"
    code = machine_code(SOURCES / f"{name}.cpp", tmp_path, "-DFASTDDPM_ISA=portable", f"-ffp-contract={contract}")
    if name in (
        "interleave",
        "residual",
        "normal",
        "step",
        "noising",
        "eps_loss",
        "group_norm",
        "resample",
        "activation",
        *FUSED,
    ):
        assert re.search(VECTOR if name not in FUSED else r"\bfml[as]\s+v\d+\.4s", code)
    if name not in FUSED:
        assert not re.search(r"\bfn?m(?:add|sub|la|ls)\b", code)


def test_module_compiles(tmp_path):
    assert "PyInit__native" in machine_code(SOURCES / "module.cpp", tmp_path, f"-I{sysconfig.get_paths()['include']}")
