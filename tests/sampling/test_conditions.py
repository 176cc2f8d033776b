"""What samples are given: every kind equals the reference, eagerly and in a graph, and depends on no other sample."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from fastddpm import Sampler, Schedule, UNet2D, ops
from fastddpm.core import noise
from fastddpm.processes.distributed import ranks
from fastddpm.reference import conditional
from fastddpm.sampling import job
from fastddpm.storage.shards import ShardFolder
from tests.support.bits import assert_same_bits
from tests.support.check import TINY, error_line
from tests.support.graphs import graphed
from tests.support.jobs import die_storing
from tests.support.kinds import KINDS, SAMPLES, SCHEDULE, SHAPE, Kind, N, Net, T, draw, expected, randn, sampler_of
from tests.support.processes import run_ranks


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", KINDS)
def test_samples_are_those_of_the_reference(name, backend):
    kind = KINDS[name]
    with ops.forced_backend(backend):
        assert_same_bits(draw(sampler_of(kind), kind).movedim(1, -1).contiguous().movedim(-1, 1), expected(kind))


@pytest.mark.parametrize("name", KINDS)
def test_conditions_change_the_result(name):
    """No kind is ignored: without what it is given, or with another, the samples are others."""
    kind = KINDS[name]
    if name in ("plain", "learned variance", "sample_index"):
        return
    plain = Kind({}, Net() if name != "concat" else kind.net, {}, schedule=kind.schedule)
    if name in ("guided variance", "everything"):
        plain = Kind({}, Net(halves=2), {}, schedule=kind.schedule)
    if name == "concat":
        plain = Kind({"concat": 1 + kind.options["concat"]}, kind.net, {})
    assert (draw(sampler_of(kind), kind) - draw(sampler_of(plain), plain)).abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_one_graph_serves_every_step_and_the_next_call(graphs, name):
    kind = KINDS[name]
    sampler = graphed(kind.net, kind.schedule, shape=SHAPE)
    want = draw(sampler_of(kind), kind)
    first = draw(sampler, kind)
    again = draw(sampler, kind, batch_size=N)
    assert len(graphs) == 1
    assert torch.equal(first, want)
    assert torch.equal(again, want)
    other = {key: _changed(value) for key, value in kind.options.items()}
    changed = Kind(other, kind.net, {}, schedule=kind.schedule)
    assert torch.equal(draw(sampler, changed), draw(sampler_of(changed), changed))
    assert len(graphs) == 1 or name == "nested kwargs"  # whose number is part of the graph


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", KINDS)
def test_graph_on_a_gpu_has_the_bits_of_eager_steps(name):
    kind = KINDS[name]
    net = copy.deepcopy(kind.net)
    samplers = [Sampler(net, kind.schedule, shape=SHAPE, device="cuda", engine=engine) for engine in ("eager", "graph")]
    for options in (kind.options, {key: _changed(value) for key, value in kind.options.items()}):
        one, other = (draw(sampler, Kind(options, net, {})) for sampler in samplers)
        assert torch.equal(one, other)
    on_cpu = draw(sampler_of(kind), Kind(options, net, {}, schedule=kind.schedule))
    assert (on_cpu - one).abs().max() <= 1e-3


def _changed(value):
    """Other tensors of the same shapes, other numbers; functions, integers and flags stay."""
    if isinstance(value, dict):
        return {key: _changed(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return ~value if value.dtype == torch.bool else value + 0.5
    return value + 0.125 if isinstance(value, float) and value != 0.5 else value


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_does_not_depend_on_its_batch(name):
    kind = KINDS[name]
    want = draw(sampler_of(kind), kind)
    alone = torch.cat([draw(sampler_of(kind), kind, [i]) for i in range(N)])
    assert torch.equal(alone, want)
    assert torch.equal(draw(sampler_of(kind), kind, batch_size=2), want)
    invariant = sampler_of(kind, batch_invariant=4)
    assert torch.equal(draw(invariant, kind), want)
    assert torch.equal(draw(invariant, kind, [4, 1]), want[[4, 1]])


def draw_jobs(folder, dies=None):
    """Draw a job for every kind; in the first, this process may be killed before it stores its shard of this number."""
    if dies is not None:
        die_storing(dies)
    with ranks("cpu"):
        for name, kind in KINDS.items():
            settings = {"format": "npz", "shard_size": 2, "seed": 6, "progress": False}
            job.sample_to(folder / name, sampler_of(kind), SAMPLES, **settings, **kind.options)
        kind = KINDS["known"]
        job.sample_to(folder / "trajectory", sampler_of(kind), SAMPLES, trajectory=[9, 3], **settings, **kind.options)
    return 0


@pytest.mark.slow
def test_killed_jobs_resume_with_another_number_of_processes(tmp_path):
    """Two processes, one of them killed, then one that is killed, then three: the samples have the bits of one call."""
    for size, dies in ((2, 1), (1, 1), (3, None)):
        statuses, printed = run_ranks(tmp_path, size, draw_jobs, tmp_path / "out", dies)
        assert (-9 in statuses) if dies is not None else not any(statuses), printed
    for name, kind in KINDS.items():
        store = ShardFolder.open(tmp_path / "out" / name)
        assert np.array_equal(np.concatenate(list(store.arrays())), draw(sampler_of(kind), kind).numpy()), name
    store, kind = ShardFolder.open(tmp_path / "out" / "trajectory"), KINDS["known"]
    want = draw(sampler_of(kind), kind, trajectory=[9, 3]).numpy()
    assert np.array_equal(np.concatenate(list(store.arrays())), want)


def test_folder_of_other_conditions_is_refused(tmp_path):
    kind, settings = KINDS["everything"], {"format": "npz", "progress": False, "seed": 6}
    job.sample_to(tmp_path / "out", sampler_of(kind), SAMPLES, **settings, **kind.options)
    for name, other in (
        ("concat", kind.options["concat"] + 1),
        ("guidance_scale", 3.0),
        ("x_0_fn", lambda x_0, t: x_0),
        ("model_kwargs", {"y": torch.zeros(N)}),
        ("start_timestep", 8),
    ):
        changed = {**kind.options, name: other}
        line = error_line(job.sample_to, tmp_path / "out", sampler_of(kind), SAMPLES, **settings, **changed)
        assert name in line
        assert "name another folder" in line
    scaled = sampler_of(kind, timestep_scale=2)
    line = error_line(job.sample_to, tmp_path / "out", scaled, SAMPLES, **settings, **kind.options)
    assert "timestep_values" in line


def test_job_stores_trajectories(tmp_path):
    kind, settings = KINDS["plain"], {"seed": 6, "trajectory": [11, 4], "progress": False}
    store = job.sample_to(tmp_path / "out", sampler_of(kind), SAMPLES, format="webdataset", **settings)
    want = sampler_of(kind).sample(SAMPLES, **settings)
    assert np.array_equal(np.concatenate(list(store.arrays())), want.numpy())
    images = Sampler(Net(3), SCHEDULE, shape=(3, 4, 4), device="cpu")
    line = error_line(job.sample_to, tmp_path / "png", images, 2, **settings)
    assert line == "samples are trajectories, of several images; write them as npz or webdataset"


def test_trajectory_keeps_the_states():
    kind, seen = KINDS["known"], {}
    keep = lambda step, t, x_0, indices, x_t: seen.setdefault(t, x_t)
    x = draw(sampler_of(kind), kind, callback=keep)
    frames = draw(sampler_of(kind), kind, trajectory=[11, 5, 0], batch_size=2)
    assert frames.shape == (N, 4, *SHAPE)
    assert torch.equal(frames[:, 3], x)
    for place, t in enumerate([11, 5, 0]):
        assert torch.equal(frames[:, place], seen[t])
    images = Sampler(Net(3), SCHEDULE, shape=(3, 4, 4)).sample(2, output="uint8", trajectory=[3], progress=False)
    assert (images.shape, images.dtype) == ((2, 2, 4, 4, 3), torch.uint8)


def test_callback_sees_what_x_0_fn_returns_and_every_visit():
    kind, seen = KINDS["everything"], []
    draw(sampler_of(kind), kind, callback=lambda step, t, x_0, indices: seen.append((step, t, float(x_0.abs().max()))))
    assert [(step, t) for step, t, _ in seen] == list(enumerate([t for t in range(9, 0, -1) for _ in range(2)] + [0]))
    assert all(largest <= 0.5 + 0.01 * t + 1e-6 for _, t, largest in seen)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3,), (2, 4, 3)])
@pytest.mark.parametrize("given", [{}, {"x_0_fn": lambda x_0, t: x_0.clamp(-0.5, 0.5)}], ids=["", "x_0_fn"])
def test_callback_cannot_change_the_samples(shape, given):
    sampler = Sampler(lambda x, t: 0.5 * x, SCHEDULE, shape=shape, device="cpu")
    want = sampler.sample(2, progress=False, **given)
    spoil = lambda step, t, x_0, indices, x_t: (x_0.zero_(), x_t.zero_(), indices.zero_())
    assert torch.equal(sampler.sample(2, callback=spoil, progress=False, **given), want)


def test_runner_does_not_keep_the_function():
    function = lambda x_0, t: x_0
    sampler = Sampler(Net(), SCHEDULE, shape=SHAPE, device="cpu")
    kept = weakref.ref(function)
    sampler.sample(2, x_0_fn=function, progress=False)
    del function
    gc.collect()
    assert kept() is None


def test_progress_counts_every_visit():
    kind, counted = KINDS["resample"], []
    draw(sampler_of(kind), kind, batch_size=N)
    given = {**kind.options, "progress": lambda steps, samples: counted.append((steps, samples))}
    sampler_of(kind).sample(N, **given)
    assert counted == [(1, N)] * (3 * (T - 1) + 1)


def test_x_0_fn_may_ask_for_the_sample_index_and_for_gradients():
    asked = []

    def towards(x_0, t, sample_index):
        asked.append(sample_index.tolist())
        with torch.enable_grad():
            x_0 = x_0.requires_grad_()
            (gradient,) = torch.autograd.grad((x_0 - 0.3).square().sum(), x_0)
        return (x_0 - 0.5 * gradient).detach()

    x = Sampler(Net(), SCHEDULE, shape=SHAPE).sample([4, 9], x_0_fn=towards, progress=False)
    assert asked == [[4, 9]] * T
    assert torch.allclose(x, torch.full_like(x, 0.3))


def test_unet_is_guided_away_from_the_null_label():
    torch.manual_seed(0)
    net = UNet2D(**{**TINY, "sample_size": 8, "num_class_embeds": 4}).eval()
    sampler, options = Sampler(net, SCHEDULE, device="cpu", precision="fp32"), {"seed": 6, "progress": False}
    labels = torch.tensor([0, 1, 2])
    got = sampler.sample(3, class_labels=labels, guidance_scale=2, uncond_kwargs={"class_labels": 3}, **options)
    table, address = SCHEDULE.table(), noise.address(6, 3)
    with torch.no_grad():
        want = conditional.sample(
            lambda x, t: net(x, t, labels),
            noise.normal(address, sampler.shape, stream=noise.START, t=T),
            *(table.rows, table.scale, table.timesteps),
            lambda stream, t: noise.normal(address, sampler.shape, stream=stream, t=t),
            clip=True,
            unconditional=lambda x, t: net(x, t, torch.full((3,), 3)),
            guidance=torch.full((3,), 2.0),
        )
    assert (got - want).abs().max() <= 1e-4
    same = {"class_labels": labels}
    as_kwargs = sampler.sample(3, model_kwargs=same, guidance_scale=2, uncond_kwargs={"class_labels": 3}, **options)
    assert torch.equal(as_kwargs, got)


def test_unet_with_concat_has_the_shape_of_its_output():
    torch.manual_seed(0)
    net = UNet2D(**{**TINY, "sample_size": 8, "in_channels": 5, "out_channels": 3}).eval()
    sampler, concat = Sampler(net, SCHEDULE, device="cpu", precision="fp32"), randn(2, 2, 8, 8)
    assert sampler.shape == (3, 8, 8)
    got = sampler.sample(2, concat=concat, progress=False)
    plain = Sampler(lambda x, t: net(torch.cat([x, concat], 1), t), SCHEDULE, shape=(3, 8, 8), device="cpu")
    assert (got - plain.sample(2, progress=False)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"timestep_scale": 0.5}, torch.arange(T) * 0.5),
        ({"timestep_scale": 1}, torch.arange(T).float()),
        ({"timestep_values": torch.linspace(0.1, 1, T)[:, None]}, torch.linspace(0.1, 1, T)[:, None]),
        ({}, torch.arange(T)),
    ],
)
def test_network_is_told_the_time_as_it_wants(options, want):
    seen = []

    def net(x, t):
        seen.append(t.clone())
        return 0.1 * x

    Sampler(net, SCHEDULE, shape=(3,), **options).sample(2, progress=False)
    assert len(seen) == T
    assert all(t.dtype == want.dtype and torch.equal(t, want[[T - 1 - i] * 2]) for i, t in enumerate(seen))


def test_unet_is_told_scaled_timesteps():
    torch.manual_seed(0)
    net = UNet2D(**{**TINY, "sample_size": 8}).eval()
    sampler = Sampler(net, SCHEDULE, device="cpu", precision="fp32", timestep_scale=1000 / T)
    scaled = sampler.sample(1, progress=False)
    want = Sampler(lambda x, t: net(x, t * (1000 / T)), SCHEDULE, shape=scaled.shape[1:], device="cpu")
    assert (scaled - want.sample(1, progress=False)).abs().max() <= 1e-4


def test_value_range_is_that_of_clipping_and_of_images():
    net, to_ends = Net(3), {"shape": (3, 4, 4), "device": "cpu"}
    zero_one = Sampler(net, SCHEDULE, **to_ends, value_range=(0, 1))
    x = zero_one.sample(2, progress=False)
    assert x.min() == 0
    assert abs(x.max() - 1) <= 1e-6  # x_0 = scale clamp(...), whose bound is rounded
    images = zero_one.sample(2, output="uint8", progress=False)
    assert torch.equal(images, (x * 255).round().to(torch.uint8).movedim(1, -1))
    assert Sampler(net, SCHEDULE, **to_ends).sample(2, progress=False).min() < 0


def test_arrays_lists_and_masks_of_a_sample_are_accepted():
    kind = KINDS["known"]
    known, mask = kind.options["known"].numpy(), np.zeros((4, 3), np.int64)
    mask[1:] = 1
    x = sampler_of(kind).sample(N, known=known, mask=mask, progress=False)
    assert torch.equal(x[:, :, 1:], torch.from_numpy(known)[:, :, 1:])
    for form in (mask[None], mask[None, None], np.broadcast_to(mask, (N, 1, 4, 3)), np.broadcast_to(mask, (2, 4, 3))):
        assert torch.equal(sampler_of(kind).sample(N, known=known, mask=form, progress=False), x)
    as_list = sampler_of(kind).sample(N, model_kwargs={"y": [0.5, 1, 2, 3, 4]}, progress=False)
    as_tensor = sampler_of(kind).sample(N, model_kwargs={"y": torch.tensor([0.5, 1, 2, 3, 4])}, progress=False)
    assert torch.equal(as_list, as_tensor)


KNOWN = {"known": randn(2, *SHAPE), "mask": torch.ones(4, 3)}
GUIDED = {"model_kwargs": {"y": randn(2)}, "guidance_scale": 2}
MISTAKES = [
    ({"model_kwargs": {"y": randn(3)}}, r"model_kwargs['y'] is (3,) for 2 samples; want one entry per sample"),
    ({"model_kwargs": [1]}, "model_kwargs is [1]; want a dict of the network's arguments by their names"),
    ({"model_kwargs": {"z": randn(2)}}, "the network cannot be called as model(x_t, t, z=...) ("),
    (
        {"class_labels": [1, 2]},
        "class_labels were given, but the model is not a class-conditional UNet2D or UNet1D;",
    ),
    ({"concat": randn(2, 1, 4, 4)}, "concat is (2, 1, 4, 4) for samples of (2, 4, 3); want [2, C, 4, 3]"),
    ({"concat": randn(1, 1, 4, 3)}, "concat is (1, 1, 4, 3) for 2 samples; want one entry per sample"),
    ({"concat": torch.ones(2, 1, 4, 3).long()}, "concat is torch.int64; want floating-point numbers in data units"),
    (GUIDED, "guidance_scale is given, but uncond_kwargs is None; want what the network is given instead of the "),
    (
        {**GUIDED, "uncond_kwargs": {"z": 0}},
        "uncond_kwargs has 'z', which model_kwargs lacks (it has y); give",
    ),
    (
        {**GUIDED, "uncond_kwargs": {"y": randn(3)}},
        "uncond_kwargs['y'] is (3,), but (2,) in model_kwargs; want the",
    ),
    ({**GUIDED, "uncond_kwargs": {"y": "no"}}, "uncond_kwargs['y'] is 'no'; want a tensor or an array"),
    ({**GUIDED, "uncond_kwargs": {"y": float("nan")}}, "uncond_kwargs['y'] is nan; want"),
    (
        {"model_kwargs": {"y": torch.tensor([1, 2])}, "guidance_scale": 2, "uncond_kwargs": {"y": 0.5}},
        "uncond_kwargs['y'] is 0.5; want finite numbers of torch.int64, as in model_kwargs",
    ),
    (
        {**GUIDED, "guidance_scale": torch.tensor([True, False])},
        "guidance_scale is tensor([ True, False]); want a number",
    ),
    (
        {"model_kwargs": {"y": ["a", "b"]}},
        "model_kwargs['y'] is ['a', 'b']; want a tensor, an array or a list of numbers",
    ),
    ({"model_kwargs": {"y": {1, 2}}}, "model_kwargs['y'] is {1, 2}; want a tensor, an array or a list of numbers"),
    ({"model_kwargs": {"sample_index": torch.tensor([1, 2])}}, "model_kwargs has sample_index, which is filled in"),
    ({**GUIDED, "guidance_scale": [1, 2, 3]}, "guidance_scale is (3,) for 2 samples; want one entry per sample"),
    ({**GUIDED, "guidance_scale": "2"}, "guidance_scale is '2'; want a tensor or an array"),
    ({"uncond_kwargs": {"y": 0}}, "uncond_kwargs is {'y': 0}, but guidance_scale is missing; give it, too"),
    ({"guide_variance": True}, "guide_variance is True, but the schedule has no learned variance; leave it out"),
    ({"start": randn(2, *SHAPE)}, "start is given, but start_timestep is missing; give both"),
    ({"start_timestep": 3}, "start_timestep is given, but start is missing; give both"),
    ({"start": randn(2, 3), "start_timestep": 3}, "start is (2, 3) for 2 samples of (2, 4, 3); want (2, 2, 4, 3)"),
    (
        {"start": randn(2, *SHAPE), "start_timestep": 5, "steps": 4},
        "start_timestep is 5, which these steps do not",
    ),
    ({"start": randn(2, *SHAPE), "start_timestep": T}, "start_timestep is 12; want a whole number from 0 to 11"),
    ({"init": randn(2, *SHAPE)}, "init is given, but strength is missing; give both"),
    ({"strength": 0.5}, "strength is given, but init is missing; give both"),
    *(({"init": randn(2, *SHAPE), "strength": s}, f"strength is {s}; want a number, 0 < s") for s in (0, 1.1, -0.5)),
    ({"init": randn(2, *SHAPE), "strength": 0.01}, "strength is 0.01, less than one of 12 steps; want at least 0.0833"),
    (
        {"init": randn(2, *SHAPE), "strength": 1, "start": randn(2, *SHAPE), "start_timestep": 3},
        "start and init are both given; want one",
    ),
    ({"init": randn(2, *SHAPE) * float("nan"), "strength": 1}, "init has NaN or infinity; want finite numbers"),
    ({"known": KNOWN["known"]}, "known is given, but mask is missing; give both"),
    ({"mask": KNOWN["mask"]}, "mask is given, but known is missing; give both"),
    (
        {**KNOWN, "mask": torch.ones(3, 4)},
        "mask is (3, 4) for 2 samples of (2, 4, 3); want (2, 4, 3), (4, 3), [1, 2",
    ),
    (
        {**KNOWN, "mask": torch.full((4, 3), 0.5)},
        "mask has values besides 0 and 1; want 1 (or True) where x_0 is",
    ),
    ({**KNOWN, "known": randn(2, 2, 4, 4)}, "known is (2, 2, 4, 4) for 2 samples of (2, 4, 3); want (2, 2, 4, 3)"),
    (
        {"known": KNOWN["known"], "mask": torch.ones(2, 4, 3)},
        "mask is (2, 4, 3) for 2 samples, which may be meant in two ways; want [1, 2, 4, 3] for all samples, or",
    ),
    (
        {**KNOWN, "mask": torch.ones(2, 3, 4, 3)},
        "mask is (2, 3, 4, 3) for 2 samples of (2, 4, 3); want 1 or 2 channels",
    ),
    ({**KNOWN, "resample": 0}, "resample is 0; want a whole number from 1 to 4096"),
    ({"resample": 2}, "resample is 2, but known and mask are missing; give both, or leave it out"),
    (
        {"x_0_fn": 3},
        "x_0_fn is 3; want a function, called as x_0_fn(x_0, t), or x_0_fn(x_0, t, sample_index=...)",
    ),
    ({"x_0_fn": lambda x_0, t: x_0[:, 0]}, "x_0_fn returned (2, 4, 3) torch.float32 for x_0 (2, 2, 4, 3); want"),
    ({"x_0_fn": lambda x_0: x_0}, "x_0_fn is <function <lambda> at"),
    (
        {"x_0_fn": lambda x_0, t: x_0 * float("nan")},
        "step 1 of 12 (t = 11): the network or x_0_fn returned NaN or infi",
    ),
    ({"trajectory": []}, "trajectory is empty; want timesteps that the steps visit, or None"),
    ({"timesteps": [5]}, "timesteps begins late: its first timestep is 5 of 12"),
    ({"trajectory": [12]}, "trajectory has 12, which these steps do not visit; want visited timesteps, such as 11"),
    (
        {"timesteps": [6, 5, 4, 3, 2, 1, 0]},
        "timesteps begins late: its first timestep is 6 of 12, where x_t still",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), MISTAKES, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_mistakes_are_explained(options, message):
    line = error_line(Sampler(Net(), SCHEDULE, shape=SHAPE).sample, 2, progress=False, **options)
    assert line.startswith(message)


def test_late_beginning_names_the_way_out():
    line = error_line(Sampler(Net(), Schedule(), shape=SHAPE).sample, 2, timesteps=range(500, -1, -1), progress=False)
    assert "(start=x_t, start_timestep=500)" in line
    assert "(init=x_0, strength=1.0)" in line
    for listed in ([999, 500, 0], [980, 500, 0], range(900, -1, -100), [750, 500, 250, 0]):
        Sampler(lambda x, t: x, Schedule(), shape=(3,)).sample(1, timesteps=listed, progress=False)


def test_unet_mistakes():
    torch.manual_seed(0)
    net = UNet2D(**{**TINY, "sample_size": 8, "num_class_embeds": 4, "in_channels": 5}).eval()
    sampler, labels = Sampler(net, SCHEDULE, shape=(3, 8, 8)), {"class_labels": [0, 1]}
    concat = {"concat": randn(2, 2, 8, 8)}
    for options, message in (
        (labels, "concat is missing; the network takes 2 channels more than the 3 of a sample: want [2, 2, 8, 8]"),
        ({**labels, "concat": randn(2, 1, 8, 8)}, "concat is (2, 1, 8, 8) for samples of (3, 8, 8); want [2, 2, 8, 8]"),
        (
            {**labels, **concat, "guidance_scale": 2},
            "guidance_scale is given, but uncond_kwargs is None; want what the",
        ),
        (
            {**labels, **concat, "guidance_scale": 2, "uncond_kwargs": {"class_labels": 4}},
            "uncond_kwargs, the null label: class_labels are [4, 4]; want whole numbers, 0 <= label < 4",
        ),
        (
            {**concat, "model_kwargs": {"y": randn(2)}},
            "model_kwargs has 'y', which this network does not take; it takes only 'class_labels'",
        ),
        ({**concat, **labels, "model_kwargs": labels}, "class_labels are in model_kwargs, too; give them once"),
    ):
        assert error_line(sampler.sample, 2, progress=False, **options).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_scale": 0}, "timestep_scale is 0; want a number other than 0, by which t is multiplied"),
        (
            {"timestep_scale": 1, "timestep_values": [1]},
            "timestep_scale and timestep_values are both given; want one of them",
        ),
        ({"timestep_values": [1, 2]}, "timestep_values are (2,); want 12 finite numbers, one for each timestep"),
        ({"timestep_values": "abc"}, "timestep_values is 'abc'; want 12 numbers"),
        ({"value_range": (1, 0)}, "value_range is (1, 0); want two numbers, the least and the largest of the data"),
        ({"value_range": 1}, "value_range is 1; want two numbers, the least and the largest of the data"),
    ],
)
def test_bad_settings(options, message):
    assert error_line(Sampler, Net(), SCHEDULE, shape=SHAPE, **options) == message
