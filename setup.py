"""Builds the C++ kernels, once for each instruction set, into one module. The rest is in pyproject.toml.

If they cannot be built, as without a compiler, the package is installed without them, and torch's operations run.
FASTDDPM_SANITIZE=1 builds them with assertions, AddressSanitizer and UBSan instead, for the tests.
"""

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("kernels/cpu")
MODULE, *HEADERS = map(str, [FOLDER / "module.cpp", *sorted(FOLDER.glob("*.h"))])
KERNELS = sorted(str(path) for path in FOLDER.glob("*.cpp") if path.name != "module.cpp")
# No fused multiply-adds and no other order of sums: the bits are the same on every machine, except for those of FUSED
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
# these are not specified to the bit, so products are fused with sums
FUSED = [str(FOLDER / name) for name in ("attention.cpp", "convolution.cpp")]
FLAGS += ["-fno-rtti", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi"]
INSTRUCTION_SETS, EXTENSIONS = {"portable": []}, {}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512}
    # AVX-512 with other kernels of FUSED, if the compiler knows them
    EXTENSIONS["avx512_bf16"] = [*AVX512, "-mavx512bf16"]
    EXTENSIONS["amx"] = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-UNDEBUG", "-O1", "-g"]
SANITIZES = os.environ.get("FASTDDPM_SANITIZE") == "1"


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        ext.extra_compile_args = FLAGS + SANITIZE * SANITIZES
        for isa, options in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiled(isa, options, KERNELS)
        for isa, options in EXTENSIONS.items():
            try:
                ext.extra_objects += self.compiled(isa, options, FUSED)
            except CompileError:
                print(f"this compiler does not know {isa}, which is left out")
            else:
                ext.define_macros.append((f"FASTDDPM_{isa.upper()}", None))
        super().build_extension(ext)

    def compiled(self, isa: str, options: list[str], kernels: list[str]) -> list[str]:
        """Compile kernels for an instruction set, several at once. Returns: the object files."""

        def compile_one(kernel: str) -> list[str]:
            flags = [*FLAGS, *SANITIZE * SANITIZES, *options, *["-ffp-contract=fast"] * (kernel in FUSED)]
            folder, macros = os.path.join(self.build_temp, isa), [("FASTDDPM_ISA", isa)]
            return self.compiler.compile([kernel], folder, macros, extra_postargs=flags)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return [name for names in threads.map(compile_one, kernels) for name in names]


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

# Free-threaded Python has no stable interface
setup(
    ext_modules=[] if sys.platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED") else [kernels],
    cmdclass={"build_ext": BuildKernels},
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
