"""Calls of a user's own network: what x is handed over as, and what the network may return."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.core import layout
from fastddpm.core.memory import is_out_of_memory
from fastddpm.core.precision import Compute
from fastddpm.sampling.reachable import parameters

INDEX = "sample_index"  # an argument that a network or another function of the user's may ask for


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a module or a function has an argument of this name."""
    try:
        return name in inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (ValueError, TypeError):  # a builtin function without a signature
        return False


def own_dtype(model: Callable[..., Any]) -> torch.dtype | None:
    """The dtype of all floating-point parameters of a network, if it is another one than float32."""
    dtypes = _dtypes(_parameters(model))
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float64, torch.bfloat16, torch.float16} else None


def memory_format(model: Callable[..., Any], shape: tuple[int, ...]) -> torch.memory_format:
    """In which memory format a network is handed x: contiguous, or channels-last if it was converted to that.

    Args: shape: of one sample.
    Returns: torch.contiguous_format; or torch.preserve_format, since the states are channels-last.
    """
    weights = (x for x in _parameters(model) if x.ndim == len(shape) + 1 > 3)
    converted = any(layout.is_channels_last(x) and not x.is_contiguous() for x in weights)
    return torch.preserve_format if converted else torch.contiguous_format


def call(
    network: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    compute: Compute,
    *,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a network on a copy of x, which it may write to.

    Args:
        x: [N, *shape] float32, channels-last; t: [N] or [N, 1].
        dtype: in which x is handed over; None: in float32, under autocast if the precision has 16 bits.
        kwargs: further arguments.
    Returns: what the network returned; of an object with a `sample` that, of a tuple or list its first item.
    Raises: ValueError: it does not accept these arguments, or x in this dtype.
    """
    # without another dtype `to` would do the same as `clone`, but take longer
    x = x.clone(memory_format=memory_format) if dtype is None else x.to(dtype, copy=True, memory_format=memory_format)
    autocasts = dtype is None and compute.dtype != torch.float32
    try:
        # autocast's cache would keep the current weights, and a graph would always use those
        with torch.autocast(compute.device.type, compute.dtype, cache_enabled=False) if autocasts else nullcontext():
            output = network(x, t, **kwargs)
    except TypeError as error:
        if accepts(network, kwargs):
            raise
        wanted = f"model({', '.join(['x_t', 't', *(f'{name}=...' for name in kwargs)])})"
        raise ValueError(f"the network cannot be called as {wanted} ({error})") from error
    except RuntimeError as error:
        dtypes = _dtypes(parameters(network).values())
        if "type" not in str(error) or dtypes <= {x.dtype} or is_out_of_memory(error):
            raise
        text, *_ = str(error).splitlines()
        raise ValueError(
            f"x is {x.dtype}, but the network's parameters are {', '.join(sorted(map(str, dtypes)))} ({text}); give "
            "them one dtype, as by network.float(), and make a new Sampler without a precision: x then has that dtype"
        ) from error
    if not isinstance(output, Tensor):
        output = getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple | list) and output else output


@contextmanager
def noticing_random_numbers(device: torch.device) -> Iterator[None]:
    """Warns: meanwhile torch drew random numbers, as for dropout in a network that Python cannot reach."""
    before = _generators(device)
    yield
    if _generators(device) != before:
        warnings.warn(
            "torch drew random numbers while the network ran, so equal runs may differ; if it was for dropout, call "
            "eval() on the network",
            stacklevel=3,
        )


def _generators(device: torch.device) -> list[bytes]:
    """The states of torch's generators, without waiting for a GPU."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def accepts(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module or a function can be called with x, t and these arguments, as far as Python knows."""
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(None, None, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a builtin function without a signature
        return True
    return True


def _parameters(model: Callable[..., Any]) -> list[nn.Parameter]:
    """The parameters of a module; if it has none, or of a function, those that it can reach."""
    own = list(model.parameters()) if isinstance(model, nn.Module) else []
    return own or list(parameters(model).values())


def _dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {x.dtype for x in tensors if x.is_floating_point()}
