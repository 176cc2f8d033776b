"""The specification against closed forms, data whose optimal eps-model is known, and diffusers in float64.

Statistical bounds are `DEVIATIONS` standard errors of the estimate, with fixed seeds.
"""

import ast
import itertools
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm import reference
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import step_rows, x_0_rows
from fastddpm.reference.diffusion import Diffusion, add_noise, linear_betas, predicted_x_0, target, update

DEVIATIONS = 5  # one of 1.7 million normal draws is outside of this range
PAPER = Diffusion(linear_betas())
SHORT = Diffusion(linear_betas(50, 0.002, 0.4))
VARIANCE_TYPES = ["fixed_small", "fixed_large"]
SHAPES = [(6, 5), (6, 4, 7), (6, 3, 8, 8), (6, 2, 3, 4, 5)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(got: Tensor, want: Tensor) -> float:
    """The largest error of an entry, relative to its largest value; NaN if got has one."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype == torch.float64
    difference, size = ((x.reshape(len(x), -1)).abs().amax(1) for x in (got - want, want))
    return (difference / size).max().item()


def test_a_damaged_result_has_an_error():
    want = randn(3, 4)
    assert error(want, want) == 0
    for damage in (want * (1 + 3e-12), want + torch.eye(3, 4) * 1e-10, want * math.nan):
        assert not error(damage, want) <= 1e-12
    for damage in (want[:2], want.float()):
        with pytest.raises(AssertionError):
            error(damage, want)


def test_specification_imports_only_torch():
    files = list(Path(reference.__file__).parent.glob("*.py"))
    assert len(files) == 7
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(file.read_text())) for file in files):
        imported = [node.module] if isinstance(node, ast.ImportFrom) else []
        imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        others = {name.split(".")[0] for name in imported if not name.startswith("fastddpm.reference.")}
        assert others <= {"torch", *sys.stdlib_module_names}


# Betas and their products


def test_linear_betas_equal_the_paper():
    betas = linear_betas()
    assert betas.shape == (1000,)
    assert betas.dtype == torch.float64
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    assert error(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64)) <= 1e-12


def test_alphas_cumprod_is_the_running_product():
    alphas = [1 - beta for beta in PAPER.betas.tolist()]
    abar = torch.tensor(list(itertools.accumulate(alphas, lambda a, b: a * b)), dtype=torch.float64)
    assert PAPER.T == 1000
    assert error(PAPER.alphas, torch.tensor(alphas, dtype=torch.float64)) == 0
    assert error(PAPER.alphas_cumprod, abar) <= 1e-12
    assert torch.equal(PAPER.alphas_cumprod_prev[1:], PAPER.alphas_cumprod[:-1])
    assert PAPER.alphas_cumprod_prev[0] == 1


def test_products_are_float64_for_float32_betas():
    betas = linear_betas().float()
    assert torch.equal(Diffusion(betas).alphas_cumprod, Diffusion(betas.double()).alphas_cumprod)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [1.0], [math.nan], 0.1, [[0.5, 0.5], [0.5, 0.5]]])
def test_bad_betas_are_rejected(betas):
    message = r"^betas are \([\d, ]*\), \d not in 0 < beta < 1; want \[T\], all of them in it$"
    with pytest.raises(ValueError, match=message):
        Diffusion(torch.tensor(betas))


# The forward process, eq. 2 and 4


def test_steps_of_eq_2_give_the_moments_of_eq_4():
    """The mean and the variance of x_t given x_0 at every t of 1000 steps."""
    nothing, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    mean, var = one, nothing
    for t in range(PAPER.T):
        mean = PAPER.diffuse(mean, t, nothing)
        var = PAPER.diffuse(one, t, nothing).square() * var + PAPER.diffuse(nothing, t, one).square()
        assert error(PAPER.noised(one, t, nothing), mean) <= 1e-12
        assert error(PAPER.noised(nothing, t, one).square(), var) <= 1e-12


def test_steps_of_eq_2_give_the_distribution_of_eq_4():
    """Data of two points, +1 and -1/2: 100,000 draws by the steps and as many directly have the same distribution, by
    the two-sample Kolmogorov-Smirnov distance at a significance of one in a million."""
    n = 100_000
    limit = math.sqrt(math.log(2 / 1e-6) / n)  # asymptotic, for two samples of n each
    x_0 = torch.tensor([1.0, -0.5]).double().repeat(n // 2)[:, None]
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    x = x_0
    for t in range(SHORT.T):
        x = SHORT.diffuse(x, t, draw())
        if t in (0, 5, 15, 30, 49):
            assert ks_distance(x, SHORT.noised(x_0, t, draw())) <= limit
            assert ks_distance(x, SHORT.noised(x_0, t, 0.85 * draw())) > limit  # the test has power


def ks_distance(a: Tensor, b: Tensor) -> float:
    """The largest distance of the distribution functions of two samples of the same size."""
    values, of_a = torch.cat([a.flatten(), b.flatten()]).sort().indices, a.numel()
    return (torch.where(values < of_a, 1.0, -1.0).cumsum(0).abs().max() / of_a).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_noising_is_two_products_and_a_sum_in_float32(shape, layout):
    """Bit for bit, with coefficients rounded once from float64, a timestep for each entry, either memory layout."""
    x_0, eps = randn(*shape, dtype=torch.float32), randn(*shape, seed=1, dtype=torch.float32)
    if layout == "channels_last":
        x_0 = x_0.movedim(1, -1).contiguous().movedim(-1, 1)
    t = torch.tensor([0, 1, 10, 500, 998, 999])
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t].reshape(-1, *[1] * (len(shape) - 1))
    signal, noise = np.sqrt(abar).astype(np.float32), np.sqrt(1 - abar).astype(np.float32)
    want = torch.from_numpy(signal * x_0.numpy() + noise * eps.numpy())
    got = PAPER.noised(x_0, t, eps)
    assert torch.equal(got, want)
    assert got.stride() == x_0.stride()
    rows = torch.from_numpy(np.stack([signal.ravel(), noise.ravel()], 1))
    assert torch.equal(add_noise(x_0, eps, rows), want)
    assert torch.equal(add_noise(x_0, eps, rows[2])[2], want[2])


def test_each_entry_may_have_its_own_timestep():
    x, other, t = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1), torch.tensor([0, 1, 7, 20, 48, 49])
    for method in (SHORT.diffuse, SHORT.noised):
        want = torch.cat([method(x[i : i + 1], int(t[i]), other[i : i + 1]) for i in range(6)])
        assert torch.equal(method(x, t, other), want)
    for clip in (None, 0.5):
        want = torch.cat([SHORT.step(x[i : i + 1], other[i : i + 1], int(t[i]), clip=clip) for i in range(6)])
        assert torch.equal(SHORT.step(x, other, t, clip=clip), want)
    mean, var = SHORT.posterior(x, other, t)
    assert mean.shape == x.shape
    assert torch.equal(var.flatten(), SHORT.posterior_var[t])


# The posterior, eq. 6 and 7


def test_posterior_follows_from_bayes_rule():
    """As a function of x_{t-1}, q(x_t | x_{t-1}) q(x_{t-1} | x_0) is a product of two Gaussians: the precisions are
    added, and the mean is that of the means, weighted by precision."""
    t = torch.arange(1, PAPER.T)
    x_0, x_t = randn(999, 1), randn(999, 1, seed=1)
    alpha, beta, abar_prev = (x[t, None] for x in (PAPER.alphas, PAPER.betas, PAPER.alphas_cumprod_prev))
    likelihood, prior = alpha / beta, 1 / (1 - abar_prev)  # precisions
    want_var = 1 / (likelihood + prior)
    want = (likelihood * x_t / alpha.sqrt() + prior * abar_prev.sqrt() * x_0) * want_var
    mean, var = PAPER.posterior(x_0, x_t, t)
    assert error(mean, want) <= 1e-12
    assert error(var, want_var) <= 1e-12


def test_posterior_of_the_last_step_is_x_0():
    x_0, x_t = randn(4, 3), randn(4, 3, seed=1)
    mean, var = PAPER.posterior(x_0, x_t, 0)
    assert error(mean, x_0) <= 1e-12
    assert (var == 0).all()


def test_posterior_is_the_conditional_distribution_of_the_forward_process():
    """Over 400,000 draws, regress x_{t-1} on x_0 and x_t: the coefficients and the residual variance are eq. 7's."""
    n, t = 400_000, 10
    x_0, x_prev = randn(n, 1, seed=1), SHORT.noised(randn(n, 1, seed=1), t - 1, randn(n, 1, seed=2))
    x_t = SHORT.diffuse(x_prev, t, randn(n, 1, seed=3))
    design = torch.cat([x_0, x_t], 1)
    gram = design.T @ design
    fitted = torch.linalg.solve(gram, design.T @ x_prev)[:, 0]
    var = (x_prev - design @ fitted[:, None]).square().mean()
    one, nothing = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    want = torch.cat([SHORT.posterior(one, nothing, t).mean, SHORT.posterior(nothing, one, t).mean])[:, 0]
    want_var = SHORT.posterior_var[t]
    assert ((fitted - want).abs() <= DEVIATIONS * (want_var * torch.linalg.inv(gram).diagonal()).sqrt()).all()
    assert (var - want_var).abs() <= DEVIATIONS * want_var * math.sqrt(2 / n)


# Algorithm 1


def test_loss_is_the_mean_squared_error_of_eps():
    x_0, eps, t = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1), torch.tensor([0, 1, 7, 20, 48, 49])
    abar = SHORT.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    assert SHORT.loss(lambda x, t: eps, x_0, t, eps) == 0
    assert error(SHORT.loss(lambda x, t: torch.zeros_like(x), x_0, t, eps)[None], eps.square().mean()[None]) <= 1e-12
    model = lambda x, t: x.tanh() * t.reshape(-1, 1, 1, 1)
    want = (eps - x_t.tanh() * t.reshape(-1, 1, 1, 1)).square().mean()
    assert error(SHORT.loss(model, x_0, t, eps)[None], want[None]) <= 1e-12


def test_training_loss_draws_t_uniformly_and_eps_normally():
    """As the model sees them: counts of t by chi-square, the eps that x_t implies by its first four moments."""
    n, seen = 100_000, []
    x_0 = randn(n, 2)
    loss = SHORT.training_loss(lambda x, t: seen.append((x, t)) or x, x_0, torch.Generator().manual_seed(1))
    ((x_t, t),) = seen
    assert t.shape == (n,)
    assert t.dtype == torch.int64
    counts = t.bincount(minlength=50)
    assert len(counts) == 50
    chi_square = ((counts - n / 50).square() / (n / 50)).sum()
    assert (chi_square - 49).abs() <= DEVIATIONS * math.sqrt(2 * 49)
    abar = SHORT.alphas_cumprod[t, None]
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    for power, moment, var in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (eps.pow(power).mean() - moment).abs() <= DEVIATIONS * math.sqrt(var / eps.numel())
    assert ((eps * x_0).mean()).abs() <= DEVIATIONS / math.sqrt(eps.numel())
    assert ((eps[:, 0] * eps[:, 1]).mean()).abs() <= DEVIATIONS / math.sqrt(n)
    assert error(loss[None], (eps - x_t).square().mean()[None]) <= 1e-12


def test_training_loss_depends_on_its_generator_alone():
    x_0 = randn(8, 3)
    loss = lambda seed: SHORT.training_loss(lambda x, t: x, x_0, torch.Generator().manual_seed(seed))
    assert loss(1) == loss(1) != loss(2)


def test_training_loss_has_its_minimum_at_the_optimal_model():
    """For data from N(0, v) the optimal eps-model is x_t sqrt(1 - abar) / (abar v + 1 - abar). Its expected loss is
    1 - (1 - abar) / (abar v + 1 - abar); a factor c adds (c - 1)^2 (1 - abar) / (abar v + 1 - abar)."""
    n, v = 400_000, 0.25
    share = (1 - SHORT.alphas_cumprod) / (SHORT.alphas_cumprod * v + 1 - SHORT.alphas_cumprod)
    x_0 = math.sqrt(v) * randn(n, 1)
    losses = []
    for c in (1, 0.8, 1.2):
        model = lambda x, t, c=c: c * x * (share[t] / (1 - SHORT.alphas_cumprod[t]).sqrt())[:, None]
        losses.append(SHORT.training_loss(model, x_0, torch.Generator().manual_seed(1)))
        want = (1 - share + (c - 1) ** 2 * share).mean()
        spread = 2 * (1 - share + (c - 1) ** 2 * share).square().mean() + (share * (1 - (c - 1) ** 2)).var()
        assert (losses[-1] - want).abs() <= DEVIATIONS * (spread / n).sqrt()  # of a square, and over t
    assert losses[0] < min(losses[1:])


# Algorithm 2 on Gaussian data


class Gaussian:
    """Data from N(mean, cov), for which DDPM is linear algebra.

    x_t is from N(sqrt(abar) mean, V_t), V_t = abar cov + (1 - abar) I, and the optimal eps-model is
    E[eps | x_t] = sqrt(1 - abar) V_t^-1 (x_t - sqrt(abar) mean).
    """

    def __init__(self, variances: list[float], mean: list[float]):
        rotation = torch.linalg.qr(randn(len(mean), len(mean), seed=5)).Q  # no axis is special
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.cov = rotation @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ rotation.T

    def var_t(self, abar: Tensor) -> Tensor:
        """[..., D, D] of abar [...]."""
        return abar[..., None, None] * self.cov + (1 - abar)[..., None, None] * torch.eye(len(self.mean)).double()

    def model(self, diffusion: Diffusion):
        abar = diffusion.alphas_cumprod
        inverse = torch.linalg.inv(self.var_t(abar))

        def eps_model(x: Tensor, t: Tensor) -> Tensor:
            centred = x - abar[t, None].sqrt() * self.mean
            return (1 - abar[t, None]).sqrt() * (inverse[t] @ centred[..., None])[..., 0]

        return eps_model

    def sampled(self, diffusion: Diffusion, variance_type: str, noise: bool = True) -> tuple[Tensor, Tensor]:
        """The exact mean and covariance of samples by Algorithm 2, carried through `step`, which is affine here."""
        model, d = self.model(diffusion), len(self.mean)
        mean, cov = torch.zeros(d).double(), torch.eye(d).double()
        probes = torch.cat([torch.zeros(1, d), torch.eye(d)]).double()
        for t in reversed(range(diffusion.T)):
            where = torch.full((d + 1,), t)
            images = diffusion.step(probes, model(probes, where), t)
            matrix = (images[1:] - images[0]).T
            noises = torch.zeros(d, d).double()
            if noise:
                still = torch.zeros(d, d).double()
                eps = model(still, where[1:])
                noises = diffusion.step(still, eps, t, torch.eye(d).double(), variance_type=variance_type)
                noises = noises - diffusion.step(still, eps, t)
            mean, cov = matrix @ mean + images[0], matrix @ cov @ matrix.T + noises @ noises.T
        return mean, cov

    def closed_form(self, diffusion: Diffusion, variance_type: str, noise: bool = True) -> tuple[Tensor, Tensor]:
        """The same in closed form: steps t..0 multiply by sqrt(abar_t) cov V_t^-1, a telescoping product."""
        sigma = diffusion.sigmas(variance_type) * noise
        abar, prev = diffusion.alphas_cumprod[-1], diffusion.alphas_cumprod_prev[1:]
        whole, rest = (torch.linalg.solve(self.var_t(a), self.cov) for a in (abar, prev))
        mean = self.mean - abar * whole @ self.mean
        cov = abar * whole @ whole + ((sigma[1:].square() * prev)[:, None, None] * rest @ rest).sum(0)
        return mean, cov


DATA = Gaussian([0.25, 1.0, 4.0], [1.0, -2.0, 0.5])


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_sampling_a_gaussian_has_its_closed_form(variance_type, noise):
    mean, cov = DATA.sampled(PAPER, variance_type, noise)
    want_mean, want_cov = DATA.closed_form(PAPER, variance_type, noise)
    assert error(mean[None], want_mean[None]) <= 1e-12
    assert error(cov[None], want_cov[None]) <= 1e-12


def test_large_sigma_is_exact_for_unit_data_and_small_sigma_for_a_point():
    """Section 3.2. Large: every step keeps N(0, I) except the last, which adds no noise and leaves a variance of
    1 - beta_0. Small: every x_T leads to the point itself."""
    _, cov = Gaussian([1.0, 1.0], [0.0, 0.0]).sampled(PAPER, "fixed_large")
    assert error(cov[None], (1 - PAPER.betas[0]) * torch.eye(2).double()[None]) <= 1e-12
    point = Gaussian([0.0, 0.0], [1.0, -2.0])
    x_0 = PAPER.sample(point.model(PAPER), randn(8, 2), lambda t: randn(8, 2, seed=t), variance_type="fixed_small")
    assert error(x_0, point.mean.expand(8, 2)) <= 1e-12


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_sampling_returns_the_data_as_T_grows(variance_type):
    """The mean is off only by what x_T contains of the data, abar_T cov V_T^-1 mean. The covariance is off by O(1/T):
    the rate log2(error(T) / error(2T)) approaches 1 with each doubling of T."""
    errors = []
    for T in (250, 500, 1000, 2000, 4000, 8000):
        diffusion = Diffusion(linear_betas(T, 0.1 / T, 20 / T))  # T = 1000: the paper's
        abar = diffusion.alphas_cumprod[-1]
        mean, cov = DATA.closed_form(diffusion, variance_type)
        left = abar * DATA.cov @ torch.linalg.solve(DATA.var_t(abar), DATA.mean)
        assert error((mean + left)[None], DATA.mean[None]) <= 1e-12
        assert abar < math.exp(-10)  # the exponent is minus the integral of the betas
        errors.append(torch.linalg.matrix_norm(cov - DATA.cov).item())
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    distances = [abs(rate - 1) for rate in rates]
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    assert all(fine < coarse for coarse, fine in itertools.pairwise(errors))


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_sampling_returns_the_data_by_monte_carlo(variance_type):
    """10,000 samples in 1000 steps. The exact moments are met within the standard errors of the estimates (squared, of
    the mean: cov / N; of the covariance C_ij: (C_ij^2 + C_ii C_jj) / N), the data's within these plus the exact bias
    at T = 1000."""
    n = 10_000
    generator = torch.Generator().manual_seed(1)
    draw = lambda *_: torch.randn(n, 3, generator=generator, dtype=torch.float64)
    x_0 = PAPER.sample(DATA.model(PAPER), draw(), draw, variance_type=variance_type)
    mean, cov = DATA.closed_form(PAPER, variance_type)
    mean_error = (cov.diagonal() / n).sqrt()
    cov_error = ((cov.square() + torch.outer(cov.diagonal(), cov.diagonal())) / n).sqrt()
    assert ((x_0.mean(0) - mean).abs() <= DEVIATIONS * mean_error).all()
    assert ((x_0.T.cov() - cov).abs() <= DEVIATIONS * cov_error).all()
    assert ((x_0.mean(0) - DATA.mean).abs() <= DEVIATIONS * mean_error + (mean - DATA.mean).abs()).all()
    assert ((x_0.T.cov() - DATA.cov).abs() <= DEVIATIONS * cov_error + (cov - DATA.cov).abs()).all()
    assert ((cov - DATA.cov).abs() <= 2 * cov_error).all()  # the bias is too small to hide an error


def test_without_sigma_z_the_variance_collapses():
    """The rest, abar_T (cov V_T^-1)^2, is below a thousandth of the data's in every direction; the mean is right."""
    mean, cov = DATA.closed_form(PAPER, "fixed_small", noise=False)
    x_T = randn(50, 3)
    x_0 = PAPER.sample(DATA.model(PAPER), x_T, None)
    root = torch.linalg.solve(DATA.var_t(PAPER.alphas_cumprod[-1]), DATA.cov) * PAPER.alphas_cumprod[-1].sqrt()
    assert error(root @ root.T.contiguous(), cov) <= 1e-12
    assert error(x_0, mean + x_T @ root.T) <= 1e-12
    assert torch.linalg.eigvalsh(DATA.cov - 1000 * cov).min() > 0
    assert torch.equal(mean, DATA.closed_form(PAPER, "fixed_small")[0])


# Algorithm 2, step and loop


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_state(dtype):
    x, eps, t = randn(2, 3).to(dtype), randn(2, 3, seed=1).to(dtype), torch.tensor([3, 40])
    results = [
        SHORT.diffuse(x, t, eps),
        SHORT.noised(x, t, eps),
        *SHORT.posterior(x, eps, t),
        SHORT.predicted_x_0(x, t, eps),
        *(SHORT.step(x, m, t, x, clip=clip) for m in (eps.half(), eps.double()) for clip in (None, 1.0)),
        *(update(x, m, randn(8), x, clip=clip) for m in (eps.half(), eps.double()) for clip in (False, True)),
        SHORT.sample(lambda x, t: x / 2, x, lambda t: eps),
        SHORT.loss(lambda x, t: x / 2, x, t, eps),
        SHORT.training_loss(lambda x, t: x / 2, x),
    ]
    assert {result.dtype for result in results} == {dtype}
    assert all(result.isfinite().all() for result in results)


def test_sigma_is_zero_at_the_last_step_alone():
    for variance_type, want in [("fixed_small", PAPER.posterior_var), ("fixed_large", PAPER.betas)]:
        sigmas = PAPER.sigmas(variance_type)
        assert sigmas[0] == 0
        assert error(sigmas[1:].square(), want[1:]) <= 1e-12
        assert (sigmas[1:] > 0).all()
    assert (PAPER.sigmas("fixed_small")[1:] < PAPER.sigmas("fixed_large")[1:]).all()
    with pytest.raises(ValueError, match=r"^variance_type is 'learned'; want one of fixed_small, fixed_large$"):
        PAPER.sigmas("learned")


def test_step_rounds_its_coefficients_once():
    """In float32, bit for bit."""
    x, eps, z = (randn(1000, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    beta, alpha, abar, sigma = PAPER.betas, PAPER.alphas, PAPER.alphas_cumprod, PAPER.sigmas()
    of_eps, of_x, of_z = (v[:, None].float().numpy() for v in (beta / (1 - abar).sqrt(), alpha.sqrt(), sigma))
    want = (x.numpy() - of_eps * eps.numpy()) / of_x + of_z * z.numpy()
    assert torch.equal(PAPER.step(x, eps, torch.arange(1000), z), torch.from_numpy(want))


def test_predicted_x_0_of_the_true_noise_is_x_0():
    x_0, eps, t = randn(1000, 4), randn(1000, 4, seed=1), torch.arange(1000)
    x_t = PAPER.noised(x_0, t, eps)
    condition = (
        1 / PAPER.alphas_cumprod.sqrt()[:, None]
    )  # the factor by which the division enlarges the rounding of x_t
    got = PAPER.predicted_x_0(x_t, t, eps)
    assert error((got - x_0) / condition + x_0, x_0) <= 1e-12


def test_a_clip_that_nothing_reaches_changes_nothing():
    """Eq. 7 at the x_0 of eq. 15 is eq. 11."""
    x, eps, t = randn(1000, 4), randn(1000, 4, seed=1), torch.arange(1000)
    assert error(PAPER.step(x, eps, t, clip=1e6), PAPER.step(x, eps, t)) <= 1e-12


def test_clip_clamps_the_predicted_x_0():
    """The step is then the posterior's mean at the clamped x_0."""
    x, eps, t = randn(1000, 4), randn(1000, 4, seed=1), torch.arange(1000)
    x_0 = PAPER.predicted_x_0(x, t, eps)
    want = PAPER.posterior(x_0.clamp(-0.5, 0.5), x, t).mean
    assert torch.equal(PAPER.step(x, eps, t, clip=0.5), want)
    changed = (PAPER.step(x, eps, t) - want).abs() > 1e-9
    assert torch.equal(changed[1:], x_0.abs()[1:] > 0.5)
    x_0 = SHORT.sample(lambda x, t: x, 3 * x, lambda t: randn(1000, 4, seed=t), clip=0.5)
    assert x_0.abs().max() <= 0.5 * (1 + 1e-12)


def test_sample_visits_every_step_once_in_order():
    asked, seen = [], []
    model = lambda x, t: seen.append(t) or torch.zeros_like(x)
    SHORT.sample(model, randn(2, 3), lambda t: asked.append(t) or torch.zeros(2, 3).double())
    assert asked == list(range(49, 0, -1))
    assert torch.equal(torch.stack(seen), torch.arange(49, -1, -1)[:, None].expand(50, 2))
    assert {t.dtype for t in seen} == {torch.int64}


def test_sample_takes_one_step_after_another():
    model = lambda x, t: torch.tanh(x + t[:, None] / 50)
    x = x_T = randn(4, 3)
    for t in range(49, -1, -1):
        x = SHORT.step(x, model(x, torch.full((4,), t)), t, randn(4, 3, seed=t), variance_type="fixed_large", clip=1.0)
    noise = lambda t: randn(4, 3, seed=t)
    assert torch.equal(SHORT.sample(model, x_T, noise, variance_type="fixed_large", clip=1.0), x)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_predicted_x_0_of_the_target_is_x_0(predicts):
    """With the rows of a step table, which tests/core/test_table.py compares with the papers' formulas."""
    schedule, t = Schedule(prediction_type=predicts, clip_sample=False), torch.tensor([0, 1, 500, 998, 999])
    x_0, eps = randn(5, 3, 4), randn(5, 3, 4, seed=1)
    noising = torch.stack([PAPER.alphas_cumprod, 1 - PAPER.alphas_cumprod], 1).sqrt()[t]
    (rows, scale), x_t = step_rows(schedule, t), add_noise(x_0, eps, noising)
    got = predicted_x_0(x_t, target(x_0, eps, noising, predicts), x_0_rows(rows, scale))
    assert error(got, x_0) <= 1e-11


def test_target_of_v_prediction_equals_diffusers():
    """In float32, bit for bit: the same two products and their difference."""
    scheduler, t = diffusers.DDPMScheduler(), torch.tensor([0, 1, 500, 998, 999])
    x_0, eps = (randn(5, 3, 4, 4, seed=seed, dtype=torch.float32) for seed in range(2))
    signal = scheduler.alphas_cumprod[t].sqrt()
    noising = torch.stack([signal, (1 - scheduler.alphas_cumprod[t]).sqrt()], 1)
    assert torch.equal(target(x_0, eps, noising, "v_prediction"), scheduler.get_velocity(x_0, eps, t))


# The affine update


def rows(diffusion: Diffusion, variance_type: str, clip: float | None) -> Tensor:
    """[T, 8] float64: the paper's coefficients as cx, cm, lo, hi, A, B, C, S."""
    beta, alpha, abar, prev = diffusion.betas, diffusion.alphas, diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    nothing = torch.zeros_like(beta)
    limit = (clip or 0) * abar.sqrt()
    predicted = [torch.ones_like(beta), -(1 - abar).sqrt(), -limit, limit]
    if clip:
        mean = [(prev / abar).sqrt() * beta / (1 - abar), alpha.sqrt() * (1 - prev) / (1 - abar), nothing]
    else:
        mean = [nothing, 1 / alpha.sqrt(), -beta / ((1 - abar) * alpha).sqrt()]
    return torch.stack([*predicted, *mean, diffusion.sigmas(variance_type)], 1)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_update_equals_the_papers_step(variance_type, clip):
    x, m, z, t = randn(1000, 5), randn(1000, 5, seed=1), randn(1000, 5, seed=2), torch.arange(1000)
    table = rows(PAPER, variance_type, clip)
    want = PAPER.step(x, m, t, z, variance_type=variance_type, clip=clip)
    assert error(update(x, m, table, z, clip=clip is not None), want) <= 1e-12
    want = PAPER.step(x, m, t, clip=clip)
    assert error(update(x, m, table, None, clip=clip is not None), want) <= 1e-12


def by_hand(x, m, row, z, clip):
    """The update in numpy, which rounds every operation once. Args: row: [8] numpy floats."""
    cx, cm, lo, hi, A, B, C, S = row
    if clip:
        w = np.minimum(np.maximum(cx * x + cm * m, lo), hi)
        return ((A * w + B * x) + C * m) + S * z
    return (B * x + C * m) + S * z


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_rounds_in_the_written_order(shape, clip):
    """Bit for bit in float32, with a row for each entry or for all, in either memory layout."""
    x, m, z = (randn(*shape, seed=seed, dtype=torch.float32) for seed in range(3))
    table = randn(6, 8, seed=3, dtype=torch.float32)
    _, _, lo, hi, *_ = table.unbind(1)
    lo.fill_(-0.7)
    hi.fill_(0.6)
    want = np.stack([by_hand(*(v[i].numpy() for v in (x, m, table, z)), clip) for i in range(6)])
    got = update(x, m, table, z, clip=clip)
    assert torch.equal(got, torch.from_numpy(want))
    assert torch.equal(update(x, m, table[4], z, clip=clip)[4], got[4])
    last = [v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (x, m, z)]
    of_last = update(last[0], last[1], table, last[2], clip=clip)
    assert torch.equal(of_last, got)
    assert of_last.stride() == last[0].stride()

    cx, cm, lo, hi, A, B, C, S = table.reshape(6, 8, *[1] * (len(shape) - 1)).unbind(1)
    w = (cx * x + cm * m).clamp(lo, hi) if clip else torch.zeros_like(x)
    assert not torch.equal(A * clip * w + (B * x + (C * m + S * z)), got)  # another order gives other bits


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_update_widens_the_networks_output(dtype, clip):
    x, m, z = (randn(6, 3, 4, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    table = rows(SHORT, "fixed_small", 1.0 if clip else None)[:6].float()
    got = update(x, m.to(dtype), table, z, clip=clip)
    assert got.dtype == torch.float32
    assert torch.equal(got, update(x, m.to(dtype).float(), table, z, clip=clip))
    assert not torch.equal(got, update(x, m, table, z, clip=clip))


@pytest.mark.parametrize("clip", [False, True])
def test_update_adds_no_noise_where_s_is_zero(clip):
    """Not even 0 * inf, in a batch with entries that get noise."""
    x, m = randn(6, 3), randn(6, 3, seed=1)
    table = rows(SHORT, "fixed_small", 1.0 if clip else None)[[0, 3, 0, 5, 0, 7]]
    z = torch.full_like(x, math.inf)
    got, still = update(x, m, table, z, clip=clip), update(x, m, table, None, clip=clip)
    assert torch.equal(got[::2], still[::2])
    assert (got[1::2] == math.inf).all()
    assert torch.equal(update(x, m, table[0], z, clip=clip), update(x, m, table[0], None, clip=clip))


def test_update_propagates_nan():
    table = rows(SHORT, "fixed_small", 1.0)[7]
    m = torch.tensor([[0.1, math.nan, 0.2]]).double()
    assert update(randn(1, 3), m, table, None, clip=True).isnan().tolist() == [[False, True, False]]


# diffusers


def scheduler(diffusion: Diffusion, variance_type: str, clip: float | None) -> diffusers.DDPMScheduler:
    """diffusers' scheduler with float64 betas; it makes its own in float32."""
    made = diffusers.DDPMScheduler(
        trained_betas=diffusion.betas.tolist(),
        variance_type=variance_type,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    made.betas, made.alphas, made.alphas_cumprod = diffusion.betas, diffusion.alphas, diffusion.alphas_cumprod
    return made


@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_every_step_equals_diffusers(variance_type, clip):
    theirs = scheduler(PAPER, variance_type, clip)
    x, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for t in range(PAPER.T):
        want = theirs.step(eps, t, x, generator=torch.Generator().manual_seed(t))
        got = PAPER.step(x, eps, t, randn(*x.shape, seed=t), variance_type=variance_type, clip=clip)
        assert error(got, want.prev_sample) <= 1e-12
        x_0 = PAPER.predicted_x_0(x, t, eps)
        assert error(x_0 if clip is None else x_0.clamp(-clip, clip), want.pred_original_sample) <= 1e-12


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_sample_equals_diffusers(variance_type, clip):
    """1000 steps with the same noise and a nonlinear model."""
    theirs = scheduler(PAPER, variance_type, clip)
    model = lambda x, t: torch.sin(x + 0.3 * x.roll(1, -1)) + 0.1 * torch.cos(t / 100).reshape(-1, 1, 1, 1)
    x = x_T = randn(2, 3, 4, 4)
    generator = torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        x = theirs.step(model(x, t[None]), t, x, generator=generator).prev_sample
    generator.manual_seed(1)
    noise = lambda t: torch.randn(x_T.shape, generator=generator, dtype=torch.float64)
    got = PAPER.sample(model, x_T, noise, variance_type=variance_type, clip=clip)
    assert error(got, x) <= 1e-12


def test_noised_equals_diffusers():
    x_0, eps, t = randn(1000, 4), randn(1000, 4, seed=1), torch.arange(1000)
    assert error(PAPER.noised(x_0, t, eps), scheduler(PAPER, "fixed_small", None).add_noise(x_0, eps, t)) <= 1e-12
