"""The Fréchet distance against scipy and closed forms, the bootstrap, and bench.frechet on tiny images."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from bench import frechet
from fastddpm.evaluate import features
from fastddpm.evaluate import frechet as module
from fastddpm.evaluate.frechet import (
    are_moments,
    bootstrap,
    frechet_distance,
    gaussian_distance,
    is_covariance,
    moments,
    random_features,
)


def gaussian(seed: int, dims: int = 24, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A mean and a covariance whose eigenvalues span six decades."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(dims, dtype=torch.float64, generator=generator)
    factor = torch.randn(dims, rank or dims, dtype=torch.float64, generator=generator)
    return mean, factor @ torch.diag(torch.logspace(-4, 2, rank or dims, dtype=torch.float64)) @ factor.T


def assert_close(got: float, want: float) -> None:
    assert abs(got - want) <= 1e-9 * abs(want)


def test_assert_close_rejects_damage():
    assert_close(1 + 1e-10, 1.0)
    for damaged in (1 + 2e-9, float("nan"), -1.0):
        with pytest.raises(AssertionError):
            assert_close(damaged, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_distance_of_gaussians_is_that_of_scipy(seed):
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(seed), gaussian(seed + 100)
    overlap = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real.trace()
    want = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * overlap
    assert_close(gaussian_distance(mean_a, cov_a, mean_b, cov_b), want)


def test_distance_of_diagonal_gaussians_has_its_closed_form():
    (mean_a, _), (mean_b, _) = gaussian(0), gaussian(1)
    sigma_a, sigma_b = torch.logspace(-3, 2, 24, dtype=torch.float64), torch.linspace(0, 9, 24, dtype=torch.float64)
    want = float((mean_a - mean_b).square().sum() + (sigma_a - sigma_b).square().sum())
    assert_close(gaussian_distance(mean_a, sigma_a.square().diag(), mean_b, sigma_b.square().diag()), want)


@pytest.mark.parametrize("rank", [None, 3])
def test_distance_of_a_gaussian_to_itself_is_0(rank):
    mean, cov = gaussian(0, rank=rank)
    assert abs(gaussian_distance(mean, cov, mean, cov)) <= 1e-9 * cov.trace()


def test_shifted_and_scaled_features_have_closed_forms():
    a = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.arange(6.0, dtype=torch.float64)
    assert_close(frechet_distance(a, a + shift), 55.0)
    assert_close(frechet_distance(a, 3 * a), float(4 * (a.mean(0).square().sum() + a.var(0).sum())))
    assert_close(frechet_distance(a.numpy(), (a + shift).numpy()), 55.0)
    assert_close(frechet_distance(a[:200], a[200:]), frechet_distance(a[200:], a[:200]))


def test_distance_is_computed_in_float64():
    a, b = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)) + 1000
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def test_fewer_features_are_farther_apart():
    """The documented bias: over 40 draws for each size, the means are 30 standard errors apart."""
    generator = torch.Generator().manual_seed(0)
    small, large = (
        torch.tensor([frechet_distance(*torch.randn(2, n, 8, generator=generator)) for _ in range(40)])
        for n in (50, 500)
    )
    assert small.mean() - large.mean() >= 30 * large.std() / 40**0.5


@pytest.mark.parametrize(
    "shapes", [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3)), ((5, 3), (0, 3)), ((5, 0), (5, 0))]
)
def test_wrong_shapes_raise(shapes):
    with pytest.raises(ValueError, match=r"features are \[.*\] and \[.*\]; want \[N, D\] and \[M, D\], N, M >= 2"):
        frechet_distance(*map(torch.zeros, shapes))


@pytest.mark.parametrize("wrong", [None, "x", {}, 1j, torch.zeros(3, 2, device="meta")])
def test_what_is_no_features_raises(wrong):
    with pytest.raises(ValueError, match=r"a is .*; want features \[N, D\]|features are \[\] and"):
        frechet_distance(wrong, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (math.nan, "b holds NaN or infinity"),
        (math.inf, "b holds NaN or infinity"),
        (1e200, "the distance is not finite"),
    ],
)
def test_features_that_have_no_distance_raise(value, why):
    with pytest.raises(ValueError, match=why):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.float64).fill_diagonal_(value))


@pytest.mark.parametrize("count", [3, 24, 25])
def test_singular_covariances(count):
    """N features span N - 1 dimensions, in which the closed form of scaled sets holds."""
    a = torch.randn(count, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = float(4 * (a.mean(0).square().sum() + a.var(0).sum()))
    assert_close(frechet_distance(a, 3 * a), want)


def test_one_dimension():
    a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [1.0], [10.0]])
    assert_close(frechet_distance(a, b), (2 - 4) ** 2 + (2 - 27**0.5) ** 2)
    assert_close(gaussian_distance(*(torch.full(shape, 4.0).double() for shape in ((1,), (1, 1), (1,), (1, 1)))), 0.0)


def test_distance_is_never_negative_and_nan_propagates():
    for seed in range(20):
        mean, cov = gaussian(seed, rank=5)
        assert gaussian_distance(mean, cov, mean, cov) >= 0
    assert np.isnan(gaussian_distance(mean * float("nan"), cov, mean, cov))


@pytest.mark.parametrize("block", [1, 7, 8192])
def test_moments_are_those_of_repeated_features(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator) * 3 + 1000  # off-centre: float32 would lose the covariance
    counts = torch.randint(0, 4, (20,), generator=generator)
    for given, rows in ((None, x), (counts, x.repeat_interleave(counts, 0))):
        mean, cov = moments(x, given)
        assert mean.dtype == cov.dtype == torch.float64
        torch.testing.assert_close(mean, rows.double().mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(cov, rows.double().T.cov(), rtol=1e-12, atol=1e-11)


def offset(seed: int, scale: float = 1.0) -> Tensor:
    """[300, 6] float32 features, of which one is constant."""
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(seed)) * scale + 1000
    x[:, 3] = 7
    return x


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_edited_moments_are_found(scale):
    x = offset(0, scale)
    mean, cov = moments(x)
    assert are_moments(mean, cov, x)
    assert are_moments(*moments(x.flip(0)), x)  # rounding alone
    for edited in (
        mean * (1 + 1e-9),
        mean.flip(0),
        mean + torch.eye(6, dtype=torch.float64)[2] * (1e-6 * scale + 1e-8),
    ):
        assert not are_moments(edited, cov, x)
    bump = torch.zeros(6, 6, dtype=torch.float64)
    bump[1, 2] = bump[2, 1] = 1e-6
    for edited in (cov * (1 + 1e-9), cov + bump * cov[1, 1], cov.T.flip(0), torch.zeros_like(cov)):
        assert not are_moments(mean, edited, x)


def test_rounding_of_a_covariance_is_taken():
    mean, cov = gaussian(0, rank=5)
    for rounded in (cov, cov.float().double(), torch.zeros_like(cov), cov - 1e-14 * torch.eye(24)):
        assert is_covariance(rounded, mean)
    for size in (1, 3):
        below = torch.full((size, size), 0.0, dtype=torch.float64).fill_diagonal_(-1e-14)
        assert is_covariance(below, torch.zeros(size, dtype=torch.float64))
        assert gaussian_distance(mean[:size], below, mean[:size], torch.zeros_like(below)) == 0
    x = torch.full((500, 2), 1000.1, dtype=torch.float64)
    x[:, 1] += torch.arange(500)
    differences = x.T @ x / 500 - torch.outer(x.mean(0), x.mean(0))
    assert differences[0, 0] != 0
    assert is_covariance(differences, x.mean(0))


def test_what_is_no_covariance_is_found():
    mean, cov = gaussian(0)
    lopsided, negative = cov.clone(), cov.clone()
    lopsided[0, 1] += 1e-3 * cov.abs().max()
    negative[0, 0] *= -1
    for wrong in (lopsided, negative, -cov, cov - 1e-3 * cov.diag().max() * torch.eye(24)):
        assert not is_covariance(wrong, mean)
    assert not is_covariance(torch.full((1, 1), -1e-3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


# The bootstrap


def test_bootstrap_resamples_both_sets():
    a, b = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(5)
    draw = lambda x: x[torch.randint(len(x), (len(x),), generator=generator)]
    want = [frechet_distance(draw(a), draw(b)) for _ in range(3)]
    got = bootstrap(a, b, replicates=3, seed=5, progress=False)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.equal(got, bootstrap(a, b, replicates=3, seed=5, progress=False))
    assert not torch.isin(got, bootstrap(a, b, replicates=3, seed=6, progress=False)).any()


def test_numbers_of_a_bootstrap():
    a = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    want = bootstrap(a, a, replicates=2, seed=5, progress=False)
    assert torch.equal(bootstrap(a, a, replicates=np.int64(2), seed=np.uint8(5), progress=False), want)
    for name, value in (("replicates", 0), ("replicates", 2.0), ("seed", -1), ("seed", "5")):
        with pytest.raises(ValueError, match=f"^{name} is {value!r}; want a whole number"):
            bootstrap(a, a, progress=False, **{name: value})


def test_bootstrap_does_not_resample_statistics():
    a, b = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(5)
    draws = [a[torch.randint(30, (30,), generator=generator)] for _ in range(3)]
    want = torch.tensor([frechet_distance(draw, b) for draw in draws], dtype=torch.float64)
    one = bootstrap(a, moments(b), replicates=3, seed=5, progress=False)
    other = bootstrap(moments(b), a, replicates=3, seed=5, progress=False)
    torch.testing.assert_close(one, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(other, want, rtol=1e-9, atol=0)
    both = bootstrap(moments(a), moments(b), replicates=3, progress=False)
    assert both.unique().tolist() == [both[0]]


def test_bootstrap_estimates_the_deviation_of_independent_draws():
    """The variance over 400 independent pairs of sets, against that of 20 replicates of each of 40 pairs.

    The first is known to 1/sqrt(200), the second is an average: they may differ by four of their standard errors. The
    mean of the replicates lies above the distance, since resampling adds to the bias.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 1.5, 0.5])
    pairs = [
        (torch.randn(500, 3, generator=generator), torch.randn(300, 3, generator=generator) * scale + 0.3)
        for _ in range(400)
    ]
    distances = torch.tensor([frechet_distance(*pair) for pair in pairs], dtype=torch.float64)
    replicates = torch.stack([bootstrap(*pair, seed=i, progress=False) for i, pair in enumerate(pairs[:40])])
    estimates = replicates.var(1)
    true, true_error = distances.var(), distances.var() * (2 / 399) ** 0.5
    found, found_error = estimates.mean(), estimates.std() / 40**0.5
    assert abs(found - true) <= 4 * (true_error**2 + found_error**2) ** 0.5
    assert found >= 10 * found_error
    bias = replicates.mean(1) - distances[:40]
    assert bias.mean() >= 4 * bias.std() / 40**0.5


# The features


def images(n, seed=0, shape=(3, 16, 16), correlated=True):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + x.roll(1, 3) + x.roll(1, 2) if correlated else x * 3**0.5


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 28, 28), (3, 5, 7), (4, 1, 1)])
def test_random_features_are_a_fixed_function(shape):
    x = images(5, shape=shape)
    got = random_features(x)
    torch.manual_seed(int(got.sum()))
    assert got.shape == (5, 24)
    assert got.dtype == torch.float64
    assert got.isfinite().all()
    assert (got > 0).any()
    assert torch.equal(random_features(x.float().double()), random_features(x.float()))
    assert torch.equal(random_features(x), got)


def test_random_features_tell_distributions_apart():
    """Also a distribution of equal mean and variance in which neighbouring pixels are not correlated."""
    one, other = (random_features(images(400, seed)) for seed in range(2))
    alike = frechet_distance(one, other)
    for strange in (images(400, 2, correlated=False), images(400, 2) * 1.2, images(400, 2) + 0.3):
        assert frechet_distance(random_features(strange), other) >= 3 * alike


# The command


def garments(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images of ten blocky classes with noise, and their labels."""
    patterns = np.random.default_rng(0).integers(0, 2, (10, 4, 4)).repeat(7, 1).repeat(7, 2) * 155
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, n)
    return (patterns[labels] + random.integers(0, 100, (n, 28, 28))).astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frechet")
    (x_train, y_train), (x_test, y_test) = garments(320, 1), garments(100, 2)
    np.savez(folder / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    np.savez(folder / "good.npz", garments(100, 3)[0][..., None])
    np.savez(folder / "noise.npz", np.random.default_rng(4).integers(0, 256, (100, 28, 28, 1), np.uint8))
    np.savez(folder / "small.npz", np.zeros((100, 8, 8, 1), np.uint8))
    np.savez(folder / "many.npz", np.zeros((400, 28, 28, 1), np.uint8))
    np.savez(folder / "float.npz", np.zeros((20, 28, 28, 1)))
    np.savez(folder / "unlabelled.npz", x_train=x_train)
    np.savez(folder / "ragged.npz", x_train=x_train, y_train=y_test, x_test=x_test, y_test=y_test)
    np.savez(folder / "classes.npz", x_train=x_train, y_train=y_train + 1, x_test=x_test, y_test=y_test)
    (folder / "text").write_text("not a classifier")
    frechet.main([str(folder / "data.npz"), str(folder / "good.npz"), "--classifier", str(folder / "classifier.pt")])
    return folder


def printed_distances(files, name: str, capsys) -> tuple[float, float, float]:
    """What the command prints: accuracy, distance of the samples, distance of real halves."""
    frechet.main([str(files / "data.npz"), str(files / name), "--classifier", str(files / "classifier.pt")])
    classifier, samples, real, note = capsys.readouterr().out.splitlines()
    assert samples.startswith("100 samples to 100 real images: ")
    assert real.startswith("100 real images to 100 other ones: ")
    assert note.startswith("mean ± standard deviation over 5 choices of real images; compare only equal numbers")
    return float(classifier.split()[1].rstrip("%")), *(
        float(line.split(": ")[1].split()[0]) for line in (samples, real)
    )


def test_good_samples_are_near_and_noise_is_not(files, capsys):
    accuracy, good, real = printed_distances(files, "good.npz", capsys)
    assert accuracy > 90
    assert real > 0
    assert good <= 1.5 * real
    _, noise, real_again = printed_distances(files, "noise.npz", capsys)
    assert real_again == real
    assert noise >= 10 * real


def test_a_classifier_in_a_file_is_not_trained_again(files, capsys, monkeypatch):
    monkeypatch.setattr(frechet, "train", None)
    assert printed_distances(files, "good.npz", capsys) == printed_distances(files, "good.npz", capsys)


def test_bundled_classifier_is_the_default(files, capsys, monkeypatch):
    monkeypatch.setattr(frechet, "train", None)
    frechet.main([str(files / "data.npz"), str(files / "good.npz")])
    [line, *_] = capsys.readouterr().out.splitlines()
    data = frechet.load_data(files / "data.npz")
    right = frechet.accuracy(features.shipped_classifier(), data["x_test"], data["y_test"])
    assert line == f"classifier: {right:.2%} of 100 test images right, 128 features"


def test_training_is_deterministic_and_keeps_the_global_generator():
    images, labels = garments(200, 1)
    state = torch.random.get_rng_state()
    one, two = (frechet.train(images, labels, epochs=1).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    untrained = frechet.Classifier().state_dict()
    assert not torch.equal(one["head.weight"], untrained["head.weight"])


def test_sets_of_real_images_are_disjoint(monkeypatch):
    compared = []
    monkeypatch.setattr(frechet, "frechet_distance", lambda a, b: compared.append((a, b)) or 0.0)
    samples, real = torch.zeros(4, 1), torch.arange(1.0, 9)[:, None]
    distances = frechet.compare(samples, real, splits=3)
    assert len(distances.samples) == len(distances.real) == 3
    for (is_samples, one), (other, one_again) in zip(compared[::2], compared[1::2], strict=True):
        assert is_samples is samples
        assert torch.equal(one, one_again)
        assert sorted([*one.flatten().tolist(), *other.flatten().tolist()]) == real.flatten().tolist()
    assert len({tuple(one.flatten().tolist()) for _, one in compared[1::2]}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.npz", "good.npz"], "absent.npz"),
        (["text", "good.npz"], "want an .npz with x_train, y_train, x_test, y_test"),
        (["unlabelled.npz", "good.npz"], "want an .npz with x_train, y_train, x_test, y_test"),
        (["ragged.npz", "good.npz"], "is [320, 28, 28] uint8 with 100 labels; want uint8 [N, 28, 28] with N labels"),
        (["classes.npz", "good.npz"], "want whole numbers from 0 to 9"),
        (["data.npz", "absent.npz"], "absent.npz"),
        (["data.npz", "float.npz"], "float64"),
        (["data.npz", "small.npz"], "small.npz are [100, 8, 8, 1]; want grey images [N, 28, 28, 1]"),
        (["data.npz", "many.npz"], "there are 400 samples; want 2 to 160, half of the 320 real images"),
        (["data.npz", "good.npz", "--splits", "0"], "splits is 0; want at least 1"),
        (["data.npz", "good.npz", "--classifier", "text"], "text is not a classifier of this command; name another"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(files, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(files)
    if "--classifier" not in arguments:
        arguments = [*arguments, "--classifier", "classifier.pt"]
    with pytest.raises(SystemExit) as exit_:
        frechet.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m bench.frechet: error: ")
    assert message in error


def test_help_explains_the_comparison_with_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        frechet.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for text_in_help in (
        "compare only distances of equally many images",
        "--classifier FILE",
        "example:",
        "fastddpm sample",
    ):
        assert text_in_help in text
