"""Tests on a GPU of the engine, the sampler, the U-Net and the schedulers; the kernels have their own tests."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from fastddpm import Sampler, Schedule, UNet2D, ops
from fastddpm.core import noise
from fastddpm.core.precision import PRECISIONS, Compute, arithmetic
from fastddpm.reference import diffusion
from fastddpm.reference.unet import UNet
from fastddpm.sampling.capture import CaptureError
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.replay import Replay
from fastddpm.sampling.runner import Runner
from tests.conftest import needs_gpu
from tests.support import check, predict_step

pytestmark = needs_gpu
CONFIG = {**check.TINY, "block_out_channels": (32, 64), "norm_num_groups": 8}
RUNS = [
    {"steps": 1},
    {"steps": 20},
    {"steps": 33, "seed": 9},
    {"steps": 17, "sampler": "ddim", "eta": 0.5},
    {"steps": 20, "noise": False},
]
ENGINES = ["eager", "graph"]
LAYOUTS = {"heads of 8": CONFIG, "large images": {**CONFIG, "sample_size": 128, "attention_head_dim": 64}}
LAYOUTS |= {
    f"heads of {width}": {**CONFIG, "block_out_channels": (32, width), "attention_head_dim": None}
    for width in (64, 256, 512)
}


def tiny_unet(**options):
    torch.manual_seed(0)
    return UNet2D(**CONFIG, **options).eval()


def elementwise(x, t):
    return (x * 0.9 + t.reshape(-1, *[1] * (x.ndim - 1)) * 1e-4).sin()


def samplers(model, **options):
    return [Sampler(model, device="cuda", engine=engine, **options) for engine in ENGINES]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (2, 9), (5,)])
@pytest.mark.parametrize("settings", [{}, {"sampler": "ddim", "eta": 0.5}], ids=str)
def test_cpu_and_gpu_sample_the_same_bits(shape, settings, engine):
    """If the network rounds the same on both, everything else does, too."""
    model = lambda x, t: x * 0.75
    cpu, gpu = (
        Sampler(model, shape=shape, device=device, engine=kind).sample(5, seed=2, steps=20, progress=False, **settings)
        for device, kind in (("cpu", "eager"), ("cuda", engine))
    )
    assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_graph_serves_every_step_of_every_run(precision, monkeypatch):
    captured, capture = [], Replay._captured
    monkeypatch.setattr(Replay, "_captured", lambda replay, run: captured.append(replay) or capture(replay, run))
    eager, graph = samplers(tiny_unet(), precision=precision)
    for settings in RUNS:
        settings = {"samples": [0, 2**40, 5], "progress": False, **settings}
        assert torch.equal(graph.sample(**settings), eager.sample(**settings)), settings
    assert len(captured) == 1


def test_class_labels_are_read_in_the_graph():
    eager, graph = samplers(tiny_unet(num_class_embeds=5))
    for labels in ([0, 1], [4, 4]):
        settings = {"class_labels": labels, "steps": 20, "progress": False}
        assert torch.equal(graph.sample(2, **settings), eager.sample(2, **settings))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, torch says
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_neither_wait_nor_allocate(precision, monkeypatch):
    """From the first step of a run to the last, including the checks for NaN and infinity."""
    sampler = Sampler(tiny_unet(), device="cuda", engine="graph", precision=precision)
    settings = {"steps": 50, "progress": False}
    want = sampler.sample(4, **settings)
    allocations = lambda: torch.cuda.memory_stats()["allocation.all.allocated"]
    step, counts = Runner.step, []

    def watched(runner):
        torch.cuda.set_sync_debug_mode("error")
        counts.append(allocations())
        step(runner)
        counts.append(allocations())
        if len(counts) == 100:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Runner, "step", watched)
    try:
        got = sampler.sample(4, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    assert len(counts) == 100
    assert len(set(counts)) == 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_waiting_is_an_error():
    """The test above relies on this."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_unet_is_as_accurate_as_plain_torch(layout, precision):
    dtype, config = PRECISIONS[precision], LAYOUTS[layout]
    torch.manual_seed(0)
    net, plain, ref = UNet2D(**config).eval(), UNet(**config).eval(), UNet(**config).eval().double().cuda()
    plain.load_state_dict(net.state_dict())
    ref.load_state_dict(net.state_dict())
    side = config["sample_size"]
    x, t = torch.randn(2, 3, side, side, device="cuda"), torch.tensor([300], device="cuda")
    fast = net.for_inference(dtype, "cuda")
    with arithmetic("fp32", x.device):
        rows = fast.time_rows(t)
    with arithmetic(precision, x.device):
        ours = fast.denoise(x.to(dtype), rows)
        theirs = plain.to("cuda", dtype)(x.to(dtype), t.expand(2))
    check.assert_as_accurate(ours, theirs, ref(x.to(dtype).double(), t.expand(2)))


def test_graph_of_large_images_has_the_eager_bits():
    """Each norm of such an image takes several programs and two launches."""
    torch.manual_seed(0)
    eager, graph = samplers(UNet2D(**LAYOUTS["large images"]).eval(), precision="bf16")
    settings = {"steps": 20, "progress": False}
    assert torch.equal(graph.sample(2, **settings), eager.sample(2, **settings))


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_whole_run_is_as_accurate_as_plain_torch(precision):
    """Against the reference U-Net in the same loop; the state and the update are float32 in both."""
    dtype, settings = PRECISIONS[precision], {"steps": 50, "progress": False}
    net = tiny_unet()

    def loop(kind):
        model = UNet(**CONFIG).eval()
        model.load_state_dict(net.state_dict())
        model.to("cuda", kind)

        def call(x, t):
            with arithmetic(precision, x.device):
                return model(x.to(kind), t)

        return Sampler(call, shape=(3, 16, 16), device="cuda", engine="eager").sample(8, **settings).double()

    exact, plain = loop(torch.float64), loop(dtype)
    ours = Sampler(net, device="cuda", precision=precision).sample(8, **settings).double()
    assert check.root_mean_square(ours - exact) <= 2 * check.root_mean_square(plain - exact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compiled", "compiled+graph"])
def test_compiled_is_the_same_function(kind):
    """As accurate as the eager engine."""
    net, exact = tiny_unet(), UNet(**CONFIG).eval().double().cuda()
    exact.load_state_dict(net.state_dict())
    outputs = {}
    for engine in ("eager", kind):
        sampler = Sampler(net, device="cuda", engine=engine)
        with sampler.engine.runner(2, capture=sampler.engine.captures(20)) as runner:
            runner.load(Schedule().table(20), noise.address(0, 2))
            runner.start()
            low = runner.network.input.clone()
            outputs[engine] = runner.predict().clone()
        assert sampler.sample(2, steps=20, progress=False).isfinite().all()
    with torch.no_grad():
        ref = exact(low.double(), torch.full((2,), 950, device="cuda"))
    check.assert_as_accurate(outputs[kind], outputs["eager"], ref)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_weights_changed_in_place_are_used_by_the_next_run(place, precision):
    net = tiny_unet().to(place)
    sampler, settings = (
        Sampler(net, device="cuda", engine="graph", precision=precision),
        {"steps": 20, "progress": False},
    )
    first = sampler.sample(2, **settings)
    for change in (lambda p: p.mul_(1.5), lambda p: p.data.mul_(0.5)):
        for parameter in net.parameters():
            with torch.no_grad():
                change(parameter)
        now = sampler.sample(2, **settings)
        assert torch.equal(now, Sampler(net, device="cuda", engine="eager", precision=precision).sample(2, **settings))
        assert not torch.equal(now, first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_does_not_move_the_model(precision):
    net = tiny_unet()
    x = Sampler(net, device="cuda", precision=precision).sample(2, steps=5, progress=False)
    assert x.device.type == "cpu"
    assert x.isfinite().all()
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_and_samplers_do_not_disturb_each_other(engine):
    fp32, tf32 = (Sampler(tiny_unet(), device="cuda", engine=engine, precision=p) for p in ("fp32", "tf32"))
    own = Sampler(elementwise, shape=(3, 4), device="cuda", engine=engine)
    jobs = [(fp32, 0), (fp32, 1), (own, 2), (tf32, 3)]
    settings = {"steps": 40, "batch_size": 2, "progress": False}
    want = [sampler.sample(4, seed=seed, **settings) for sampler, seed in jobs]
    for sampler, _ in jobs:
        sampler.engine.clear()  # so that they capture beside each other
    got = check.at_once(*(partial(sampler.sample, 4, seed=seed, **settings) for sampler, seed in jobs))
    for results, x in zip(got, want, strict=True):
        assert all(torch.equal(result, x) for result in results)


@pytest.fixture
def invalidated_captures(monkeypatch):
    """invalidated_captures(n): synchronize the device during the first n captures, which makes them fail."""

    def arrange(times):
        work, left = Runner._predict_and_update, [times]

        def invalidating_work(runner, network):
            work(runner, network)
            if left[0] and torch.cuda.is_current_stream_capturing():
                left[0] -= 1
                torch.cuda.synchronize()

        monkeypatch.setattr(Runner, "_predict_and_update", invalidating_work)

    return arrange


@pytest.mark.parametrize("failures", [1, 2])
def test_failed_capture_changes_no_bit_and_leaves_torch_usable(failures, invalidated_captures):
    settings = {"steps": 20, "progress": False}
    want = Sampler(tiny_unet(), device="cuda", engine="eager").sample(2, **settings)
    invalidated_captures(failures)
    sampler = Sampler(tiny_unet(), device="cuda")
    with pytest.warns(UserWarning, match="now run eagerly") if failures == 2 else nullcontext():
        assert torch.equal(sampler.sample(2, **settings), want)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(4, device="cuda").isfinite().all()
    assert sampler.engine.clear()
    assert torch.equal(sampler.sample(2, **settings), want)
    assert next(iter(sampler.engine._idle.values())).network.replay.graph is not None


def test_engine_graph_says_why_a_capture_failed(invalidated_captures):
    invalidated_captures(1)
    sampler, settings = Sampler(tiny_unet(), device="cuda", engine="graph"), {"steps": 20, "progress": False}
    with pytest.raises(CaptureError, match=r"could not be captured as a CUDA graph \(.*captur"):
        sampler.sample(2, **settings)
    assert sampler.sample(2, **settings).isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_has_its_own_cublas_workspace(precision):
    """The second graph must not use the workspace of the first, which is freed: by torch.compile, and with that graph.

    Without clearing, the second capture would find the workspace that the first one has left on their stream.
    """
    first, second = (Sampler(tiny_unet(), device="cuda", engine="graph", precision=precision) for _ in range(2))
    want = [sampler.sample(2, steps=20, progress=False) for sampler in (first, second)]
    product = torch.compile(lambda a: (a @ a.mT) @ a, mode="reduce-overhead")
    a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):  # warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        assert product(a).isfinite().all()
    assert torch.equal(first.sample(2, steps=20, progress=False), want[0])
    del first
    torch.cuda.empty_cache()
    taken = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]  # 256 MiB: reuses all that was freed
    assert torch.equal(second.sample(2, steps=20, progress=False), want[1])
    assert all(bool((part == 7).all()) for part in taken)


def test_polyphase_weights_are_not_rounded_to_tf32(monkeypatch):
    """Whatever the settings of the process: they are sums of weights, computed by a matrix product."""
    monkeypatch.setattr("fastddpm.networks.unet2d.POLYPHASE_DEVICES", ("cuda",))
    before, weights = torch.get_float32_matmul_precision(), {}
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            engine = Engine(tiny_unet().cuda(), (3, 16, 16), 100, Compute.resolve("cuda", "fp32"), "eager")
            with engine.network(1, capture=False):
                weights[setting] = [p.clone() for name, p in engine.prepared.net.named_parameters() if "phases" in name]
    finally:
        torch.set_float32_matmul_precision(before)
    assert weights["high"]
    assert all(torch.equal(*pair) for pair in zip(weights["high"], weights["highest"], strict=True))


def test_more_graphs_than_torch_has_streams_replay_during_captures():
    settings = {"steps": 20, "progress": False}
    many = [Sampler(elementwise, shape=(3,), device="cuda", engine="graph") for _ in range(40)]
    want = [sampler.sample(2, seed=seed, **settings) for seed, sampler in enumerate(many)]

    def replays():
        with torch.cuda.stream(torch.cuda.Stream()):
            return [sampler.sample(2, seed=seed, **settings) for seed, sampler in enumerate(many)]

    def captures():
        fresh = Sampler(elementwise, shape=(3,), device="cuda", engine="graph")
        return [fresh.sample(2, **settings)]

    replayed, captured = check.at_once(replays, captures)
    assert all(torch.equal(*pair) for results in replayed for pair in zip(results, want, strict=True))
    assert all(torch.equal(results[0], want[0]) for results in captured)


@pytest.mark.parametrize("kind", ENGINES)
def test_network_runs_on_the_current_stream(kind):
    """One network, used on several streams in turn, while memory freed on them is at once overwritten with NaN."""
    engine = Engine(tiny_unet(), (3, 16, 16), 100, Compute.resolve("cuda", "fp32"), kind)
    inputs = [torch.randn(2, 3, 16, 16, device="cuda") for _ in range(6)]
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()] * 2

    def run(wait):
        outputs = []
        with engine.network(2, capture=engine.captures(100)) as network:
            network.prepare(torch.arange(100))
            for x, stream in zip(inputs, streams, strict=True):
                with torch.cuda.stream(stream), network.working():
                    outputs.append(network(x, 5).mul_(2))
                    torch.full_like(x, math.nan)
                if wait:
                    torch.cuda.synchronize()
        torch.cuda.synchronize()
        return outputs

    for ours, want in zip(run(wait=False), run(wait=True), strict=True):
        assert torch.equal(ours, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_invariant_samples_have_the_same_bits(precision, engine):
    sampler = Sampler(tiny_unet(), device="cuda", precision=precision, engine=engine, batch_invariant=8)
    settings = {"seed": 3, "steps": 20, "progress": False}
    alone = {sample: sampler.sample([sample], **settings)[0] for sample in (0, 1, 5, 8, 2**40 + 2)}
    for asked in ([0, 1, 5], [5, 1, 0, 8], [2**40 + 2, 8, 0], range(9)):
        x = sampler.sample(asked, **settings)
        for place, sample in enumerate(asked):
            assert sample not in alone or torch.equal(x[place], alone[sample])


def test_network_that_waits_cannot_be_captured():
    model = lambda x, t: x * (0.5 if t[0].item() > 500 else 0.25)
    with pytest.raises(ValueError, match=r"cannot be captured .*use engine='eager'") as caught:
        Sampler(model, shape=(3,), device="cuda", engine="graph").sample(2, steps=20, progress=False)
    assert "\n" not in str(caught.value)
    x = Sampler(elementwise, shape=(3,), device="cuda", engine="graph").sample(2, steps=20, progress=False)
    assert torch.equal(x, Sampler(elementwise, shape=(3,), device="cuda").sample(2, steps=20, progress=False))


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_is_halved_when_memory_runs_out(engine):
    """48 samples, each of which needs a twentieth of the memory."""
    share = torch.cuda.get_device_properties(0).total_memory // 20

    def hungry(x, t):
        taken = torch.empty(len(x) * share, dtype=torch.uint8, device=x.device)
        return elementwise(x, t) + 0 * taken[:1].float()

    sampler, settings = Sampler(hungry, shape=(2,), device="cuda", engine=engine), {"steps": 17, "progress": False}
    with pytest.warns(UserWarning, match="out of memory; continuing with batches of") as warned:
        got = sampler.sample(48, batch_size=48, **settings)
    assert [str(w.message).partition(".")[0].split()[-2] for w in warned] == ["24", "12"]
    assert torch.equal(got, Sampler(elementwise, shape=(2,), device="cuda").sample(48, **settings))


@pytest.mark.parametrize("engine", ENGINES)
def test_first_bad_step_is_named(engine):
    """Although the flag is read only every few steps."""

    def model(x, t):
        bad = (t[:, None] < 500) & (torch.arange(len(x), device=x.device)[:, None] == 1)
        return torch.where(bad, math.nan, x * 0.5)

    sampler = Sampler(model, shape=(3,), device="cuda", engine=engine)
    with pytest.raises(ValueError, match=r"^step 501 of 1000 \(t = 499\): .* for samples \[8\]"):
        sampler.sample([7, 8, 9], progress=False)


def test_progress_bar_is_full_at_the_end(capsys):
    Sampler(tiny_unet(), device="cuda").sample(3, steps=37, batch_size=2)
    assert "74/74" in capsys.readouterr().err


def test_noise_has_the_same_bits():
    address = noise.address(2**64 - 1, [0, 5, 2**40])
    for shape in ((3, 5, 7), (4, 9), (5,)):
        cpu = noise.normal(address, shape, stream=noise.START, t=1000)
        assert torch.equal(cpu, noise.normal(address.cuda(), shape, stream=noise.START, t=1000).cpu())


def without_waiting(function):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("sampler", predict_step.SAMPLERS)
@pytest.mark.parametrize("predicts", predict_step.PREDICTS)
def test_predict_step_of_many_blocks_equals_the_reference(predicts, sampler, dtype):
    x, m, _, z = predict_step.inputs((33, 3, 65, 63), (torch.float32, dtype, dtype, dtype))
    settings, address = {"predicts": predicts, "sampler": sampler, "clip": 1.0}, noise.address(7, 33)
    for at in (2, 12, 20):
        for source in ({"z": z}, {"address": address}, {}):
            got = predict_step.run("cuda", x, m, predict_step.ROWS, at, **settings, **source)
            predict_step.assert_same_bits(
                got, predict_step.specified(x, m, predict_step.ROWS, at, **settings, **source)
            )


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("at", [2, 12, 20])
def test_predict_step_of_a_learned_range_is_as_accurate_as_plain_torch(at, dtype):
    x, m, v, z = (a.cuda() for a in predict_step.inputs((8, 3, 64, 64), (dtype,) * 4))
    rows = predict_step.ROWS.cuda()
    settings = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, "learned": "learned_range", "v": v - 1, "z": z}
    ours = ops.predict_step(x, m, rows, at, **settings)[0]
    plain = diffusion.predict_step(x, m, rows[at].to(dtype), **settings)[0]
    check.assert_as_accurate(ours, plain, predict_step.as_float64(x, m, rows, at, **settings))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("source", predict_step.NOISES)
@pytest.mark.parametrize("place", ["host", "device"])
def test_predict_step_does_not_wait(place, source):
    """Not even the first call of a kind, which compiles the kernel."""
    x, m, v, z = (predict_step.channels_last(a) for a in predict_step.inputs((2, 3, 17, 16)))
    settings = {"predicts": "v_prediction", "sampler": "ddim", "learned": "learned"}
    there, rows = [a.cuda() for a in (x, m, v)], predict_step.ROWS.cuda()
    drawn = {name: a.cuda() for name, a in predict_step.noises(source, z).items()}
    places = (1, 7, 16, 20)
    ats = places if place == "host" else torch.tensor(places, device="cuda").unbind()
    steps = lambda: [ops.predict_step(*there[:2], rows, at, v=there[2], **settings, **drawn) for at in ats]
    for at, got in zip(places, without_waiting(steps), strict=True):
        want = predict_step.specified(x, m, predict_step.ROWS, at, v=v, **settings, **predict_step.noises(source, z))
        predict_step.assert_same_bits(got, want)


def test_captured_predict_step_reads_device_memory():
    x, m, _, _ = predict_step.inputs((2, 3, 16, 16))
    address, settings = noise.address(7, 2), {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0}
    state, output, rows, where = (a.cuda() for a in (x, m, predict_step.ROWS, address))
    at = torch.tensor(20, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.predict_step(state, output, rows, at, address=where, **settings)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_prev, x_0 = ops.predict_step(state, output, rows, at, address=where, **settings)
    for row in (20, 12, 2, 1):
        at.fill_(row)
        graph.replay()
        want = predict_step.specified(x, m, predict_step.ROWS, row, address=address, **settings)
        predict_step.assert_same_bits((x_prev, x_0), want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize(("name", "settings"), [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 0.5})])
def test_scheduler_does_not_wait_and_steps_as_on_a_cpu(name, settings, place):
    """After the first step, which reads timesteps that are on the GPU."""
    pytest.importorskip("diffusers")
    from fastddpm import diffusers

    def stepped(device, place):
        scheduler = getattr(diffusers, name)(noise=5)
        scheduler.set_timesteps(20, device=place)
        first, *others = scheduler.timesteps
        x = predict_step.inputs((2, 3, 8, 8))[0].to(device)
        x = scheduler.step(x * 0.75, first, x, **settings).prev_sample

        def rest(x):
            for t in others:
                x = scheduler.step(x * 0.75, t, x, **settings).prev_sample
            return x

        return without_waiting(lambda: rest(x)) if device == "cuda" else rest(x)

    assert torch.equal(stepped("cuda", place).cpu(), stepped("cpu", "cpu"))


def pipeline():
    pytest.importorskip("diffusers")
    from fastddpm.diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    pipe = DDPMPipeline(UNet2DModel(**CONFIG).eval(), DDPMScheduler()).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_draws_the_same_images_from_a_graph(dtype, place, monkeypatch):
    pipe = pipeline().to(dtype)
    images = []
    for worth in (1, 1000):
        monkeypatch.setattr("fastddpm.sampling.engine.WORTH_CAPTURING", worth)
        images.append(pipe(2, torch.Generator(place).manual_seed(3), 20, output_type="pt").images)
    assert torch.equal(*images)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("source", [{"noise": 7}, {"generator": "cpu"}, {"generator": "cuda"}], ids=str)
def test_steps_of_a_pipeline_do_not_wait(source):
    pipe, seen = pipeline(), []

    def watch(pipe, i, t, tensors):
        seen.append(i)
        torch.cuda.set_sync_debug_mode("error" if i < 18 else "default")

    if "generator" in source:
        source = {"generator": torch.Generator(source["generator"]).manual_seed(3)}
    try:
        pipe(2, num_inference_steps=20, output_type="pt", callback_on_step_end=watch, **source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == list(range(20))


def test_pipeline_uses_the_current_weights():
    pipe = pipeline()
    draw = lambda: pipe(2, torch.Generator().manual_seed(3), 20, output_type="pt").images
    before = draw()
    assert torch.equal(draw(), before)
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.1)
    assert not torch.equal(draw(), before)
