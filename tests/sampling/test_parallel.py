"""Sampling parallel in time: the bits of the loop with every condition, or its distribution; refills and refusals."""

import re
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fastddpm import Rounds, Sampler, Schedule, UNet2D, ops
from fastddpm.sampling import job
from fastddpm.sampling.chains import Chains
from fastddpm.storage.shards import ShardFolder
from tests.support.check import TINY, error_line
from tests.support.graphs import graphed
from tests.support.kinds import KINDS, SAMPLES, SCHEDULE, SHAPE, Kind, N, Net, T, draw, expected, sampler_of

SEQUENTIAL = ("resample", "x_0_fn", "everything")
PARALLEL = [name for name in KINDS if name not in SEQUENTIAL]
FIXED = [name for name in PARALLEL if "variance" not in name]
MODES = [*((name, "bits") for name in PARALLEL), *((name, "law") for name in FIXED)]
RECORDED = ("model_kwargs", "concat", "guided variance", "known")  # recordings are slow
BITS = {"parallel": "bits", "window": 5, "batch_size": 2}  # two chains draw five samples


def reference(kind: Kind):
    """The loop of the reference, with a network that reads x_t in bfloat16."""
    of_rounded = lambda net: lambda x, t: net(x.bfloat16().float(), t)
    options = dict(kind.reference)
    if "unconditional" in options:
        options["unconditional"] = of_rounded(options["unconditional"])
    return expected(replace(kind, model=of_rounded(kind.model or kind.net), reference=options))


class ReadsBfloat16(nn.Module):
    """A network that rounds x_t itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x.bfloat16().float(), t)


def tiny_unet(**config):
    torch.manual_seed(0)
    net = UNet2D(**TINY | config)
    with torch.no_grad():
        net.conv_out.weight.normal_(0, 0.03)
    return net


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", PARALLEL)
def test_one_step_per_round_equals_the_reference(name, backend):
    kind = KINDS[name]
    with ops.forced_backend(backend):
        assert torch.equal(draw(sampler_of(kind), kind, window=5, batch_size=2), reference(kind))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", PARALLEL)
def test_bits_are_those_of_the_loop(name, backend):
    """The network computes each element on its own, so that the layout of the loop does not matter."""
    kind, S = KINDS[name], len(KINDS[name].table or KINDS[name].schedule.table())
    want = reference(kind)
    with ops.forced_backend(backend):
        for window in (1, 3) if backend == "torch" else (1, 3, 40):
            rounds = Rounds()
            assert torch.equal(draw(sampler_of(kind), kind, **BITS | {"window": window, "rounds": rounds}), want)
            assert [sum(rounds.steps[sample]) for sample in SAMPLES] == [S] * N
            assert rounds.steps_per_round > 1 or window == 1 or name in ("start", "init")  # few, large steps


TABLES = {
    "ddpm": (Schedule(), {"timesteps": range(24, -1, -1)}),
    "strided": (Schedule(clip_sample=False), {"timesteps": range(80, -1, -4)}),
    "ddim": (Schedule(clip_sample=False), {"sampler": "ddim"}),
    "ddim clipped": (Schedule(use_clipped_model_output=True), {"sampler": "ddim"}),
    "ddim with noise": (Schedule(), {"sampler": "ddim", "eta": 1.0}),
    "x_0": (Schedule(prediction_type="sample"), {}),
    "v": (Schedule(prediction_type="v_prediction", clip_sample=False), {}),
    "few rows": (Schedule(), {"timesteps": [2, 1, 0]}),
    "no noise": (Schedule(), {"noise": False}),
}


@pytest.mark.parametrize("name", TABLES)
def test_unet_in_mode_bits_equals_off_in_the_same_layout(name):
    """A `UNet2D`, whose result for an entry may depend on its place in the batch."""
    schedule, steps = TABLES[name]
    steps = {"timesteps": range(40, -1, -2)} | steps
    start = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"seed": 2, "window": 4, "batch_size": 2, "progress": False, "start": start, **steps}
    options["start_timestep"] = steps["timesteps"][0]
    sampler, rounds = Sampler(tiny_unet(), schedule, device="cpu", precision="fp32"), Rounds()
    want = sampler.sample([4, 0, 9], **options)
    assert torch.equal(sampler.sample([4, 0, 9], parallel="bits", rounds=rounds, **options), want)
    assert rounds.steps_per_round > 1 or name == "few rows"


def test_class_labels_and_guidance_of_a_unet():
    sampler = Sampler(tiny_unet(num_class_embeds=4), device="cpu", precision="fp32")
    given = {"class_labels": [3, 1, 2], "guidance_scale": 2.5, "uncond_kwargs": {"class_labels": 0}}
    options = {"steps": 12, "window": 4, "batch_size": 2, "progress": False, **given}
    want = sampler.sample(3, **options)
    assert torch.equal(sampler.sample(3, parallel="bits", **options), want)
    assert not torch.equal(sampler.sample(3, parallel="bits", **options | {"class_labels": [3, 1, 0]}), want)


@pytest.mark.parametrize(("name", "mode"), [pair for pair in MODES if pair[0] in RECORDED])
def test_one_graph_serves_every_round_and_the_next_call(graphs, name, mode):
    kind = KINDS[name]
    options = BITS | {"parallel": mode, "window": 3}
    sampler, want = graphed(kind.net, kind.schedule, shape=SHAPE), draw(sampler_of(kind), kind, **options)
    assert torch.equal(draw(sampler, kind, **options), want)
    assert torch.equal(draw(sampler, kind, **options), want)
    assert len(graphs) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("name", "mode"), MODES)
def test_graph_on_a_gpu_has_the_bits_of_eager_rounds(name, mode):
    kind = KINDS[name]
    on_gpu = {"shape": SHAPE, "device": "cuda"}
    samplers = [Sampler(kind.net, kind.schedule, engine=engine, **on_gpu) for engine in ("eager", "graph")]
    one, other = (draw(sampler, kind, **BITS | {"parallel": mode}) for sampler in samplers)
    assert torch.equal(one, other)
    assert torch.equal(draw(samplers[1], kind, **BITS | {"parallel": "off"}), one) or mode == "law"


@pytest.mark.parametrize("name", FIXED)
def test_law_of_one_slot_has_the_bits_of_the_loop(name):
    kind = KINDS[name]
    assert torch.equal(draw(sampler_of(kind), kind, parallel="law", window=1), draw(sampler_of(kind), kind))


@pytest.mark.parametrize("name", FIXED)
def test_law_depends_on_no_other_sample(name):
    kind, options = KINDS[name], {"parallel": "law", "window": 4}
    want = draw(sampler_of(kind), kind, **options, batch_size=2)
    assert torch.equal(draw(sampler_of(kind), kind, **options, batch_size=N), want)
    assert torch.equal(draw(sampler_of(kind), kind, [3], **options), want[3:4])
    if name == "known":
        mask = kind.options["mask"].expand(N, *SHAPE)
        assert torch.equal(want[mask], kind.options["known"][mask])


class Linear(nn.Module):
    """The optimal network for data from N(mean, std^2) in every element."""

    MEAN, STD = 0.7, 0.5

    def __init__(self, schedule):
        super().__init__()
        self.register_buffer("abar", schedule.alphas_cumprod.float())
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        abar = self.abar[t].view(-1, 1)
        noise_var = 1 - abar
        return noise_var.sqrt() * (x - abar.sqrt() * self.MEAN) / (abar * self.STD**2 + noise_var) * self.weight


def test_law_is_exact_for_gaussian_data():
    """Every element of x_0 is normal, and its mean and variance are known: the steps are linear."""
    schedule = Schedule(num_train_timesteps=60, beta_end=0.3, clip_sample=False)
    n, rounds, net = 3000, Rounds(), Linear(schedule)
    sampler = Sampler(net, schedule, shape=(2,), device="cpu", precision="fp32")
    options = {"seed": 3, "progress": False, "batch_size": 1000}
    x = sampler.sample(n, parallel="law", window=6, rounds=rounds, **options).double().numpy()
    assert 1.5 < rounds.steps_per_round < 5.5  # some drafts are taken, some are not
    mean, var, table = 0.0, 1.0, schedule.table()
    for row, t in zip(table.columns.__class__.of(table.rows).B.flip(0), table.timesteps.flip(0).tolist(), strict=True):
        columns = table.columns
        at = int((table.timesteps == t).nonzero())
        abar = float(schedule.alphas_cumprod[t])
        gain = sqrt(1 - abar) / (abar * Linear.STD**2 + 1 - abar)
        slope = float(row) + float(columns.C[at]) * gain
        mean = slope * mean - float(columns.C[at]) * gain * sqrt(abar) * Linear.MEAN
        var = slope**2 * var + float(columns.S[at]) ** 2
    for element in (0, 1):
        assert stats.kstest(x[:, element], "norm", (mean, sqrt(var))).pvalue > 1e-3
    assert abs(np.corrcoef(x.T)[0, 1]) < 5 / sqrt(n)
    assert abs(mean - Linear.MEAN) < 0.02
    loop = sampler.sample(n, **options).double().numpy()
    assert not np.array_equal(loop, x)
    assert stats.ks_2samp(loop[:, 0], x[:, 0]).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["bits", "law"])
def test_callbacks_see_committed_steps_in_order(mode):
    kind, seen, loop = KINDS["known"], {}, {}

    def watch(into):
        def callback(step, t, x_0, indices, x_t):
            for i, index in enumerate(indices.tolist()):
                into.setdefault(index, []).append((step, t, x_0[i], x_t[i]))

        return callback

    x = draw(sampler_of(kind), kind, callback=watch(seen), **BITS | {"parallel": mode})
    assert torch.equal(x, draw(sampler_of(kind), kind, **BITS | {"parallel": mode}))
    rounding = replace(kind, net=ReadsBfloat16(kind.net))
    draw(sampler_of(rounding), rounding, callback=watch(loop))  # the ordinary loop
    for index in SAMPLES:
        assert [call[:2] for call in seen[index]] == [(step, T - 1 - step) for step in range(T)]
        if mode == "bits":
            for (*_, x_0, x_t), (*_, want_x_0, want_x_t) in zip(seen[index], loop[index], strict=True):
                assert torch.equal(x_0, want_x_0)
                assert torch.equal(x_t, want_x_t)


def test_trajectories_are_those_of_the_loop():
    kind = KINDS["guidance"]
    want = draw(sampler_of(kind), kind, trajectory=[11, 5, 0], window=5)
    assert torch.equal(want[:, -1], reference(kind))
    assert torch.equal(draw(sampler_of(kind), kind, trajectory=[11, 5, 0], **BITS), want)


def test_rounds_are_counted():
    kind, rounds = KINDS["plain"], Rounds()
    draw(sampler_of(kind), kind, rounds=rounds, **BITS | {"batch_size": 1})
    assert rounds.window == 5
    assert rounds.calls == rounds.rounds == sum(map(len, rounds.steps.values()))
    assert rounds.steps_per_round == N * T / rounds.rounds
    assert rounds.full == sum(steps == 5 for of_one in rounds.steps.values() for steps in of_one) / rounds.rounds
    assert str(rounds) == f"{rounds.calls} network calls, {N * T / rounds.rounds:.1f} steps per round"
    off = Rounds()
    draw(sampler_of(kind), kind, rounds=off, window=5, batch_size=2)
    assert (off.steps_per_round, off.calls) == (1, 3 * T)  # the first chain draws three samples


def test_batch_invariant_sample_has_the_same_bits_in_any_call():
    kind = KINDS["model_kwargs"]
    sampler, options = sampler_of(kind, batch_invariant=3), {"parallel": "bits", "window": 4}
    want = draw(sampler, kind, **options)
    assert torch.equal(draw(sampler, kind, [4, 1], **options), want[[4, 1]])
    assert torch.equal(draw(sampler, kind, window=4), want)


@pytest.mark.parametrize(
    ("chains", "invariant", "way_out"),
    [(4, False, "batch_size=2 or window=2"), (1, False, "window=2"), (1, 2, "batch_invariant=1 or window=2")],
)
def test_a_layout_that_does_not_fit_into_memory_is_refused(chains, invariant, way_out, monkeypatch):
    def fail(chains):
        tried.append(len(chains.x))
        raise torch.OutOfMemoryError("no memory for this")

    kind, tried, play = KINDS["model_kwargs"], [], Chains.round
    sampler, options = sampler_of(kind, batch_invariant=invariant), {"parallel": "bits", "window": 4}
    monkeypatch.setattr(Chains, "round", fail)
    sides = invariant or chains
    text = rf"no memory for this This was for {sides} samples side by side, with a window of 4; use {way_out} \("
    with pytest.raises(torch.OutOfMemoryError, match=text):
        draw(sampler, kind, batch_size=chains, **options)
    assert tried == [sides]
    monkeypatch.setattr(Chains, "round", play)
    assert torch.equal(draw(sampler, kind, batch_size=chains, **options), reference(kind))


def test_buffers_of_other_batches_are_freed_if_memory_runs_out(monkeypatch):
    def fail_once(chains):
        monkeypatch.setattr(Chains, "round", play)
        raise torch.OutOfMemoryError("no memory for this")

    kind, play = KINDS["plain"], Chains.round
    sampler = sampler_of(kind)
    draw(sampler, kind)  # whose buffers are kept
    monkeypatch.setattr(Chains, "round", fail_once)
    assert torch.equal(draw(sampler, kind, **BITS), reference(kind))


class Overflowing(Net):
    """Returns infinity once, for one draft that is not the chain's own state."""

    def forward(self, x, t):
        out = super().forward(x, t)
        if len(t) > 1 and not self.done and int(t.max()) < T - 2:
            self.done, out[t.argmin()] = True, torch.inf
        return out


@pytest.mark.parametrize("mode", ["bits", "law"])
def test_a_draft_that_overflows_costs_a_round_at_most(mode):
    found = {}
    for net in (Net(), Overflowing()):
        net.done, rounds = False, Rounds()
        kind = Kind({}, net, {})
        x = draw(sampler_of(kind), kind, [0], parallel=mode, window=4, rounds=rounds)
        found[type(net)] = rounds.calls
        assert x.isfinite().all()
        assert mode == "law" or torch.equal(x, reference(KINDS["plain"])[:1])
    assert net.done
    assert found[Overflowing] <= found[Net] + 3


class Failing(Net):
    def forward(self, x, t):
        return torch.where((t == 4).view(-1, 1, 1, 1), torch.nan, super().forward(x, t))


@pytest.mark.parametrize("mode", ["bits", "law"])
def test_nan_names_the_step_and_the_samples(mode):
    kind = Kind({}, Failing(), {})
    text = rf"^step 8 of 12 \(t = 4\): the network returned NaN or infinity for samples \[{SAMPLES[0]}\]"
    with pytest.raises(ValueError, match=text):
        draw(sampler_of(kind), kind, **BITS | {"parallel": mode, "batch_size": 1})


def test_arguments_that_do_not_fit_are_rejected():
    plain = KINDS["plain"]
    for kind, options, text in (
        (plain, {"parallel": "both"}, "parallel is 'both'; want one of off, bits, law"),
        (plain, {"parallel": "bits", "window": 0}, "window is 0"),
        (plain, {"parallel": "bits", "window": 1 << 19, "batch_size": 4}, "would have .* entries; want at most"),
        (plain, {"rounds": Rounds()}, "rounds is given, but parallel is 'off' and there is no window"),
        (plain, {"parallel": "bits", "rounds": 3}, r"rounds is 3; want a Rounds\(\)"),
        (KINDS["x_0_fn"], {"parallel": "law"}, "x_0_fn requires sequential steps"),
        (KINDS["resample"], {"window": 4}, "resample requires sequential steps"),
        (KINDS["learned variance"], {"parallel": "law"}, "needs fixed variances, but they are learned"),
        (plain, {"parallel": "law", "noise": False}, "needs noise, but these steps add none"),
        (plain, {"parallel": "law", "sampler": "ddim"}, "needs noise, but these steps add none"),
    ):
        with pytest.raises(ValueError, match=text):
            sampler_of(kind).sample(N, progress=False, **kind.options, **options)


def test_tf32_is_warned_of_in_mode_bits_alone(monkeypatch):
    kind = KINDS["plain"]
    sampler = sampler_of(kind)
    object.__setattr__(sampler.engine.compute, "precision", "tf32")  # which a CPU does not have
    with pytest.warns(UserWarning, match="the network computes in TF32"):
        assert torch.equal(draw(sampler, kind, **BITS), reference(kind))
    assert torch.equal(draw(sampler, kind, window=5), reference(kind))
    draw(sampler, kind, parallel="law")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_network_keeps_the_bits_and_warns(precision):
    sampler = Sampler(tiny_unet(), device="cpu", precision=precision)
    options = {"steps": 6, "window": 3, "progress": False}
    want = sampler.sample(1, **options)
    named = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    with pytest.warns(UserWarning, match=f"the network computes in {named}.*expect about one step per round"):
        assert torch.equal(sampler.sample(1, parallel="bits", **options), want)
    sampler.sample(1, parallel="law", **options)  # without a warning
    own = Sampler(Net(), SCHEDULE, shape=SHAPE, device="cpu", precision=precision)
    with pytest.warns(UserWarning, match=f"the network computes in {named}"):
        assert torch.equal(own.sample(3, parallel="bits", progress=False), own.sample(3, window=16, progress=False))


def test_folder_of_mode_bits_equals_that_of_off_with_the_same_window(tmp_path):
    kind, settings = KINDS["guidance"], {"format": "npz", "seed": 6, "progress": False, "batch_size": 2}
    settings |= kind.options
    folders = {}
    for name, options in {
        "bits": {"parallel": "bits", "window": 4},
        "off": {"window": 4},
        "loop": {},
        "law": {"parallel": "law", "window": 4},
    }.items():
        store = job.sample_to(tmp_path / name, sampler_of(kind), SAMPLES, **settings, **options)
        folders[name] = np.concatenate(list(store.arrays()))
    assert np.array_equal(folders["bits"], folders["off"])
    assert not np.array_equal(folders["bits"], folders["law"])
    manifests = {name: dict(ShardFolder.open(tmp_path / name).manifest) for name in folders}
    assert manifests["bits"] == manifests["off"]
    assert (manifests["bits"]["window"], manifests["law"]["parallel"]) == (4, "law")
    assert not {"window", "parallel"} & manifests["loop"].keys()
    for name, options, changed in (
        ("bits", {"parallel": "law", "window": 4}, "parallel"),
        ("off", {"parallel": "bits", "window": 8}, "window"),
        ("loop", {"window": 8}, "window"),
    ):
        line = error_line(job.sample_to, tmp_path / name, sampler_of(kind), SAMPLES, **settings, **options)
        assert changed in line
        assert "name another folder" in line
    job.sample_to(tmp_path / "bits", sampler_of(kind), SAMPLES, **settings, window=4)  # either continues the other
    for options, text in (
        ({"window": "8"}, "window is '8'"),
        ({"parallel": "no"}, "parallel is 'no'"),
    ):
        assert text in error_line(job.sample_to, tmp_path / "bad", sampler_of(kind), SAMPLES, **settings, **options)


def test_bar_shows_calls_and_steps_per_round(capfd):
    kind = KINDS["plain"]
    sampler_of(kind).sample(2, parallel="bits", window=4)
    assert re.search(r"24/24 .*\d+ network calls, \d\.\d steps per round\]", capfd.readouterr().err)
