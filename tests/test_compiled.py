"""The kernels compiled without a GPU: no spills, 16-byte accesses, few instructions, exact arithmetic."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

INSTRUCTIONS = 80  # per element


def python(*arguments):
    """What a python prints in which Triton compiles, for in this process it interprets where there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, *arguments]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_lean(record):
    assert record["spill_bytes"] == 0, record
    assert record["load_bytes_128"] == record["load_bytes"], record
    assert record["store_bytes_128"] == record["store_bytes"], record
    assert 0 < record["instructions"] <= INSTRUCTIONS, record
    assert record["inexact"] == [], record


LEAN = {"spill_bytes": 0, "load_bytes": 6, "load_bytes_128": 6.0, "store_bytes": 4, "store_bytes_128": 4.0}
LEAN |= {"instructions": 80.0, "inexact": []}


@pytest.mark.parametrize(
    "damage",
    [
        {"spill_bytes": 8},
        {"load_bytes_128": 4.0},
        {"store_bytes_128": 0.0},
        {"instructions": 80.1},
        {"instructions": 0.0},
        {"instructions": float("nan")},
        {"inexact": ["fma.rn.f32"]},
    ],
)
def test_a_kernel_that_is_not_lean_is_seen(damage):
    assert_lean(LEAN)
    with pytest.raises(AssertionError):
        assert_lean(LEAN | damage)


# By the sampler and the trainer.
LAUNCHED = {"step m fp32, clip", "step m fp32", "step m bf16, clip, copy bf16", "step m bf16, copy bf16"}
LAUNCHED |= {"noising u8 to fp32", "noising u8 to bf16"}


@pytest.mark.slow
def test_every_kernel_is_lean_on_every_gpu():
    records = json.loads(python("-m", "fastddpm.kernels.report", "--json"))
    for record in records:
        assert_lean(record)
    assert {record["cc"] for record in records} == {80, 90, 100, 120}
    for cc in (80, 90, 100, 120):
        assert {record["kernel"] for record in records if record["cc"] == cc} >= LAUNCHED


OTHERWISE = """
import json
from fastddpm.kernels import report

step, copying = report.step_variant("bf16", None, clip=True), report.step_variant("bf16", "bf16", clip=True)
unwatched = report.step_variant("bf16", None, clip=True, bad=False)
def record(**options):
    return report.measured(step, report.compiled(step, 90, **options))

print(json.dumps({
    "odd": record(aligned=False),
    "one": record(aligned=False, constants={"per_sample": 1}),
    "fused": record(enable_fp_fusion=True),
    "spilling": record(maxnreg=32),
    "watched": report.compiled(step, 90).asm["ptx"],
    "unwatched": report.compiled(unwatched, 90).asm["ptx"],
    "copying": report.compiled(copying, 90).asm["ptx"],
}))
"""


@pytest.mark.slow
def test_kernels_compiled_otherwise():
    records = json.loads(python("-c", OTHERWISE))
    for name in ("odd", "one"):  # odd sizes and addresses compile as well, to narrow accesses
        assert records[name]["load_bytes_128"] == records[name]["store_bytes_128"] == 0
        assert records[name]["spill_bytes"] == 0
        assert records[name]["inexact"] == []
    assert records["fused"]["inexact"] == ["fma.rn.f32"]
    assert records["spilling"]["spill_bytes"] > 0
    for instruction, how_many in (("atom.", 1), ("max.NaN", 15), ("bar.sync", 0)):  # the flag's own, per 16 elements
        assert records["watched"].count(instruction) - records["unwatched"].count(instruction) == how_many, instruction
    assert "cvt.rn.bf16x2.f32" in records["copying"]  # to nearest, which the interpreter does not do
    clamps = re.findall(r"\b(?:max|min)\.[\w.]*f32", records["copying"])
    assert set(clamps) == {"max.NaN.f32", "min.NaN.f32"}  # the interpreter's own keep NaN whatever the kernel says


AHEAD = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # of a GPU that is not there: whatever is launched, or loaded, fails
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from fastddpm.kernels import launch, residual

h, bias = torch.zeros(2, 4, 16, dtype=torch.bfloat16), torch.zeros(4)
with launch.compiling():
    for h in (h, h.float(), h.half()):
        residual.launch_residual(h, h, bias)
compiled = residual.residual_kernel.device_caches[0][0].values()
assert [type(kernel).__name__ for kernel in compiled] == 3 * ["CompiledKernel"], compiled
try:
    residual.launch_residual(h, h, bias)
except AttributeError:
    print("launched")  # after the context
"""


def test_kernels_are_compiled_ahead_of_their_launches():
    assert python("-c", AHEAD).split() == ["launched"]


INEXACT = ["fma.rn.f32", "mad.f32", "mul.ftz.f32", "sqrt.approx.f32", "div.full.f32", "add.rz.f32", "cvt.rz.bf16x2.f32"]
EXACT = ["mul.rn.f32", "sqrt.rn.f32", "mad.lo.s64", "mad.wide.u32", "cvt.rn.bf16x2.f32", "max.NaN.f32", "cvt.f32.bf16"]


def test_inexact_instructions_are_told_from_exact_ones():
    code = "from fastddpm.kernels.report import INEXACT; import sys; print(*INEXACT.findall(sys.argv[1]))"
    lines = "\n".join(f"\t@%p1 {name} \t%r1, %r2;" for name in INEXACT + EXACT)
    assert python("-c", code, lines).split() == INEXACT


def test_the_report_does_not_interpret():
    run = [sys.executable, "-m", "fastddpm.kernels.report", "--cc", "90"]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("unset TRITON_INTERPRET")
