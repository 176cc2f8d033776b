"""Engines differ only in speed. Graphs are faked: a replay repeats operations on the same memory, without Python."""

import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastddpm import Sampler, Schedule, UNet2D, ops
from fastddpm.core import layout, noise
from fastddpm.core.precision import Compute, arithmetic
from fastddpm.reference.diffusion import update
from fastddpm.reference.unet import UNet
from fastddpm.sampling.capture import CaptureError, NoWaiting, StreamOrder
from fastddpm.sampling.conditions import Conditions, InputForm
from fastddpm.sampling.engine import KEPT, WORTH_CAPTURING, Engine
from fastddpm.sampling.runner import Runner
from tests.support.check import TINY, assert_as_accurate, at_once
from tests.support.graphs import Recording, eager, graphed

SMALL = {**TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1}
SHAPE = (1, 8, 8)


def tiny_unet(**options):
    torch.manual_seed(0)
    return UNet2D(**SMALL, **options).eval()


def elementwise(x, t):
    return (x * 0.9 + t.reshape(-1, *[1] * (x.ndim - 1)) * 1e-4).sin()


RUNS = [
    {"steps": 1},
    {"steps": 5},
    {"steps": 3, "seed": 9},
    {"steps": 9, "sampler": "ddim", "eta": 0.5},
    {"timesteps": (900, 3, 0), "noise": False},
    {"steps": 5, "seed": 2**64 - 1},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_graph_serves_every_step_of_every_run(graphs, precision):
    net = tiny_unet()
    one, plain = graphed(net, precision=precision), eager(net, precision=precision)
    for settings in RUNS:
        samples = [0, 2**40, 5]
        assert torch.equal(
            one.sample(samples, progress=False, **settings), plain.sample(samples, progress=False, **settings)
        ), settings
    assert len(graphs) == 1


def test_one_graph_serves_a_network_of_another_class(graphs):
    one, plain = (make(elementwise, shape=(3, 5)) for make in (graphed, eager))
    for settings in RUNS:
        assert torch.equal(one.sample(3, progress=False, **settings), plain.sample(3, progress=False, **settings))
    assert len(graphs) == 1


def test_python_decisions_are_frozen_in_a_graph(graphs):
    """This network's choice is made at the capture only. It also shows that the tests above can fail."""

    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x, t):
            self.calls += 1
            return x * 0.1 * self.calls

    results = [make(Counting(), shape=(3,)).sample(2, steps=5, progress=False) for make in (graphed, eager)]
    assert not torch.equal(*results)


WAITING = {
    "a number": lambda x, t: x * t[0].item(),
    "a decision": lambda x, t: x * (0.5 if t[0] > 500 else 0.25),
    "a comparison": lambda x, t: x * torch.equal(x, x),
    "a shape": lambda x, t: x * len(t.nonzero()),
    "a mask": lambda x, t: x * x[x > 0].sum(),
}


@pytest.mark.parametrize("why", WAITING)
def test_network_that_waits_is_not_captured(graphs, why):
    sampler = graphed(WAITING[why], shape=(3,))
    with pytest.raises(
        ValueError, match=r"cannot be captured \(aten.* waits for the GPU\): .* use engine='eager'"
    ) as caught:
        sampler.sample(2, steps=3, progress=False)
    assert "\n" not in str(caught.value)
    assert not graphs
    assert eager(WAITING[why], shape=(3,)).sample(2, steps=3, progress=False).shape == (2, 3)


def test_network_with_table_lookups_is_captured(graphs):
    levels, mask = torch.randn(1000, 1), torch.tensor([True, False, True])
    looking = lambda x, t: torch.where(mask, x * levels[t], x) * 0.5
    one, plain = (make(looking, shape=(3,)).sample(2, steps=5, progress=False) for make in (graphed, eager))
    assert torch.equal(one, plain)
    assert len(graphs) == 1


def test_copies_from_the_host_count_as_waits():
    there = torch.empty(2, device="meta")
    with NoWaiting():
        there.copy_(there + torch.tensor(1.0))  # a number, which goes with the launch
        for copied in (
            lambda: there.copy_(torch.zeros(2)),
            lambda: there[torch.tensor([0])],
            lambda: there.sum().cpu(),
        ):
            with pytest.raises(ValueError, match="copies between the host and the GPU"):
                copied()


class FlakyCapture:
    """Replaces `capture`: the first `failures` attempts raise, later ones record the work."""

    def __init__(self, failures):
        self.failures, self.attempts = failures, 0

    def __call__(self, run, device):
        self.attempts += 1
        if self.attempts <= self.failures:
            raise CaptureError("engine: a step could not be captured")
        with Recording() as graph:
            run()
        return graph


@pytest.fixture
def failing_captures(monkeypatch):
    """failing_captures(n): make the first n captures fail, with graphs faked on the CPU; returns the `FlakyCapture`."""

    def arrange(failures):
        capture = FlakyCapture(failures)
        monkeypatch.setattr("fastddpm.sampling.replay.capture", capture)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # no packed weights, as on a GPU
        monkeypatch.setattr(Engine, "captures", lambda engine, steps: engine.prepared.kind in ("auto", "graph"))
        return capture

    with ops.forced_backend("torch"):  # whose operations can be recorded
        yield arrange


def test_auto_retries_a_failed_capture(failing_captures):
    capture, net, settings = failing_captures(1), tiny_unet(), {"steps": WORTH_CAPTURING, "progress": False}
    sampler = Sampler(net, device="cpu")
    assert torch.equal(sampler.sample(2, **settings), eager(net).sample(2, **settings))
    assert capture.attempts == 2
    assert next(iter(sampler.engine._idle.values())).network.replay.graph is not None


def test_auto_falls_back_to_eager_after_two_failures_and_warns_once(failing_captures):
    capture, net, settings = failing_captures(2), tiny_unet(), {"steps": WORTH_CAPTURING, "progress": False}
    sampler = Sampler(net, device="cpu")
    with pytest.warns(
        UserWarning, match=r"could not be captured\. Batches of 2 now run eagerly, with the same bits"
    ) as seen:
        results = [sampler.sample(4, batch_size=2, **settings) for _ in range(2)]
    assert len(seen) == 1
    assert capture.attempts == 2
    want = eager(net).sample(4, batch_size=2, **settings)
    assert all(torch.equal(result, want) for result in results)
    sampler.engine.clear()
    assert torch.equal(sampler.sample(4, batch_size=2, **settings), want)
    assert capture.attempts == 3  # the third attempt succeeded


def test_auto_falls_back_to_eager_for_the_network_alone_too(failing_captures):
    failing_captures(2)
    engine = Engine(tiny_unet(), SHAPE, 100, Compute(torch.device("cpu"), "fp32"))
    with engine.network(2, capture=True) as network:
        with pytest.warns(UserWarning, match="now run eagerly"):
            network.prepare(torch.arange(100))
        with network.working():
            first = network(torch.ones(2, *SHAPE), 3)
            assert not torch.equal(network(torch.zeros(2, *SHAPE), 3), first)
            assert torch.equal(network(torch.ones(2, *SHAPE), 3), first)


def test_engine_graph_raises_at_the_first_failed_capture(failing_captures):
    capture = failing_captures(1)
    sampler = graphed(tiny_unet())
    with pytest.raises(CaptureError, match="could not be captured"):
        sampler.sample(2, steps=3, progress=False)
    assert capture.attempts == 1
    assert sampler.sample(2, steps=3, progress=False).isfinite().all()


def test_results_do_not_share_memory_with_buffers(graphs):
    sampler = graphed(tiny_unet())
    seen = []
    first = sampler.sample(2, steps=3, progress=False, callback=lambda step, t, x_0, indices: seen.append(x_0))
    kept, were = first.clone(), [x_0.clone() for x_0 in seen]
    for x in (first, *seen):
        x.zero_()
    assert torch.equal(sampler.sample(2, steps=3, progress=False), kept)
    batches = list(sampler.batches(4, steps=3, batch_size=2, progress=False))
    assert torch.equal(batches[0][1], kept)
    assert not torch.equal(batches[1][1], kept)
    assert all(not x.any() for x in seen)
    assert len(were) == 3


def test_weights_changed_in_place_are_used_by_the_next_run(graphs):
    net = tiny_unet()
    sampler, settings = graphed(net, precision="fp32"), {"steps": 3, "progress": False}
    first = sampler.sample(2, **settings)
    for change in (lambda p: p.mul_(1.5), lambda p: p.data.mul_(0.5)):  # torch does not count the second kind
        for parameter in net.parameters():
            with torch.no_grad():
                change(parameter)
        assert torch.equal(sampler.sample(2, **settings), eager(net, precision="fp32").sample(2, **settings))
        assert not torch.equal(sampler.sample(2, **settings), first)
    assert len(graphs) == 1


def test_replaced_weights_of_another_network_are_captured_again(graphs):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            return x * self.scale

    net = Net()
    sampler, settings = graphed(net, shape=(3,)), {"steps": 3, "progress": False}
    sampler.sample(2, **settings)
    net.scale.data.fill_(0.25)
    assert torch.equal(sampler.sample(2, **settings), eager(net, shape=(3,)).sample(2, **settings))
    assert len(graphs) == 1
    net.scale = torch.nn.Parameter(torch.tensor(0.75))  # elsewhere in memory: the graph would read the old one
    assert torch.equal(sampler.sample(2, **settings), eager(net, shape=(3,)).sample(2, **settings))
    assert len(graphs) == 2


def test_graphs_are_reused_and_bounded(graphs):
    sampler, settings = graphed(elementwise, shape=(3,)), {"steps": 2, "progress": False}
    for size in (1, 2, 1, 2):
        sampler.sample(4, batch_size=size, **settings)
    assert len(graphs) == 2
    for size in range(1, KEPT + 3):
        sampler.sample(size, batch_size=size, **settings)
    assert len(sampler.engine._idle) == KEPT
    made = len(graphs)
    sampler.sample(1, **settings)
    assert len(graphs) == made + 1  # the least recently used one was dropped
    assert sampler.engine.clear()
    assert not sampler.engine.clear()


def test_changed_constants_are_captured_again(graphs):
    net = tiny_unet(num_class_embeds=3)
    sampler, settings = graphed(net), {"steps": 2, "progress": False}
    sampler.sample(2, class_labels=[0, 1], **settings)
    labelled = sampler.sample(2, class_labels=[2, 2], **settings)
    assert len(graphs) == 1
    assert torch.equal(labelled, eager(net).sample(2, class_labels=[2, 2], **settings))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        sampler.sample(2, class_labels=[2, 2], **settings)
    assert len(graphs) == 2
    with sampler.engine.runner(2, capture=True) as runner:
        for clip in (True, False):
            given = Conditions({"class_labels": torch.tensor([2, 2])})
            runner.load(Schedule(clip_sample=clip).table(2), noise.address(0, 2), given)
    assert len(graphs) == 4


def test_nested_runs(graphs):
    sampler, settings = graphed(tiny_unet()), {"steps": 4, "progress": False}
    want, inner = sampler.sample(2, **settings), []

    def callback(*seen):
        inner.append(sampler.sample(2, seed=5, **settings))

    assert torch.equal(sampler.sample(2, callback=callback, **settings), want)
    assert all(torch.equal(x, sampler.sample(2, seed=5, **settings)) for x in inner)
    assert len(inner) == 4


@pytest.mark.parametrize("captures", [False, True])
def test_two_threads_and_two_samplers(graphs, captures):
    net, other = tiny_unet(), elementwise
    make = graphed if captures else eager
    shared, own = make(net, precision="fp32"), make(other, shape=(3, 4))
    jobs = [(shared, 0), (shared, 1), (own, 2), (shared, 3)]
    settings = {"steps": 6, "batch_size": 2, "progress": False}
    want = [sampler.sample(4, seed=seed, **settings) for sampler, seed in jobs]
    got = at_once(*(partial(sampler.sample, 4, seed=seed, **settings) for sampler, seed in jobs))
    for results, x in zip(got, want, strict=True):
        assert all(torch.equal(result, x) for result in results)


def test_run_ignores_the_callers_autocast():
    net = tiny_unet()
    sampler, settings = eager(net, precision="fp32"), {"steps": 2, "progress": False}
    want = sampler.sample(2, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler.sample(2, **settings), want)


def test_autocast_does_not_cache_weights(graphs):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x, t):
            return self.linear(x)

    net, settings = Net(), {"steps": 3, "progress": False}
    one, plain = (make(net, shape=(3,), precision="bf16") for make in (graphed, eager))
    with torch.autocast("cpu", torch.bfloat16):  # whose cache would outlive a step
        for scale in (1, 0.5):
            net.linear.weight.data *= scale
            assert torch.equal(one.sample(2, **settings), plain.sample(2, **settings))
    assert torch.equal(one.sample(2, **settings), plain.sample(2, **settings))
    assert len(graphs) == 1


def test_engine_is_freed_with_its_sampler(graphs):
    """At once, without a garbage collection: its graphs hold GPU memory."""
    graphed(tiny_unet()).sample(1, steps=1, progress=False)  # torch imports modules, which keeps these frames alive
    gc.collect()
    gc.disable()
    try:
        sampler = graphed(tiny_unet())
        sampler.sample(2, steps=2, progress=False)
        [runner] = sampler.engine._idle.values()
        left = [weakref.ref(part) for part in (sampler.engine, runner, runner.network)]
        del sampler, runner
        assert [part() for part in left] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("kept", [False, True], ids=["cleared", "out of memory"])
def test_runners_are_freed_at_once(monkeypatch, kept):
    """Without a garbage collection: on a GPU the next batch needs their memory."""
    made, alive, init = [], [], Runner.__init__

    def noted(runner, *args, **options):
        alive.append(sum(ref() is not None for ref in made))
        init(runner, *args, **options)
        made.append(weakref.ref(runner))

    def model(x, t):
        if kept and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return elementwise(x, t)

    monkeypatch.setattr(Runner, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        sampler = eager(model, shape=(3,))
        with pytest.warns(UserWarning, match="out of memory") if kept else nullcontext():
            sampler.sample(4, steps=2, batch_size=4, progress=False)
        sampler.engine.clear()
        assert [ref() for ref in made] == [None] * len(made)
        assert alive == [0] * len(made)
        assert len(made) == (2 if kept else 1)
    finally:
        gc.enable()


def test_runs_in_and_out_of_inference_mode():
    net = tiny_unet(num_class_embeds=3)
    sampler, settings = eager(net), {"steps": 2, "class_labels": [0, 1], "progress": False}
    with torch.inference_mode():
        inside = sampler.sample(2, **settings)
    assert torch.equal(sampler.sample(2, **settings), inside)


def test_failed_run_keeps_no_buffers(graphs):
    def fails_once(x, t):
        if fails_once.armed:
            raise RuntimeError("broken")
        return x * 0.5

    fails_once.armed = False
    sampler, settings = eager(fails_once, shape=(3,)), {"steps": 2, "progress": False}
    want = sampler.sample(2, **settings)
    fails_once.armed = True
    with pytest.raises(RuntimeError, match="broken"):
        sampler.sample(2, **settings)
    assert not sampler.engine._idle
    fails_once.armed = False
    assert torch.equal(sampler.sample(2, **settings), want)


def test_auto_captures_long_runs_of_a_unet(graphs, monkeypatch):
    """On a GPU. Other networks are not captured, because they may make decisions in Python."""
    monkeypatch.setattr("fastddpm.sampling.engine.ops.backend", lambda device: "triton")
    sampler = Sampler(tiny_unet(), device="cpu")
    sampler.sample(1, steps=WORTH_CAPTURING - 1, progress=False)
    assert not graphs
    short = sampler.sample(1, steps=WORTH_CAPTURING, progress=False)
    assert len(graphs) == 1
    assert torch.equal(short, eager(sampler.model).sample(1, steps=WORTH_CAPTURING, progress=False))
    sampler.sample(1, steps=WORTH_CAPTURING, progress=False, callback=lambda *seen: None)
    assert len(graphs) == 2  # a callback sees the middle of a step, so that the network alone is captured
    Sampler(elementwise, shape=(3,), device="cpu").sample(1, steps=100, progress=False)
    assert len(graphs) == 2


@pytest.mark.parametrize("model", ["unet", "another"])
def test_auto_captures_only_on_a_gpu(model):
    net = tiny_unet() if model == "unet" else elementwise
    pytest.importorskip("triton")
    for device, want in (("cuda", model == "unet"), ("cpu", False)):
        assert Engine(net, SHAPE, 1000, Compute(torch.device(device), "fp32")).captures(1000) == want
        assert not Engine(net, SHAPE, 1000, Compute(torch.device(device), "fp32"), "eager").captures(1000)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fast", "engine is 'fast'; want one of auto, eager, compiled, graph, compiled\\+graph"),
        ("graph", "engine is 'graph', but 'cpu' has no CUDA graphs; use 'eager' or 'compiled'"),
        ("compiled+graph", "engine is 'compiled\\+graph', but 'cpu' has no CUDA graphs"),
    ],
)
def test_unknown_engine_is_an_error(kind, message):
    with pytest.raises(ValueError, match=message) as caught:
        Sampler(elementwise, shape=(3,), device="cpu", engine=kind)
    assert "\n" not in str(caught.value)


GIVEN = {
    "labels": {"num_class_embeds": 3},
    "guidance, known, learned": {"num_class_embeds": 3, "out_channels": 2},
    "concat": {"in_channels": 3},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("given", ["", *GIVEN])
def test_step_on_a_gpu_neither_waits_nor_mixes_devices(precision, given, monkeypatch):
    """Uses fake tensors, which have a device and a shape but no values: reading a value is an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    pytest.importorskip("triton")
    made, table = (
        Engine(tiny_unet(), SHAPE, 1000, Compute(torch.device("cuda"), precision), "eager"),
        Schedule().table(10),
    )
    with ops.forced_backend("triton"):
        net = UNet2D(**{**SMALL, **GIVEN.get(given, {})}).for_inference(made.prepared.dtype, "meta")
    made.prepared.net, made.prepared.forward = net, net.denoise
    monkeypatch.setattr(made.prepared, "refresh", lambda: None)
    monkeypatch.setattr("fastddpm.sampling.batch_network.StreamOrder", lambda device: StreamOrder(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    # a copy within a device, which torch without CUDA cannot fake
    monkeypatch.setattr("fastddpm.sampling.batch_network.BatchNetwork.read_states", lambda network, x: None)
    with FakeTensorMode():
        for module in net.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        form, shape = InputForm(concat=2 * (given == "concat"), guided="guidance" in given), (2, *SHAPE)
        with made.runner(2, capture=False, form=form) as runner:
            if "num_class_embeds" in GIVEN.get(given, {}):
                labels = torch.zeros(runner.network.entries, dtype=torch.int64, device="cuda")
                runner.network.kwargs = {"class_labels": labels}
            if form.guided:
                known = layout.channels_last(torch.ones(shape, device="cuda"))
                runner.conditions = Conditions(
                    guidance=torch.ones(2, device="cuda"), known=known, mask=known > 0, guide_variance=True
                )
                runner.table = replace(runner.table, learned="learned_range")
                runner._take_step = runner._step_of_table()
            runner._loaded = table
            assert ops.backend(runner.x.device) == "triton"
            with NoWaiting():
                m = runner.predict()
                entries, channels = (4, 2) if form.guided else (2, 1)
                assert (m.shape, m.dtype, m.device.type) == ((entries, channels, 8, 8), made.prepared.dtype, "cuda")
                runner.update(m)
                with pytest.raises(ValueError, match="copies between the host and the GPU"):
                    runner.bad.cpu()
            assert all(tensor.device.type == "cuda" for tensor in runner._tensors())
            with pytest.raises(DataDependentOutputException):
                runner.bad.max().item()


def test_entries_may_be_at_different_rows():
    """A step of each entry equals the reference update at its row, with its noise."""
    made = Engine(elementwise, (2, 3), 1000, Compute(torch.device("cpu"), "fp32"))
    table, where = Schedule().table(20), noise.address(4, [7, 8, 9])
    with made.runner(3, capture=False) as runner:
        runner.load(table, where)
        runner.start()
        x = runner.x.clone()
        runner.network.positions.copy_(torch.tensor([19, 4, 0]))
        pos = runner.network.positions.clone()
        runner.step()
        t = table.timesteps[pos]
        z = noise.normal(where, (2, 3), stream=noise.STEP, t=t)
        want = update(x, elementwise(x, t), table.rows[pos], z, clip=True)
        want[2] = update(x[2:], elementwise(x[2:], t[2:]), table.rows[0], None, clip=True)[0]
        assert torch.equal(runner.x, want)
        assert runner.network.positions.tolist() == [18, 3, -1]
        assert layout.is_channels_last(runner.x)


@pytest.mark.parametrize("kind", ["eager", "graph"])
@pytest.mark.parametrize("channels", [1, 2], ids=["fixed variance", "learned variance"])
@pytest.mark.parametrize("own", [False, True], ids=["unet", "own"])
def test_network_alone_may_be_at_different_timesteps(own, channels, kind, graphs):
    """Each entry equals that of a batch at its timestep, and is as accurate as plain torch."""
    net = tiny_unet()
    if channels == 2:
        torch.manual_seed(0)
        net = UNet2D(**{**SMALL, "out_channels": 2}).eval()
    model = (lambda x, t: torch.cat([elementwise(x, t)] * channels, 1)) if own else net
    made = Engine(model, SHAPE, 100, Compute(torch.device("cpu"), "fp32"))
    made.prepared.kind = kind
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([99, 0, 40])
    with made.network(3, capture=made.captures(9)) as network:
        network.prepare(torch.arange(100), per_entry=True)
        with network.working():
            each = [network(x, i)[n] for n, i in enumerate(t.tolist())]
            got = network(x, t)
    assert torch.equal(got, torch.stack(each))
    if own:
        assert torch.equal(got, model(x, t))
    else:
        reference = UNet(**net.config)
        reference.load_state_dict(net.state_dict())
        reference.eval()
        with torch.no_grad():
            plain = reference(x, t)
            assert_as_accurate(got, plain, reference.double()(x.double(), t))
    assert len(graphs) == (kind == "graph")


def test_network_can_change_between_one_and_several_timesteps(graphs):
    made = Engine(tiny_unet(), SHAPE, 100, Compute(torch.device("cpu"), "fp32"))
    made.prepared.kind = "graph"
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    results = []
    for per_entry in (False, True, False):
        with made.network(3, capture=made.captures(9)) as network:
            network.prepare(torch.arange(100), per_entry=per_entry)
            with network.working():
                results.append(network(x, 7))
    assert torch.equal(results[0], results[2])
    assert len(graphs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_is_the_same_function(precision):
    """As accurate as plain torch with channels-last memory, judged by the U-Net in float64."""
    net = tiny_unet()
    results = {}
    for kind in ("eager", "compiled"):
        sampler = Sampler(net, device="cpu", precision=precision, engine=kind)
        with sampler.engine.runner(2, capture=False) as runner:
            runner.load(Schedule().table(4), noise.address(0, 2))
            runner.start()
            low, row = runner.network.input.clone(), runner.network._columns()
            results[kind] = runner.predict().clone()
    exact = tiny_unet().double()
    with torch.no_grad():
        rows = exact.time_rows(torch.tensor([750]))
        assert torch.allclose(rows.float(), row.float(), atol=float(row.abs().max()) * torch.finfo(row.dtype).eps * 4)
        plain = UNet(**net.config).to(low.dtype, memory_format=torch.channels_last)
        plain.load_state_dict(net.state_dict())
        theirs, want = plain(low, torch.tensor([750, 750])), exact.denoise(low.double(), rows)
    for kind in results:
        assert_as_accurate(results[kind], theirs, want)


def test_float32_settings_are_restored():
    settings = lambda: (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    before = settings()
    with arithmetic("fp32", torch.device("cpu")):
        assert settings() == before
    torch.set_float32_matmul_precision("medium")
    try:
        for precision, want in (("fp32", (False, "highest")), ("tf32", (True, "high")), ("bf16", (False, "highest"))):
            with arithmetic(precision, torch.device("cuda")):
                assert settings() == want
            assert settings() == (before[0], "medium")
    finally:
        torch.set_float32_matmul_precision(before[1])


def test_float32_settings_under_their_newer_names_are_restored():
    code = """
import torch
from fastddpm.core.precision import arithmetic
owners = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
torch.backends.cuda.matmul.fp32_precision = "tf32"
before = [owner.fp32_precision for owner in owners]
for precision, want in (("fp32", "ieee"), ("tf32", "tf32")):
    with arithmetic(precision, torch.device("cuda")):
        assert [owner.fp32_precision for owner in owners] == 3 * [want]
    assert [owner.fp32_precision for owner in owners] == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # there is no way back to the older names
