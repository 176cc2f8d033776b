"""A copy of a `UNet1D` for sampling: without gradients, its convolutions in 16 bits if wanted, fused with what follows.

Sequences are images of height 1, [N, C, 1, L], so the convolutions, norms and kernels are those of `UNet2D`. A block is
two convolutions and two norms: the first norm's kernel also adds the convolution's bias, applies Mish and scales and
shifts (FiLM), the second one's adds the residual.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core.layout import channels_last
from fastddpm.core.precision import named_device
from fastddpm.networks import layers
from fastddpm.networks.layers import GroupNorm, as_pixels, is_packable
from fastddpm.networks.obstacles import Obstacles, Part, obstacles, parts, remember
from fastddpm.networks.unet1d import (
    ConvBlock,
    ResidualBlock,
    SequenceNetwork,
    Sinusoid,
    UNet1D,
    as_frames,
    from_frames,
)

Convolution = partial(layers.Conv2d, bias=False)


class FusedBlock(nn.Module):
    """The convolutions and norms of a residual block, or of `final_conv` with one of each and no residual.

    Args: channels: of the input, and of each convolution's output; kernel: their size; columns: number of FiLM's
        scales and shifts.
    """

    def __init__(self, channels: list[int], kernel: int, groups: int, columns: int, *, joins: bool = False):
        super().__init__()
        self.columns = columns
        self.convs, self.norms, self.biases = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        for c_in, c_out in pairwise(channels):
            self.convs.append(Convolution(c_in, c_out, (1, kernel), padding=(0, kernel // 2)))
            self.norms.append(GroupNorm(groups, c_out))
            self.biases.append(cast(Tensor, self.norms[-1].bias).new_empty(1, c_out))
        projects = columns > 0 and (joins or channels[0] != channels[-1])
        self.shortcut = layers.Linear(channels[0], channels[-1]) if projects else None

    def forward(self, x: Tensor, film: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """Args: film: [1 or N, columns]; skip: channels that follow those of x."""
        inputs = [x] if skip is None else [x, skip]
        h = channels_last(torch.cat(inputs, 1)) if skip is not None else x
        residual = None if film is None else self._residual(x, inputs)
        last = len(self.convs) - 1
        for i, (conv, norm, bias) in enumerate(zip(self.convs, self.norms, self.biases, strict=True)):
            more: dict[str, Any] = {"film": film if i < last else None, "residual": residual if i == last else None}
            h = norm_mish(norm, conv(h), bias, **more)
        return h

    def _residual(self, x: Tensor, inputs: list[Tensor]) -> Tensor:
        """The block's input, projected if the widths differ: each part by a matrix product, without concatenating."""
        if self.shortcut is None:
            return x
        weights = self.shortcut.weight.split([part.shape[1] for part in inputs], 1)
        y = F.linear(as_pixels(x), weights[0], self.shortcut.bias)
        for part, weight in zip(inputs[1:], weights[1:], strict=True):
            y.addmm_(as_pixels(part), weight.t())
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    def parameters_of(self, blocks: Iterable[ConvBlock], residual: nn.Module | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of an own parameter and its value. Args: blocks, residual: what this is a fused copy of."""
        for block, conv, norm, bias in zip(blocks, self.convs, self.norms, self.biases, strict=True):
            source, of_norm = cast(Any, block.block[0]), cast(Any, block.block[1])
            yield cast(Tensor, conv.weight), source.weight[:, :, None]
            yield bias, source.bias[None]
            yield cast(Tensor, norm.weight), of_norm.weight
            yield cast(Tensor, norm.bias), of_norm.bias
        if self.shortcut is None:
            return
        if isinstance(residual, nn.Identity):  # of two parts, which the projection joins
            n, device = self.shortcut.in_features, self.shortcut.weight.device
            yield self.shortcut.weight, torch.eye(n, dtype=torch.float32, device=device)
            yield self.shortcut.bias, torch.zeros(n, dtype=torch.float32, device=device)
        else:
            source = cast(Any, residual)
            yield from ((self.shortcut.weight, source.weight[:, :, 0]), (self.shortcut.bias, source.bias))


def norm_mish(norm: nn.Module, x: Tensor, bias: Tensor, *, film: Tensor | None, residual: Tensor | None) -> Tensor:
    """mish(norm(x + bias)), scaled and shifted by film, plus residual."""
    if norm.kernels:
        options: dict[str, Any] = {"eps": norm.eps, "add": bias, "act": "mish", "film": film, "residual": residual}
        return ops.group_norm(
            x, cast(Tensor, norm.weight), cast(Tensor, norm.bias), cast(int, norm.num_groups), **options
        )
    h = norm(x + bias.to(x.dtype)[:, :, None, None], F.mish)
    if film is not None:
        scale, shift = film_of(film, h)
        h = h + shift if scale is None else scale * h + shift
    return h if residual is None else h + residual


def film_of(film: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """(scale or None, shift) of FiLM for x, [1 or N, C, 1, 1] each."""
    film = film.to(x.dtype)[:, :, None, None]
    return (None, film) if film.shape[1] == x.shape[1] else cast(Any, film.chunk(2, 1))


class FusedUNet1D(SequenceNetwork):
    """What `UNet1D.denoise` computes, for sampling. Make it by `for_inference`.

    Attributes:
        projection, condition: the linear layers of FiLM of all blocks, for the time embedding and for the condition.
        version: incremented when the parameters change.
    """

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        embed = c["diffusion_step_embed_dim"]
        kernel, groups, widths = c["kernel_size"], c["n_groups"], list(c["down_dims"])
        channels, films = c["frame"] * c["input_dim"], 2 if c["cond_predict_scale"] else 1

        def pair(c_in: int, c_out: int, *, joins: bool = False) -> list[nn.Module]:
            first = FusedBlock([c_in, c_out, c_out], kernel, groups, films * c_out, joins=joins)
            return [first, FusedBlock([c_out] * 3, kernel, groups, films * c_out)]

        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for c_in, width in zip([channels, *widths], widths, strict=False):
            self.down.extend(pair(c_in, width))
        self.downsamplers.extend(layers.Conv2d(n, n, (1, 3), stride=(1, 2), padding=(0, 1)) for n in widths[:-1])
        self.mid = nn.ModuleList(pair(widths[-1], widths[-1]))
        self.up, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for below, width in zip(reversed(widths), reversed(widths[:-1]), strict=False):
            self.up.extend(pair(2 * below, width, joins=True))
            self.upsamplers.append(
                nn.ConvTranspose2d(width, width, (1, 4), stride=(1, 2), padding=(0, 1), dtype=torch.float32)
            )
        self.final = FusedBlock([widths[0], widths[0]], kernel, groups, 0)
        self.out = layers.Linear(widths[0], channels)
        columns = sum(block.columns for block in self.blocks())
        self.projection = layers.Linear(embed, columns)
        width = c["global_cond_dim"]
        self.condition = None if width is None else layers.Linear(width, columns, bias=False)
        self.version = 0

    def blocks(self) -> Iterator[FusedBlock]:
        """The residual blocks in the order of execution."""
        yield from cast("Iterable[FusedBlock]", (*self.down, *self.mid, *self.up))

    def time_rows(self, t: Tensor) -> Tensor:
        """As `UNet1D.time_rows`."""
        return self.projection(self.activated_time(t))

    def condition_rows(self, global_cond: Tensor | None = None, class_labels: Tensor | None = None) -> Tensor | None:
        """As `UNet1D.condition_rows`."""
        condition = self.activated_condition(global_cond, class_labels)
        return None if condition is None else cast(nn.Linear, self.condition)(condition)

    def denoise(self, x: Tensor, rows: Tensor) -> Tensor:
        """As `UNet1D.denoise`; the result is channels-last."""
        self.check_shape(x)
        columns = iter(rows.split([block.columns for block in self.blocks()], 1))
        h = channels_last(as_frames(channels_last(x), self.config["frame"])[:, :, None])
        skips = []
        for i, block in enumerate(self.down):
            h = block(h, next(columns))
            if i % 2:
                skips.append(h)
                h = self.downsamplers[i // 2](h) if i // 2 < len(self.downsamplers) else h
        for block in self.mid:
            h = block(h, next(columns))
        for i, block in enumerate(self.up):
            h = block(h, next(columns)) if i % 2 else block(h, next(columns), skips.pop())
            h = channels_last(self.upsamplers[i // 2](h)) if i % 2 else h
        h = self.final(h)
        y = self.out(as_pixels(h)).view(len(x), h.shape[3], -1).mT
        return from_frames(y, self.config["frame"])

    @torch.no_grad()
    def refresh(self, source: UNet1D) -> None:
        """Copy in place the current weights of source, of which this network is a copy."""
        changed = False
        for own, value in self._parameters_of(source):
            value = value.to(own.dtype)
            if own.device.type != "cpu" or not torch.equal(own, value):  # on a GPU the comparison would sync
                own.copy_(value)
                changed = True
        if changed:
            self.version += 1
            for module in self.modules():
                if isinstance(module, layers.Conv2d):
                    module.version += 1

    def _parameters_of(self, source: UNet1D) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of an own parameter and its value, in float32 or as it is stored."""
        for name in ("diffusion_step_encoder", "class_embedding"):
            if (part := getattr(source, name)) is not None:
                yield from zip(getattr(self, name).parameters(), part.parameters(), strict=True)
        for own, block in zip(self.blocks(), source.blocks, strict=True):
            yield from own.parameters_of((block.conv1, block.conv2), block.residual_conv)
        yield from self.final.parameters_of((cast(ConvBlock, source.final_conv[0]),), None)
        out = cast(nn.Conv1d, source.final_conv[1])
        yield from ((self.out.weight, out.weight[:, :, 0]), (self.out.bias, cast(Tensor, out.bias)))
        for resamplers, levels in ((self.downsamplers, source.down_modules), (self.upsamplers, source.up_modules)):
            for resample, level in zip(cast(Any, resamplers), cast(Any, levels), strict=False):
                yield from ((resample.weight, level[2].weight[:, :, None]), (resample.bias, level[2].bias))
        width, films = self.config["diffusion_step_embed_dim"], [block.film for block in source.blocks]
        yield self.projection.weight, torch.cat([film.weight[:, :width] for film in films])
        yield self.projection.bias, torch.cat([film.bias for film in films])
        if self.condition is not None:
            yield self.condition.weight, torch.cat([film.weight[:, width:] for film in films])


def for_inference(
    source: UNet1D, dtype: torch.dtype, device: torch.device | str | None = None, *, pack: bool = True
) -> FusedUNet1D:
    """A copy for sampling: convolutions in `dtype`; the time, the condition and the norms' parameters in float32.

    Args:
        dtype: float32, bfloat16 or float16.
        device: None: the network's own.
        pack: on a CPU, keep the convolutions' weights in oneDNN's own layout, which torch.compile cannot trace.
    Raises: ValueError: dtype is none of these, or a copy would compute something else than this network does.
    """
    if dtype not in ops.FLOATS:
        raise ValueError(f"dtype is {dtype}; want torch.float32, bfloat16 or float16")
    for obstacle in obstacles_of(source):
        raise ValueError(f"the network cannot be fused: {obstacle}; call it as it is, or give it to a Sampler")
    place = next(source.parameters()).device if device is None else named_device(device)
    kernels, on_cpu = ops.backend(place) != "torch", place.type == "cpu"
    with torch.device("meta"):
        net = FusedUNet1D(**source.config)
    for module in net.modules():
        if isinstance(module, layers.Conv2d | nn.ConvTranspose2d):
            module.to(dtype)
        elif isinstance(module, GroupNorm):
            module.kernels = kernels
            module.to(torch.float32 if kernels or on_cpu else dtype)
        if isinstance(module, layers.Conv2d):
            module.kernels = kernels
            module.pack = pack and on_cpu and torch.backends.mkldnn.is_available() and is_packable(dtype)
        elif isinstance(module, FusedBlock) and module.shortcut is not None:
            module.shortcut.to(dtype)
    net.out.to(dtype)
    net.to_empty(device=place).eval().requires_grad_(False)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.refresh(source)
    return net


def obstacles_of(net: UNet1D) -> Obstacles:
    """What rules out a fused copy: anything besides the configuration and the parameters that affects the output."""
    found: Obstacles = {} if type(net) is UNet1D else {f"it is a {type(net).__name__}, not a UNet1D": type(net)}
    try:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in net.config.items()}
        expected = _parts_of(tuple(options.items()))
    except (ValueError, TypeError, AttributeError) as error:
        return {**found, f"its configuration is not that of a UNet1D ({error})": str(error)}
    return {**found, **obstacles(net, expected)}


@lru_cache
def _parts_of(config: tuple[tuple[str, Any], ...]) -> dict[str, Part]:
    """The parts of a network with these options."""
    with torch.device("meta"):
        return parts(UNet1D(**dict(config)))


remember([*vars(nn).values(), ConvBlock, ResidualBlock, SequenceNetwork, Sinusoid, UNet1D])
