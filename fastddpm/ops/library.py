"""The operators `torch.ops.fastddpm.*`, and the limits of their arguments."""

from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
MAX_PER_SAMPLE = 65_535 * 1024  # elements: one axis of the kernels' grid counts the blocks of a sample
MAX_ACTIVATION = 1 << 29  # elements per sample: the kernels count them in 32 bits, with room to round up
MAX_GROUP = 8192  # channels of a group: the kernel holds all channels that a group has in a pixel

LIBRARY = torch.library.Library("fastddpm", "DEF")  # custom_op would import torch._dynamo at the first call: a second


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator with one implementation for all devices.

    Args:
        schema: "name(arguments) -> results"; it becomes torch.ops.fastddpm.name.
        fake: returns a result of the right shape, dtype and layout, from tensors without values.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastddpm::{name}", fake, lib=LIBRARY)
