"""The DDPM U-Net: channels-last, with the parameter names of diffusers' `UNet2DModel`, but executed differently.

What depends on t alone (the embedding, the time MLP, the projection of each residual block) is one row of numbers per
timestep: `time_rows` computes them for all timesteps at once, and `denoise` takes them. If the whole batch is at one t,
the projection of a residual block is a bias per channel, so it becomes the bias of the block's first convolution.

Ho et al. 2020 (arXiv:2006.11239), appendix B. The plain version to compare with is `fastddpm.reference.unet`.
"""

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core.checks import shown
from fastddpm.core.layout import channels_last
from fastddpm.core.precision import named_device
from fastddpm.networks import layers
from fastddpm.networks.config import HAS_ATTENTION, UP_BLOCKS, complete_config, heads_of, sampler_of
from fastddpm.networks.layers import (
    ACTIVATIONS,
    Attention,
    Block,
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    Nearest,
    Pool,
    TimeMLP,
    Upsample,
    is_packable,
    is_unchanged,
    norm_and_activation,
    silu,
)
from fastddpm.networks.obstacles import Obstacles, Part, obstacles, parts, remember
from fastddpm.networks.resnet import Resnet

POLYPHASE_DEVICES = ("cpu",)  # device types with polyphase `Upsample`; add "cuda" if it proves faster on a GPU


class UNet2D(nn.Module):
    """eps_theta(x_t, t) as in diffusers' `UNet2DModel`: same options, same parameters, same function.

    Args: diffusers' configuration as keywords, and options of our own (see `networks.config.complete_config`); keys
        that begin with "_" are ignored.
    Raises: ValueError: an option, or a value of one, is unknown or not supported; the message names it.
    """

    def __init__(self, **config: Any):
        super().__init__()
        self.config = c = complete_config(config)
        widths = c["block_out_channels"]
        self._embed_width = c["time_embedding_dim"] or widths[0] * 4
        self._waves = c.get("time_proj_dim", widths[0])
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeMLP(self._waves, self._embed_width)
        self.class_embedding: nn.Module | None = self._class_embedding()
        skips = [widths[0]]  # channels of the tensors that the way down passes to the way up
        self.down_blocks = nn.ModuleList(self._down_blocks(skips))
        self.mid_block: Block | None = self._mid_block()
        self.up_blocks = nn.ModuleList(self._up_blocks(skips))
        self.conv_norm_out = GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = Conv2d(widths[0], c["out_channels"], 3, padding=1)
        self.projection: nn.Linear | None = None
        self.version = 0  # of the parameters, of a copy by `for_inference`
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def in_channels(self) -> int:
        """The channels of x."""
        return self.config["in_channels"]

    @property
    def out_channels(self) -> int:
        """The channels of the result: with a learned variance, twice those of a sample."""
        return self.config["out_channels"]

    @property
    def resnets(self) -> list[Resnet]:
        """The residual blocks in the order of execution, also those within parts that wrap them."""
        found: list[Resnet] = []
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for part in () if block is None else cast(Block, block).timed_parts():
                found += [part] if isinstance(part, Resnet) else [m for m in part.modules() if isinstance(m, Resnet)]
        return found

    def _class_embedding(self) -> nn.Module | None:
        c = self.config
        if c["class_embed_type"] == "timestep":
            return TimeMLP(self._waves, self._embed_width)
        if c["class_embed_type"] == "identity":
            return nn.Identity()
        return (
            None
            if c["num_class_embeds"] is None
            else nn.Embedding(c["num_class_embeds"], self._embed_width, dtype=torch.float32)
        )

    def _down_blocks(self, skips: list[int]) -> Iterable[Block]:
        """The blocks of the way down. They append the channels of their skips to skips."""
        c, widths = self.config, self.config["block_out_channels"]
        last = len(widths) - 1
        for i, (kind, width) in enumerate(zip(c["down_block_types"], widths, strict=True)):
            ins = [widths[max(i - 1, 0)]] + [width] * (c["layers_per_block"] - 1)
            block = self._block(kind, ins, width)
            if i < last:
                block.downsamplers = nn.ModuleList([self._sampler(kind, width, "down")])
                block.timed = isinstance(block.downsamplers[0], Resnet)
            skips += [width] * (len(ins) + (i < last))
            yield block

    def _mid_block(self) -> Block | None:
        c = self.config
        if c["mid_block_type"] is None:
            return None
        width, scale = c["block_out_channels"][-1], c["mid_block_scale_factor"]
        scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
        groups = c["attn_norm_num_groups"] or (None if scale_shift else c["norm_num_groups"])
        attentions = [self._attention(width, groups, scale=scale)] if c["add_attention"] else []
        return Block([self._resnet(width, width, scale=scale) for _ in range(2)], attentions)

    def _up_blocks(self, skips: list[int]) -> Iterable[Block]:
        """The blocks of the way up. They remove the channels of their skips from skips."""
        c, widths = self.config, self.config["block_out_channels"]
        below = widths[-1]
        for i, (kind, width) in enumerate(zip(c["up_block_types"], reversed(widths), strict=True)):
            block = self._block(kind, [n + skips.pop() for n in [below] + [width] * c["layers_per_block"]], width)
            if i < len(widths) - 1:
                block.upsamplers = nn.ModuleList([self._sampler(kind, width, "up")])
                block.timed = isinstance(block.upsamplers[0], Resnet)
            below = width
            yield block

    def _block(self, kind: str, ins: list[int], width: int) -> Block:
        """Args: ins: the input channels of each residual block; width: their output channels."""
        resnets = [self._resnet(n, width) for n in ins]
        groups, up = self.config["norm_num_groups"], kind in UP_BLOCKS
        return Block(resnets, [self._attention(width, groups, up=up) for _ in ins] if HAS_ATTENTION[kind] else [])

    def _sampler(self, kind: str, width: int, direction: str) -> nn.Module:
        """What changes the size at the end of a block of this kind. Args: direction: "down" or "up"."""
        how = sampler_of(self.config, kind)
        if how == "resnet":
            return self._resnet(width, width, resize=direction)
        if how == "conv":
            return Upsample(width) if direction == "up" else Downsample(width, self.config["downsample_padding"])
        return Nearest() if direction == "up" else Pool()

    def _resnet(self, c_in: int, c_out: int, *, scale: float = 1.0, resize: str | None = None) -> Resnet:
        c = self.config
        return Resnet(
            c_in,
            c_out,
            embed_width=self._embed_width,
            groups=c["norm_num_groups"],
            eps=c["norm_eps"],
            act=c["act_fn"],
            scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
            dropout=c["dropout"],
            scale=scale,
            resize=resize,
        )

    def _attention(self, width: int, groups: int | None, *, scale: float = 1.0, up: bool = False) -> Attention:
        head_dim = width // heads_of(self.config, width, up=up)
        return Attention(width, head_dim, groups, self.config["norm_eps"], scale)

    def forward(self, x: Tensor, t: int | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict the noise in x_t (or x_0, or v: what the network was trained for).

        Args:
            x: [N, C, H, W], H and W multiples of 2^(levels - 1).
            t: the timestep, one for all or [N].
            class_labels: [N] for a class-conditional network, else None.
        Returns: [N, out_channels, H, W] in x's dtype, channels-last.
        Raises: ValueError: a shape or dtype is not as above, or class_labels are missing or unexpected.
        """
        self._check_input(x)
        t = _numbers("t", t, x.device).reshape(-1)
        if class_labels is not None:
            class_labels = _numbers("class_labels", class_labels, x.device)
            if isinstance(self.class_embedding, nn.Embedding) and class_labels.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"class_labels are {class_labels.dtype}; want [N] int64")
        for name, values in (("t", t), ("class_labels", t if class_labels is None else class_labels)):
            if len(values) not in (1, len(x)):
                raise ValueError(
                    f"{name} has length {len(values)} for a batch of {len(x)}; want one for all, or one each"
                )
        return self.denoise(x, self.time_rows(t, class_labels))

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            raise ValueError(f"x is {shown(x)}; want a dense tensor [N, C, H, W]")
        dtype = self.conv_in.weight.dtype if is_unchanged(self.conv_in, Conv2d) else x.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x is {x.dtype}, but the network's parameters are {dtype}; convert one of them by .to()")

    def time_rows(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What depends on t and the class alone: [len(t), columns], a row per timestep, for `denoise`.

        A residual block's columns are its first convolution's bias plus its projection of the time embedding, or, with
        scale_shift, its scale and shift.

        Args: t: [N]; class_labels: [N], for a class-conditional network. One of them may be [1].
        """
        embed = self.time_embedding(self._sinusoid(t))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this network is not class-conditional; leave them out")
        elif class_labels is None:
            raise ValueError("this network is class-conditional; pass class_labels, one per sample")
        else:
            like_t = self.config["class_embed_type"] == "timestep"
            embed = embed + self.class_embedding(self._sinusoid(class_labels) if like_t else class_labels)
        embed = ACTIVATIONS[self.config["act_fn"]](embed.clone())  # which a hook may keep
        if self.projection is not None:
            return self.projection(embed)
        return torch.cat([resnet.time_columns(embed) for resnet in self.resnets], 1)

    def check_shape(self, x: Tensor) -> None:
        """Check the shape of an input. Raises: ValueError: the network cannot take it."""
        channels, factor = self.config["in_channels"], 1 << (len(self.config["block_out_channels"]) - 1)
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:] or any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"x is {tuple(x.shape)}; want [N, {channels}, H, W] with H and W multiples of {factor} for this network"
            )

    def denoise(self, x: Tensor, rows: Tensor) -> Tensor:
        """Evaluate the network, given rows of `time_rows`: one row for the whole batch, or [N, columns]."""
        self.check_shape(x)
        columns = iter(rows.split([resnet.columns for resnet in self.resnets], 1))
        x = channels_last(x)
        if self.config["center_input_sample"]:
            x = 2 * x - 1
        h = self.conv_in(x)
        skips = [h]
        for block in cast("Iterable[Block]", self.down_blocks):
            for resnet, attention in block.layers():
                h = attention(resnet(h, next(columns)))
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h, next(columns)) if block.timed else downsample(h)
                skips.append(h)
        if self.mid_block is not None:
            for resnet, attention in self.mid_block.layers():
                h = attention(resnet(h, next(columns)))
        for block in cast("Iterable[Block]", self.up_blocks):
            for resnet, attention in block.layers():
                h = attention(resnet(h, next(columns), skips.pop()))
            for upsample in block.upsamplers:
                h = upsample(h, next(columns)) if block.timed else upsample(h)
        return self.conv_out(norm_and_activation(self.conv_norm_out, h, silu))

    def for_inference(
        self, dtype: torch.dtype, device: torch.device | str | None = None, *, pack: bool = True
    ) -> "UNet2D":
        """A copy for sampling: without gradients, convolutions and attention in `dtype`, fused and packed.

        What is cheap stays float32: the time path (a table, made once) and, where the kernels or torch can mix dtypes,
        the norms' parameters and the biases that are added with the residuals.

        Args:
            dtype: float32, bfloat16 or float16.
            device: None: this network's own.
            pack: on a CPU, keep the convolutions' weights in oneDNN's own layout, which torch.compile cannot trace.
        Raises: ValueError: dtype is none of these, or a copy would compute something else than this network does.
        """
        if dtype not in ops.FLOATS:
            raise ValueError(f"dtype is {dtype}; want torch.float32, bfloat16 or float16")
        for obstacle in network_obstacles(self):
            raise ValueError(f"the network cannot be fused: {obstacle}; call it as it is, or give it to a Sampler")
        device = self.conv_in.weight.device if device is None else named_device(device)
        on_cpu = device.type == "cpu"
        kernels = ops.backend(device) != "torch"
        pack = pack and on_cpu and torch.backends.mkldnn.is_available() and is_packable(dtype)
        with torch.device("meta"):
            net = UNet2D(**self.config)
            net.projection = Linear(net._embed_width, sum(resnet.columns for resnet in net.resnets))
            polyphase = device.type in POLYPHASE_DEVICES
            for module in list(net.modules()):
                if isinstance(module, Resnet):
                    module.fuse(kernels, polyphase)
                elif isinstance(module, Attention) or (isinstance(module, Upsample) and polyphase):
                    module.fuse(kernels)
        for module in net.modules():
            if isinstance(module, Conv2d):
                module.kernels, module.pack = kernels, pack
                module.to(dtype)
            elif isinstance(module, Attention):
                cast(nn.Linear, module.qkv).to(dtype)
                module.to_out.to(dtype)
            elif isinstance(module, GroupNorm):
                module.kernels = kernels
                module.to(torch.float32 if kernels or on_cpu else dtype)
        net.to_empty(device=device).eval().requires_grad_(False)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.refresh(self)
        return net

    @torch.no_grad()
    def refresh(self, source: "UNet2D") -> None:
        """Copy in place the current weights of source, of which this network is a copy by `for_inference`."""
        state: dict[str, Tensor] = dict(source.named_parameters(remove_duplicate=False))
        if any(value.dtype != torch.float32 for value in state.values()):
            state = {name: value.float() for name, value in state.items()}  # so that sums are not rounded to 16 bits
            source = with_parameters(source.config, state)
        polyphase = any(isinstance(module, Upsample) and module.phases is not None for module in self.modules())
        for prefix, module in source.named_modules(remove_duplicate=False):  # one may have several places
            if isinstance(module, Resnet | Attention) or (isinstance(module, Upsample) and polyphase):
                state |= {f"{prefix}.{name}": value for name, value in module.fused_parameters()}
        weights, biases = zip(*(resnet.time_projection() for resnet in source.resnets), strict=True)
        state |= {"projection.weight": torch.cat(weights), "projection.bias": torch.cat(biases)}
        changed = False
        for name, parameter in self.named_parameters():
            value = state[name].to(parameter.dtype)
            if parameter.device.type != "cpu" or not torch.equal(parameter, value):  # a GPU would have to be waited for
                parameter.copy_(value)
                changed = True
        if changed:
            self.version += 1
            for module in self.modules():
                if isinstance(module, Conv2d):
                    module.version += 1

    def _sinusoid(self, t: Tensor) -> Tensor:
        """Sinusoidal embedding of t [N] -> [N, time_proj_dim] in the time MLP's dtype."""
        width, half = self._waves, self._waves // 2
        # an angle of 4000 would be off by 1e-4 in float32
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float64, device=t.device)
        angle = t.unsqueeze(1) * torch.exp(exponent / (half - self.config["freq_shift"]))
        pair = [angle.cos(), angle.sin()] if self.config["flip_sin_to_cos"] else [angle.sin(), angle.cos()]
        dtype = next((weights.dtype for weights in self.time_embedding.parameters()), torch.float32)
        return F.pad(torch.cat(pair, 1), (0, width % 2)).to(dtype)


def network_obstacles(net: UNet2D) -> Obstacles:
    """What prevents a fused copy of a network, because it decides the output besides configuration and parameters."""
    found: Obstacles = {} if type(net) is UNet2D else {f"it is a {type(net).__name__}, not a UNet2D": type(net)}
    try:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in net.config.items()}
        expected = _parts_of(tuple(options.items()))
    except (ValueError, TypeError, AttributeError) as error:  # an option is not supported, cannot be hashed, ...
        return {**found, f"its configuration is not that of a UNet2D ({error})": str(error)}
    return {**found, **obstacles(net, expected)}


def _numbers(name: str, values: Any, device: torch.device) -> Tensor:
    """Values as a tensor on a device. Raises: ValueError: they are no numbers."""
    try:
        tensor = values.to(device) if isinstance(values, Tensor) else torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is {shown(values)}; want a number, or [N] of them") from error
    return tensor if tensor.ndim else tensor.reshape(1)


@lru_cache
def _parts_of(config: tuple[tuple[str, Any], ...]) -> dict[str, Part]:
    """The parts of a network with these options."""
    with torch.device("meta"):
        return parts(UNet2D(**dict(config)))


def with_parameters(config: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> UNet2D:
    """A network of these tensors, which it does not copy. Args: parameters: by name."""
    with torch.device("meta"):
        net = UNet2D(**config)
    for name, value in parameters.items():
        module, _, leaf = name.rpartition(".")
        net.get_submodule(module)._parameters[leaf] = cast(Any, value)  # load_state_dict would set its requires_grad
    return net


remember([*vars(nn).values(), *vars(layers).values(), Resnet, UNet2D])
