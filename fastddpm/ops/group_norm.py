"""Group norm of two inputs and a time bias, with scale, shift, activation, FiLM and residual."""

from collections.abc import Callable
from itertools import product
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.core import layout
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_no_gradients, check_state, check_tensor, tensor_summary
from fastddpm.ops.library import FLOATS, MAX_ACTIVATION, MAX_GROUP, register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "mish": F.mish}


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    scale_shift: Tensor | None = None,
    act: str | None = None,
    film: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group norm (Wu and He 2018, arXiv:1803.08494) of cat([x, skip], 1) + add, followed by an activation.

    With `scale_shift`, the norm is multiplied by 1 + scale, and shift is added to it, before the activation. With
    `film` (Perez et al. 2017, arXiv:1709.07871), the activation's result is multiplied by a scale, and a shift is added
    to it. The residual is added at the end.

    In fp32, rounded once; the kernel stores neither the sum nor the concatenation. An entry's bits do not depend on
    the other entries, but on the size of the batch, by which the kernel decides how to divide its work.

    Args:
        x: [N, C1, *spatial] fp32/bf16/fp16, channels-last.
        weight, bias: [C] fp32, C = C1 + C2.
        groups: the number of groups of equally many channels; a group may hold channels of both x and skip.
        eps: added to the variance.
        skip: [N, C2, *spatial], the channels that follow x's, like x; or None.
        add: [1 or N, C] fp32 of any row stride, added before the statistics (the time bias, a slice of a table's
            columns); or None.
        scale_shift: [1 or N, 2 C] fp32 of any row stride: the scale of each channel, then the shift of each; or None.
        act: "silu", y * sigmoid(y); "mish" (Misra 2019, arXiv:1908.08681), y * tanh(log(1 + exp(y))); or None.
        film: [1 or N, 2 C] fp32 of any row stride: the scale of each channel, then the shift of each; [1 or N, C]: the
            shifts alone; or None.
        residual: like the result, added to it; or None.
    Returns: [N, C, *spatial] like x, new.
    Raises: ValueError: a shape, dtype, layout or device is not as above, groups do not divide the channels, eps is not
        positive, act is unknown, or an argument requires a gradient.
    """
    channels = _check_inputs(x, skip)
    _check_numbers(channels, groups, eps, act)
    hint = "one value per channel of the result"
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor("group_norm", name, parameter, (channels,), torch.float32, x.device, hint)
    _check_rows("add", add, x, channels)
    _check_rows("scale_shift", scale_shift, x, 2 * channels)
    _check_rows("film", film, x, 2 * channels, channels)
    if residual is not None:
        _check_residual(residual, x, channels)
    check_no_gradients("group_norm", weight=weight, bias=bias, add=add, scale_shift=scale_shift, film=film)
    numbers = groups, float(eps)
    return torch.ops.fastddpm.group_norm(x, weight, bias, *numbers, skip, add, scale_shift, act, film, residual)


def _check_inputs(x: Tensor, skip: Tensor | None) -> int:
    """Check x and skip, and return their number of channels."""
    check_state("group_norm", "x", x, FLOATS, MAX_ACTIVATION)
    if skip is None:
        return x.shape[1]
    check_state("group_norm", "skip", skip, FLOATS, MAX_ACTIVATION)
    if len(skip) != len(x) or skip.shape[2:] != x.shape[2:] or skip.dtype != x.dtype or skip.device != x.device:
        raise ValueError(
            f"group_norm: skip is {tensor_summary(skip)}, x {tensor_summary(x)}; only their channels may differ"
        )
    channels = x.shape[1] + skip.shape[1]
    if channels * x.shape[2:].numel() > MAX_ACTIVATION:
        raise ValueError(
            f"group_norm: x is {tensor_summary(x)} and skip {tensor_summary(skip)}; "
            f"a sample of both may have at most {MAX_ACTIVATION} elements"
        )
    return channels


def _check_numbers(channels: int, groups: Any, eps: Any, act: Any) -> None:
    if not isinstance(groups, int) or groups < 1 or channels % groups or channels > groups * MAX_GROUP:
        raise ValueError(
            f"group_norm: groups is {groups!r}; want a whole number that divides the {channels} channels into groups "
            f"of at most {MAX_GROUP}"
        )
    if not isinstance(eps, int | float) or not 0 < eps < inf:
        raise ValueError(f"group_norm: eps is {eps!r}; want a number > 0")
    if act not in (None, *ACTIVATIONS):
        raise ValueError(f"group_norm: act is {act!r}; want {', '.join(map(repr, ACTIVATIONS))} or None")


def _check_residual(residual: Tensor, x: Tensor, channels: int) -> None:
    check_state("group_norm", "residual", residual, FLOATS, MAX_ACTIVATION)
    shape = len(x), channels, *x.shape[2:]
    if residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"group_norm: residual is {tensor_summary(residual)}; want {shape} {x.dtype} on {x.device}, like the result"
        )


def _check_rows(name: str, rows: Any, x: Tensor, *columns: int) -> None:
    if rows is not None and (
        not isinstance(rows, Tensor)
        or tuple(rows.shape) not in list(product((1, len(x)), columns))
        or rows.dtype != torch.float32
        or rows.device != x.device
        or (rows.stride(1) != 1 and rows.shape[1] > 1)
    ):
        raise ValueError(
            f"group_norm: {name} is {tensor_summary(rows)}; want (1 or {len(x)}, {' or '.join(map(str, columns))}) "
            f"torch.float32 on {x.device}, each row contiguous: one for all entries of x or one for each"
        )


def _group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None,
    add: Tensor | None,
    scale_shift: Tensor | None,
    act: str | None,
    film: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    y = _group_norm_fake(x, weight)
    if y.numel() == 0:
        return y
    if (launch := launcher("group_norm", x.device)) is not None:
        launch(y, x, weight, bias, groups, eps, skip, add, scale_shift, film, residual, act=act)
        return y
    v = x.float() if skip is None else torch.cat([x, skip], 1).float()
    if add is not None:
        v = v + _per_entry(add, x)
    # contiguous: for channels-last memory torch's CPU kernel computes the variance as E[x^2] - E[x]^2
    v = torch.group_norm(v.contiguous(), groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = _per_entry(scale_shift, x).chunk(2, 1)
        v = v * (1 + scale) + shift
    if act is not None:
        v = ACTIVATIONS[act](v)
    if film is not None:
        *scale, shift = _per_entry(film, x).split(len(weight), 1)
        v = v * scale[0] + shift if scale else v + shift
    return y.copy_(v if residual is None else v + residual)


def _per_entry(rows: Tensor, x: Tensor) -> Tensor:
    """[1 or N, columns] -> [1 or N, columns, 1, ...], with as many axes as x."""
    return rows.view(*rows.shape, *[1] * (x.ndim - 2))


def _group_norm_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return layout.empty(len(x), (len(weight), *x.shape[2:]), dtype=x.dtype, device=x.device)


register(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? skip, Tensor? add, "
    "Tensor? scale_shift, str? act, Tensor? film, Tensor? residual) -> Tensor",
    _group_norm,
    _group_norm_fake,
)
