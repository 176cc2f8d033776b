"""The bound by the fast path: the reference's terms, closed forms, unbiased subsets, memory and errors."""

import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastddpm import Sampler, Schedule, UNet2D
from fastddpm.core import noise
from fastddpm.evaluate.likelihood import BIN_TERMS, Bound, bound, systematic
from fastddpm.reference.diffusion import Diffusion, linear_betas
from fastddpm.reference.likelihood import BYTES, prior_kl, term
from fastddpm.reference.unet import UNet
from fastddpm.sampling.batch_network import BatchNetwork
from tests.reference.test_likelihood import MU, VAR, expected_term
from tests.support.check import TINY, assert_as_accurate, error_line

T = 12
OPTIONS = {"num_train_timesteps": T, "beta_start": 0.01, "beta_end": 0.3}
SMALL = {**TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1}


def custom_model(x, t):
    return (x * 0.8 + 0.01 * t.view(-1, *[1] * (x.ndim - 1))).sin()


def custom_learned(x, t):
    m = custom_model(x, t)
    return torch.cat([m, m * 0.2 + 0.5], 1)


def images(n=16, size=8, channels=1):
    return torch.randint(
        0, 256, (n, size, size, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def vectors(n=16):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def evaluated(model, schedule, data, shape=None, **options):
    sampler = Sampler(model, schedule, shape=shape, device="cpu", precision="fp32", engine="eager")
    return bound(sampler, data, progress=False, **options)


def by_reference(model, schedule, data, dtype):
    """(prior [N], terms [N, T]) by the specification with the same noise, in a dtype."""
    last = 1 - 2**-53  # in place of 1, where no signal is left: equally good in either dtype
    process, n = Diffusion(schedule.betas.clamp(max=last)), len(data)
    discrete = data.dtype == torch.uint8
    x_0 = ((data.to(dtype) - 127.5) / 127.5).movedim(-1, 1) if discrete else data.to(dtype)
    options = {
        "predicts": schedule.prediction_type,
        "bins": BYTES if discrete else None,
        "clip": schedule.clip_sample_range if schedule.clip_sample else None,
        "variance_type": schedule.variance_type.removesuffix("_log"),
    }
    terms = []
    for t in range(schedule.num_train_timesteps):
        at = torch.full((n,), t)
        eps = noise.normal(noise.address(3, n), x_0.shape[1:], stream=noise.LIKELIHOOD, t=t).to(dtype)
        with torch.no_grad():
            terms.append(term(process, model, x_0, at, eps, **options))
    return prior_kl(process, x_0), torch.stack(terms, 1)


def assert_matches_the_reference(model, schedule, data, plain, exact, shape=None):
    found = evaluated(model, schedule, data, shape, seed=3)
    assert found.timesteps.tolist() == [list(range(1, schedule.num_train_timesteps))] * len(data)
    ours = torch.cat([found.decoder[:, None], found.terms], 1)
    (prior32, terms32), (prior64, terms64) = (
        by_reference(net, schedule, data, dtype) for net, dtype in ((plain, torch.float32), (exact, torch.float64))
    )
    if schedule.rescale_betas_zero_snr:
        assert found.prior.tolist() == [0] * len(data)
    else:
        assert_as_accurate(found.prior, prior32, prior64)
    assert_as_accurate(ours[:, 0], terms32[:, 0], terms64[:, 0])
    if schedule.num_train_timesteps == 1:
        return
    # relative to each term, since they differ in size
    ours, plain = ours[:, 1:] / terms64[:, 1:], (terms32[:, 1:] / terms64[:, 1:]).float()
    assert_as_accurate(ours, plain, torch.ones_like(ours))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_custom_model_has_the_terms_of_the_reference(predicts, clip, variance):
    schedule = Schedule(**OPTIONS, prediction_type=predicts, clip_sample=clip, variance_type=variance)
    assert_matches_the_reference(custom_model, schedule, vectors(), custom_model, custom_model, (5,))
    assert_matches_the_reference(custom_model, schedule, images(channels=2), custom_model, custom_model, (2, 8, 8))
    floats = torch.randn(16, 2, 4, 3, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert_matches_the_reference(custom_model, schedule, floats, custom_model, custom_model, (2, 4, 3))


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_learned_variance_has_the_terms_of_the_reference(predicts, clip, variance):
    schedule = Schedule(**OPTIONS, prediction_type=predicts, clip_sample=clip, variance_type=variance)
    assert_matches_the_reference(
        custom_learned, schedule, images(channels=2), custom_learned, custom_learned, (2, 8, 8)
    )
    assert_matches_the_reference(custom_learned, schedule, vectors(), custom_learned, custom_learned, (5,))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_unet_has_the_terms_of_the_reference(variance):
    config = {**SMALL, "out_channels": 2 if variance == "learned_range" else 1}
    torch.manual_seed(0)
    net = UNet2D(**config).eval()
    plain, exact = UNet(**config), UNet(**config)
    for reference in (plain, exact):
        reference.load_state_dict(net.state_dict())
        reference.eval()
    assert_matches_the_reference(net, Schedule(**OPTIONS, variance_type=variance), images(), plain, exact.double())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_gaussian_data_matches_the_closed_form(variance):
    betas = linear_betas(T, 0.01, 0.3)
    process, n = Diffusion(betas), 4000
    generator = torch.Generator().manual_seed(1)
    data = (MU + VAR.sqrt() * torch.randn(n, 3, dtype=torch.float64, generator=generator)).float()

    def optimal(x, t):
        abar = process.alphas_cumprod[t][:, None]
        return ((1 - abar).sqrt() * (x - abar.sqrt() * MU) / (abar * VAR + 1 - abar)).float()

    schedule = Schedule(**OPTIONS, clip_sample=False, variance_type=variance)
    found = evaluated(optimal, schedule, data, (3,), batch_size=4096)
    want = torch.stack([expected_term(process, t, variance) for t in range(T)])
    t, mean, error = found.per_timestep()
    assert t.tolist() == list(range(1, T))
    assert ((mean - found.bits(want[1:])).abs() <= 5 * error).all()
    assert (error > 0).all()
    abar = process.alphas_cumprod[-1]
    total = want.sum() + (abar * (VAR + MU**2) - abar - (1 - abar).log()).sum() / 2
    for K in (None, 3):
        subset = evaluated(optimal, schedule, data, (3,), batch_size=4096, terms=K)
        mean, error = subset.summary()["total"]
        assert abs(mean - float(found.bits(total))) <= 5 * error


@pytest.mark.parametrize(("population", "count"), [(11, 1), (11, 4), (11, 10), (7, 7), (1, 1), (50, 20)])
def test_weights_are_inverse_probabilities(population, count, monkeypatch):
    """Among starts that divide [0, 1) evenly, a timestep's share is its probability, to within one start."""
    n = 4000

    class Even:
        def __init__(self, seeds):
            self.index = seeds[1]

        def random(self):
            return (self.index + 0.5) / n

    monkeypatch.setattr("numpy.random.default_rng", Even)
    found, weights = systematic(population, count, 0, n)
    assert found.shape == weights.shape == (n, count)
    assert (found.diff(dim=1) > 0).all()
    assert (found.min(), found.max()) == (1, population)
    stands_for = torch.zeros(population + 1, dtype=torch.float64).scatter_(0, found.flatten(), weights.flatten())[1:]
    often = found.flatten().bincount(minlength=population + 1)[1:]
    assert ((often - n / stands_for).abs() <= 1).all()
    falling = stands_for / torch.arange(1, population + 1)
    rare = stands_for > 1
    assert not rare.any() or falling[rare].max() <= falling[rare].min() * (1 + 1e-12)
    assert (stands_for >= 1).all()


@pytest.mark.parametrize("count", [1, 4, 10])
def test_timesteps_of_an_image_are_distinct(count, monkeypatch):
    for u in (0.0, np.nextafter(1, 0)):
        monkeypatch.setattr("numpy.random.default_rng", lambda seeds, u=u: SimpleNamespace(random=lambda: u))
        found, _ = systematic(11, count, 0, 1)
        assert (found.diff() > 0).all()
        assert 1 <= found.min() <= found.max() <= 11
        assert found[0, 0] == 1 or u > 0


def test_float64_is_computed_in_float32():
    schedule = Schedule(**OPTIONS)
    one, other = (evaluated(custom_model, schedule, data, (5,)) for data in (vectors().double(), vectors()))
    assert torch.equal(one.per_image, other.per_image)


def test_data_must_lie_within_the_clip_range():
    schedule = Schedule(**OPTIONS, clip_sample_range=2.0)
    assert evaluated(custom_model, schedule, 2 * vectors(), (5,)).per_image.isfinite().all()
    assert error_line(evaluated, custom_model, schedule, -2.5 * vectors().abs().clamp(min=0.9), (5,)).startswith(
        "data reaches -2.5"
    )


def test_dropout_is_off():
    torch.manual_seed(0)
    net = UNet2D(**SMALL, dropout=0.5).train()
    one, other = (evaluated(net, Schedule(**OPTIONS), images(2), terms=2) for _ in range(2))
    assert torch.equal(one.per_image, other.per_image)
    assert net.training


def test_subset_has_the_same_terms():
    schedule = Schedule(**OPTIONS)
    whole = evaluated(custom_model, schedule, vectors(), (5,))
    part = evaluated(custom_model, schedule, vectors(), (5,), terms=4)
    assert torch.equal(part.terms, whole.terms.gather(1, part.timesteps - 1))
    assert torch.equal(part.decoder, whole.decoder)
    assert (part.weights.min(), part.weights.max() > 11 / 4) == (1, True)
    assert torch.equal(part.rate, part.prior + (part.terms * part.weights).sum(1))
    assert torch.equal(whole.weights, torch.ones_like(whole.terms))
    assert torch.equal(evaluated(custom_model, schedule, vectors(), (5,), terms=T - 1).terms, whole.terms)
    t, mean, error = part.per_timestep()
    for at, value, spread in zip(t.tolist(), mean, error, strict=True):
        terms = part.bits(part.terms[part.timesteps == at])
        torch.testing.assert_close(value, terms.mean(), rtol=1e-14, atol=0)
        if len(terms) == 1:
            assert spread.isnan()
        else:
            torch.testing.assert_close(spread, terms.std() / len(terms) ** 0.5, rtol=1e-12, atol=0)


def falling(images, terms, T=1000, spread=0.5):
    """A bound whose terms fall as the powers of t, with noise."""
    generator = torch.Generator().manual_seed(0)
    timesteps, weights = systematic(T - 1, terms or T - 1, 0, images)
    noise = (spread * torch.randn(timesteps.shape, generator=generator, dtype=torch.float64)).exp()
    ends = torch.ones(images, dtype=torch.float64)
    return Bound(ends, ends, timesteps, (timesteps + 1.0) ** -1.5 * math.log(2) * noise, weights, T, 1)


@pytest.mark.parametrize(("images", "terms"), [(1, None), (2, None), (2, 50), (10, None), (200, 5), (200, None)])
def test_bins_hold_enough_terms_to_be_smooth(images, terms):
    """A plotted term is within four standard errors of what it would be without noise, which is known here."""
    found = falling(images, terms)
    t, mean, error = found.binned()
    assert (t.diff() > 0).all()
    assert len(t) <= 60
    assert float(found.timesteps.min()) <= t[0] + 1e-9  # rounding of log and exp
    assert float(found.timesteps.max()) >= t[-1] - 1e-9
    factor = math.exp(0.5**2 / 2)  # the mean of the noise
    exact = factor * (t + 1) ** -1.5
    scatter = math.sqrt(math.exp(0.5**2) - 1) / math.sqrt(BIN_TERMS)  # of a bin of the fewest terms
    assert ((mean / exact - 1).abs() <= 4 * scatter + 0.2).all()  # 0.2: a bin of ten t is wide where t is small
    assert error.isnan().all() if images == 1 else error.isfinite().any()


def test_bins_are_means_over_the_images():
    found = falling(3, None, T=100)
    t, mean, error = found.binned()
    first = list(range(1, 5))  # twelve terms
    want = found.bits(found.terms)[:, :4].mean(1)
    assert t[0] == pytest.approx(math.prod(k + 1 for k in first) ** (1 / 4) - 1)
    torch.testing.assert_close(mean[0], want.mean())
    torch.testing.assert_close(error[0], want.std() / 3**0.5)


@pytest.mark.parametrize(("images", "terms"), [(1, 5), (2, 20), (1, 40)])
def test_few_timesteps_are_not_binned(images, terms):
    found = falling(images, terms)
    for one, other in zip(found.binned(), found.per_timestep(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


def test_standard_error_is_the_spread_over_seeds():
    """Over 200 seeds, which give a standard deviation to 1/20. All images are equal, so that only the draws differ."""
    data = images(1).expand(16, -1, -1, -1)
    found = [
        evaluated(custom_model, Schedule(**OPTIONS), data, (1, 8, 8), terms=3, seed=seed).summary()
        for seed in range(200)
    ]
    for name in ("total", "rate"):
        value, error = torch.tensor([each[name] for each in found], dtype=torch.float64).unbind(1)
        assert abs(float(error.square().mean().sqrt() / value.std()) - 1) <= 5 / math.sqrt(2 * 199)


def test_result_depends_on_the_seed_but_not_on_the_batch_size():
    schedule = Schedule(**OPTIONS)
    want = evaluated(custom_model, schedule, images(), (1, 8, 8), terms=5)
    for size in (1, 3, 7, 1000):
        got = evaluated(custom_model, schedule, images(), (1, 8, 8), terms=5, batch_size=size)
        assert torch.equal(got.per_image, want.per_image)
    fewer = evaluated(custom_model, schedule, images()[:2], (1, 8, 8), terms=5)
    assert torch.equal(fewer.per_image, want.per_image[:2])
    other = evaluated(custom_model, schedule, images(), (1, 8, 8), terms=5, seed=1)
    assert (other.decoder != want.decoder).all()
    assert not torch.equal(other.timesteps, want.timesteps)


def failing(fails):
    """The model `custom_model`, which runs out of memory if fails(batch size, number of the call)."""
    calls = []

    def model(x, t):
        calls.append(len(x))
        if fails(len(x), len(calls)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines")
        return custom_model(x, t)

    return model, calls


def test_batch_size_is_halved_when_memory_runs_out(capsys):
    """L_0 has 16 pairs. Memory runs out twice in the 80 pairs of the other terms; no finished pair is repeated."""
    schedule = Schedule(**OPTIONS)
    want = evaluated(custom_model, schedule, images(), (1, 8, 8), terms=5)
    model, calls = failing(lambda size, call: (size > 8 and call > 3) or (size > 4 and call > 5))
    sampler = Sampler(model, schedule, shape=(1, 8, 8), device="cpu", precision="fp32")
    with pytest.warns(UserWarning, match="out of memory; continuing with batches of") as warned:
        found = bound(sampler, images(), terms=5, batch_size=16)
    assert torch.equal(found.decoder, want.decoder)
    assert torch.equal(found.terms, want.terms)
    assert calls == [16, 16, 16, 16, 8, 8] + [4] * 10
    assert [str(w.message).partition(".")[0][-2:] for w in warned] == [" 8", " 4"]
    assert {w.filename for w in warned} == {__file__}
    assert "96/96" in capsys.readouterr().err


def test_buffers_that_did_not_fit_are_freed_first(monkeypatch):
    made, alive, init = [], [], BatchNetwork.__init__

    def noted(network, *args, **options):
        alive.append([len(x) for x in (ref() for ref in made) if x is not None])
        init(network, *args, **options)
        made.append(weakref.ref(network.input))

    monkeypatch.setattr(BatchNetwork, "__init__", noted)
    model, _ = failing(lambda size, call: size > 4)
    with pytest.warns(UserWarning, match="out of memory"):
        evaluated(model, Schedule(**OPTIONS), images(), (1, 8, 8), batch_size=16)
    assert alive[:3] == [[]] * 3  # made for 16, 8 and 4


def test_kept_buffers_are_freed_before_the_batch_size_is_halved():
    """A first run leaves buffers. The bound fails once and continues with the same batch size, without a warning."""
    model, calls = failing(lambda size, call: call == 2)
    sampler = Sampler(model, Schedule(**OPTIONS), shape=(1, 8, 8), device="cpu", precision="fp32")
    sampler.sample(4, steps=1, progress=False)
    bound(sampler, images(), terms=1, progress=False, batch_size=16)
    assert calls == [4, 16, 16, 16]


def test_error_if_not_even_one_pair_fits():
    model, calls = failing(lambda size, call: True)
    with pytest.warns(UserWarning, match="batches of 1"), pytest.raises(torch.OutOfMemoryError) as caught:
        evaluated(model, Schedule(**OPTIONS), images(), (1, 8, 8), batch_size=2)
    assert str(caught.value).endswith("20 GiB. This was for a batch of 1; use fp16 or bf16, or the CPU")
    assert calls == [2, 1]


def test_summary_is_the_sum_in_bits():
    found = evaluated(custom_model, Schedule(**OPTIONS), images(), (1, 8, 8))
    summary = found.summary()
    want = (found.prior + found.terms.sum(1) + found.decoder) / (64 * math.log(2))
    assert torch.equal(found.per_image, want)
    assert summary["total"] == (float(want.mean()), float(want.std() / 4))
    assert summary["total"][0] == pytest.approx(summary["rate"][0] + summary["distortion"][0], rel=1e-14)
    assert math.isnan(evaluated(custom_model, Schedule(**OPTIONS), images(1), (1, 8, 8)).summary()["total"][1])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_one_timestep_has_the_terms_of_the_reference(variance):
    model = custom_learned if variance == "learned_range" else custom_model
    schedule = Schedule(num_train_timesteps=1, beta_start=0.3, variance_type=variance)
    assert_matches_the_reference(model, schedule, images(), model, model, (1, 8, 8))
    found = evaluated(model, schedule, images(), (1, 8, 8))
    assert found.terms.shape == (16, 0)
    assert found.per_timestep()[0].shape == (0,)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_zero_terminal_snr_has_the_terms_of_the_reference(variance):
    model = custom_learned if variance == "learned_range" else custom_model
    schedule = Schedule(**OPTIONS, rescale_betas_zero_snr=True, prediction_type="v_prediction", variance_type=variance)
    assert_matches_the_reference(model, schedule, images(), model, model, (1, 8, 8))
    line = error_line(evaluated, custom_model, Schedule(**OPTIONS, rescale_betas_zero_snr=True), images(), (1, 8, 8))
    assert line.startswith("prediction_type is 'epsilon', but abar is 0 at t=11")


def test_each_image_gets_its_class_label():
    torch.manual_seed(0)
    net = UNet2D(**SMALL, num_class_embeds=3).eval()
    data, labels, schedule = images(4), [0, 2, 1, 1], Schedule(**OPTIONS)
    together = evaluated(net, schedule, data, class_labels=labels, terms=3, batch_size=5)
    turned = evaluated(net, schedule, data, class_labels=[0, 2, 1, 0], terms=3, batch_size=5)
    assert torch.equal(together.terms[:3], turned.terms[:3])
    assert (together.terms[3] != turned.terms[3]).all()
    assert error_line(evaluated, net, schedule, data).startswith("the model is class-conditional; pass class_labels")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data is None; want uint8 [N, H, W, C], or int16 or floating point [N, *shape]"),
        ("images.npz", "data is 'images.npz'; want uint8"),
        (0, "data is () torch.int64; want uint8"),
        (torch.zeros(2, 1, 8, 8).to_sparse(), "data is (2, 1, 8, 8) torch.float32 torch.sparse_coo; want uint8"),
        (torch.empty(2, 1, 8, 8, device="meta"), "data is tensor("),
        (np.zeros((2, 1, 8, 8), complex), "data is (2, 1, 8, 8) torch.complex128; want uint8"),
    ],
)
def test_data_of_another_kind_raise(data, message):
    assert error_line(evaluated, custom_model, Schedule(**OPTIONS), data, (1, 8, 8)).startswith(message)


def test_arguments_of_other_kinds_raise():
    assert error_line(bound, "fashion-mnist", images()).startswith(
        "sampler is 'fashion-mnist'; want a Sampler, such as"
    )
    sampler = Sampler(custom_model, Schedule(**OPTIONS), shape=(1, 8, 8), device="cpu", precision="fp32")
    assert error_line(bound, sampler, images(), progress=0) == "progress is 0; want True or False"
    unit = Sampler(custom_model, Schedule(**OPTIONS), shape=(1, 8, 8), device="cpu", value_range=(0, 1))
    line = error_line(bound, unit, images(), progress=False)
    assert line == "the sampler's value_range is (0.0, 1.0); the bound is for data in [-1, 1]"
    assert error_line(bound, sampler, images(), term=3, progress=False).startswith(
        "bound: there is no argument 'term'; did you mean 'terms'?; want sampler, data"
    )


def test_numbers_and_images_may_be_numpys():
    data = images().numpy()
    one = evaluated(custom_model, Schedule(**OPTIONS), images().flip(2), (1, 8, 8), terms=3, seed=5, batch_size=4)
    numbers = {"terms": np.int64(3), "seed": np.uint8(5), "batch_size": np.int32(4)}
    other = evaluated(custom_model, Schedule(**OPTIONS), data[:, :, ::-1], (1, 8, 8), **numbers)
    assert torch.equal(one.per_image, other.per_image)


def nan_at_5(x, t):
    m = custom_model(x, t)
    return torch.where(t.view(-1, 1, 1, 1) == 5, math.nan, m)


@pytest.mark.parametrize(
    ("model", "variance", "options", "message"),
    [
        (
            custom_model,
            "fixed_small",
            {"data": images().int()},
            "data is (16, 8, 8, 1) torch.int32; want uint8 [N, H, W, C], or",
        ),
        (
            custom_model,
            "fixed_small",
            {"data": images(size=6)},
            "data is (16, 6, 6, 1) torch.uint8; want [N, 8, 8, 1] with N >=",
        ),
        (
            custom_model,
            "fixed_small",
            {"data": images(0)},
            "data is (0, 8, 8, 1) torch.uint8; want [N, 8, 8, 1] with N >= 1",
        ),
        (custom_model, "fixed_small", {"data": torch.full((2, 1, 8, 8), math.inf)}, "data of sample 0 is not finite"),
        (
            custom_model,
            "fixed_small",
            {"data": torch.full((2, 1, 8, 8), -255.0)},
            "data reaches -255, but the schedule clips x_0 to [-1, 1]; scale the data, or set clip_sample",
        ),
        (
            custom_model,
            "fixed_small",
            {"terms": 0},
            "terms is 0; want a whole number from 1 to T - 1 = 11, or None: all",
        ),
        (custom_model, "fixed_small", {"terms": T}, "terms is 12; want a whole number from 1 to T - 1 = 11"),
        (custom_model, "fixed_small", {"batch_size": 0}, "batch_size is 0; want a whole number, at least 1"),
        (custom_model, "fixed_small", {"seed": -1}, "seed is -1; want a whole number"),
        (
            custom_model,
            "fixed_small",
            {"class_labels": [0] * 16},
            "class_labels were given, but the model is not a class-cond",
        ),
        (
            custom_model,
            "learned",
            {},
            "variance_type is 'learned', for which the network must return 2 channels, but it returns 1",
        ),
        (
            custom_learned,
            "fixed_small",
            {},
            "variance_type is 'fixed_small', for which the network must return 1 channels",
        ),
        (
            nan_at_5,
            "fixed_small",
            {},
            "the term of image 0 at t = 5 is nan: the network returned NaN or",
        ),
        (
            lambda x, t: -custom_learned(x, t),
            "learned",
            {},
            "the term of image 0 at t = 0 is nan: the network returned NaN, infinity or a variance",
        ),
    ],
)
def test_wrong_arguments_and_models_raise(model, variance, options, message):
    schedule = Schedule(**OPTIONS, variance_type=variance)
    options = {"data": images(), "shape": (1, 8, 8)} | options
    assert error_line(evaluated, model, schedule, **options).startswith(message)


@pytest.mark.parametrize(("t", "most"), [(0, 1), (1, 5)])
def test_a_term_that_is_not_finite_raises_at_once(t, most):
    calls = []

    def model(x, at):
        calls.append(at)
        return torch.where(at.view(-1, 1, 1, 1) == t, math.inf, custom_model(x, at))

    line = error_line(evaluated, model, Schedule(**OPTIONS, clip_sample=False), images(), (1, 8, 8), batch_size=4)
    assert line.startswith(f"the term of image 0 at t = {t} is ")
    assert len(calls) <= most + 3  # of 48
