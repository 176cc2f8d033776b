"""Builds the C++ kernels, once for each instruction set, into one module. The rest is in pyproject.toml.

If they cannot be built, as without a compiler, the package is installed without them, and torch's operations run.
FASTDDPM_SANITIZE=1 builds them with assertions, AddressSanitizer and UBSan instead, for the tests.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("kernels/cpu")
MODULE, *HEADERS = map(str, [FOLDER / "module.cpp", *sorted(FOLDER.glob("*.h"))])
KERNELS = sorted(str(path) for path in FOLDER.glob("*.cpp") if path.name != "module.cpp")
# No fused multiply-adds and no other order of sums: the bits are the same on every machine
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
FUSED = {"attention.cpp", "convolution.cpp"}  # these are not specified to the bit, so products are fused with sums
FLAGS += ["-fno-rtti", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx512"] = avx512
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-UNDEBUG", "-O1", "-g"]
SANITIZES = os.environ.get("FASTDDPM_SANITIZE") == "1"


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        flags = FLAGS + SANITIZE * SANITIZES
        ext.extra_compile_args = flags
        for isa, options in INSTRUCTION_SETS.items():
            folder, macros = os.path.join(self.build_temp, isa), [("FASTDDPM_ISA", isa)]
            for kernel in KERNELS:
                own = [*flags, *options, *["-ffp-contract=fast"] * (Path(kernel).name in FUSED)]
                ext.extra_objects += self.compiler.compile([kernel], folder, macros, extra_postargs=own)
        super().build_extension(ext)


kernels = Extension(
    "fastddpm.kernels.cpu._native",
    [MODULE],
    depends=[*KERNELS, *HEADERS, __file__],
    define_macros=[("FASTDDPM_X86", None)] * ("avx2" in INSTRUCTION_SETS),
    extra_link_args=SANITIZE[:1] * SANITIZES,
    language="c++",
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[] if sys.platform == "win32" else [kernels],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
