"""The resources of each compiled kernel, without a GPU: python -m fastddpm.kernels.report [--json] [--cc 90 ...]

Every variant is compiled ahead of time, as for a launch on aligned tensors (pointers and elements per sample divisible
by 16). Its machine code is read with cuobjdump, which ships inside Triton.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    commit,
    conditional_step,
    draft,
    eps_loss,
    first_difference,
    group_norm,
    interleave,
    noising,
    normal,
    predict_step,
    residual,
    step,
    tree,
    x_0_error,
)

CAPABILITIES = (80, 90, 100, 120)  # A100, H100 and H200, B200, RTX 50
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}
OPERATION = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"  # a line of cuobjdump -sass
# What the noise standard forbids: fused multiply-add, flush to zero, approximations, other roundings of a float.
INEXACT = re.compile(r"(?:fma|mad)\.[\w.]*f\d\d|[a-z]\w*\.[\w.]*(?:ftz|approx|full)\b[\w.]*|[a-z]\w*\.r[zmp]\.[\w.]*")


class Variant(NamedTuple):
    """A kernel, the types of its arguments, and the bytes that it reads and writes per element."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    elements: int  # that a program computes at once
    read: int
    written: int


def step_variant(m: str, copy: str | None, *, clip: bool, bad: bool = True) -> Variant:
    types = {"x_ptr": "*fp32", "m_ptr": f"*{m}", "row_ptr": "*fp32", "t_ptr": "*i32", "pos_ptr": "*i32"}
    types |= {"address_ptr": "*i64", "copy_ptr": f"*{copy}", "bad_ptr": "*i32", "per_sample": "i32"}
    constants = {"CLIP": clip, "BLOCK": step.BLOCK} | ({} if copy else {"copy_ptr": None})
    constants |= {} if bad else {"bad_ptr": None}
    name = f"step m {m}{', clip' if clip else ''}{f', copy {copy}' if copy else ''}{'' if bad else ', without flags'}"
    written = 4 + (BYTES[copy] if copy else 0)
    return Variant(name, step.step_kernel, types, constants, step.OPTIONS, step.BLOCK, 4 + BYTES[m], written)


def conditional_step_variant(
    m: str, *, guided: bool = False, learned: int = 0, known: bool = False, guide_variance: bool = False
) -> Variant:
    types = {"x_ptr": "*fp32", "m_ptr": f"*{m}", "row_ptr": "*fp32", "t_ptr": "*i32", "pos_ptr": "*i32"}
    types |= {"address_ptr": "*i64", "guidance_ptr": "*fp32", "known_ptr": "*fp32", "mask_ptr": "*i8"}
    types |= {"bad_ptr": "*i32", "per_sample": "i32", "channels": "i32"}
    constants: dict[str, Any] = {"CLIP": True, "GUIDE_VARIANCE": guide_variance, "LEARNED": learned}
    constants |= {"HALVES": 2 if learned else 1, "BLOCK": conditional_step.BLOCK}
    constants |= {} if guided else {"guidance_ptr": None}
    constants |= {} if known else {"known_ptr": None, "mask_ptr": None}
    given = {"guided": guided, "learned": learned, "known": known}
    name = ", ".join([f"conditional_step {m}", *(kind for kind, is_given in given.items() if is_given)])
    read = 4 + BYTES[m] * (1 + guided) * (2 if learned else 1) + 5 * known
    kernel, elements = conditional_step.conditional_step_kernel, conditional_step.BLOCK
    return Variant(name, kernel, types, constants, conditional_step.OPTIONS, elements, read, 4)


CHAINS = {"x_ptr": "*fp32", "m_ptr": "*fp32", "row_ptr": "*fp32", "t_ptr": "*i32", "pos_ptr": "*i32"}
CHAINS |= {"address_ptr": "*i64"} | dict.fromkeys(("per_sample", "window"), "i32")


def draft_variant(copy: str | None) -> Variant:
    """The bytes of this and the next two are those of one row, and of what is read before the loop over the rows."""
    types = CHAINS | {"states_ptr": "*fp32", "copy_ptr": f"*{copy}", "scale_ptr": "*fp32", "seen_ptr": "*i32"}
    types |= dict.fromkeys(("ahead", "last_row"), "i32")
    constants = {"CLIP": True, "ROUND": copy is not None, "BLOCK": draft.BLOCK} | ({} if copy else {"copy_ptr": None})
    name, written = f"draft{f' copy {copy}' if copy else ''}", 4 + (BYTES[copy] if copy else 0)
    return Variant(name, draft.draft_kernel, types, constants, draft.OPTIONS, draft.BLOCK, 20, written)


def first_difference_variant() -> Variant:
    types, module = CHAINS | {"reached_ptr": "*i32", "states_ptr": "*fp32", "ahead": "i32"}, first_difference
    constants, kernel = {"CLIP": True, "BLOCK": module.BLOCK}, module.first_difference_kernel
    return Variant("first_difference", kernel, types, constants, module.OPTIONS, module.BLOCK, 12, 0)


def commit_variant() -> Variant:
    types, constants = CHAINS | {"reached_ptr": "*i32", "bad_ptr": "*i32"}, {"CLIP": True, "BLOCK": commit.BLOCK}
    return Variant("commit", commit.commit_kernel, types, constants, commit.OPTIONS, commit.BLOCK, 8, 4)


def predict_step_variant(
    x: str,
    m: str,
    z: str | None,
    *,
    predicts: str = "epsilon",
    sampler: str = "ddpm",
    clip: bool = True,
    learned: str | None = None,
    at: str = "i32",
    ones: str | None = None,
) -> Variant:
    """The kernel for dtypes x, m and z.

    Args:
        z: a dtype, "registers" (the kernel draws z from an address) or None (no noise).
        ones: which strides are 1, "inner" or "outer"; None: all tensors have one dense order.
    """
    given, tensors = z not in (None, "registers"), ("x_prev", "x", "m", "v", "z")
    x_prev = x if x == m else "fp32"
    x_0 = m if predicts == "sample" else x_prev
    types = {"x_prev_ptr": f"*{x_prev}", "x_0_ptr": f"*{x_0}", "x_ptr": f"*{x}", "m_ptr": f"*{m}", "v_ptr": f"*{m}"}
    types |= {"z_ptr": f"*{z}", "row_ptr": "*fp32", "at": at, "address_ptr": "*i64", "clip": "fp32"}
    types |= dict.fromkeys(("per_sample", "inner_size"), "i32")
    types |= {f"{name}_{along}": "i32" for name in tensors for along in ("entry", "outer", "inner")}
    constants = {"PREDICTS": predicts, "SAMPLER": sampler, "LEARNED": learned, "BLOCK": predict_step.BLOCK}
    constants |= {} if clip else {"clip": None}
    absent = {"v_ptr": not learned, "z_ptr": not given, "address_ptr": z != "registers"}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    if ones is None:
        constants |= dict.fromkeys(
            ("inner_size", *(f"{name}_{along}" for name in tensors for along in ("outer", "inner")))
        )
    else:
        constants |= {f"{name}_{ones}": 1 for name in tensors}
    parts = [predicts] * (predicts != "epsilon") + [sampler] * (sampler != "ddpm") + ["clip"] * clip
    parts += [f"{what}{word}" for what, word in (("", learned), ("z ", z), ("1 ", ones)) if word]
    name = f"predict_step {x}{f' m {m}' * (m != x)}, {', '.join(parts)}"
    read = BYTES[x] + BYTES[m] * (2 if learned else 1) + BYTES.get(z or "", 0)
    options = predict_step.CROSSING if z == "registers" and ones else predict_step.OPTIONS
    kernel, elements = predict_step.predict_step_kernel, predict_step.BLOCK
    return Variant(name, kernel, types, constants, options, elements, read, BYTES[x_prev] + BYTES[x_0])


def normal_variant() -> Variant:
    types = {"z_ptr": "*fp32", "t_ptr": "*i64", "address_ptr": "*i64", "per_sample": "i32", "stream": "i32"}
    return Variant("normal", normal.normal_kernel, types, {"BLOCK": normal.BLOCK}, normal.OPTIONS, normal.BLOCK, 0, 4)


def noising_variant(x_0: str, x_t: str, *, with_t: bool = False) -> Variant:
    types = {"x_t_ptr": f"*{x_t}", "x_0_ptr": f"*{x_0}", "t_ptr": "*i64", "address_ptr": "*i64", "table_ptr": "*fp32"}
    types |= {"per_sample": "i32"}
    constants = {"STREAM": 3 if with_t else 2, "WITH_T": with_t, "BLOCK": noising.BLOCK}
    name = f"noising {x_0} to {x_t}{', t in address' if with_t else ''}"
    kernel, read = noising.noising_kernel, BYTES[x_0]
    return Variant(name, kernel, types, constants, noising.OPTIONS, noising.BLOCK, read, BYTES[x_t])


def eps_loss_variant(m: str, x_0: str, predicts: str = "epsilon", *, backward: bool = False) -> Variant:
    """The bytes leave out the sum that the forward kernel stores per block."""
    types = {"out_ptr": f"*{m}" if backward else "*fp32", "grad_ptr": "*fp32", "m_ptr": f"*{m}", "x_0_ptr": f"*{x_0}"}
    types |= {"t_ptr": "*i64", "address_ptr": "*i64", "table_ptr": "*fp32", "per_sample": "i32"}
    constants = {"PREDICTS": predicts, "STREAM": 2, "WITH_T": False, "BLOCK": eps_loss.BLOCK}
    kernel = eps_loss.eps_loss_backward_kernel if backward else eps_loss.eps_loss_kernel
    typed = {name: type_ for name, type_ in types.items() if name in kernel.arg_names}
    name = f"eps_loss {m}{f', {predicts} {x_0}' * (predicts != 'epsilon')}{', backward' * backward}"
    read, written = BYTES[m] + BYTES[x_0] * (predicts != "epsilon"), BYTES[m] * backward
    return Variant(name, kernel, typed, constants, eps_loss.OPTIONS, eps_loss.BLOCK, read, written)


def x_0_error_variant(m: str, x_0: str) -> Variant:
    """The bytes leave out the sum that the kernel stores per block."""
    types = {"out_ptr": "*fp32", "m_ptr": f"*{m}", "x_0_ptr": f"*{x_0}", "t_ptr": "*i64", "address_ptr": "*i64"}
    types |= {"table_ptr": "*fp32", "per_sample": "i32"}
    constants = {"STREAM": 3, "WITH_T": True, "BLOCK": x_0_error.BLOCK}
    name, kernel, read = f"x_0_error {m}, {x_0}", x_0_error.x_0_error_kernel, BYTES[m] + BYTES[x_0]
    return Variant(name, kernel, types, constants, x_0_error.OPTIONS, x_0_error.BLOCK, read, 0)


def tree_sum_variant() -> Variant:
    types, constants = {"out_ptr": "*fp32", "x_ptr": "*fp32", "count": "i32"}, {"BLOCK": tree.BLOCK}
    return Variant("tree_sum", tree.tree_sum_kernel, types, constants, tree.OPTIONS, tree.BLOCK, 4, 0)


def group_norm_variants(
    dtype: str, n: int, pixels: int, channels: int, *, groups: int = 32, skip: bool = False, add: bool = False,
    scale_shift: bool = False, film: int = 0, residual: bool = False, act: str | None = "silu",
) -> Iterator[Variant]:  # fmt: skip
    """The kernels that are launched by `group_norm.plan` for n samples of [pixels, channels] in groups.

    Args: film: 2 for scales and shifts, 1 for shifts alone, 0 for none.
    """
    plan, per_group = group_norm.plan(n, pixels, channels, groups, BYTES[dtype]), channels // groups
    width = triton.next_power_of_2(per_group)
    types = dict.fromkeys(("y_ptr", "x_ptr", "skip_ptr", "residual_ptr"), f"*{dtype}") | {"eps": "fp32"}
    types |= dict.fromkeys(("add_ptr", "weight_ptr", "bias_ptr", "scale_shift_ptr", "statistics_ptr"), "*fp32")
    types |= dict.fromkeys(("film_scale_ptr", "film_shift_ptr"), "*fp32")
    types |= dict.fromkeys(("pixels", "channels", "x_channels", "slabs"), "i32")
    types |= dict.fromkeys(("add_stride", "scale_shift_stride", "film_stride"), "i32")
    constants: dict[str, Any] = {"ACT": act, "PER_GROUP": per_group, "WIDTH": width, "GROUPS": plan.groups}
    constants |= {"STRIPES": triton.cdiv(groups, plan.groups), "ROWS": plan.rows, "SLAB": plan.slab}
    constants |= {"SLABS": triton.next_power_of_2(triton.cdiv(pixels, plan.slab))}
    given = {"skip": skip, "add": add, "scale_shift": scale_shift}
    given |= {"film_scale": film == 2, "film_shift": film > 0, "residual": residual}
    constants |= {f"{argument}_ptr": None for argument, present in given.items() if not present}
    options, held = {"num_warps": plan.warps, **group_norm.OPTIONS}, plan.rows >= pixels
    for kernel in [group_norm.held_kernel] if held else [group_norm.statistics_kernel, group_norm.apply_kernel]:
        what = kernel.__name__.removesuffix("_kernel")
        what_is_given = "".join(f", {argument}" for argument, present in given.items() if present)
        name = f"norm {what} {dtype} {n}x{pixels}x{channels}{what_is_given}{f', {act}' if act else ''}"
        own, typed = ({k: v for k, v in d.items() if k in kernel.arg_names} for d in (constants, types))
        read, written = BYTES[dtype], 0 if kernel is group_norm.statistics_kernel else BYTES[dtype]
        read += written * residual
        elements = plan.rows * plan.groups * width
        yield Variant(name, kernel, typed, own, options, elements, read, written)


def residual_variant(dtype: str, *, bias: bool) -> Variant:
    types = {"h_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}", "bias_ptr": "*fp32"}
    types |= dict.fromkeys(("per_sample", "channels", "blocks"), "i32") | {"scale": "fp32"}
    constants = {"SCALE": False, "BLOCK": residual.BLOCK} | ({} if bias else {"bias_ptr": None})
    name, kernel, read = f"residual {dtype}{', bias' * bias}", residual.residual_kernel, 2 * BYTES[dtype] + 4 * bias
    return Variant(name, kernel, types, constants, residual.OPTIONS, residual.BLOCK, read, BYTES[dtype])


def interleave_variant(dtype: str, *, bias: bool) -> Variant:
    """For 256 channels. A thread loads the bias once for all of its pixels: two in 16 bits, four in fp32."""
    types = {"out_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "bias_ptr": "*fp32"}
    types |= dict.fromkeys(("height", "width", "channels"), "i32")
    pixels = interleave.BLOCK // interleave.MAX_CHANNELS
    constants: dict[str, Any] = {"CHANNELS": interleave.MAX_CHANNELS, "PIXELS": pixels, "STRIPES": 4}
    constants |= {} if bias else {"bias_ptr": None}
    name, kernel = f"interleave {dtype}{', bias' * bias}", interleave.interleave_kernel
    read = BYTES[dtype] + 4 // BYTES[dtype] * bias
    return Variant(name, kernel, types, constants, interleave.OPTIONS, interleave.BLOCK, read, BYTES[dtype])


VARIANTS = (
    step_variant("fp32", None, clip=True),
    step_variant("fp32", None, clip=False),
    step_variant("fp32", "bf16", clip=True),
    step_variant("bf16", "bf16", clip=True),
    step_variant("bf16", "bf16", clip=False),
    step_variant("fp16", "fp16", clip=True),
    conditional_step_variant("bf16", guided=True),
    conditional_step_variant("fp32", known=True),
    conditional_step_variant("bf16", learned=2),
    conditional_step_variant("bf16", guided=True, learned=2, known=True, guide_variance=True),
    conditional_step_variant("fp32", guided=True, learned=1),
    draft_variant("bf16"),
    draft_variant("fp32"),
    draft_variant(None),
    first_difference_variant(),
    commit_variant(),
    predict_step_variant("fp32", "fp32", "fp32"),
    predict_step_variant("fp32", "fp32", "registers"),
    predict_step_variant("fp32", "fp32", "fp32", learned="learned_range"),
    predict_step_variant("bf16", "bf16", "bf16"),
    predict_step_variant("fp16", "fp16", None, sampler="ddim", clip=False, at="*i64"),
    normal_variant(),
    noising_variant("u8", "fp32"),
    noising_variant("u8", "bf16"),
    noising_variant("fp32", "fp32", with_t=True),
    eps_loss_variant("bf16", "u8"),
    eps_loss_variant("bf16", "u8", backward=True),
    eps_loss_variant("fp32", "u8", "sample"),
    eps_loss_variant("bf16", "u8", "v_prediction"),
    eps_loss_variant("bf16", "u8", "v_prediction", backward=True),
    x_0_error_variant("bf16", "u8"),
    x_0_error_variant("fp32", "fp32"),
    tree_sum_variant(),
    *group_norm_variants("bf16", 1, 1024, 256, skip=True),
    *group_norm_variants("bf16", 64, 1024, 128, add=True),
    *group_norm_variants("fp32", 64, 1024, 256, add=True),
    *group_norm_variants("bf16", 1, 256 * 256, 128, add=True),
    *group_norm_variants("bf16", 64, 1024, 128, add=True, scale_shift=True),
    *group_norm_variants("bf16", 1, 256 * 256, 128, add=True, scale_shift=True),
    *group_norm_variants("bf16", 64, 16, 1024, groups=8, film=2, act="mish"),
    *group_norm_variants("fp32", 1, 16, 1024, groups=8, film=1, act="mish"),
    *group_norm_variants("bf16", 64, 1024, 128, residual=True, act="mish"),
    *group_norm_variants("bf16", 1, 256 * 256, 128, film=2, act="mish"),
    *group_norm_variants("bf16", 1, 256 * 256, 128, residual=True, act="mish"),
    residual_variant("bf16", bias=True),
    interleave_variant("bf16", bias=True),
    interleave_variant("fp32", bias=False),
)


def report(capabilities: Iterable[int] = CAPABILITIES) -> list[dict[str, Any]]:
    """One record per variant and compute capability. Each takes half a second, less if it is in Triton's cache.

    Keys: kernel, cc; registers per thread; spill_bytes per thread; shared_bytes per block; load_bytes and store_bytes,
    the bytes to read and write per element, and load_bytes_128 and store_bytes_128, those of them in 16-byte accesses;
    instructions per element; inexact, the PTX instructions that violate the noise standard's arithmetic.

    Instructions count the kernel's machine code without the padding at its end, divided by the elements of a thread.
    They include both sides of every branch and the slow path of the square root, so fewer are executed. The loads of a
    group norm include the parameters of the channels, which a thread reads once.
    Raises: RuntimeError: Triton is interpreting (TRITON_INTERPRET), or has no cuobjdump.
    """
    return list(_records(capabilities))


def compile_variant(
    variant: Variant, cc: int, *, aligned: bool = True, constants: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Triton's CompiledKernel of a variant.

    Args:
        aligned: whether pointers and elements per sample are divisible by 16.
        constants: constexpr arguments, in addition to the variant's.
        options: of the compiler, in addition to the variant's.
    Raises: RuntimeError: Triton is interpreting (TRITON_INTERPRET).
    """
    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError("report: Triton is interpreting its kernels; unset TRITON_INTERPRET")
    constants = variant.constants | (constants or {})
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    plain = {param.name for param in variant.kernel.params if param.do_not_specialize}
    plain |= {name for name in names if not aligned or signature[name] in ("constexpr", "fp32")}
    hinted = [(i,) for i, name in enumerate(names) if name not in plain]
    source = ASTSource(variant.kernel, signature, constants, {key: [["tt.divisibility", 16]] for key in hinted})
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=variant.options | options)


def resources(variant: Variant, kernel: Any) -> dict[str, Any]:
    """The record of `report` for one compiled variant, without its name and target."""
    listing = _cuobjdump(kernel.asm["cubin"], "-res-usage", "-sass")
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing))
    code = re.findall(OPERATION, listing, re.MULTILINE)
    while code[-1] in ("NOP", "BRA"):  # padding after the end of the code
        code.pop()
    per_thread = variant.elements / (32 * kernel.metadata.num_warps)
    wide = {op: 16 * sum(name.startswith(f"{op}.E.128") for name in code) / per_thread for op in ("LDG", "STG")}
    return {
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared_bytes": kernel.metadata.shared,
        "load_bytes": variant.read,
        "load_bytes_128": wide["LDG"],
        "store_bytes": variant.written,
        "store_bytes_128": wide["STG"],
        "instructions": len(code) / per_thread,
        "inexact": sorted(set(INEXACT.findall(kernel.asm["ptx"]))),
    }


def _records(capabilities: Iterable[int]) -> Iterator[dict[str, Any]]:
    for cc in capabilities:
        for variant in VARIANTS:
            yield {"kernel": variant.name, "cc": cc} | resources(variant, compile_variant(variant, cc))


def _cuobjdump(cubin: bytes, *options: str) -> str:
    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise RuntimeError("report: this Triton has no cuobjdump; set TRITON_CUOBJDUMP_PATH to CUDA's") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool, *options, path], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastddpm.kernels.report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of a table")
    parser.add_argument("--cc", type=int, nargs="+", default=CAPABILITIES, help="compute capabilities, 90 for 9.0")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(report(arguments.cc), indent=1))
        return
    print(f"{'kernel':46} cc   registers  spills  shared  16-byte loads, stores (B/element)  instr/element  inexact")
    for r in _records(arguments.cc):
        loads = f"{r['load_bytes_128']:g} of {r['load_bytes']}"
        stores = f"{r['store_bytes_128']:g} of {r['store_bytes']}"
        print(
            f"{r['kernel']:46} {r['cc']:<4} {r['registers']:9} {r['spill_bytes']:7} {r['shared_bytes']:7}"
            f"{loads:>18}, {stores:<16} {r['instructions']:13.1f}  {' '.join(r['inexact']) or 'none'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
