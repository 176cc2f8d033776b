"""The benchmarks run and measure what they claim: all of them at a tiny size, their gates with damaged results."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm import ops
from fastddpm.core import layout
from fastddpm.reference.unet import UNet
from fastddpm.train.trainer import Trainer
from tests.conftest import needs_gpu
from tests.support.check import TINY

pytest.importorskip("pytest_benchmark")  # bench needs it

from bench import (
    conftest,
    contenders,
    kinds,
    layouts,
    machine,
    records,
    test_kernels,
    test_memory,
    test_races,
    test_sampling,
    test_start,
    test_training,
    test_unet,
)  # fmt: skip
from bench.traffic import Bytes

CASES = (test_kernels, test_memory, test_races, test_sampling, test_start, test_training, test_unet)
ROOT = Path(__file__).parents[2]
NORM = layouts.Norm((8, 5, 7), (4, 5, 7), groups=2, eps=1e-5, add=True, act="silu")
LARGE = layouts.Norm((8, 48, 48), None, groups=2, eps=1e-5, add=False, act=None)
KINDS = {
    # cuDNN
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1"
    "_execute_segment_k_off_kernel__5x_cudnn": "convolution, matmul",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64_64x3_nhwc_align8>("
    "cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64_64x3_nhwc_align8::Params)": "convolution, matmul",
    "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>": "convolution, matmul",
    "void cudnn::winograd_nonfused::winogradForwardOutput4x4<float, float>": "convolution, matmul",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "attention",
    "void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>": "copies, other",
    "void cudnn::ops::nhwcToNchwKernel<__half, __half, float, true, false>": "copies, other",
    # cuBLAS
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "convolution, matmul",
    "ampere_sgemm_128x64_tn": "convolution, matmul",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float>": "convolution, matmul",
    "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, float, false>": "convolution, matmul",
    # ATen
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<256, 64, 64, 4>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": "attention",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>": "attention",
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(long, float)": "norm, SiLU",
    "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<c10::BFloat16, float>": "norm, SiLU",
    "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel(at::"
    "TensorIteratorBase&)::{lambda()#1}>": "norm, SiLU",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<unsigned short, unsigned int, 4>": "copies, other",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": "copies, other",
    "void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16>": "copies, other",
    "Memcpy DtoD (Device -> Device)": "copies, other",
    "Memset (Device)": "copies, other",
    # Inductor
    "triton_red_fused_native_group_norm_15": "norm, SiLU",
    "triton_poi_fused_convolution_native_group_norm_silu_3": "norm, SiLU",
    "triton_poi_fused_add_convolution_2": "copies, other",
    "triton_tem_fused_convolution_5": "convolution, matmul",
    "triton_tem_fused__to_copy_addmm_gelu_t_view_9": "convolution, matmul",
    # operators of a CPU
    "fastddpm::step": "update",
    "fastddpm::group_norm": "norm, SiLU",
    "fastddpm::residual": "copies, other",
    "fastddpm::interleave": "copies, other",
    "interleave_kernel": "copies, other",
    "mkldnn::_convolution_pointwise": "convolution, matmul",
    "aten::mkldnn_convolution": "convolution, matmul",
    "aten::addmm": "convolution, matmul",
    "aten::mm": "convolution, matmul",
    "aten::native_group_norm": "norm, SiLU",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::index_select": "copies, other",
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """bench selects the device when it is imported; its parts are tested on the CPU of any machine."""
    for module in (machine, contenders, layouts, kinds, *CASES):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"), raising=False)  # not all ask for it
    monkeypatch.setattr(layouts, "LAYOUTS", {"tiny": TINY})
    caches = (
        layouts.network,
        layouts.traffic,
        layouts.flops,
        contenders.expected,
        contenders._exact,
        test_training.expected,
        test_training.exact,
    )
    for cached in caches:
        cached.cache_clear()


def bench(*options, device="cpu", **environment):
    """Run pytest bench at a tiny size, without compiling."""
    code = "import pytest, sys, torch; torch.compile = lambda f, **options: f; sys.exit(pytest.main(sys.argv[1:]))"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET", "COMMIT", "BENCH"))}
    kept |= {"BENCH_TINY": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}) | environment
    run = [sys.executable, "-c", code, "bench", "--benchmark-min-rounds=3", "--benchmark-max-time=0", *options]
    return subprocess.run(run, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_every_benchmark_runs_at_a_tiny_size(device, tmp_path):
    done = bench(f"--records={tmp_path}", f"--benchmark-json={tmp_path / 'latest.json'}", device=device, COMMIT="abc")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.read([tmp_path])
    assert {(record["outcome"], record["commit"], record["scale"]) for record in found if not record["reason"]} == {
        ("passed", "abc", "tiny")
    }
    ran = {record["case"].partition("::")[2] for record in found if record["outcome"] == "passed"}
    defined = {name for module in CASES for name in vars(module) if name.startswith("test_")}
    assert defined - ran == ({"test_launches"} if device == "cpu" else set())
    for record in found:
        assert record["outcome"] == "skipped" or record["name"] in done.stdout, "each is printed"
        assert record["outcome"] == "skipped" or bool(record["samples_s"]) == ("memory" not in record["case"])
    about, theirs = found[0], json.loads((tmp_path / "latest.json").read_text())
    assert about["ceilings"].keys() >= {"copy", "fp32", "bf16", "fp16"}
    assert about["machine"].keys() >= {"gpu", "driver", "cpu", "python", "triton", "cuda", "cudnn", "diffusers"}
    assert about["machine"]["torch"] == torch.__version__
    assert theirs["commit_info"]["id"] == "abc"
    assert {record["name"] for record in theirs["benchmarks"]} <= {record["name"] for record in found}
    groups = Counter(record["group"] for record in found if record["group"])
    assert all(count > 1 for group, count in groups.items() if group.endswith("fp32") or "cifar10-32" in group)


@pytest.mark.slow
def test_second_run_writes_another_file(tmp_path):
    first, second = (
        (bench(f"--records={tmp_path}", "-k", "noising and uint8"), sorted(tmp_path.rglob("*.jsonl"))) for _ in range(2)
    )
    before = {path: path.read_bytes() for path in first[1]}
    assert second[1] != first[1]
    assert {path: path.read_bytes() for path in first[1]} == before


@pytest.mark.slow
def test_wrong_result_is_recorded_without_a_time(tmp_path):
    """The kernel errs by a bit: the case fails, and the run continues."""
    plugin = tmp_path / "damage.py"
    plugin.write_text(
        "from fastddpm import ops\n"
        "right = ops.noising\n"
        "def noising(*args, **options):\n"
        "    y = right(*args, **options)\n"
        "    y.view(dtype=__import__('torch').int16)[0, 0, 0, 0] ^= 1\n"
        "    return y\n"
        "ops.noising = noising\n"
    )
    select = ["-k", "noising and uint8 and (fastddpm or reference) and not hot"]
    done = bench(f"--records={tmp_path}", "-p", "damage", *select, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    ours, reference = sorted(records.read([tmp_path]), key=lambda record: record["outcome"])
    assert ours["outcome"] == "failed"
    assert ours["reason"].startswith("1 of 840 elements differ")
    assert ours["samples_s"] == []
    assert ours["contender"] is None
    assert reference["outcome"] == "passed"
    assert len(reference["samples_s"]) == 3


@pytest.mark.slow
def test_two_builds_are_measured_in_turns(tmp_path):
    """Only our own cases, at their real size: the tiny one lacks some."""
    compare = [sys.executable, "-m", "bench.compare", ".", ".", "--launches=1", f"--keep={tmp_path / 'kept'}", "--json"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET", "COMMIT", "BENCH"))}
    run = [*compare, "--select", "hot and (step or noising)", "--", "--benchmark-max-time=0"]
    done = subprocess.run(run, cwd=ROOT, env=kept | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # a busy machine may make one of them slower
    cases = {case["case"]: case["samples"] for case in json.loads(done.stdout)["cases"]}
    assert len(cases) >= 3
    assert all("fastddpm" in case for case in cases)
    assert set(map(tuple, cases.values())) == {(10, 10)}


@pytest.mark.slow
def test_options_of_pytest_benchmark_apply(tmp_path):
    select = "-k", "noising and fastddpm and uint8 and not hot"
    assert bench(f"--records={tmp_path}", *select, "--benchmark-min-rounds=7").returncode == 0
    assert [len(record["samples_s"]) for record in records.read([tmp_path])] == [7]
    done = bench(f"--records={tmp_path / 'off'}", *select, "--benchmark-disable")
    assert done.returncode == 0, done.stdout
    assert [record["samples_s"] for record in records.read([tmp_path / "off"])] == [[]]


def test_no_case_starts_after_the_time_limit():
    def begins(after, seconds, *marks):
        config = SimpleNamespace(stash={conftest.BEGAN: time.monotonic() - after}, getoption={"seconds": seconds}.get)
        item = SimpleNamespace(name="a case", config=config, get_closest_marker=lambda name: name in marks)
        try:
            conftest.pytest_runtest_setup(item)
        except pytest.skip.Exception:
            return False
        return True

    assert begins(10, 20)
    assert not begins(10, 5)
    assert begins(100, 400, "compiled")
    assert not begins(200, 400, "compiled")


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_a_kernel(name):
    assert (kinds.kind(name) or kinds.OTHER) == KINDS[name]


@pytest.mark.parametrize(
    ("module", "kind"), [("group_norm", "norm, SiLU"), ("residual", "copies, other"), ("step", "update")]
)
def test_kinds_of_the_kernels_of_the_package(module, kind):
    names = [name for name in vars(import_module(f"fastddpm.kernels.{module}")) if name.endswith("_kernel")]
    assert names
    assert {kinds.kind(name) for name in names} == {kind}


def test_operator_has_the_kind_of_its_caller():
    x = layout.channels_last(torch.randn(2, 8, 16, 16))
    norm = nn.GroupNorm(2, 8)

    def run():
        y = norm(x)
        torch.mm(y.reshape(-1, 16), torch.ones(16, 16)).neg()

    found = kinds.microseconds(run)
    assert found["norm, SiLU"].keys() >= {"aten::group_norm", "aten::native_group_norm", "aten::empty"}
    assert "aten::mm" in found["convolution, matmul"]
    assert "aten::neg" in found[kinds.OTHER]
    assert not found["update"]
    assert all(time >= 0 for names in found.values() for time in names.values())


def test_repeated_makes_n_calls():
    calls = []
    run, n = machine.repeated(lambda: calls.append(time.sleep(0.001)), seconds=0.01)
    calls.clear()
    run()
    assert len(calls) == n
    assert 1 < n <= 10


def test_race_sorts_by_time():
    times = machine.race({"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}, rounds=3)
    assert list(times) == ["fast", "slow"]
    assert times["fast"] >= 0.001
    assert times["slow"] >= 0.004


def test_peak_bytes_are_those_allocated_at_one_time():
    x = torch.ones(1 << 18)
    assert machine.peak_bytes(lambda: x * x + x) == 2 * x.nbytes
    assert machine.peak_bytes(lambda: (x * x).mul_(x) * x) == 2 * x.nbytes
    assert machine.peak_bytes(lambda: None) == 0


def test_flops_are_those_of_the_plain_network():
    """Without the part that depends on t alone: a linear layer is two operations per weight."""
    with torch.device("meta"):
        plain, t = UNet(**TINY), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            plain(torch.empty(1, 3, 16, 16), t)
    linear = [module for name, module in plain.named_modules() if "time_emb" in name and isinstance(module, nn.Linear)]
    assert len(linear) > 2
    assert layouts.flops("tiny") == counter.get_total_flops() - sum(2 * layer.weight.numel() for layer in linear)


def test_flops_of_the_public_layouts(monkeypatch):
    """In GFLOP per image: 12.1 without attention's products, which are 0.34; and 497."""
    monkeypatch.setattr(layouts, "LAYOUTS", {"cifar10-32": layouts.CIFAR10, "celebahq-256": layouts.CELEBAHQ})
    assert round(layouts.flops("cifar10-32") / 1e9, 2) == 12.44
    assert round(layouts.flops("celebahq-256") / 1e9) == 497


def test_norms_are_those_of_the_plain_network():
    """The plain network concatenates the skip connections."""
    plain, found = UNet(**TINY).to("meta"), Counter()
    for module in plain.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda norm, args: found.update([(tuple(args[0].shape[1:]), norm.eps)]))
    plain(torch.empty(1, 3, 16, 16, device="meta"), torch.zeros(1, device="meta"))
    ours = layouts.norms("tiny")
    joined = Counter()
    for norm, count in ours.items():
        joined[(norm.shape[0] + (norm.skip or (0,))[0], *norm.shape[1:]), norm.eps] += count
    assert joined == found
    assert sum(count for norm, count in ours.items() if norm.skip) == 4
    assert sum(count for norm, count in ours.items() if norm.add) == len(layouts.network("tiny").resnets)
    assert sum(count for norm, count in ours.items() if not norm.act) == 4  # attention's


# No timing of a wrong result


@pytest.mark.parametrize("damage", [lambda y: y + 0.02, lambda y: y * 1.05, lambda y: y.fill_(torch.nan)])
def test_wrong_norm_is_not_timed(damage):
    torch.manual_seed(0)
    problem = test_races.NormProblem(NORM, 2)
    contenders = {"ours": problem.ours, "plain": problem.plain(), "damaged": lambda: damage(problem.ours())}
    right, wrong = machine.right(contenders, problem.check())
    assert list(right) == ["ours", "plain"]
    assert "error is" in wrong["damaged"]


@pytest.mark.parametrize("problem", [test_kernels.step_problem, test_kernels.noising_problem])
def test_wrong_bit_is_not_timed(problem, monkeypatch):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if problem is test_kernels.step_problem else torch.uint8
    found = problem((2, 3, 5, 7), dtype)
    assert found.bytes_moved == 2 * 105 * (12 if dtype == torch.bfloat16 else 3)
    assert found.errors == {"bits": "equal"}
    found.call()
    op, bits = ("step", torch.int32) if dtype == torch.bfloat16 else ("noising", torch.int16)
    right = getattr(ops, op)

    def wrong(x, *args, **options):
        y = right(x, *args, **options)
        (x if op == "step" else y).view(bits)[0, 0, 0, 0] ^= 1
        return y

    monkeypatch.setattr(ops, op, wrong)
    with pytest.raises(AssertionError, match="1 of 210 elements differ"):
        problem((2, 3, 5, 7), dtype)


@pytest.mark.parametrize("damage", ["noising", "eps_loss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wrong_bit_of_training_is_not_timed(dtype, damage, monkeypatch):
    torch.manual_seed(0)
    shape, right = (2, 3, 5, 7), getattr(ops, damage)
    assert test_kernels.training_problem(shape, dtype).errors == {"bits": "equal"}

    def wrong(x, *args, **options):
        y = right(x, *args, **options)
        bits = y.data.view({2: torch.int16, 4: torch.int32}[y.itemsize])
        bits[(0,) * y.ndim] ^= 1
        return y

    monkeypatch.setattr(ops, damage, wrong)
    with pytest.raises(AssertionError, match=r"1 of (210|2) elements differ"):
        test_kernels.training_problem(shape, dtype)


@pytest.mark.parametrize("problem", [test_kernels.loss_problem, test_kernels.training_problem])
def test_wrong_gradient_is_not_timed(problem, monkeypatch):
    torch.manual_seed(0)
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: [1.01 * right(*args)[0]])
    for who, message in (("fastddpm", "elements differ"), ("reference", "error is")):
        with pytest.raises(AssertionError, match=message):
            problem((2, 3, 5, 7), torch.float32, who)


def test_bytes_counts_inputs_and_outputs():
    x = torch.ones(1000)
    with Bytes() as count:
        (x.view(10, 100) * 2).sum()
        torch.randn_like(x)
    assert count.moved == 4000 + 4000 + 4000 + 4 + 4000


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 9), (torch.float32, 17)])
def test_training_moves_a_third_of_the_bytes_of_eager_torch(dtype, least):
    """Per element: what the kernels' docstrings say, and what is counted in eager torch."""
    ours, theirs = (test_kernels.training_problem((8, 3, 64, 64), dtype, who) for who in ("fastddpm", "reference"))
    assert ours.per_element == least
    assert ours.bytes_moved == theirs.bytes_moved == least * 8 * 3 * 64 * 64
    assert 60 < theirs.per_element < 120
    assert ours.per_element <= theirs.per_element / 3


@pytest.mark.parametrize("who", ["reference", "diffusers"])
@pytest.mark.parametrize("problem", [test_kernels.step_problem, test_kernels.noising_problem])
def test_other_implementations_do_the_same_work(problem, who):
    """The results pass the gate, and each call computes a new one."""
    pytest.importorskip("diffusers")
    found = problem((2, 3, 5, 7), torch.float32, who)
    assert found.errors["rms"]["error"] <= found.errors["rms"]["bound"]
    first, second = found.call(), found.call()
    first, second = (y[0] if isinstance(y, tuple) else y for y in (first, second))
    assert first.shape == (2, 3, 5, 7)
    assert not torch.equal(first, second), "each call draws its noise"


@pytest.mark.parametrize("name", ["fastddpm eager fp32", "fastddpm eager bf16", "reference eager fp32"])
@pytest.mark.parametrize("work", ["forward", "loop"])
def test_wrong_network_is_not_timed(name, work):
    who = contenders.contender(name)
    prepared = partial(contenders.forward, "tiny", 3) if work == "forward" else partial(contenders.loop, "tiny", 3, 2)
    with prepared(who) as ready:
        assert ready.seconds > 0
        assert ready.errors["max"]["error"] <= ready.errors["max"]["bound"]
        assert ready.run().shape == (3, 3, 16, 16)
    with torch.no_grad():  # from now on; what is expected has been computed
        layouts.network("tiny").conv_norm_out.weight.mul_(1.05)
    with pytest.raises(AssertionError, match="error is"), prepared(who):
        pytest.fail("it was handed out")


@pytest.mark.parametrize("name", ["fastddpm eager fp32", "fastddpm eager bf16", "diffusers eager fp32"])
def test_wrong_training_is_not_timed(name):
    pytest.importorskip("diffusers")
    ready = test_training.training("tiny", 4, contenders.contender(name))
    assert ready.errors["max"]["error"] <= ready.errors["max"]["bound"]
    assert ready.facts.keys() == {"prepare_s"}
    ready.step()
    with torch.no_grad():  # from now on; what is expected has been computed
        layouts.network("tiny").conv_norm_out.weight.mul_(1.05)
    with pytest.raises(AssertionError, match="error is"):
        test_training.training("tiny", 4, contenders.contender(name))


@pytest.mark.parametrize("name", ["fastddpm eager fp32", "fastddpm eager bf16", "diffusers eager fp32"])
@pytest.mark.parametrize(
    ("layer", "damage"),
    [("conv_in", lambda g: 1.05 * g), ("conv_out", lambda g: g.flip(0)), ("time_embedding.linear_1", lambda g: 0 * g)],
)
def test_wrong_gradient_of_weights_is_not_timed(name, layer, damage, monkeypatch):
    """The gradient of the network's output is right."""
    pytest.importorskip("diffusers")
    who = contenders.contender(name)
    trained = (Trainer, "wrapped_network") if who.who == "fastddpm" else (test_training, "theirs")
    right = getattr(*trained)

    def damaged(maker):
        net = right(maker)
        net.get_submodule(layer).weight.register_hook(damage)
        return net

    errors = test_training.training("tiny", 4, who).errors
    assert errors["max of weights"]["error"] <= errors["max of weights"]["bound"]
    monkeypatch.setattr(*trained, damaged)
    with pytest.raises(AssertionError, match=r"gradient of weights: .* error is"):
        test_training.training("tiny", 4, who)


def test_flops_of_training_are_those_of_both_passes(monkeypatch):
    """For every image. A thousandth is the first layer's input gradient, which is not needed, and the layers of t."""
    monkeypatch.setattr(layouts, "LAYOUTS", {"cifar10-32": layouts.CIFAR10})
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(**layouts.CIFAR10)(torch.empty(1, 3, 32, 32), torch.zeros(1)).sum().backward()
    ready = test_training.Ready(lambda: None, {"max": 0}, {"prepare_s": 1.0})
    monkeypatch.setattr(test_training, "training", lambda *asked: ready)
    calls = []
    measure = lambda run, n, **options: calls.append(options) or 0.5
    test_training.test_training(measure, "cifar10-32", 7, "fastddpm eager bf16")
    [options] = calls
    assert abs(options["flops"] / (7 * counter.get_total_flops()) - 1) <= 1e-3
    assert (options["images"], options["precision"]) == (7, "bf16")
    assert (options["errors"], options["facts"]) == (ready.errors, ready.facts)


def test_training_with_other_noise_is_not_timed(monkeypatch):
    def noising(x_0, t, address, *others, **options):
        return right(x_0, t, address + 1, *others, **options)

    right = ops.noising
    monkeypatch.setattr(ops, "noising", noising)
    with pytest.raises(AssertionError, match="error is"):
        test_training.training("tiny", 4, contenders.contender("fastddpm eager bf16"))


def test_judged_sample_is_in_every_batch():
    assert torch.equal(contenders.inputs("tiny", 1), contenders.inputs("tiny", 5)[:1])
    x = contenders.inputs("tiny", 2)
    assert torch.equal(x.bfloat16().float(), x)


# How it is timed


def test_each_set_of_inputs_is_used_once():
    used = []
    run, n = machine.rotated([partial(used.append, i) for i in range(5)], captured=True)
    assert n == 5
    used.clear()
    run()
    assert used == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_gpu_time_is_between_two_events(device, monkeypatch):
    monkeypatch.setattr(machine, "DEVICE", torch.device(device))
    x = torch.randn(1 << 20, device=device)
    run, n = machine.rotated([x.sin] * 50, captured=True)
    machine.timed(run)
    machine.empty_caches()
    assert n == 50
    assert machine.timed(run) > 0


# Kernels in the interpreter


def test_every_plan_of_the_norm_is_timed(interpreted):
    torch.manual_seed(0)
    problem = test_races.NormProblem(LARGE, 2)
    plans = test_races.plans(problem)
    assert len(plans) > 3
    assert machine.right(plans, problem.check()) == (plans, {})


@pytest.mark.slow
def test_compile_ahead_compiles_in_other_processes(monkeypatch):
    """A task that cannot be sent to another process, or fails there, raises here."""
    problems = {norm: test_races.NormProblem(norm, 1) for norm in (NORM, LARGE)}
    test_races.compile_ahead(problems, processes=1)
    monkeypatch.setattr(test_races, "plans", lambda problem: {"no such plan": problem.ours})
    with pytest.raises(KeyError, match="no such plan"):
        test_races.compile_ahead(problems, processes=1)


@pytest.mark.parametrize("kernel", ["step", "noising"])
def test_other_launches_are_timed(interpreted, monkeypatch, kernel):
    module, seen = import_module(f"fastddpm.kernels.{kernel}"), set()
    launched = getattr(module, f"{kernel}_kernel")

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (
                seen.add((options["BLOCK"], options["num_warps"])) or launched[grid](*args, **options)
            )

    monkeypatch.setattr(module, f"{kernel}_kernel", Spy())
    monkeypatch.setattr(test_races, "LAUNCHES", [(512, 1), (2048, 8)])
    own = module.BLOCK, module.OPTIONS["num_warps"]
    test_races.test_launches(lambda run, n, **facts: run(), kernel)
    assert seen == {own, (512, 1), (2048, 8)}
    assert own == (module.BLOCK, module.OPTIONS["num_warps"])
