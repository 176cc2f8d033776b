"""Fake CUDA graphs on the CPU: a replay repeats operations on the same memory, without Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm import Sampler

__all__ = ["Recording", "eager", "graphed"]


class Recording(TorchDispatchMode):
    """A fake CUDA graph: records the operations of a function, with their tensors and numbers, and repeats them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for place, value in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and address(place) != address(value):
                    place.copy_(value)  # what was allocated stays where it is


def address(x):
    return x.untyped_storage().data_ptr()


def graphed(model, schedule=None, **options):
    """A sampler that captures."""
    sampler = Sampler(model, schedule, device="cpu", **options)
    sampler.engine.prepared.kind = "graph"
    return sampler


def eager(model, schedule=None, **options):
    return Sampler(model, schedule, device="cpu", engine="eager", **options)
