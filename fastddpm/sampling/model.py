"""A model prepared for sampling: a `UNet2D` is fused for inference, any other stays as it is; both may be compiled."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.core.checks import one_of
from fastddpm.core.precision import Compute, arithmetic
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.capture import StreamOrder

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t [N] int64) -> eps, x_0 or v, like x_t

ENGINES = ("eager", "compiled", "graph", "compiled+graph")


class PreparedModel:
    """What the runners of all batches share.

    Args:
        model: see `Sampler`.
        shape: of one sample, channels first.
        num_train_timesteps: T; no table has more rows.
        compute: the device and the precision.
        kind: one of ENGINES, or "auto".
    Attributes:
        net: the copy of a `UNet2D` that is fused for inference; None for any other model.
        plain_forward: what a step calls: `net.denoise`, or the model.
        forward: the same, compiled if `compiles`; None before the first `refresh`.
    Raises: ValueError: kind is unknown, or not for this device.
    """

    def __init__(
        self, model: Model | nn.Module, shape: tuple[int, ...], num_train_timesteps: int, compute: Compute, kind: str
    ):
        one_of("engine", kind, ("auto", *ENGINES))
        if "graph" in kind and compute.device.type != "cuda":
            raise ValueError(
                f"engine is {kind!r}, but '{compute.device}' has no CUDA graphs; use 'eager' or 'compiled'"
            )
        self.model, self.shape, self.num_train_timesteps = model, shape, num_train_timesteps
        self.compute, self.kind, self.compiles = compute, kind, "compiled" in kind
        self.net: UNet2D | None = None
        self.plain_forward: Callable[..., Any] = model
        self.forward: Callable[..., Any] | None = None

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute.dtype

    def refresh(self) -> None:
        """Fuse a `UNet2D`, or give the fused copy the weights that the model has now."""
        with self._weights_order.on_current_stream(self.weights()), arithmetic("fp32", self.device):
            if isinstance(self.model, UNet2D):
                if self.net is None:
                    self.net = self.model.for_inference(self.dtype, self.device, pack=not self.compiles)
                    self.plain_forward = self.net.denoise
                else:
                    self.net.refresh(self.model)
            self.forward = self.forward or self._compiled(self.plain_forward)

    def weights(self) -> list[Tensor]:
        """The parameters of the fused copy, if there is one."""
        return [] if self.net is None else list(self.net.parameters())

    @cached_property
    def _weights_order(self) -> StreamOrder:
        """Orders the updates of the weights across streams."""
        return StreamOrder(self.device)

    def _compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiles:
            return forward
        mode = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else "default"
        return torch.compile(forward, fullgraph=self.net is not None, dynamic=False, mode=mode)
