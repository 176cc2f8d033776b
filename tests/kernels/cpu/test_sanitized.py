"""The C++ kernels on ragged shapes, with assertions, AddressSanitizer and UBSan, in buffers without a byte to spare."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Runs without torch: memory comes from malloc, which the sanitizer surrounds by regions that nobody may touch.
CODE = """
import ctypes, importlib.util, itertools, mmap, struct, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.openmp() is not None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def memory(size, content=b""):
    at = libc.malloc(size)
    ctypes.memset(at, 0, size)
    ctypes.memmove(at, content, len(content))
    return at

def longs(*values): return memory(8 * len(values), struct.pack(f"{len(values)}q", *values))
def ints(*values): return memory(4 * len(values), struct.pack(f"{len(values)}i", *values))
def floats(count, *values): return memory(4 * count, struct.pack(f"{len(values)}f", *values))

class Native:  # runs each kernel of the module on one thread, on three, and on three in a program
    def __getattr__(self, name):
        if name in ("supported", "use", "columns", "bfloat16"):
            return getattr(module, name)
        def run(*words):
            for threads in (1, 3):
                getattr(module, name)(threads, MUCH, *words)
            module.replay(3, module.record(name, MUCH, *words))
        return run

native, MUCH = Native(), 1 << 40  # elements: enough work for all threads

SIZES = {0: 4, 1: 2, 2: 2, 3: 1}  # bytes of the dtypes
ENTRIES = [(0, 5), (1, 1), (1, 3), (2, 7), (1, 1023), (2, 1025), (3, 2050)]  # n, elements of an entry

def elementwise():
    for (n, size), m, copy in itertools.product(ENTRIES, (0, 1, 2), (0, 1, 2)):
        total = n * size
        t, address = longs(*[999] * n), longs(*[-1] * 2 * n)
        rows = floats(28, *[0.5] * 28)
        bad, pos = ints(*[-1] * n), ints(*[1] * n)
        native.step(n, size, memory(4 * total), memory(SIZES[m] * total), rows, ints(7, 9), pos, address,
                    memory(SIZES[copy] * total) if copy else None, bad if m else None, copy, m, copy)
        native.normal(n, size, memory(4 * total), t, address, 255)
        for act in range(3):
            native.activation(total, memory(SIZES[m] * total), memory(SIZES[m] * total), act, m)
        for x_0 in (m, 3):
            x = memory(SIZES[x_0] * total)
            native.noising(n, size, memory(SIZES[copy] * total), x, t, address, floats(2000), 3, 1, copy, x_0)
            sums, out, blocks = floats(n * (-(-size // 1024))), floats(n), None
            for predicts in range(3):
                loss = n, size, memory(SIZES[m] * total), x, t, address, floats(2000), predicts, 2, 0, m, x_0
                native.eps_loss(*loss, out, sums)
                native.eps_loss_backward(*loss, memory(SIZES[m] * total), floats(n))
            native.x_0_error(n, size, memory(SIZES[m] * total), x, t, address, floats(7000), 3, 1, m, x_0,
                             out, sums)

def images():
    shapes = [(0, 1, 1, 1), (1, 1, 1, 1), (2, 3, 5, 7), (1, 9, 15, 20), (3, 8, 8, 65)]  # n, height, width, channels
    for (n, h, w, c), dtype in itertools.product(shapes, (0, 1, 2)):
        count, size = n * h * w * c, SIZES[dtype]
        for bias, scale in itertools.product((floats(c), None), (1.0, 3.0)):
            native.residual(n * h * w, c, memory(size * count), memory(size * count), bias, scale, dtype)
        native.interleave(n, h, w, c, memory(4 * size * count),
                          memory(4 * size * n * (h + 1) * (w + 1) * c), floats(c), dtype)
        for up in (0, 1):  # both sides even, to be halved
            native.resample(n, 2 * h, 2 * w, c, up, memory(size * count * (16 if up else 1)),
                            memory(4 * size * count), dtype)
        for skip, add, scaled in itertools.product((0, 11), (None, 1), (None, 1)):
            width, blocks = c + skip, -(-h * w // 64)
            native.group_norm(n, h * w, 1, c, skip, memory(size * n * h * w * width),
                              memory(size * count), memory(size * n * h * w * skip) if skip else None,
                              floats(n * width) if add else None, width,
                              floats(2 * n * width) if scaled else None, 2 * width, floats(width), floats(width),
                              1e-5, 1 + skip % 2, floats((1 + (scaled or 0)) * n * width) if add else None,
                              (1 + (scaled or 0)) * width, scaled or 0,
                              memory(size * n * h * w * width) if add else None, dtype,
                              memory(16 * n * blocks * width), floats(3 * n * width))

def packed(out, channels, kernel, winograd, dtype=0, rows=None):
    rows = kernel if rows is None else rows
    depth = channels if winograd else -(-channels * rows * kernel * SIZES[dtype] // 4)
    panels, padded, phases = -(-out // native.columns()), -(-depth // 16) * 16, 4 if winograd and kernel == 2 else 1
    at = floats(panels * padded * native.columns() * ((kernel + 1) ** 2 if winograd else 1))
    size = SIZES[dtype] * phases * out * channels * rows * kernel
    native.pack(dtype, winograd, out, channels, rows, kernel, at, memory(size))
    return at

# columns and rows of the kernel, stride, padding, channels of skip, Winograd
KINDS = [(3, 3, 1, 1, 0, 1), (3, 3, 1, 1, 5, 0), (1, 1, 1, 0, 3, 0), (3, 3, 2, 1, 0, 0), (2, 2, 1, 1, 0, 1)]
KINDS += [(5, 1, 1, 2, 3, 0), (3, 1, 2, 1, 0, 0), (1, 3, 1, 0, 0, 0)]

def convolutions(dtype):
    shapes = [(0, 2, 2, 3, 4), (1, 1, 1, 1, 1), (2, 3, 5, 7, 9), (1, 8, 6, 33, 65), (3, 4, 4, 16, 32)]
    for (n, h, w, c, out), (kernel, rows, stride, padding, skip, winograd) in itertools.product(shapes, KINDS):
        if winograd and dtype:
            continue
        if winograd and kernel == 2:  # the input is doubled in size
            height, width = 2 * h, 2 * w
        else:
            height, width = (h + stride - 1) // stride, (w + stride - 1) // stride
        strides = height * width * out, width * out, out
        size, outputs = SIZES[dtype], SIZES[dtype] * n * height * width * out
        native.convolution(
            dtype, winograd, n, h, w, c, skip, height, width, out, rows, kernel, stride, rows // 2 * padding, padding,
            memory(size * n * h * w * c), memory(size * n * h * w * skip) if skip else None,
            packed(out, c + skip, kernel, winograd, dtype, rows), floats(out), memory(outputs), memory(outputs),
            *strides, 2.0)
    for n, tokens, heads, dim in [(0, 4, 1, 8), (1, 1, 1, 1), (2, 5, 3, 7), (1, 65, 2, 33)]:
        widest = max(-(-dim // 16) * 16, -(-dim // native.columns()) * native.columns())
        native.attention(dtype, n, tokens, heads, dim, memory(SIZES[dtype] * n * tokens * heads * dim),
                         memory(SIZES[dtype] * 3 * n * tokens * heads * dim),
                         floats(n * heads * 2 * -(-tokens // 32) * 32 * widest))

def far():
    size = 1 << 34  # untouched memory takes no physical pages
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # without reserving it
    block = mmap.mmap(-1, size, flags=flags)
    at, stride = ctypes.addressof(ctypes.c_char.from_buffer(block)), (1 << 31) + 8  # elements
    native.convolution(0, 0, 2, 2, 2, 1, 0, 2, 2, 1, 1, 1, 1, 0, 0, floats(8, *[1.0] * 8), None,
                       one(), None, None, at, stride, 2, 1, 1.0)
    assert struct.unpack("4f", ctypes.string_at(at + 4 * stride, 16)) == (2.0,) * 4
    ctypes.memmove(at + 4 * stride, struct.pack("f", 3.0), 4)
    y = floats(4)
    for add, scaled, film in ((at, None, None), (None, at, None), (None, None, at)):
        ctypes.memmove(at + 4 * (stride + 2), struct.pack("2f", 3.0, 3.0), 8)
        native.group_norm(2, 1, 1, 2, 0, y, floats(4), None, add, stride, scaled, stride, floats(2, 1.0, 1.0),
                          floats(2), 1e-5, 0, film, stride, 0, None, 0, memory(16 * 2 * 2), floats(12))
        assert struct.unpack("4f", ctypes.string_at(y, 16))[2] > 0.9

def one():
    at = packed(1, 1, 1, 0)
    ctypes.memmove(at, struct.pack("f", 2.0), 4)
    return at

for isa in native.supported():
    native.use(isa)
    elementwise(), images(), convolutions(0), far()
    if native.bfloat16():
        convolutions(1)
print("done")
"""

DAMAGED = """
native.use("portable")
native.activation(9, memory(36), memory(32), 1, 0)
print("done")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The module with sanitizers, and the environment to load it."""
    folder = tmp_path_factory.mktemp("sanitized")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = os.environ | {"FASTDDPM_SANITIZE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    module = folder / "fastddpm" / "kernels" / "cpu" / "_native.abi3.so"
    libraries = f"{library('libasan.so')}:{library('libgomp.so')}"
    loading = {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=0"}
    return module, os.environ | loading


def library(name: str) -> str:
    """The path of one of gcc's libraries."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(sanitized, code: str) -> subprocess.CompletedProcess[str]:
    module, environment = sanitized
    command = [sys.executable, "-c", code, module]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc"),
]


def test_no_kernel_reads_or_writes_beyond_its_tensors(sanitized):
    done = run(sanitized, CODE)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[:3000]


def test_a_read_beyond_a_tensor_is_detected(sanitized):
    done = run(sanitized, CODE.partition("for isa in")[0] + DAMAGED)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_a_negative_size_is_detected(sanitized):
    done = run(sanitized, CODE.partition("for isa in")[0] + DAMAGED.replace("activation(9,", "activation(-9,"))
    assert done.returncode != 0
    assert "Assertion" in done.stderr
