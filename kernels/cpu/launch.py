"""Launchers of the C++ kernels, which take the same arguments as those of the Triton kernels.

They launch only: fastddpm.ops has checked every argument. Each kernel's source says what its words are.
"""

from typing import Any

import torch
from torch import Tensor

from .native import native

BLOCK = 1024  # of philox.h: elements of a sample that have one partial sum
ROWS = 64  # of group_norm.cpp: pixels that have statistics of their own

_PREDICTS = {"epsilon": 0, "sample": 1, "v_prediction": 2}
_ACTIVATIONS = {None: 0, "silu": 1, "mish": 2}  # of activation.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, None: 0}


def launch_step(x, m, rows, timesteps, pos, address, copy, bad, *, clip):
    dtypes = _DTYPES[m.dtype], _DTYPES[None if copy is None else copy.dtype]
    tensors = map(_pointer, (x, m, rows, timesteps, pos, address, copy, bad))
    _run("step", x.numel(), len(x), x.shape[1:].numel(), *tensors, clip, *dtypes)


def launch_repeated_step(x, rows, timesteps, pos, address, copy, bad, *, clip):
    """Return a function of m that launches a step with these tensors, which the caller keeps."""
    run, count, n, threads = native().module.step, x.numel(), len(x), torch.get_num_threads
    shape_and_x = n, count // n if n else 0, x.data_ptr()
    others = *map(_pointer, (rows, timesteps, pos, address, copy, bad)), clip
    dtype_of_copy = _DTYPES[None if copy is None else copy.dtype]
    return lambda m: run(threads(), count, *shape_and_x, m.data_ptr(), *others, _DTYPES[m.dtype], dtype_of_copy)


def launch_conditional_step(
    x, m, rows, timesteps, pos, address, guidance, known, mask, bad, *, clip, guide_variance, learned
):
    tensors = map(_pointer, (x, m, rows, timesteps, pos, address, guidance, known, mask, bad))
    outputs = x.shape[1], m.shape[1] // x.shape[1], _DTYPES[m.dtype]
    shape = len(x), x.shape[1:].numel()
    _run("conditional_step", x.numel(), *shape, *tensors, *outputs, clip, guide_variance, learned)


def launch_draft(states, copy, x, m, rows, scale, timesteps, pos, seen, address, *, ahead, clip, rounded):
    chains = _chain_words(x, len(states), rows, timesteps, pos, address, clip)
    tensors = map(_pointer, (states, copy, x, m, scale, seen))
    sizes = ahead, len(rows) - 1, _DTYPES[None if copy is None else copy.dtype], rounded
    _run("draft", x.numel() * ahead, *chains, *tensors, *sizes)


def launch_first_difference(reached, x, states, m, rows, timesteps, pos, address, *, ahead, clip):
    chains = _chain_words(x, len(states), rows, timesteps, pos, address, clip)
    _run("first_difference", x.numel() * ahead, *chains, *map(_pointer, (reached, x, states, m)), ahead)


def launch_commit(x, m, rows, timesteps, pos, reached, address, bad, *, clip):
    chains = _chain_words(x, len(m), rows, timesteps, pos, address, clip)
    _run("commit", m.numel(), *chains, *map(_pointer, (x, m, reached, bad)))


def launch_normal(z, t, address, *, stream):
    _run("normal", z.numel(), len(z), z.shape[1:].numel(), *map(_pointer, (z, t, address)), stream)


def launch_noising(x_t, x_0, t, address, table, *, stream, with_t):
    tensors = map(_pointer, (x_t, x_0, t, address, table))
    dtypes = _DTYPES[x_t.dtype], _DTYPES[x_0.dtype]
    _run("noising", x_0.numel(), len(x_0), x_0.shape[1:].numel(), *tensors, stream, with_t, *dtypes)


def launch_eps_loss(m, x_0, t, address, table, *, predicts, stream, with_t):
    out, sums = _sums(m)
    inputs = _loss_words(m, x_0, t, address, table, predicts, stream, with_t)
    _run("eps_loss", m.numel(), *inputs, out.data_ptr(), sums.data_ptr())
    return out


def launch_eps_loss_backward(out, grad, m, x_0, t, address, table, *, predicts, stream, with_t):
    inputs = _loss_words(m, x_0, t, address, table, predicts, stream, with_t)
    _run("eps_loss_backward", m.numel(), *inputs, out.data_ptr(), grad.data_ptr())


def launch_x_0_error(m, x_0, t, address, table, *, stream, with_t):
    out, sums = _sums(m)
    tensors, dtypes = map(_pointer, (m, x_0, t, address, table)), (_DTYPES[m.dtype], _DTYPES[x_0.dtype])
    shape = len(m), m.shape[1:].numel()
    _run("x_0_error", m.numel(), *shape, *tensors, stream, with_t, *dtypes, out.data_ptr(), sums.data_ptr())
    return out


def launch_group_norm(y, x, weight, bias, groups, eps, skip, add, scale_shift, film, residual, *, act):
    n, channels = y.shape[:2]
    pixels = y.shape[2:].numel()
    moments = -(-pixels // ROWS) * 2 * channels  # float64, of an entry
    scratch = torch.empty(n * (8 * moments + 12 * channels), dtype=torch.uint8, device="cpu")
    rows = [word for row in (add, scale_shift) for word in (_pointer(row), _stride_of_rows(row))]
    film_words = _pointer(film), _stride_of_rows(film), film is not None and film.shape[1] > channels
    at = scratch.data_ptr()
    _run(
        "group_norm", y.numel(),
        n, pixels, groups, x.shape[1], channels - x.shape[1],
        y.data_ptr(), x.data_ptr(), _pointer(skip), *rows, weight.data_ptr(), bias.data_ptr(),
        eps, _ACTIVATIONS[act], *film_words, _pointer(residual), _DTYPES[y.dtype], at, at + 8 * n * moments,
    )  # fmt: skip


def launch_residual(h, residual, bias, scale):
    count, channels = h.numel(), h.shape[1]
    tensors = map(_pointer, (h, residual, bias))
    _run("residual", count, count // channels if channels else 0, channels, *tensors, float(scale), _DTYPES[h.dtype])


def launch_interleave(out, y, bias):
    n, channels, height, width = out.shape
    shape = n, height // 2, width // 2, channels
    _run("interleave", out.numel(), *shape, *map(_pointer, (out, y, bias)), _DTYPES[y.dtype])


def launch_activation(y, x, *, act):
    _run("activation", x.numel(), x.numel(), y.data_ptr(), x.data_ptr(), _ACTIVATIONS[act], _DTYPES[x.dtype])


def _run(name: str, elements: int, *words: Any) -> None:
    """Call a kernel. Args: elements: how many it computes, which decides how many threads work."""
    getattr(native().module, name)(torch.get_num_threads(), elements, *words)


def _chain_words(x, slots, rows, timesteps, pos, address, clip) -> tuple[int, ...]:
    n, tensors = len(x), map(_pointer, (rows, timesteps, pos, address))
    return n, x.shape[1:].numel(), slots // n, *tensors, clip


def _stride_of_rows(rows: Tensor | None) -> int:
    """From the row of an entry to the next; 0: there are no rows, or one for all entries."""
    return 0 if rows is None or len(rows) == 1 else rows.stride(0)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _sums(m: Tensor) -> tuple[Tensor, Tensor]:
    """New tensors for the sums of each entry, and of each of its blocks."""
    out = m.new_empty(len(m), dtype=torch.float32)
    return out, m.new_empty(len(m), -(-m.shape[1:].numel() // BLOCK), dtype=torch.float32)


def _loss_words(m, x_0, t, address, table, predicts, stream, with_t) -> tuple[int, ...]:
    tensors, dtypes = map(_pointer, (m, x_0, t, address, table)), (_DTYPES[m.dtype], _DTYPES[x_0.dtype])
    return len(m), m.shape[1:].numel(), *tensors, _PREDICTS[predicts], stream, with_t, *dtypes
