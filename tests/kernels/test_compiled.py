"""The kernels compiled without a GPU: no spills, 16-byte accesses, few instructions, only the specified arithmetic."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

INSTRUCTIONS = {
    "step": 80,
    "conditional_step": 210,  # with two normals
    "draft": 180,  # with the division of both kinds of rows
    "first_difference": 100,
    "commit": 80,
    "predict_step": 106,
    "normal": 80,
    "noising": 80,
    "eps_loss": 80,
    "x_0_error": 80,
}  # per element
INSTRUCTIONS |= {"tree_sum": 20, "norm": 64, "residual": 20, "interleave": 20}
# a norm may use these: it is not specified to the bit
FAST = {"fma.rn.f32", "div.full.f32", "div.approx.f32", "ex2.approx.ftz.f32"}


def python(*arguments):
    """The output of a new Python process, in which Triton compiles; in this one it interprets if there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, *arguments]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_lean(record):
    operation = record["kernel"].split()[0]
    assert record["spill_bytes"] == 0, record
    assert record["store_bytes_128"] == record["store_bytes"], record
    assert 0 < record["instructions"] <= INSTRUCTIONS[operation], record
    if operation == "norm":
        assert record["load_bytes_128"] >= record["load_bytes"], record  # and the parameters of the channels
        assert set(record["inexact"]) <= FAST, record
        assert record["shared_bytes"] <= 1024, record  # to sum over a program's warps: its tile stays in registers
    else:
        # two halves of channels are not adjacent, and a thread has 8 bytes of a mask
        narrow = operation == "conditional_step" and re.search("learned|known", record["kernel"])
        assert narrow or record["load_bytes_128"] == record["load_bytes"], record
        assert record["inexact"] == [], record


LEAN = {
    "kernel": "step m bf16",
    "spill_bytes": 0,
    "load_bytes": 6,
    "load_bytes_128": 6.0,
    "store_bytes": 4,
    "store_bytes_128": 4.0,
}
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
def test_a_kernel_that_is_not_lean_is_detected(damage):
    assert_lean(LEAN)
    with pytest.raises(AssertionError):
        assert_lean(LEAN | damage)


@pytest.mark.parametrize(
    "damage",
    [
        {"load_bytes_128": 5.9},
        {"store_bytes_128": 0.0},
        {"instructions": 64.1},
        {"inexact": ["sqrt.approx.f32"]},
        {"shared_bytes": 8192},
    ],
)
def test_a_norm_that_is_not_lean_is_detected(damage):
    lean = LEAN | {"kernel": "norm held bf16", "load_bytes_128": 8.0, "instructions": 64.0, "shared_bytes": 1024}
    lean |= {"inexact": ["div.full.f32", "fma.rn.f32"]}
    assert_lean(lean)
    with pytest.raises(AssertionError):
        assert_lean(lean | damage)


# Kernels that the sampler, the trainer and diffusers' schedulers launch.
LAUNCHED = {"step m fp32, clip", "step m fp32", "step m bf16, clip, copy bf16", "step m bf16, copy bf16"}
LAUNCHED |= {"normal", "noising u8 to fp32", "noising u8 to bf16", "residual bf16, bias", "interleave bf16, bias"}
LAUNCHED |= {"x_0_error bf16, u8", "conditional_step bf16, guided", "conditional_step bf16, guided, learned, known"}
LAUNCHED |= {"eps_loss bf16", "eps_loss bf16, backward", "eps_loss bf16, v_prediction u8", "tree_sum"}
LAUNCHED |= {f"predict_step {kind}" for kind in ("fp32, clip, z fp32", "fp32, clip, z registers", "bf16, clip, z bf16")}
LAUNCHED |= {f"norm held bf16 {shape}, silu" for shape in ("1x1024x256, skip", "64x1024x128, add")}
LAUNCHED |= {f"norm {kernel} bf16 1x65536x128, add, silu" for kernel in ("statistics", "apply")}
LAUNCHED |= {f"norm {of}, add, scale_shift, silu" for of in ("held bf16 64x1024x128", "apply bf16 1x65536x128")}
LAUNCHED |= {"norm held bf16 64x16x1024, film_scale, film_shift, mish", "norm held bf16 64x1024x128, residual, mish"}
LAUNCHED |= {f"norm apply bf16 1x65536x128, {end}, mish" for end in ("film_scale, film_shift", "residual")}


@pytest.mark.slow
def test_every_kernel_is_lean_on_every_gpu():
    records = json.loads(python("-m", "fastddpm.kernels.report", "--json"))
    for record in records:
        assert_lean(record)
    assert {record["cc"] for record in records} == {80, 90, 100, 120}
    for cc in (80, 90, 100, 120):
        assert {record["kernel"] for record in records if record["cc"] == cc} >= LAUNCHED


OTHER_VARIANTS = """
import json
from fastddpm.kernels import report

step, copying = report.step_variant("bf16", None, clip=True), report.step_variant("bf16", "bf16", clip=True)
without_flags = report.step_variant("bf16", None, clip=True, bad=False)
def record(variant=step, **options):
    return report.resources(variant, report.compile_variant(variant, 90, **options))

narrow = [*report.group_norm_variants("bf16", 1, 1024, 384, skip=True, add=True),
          *report.group_norm_variants("bf16", 1, 128 * 128, 384, skip=True, add=True)]
others = [*narrow, report.residual_variant("bf16", bias=True), report.interleave_variant("bf16", bias=True)]
ones = dict.fromkeys(("pixels", "channels", "x_channels", "slabs", "per_sample", "blocks"), 1)
print(json.dumps({
    "odd": record(aligned=False),
    "one": record(aligned=False, constants={"per_sample": 1}),
    "fused": record(enable_fp_fusion=True),
    "spilling": record(maxnreg=32),
    "narrow": [record(variant) for variant in narrow],
    "others": [record(variant, aligned=False, constants={name: 1 for name in names if name in variant.types})
                  for variant in others for names in ((), ones)],
    "flags": report.compile_variant(step, 90).asm["ptx"],
    "without flags": report.compile_variant(without_flags, 90).asm["ptx"],
    "copying": report.compile_variant(copying, 90).asm["ptx"],
}))
"""


@pytest.mark.slow
def test_other_variants_of_kernels():
    records = json.loads(python("-c", OTHER_VARIANTS))
    for name in ("odd", "one"):  # odd sizes and addresses compile too, to narrow accesses
        assert records[name]["load_bytes_128"] == records[name]["store_bytes_128"] == 0
        assert records[name]["spill_bytes"] == 0
        assert records[name]["inexact"] == []
    for record in records["narrow"]:  # groups of 12 channels are 24 bytes: accesses of 8
        assert record["spill_bytes"] == 0
        assert record["store_bytes_128"] == 0
        assert record["shared_bytes"] <= 1024
    for record in records["others"]:
        # Triton 3.9 spills 112 bytes where a norm holds its groups and memory is unaligned, which no network's is
        assert record["spill_bytes"] <= 112
        assert record["store_bytes_128"] == 0
    assert len(records["others"]) == 10
    assert records["fused"]["inexact"] == ["fma.rn.f32"]
    assert records["spilling"]["spill_bytes"] > 0
    # of the flags, per 16 elements; an atomic maximum is a "red" where its result is unused, from Triton 3.9 on
    for instruction, how_many in ((r"\b(?:atom|red)\.", 1), (r"\bmax\.NaN", 15), (r"\bbar\.sync", 0)):
        counts = [len(re.findall(instruction, records[name])) for name in ("flags", "without flags")]
        assert counts[0] - counts[1] == how_many, instruction
    assert "cvt.rn.bf16x2.f32" in records["copying"]  # rounds to nearest; the interpreter truncates
    clamps = re.findall(r"\b(?:max|min)\.[\w.]*f32", records["copying"])
    assert set(clamps) == {"max.NaN.f32", "min.NaN.f32"}  # the interpreter keeps NaN even without propagate_nan


PREDICT_STEP = """
import json
from itertools import product
from fastddpm.kernels import report

step = report.predict_step_variant
def record(variant, cc=90, **options):
    return {"cc": cc} | report.resources(variant, report.compile_variant(variant, cc, **options))

steps = product(("epsilon", "sample", "v_prediction"), ("ddpm", "ddim", "ddim_clipped"))
dense = [step("fp32", "fp16", "bf16", predicts=predicts, sampler=sampler) for predicts, sampler in steps]
dense += [step("bf16", "fp32", None), step("fp16", "fp16", "fp16", learned="learned", at="*i64")]
dense += [step("bf16", "bf16", "registers"), step("fp32", "fp32", "registers", learned="learned_range")]
options = {"sampler": "ddim_clipped", "learned": "learned_range"}
halves = [step("fp32", "fp32", "fp32", ones="inner", **options), step("bf16", "bf16", "bf16", ones="inner", **options)]
across = [step("fp32", "fp32", "registers", ones="outer"), step("bf16", "fp16", "registers", ones="outer", **options)]
rounded = report.compile_variant(step("bf16", "bf16", "bf16"), 90).asm["ptx"]
print(json.dumps({
    "dense": [record(variant) for variant in dense],
    "halves": [record(variant, cc) for variant in halves for cc in (80, 90, 100, 120)],
    "across": [record(variant, cc) for variant in across for cc in (80, 90, 100, 120)],
    "odd": [record(variant, aligned=False) for variant in (dense[0], *halves, *across)],
    "one": [record(dense[0], aligned=False, constants={"per_sample": 1, "x_entry": 1, "m_entry": 1})],
    "fused": record(dense[0], enable_fp_fusion=True),
    "rounded": rounded,
}))
"""


@pytest.mark.slow
def test_other_variants_of_predict_step():
    records = json.loads(python("-c", PREDICT_STEP))
    groups = [records[name] for name in ("dense", "halves", "across", "odd", "one")]
    assert [len(group) for group in groups] == [13, 8, 8, 5, 1]
    for record in (record for group in groups for record in group):
        assert record["spill_bytes"] == 0, record
        assert record["inexact"] == [], record
    for record in records["dense"] + records["halves"]:  # 16 adjacent channels in both
        assert record["load_bytes_128"] == record["load_bytes"], record
        assert record["store_bytes_128"] == record["store_bytes"], record
    for record in records["across"] + records["odd"] + records["one"]:
        assert record["load_bytes_128"] == record["store_bytes_128"] == 0, record
    assert records["fused"]["inexact"] == ["fma.rn.f32"]
    assert "cvt.rn.bf16x2.f32" in records["rounded"]  # rounds to nearest; the interpreter truncates
    assert set(re.findall(r"\b(?:max|min)\.[\w.]*f32", records["rounded"])) == {"max.NaN.f32", "min.NaN.f32"}
    assert set(re.findall(r"\bdiv\.[\w.]*f32", records["rounded"])) == {"div.rn.f32"}


AHEAD = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # of a GPU that does not exist: loading or launching a kernel fails
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from fastddpm.kernels import group_norm, interleave, launch, residual

h, bias = torch.zeros(2, 4, 16, dtype=torch.bfloat16), torch.zeros(4)
with launch.compiling():
    for h in (h, h.float(), h.half()):
        residual.launch_residual(h, h, bias, 1.0)
    for pixels in (64, 1 << 16):  # one launch, and two
        x, bias = torch.zeros(1, 32, pixels, dtype=torch.bfloat16), torch.zeros(32)
        group_norm.launch_group_norm(x, x, bias, bias, 8, 1e-5, None, None, None, None, None, act="silu")
    for side in (1, 4, 16):  # all sizes share one compiled kernel
        y = torch.zeros(1, 128, side + 1, side + 1, dtype=torch.bfloat16)
        interleave.launch_interleave(y.new_zeros(1, 32, 2 * side, 2 * side), y, bias)
kernels = {residual.residual_kernel: 3, group_norm.held_kernel: 1, interleave.interleave_kernel: 1}
for kernel, count in (kernels | {group_norm.statistics_kernel: 1, group_norm.apply_kernel: 1}).items():
    compiled = kernel.device_caches[0][0].values()
    assert [type(kernel).__name__ for kernel in compiled] == count * ["CompiledKernel"], compiled
h, bias = torch.zeros(2, 4, 16), torch.zeros(4)
try:
    residual.launch_residual(h, h, bias, 1.0)
except AttributeError:
    print("launched")  # after the context
"""


def test_kernels_are_compiled_before_they_are_launched():
    assert python("-c", AHEAD).split() == ["launched"]


ROWS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from fastddpm.kernels import launch
from fastddpm.kernels.predict_step import launch_predict_step, predict_step_kernel

x, rows = torch.zeros(2, 3, 8, 8), torch.zeros(1001, 8)
with launch.compiling():
    for clip in (1.0, 0.5, 2):
        for at in (0, 1, 7, 16, 1000, torch.tensor(5)):
            options = {"predicts": "epsilon", "sampler": "ddpm", "clip": clip, "learned": None}
            launch_predict_step(x, x, x, x, None, x, rows, at, None, **options)
print(len(predict_step_kernel.device_caches[0][0]))
"""


def test_another_row_or_clip_compiles_no_new_kernel():
    assert python("-c", ROWS).split() == ["2"]  # one for a row given as a number, one for a row given as a tensor


INEXACT = ["fma.rn.f32", "mad.f32", "mul.ftz.f32", "sqrt.approx.f32", "div.full.f32", "add.rz.f32", "cvt.rz.bf16x2.f32"]
EXACT = ["mul.rn.f32", "sqrt.rn.f32", "mad.lo.s64", "mad.wide.u32", "cvt.rn.bf16x2.f32", "max.NaN.f32", "cvt.f32.bf16"]


def test_inexact_instructions_are_distinguished_from_exact_ones():
    code = "from fastddpm.kernels.report import INEXACT; import sys; print(*INEXACT.findall(sys.argv[1]))"
    lines = "\n".join(f"\t@%p1 {name} \t%r1, %r2;" for name in INEXACT + EXACT)
    assert python("-c", code, lines).split() == INEXACT


def test_the_report_fails_if_triton_interprets():
    run = [sys.executable, "-m", "fastddpm.kernels.report", "--cc", "90"]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("unset TRITON_INTERPRET")
