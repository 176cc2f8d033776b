"""The loop is Algorithm 2 with addressed noise: equal to the specification, and to diffusers given the same noise."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from fastddpm import Sampler, Schedule, UNet2D
from fastddpm.checkpoints import SHIPPED_MODELS, shipped, shipped_model
from fastddpm.core import noise
from fastddpm.core.precision import PRECISIONS
from fastddpm.evaluate.features import shipped_classifier
from fastddpm.reference.diffusion import Diffusion, update
from fastddpm.storage.images import to_uint8
from tests.support.check import TINY, assert_as_accurate, root_mean_square

SHAPES = [(1, 4, 4), (3, 5, 7), (2, 9), (5,)]
SMALL = {**TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1}


def elementwise(x, t):
    """An eps-model without reductions: its result for one sample cannot depend on the others."""
    return (x * 0.9 + t.reshape(-1, *[1] * (x.ndim - 1)) * 1e-4).sin()


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2D(**SMALL).eval()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"noise": False}], ids=str
)
@pytest.mark.parametrize("clip", [True, False])
def test_loop_has_the_bits_of_the_reference_update(shape, settings, clip):
    schedule = Schedule(clip_sample=clip)
    table = schedule.table(7, **settings)
    address = noise.address(3, [5, 2])
    x = noise.normal(address, shape, stream=noise.START, t=1000)
    for k in reversed(range(7)):
        t = table.timesteps[k].long().expand(2)
        z = noise.normal(address, shape, stream=noise.STEP, t=t)
        x = update(x, elementwise(x, t), table.rows[k], z, clip=clip)
    got = Sampler(elementwise, schedule, shape=shape).sample([5, 2], seed=3, steps=7, progress=False, **settings)
    assert torch.equal(got, x)


@pytest.mark.parametrize("clip", [True, False])
def test_whole_run_is_algorithm_2(clip):
    """All 1000 steps are as accurate as the paper's formulas in float32, judged by the formulas in float64."""
    schedule = Schedule(clip_sample=clip)
    address, shape = noise.address(0, 4), (2, 3)
    process = Diffusion(schedule.betas)

    def textbook(dtype):
        x_T = noise.normal(address, shape, stream=noise.START, t=1000).to(dtype)
        draw = lambda t: noise.normal(address, shape, stream=noise.STEP, t=t).to(dtype)
        return process.sample(elementwise, x_T, draw, clip=1.0 if clip else None)

    ours = Sampler(elementwise, schedule, shape=shape).sample(4, progress=False)
    assert_as_accurate(ours, textbook(torch.float32), textbook(torch.float64))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_whole_run_is_as_accurate_as_diffusers(unet, precision):
    """U-Net, table and loop together, given the same noise; diffusers in float64 judges."""
    schedule, address, shape = Schedule(), noise.address(1, 16), (1, 8, 8)

    @torch.no_grad()
    def diffusers(net_dtype, state_dtype, monkeypatch):
        net, scheduler = UNet2DModel(**SMALL).eval(), DDPMScheduler()
        net.load_state_dict(unet.state_dict())
        for parameter in net.parameters():
            parameter.data = parameter.to(net_dtype)
        scheduler.alphas_cumprod = schedule.alphas_cumprod.to(state_dtype)  # diffusers' own is rounded to float32
        scheduler.set_timesteps(20)
        x = noise.normal(address, shape, stream=noise.START, t=1000).to(state_dtype)
        for t in scheduler.timesteps:
            z = noise.normal(address, shape, stream=noise.STEP, t=int(t)).to(state_dtype)
            monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, z=z, **kwargs: z)
            m = net(x.to(net_dtype), t).sample.to(state_dtype)
            x = scheduler.step(m, t, x).prev_sample
        return x

    with pytest.MonkeyPatch.context() as patch:
        plain = diffusers(PRECISIONS[precision], torch.float32, patch)
        exact = diffusers(torch.float64, torch.float64, patch)
    ours = Sampler(unet, schedule, precision=precision).sample(16, seed=1, steps=20, progress=False)
    if precision == "fp32":
        assert_as_accurate(ours, plain, exact)
    else:  # over 20 steps of bf16 the largest of the errors is chance: 1.0 to 2.2 times plain diffusers', by the seed
        assert root_mean_square(ours - exact) <= 2 * root_mean_square(plain - exact)


def test_samples_of_gaussian_data_have_its_mean_and_covariance():
    """With the optimal eps-model of N(mean, var), samples have this mean and variance, apart from the known bias."""
    mean, var, T = torch.tensor([0.6, -0.2]), torch.tensor([0.09, 0.25]), 1000
    schedule = Schedule(clip_sample=False)
    abar = schedule.alphas_cumprod.float()

    def optimal(x, t):
        signal = abar[t][:, None]
        return (1 - signal).sqrt() * (x - signal.sqrt() * mean) / (signal * var + 1 - signal)

    def propagated():
        """Mean and variance of the samples in exact arithmetic: every step is affine in x."""
        m, v = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        abar, abar_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        for t in reversed(range(T)):
            slope = (1 - abar[t]).sqrt() / (abar[t] * var.double() + 1 - abar[t])
            scale = (1 - schedule.betas[t] / (1 - abar[t]).sqrt() * slope) / schedule.alphas[t].sqrt()
            shift = schedule.betas[t] / (1 - abar[t]).sqrt() * slope * abar[t].sqrt() / schedule.alphas[t].sqrt()
            m = scale * m + shift * mean.double()
            v = scale**2 * v + (schedule.betas[t] * (1 - abar_prev[t]) / (1 - abar[t]) if t else 0)
        return m, v

    m, v = propagated()
    n = 4000
    x = Sampler(optimal, schedule, shape=(2,)).sample(n, progress=False, batch_size=n).double()
    five_sigma = 5.0  # P < 6e-7 for each of the four numbers
    assert ((x.mean(0) - m).abs() <= five_sigma * (v / n).sqrt()).all()
    assert ((x.var(0) - v).abs() <= five_sigma * v * math.sqrt(2 / n)).all()
    assert ((m - mean).abs() <= 0.01 * mean.abs()).all()
    assert ((v - var).abs() <= 0.05 * var).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_sample_does_not_depend_on_its_batch(shape):
    sampler = Sampler(elementwise, shape=shape)
    together = sampler.sample(7, seed=11, steps=5, progress=False)
    for size in (1, 2, 3):
        assert torch.equal(sampler.sample(7, seed=11, steps=5, batch_size=size, progress=False), together)
    assert torch.equal(sampler.sample([6, 0, 3], seed=11, steps=5, progress=False), together[[6, 0, 3]])
    assert not torch.equal(sampler.sample(7, seed=12, steps=5, progress=False), together)


def test_noise_does_not_depend_on_the_batch(unet):
    """The network's first input and every z have the same bits, whatever the network rounds."""
    seen = {}

    def recording(x, t):
        seen.setdefault(int(t[0]), []).append(x.clone())
        return torch.zeros_like(x)

    for size in (1, 4):
        Sampler(recording, shape=(1, 8, 8)).sample(4, steps=10, batch_size=size, progress=False)
    for states in seen.values():
        assert torch.equal(torch.cat(states[:4]), states[4])


@pytest.mark.parametrize("clip", [True, False])
def test_callback_sees_x_0_and_by_name_x_t(clip):
    schedule, calls, states = Schedule(clip_sample=clip), [], []
    sampler = Sampler(elementwise, schedule, shape=(2, 3))
    plain = sampler.sample(3, steps=4, progress=False)
    watched = sampler.sample(3, steps=4, progress=False, batch_size=2, callback=lambda *seen: calls.append(seen))
    assert torch.equal(plain, watched)
    assert [call[:2] for call in calls] == 2 * [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert [call[3].tolist() for call in calls] == 4 * [[0, 1]] + 4 * [[2]]
    if clip:  # the last step returns x_0 itself, unclipped but for its rounding
        assert torch.equal(torch.cat([calls[3][2], calls[7][2]]), plain)
    x_T = noise.normal(noise.address(0, 2), (2, 3), stream=noise.START, t=1000)
    exact = Diffusion(schedule.betas).predicted_x_0(x_T.double(), 750, elementwise(x_T, torch.tensor([750, 750])))
    plain_x_0 = Diffusion(schedule.betas).predicted_x_0(x_T, 750, elementwise(x_T, torch.tensor([750, 750])))
    bound = (lambda x: x.clamp(-1, 1)) if clip else (lambda x: x)
    assert_as_accurate(calls[0][2], bound(plain_x_0), bound(exact))
    keep = lambda step, t, x_0, indices, x_t: states.append(x_t)
    assert torch.equal(sampler.sample(3, steps=4, progress=False, batch_size=2, callback=keep), plain)
    assert torch.equal(states[0], x_T)
    assert [tuple(x_t.shape) for x_t in states] == 4 * [(2, 2, 3)] + 4 * [(1, 2, 3)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_invariant_samples_have_the_same_bits(unet, precision):
    """Even if the network's rounding depends on the size of a batch and on the entry."""
    sampler = Sampler(unet, device="cpu", precision=precision, batch_invariant=4)
    settings = {"seed": 3, "steps": 4, "progress": False}
    samples = [0, 1, 2, 3, 4, 7, 9, 2**40 + 2]
    alone = {sample: sampler.sample([sample], **settings)[0] for sample in samples}
    for asked in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 9, 0, 4], [7, 3], samples, [2**40 + 2, 2, 2, 7, 2], samples[::-1]):
        for batch_size in (1, 3, None):
            x = sampler.sample(asked, batch_size=batch_size, **settings)
            assert torch.equal(x, torch.stack([alone[sample] for sample in asked])), (asked, batch_size)


def test_batch_invariance_with_a_network_that_depends_on_its_batch():
    minding = lambda x, t: x * 0.9 + len(x) * 0.01 + torch.arange(len(x))[:, None] * 0.1
    settings, equal = {"steps": 3, "progress": False}, []
    for invariant in (3, False):
        sampler = Sampler(minding, shape=(2,), device="cpu", batch_invariant=invariant)
        equal += [torch.equal(sampler.sample([5, 1, 7], **settings)[1], sampler.sample([1], **settings)[0])]
    assert equal == [True, False]


def test_batch_invariance_does_not_mix_labels():
    torch.manual_seed(0)
    net = UNet2D(**SMALL, num_class_embeds=3)
    sampler, settings = Sampler(net, device="cpu", batch_invariant=2), {"steps": 3, "progress": False}
    asked, labels = [0, 0, 1, 4, 0], [2, 1, 0, 1, 2]
    x = sampler.sample(asked, class_labels=labels, **settings)
    for place, (sample, label) in enumerate(zip(asked, labels, strict=True)):
        assert torch.equal(x[place], sampler.sample([sample], class_labels=[label], **settings)[0])


def batches_of(sampler, samples, **settings):
    """(sample indices, first value of each sample) of each batch."""
    batches = sampler.batches(samples, steps=2, progress=False, **settings)
    return [(indices.tolist(), x[:, 0].tolist()) for indices, x in batches]


def test_batches_are_in_the_order_requested():
    plain = Sampler(elementwise, shape=(1,), device="cpu")
    fixed = Sampler(elementwise, shape=(1,), device="cpu", batch_invariant=4)
    one = lambda sample: plain.sample([sample], steps=2, progress=False).item()
    assert [indices for indices, _ in batches_of(fixed, range(3, 12))] == [[3, 4, 5, 6], [7, 8, 9, 10], [11]]
    asked = [0, 4, 8, 1, 5, 2, 3]
    handed = batches_of(fixed, asked)
    assert [indices for indices, _ in handed] == [[0], [4], [8, 1, 5, 2, 3]]  # samples 0, 4 and 8 all need entry 0
    for indices, numbers in handed:
        assert numbers == [one(sample) for sample in indices]


def test_empty_entries_are_neither_returned_nor_watched():
    """Sample 1 becomes NaN; three entries of the micro-batch are empty."""
    seen = []
    sampler = Sampler(elementwise, shape=(2,), device="cpu", batch_invariant=4)
    sampler.sample([1], steps=2, progress=False, callback=lambda step, t, x_0, indices: seen.append((x_0, indices)))
    assert [(tuple(x_0.shape), indices.tolist()) for x_0, indices in seen] == 2 * [((1, 2), [1])]
    sampler = Sampler(lambda x, t: x / 0, shape=(2,), device="cpu", batch_invariant=4)
    with pytest.raises(ValueError, match=r"for samples \[1\];"):
        sampler.sample([1], steps=2, progress=False)


def hungry(limit):
    """A network that runs out of memory for more than `limit` samples."""

    def model(x, t):
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines")
        return elementwise(x, t)

    return model


def test_batch_is_halved_when_memory_runs_out(capsys):
    sampler = Sampler(hungry(3), shape=(2,), device="cpu")
    want = Sampler(elementwise, shape=(2,), device="cpu").sample(11, steps=3, progress=False)
    with pytest.warns(UserWarning, match="out of memory; continuing with batches of") as warned:
        sizes = [len(x) for _, x in sampler.batches(11, steps=3, batch_size=8)]
    assert [str(w.message).partition(".")[0] for w in warned] == [
        f"out of memory; continuing with batches of {size}" for size in (4, 2)
    ]
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert "18/18" in capsys.readouterr().err
    assert torch.equal(sampler.sample(11, steps=3, batch_size=4, progress=False), want)


def test_kept_buffers_are_freed_before_the_batch_is_halved(monkeypatch):
    sampler = Sampler(hungry(8), shape=(2,), device="cpu")
    sampler.sample(2, steps=2, progress=False)
    kept, model = dict(sampler.engine._idle), hungry(8)
    network = lambda x, t: model(torch.cat([x, x]) if sampler.engine._idle else x, t)[: len(x)]
    monkeypatch.setattr(sampler.engine.prepared, "model", network)
    monkeypatch.setattr(sampler.engine.prepared, "forward", network)
    assert kept
    assert len(sampler.sample(6, steps=2, batch_size=6, progress=False)) == 6  # and no warning


def sizes_of(limit):
    """The sizes of the batches that a network was called with, and the network: `hungry(limit)`."""
    sizes, model = [], hungry(limit)
    return sizes, lambda x, t: sizes.append(len(x)) or model(x, t)


def test_halved_batch_size_is_kept():
    """In later calls of the same sampler, too; a smaller batch_size still applies."""
    sizes, model = sizes_of(3)
    sampler, settings = Sampler(model, shape=(2,), device="cpu"), {"steps": 1, "progress": False}
    want = Sampler(elementwise, shape=(2,), device="cpu").sample(11, **settings)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(sampler.sample(11, batch_size=8, **settings), want)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    for batch_size, again in ((8, [2, 2, 2, 2, 2, 1]), (None, [2, 2, 2, 2, 2, 1]), (1, [1] * 11)):
        sizes.clear()
        assert torch.equal(sampler.sample(11, batch_size=batch_size, **settings), want)
        assert sizes == again


def test_batch_that_fits_after_freeing_memory_is_not_halved():
    """The short last batch fails at first. The full batches before it fit, also in the next call."""
    sizes, failures = [], []

    def model(x, t):
        sizes.append(len(x))
        if len(x) == 3 and sampler.engine._idle:  # the buffers for batches of 4 take the memory
            failures.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return elementwise(x, t)

    sampler, settings = Sampler(model, shape=(2,), device="cpu"), {"steps": 1, "progress": False, "batch_size": 4}
    for _ in range(2):
        sizes.clear()
        sampler.sample(11, **settings)  # and no warning
        assert sizes[:2] == [4, 4]
        assert set(sizes[2:]) == {3}
    assert failures


def progress_calls(sampler, samples, **settings):
    """The arguments of each call of progress, and the samples."""
    calls = []
    return calls, sampler.sample(samples, progress=lambda *args: calls.append(args), **settings)


def test_progress_gets_steps_and_samples(capsys):
    """One call for each step, with the number of samples in its batch; no bar is shown."""
    sampler = Sampler(elementwise, shape=(2,), device="cpu")
    calls, x = progress_calls(sampler, 5, steps=3, batch_size=2)
    assert calls == [(1, 2)] * 6 + [(1, 1)] * 3
    assert torch.equal(x, sampler.sample(5, steps=3, progress=False))
    assert progress_calls(sampler, 0, steps=3)[0] == []
    assert capsys.readouterr().err == ""


def test_progress_does_not_count_empty_entries():
    sampler = Sampler(elementwise, shape=(2,), device="cpu", batch_invariant=4)
    assert progress_calls(sampler, [0, 1, 4], steps=2)[0] == [(1, 2)] * 2 + [(1, 1)] * 2


def test_progress_works_with_a_callback():
    sampler = Sampler(elementwise, shape=(2,), device="cpu")
    assert progress_calls(sampler, 3, steps=2, callback=lambda *_: None)[0] == [(1, 3)] * 2


def test_progress_counts_steps_that_ran_out_of_memory():
    sampler = Sampler(hungry(2), shape=(2,), device="cpu")
    with pytest.warns(UserWarning, match="out of memory"):
        assert progress_calls(sampler, 4, steps=2)[0] == [(1, 2)] * 4


def test_error_in_progress_ends_the_run():
    sizes, model = sizes_of(9)

    def stop(steps, samples):
        if len(sizes) == 3:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        Sampler(model, shape=(2,), device="cpu").sample(4, steps=5, progress=stop)
    assert len(sizes) == 3


def test_progress_does_not_count_a_failed_step():
    calls = []
    with pytest.raises(ValueError, match="step 3 of 4"):
        Sampler(fails_at(250, lambda eps: eps / 0), shape=(3,), device="cpu").sample(
            2, steps=4, progress=lambda *args: calls.append(args)
        )
    assert calls == [(1, 2)] * 2


@pytest.mark.parametrize(
    ("options", "way_out"),
    [({}, "; use fp16 or bf16"), ({"batch_invariant": 8}, "; use batch_invariant=4 (with other bits)")],
    ids=str,
)
def test_batch_of_one_without_memory_is_an_error(options, way_out):
    sampler = Sampler(hungry(0), shape=(2,), device="cpu", **options)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        sampler.sample(1, steps=2, progress=False)
    assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


def test_uint8_images(unet):
    sampler = Sampler(unet)
    x = sampler.sample(3, steps=3, progress=False)
    assert (x.dtype, x.shape) == (torch.float32, (3, 1, 8, 8))
    assert x.abs().max() <= 1
    images = sampler.sample(3, steps=3, progress=False, output="uint8")
    assert torch.equal(images, to_uint8(x))


def test_default_precision_depends_on_the_device(unet, monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert Sampler(unet, device="cpu").dtype == dtype
        assert Sampler(elementwise, shape=(2,), device="cpu").dtype == torch.float32
        assert Sampler(unet, device="cpu", precision="bf16").dtype == torch.bfloat16


def test_default_batch_size_depends_on_the_sample_size():
    sizes = {(3, 32, 32): 64, (3, 256, 256): 1, (3, 1024, 1024): 1, (5,): 256, (1, 4, 4): 256}
    assert {shape: Sampler(elementwise, shape=shape, device="cpu").default_batch_size() for shape in sizes} == sizes
    fixed = {(3, 32, 32): 4, (3, 256, 256): 1, (5,): 16}
    for shape, size in fixed.items():
        sampler = Sampler(elementwise, shape=shape, device="cpu", batch_invariant=True)
        assert sampler.micro_batch == size
        assert len(sampler.sample(3, steps=1, progress=False)) == 3


class Untimed(torch.nn.Module):
    """A network that ignores t."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def test_network_is_in_eval_mode_and_then_in_its_previous_mode():
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4).eval())
    modes = []

    def record(module, args, output):
        modes.append(module.training)

    net[0].register_forward_hook(record)

    model = Untimed(net)
    Sampler(model, shape=(4,)).sample(2, steps=2, progress=False)
    assert modes == [False, False]
    assert [part.training for part in (model, net, net[0], net[1])] == [True, True, True, False]


def test_interleaved_runs_restore_the_mode_of_a_network():
    net = torch.nn.Dropout(0.5)
    net.seen = []
    net.register_forward_hook(lambda module, args, out: net.seen.append(module.training))

    model = Untimed(net)
    sampler, settings = Sampler(model, shape=(4,)), {"steps": 2, "batch_size": 1, "progress": False}
    first, second = sampler.batches(2, **settings), sampler.batches(3, **settings)
    next(first), next(second)
    list(first)
    assert not model.training
    list(second)
    assert net.seen == [False] * 10
    assert model.training
    assert net.training


def test_network_and_callback_cannot_change_the_state():
    def careless(x, t):
        m = elementwise(x, t)
        x.zero_()
        return m

    def spoil(step, t, x_0, indices, x_t):
        x_t.zero_()
        x_0.zero_()
        indices.add_(100)

    settings = {"steps": 5, "progress": False}
    want = Sampler(elementwise, shape=(3,)).sample(2, **settings)
    assert torch.equal(Sampler(careless, shape=(3,)).sample(2, callback=spoil, **settings), want)


def test_numpy_and_torch_integers_are_accepted():
    sampler, settings = Sampler(elementwise, shape=np.array([3])), {"steps": 2, "progress": False}
    want = sampler.sample(range(1, 3), seed=4, **settings)
    for given in (np.array([1, 2]), torch.tensor([1, 2], dtype=torch.int32), (i for i in (1, 2))):
        assert torch.equal(sampler.sample(given, seed=np.int64(4), **settings), want)
    assert torch.equal(sampler.sample(np.int64(3), seed=4, **settings)[1:], want)


def test_arguments_are_checked_before_the_first_batch():
    with pytest.raises(ValueError, match="steps is 0"):
        Sampler(elementwise, shape=(3,)).batches(2, steps=0)


def test_no_samples(unet):
    assert Sampler(unet).sample(0, progress=False).shape == (0, 1, 8, 8)


def test_changed_weights_are_used_and_the_model_is_unchanged():
    net = tiny_unet().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sampler = Sampler(net, precision="fp32")
    first = sampler.sample(2, steps=3, progress=False)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with torch.no_grad():
        net.conv_out.weight.mul_(1.5)
    changed = sampler.sample(2, steps=3, progress=False)
    assert not torch.equal(first, changed)
    assert torch.equal(changed, Sampler(net, precision="fp32").sample(2, steps=3, progress=False))


def test_class_labels():
    torch.manual_seed(0)
    net = UNet2D(**SMALL, num_class_embeds=3)
    sampler = Sampler(net, precision="fp32")
    settings = {"steps": 3, "progress": False}
    mixed = sampler.sample(4, class_labels=[0, 1, 2, 1], batch_size=2, **settings)
    for label in range(3):
        alone = sampler.sample(4, class_labels=[label] * 4, batch_size=2, **settings)
        same = torch.tensor([0, 1, 2, 1]) == label
        assert torch.equal(mixed[same], alone[same])
        assert not torch.equal(mixed[~same], alone[~same])
    for labels in (np.array([0, 1, 2, 1]), torch.tensor([0, 1, 2, 1], dtype=torch.uint8), (i for i in (0, 1, 2, 1))):
        assert torch.equal(sampler.sample(4, class_labels=labels, batch_size=2, **settings), mixed)
    for wrong in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, -1], [0.0, 1, 2, 1], [True] * 4):
        with pytest.raises(ValueError, match="class_labels are"):
            sampler.sample(4, class_labels=wrong, **settings)
    with pytest.raises(ValueError, match="class_labels were given, but the model is not"):
        Sampler(tiny_unet()).sample(2, class_labels=[0, 1], **settings)
    with pytest.raises(ValueError, match="class-conditional; pass class_labels"):
        sampler.sample(4, **settings)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_precision_autocasts_other_networks(precision):
    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    seen = []

    def model(x, t):
        seen.append((x.dtype, conv(x).dtype))
        return conv(x)

    Sampler(model, shape=(1, 8, 8), precision=precision).sample(1, steps=1, progress=False)
    Sampler(model, shape=(1, 8, 8)).sample(1, steps=1, progress=False)
    assert seen == [(torch.float32, PRECISIONS[precision]), (torch.float32, torch.float32)]


def test_progress_bar_can_be_switched_off(capsys):
    sampler = Sampler(elementwise, shape=(2,))
    sampler.sample(3, steps=4, batch_size=2)
    assert "8/8" in capsys.readouterr().err
    sampler.sample(3, steps=4, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "labels", "shape", "megabytes"),
    [
        ("fashion-mnist", None, (1, 28, 28), 6),
        ("fashion-mnist-classes", [0, 9], (1, 28, 28), 6),
        ("spoken-digits", [0, 9], (128, 96), 8),
        ("names", None, (16, 16), 4),
    ],
)
def test_the_shipped_models_sample(name, labels, shape, megabytes):
    assert sum(file.stat().st_size for file in shipped_model(name).rglob("*")) <= 1_000_000 * megabytes
    assert Sampler.from_pretrained(name).sample(2, steps=2, class_labels=labels, progress=False).shape == (2, *shape)


def test_each_shipped_model_is_tested():
    assert SHIPPED_MODELS == ("fashion-mnist", "fashion-mnist-classes", "spoken-digits", "names")
    assert {folder.name for folder in shipped_model().parent.iterdir()} == {*SHIPPED_MODELS, "fashion-mnist-classifier"}


def test_a_build_may_leave_a_model_out(monkeypatch, tmp_path):
    monkeypatch.setitem(shipped.FOLDERS, "spoken-digits", tmp_path / "no")
    with pytest.raises(ValueError, match="this build of fastddpm lacks the model 'spoken-digits'; install a build"):
        Sampler.from_pretrained("spoken-digits")


@pytest.mark.slow
def test_the_shipped_model_draws_the_class_that_it_is_asked_for():
    sampler, labels = Sampler.from_pretrained("fashion-mnist-classes"), torch.arange(20) % 10
    x = sampler.sample(20, class_labels=labels, sampler="ddim", steps=25, guidance_scale=2, progress=False)
    recognised = shipped_classifier()(x.contiguous(memory_format=torch.channels_last)).argmax(1)
    look_alike = (labels == 2) | (labels == 4) | (labels == 6)  # pullover, coat and shirt
    assert (recognised == labels)[~look_alike].sum() >= 13


def fails_at(t_bad, result):
    """A network that returns result(eps) at one timestep."""
    return lambda x, t: result(torch.zeros_like(x)) if int(t[0]) == t_bad else torch.zeros_like(x)


def nan_in_sample_1(eps):
    eps[1, 0] = math.nan
    return eps


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (nan_in_sample_1, r"^step 3 of 4 \(t = 250\): the network returned NaN or infinity for samples \[8\];"),
        (lambda eps: eps / 0, r"^step 3 of 4 \(t = 250\): the network returned NaN or infinity for samples \[7, 8\]"),
        (lambda eps: eps.double() + 1e300, r"^step 3 of 4 \(t = 250\): the network returned NaN or infinity"),
        (lambda eps: eps[:, :1], r"^step 3 of 4 \(t = 250\): the network returned \(2, 1\) torch.float32 on cpu for"),
        (lambda eps: (), r"^step 3 of 4 \(t = 250\): the network returned a tuple for \(2, 3\)"),
        (lambda eps: {"sample": eps}, r"^step 3 of 4 \(t = 250\): the network returned a dict for"),
        (lambda eps: None, r"^step 3 of 4 \(t = 250\): the network returned a NoneType for"),
        (lambda eps: eps.to_sparse(), r"^step 3 of 4 \(t = 250\): the network returned a torch.sparse_coo tensor"),
        (lambda eps: eps.to("meta"), r"^step 3 of 4 \(t = 250\): the network returned .* on meta for"),
        (lambda eps: eps + 1j, r"^step 3 of 4 \(t = 250\): the network returned \(2, 3\) torch.complex64"),
        (
            lambda eps: torch.nested.as_nested_tensor(list(eps), layout=torch.jagged),
            r"^step 3 of 4 \(t = 250\): the network returned a torch.jagged tensor",
        ),
        (lambda eps: eps.int(), r"^step 3 of 4 \(t = 250\): the network returned \(2, 3\) torch.int32"),
    ],
    ids=["nan", "all-nan", "range", "shape", "tuple", "dict", "none", "sparse", "meta", "complex", "nested", "dtype"],
)
def test_wrong_network_output_names_the_step(result, message):
    with pytest.raises(ValueError, match=message):
        Sampler(fails_at(250, result), shape=(3,)).sample([7, 8], steps=4, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": -1}, "samples is -1"),
        ({"samples": None}, "samples is None; want a number of samples, or a list of sample indices"),
        ({"class_labels": 0}, "class_labels were given, but the model is not a class-conditional UNet2D"),
        ({"callback": 0}, r"callback is 0; want a function, called as callback\(step, t, x_0, indices\), or None"),
        ({"progress": 3}, "progress is 3; want True or False, or a function"),
        ({"class_label": [0]}, r"^Sampler.sample: there is no argument 'class_label'; did you mean 'class_labels'\?"),
        ({"samples": 1.5}, "samples is 1.5"),
        ({"samples": [-1]}, "sample index is -1"),
        ({"samples": [0.5]}, "sample index is 0.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"sampler": "pndm"}, "sampler is 'pndm'"),
        ({"eta": -1.0, "sampler": "ddim"}, "eta is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"output": "pil"}, "output is 'pil'"),
        ({"output": "uint8"}, "output is 'uint8', but a sample is"),
        ({"class_labels": [1]}, "class_labels were given"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Sampler(elementwise, shape=(2,)).sample(**{"samples": 1, "steps": 2, "progress": False, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [0, "ab", len, [0.5, 1], [None, None], [1 << 70, 0], torch.zeros(2)], ids=repr)
def test_bad_class_labels(labels):
    sampler = Sampler(UNet2D(**SMALL, num_class_embeds=3), device="cpu")
    with pytest.raises(ValueError, match=r"^class_labels are .*; want whole numbers, 0 <= label < 3, one per sample"):
        sampler.sample(2, steps=2, progress=False, class_labels=labels)


@pytest.mark.parametrize("source", [0, 1.5, [], b"x", True, nn.Identity()], ids=str)
def test_bad_checkpoints(source):
    with pytest.raises(ValueError, match=r"^the checkpoint is .*; want a folder, one of fashion-mnist, "):
        Sampler.from_pretrained(source, device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sampler(), "Sampler: missing a required argument: 'model'; want model, schedule, shape"),
        (lambda: Sampler.from_pretrained(precison="fp32"), "there is no argument 'precison'; did you mean 'precision'"),
        (lambda: Schedule(beta_strat=1), "Schedule: there is no argument 'beta_strat'; did you mean 'beta_start'"),
        (lambda: Schedule().table(step=3), "Schedule.table: there is no argument 'step'; did you mean 'steps'"),
        (lambda: Schedule().timesteps(5, 6), "Schedule.timesteps: too many positional arguments; want steps"),
        (lambda: Schedule.from_config(), "Schedule.from_config: missing a required argument: 'config'"),
        (lambda: noise.address(0), "address: missing a required argument: 'samples'; want seed, samples, device"),
        (lambda: noise.address(0, 3, "tpu"), "device is 'tpu'; want 'cpu', 'cuda' or 'cuda:N'"),
        (
            lambda: noise.normal(noise.address(0, 3), (2,), t=0, steam=1),
            "normal: there is no argument 'steam'; did you",
        ),
        (lambda: noise.normal(noise.address(0, 3), {2: 3}.values(), t=0, stream="a"), "stream is 'a'"),
    ],
)
def test_calls_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("model", [lambda x: x, lambda *, x, t: x, nn.Identity(), nn.Linear(2, 2)])
def test_a_network_that_takes_other_arguments(model):
    with pytest.raises(ValueError, match=r"^the network cannot be called as model\(x_t, t\) \("):
        Sampler(model, shape=(2,), device="cpu").sample(1, steps=2, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model is 3"),
        ({"shape": None}, "shape is missing"),
        ({"shape": (0, 2)}, r"shape is \(0, 2\)"),
        ({"shape": ()}, r"shape is \(\)"),
        ({"shape": 5}, "shape is 5"),
        ({"shape": (2.5,)}, r"shape is \(2.5,\)"),
        ({"shape": (True, 2)}, r"shape is \(True, 2\)"),
        ({"schedule": DDPMScheduler()}, r"schedule is a DDPMScheduler; want a Schedule: Schedule.from_config"),
        ({"precision": "fp8"}, "precision is 'fp8'; want one of auto, fp32, tf32, bf16, fp16"),
        ({"precision": "tf32", "device": "cpu"}, "precision is 'tf32', which 'cpu' does not have; use fp32 or bf16"),
        ({"batch_invariant": 0}, "batch_invariant is 0; want True, False or a whole number, 1 to 1048576"),
        ({"batch_invariant": "yes"}, "batch_invariant is 'yes'"),
        ({"device": "tpu9"}, "device is 'tpu9'"),
        ({"device": 1.5}, "device is 1.5; want 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": True}, "device is True; want 'cpu', 'cuda' or 'cuda:N'"),
        (
            {"sedule": Schedule()},
            r"^Sampler: there is no argument 'sedule'; did you mean 'schedule'\?; want model, sch",
        ),
        ({"engine": None}, "engine is None; want one of auto, eager"),
        ({"precision": torch.float16}, "precision is torch.float16; want one of auto, fp32"),
        ({"model": nn.Linear}, "model is <class 'torch.nn.modules.linear.Linear'>; want a network"),
        ({"device": "meta"}, "device is 'meta'"),
    ],
    ids=str,
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**{"model": elementwise, "shape": (2,), **arguments})
