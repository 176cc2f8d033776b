"""The layers of a `UNet2D`: with diffusers' names of the parameters, and in fused forms for sampling.

`fuse` replaces the parameters of a module with those of its fused form, which have no values yet. `fused_parameters`
computes these values from a module that is not fused.

Convolutions and norms of this package take more arguments than torch's. A part that the user has replaced, or that has
hooks, is called as diffusers calls it, so that it sees what it would see there.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core.layout import channels_last

Activation = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    """SiLU, which overwrites x where gradients are disabled."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, Activation] = {"silu": silu, "swish": silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}
FUSED: dict[Activation | None, str] = {silu: "silu", F.mish: "mish"}  # those that a norm's kernel computes
IDENTITY = nn.Identity()
Linear = partial(nn.Linear, dtype=torch.float32)  # whatever torch's default is
CACHED_ELEMENTS = 1 << 18  # float32, 1 MB: fits a core's second-level cache


def is_unchanged(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part is of this class and no hook or other function takes its place."""
    changed = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    return type(part) is kind and not changed


def is_packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in a dtype on this CPU."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def norm_and_activation(norm: nn.Module, x: Tensor, act: Activation, skip: Tensor | None = None) -> Tensor:
    """act(norm(x)). Args: skip: channels that follow those of x; needs kernels."""
    if getattr(norm, "kernels", False) or is_unchanged(norm, GroupNorm):  # in a copy with kernels all parts are ours
        return norm(x, act, skip=skip)
    return act(norm(x).clone())  # act may overwrite its input, which a replaced norm may keep


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual."""

    def __init__(self, width: int, head_dim: int, groups: int | None, eps: float, scale: float):
        super().__init__()
        self.group_norm = GroupNorm(groups, width, eps) if groups else None
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.qkv: nn.Linear | None = None
        self.bias: nn.Parameter | None = None  # of the residual sum, if a kernel adds it
        self.head_dim, self.scale = head_dim, scale

    def fuse(self, kernels: bool) -> None:
        """Compute queries, keys and values by one matrix product. kernels: whether a kernel adds the last bias."""
        width = self.to_q.in_features
        self.qkv = Linear(width, 3 * width)
        del self.to_q, self.to_k, self.to_v
        if kernels:
            self.bias = nn.Parameter(torch.empty_like(cast(Tensor, self.to_out[0].bias)))
            cast(Any, self.to_out[0]).bias = None

    def fused_parameters(self) -> Iterator[tuple[str, Tensor]]:
        parts = self.to_q, self.to_k, self.to_v
        yield "qkv.weight", torch.cat([part.weight for part in parts])
        yield "qkv.bias", torch.cat([part.bias for part in parts])
        yield "bias", cast(Tensor, self.to_out[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = as_pixels(h).view(n, height * width, c)
        if self.qkv is not None:
            q, k, v = self.qkv(h).chunk(3, -1)
        else:
            q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        h = self.to_out[0](h).view(n, height, width, c).permute(0, 3, 1, 2)
        h = h + x if self.bias is None else ops.residual(h, x, self.bias)
        return h if self.scale == 1 else h / self.scale


class Block(nn.Module):
    """The layers of one resolution: only a container, which gives the parameters diffusers' names.

    Attributes: timed: whether its downsamplers or upsamplers are residual blocks, which take columns of the time rows.
    """

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]):
        super().__init__()
        self.timed = False
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def timed_parts(self) -> Iterator[nn.Module]:
        """The parts that take columns of the time rows, in the order of execution."""
        yield from self.resnets
        if self.timed:
            yield from (*self.downsamplers, *self.upsamplers)

    def layers(self) -> Iterator[tuple[Any, Any]]:
        """Pairs of a residual block and what follows it: attention, or the identity."""
        return zip_longest(self.resnets, self.attentions, fillvalue=IDENTITY)


class Downsample(nn.Module):
    """Halves the size by a 3 x 3 convolution of stride 2. Padding 0 pads below and on the right, as in diffusers."""

    def __init__(self, width: int, padding: int):
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Pool(nn.Module):
    """Halves the size by the mean of 2 x 2 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class Nearest(nn.Module):
    """Doubles the size by nearest neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Upsample(nn.Module):
    """Doubles the size by nearest neighbours, followed by a 3 x 3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)
        self.phases: Conv2d | None = None
        self.bias: nn.Parameter | None = None  # if a kernel adds it: `phases` then has none

    def fuse(self, kernels: bool) -> None:
        """Use polyphase upsampling: convolve before the pixels are repeated. kernels: whether a kernel adds the bias.

        A 3 x 3 window of the upsampled image covers only 2 x 2 different input pixels. Which taps fall on the same
        input pixel depends only on the parity of the row and the column. So four 2 x 2 convolutions with summed taps,
        one per parity, give the result with half of the multiplications: 181 -> 60 ms in fp32, 25 -> 18 ms in bf16, for
        16 x 256 x 16 x 16 on a core of a Xeon with AMX, 2026-11-22. oneDNN adds the bias within the convolution; cuDNN
        would need a separate pass.
        """
        width = self.conv.in_channels
        self.phases = Conv2d(width, 4 * width, 2, padding=1, bias=not kernels)
        if kernels:
            self.bias = nn.Parameter(torch.empty_like(cast(Tensor, self.conv.bias)))
        del self.conv

    def fused_parameters(self) -> Iterator[tuple[str, Tensor]]:
        bias = cast(Tensor, self.conv.bias)
        yield "phases.weight", phases_of(self.conv.weight)
        yield "phases.bias", bias.repeat(4)
        yield "bias", bias

    def forward(self, x: Tensor) -> Tensor:
        if self.phases is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return ops.interleave(channels_last(self.phases(x)), self.bias)


def phases_of(weight: Tensor) -> Tensor:
    """Weights [out, in, 3, 3] of a convolution after an upsampling -> [4 out, in, 2, 2], for `ops.interleave`."""
    meets = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [parity, input pixel, tap]
    return torch.einsum("apk,bql,oikl->aboipq", meets, meets, weight).reshape(-1, weight.shape[1], 2, 2)


def phases_of_transposed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two convolutions that compute a transposed one of kernel 4, stride 2 and padding 1, as in `UNet1D`.

    Even positions are y[2 i] = w[3] x[i - 1] + w[1] x[i], odd ones y[2 i + 1] = w[2] x[i] + w[0] x[i + 1].

    Args: weight: [in, out, 4].
    Returns: [out, in, 1, 2] each: of the even positions, with padding 1 on the left, and of the odd ones, with padding
        1 on the right.
    """
    taps = weight.transpose(0, 1)[:, :, None]
    return taps[..., [3, 1]], taps[..., [2, 0]]


class TimeMLP(nn.Module):
    """[N, width] sinusoids -> [N, embed_width]: two linear layers with SiLU between them."""

    def __init__(self, width: int, embed_width: int):
        super().__init__()
        self.linear_1 = Linear(width, embed_width)
        self.linear_2 = Linear(embed_width, embed_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv2d(nn.Conv2d):
    """A convolution that accepts a bias per call, and can keep its weight in oneDNN's own layout.

    A packed weight need not be reordered in every call: 237 -> 118 us for 256 channels at 16 x 16 and batch 1 in bf16,
    842 -> 736 us in fp32 (two cores of a Xeon with AMX, 2026-11-22).

    Attributes:
        kernels: whether the output goes to kernels, which need channels-last memory.
        pack: whether to pack the weight.
        packed: ((x's shape, version), packed weight), made by the first call with such an x.
        version: of the weight; increase it after changing the weight in place.
    """

    kernels = False
    pack = False
    packed: tuple[object, Tensor] | None = None
    version = 0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"dtype": torch.float32, **options})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "packed"}  # torch cannot copy it

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Args: bias: [1 or N, C_out], used instead of the module's own."""
        if bias is not None and len(bias) > 1:
            return self._convolve(x, None) + bias.to(x.dtype)[:, :, None, None]
        return self._convolve(x, self.bias if bias is None else bias[0].to(x.dtype))

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.pack:
            y = self._conv_forward(x, self.weight, bias)
            return channels_last(y) if self.kernels else y  # torch promises no memory format
        geometry = self.padding, self.stride, self.dilation, self.groups
        packed, key = self.packed, (x.shape, self.version)  # read once: other threads may change both
        if packed is None or packed[0] != key:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            self.packed = packed = key, reorder(self.weight.to_mkldnn(), *geometry, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(x, packed[1], bias, *geometry, "none", [], "")


class GroupNorm(nn.GroupNorm):
    """Group norm and activation in x's dtype, with statistics in float32."""

    kernels = False  # whether a kernel computes it

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"dtype": torch.float32, **options})

    def forward(
        self,
        x: Tensor,
        act: Activation | None = None,
        *,
        skip: Tensor | None = None,
        add: Tensor | None = None,
        scale_shift: Tensor | None = None,
    ) -> Tensor:
        """Args: skip, add, scale_shift: as in `ops.group_norm`; they need kernels."""
        if self.kernels:
            fused = FUSED.get(act)
            y = ops.group_norm(
                x,
                self.weight,
                self.bias,
                self.num_groups,
                eps=self.eps,
                skip=skip,
                add=add,
                scale_shift=scale_shift,
                act=fused,
            )
            return y if act is None or fused else act(y)
        on_cpu, affine = x.device.type == "cpu", self.weight is not None and self.bias is not None
        if on_cpu and affine and x.dtype == torch.float32 and not torch.is_grad_enabled():
            y = _two_pass_group_norm(self, x)
        else:
            # torch's CPU kernel for 16 bits is slow below 1024 pixels: 2.0 ms for 16 x 256 x 16 x 16, against 0.9 ms in
            # float32 with both conversions (two cores of a Xeon with AMX, 2026-11-22), which is also more accurate
            small = x.dtype in (torch.bfloat16, torch.float16) and x.shape[2:].numel() < 1024
            widen = on_cpu and small and (self.weight is None or self.weight.dtype == torch.float32)
            y = F.group_norm(x.float() if widen else x, self.num_groups, self.weight, self.bias, self.eps)
        return (y if act is None else act(y)).to(x.dtype)


def as_pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] channels-last -> [N * H * W, C], a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _two_pass_group_norm(norm: GroupNorm, x: Tensor) -> Tensor:
    """Group norm with the variance taken about the mean.

    torch's CPU kernel for channels-last takes E[x^2] - E[x]^2, whose error grows with (mean / std)^2. It is good enough
    for 16-bit inputs, whose own rounding costs more. Only one new tensor has the size of x: the squares are summed in
    parts that stay in the cache (27.7 -> 15 ms for 1 x 128 x 256 x 256, two cores of a Xeon, 2026-11-22).
    """
    n, c = x.shape[:2]
    pixels = x.shape[2:].numel()
    mean = x.mean((2, 3), keepdim=True)
    centred = x - mean
    parts = as_pixels(centred).view(n, pixels, c).split(max(1, CACHED_ELEMENTS // (n * c)), 1)
    variances = sum((part.square().sum(1) for part in parts), x.new_zeros(n, c)) / pixels
    means = mean.view(n, norm.num_groups, -1).double()  # a rounded mean of a group would double the error
    offset = (means - means.mean(2, keepdim=True)).float()  # of each channel from its group
    variance = (variances.view_as(offset) + offset.square()).mean(2, keepdim=True)
    scale = (variance + norm.eps).rsqrt() * norm.weight.view(offset.shape[1:])
    shift = norm.bias.view(offset.shape[1:]) + offset * scale
    return centred.mul_(scale.view(n, c, 1, 1)).add_(shift.view(n, c, 1, 1))
