"""The bound of the specification: closed forms for Gaussian data with the optimal model, and the decoder's bins."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fastddpm.reference.diffusion import Diffusion, linear_betas
from fastddpm.reference.likelihood import BYTES, PCM, SIGNS, bound, decoder_nll, normal_kl, normal_nll, prior_kl, term
from tests.support.check import error_line

PROCESS = Diffusion(linear_betas(20, 0.01, 0.3))
MU, VAR = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.1, 2.0], dtype=torch.float64)


def optimal(process, mu=MU, var=VAR):
    """E[eps | x_t] of data from N(mu, diag(var))."""

    def model(x_t, t):
        abar = process.alphas_cumprod[t][:, None]
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mu) / (abar * var + 1 - abar)

    return model


def corners(mu=MU, var=VAR):
    """x_0 and eps at the nodes of the two-point Gauss-Hermite rule in each element, exact for squares."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * (2 * len(mu)))
    return mu + signs[:, : len(mu)] * var.sqrt(), signs[:, len(mu) :]


def expected_term(process, t, variance_type, var=VAR):
    """The expected term at t of the optimal model, whose mean is off by A_t times the spread of x_0 given x_t."""
    abar, previous, beta = process.alphas_cumprod[t], process.alphas_cumprod_prev[t], process.betas[t]
    spread = var * (1 - abar) / (abar * var + 1 - abar)
    small = process.posterior_var[1] if t == 0 else process.posterior_var[t]
    p = small if variance_type == "fixed_small" or t == 0 else beta
    if t == 0:
        return ((2 * math.pi * p).log() / 2 + spread / (2 * p)).sum()
    A = previous.sqrt() * beta / (1 - abar)
    return ((p / small).log() + small / p - 1 + A**2 * spread / p).sum() / 2


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", range(20))
def test_every_term_of_gaussian_data_has_its_closed_form(t, variance_type):
    x_0, eps = corners()
    at = torch.full((len(x_0),), t)
    got = term(PROCESS, optimal(PROCESS), x_0, at, eps, variance_type=variance_type, bins=None).mean()
    torch.testing.assert_close(got, expected_term(PROCESS, t, variance_type), rtol=1e-11, atol=1e-12)


def test_prior_kl_has_its_closed_form():
    x_0, _ = corners()
    abar = PROCESS.alphas_cumprod[-1]
    want = (abar * (VAR + MU**2) - abar - (1 - abar).log()).sum() / 2
    torch.testing.assert_close(prior_kl(PROCESS, x_0).mean(), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("T", [1, 2, 20, 80])
def test_bound_of_the_true_reverse_process_is_the_entropy(T):
    """Apart from L_T, which tends to 0. A fixed variance, equal for all elements, gives a larger bound."""
    process = Diffusion(linear_betas(T, 0.02, min(0.9, 12 / T)))
    abar = process.alphas_cumprod
    spread = VAR * (1 - abar[:, None]) / (abar[:, None] * VAR + 1 - abar[:, None])
    A = process.alphas_cumprod_prev.sqrt() * process.betas / (1 - abar)
    true_var = process.posterior_var[:, None] + A[:, None] ** 2 * spread
    model = lambda x, t: torch.cat([optimal(process)(x, t), true_var[t]], 1)
    x_0, eps = corners()
    mean, var = abar[-1].sqrt() * MU, abar[-1] * VAR + 1 - abar[-1]
    left = (var + mean**2 - 1 - var.log()).sum() / 2
    entropy = (2 * math.pi * math.e * VAR).log().sum() / 2
    exact = bound(process, model, x_0, lambda t: eps, variance_type="learned", bins=None).mean()
    torch.testing.assert_close(exact, entropy + left, rtol=1e-10, atol=1e-11)
    for fixed in ("fixed_small", "fixed_large"):
        loose = bound(process, optimal(process), x_0, lambda t: eps, variance_type=fixed, bins=None).mean()
        assert loose > entropy + left
    if T == 80:
        assert left < 1e-3


@pytest.mark.parametrize("log_var", [-9.0, -2.0, 3.0])
@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.003, 0.9])
def test_probabilities_of_the_decoders_bins_sum_to_one(mean, log_var):
    x = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    nll = decoder_nll(x, torch.tensor(mean, dtype=torch.float64), torch.tensor(log_var, dtype=torch.float64))
    assert nll.isfinite().all()
    assert abs(float((-nll).exp().sum()) - 1) < 1e-12


@pytest.mark.parametrize("sigma", [0.003, 0.1, 2.0])
def test_decoder_far_from_the_mean_equals_scipy(sigma):
    x = (np.arange(256) - 127.5) / 127.5
    for mean in (-3.0, -0.4, 1.2):
        low, high = (x - 1 / 255 - mean) / sigma, (x + 1 / 255 - mean) / sigma
        low[0], high[-1] = -np.inf, np.inf
        right = low + high > 0
        low, high = np.where(right, -high, low), np.where(right, -low, high)
        rest = norm.logcdf(low) - norm.logcdf(high)
        want = -(norm.logcdf(high) + np.log(-np.expm1(rest)))
        log_var = torch.tensor(2 * math.log(sigma), dtype=torch.float64)
        got = decoder_nll(torch.from_numpy(x), torch.tensor(mean, dtype=torch.float64), log_var)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-12)


def test_decoder_is_finite_in_float32_far_from_the_mean():
    x = (torch.arange(256).float() - 127.5) / 127.5
    assert decoder_nll(x, torch.tensor(5.0), torch.tensor(-10.0)).isfinite().all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("bins", [BYTES, None])
def test_learned_variance_equal_to_a_fixed_one_gives_its_terms(variance_type, bins):
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(20)
    x_0 = (torch.randint(0, 256, (20, 3), generator=generator).double() - 127.5) / 127.5
    eps = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    fixed = term(PROCESS, optimal(PROCESS), x_0, t, eps, variance_type=variance_type, clip=1.0, bins=bins)
    small = torch.cat([PROCESS.posterior_var[1:2], PROCESS.posterior_var[1:]])
    var = small if variance_type == "fixed_small" else torch.cat([small[:1], PROCESS.betas[1:]])
    end = {"fixed_small": -1.0, "fixed_large": 1.0}[variance_type]
    ends = torch.full((20,), end, dtype=torch.float64)
    ends[0] = -1
    for kind, v in (("learned", var), ("learned_range", ends)):
        model = lambda x, t, v=v: torch.cat([optimal(PROCESS)(x, t), v[t][:, None].expand_as(x)], 1)
        got = term(PROCESS, model, x_0, t, eps, variance_type=kind, clip=1.0, bins=bins)
        torch.testing.assert_close(got, fixed, rtol=1e-10, atol=1e-12)
        wrong = lambda x, t, v=v: torch.cat([optimal(PROCESS)(x, t), (0.9 * v[t])[:, None].expand_as(x)], 1)
        off = term(PROCESS, wrong, x_0, t, eps, variance_type=kind, clip=1.0, bins=bins)
        assert (off != fixed).all()


def test_all_prediction_types_give_the_same_terms():
    x_0, eps = corners()
    t = torch.arange(len(x_0)) % 20
    signal, noise = (PROCESS.alphas_cumprod[t].sqrt()[:, None], (1 - PROCESS.alphas_cumprod[t]).sqrt()[:, None])
    eps_hat = optimal(PROCESS)
    x_hat = lambda x, t: (x - noise * eps_hat(x, t)) / signal
    v_hat = lambda x, t: signal * eps_hat(x, t) - noise * x_hat(x, t)
    models = {"epsilon": eps_hat, "sample": x_hat, "v_prediction": v_hat}
    for clip in (None, 0.5):
        want, *others = (term(PROCESS, model, x_0, t, eps, predicts=kind, clip=clip) for kind, model in models.items())
        for other in others:
            torch.testing.assert_close(other, want, rtol=1e-10, atol=1e-12)


def test_bound_of_a_process_of_one_step():
    process = Diffusion(torch.tensor([0.3]))
    x_0, eps = corners()
    got = bound(process, optimal(process), x_0, lambda t: eps, bins=None)
    abar = 1 - process.betas[0]
    mean = (
        process.noised(x_0, 0, eps)
        - process.betas[0].sqrt() * optimal(process)(process.noised(x_0, 0, eps), torch.zeros(64, dtype=torch.int64))
    ) / abar.sqrt()
    nll = normal_nll(x_0, mean, process.betas[0].log()).sum(1)
    torch.testing.assert_close(got, nll + prior_kl(process, x_0), rtol=1e-12, atol=1e-12)


def test_normal_kl_and_nll_equal_torch_and_scipy():
    a, b = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    log_vars = (2 * torch.tensor([0.7, 1.9], dtype=torch.float64).log()).unbind()
    one, other = torch.tensor([0.3, -1.0], dtype=torch.float64).unbind()
    assert float(normal_kl(one, log_vars[0], other, log_vars[1])) == pytest.approx(
        float(torch.distributions.kl_divergence(a, b))
    )
    assert float(normal_nll(other, one, log_vars[0])) == pytest.approx(-norm.logpdf(-1.0, 0.3, 0.7))
    assert float(normal_kl(one, log_vars[0], one, log_vars[0])) == 0


def test_unknown_variance_type_is_rejected():
    x_0, eps = corners()
    line = error_line(
        term, PROCESS, optimal(PROCESS), x_0, torch.zeros(64, dtype=torch.int64), eps, variance_type="big"
    )
    assert line == "variance_type is 'big'; want one of fixed_small, fixed_large, learned, learned_range"


@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.0, 0.9999, 1.0, 1.2])
@pytest.mark.parametrize(
    ("bins", "centres"),
    [
        (BYTES, (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5),
        (PCM, torch.arange(-32768, 32768) / 32768),
        (SIGNS, torch.tensor([-1.0, 1.0])),
    ],
)
def test_probabilities_of_all_bins_add_up_to_one(bins, centres, mean):
    for log_var in (-18.0, -6.0, 0.0):
        nll = decoder_nll(centres.double(), torch.tensor(mean).double(), torch.tensor(log_var).double(), bins)
        assert abs(float(torch.exp(-nll).sum()) - 1) < 1e-9


def test_the_probability_of_a_sign_is_that_of_its_half_line():
    mean, log_var = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    nll = decoder_nll(torch.tensor([-1.0, 1.0], dtype=torch.float64), mean, log_var, SIGNS)
    positive = torch.special.ndtr(mean / torch.exp(log_var / 2))
    assert torch.allclose(torch.exp(-nll), torch.stack([1 - positive, positive]), rtol=1e-12)
