"""The specification of sampling with conditions: one loop with everything that the steps can be given."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.reference.diffusion import guided, predicted_x_0, renoised, replaced, update

STEP, KNOWN, RENOISE = 0, 4, 5  # streams of the noise standard
VISIT = 1 << 20  # is added to the t of the noise in each further visit of a timestep


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    rows: Tensor,
    scale: Tensor,
    timesteps: Tensor,
    noise: Callable[[int, int], Tensor],
    *,
    clip: bool,
    learned: str | None = None,
    unconditional: Callable[[Tensor, Tensor], Tensor] | None = None,
    guidance: Tensor | None = None,
    guide_variance: bool = False,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    resample: int = 1,
    x_0_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Take all steps of a table, from the last row to the first.

    Args:
        model: the network with the condition: (x_t [N, C, ...], t [N] int64) -> [N, C or 2C, ...].
        x: [N, C, ...]: the state to begin with.
        rows, scale, timesteps: [S, 14], [S], [S] of a step table; clip, learned: of the same table.
        noise: returns the normals of a stream and a t, like x.
        unconditional: the network without the condition, for guidance.
        guidance: [N]: the scale of each sample.
        guide_variance: guide the second half of the channels, too; else it is that of `model`.
        known, mask: like x, and bool: where x_0 is known.
        resample: how often each step but the last is taken.
        x_0_fn: changes the predicted x_0.
    Returns: x_0, like x.
    """
    channels, each = x.shape[1], (-1, *[1] * (x.ndim - 1))
    for i in reversed(range(len(rows))):
        t = int(timesteps[i])
        for visit in range(resample if i else 1):
            at = t + VISIT * visit
            if visit:
                x = renoised(x, rows[i], noise(RENOISE, at - VISIT))
            times = torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device)
            m = model(x, times)
            if unconditional is not None and guidance is not None:
                both = guided(m.to(x.dtype), unconditional(x, times).to(x.dtype), guidance.view(each))
                m = torch.cat([both[:, :channels], (both if guide_variance else m)[:, channels:]], 1)
            m, v = m[:, :channels], m[:, channels:]
            w = None
            if x_0_fn is not None:
                x_0 = predicted_x_0(x, m, torch.cat([rows[i, :4], scale[i : i + 1]]))
                w = x_0_fn(x_0, times) / scale[i]
            x = update(x, m, rows[i], noise(STEP, at), clip=clip, x_0=w, v=v, learned=learned)
            if known is not None and mask is not None:
                x = replaced(x, known, mask, rows[i], noise(KNOWN, at))
    return x
