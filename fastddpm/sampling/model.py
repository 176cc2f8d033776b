"""A model prepared for sampling: a `UNet2D` or `UNet1D` is fused for inference, any other stays as it is; all may be
compiled.

One that was changed in a way that a fused copy cannot express stays as it is, too. It may be changed between two
runs, so each run looks at it anew.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.core.precision import Compute, arithmetic
from fastddpm.networks.fused import Fused, fastest_forward, fused, is_own, obstacles_of, refresh
from fastddpm.networks.obstacles import Obstacles
from fastddpm.sampling import own_network
from fastddpm.sampling.capture import StreamOrder
from fastddpm.sampling.reachable import parameters

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t [N] int64) -> eps, x_0 or v, like x_t


class PreparedModel:
    """What the runners of all batches share.

    Args:
        model: see `Sampler`.
        shape: of one sample, channels first.
        num_train_timesteps: T; no table has more rows.
        compute: the device and the precision.
        kind: one of ENGINES, or "auto".
        own_dtype: in which a network that is not our own is handed x, if it is not float32. One of our own that is not
            fused is handed x in the dtype of its parameters.
        times: [T] or [T, 1]: what the network is told for each timestep; None: the timestep.
    Attributes:
        obstacles: what prevents a fused copy of a network of our own, see `networks.obstacles`.
        net: the copy of a network of our own that is fused for inference; None for any other model.
        plain_forward: what a step calls: `net.denoise`, a program that does the same, or the model.
        forward: the same, compiled if `compiles`; None before the first `refresh`.
        memory_format: in which a network that is not fused is handed x.
        takes_index: whether the network has an argument `sample_index`.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        shape: tuple[int, ...],
        num_train_timesteps: int,
        compute: Compute,
        kind: str,
        own_dtype: torch.dtype | None = None,
        times: Tensor | None = None,
    ):
        self.model, self.shape, self.num_train_timesteps = model, shape, num_train_timesteps
        self.compute, self.kind, self.compiles = compute, kind, "compiled" in kind
        self.own_dtype, self.obstacles, self._config = own_dtype, Obstacles(), {}
        if is_own(model):
            self.obstacles, self._config = obstacles_of(model), dict(getattr(model, "config", {}))
            self.own_dtype = own_network.own_dtype(model) if self.obstacles else None
        self.net: Fused | None = None
        self.plain_forward: Callable[..., Any] = model
        self.forward: Callable[..., Any] | None = None
        self.memory_format = torch.contiguous_format
        self.takes_index = not is_own(model) and own_network.takes(model, own_network.INDEX)
        if times is not None and is_own(model):
            times = times.reshape(-1)
        self.times = None if times is None else times.to(compute.device)

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.own_dtype or self.compute.dtype

    def current(self) -> "PreparedModel":
        """This one; or a new one, if a network of our own was changed, except for the values of its parameters."""
        if not is_own(self.model):
            return self
        new = PreparedModel(self.model, self.shape, self.num_train_timesteps, self.compute, self.kind, times=self.times)
        same = (new.obstacles, new.own_dtype, new._config) == (self.obstacles, self.own_dtype, self._config)
        return self if same else new

    def refresh(self) -> None:
        """Fuse a network of our own, or give the fused copy the weights that the model has now."""
        if is_own(self.model):
            if any(x.is_meta for x in self.model.parameters()):
                raise ValueError("the network's parameters are on the meta device, without values; load weights first")
            if self.obstacles:
                self.model.to(self.device)
        with self._weights_order.on_current_stream(self.weights()), arithmetic("fp32", self.device):
            if is_own(self.model) and not self.obstacles:
                if self.net is None:
                    self.net = fused(self.model, self.dtype, self.device, pack=not self.compiles)
                    self.plain_forward = self.net.denoise if self.compiles else fastest_forward(self.net)
                else:
                    refresh(self.net, self.model)
            if self.net is None:
                self.memory_format = own_network.memory_format(self.model, self.shape)
            if self.forward is None:
                self.forward = self._compiled(self.plain_forward)

    def advice_on_nan(self) -> str:
        """What to do if the network returned NaN or infinity. Waits for the device."""
        for name, x in parameters(self.model).items():
            if x.layout is torch.strided and x.is_floating_point() and not x.isfinite().all():
                return f"its parameter {name} is not finite, so use another checkpoint"
        if self.own_dtype in (torch.float16, torch.bfloat16):
            return "try the network in float32, or another checkpoint"
        if self.compute.precision != "fp32":
            return "try precision fp32, or another checkpoint"
        return "its parameters are finite, so look into the network itself, or try another checkpoint"

    def t_of(self, timesteps: Tensor) -> Tensor:
        """What the network is told for timesteps [S] on the device: [S] or [S, 1], a new tensor."""
        t = timesteps.to(torch.int64, copy=True)
        return t if self.times is None else self.times[t]

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
