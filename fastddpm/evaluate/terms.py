"""The terms of the variational bound (Ho et al. 2020, arXiv:2006.11239, eq. 5), and which of them to evaluate.

Equation numbers are those of that paper unless another one is named.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import noise
from fastddpm.core.schedule import Schedule
from fastddpm.core.table import step_rows, x_0_rows
from fastddpm.reference.diffusion import predicted_x_0
from fastddpm.reference.likelihood import Bins, decoder_nll, normal_kl, normal_nll
from fastddpm.sampling.sampler import Sampler


class BoundTerms:
    """Computes the terms of a batch, [n] float64 nats each, from coefficients [T] float64 on the device.

    q(x_{t-1} | x_t, x_0) is normal. Its mean is x_0_factor x_0 plus a multiple of x_t, and its variance is
    posterior_var (eq. 6 and 7). p(x_{t-1} | x_t) has the predicted x_0 in place of x_0, and the variance var. With
    r = posterior_var / var and D elements in an image, a fixed variance gives

        L_{t-1} = D (r - 1 - log r) / 2  +  x_0_factor^2 / (2 var) |predicted x_0 - x_0|^2

    which are the attributes constant and error_factor (eq. 8, with its constant C).
    """

    def __init__(self, sampler: Sampler, *, bins: Bins | None):
        schedule, device, T = sampler.schedule, sampler.device, sampler.schedule.num_train_timesteps
        self.schedule, self.bins, self.channels = schedule, bins, sampler.shape[0]

        rows, scale = step_rows(replace(schedule, variance_type="fixed_small"), torch.arange(T, device="cpu"))
        rows, noising = x_0_rows(rows, scale), schedule.noising_table()
        self.noising, self.rows = noising.to(device), rows.to(device)
        self.table = torch.cat([noising, rows.float()], 1).to(device)

        log_abar = schedule.log_alphas_cumprod
        abar_prev, noise_var = schedule.alphas_cumprod_prev, -log_abar.expm1()  # noise_var = 1 - abar
        noise_var_prev = -torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), log_abar[:-1]]).expm1()
        betas = schedule.betas.clone()
        posterior_var = noise_var_prev / noise_var * betas  # eq. 7
        posterior_var[0] = posterior_var[1] if T > 1 else betas[0]  # in place of 0, as in the authors' code
        x_0_factor = abar_prev.sqrt() * betas / noise_var  # eq. 7
        fixed_small = schedule.variance_type.startswith("fixed_small")
        var = posterior_var if fixed_small else torch.cat([posterior_var[:1], betas[1:]])
        one_minus_r = torch.zeros_like(var) if fixed_small else abar_prev * betas / noise_var
        self.constant = (math.prod(sampler.shape) * _twice_variance_kl(one_minus_r) / 2).to(device)
        self.error_factor = (x_0_factor.square() / (2 * var)).to(device)
        self.x_0_factor, self.log_var = x_0_factor.to(device), var.log().to(device)
        self.log_posterior_var, self.log_betas = posterior_var.log().to(device), betas.log().to(device)

    def kl(self, model_output: Tensor, x_0: Tensor, t: Tensor, address: Tensor) -> Tensor:
        """L_{t-1} for our t >= 1.

        Args:
            model_output: [n, channels or twice as many, ...], for x_t with the noise of address.
            x_0: [n, channels, ...], uint8 or float32.
            t: [n] int64.
            address: [n, 2] int64.
        """
        if not self.schedule.learns_variance:
            m, _ = self._split(model_output)
            error = ops.x_0_error(m, x_0, t, address, self.table)
            return self.constant[t] + self.error_factor[t] * error.double()
        mean_x_0, log_var = self._prediction(model_output, x_0, t, address)
        x_0_factor, log_posterior_var = (
            _per_entry(values[t], mean_x_0) for values in (self.x_0_factor, self.log_posterior_var)
        )
        # both means without their multiple of x_t, which is the same
        kl = normal_kl(x_0_factor * _float64_units(x_0), log_posterior_var, x_0_factor * mean_x_0, log_var)
        return kl.flatten(1).sum(1)

    def distortion(self, model_output: Tensor, x_0: Tensor, t: Tensor, address: Tensor) -> Tensor:
        """L_0, for our t = 0: of bins eq. 13, else the negative log density. Arguments as of `kl`."""
        mean, log_var = self._prediction(model_output, x_0, t, address)
        x = _float64_units(x_0)
        if self.bins is None:
            return normal_nll(x, mean, log_var).flatten(1).sum(1)
        return decoder_nll(x, mean, log_var, self.bins).flatten(1).sum(1)

    def _prediction(self, model_output: Tensor, x_0: Tensor, t: Tensor, address: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted x_0 (eq. 15), and the log of p's variance, which can be broadcast over it: float64."""
        m, v = self._split(model_output)
        x_t = ops.noising(x_0, t, address, self.noising, stream=noise.LIKELIHOOD).double()
        mean = predicted_x_0(x_t, m, self.rows[t])
        if v is None:
            return mean, _per_entry(self.log_var[t], mean)
        if self.schedule.variance_type == "learned":
            return mean, v.double().log()
        share = (v.double() + 1) / 2  # arXiv:2102.09672, eq. 15
        log_betas, log_posterior_var = (_per_entry(x[t], mean) for x in (self.log_betas, self.log_posterior_var))
        return mean, share * log_betas + (1 - share) * log_posterior_var

    def _split(self, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The channels of the model's output for the mean, and those for a learned variance."""
        check_output_channels(self.schedule, self.channels, model_output.shape[1])
        if not self.schedule.learns_variance:
            return model_output, None
        return model_output[:, : self.channels], model_output[:, self.channels :]


def systematic(population: int, count: int, seed: int, images: int) -> tuple[Tensor, Tensor]:
    """Choose the timesteps of 1..population to evaluate for each image, by systematic sampling.

    Lay the timesteps end to end, each as long as its probability, `count` in all. Choose those at u, u + 1, ..., where
    u in [0, 1) is a function of (seed, image). The terms fall about as 1/t (Nichol & Dhariwal 2021, arXiv:2102.09672,
    figure 2), and so do the probabilities, which are at most 1.

    Returns: the timesteps, [images, count] int64, ascending, and how many terms each stands for, [images, count]
        float64: 1 / probability.
    """
    probabilities = _probabilities(population, count)
    if count in (0, population):
        chosen = torch.arange(1, count + 1, device="cpu").expand(images, -1)
    else:
        starts = [np.random.default_rng((seed, i)).random() for i in range(images)]
        first = torch.tensor(starts, dtype=torch.float64, device="cpu")
        places = first[:, None] + torch.arange(count, device="cpu")
        chosen = 1 + torch.searchsorted(probabilities.cumsum(0)[:-1], places, right=True)
    return chosen, 1 / probabilities[chosen - 1]


def _probabilities(population: int, count: int) -> Tensor:
    """min(1, c / t) for t = 1..population, with the c for which they sum to `count`: [population] float64."""
    probabilities = 1 / torch.arange(1, population + 1, dtype=torch.float64, device="cpu")
    certain = 0
    while certain < count and (count - certain) * probabilities[certain] >= probabilities[certain:].sum():
        certain += 1
    probabilities[certain:] *= (count - certain) / probabilities[certain:].sum()
    probabilities[:certain] = 1
    return probabilities


def prior_kl(schedule: Schedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in closed form: [N] float64 nats, on the CPU. Args: x_0: [N, ...]."""
    abar = schedule.alphas_cumprod[-1]
    squares = torch.cat([_float64_units(part).square().flatten(1).sum(1) for part in x_0.split(256)]).cpu()
    return (x_0[0].numel() * _twice_variance_kl(abar) + abar * squares) / 2


def check_output_channels(schedule: Schedule, channels: int, output_channels: int) -> None:
    """Check that a network returns as many channels as a sample has, or twice as many with a learned variance.

    Raises: ValueError: it does not.
    """
    want = channels * (2 if schedule.learns_variance else 1)
    if output_channels != want:
        raise ValueError(
            f"variance_type is {schedule.variance_type!r}, for which the network must return {want} channels, "
            f"but it returns {output_channels}; use {'a fixed' if schedule.learns_variance else 'a learned'} "
            "variance_type"
        )


def _float64_units(x: Tensor) -> Tensor:
    """x in data units, float64: bytes become [-1, 1]."""
    return (x.double() - 127.5) / 127.5 if x.dtype == torch.uint8 else x.double()


def _per_entry(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [n] to broadcast over the elements of each entry of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _twice_variance_kl(one_minus_r: Tensor) -> Tensor:
    """r - 1 - log r: twice the KL divergence of two normals of equal mean whose variances have the ratio r."""
    return -one_minus_r - torch.log1p(-one_minus_r)
