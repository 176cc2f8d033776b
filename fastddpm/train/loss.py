"""The training loss: L_simple, and with a learned variance L_hybrid, which adds a small part of the bound.

Specification: `fastddpm.reference.diffusion.squared_error` of `target`, and `hybrid_loss` in
`fastddpm.reference.likelihood`.
"""

import math

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core.schedule import Schedule
from fastddpm.ops.noising import data_units
from fastddpm.reference.likelihood import HYBRID_WEIGHT, decoder_nll, normal_kl


class TrainingLoss:
    """The loss of each entry of a batch.

    L_simple is |m - target|^2 (Ho et al. 2020, arXiv:2006.11239, eq. 14). A learned variance adds 0.001 L_vlb (Nichol &
    Dhariwal 2021, arXiv:2102.09672, eq. 16). L_vlb is T times the term of the bound at the entry's t, in bits, with x_0
    not clipped, as in the authors' code. It trains the variance alone: its gradient stops at the mean.

    In each term, the two means differ by m - target times a factor that depends on t alone; so do the predicted x_0 and
    x_0. So neither x_t nor the predicted x_0 is needed, and `ops.noising` computes the target, which is eps, x_0 or
    a sum of both.

    Args:
        schedule: the noise schedule.
        device: of the batches.
    """

    def __init__(self, schedule: Schedule, device: torch.device):
        self.schedule = schedule
        self.table = schedule.noising_table().to(device)
        if not schedule.learns_variance:
            return
        log_abar, betas = schedule.log_alphas_cumprod, schedule.betas
        signal, noise = log_abar.exp().sqrt(), (-log_abar.expm1()).sqrt()
        zero, one = torch.zeros_like(signal), torch.ones_like(signal)
        of_target, x_0_factor = {  # target = [0] x_0 + [1] eps; |predicted x_0 - x_0| = factor |m - target|
            "epsilon": ((zero, one), -noise / signal),
            "sample": ((one, zero), one),
            "v_prediction": ((-noise, signal), -noise),
        }[schedule.prediction_type]
        log_abar_prev = torch.cat([zero[:1], log_abar[:-1]])
        posterior_var = log_abar_prev.expm1() / log_abar.expm1() * betas  # arXiv:2006.11239, eq. 7
        posterior_var[0] = posterior_var[1] if len(betas) > 1 else betas[0]  # in place of 0, as in the authors' code
        mean_factor = log_abar_prev.exp().sqrt() * betas / noise.square() * x_0_factor  # eq. 7
        self.target_table = torch.stack(of_target, 1).float().to(device)
        columns = (x_0_factor, mean_factor, posterior_var.log(), betas.log())
        self.rows = torch.stack(columns, 1).to(device)  # [T, 4] float64

    def __call__(self, model_output: Tensor, x_0: Tensor, t: Tensor, address: Tensor, at_0: Tensor | None) -> Tensor:
        """The loss of each entry, summed over its elements: [N] fp32.

        Args:
            model_output: [N, C, H, W], or [N, 2C, H, W] with a learned variance; fp16, bf16 or fp32.
            x_0: [N, C, H, W] uint8, or floating point in data units.
            t, address: the ones that `ops.noising` got for x_t.
            at_0: [M] int64: the entries with t = 0; None: the variance is not learned.
        """
        m, v = model_output, None
        if self.schedule.learns_variance:
            m, v = model_output.chunk(2, 1)
        errors = ops.eps_loss(m, x_0, t, address, self.table, predicts=self.schedule.prediction_type)
        if v is None:
            return errors
        assert at_0 is not None
        bits = self._terms(m.detach(), v, x_0, t, address, at_0) / math.log(2)
        return errors + HYBRID_WEIGHT * self.schedule.num_train_timesteps * bits

    def _terms(self, m: Tensor, v: Tensor, x_0: Tensor, t: Tensor, address: Tensor, at_0: Tensor) -> Tensor:
        """The term of the bound at each t: [N] nats fp32. Differentiable in v."""
        rows = self.rows[t].view(len(t), 4, *[1] * (v.ndim - 1))
        error = m.float() - ops.noising(x_0, t, address, self.target_table)
        _, mean_factor, log_small, _ = rows.float().unbind(1)
        kl = normal_kl(mean_factor * error, log_small, torch.zeros_like(log_small), self._log_var(v.float(), rows))
        terms = kl.flatten(1).sum(1)
        if not len(at_0):
            return terms
        # few entries, in float64: far from the mean, the probability of a bin is a difference of almost equal numbers
        x, rows = data_units(x_0[at_0]).double(), rows[at_0]
        nll = decoder_nll(x, x + rows[:, 0] * error[at_0], self._log_var(v[at_0].double(), rows))
        return terms.index_copy(0, at_0, nll.flatten(1).sum(1).float())

    def _log_var(self, v: Tensor, rows: Tensor) -> Tensor:
        """The logarithm of the variance, in the dtype of v."""
        if self.schedule.variance_type == "learned":
            return v.log()
        log_small, log_large = rows.to(v.dtype).unbind(1)[2:]
        share = (v + 1) / 2  # arXiv:2102.09672, eq. 15
        return share * log_large + (1 - share) * log_small
