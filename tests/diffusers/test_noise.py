"""The sources of the schedulers' noise: a given seed, a seed for each run, or none."""

import inspect
import math

import pytest
import torch

from fastddpm.core import noise as standard

diffusers = pytest.importorskip("diffusers")

from fastddpm import diffusers as fast
from tests.support.beside_diffusers import (
    DDIM,
    DDPM,
    DOUBLE,
    NAMES,
    OUTPUT,
    OUTPUT_WITH_VARIANCE,
    SINGLE,
    VARIANCES,
    X,
    assert_same,
    outcome,
    scheduler_pair,
    with_steps,
)


def given_noise(monkeypatch, theirs, z, *args, **kwargs):
    """diffusers' step with given noise."""
    module = inspect.getmodule(type(theirs))
    with monkeypatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda shape, dtype, **_: z.to(dtype))
        return theirs.step(*args, **kwargs)


def addressed(seed, n, t, shape=(3, 4, 4)):
    return standard.normal(standard.address(seed, n), shape, stream=standard.STEP, t=t)


def noisy_steps(name):
    """Pairs of schedulers, the network's output, x, further arguments of step, and timesteps with noise."""
    for dtype in (SINGLE, DOUBLE):
        for variance in VARIANCES[:3] + VARIANCES[4:6] if name in DDPM else ("",):
            config = {"variance_type": variance} if variance else {}
            schedulers = with_steps(scheduler_pair(name, **config), 10)
            model_output = (OUTPUT_WITH_VARIANCE if variance.startswith("learned") else OUTPUT).to(dtype)
            yield schedulers, model_output, X.to(dtype), {"eta": 0.7} if name in DDIM else {}, (900, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_seeded_noise_follows_the_standard(name, seed, monkeypatch):
    """Entry n of the batch is sample n, and nothing is drawn from torch."""
    for (ours, theirs), model_output, x, extra, timesteps in noisy_steps(name):
        for t in timesteps:
            want = given_noise(monkeypatch, theirs, addressed(seed, 2, t), model_output, t, x, **extra)
            (got, state), untouched = (
                outcome(ours.step, model_output, t, x, noise=seed, **extra),
                outcome(lambda: None)[1],
            )
            assert_same(got, want)
            assert_same(state, untouched)
            ours.noise = seed
            assert_same(ours.step(model_output, t, x, **extra), want)
            ours.noise = "generator"


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_a_step_returns_its_mean(name, monkeypatch):
    for (ours, theirs), model_output, x, extra, timesteps in noisy_steps(name):
        for t in (*timesteps, 0):
            want = given_noise(monkeypatch, theirs, torch.zeros(2, 3, 4, 4), model_output, t, x, **extra)
            generator = torch.Generator()
            got, states = outcome(
                ours.step, model_output, t, x, generators=[generator], generator=generator, noise=False, **extra
            )
            assert_same(got, want)
            assert_same(states, outcome(lambda: None, generators=[generator])[1])


def philox_run(ours, generator, n=4, timesteps=(900, 500), **extra):
    """The noise that each step adds: with x and the network's output zero, the mean is zero."""
    x, model_output = torch.zeros(2, n, 3, 4, 4)
    return torch.stack([
        ours.step(model_output, t, x, generator=generator, noise="philox", **extra).prev_sample for t in timesteps
    ])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_run_has_its_own_philox_noise(name):
    """The generator draws one seed per run; a sample is the same in a batch of any size."""
    ours = getattr(fast, name)()
    extra = {"eta": 0.7} if name in DDIM else {}

    def run(generator, n=4):
        ours.set_timesteps(10)
        return philox_run(ours, generator, n, **extra)

    first = run(torch.Generator().manual_seed(1))
    assert torch.equal(run(torch.Generator().manual_seed(1)), first)
    assert torch.equal(run(torch.Generator().manual_seed(1), n=2), first[:, :2])
    assert torch.equal(run(torch.Generator().manual_seed(1), n=1), first[:, :1])
    generator = torch.Generator().manual_seed(1)
    runs = [first, run(torch.Generator().manual_seed(2)), *(run(generator) for _ in range(2))]
    assert torch.equal(runs.pop(2), first)
    values = torch.stack(runs).flatten(0, 2).flatten(1)  # one row for every run, step and sample
    assert len(values.unique(dim=0)) == len(values)
    assert not torch.equal(philox_run(ours, torch.Generator().manual_seed(3), **extra), runs[-1])  # within one run
    torch.manual_seed(5)
    own = run(None)
    torch.manual_seed(5)
    assert torch.equal(run(None), own)


@pytest.mark.parametrize("name", NAMES)
def test_each_of_several_generators_seeds_its_entry(name):
    """An entry has the noise of its generator, at any position in the batch."""
    ours = getattr(fast, name)()
    extra = {"eta": 0.7} if name in DDIM else {}

    def run(*seeds):
        ours.set_timesteps(10)
        return philox_run(ours, [torch.Generator().manual_seed(seed) for seed in seeds], len(seeds), **extra)

    one = torch.cat([run(seed) for seed in (1, 2, 3)], 1)
    assert torch.equal(run(1, 2, 3), one)
    assert torch.equal(run(3, 1), one[:, [2, 0]])
    assert not torch.equal(one[:, 0], one[:, 1])


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_source_can_change_within_a_run(name):
    ours = getattr(fast, name)()
    ours.set_timesteps(10)
    extra = {"eta": 0.7} if name in DDIM else {}
    step = lambda noise: ours.step(OUTPUT, 900, X, noise=noise, **extra).prev_sample
    first = {noise: step(noise) for noise in (7, 8, "philox", False)}
    assert len(torch.stack(list(first.values())).unique(dim=0)) == 4
    for noise in (8, False, 7):
        assert torch.equal(step(noise), first[noise])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", ["philox", 7, False], ids=str)
def test_addressed_noise_is_never_replaced_by_torch_noise(name, noise):
    """A step that only diffusers can take is refused."""
    ours = getattr(fast, name)()
    ours.set_timesteps(10)
    for model_output, t in ((OUTPUT[:1], 900), (OUTPUT, torch.tensor([900]))):
        (result, states), untouched = outcome(ours.step, model_output, t, X, noise=noise), outcome(lambda: None)[1]
        assert result.startswith("ValueError: noise is ")
        assert "\n" not in result
        assert_same(states, untouched)
        ours.step(model_output, t, X)


@pytest.mark.parametrize("name", NAMES)
def test_philox_noise_is_drawn_once_and_normal(name):
    ours = getattr(fast, name)(noise="philox")
    ours.set_timesteps(10)
    extra = {"eta": 1.0} if name in DDIM else {}
    generator = torch.Generator()
    states = [generator.get_state()]
    for t in (900, 800, 0):
        ours.step(OUTPUT, t, X, generator=generator, **extra)
        states.append(generator.get_state())
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])
    assert torch.equal(states[1], states[3])
    z = philox_run(ours, generator, 256, **extra).double()
    z = z / z.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    assert abs(z.mean()) <= 5 / math.sqrt(z.numel())
    assert abs(z.pow(4).mean() - 3) <= 5 * math.sqrt(96 / z.numel())


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_source_is_not_in_the_config(name, tmp_path):
    plain = getattr(diffusers, name)()
    for noise in ("philox", 7, False):
        ours = getattr(fast, name)(noise=noise)
        assert ours.noise == noise
        assert "noise" not in ours.config
        assert ours.to_json_string() == plain.to_json_string()
        ours.save_pretrained(tmp_path)
        assert "noise" not in (tmp_path / "scheduler_config.json").read_text()
        assert getattr(fast, name).from_pretrained(tmp_path).noise == "generator"
        assert getattr(fast, name).from_config(plain.config).noise == "generator"


@pytest.mark.parametrize("name", NAMES)
def test_from_config_and_from_pretrained_accept_noise(name, tmp_path):
    plain = getattr(diffusers, name)(beta_end=0.03)
    plain.save_pretrained(tmp_path)
    for made in (
        getattr(fast, name).from_config(plain.config, noise="philox"),
        getattr(fast, name).from_pretrained(tmp_path, noise="philox"),
    ):
        assert made.noise == "philox"
        assert made.to_json_string() == plain.to_json_string()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", ["gaussian", -1, 2**64, 1.5, True], ids=str)
def test_an_unknown_noise_source_is_refused(name, noise):
    ours = getattr(fast, name)()
    ours.set_timesteps(10)
    for call in (lambda: getattr(fast, name)(noise=noise), lambda: ours.step(OUTPUT, 900, X, noise=noise)):
        with pytest.raises(ValueError, match="philox") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_addressed_noise_is_finite(name):
    """Even if the last timestep is -1."""
    ours = getattr(fast, name)(timestep_spacing="trailing")
    ours.set_timesteps(61)
    assert ours.timesteps[-1] == -1
    x = X
    for t in ours.timesteps:
        x = ours.step(OUTPUT, t, x, noise=7, **({"eta": 1.0} if name in DDIM else {})).prev_sample
    assert x.isfinite().all()
