"""The fused operations: functions that check their arguments and call one torch.library operator each.

Triton kernels on a GPU, C++ kernels on a CPU, torch's operations where there are none. The bits are the same on every
device, except those of `group_norm`, whose kernels add in another order. torch.compile sees the operators as opaque,
and traces through these functions without a graph break. Only `eps_loss` has a gradient. `predict_step` is an
exception: it is not an operator, and where it runs torch's operations it is differentiable.
"""

from fastddpm.ops.backend import backend, backend_reason, compiling, forced_backend
from fastddpm.ops.conditional_step import conditional_step
from fastddpm.ops.eps_loss import eps_loss
from fastddpm.ops.group_norm import group_norm
from fastddpm.ops.interleave import interleave
from fastddpm.ops.library import FLOATS, MAX_ACTIVATION, MAX_GROUP, MAX_PER_SAMPLE, PREDICTIONS
from fastddpm.ops.noising import noising
from fastddpm.ops.normal import normal
from fastddpm.ops.predict_step import predict_step
from fastddpm.ops.residual import residual
from fastddpm.ops.step import step
from fastddpm.ops.x_0_error import x_0_error

__all__ = [
    "FLOATS",
    "MAX_ACTIVATION",
    "MAX_GROUP",
    "MAX_PER_SAMPLE",
    "PREDICTIONS",
    "backend",
    "backend_reason",
    "compiling",
    "conditional_step",
    "eps_loss",
    "forced_backend",
    "group_norm",
    "interleave",
    "noising",
    "normal",
    "predict_step",
    "residual",
    "step",
    "x_0_error",
]
