"""The DDPM U-Net, channels-last, with diffusers' parameter names (`UNet2DModel`) and another execution.

Everything that depends on t alone (embedding, time MLP, the projection of each residual block) is one row of numbers,
computed by `time_rows` for all timesteps at once; `denoise` takes such rows. Where the whole batch is at one t, the
projection of a residual block is a bias per channel, and so it *is* the bias of the block's first convolution.

Ho et al. 2020 (arXiv:2006.11239), appendix B. The plain version to compare with is `fastddpm.reference.unet`.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core.layout import channels_last

Activation = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    """SiLU, which overwrites x where no gradient will need it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, Activation] = {"silu": silu, "swish": silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}
IDENTITY = nn.Identity()
CACHED_ELEMENTS = 1 << 18  # float32, 1 MB: a core's second-level cache has room for it
DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP = {"UpBlock2D": False, "AttnUpBlock2D": True}
POLYPHASE_DEVICES = ("cpu",)  # device types with polyphase `Upsample`; add "cuda" if it proves faster on a GPU

DEFAULTS: dict[str, Any] = {  # diffusers' UNet2DModel
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "downsample_padding": (0, 1),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
    "act_fn": tuple(ACTIVATIONS),
}


Range = tuple[str, Callable[[Any], bool]]
COUNT: Range = "a whole number, at least 1", lambda value: isinstance(value, int) and value >= 1
RANGES: dict[str, Range] = {
    "in_channels": COUNT,
    "out_channels": COUNT,
    "layers_per_block": COUNT,
    "norm_eps": ("a number > 0", lambda value: value > 0),
    "dropout": ("a number, 0 <= dropout < 1", lambda value: 0 <= value < 1),
    "mid_block_scale_factor": ("a number > 0", lambda value: value > 0),
}


class UNet2D(nn.Module):
    """eps_theta(x_t, t) as in diffusers' `UNet2DModel`: same options, same parameters, same function.

    Args: diffusers' configuration as keywords; keys that begin with "_" are ignored.
    Raises: ValueError: an option, or a value of one, that is unknown or not supported; the message names it.
    """

    def __init__(self, **config: Any):
        super().__init__()
        self.config = c = checked(config)
        scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
        widths, groups, eps = c["block_out_channels"], c["norm_num_groups"], c["norm_eps"]
        embed = c["time_embedding_dim"] or widths[0] * 4
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeMLP(widths[0], embed)
        self.class_embedding: nn.Module | None = None
        if c["class_embed_type"] == "timestep":
            self.class_embedding = TimeMLP(widths[0], embed)
        elif c["class_embed_type"] == "identity":
            self.class_embedding = nn.Identity()
        elif c["num_class_embeds"] is not None:
            self.class_embedding = nn.Embedding(c["num_class_embeds"], embed)

        def resnet(c_in: int, c_out: int, scale: float = 1.0) -> Resnet:
            return Resnet(c_in, c_out, embed, groups, eps, c["act_fn"], scale_shift, c["dropout"], scale)

        def attention(width: int, norm_groups: int | None = groups, scale: float = 1.0) -> Attention:
            return Attention(width, c["attention_head_dim"] or width, norm_groups, eps, scale)

        self.down_blocks = nn.ModuleList()
        last = len(widths) - 1
        skips = [widths[0]]  # channels of what the way down leaves for the way up
        for i, (kind, width) in enumerate(zip(c["down_block_types"], widths, strict=True)):
            ins = [widths[max(i - 1, 0)]] + [width] * (c["layers_per_block"] - 1)
            block = Block([resnet(n, width) for n in ins], [attention(width) for _ in ins] if DOWN[kind] else [])
            if i < last:
                block.downsamplers = nn.ModuleList([Downsample(width, c["downsample_padding"])])
            self.down_blocks.append(block)
            skips += [width] * (len(ins) + (i < last))
        self.mid_block: Block | None = None
        if c["mid_block_type"] is not None:
            width, scale = widths[-1], c["mid_block_scale_factor"]
            mid_groups = c["attn_norm_num_groups"] or (None if scale_shift else groups)
            middle = [attention(width, mid_groups, scale)] if c["add_attention"] else []
            self.mid_block = Block([resnet(width, width, scale), resnet(width, width, scale)], middle)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, (kind, width) in enumerate(zip(c["up_block_types"], reversed(widths), strict=True)):
            ins = [below] + [width] * c["layers_per_block"]
            block = Block(
                [resnet(n + skips.pop(), width) for n in ins], [attention(width) for _ in ins] if UP[kind] else []
            )
            if i < last:
                block.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(block)
            below = width
        self.conv_norm_out = GroupNorm(groups, widths[0], eps)
        self.conv_out = Conv2d(widths[0], c["out_channels"], 3, padding=1)
        self.projection: nn.Linear | None = None
        self.resnets = tuple(m for m in self.modules() if isinstance(m, Resnet))  # in the order of execution
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: int | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict the noise in x_t (or x_0, or v: what the network was trained for).

        Args:
            x: [N, C, H, W], H and W multiples of 2^(levels - 1).
            t: the timestep, one for all or [N].
            class_labels: [N] for a class-conditional network, else None.
        Returns: [N, out_channels, H, W] in x's dtype, channels-last.
        Raises: ValueError: a shape is not as above, or class_labels missing or not wanted.
        """
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        for name, given in (("t", t), ("class_labels", t if class_labels is None else class_labels)):
            if len(given) not in (1, len(x)):
                raise ValueError(
                    f"{name} has length {len(given)} for a batch of {len(x)}; want one for all, or one each"
                )
        return self.denoise(x, self.time_rows(t, class_labels))

    def time_rows(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """All that depends on t alone: [len(t), columns], a row per timestep, for `denoise`.

        A residual block's columns are its first convolution's bias plus its projection of the time embedding, or, with
        scale_shift, its scale and shift. With class labels, t and class_labels are [N], or one of them is [1].
        """
        embed = self.time_embedding(self._sinusoid(t))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this network is not class-conditional; leave them out")
        elif class_labels is None:
            raise ValueError("this network is class-conditional; pass class_labels, one per sample")
        else:
            by_time = self.config["class_embed_type"] == "timestep"
            embed = embed + self.class_embedding(self._sinusoid(class_labels) if by_time else class_labels)
        embed = ACTIVATIONS[self.config["act_fn"]](embed)
        if self.projection is not None:
            return self.projection(embed)
        return torch.cat([F.linear(embed, *resnet.time_projection()) for resnet in self.resnets], 1)

    def denoise(self, x: Tensor, rows: Tensor) -> Tensor:
        """The network given `time_rows`: one row for the whole batch, or [N, columns]."""
        shape, factor = (self.config["in_channels"],), 1 << (len(self.config["block_out_channels"]) - 1)
        if x.ndim != 4 or x.shape[1:2] != shape or 0 in x.shape[2:] or any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"x is {tuple(x.shape)}; want [N, {shape[0]}, H, W] with H and W multiples of {factor} for this network"
            )
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
                h = downsample(h)
                skips.append(h)
        if self.mid_block is not None:
            for resnet, attention in self.mid_block.layers():
                h = attention(resnet(h, next(columns)))
        for block in cast("Iterable[Block]", self.up_blocks):
            for resnet, attention in block.layers():
                h = attention(resnet(h, next(columns), skips.pop()))
            for upsample in block.upsamplers:
                h = upsample(h)
        return self.conv_out(self.conv_norm_out(h, silu))

    def for_inference(
        self, dtype: torch.dtype, device: torch.device | str | None = None, *, pack: bool = True
    ) -> "UNet2D":
        """A copy to sample with: no gradients, convolutions and attention in `dtype`, fused and packed.

        What is cheap stays float32: the time path (a table, made once) and, where the kernels or torch can mix, the
        norms' parameters and the biases that are added with the residuals.

        Args:
            dtype: float32, bfloat16 or float16.
            device: None is this network's own.
            pack: on a CPU, keep the convolutions' weights in oneDNN's own layout, which torch.compile cannot trace.
        Raises: ValueError: dtype is none of these.
        """
        if dtype not in ops.FLOATS:
            raise ValueError(f"dtype is {dtype}; want torch.float32, bfloat16 or float16")
        device = self.conv_in.weight.device if device is None else torch.device(device)
        on_cpu, kernels = device.type == "cpu", ops.backend(device) == "triton"
        onednn = pack and on_cpu and torch.backends.mkldnn.is_available()
        packs = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        with torch.device("meta"):
            net = UNet2D(**self.config)
            net.projection = nn.Linear(net.time_embedding.linear_2.out_features, sum(r.columns for r in net.resnets))
            for module in list(net.modules()):
                if isinstance(module, Resnet | Attention) or (
                    isinstance(module, Upsample) and device.type in POLYPHASE_DEVICES
                ):
                    module.fuse(kernels)
        for module in net.modules():
            if isinstance(module, Conv2d):
                module.kernels, module.pack = kernels, onednn and packs
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
        """Take over, in place, the weights that the network this copy is of has now."""
        if source.conv_in.weight.dtype != torch.float32:
            source = copy.deepcopy(source).float()  # sums of weights shall not be rounded to 16 bits
        state: dict[str, Tensor] = dict(source.named_parameters())
        polyphase = any(isinstance(module, Upsample) and module.phases is not None for module in self.modules())
        for prefix, module in source.named_modules():
            if isinstance(module, Resnet | Attention) or (isinstance(module, Upsample) and polyphase):
                state |= {f"{prefix}.{name}": value for name, value in module.fused()}
        weights, biases = zip(*(resnet.time_projection() for resnet in source.resnets), strict=True)
        state |= {"projection.weight": torch.cat(weights), "projection.bias": torch.cat(biases)}
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.version += 1

    def _sinusoid(self, t: Tensor) -> Tensor:
        """Sinusoidal embedding of t [N] -> [N, block_out_channels[0]] in the time MLP's dtype."""
        width = self.config["block_out_channels"][0]
        half = width // 2
        # an angle of 4000 would be off by 1e-4 in float32
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float64, device=t.device)
        angle = t.unsqueeze(1) * torch.exp(exponent / (half - self.config["freq_shift"]))
        pair = [angle.cos(), angle.sin()] if self.config["flip_sin_to_cos"] else [angle.sin(), angle.cos()]
        return F.pad(torch.cat(pair, 1), (0, width % 2)).to(self.time_embedding.linear_1.weight.dtype)


class Resnet(nn.Module):
    """Residual block: two convolutions with norm and activation before each, the time embedding between them."""

    def __init__(self, c_in: int, c_out: int, embed: int, groups: int, eps: float, act: str, scale_shift: bool,
                 dropout: float, scale: float):  # fmt: skip
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.columns = 2 * c_out if scale_shift else c_out
        self.time_emb_proj = nn.Linear(embed, self.columns)
        self.norm2 = GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.bias: nn.Parameter | None = None  # of the residual sum, where a kernel adds it
        self.scale_shift, self.scale, self.kernels = scale_shift, scale, False
        self.act: Activation = ACTIVATIONS[act]

    def time_projection(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the columns; without scale_shift they carry the first convolution's bias.

        So neither is rounded before their sum.
        """
        weight, bias = self.time_emb_proj.weight, self.time_emb_proj.bias
        return weight, bias if self.scale_shift or self.conv1.bias is None else bias + self.conv1.bias

    def fuse(self, kernels: bool) -> None:
        """Leave the columns to the network's projection, and the biases to kernels where there are some."""
        del self.time_emb_proj
        self.kernels = kernels
        if not self.scale_shift:
            self.conv1.bias = None
        if kernels:
            self.bias = nn.Parameter(torch.empty(self.conv2.out_channels))
            self.conv2.bias = None
            if self.conv_shortcut is not None:
                self.conv_shortcut.bias = None

    def fused(self) -> Iterator[tuple[str, Tensor]]:
        """What `fuse` made room for."""
        bias = cast(Tensor, self.conv2.bias)
        yield "bias", bias if self.conv_shortcut is None else bias + cast(Tensor, self.conv_shortcut.bias)

    def forward(self, x: Tensor, columns: Tensor, skip: Tensor | None = None) -> Tensor:
        """columns: [1 or N, self.columns], of the time rows; skip: the channels that follow x's, on the way up."""
        if skip is not None and not self.kernels:
            x, skip = torch.cat([x, skip], 1), None
        h = self.norm1(x, self.act, skip=skip)
        if self.scale_shift:
            scale, shift = columns.to(h.dtype)[:, :, None, None].chunk(2, 1)
            h = self.act(self.norm2(self.conv1(h)) * (1 + scale) + shift)
        elif self.kernels:
            h = self.norm2(self.conv1(h), self.act, add=columns)
        else:
            h = self.norm2(self.conv1(h, columns), self.act)
        h = self.conv2(self.dropout(h))
        if self.kernels:
            h = ops.residual(h, self._shortcut(x, skip), self.bias)
        else:
            h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h if self.scale == 1 else h / self.scale

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The input, projected where widths differ: x and skip by a matrix product each, so they stay apart."""
        if self.conv_shortcut is None:
            return x if skip is None else torch.cat([x, skip], 1)
        inputs = [x] if skip is None else [x, skip]
        weights = self.conv_shortcut.weight.flatten(1).split([part.shape[1] for part in inputs], 1)
        y = F.linear(_pixels(x), weights[0])
        if skip is not None:
            y.addmm_(_pixels(skip), weights[1].t())
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual."""

    def __init__(self, width: int, head_dim: int, groups: int | None, eps: float, scale: float):
        super().__init__()
        self.group_norm = GroupNorm(groups, width, eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.qkv: nn.Linear | None = None
        self.bias: nn.Parameter | None = None  # of the residual sum, where a kernel adds it
        self.head_dim, self.scale = head_dim, scale

    def fuse(self, kernels: bool) -> None:
        """Make one matrix of three, and leave the last bias to a kernel where there is one."""
        width = self.to_q.in_features
        self.qkv = nn.Linear(width, 3 * width)
        del self.to_q, self.to_k, self.to_v
        if kernels:
            self.bias = nn.Parameter(torch.empty(width))
            cast(Any, self.to_out[0]).bias = None

    def fused(self) -> Iterator[tuple[str, Tensor]]:
        """What `fuse` made room for."""
        parts = self.to_q, self.to_k, self.to_v
        yield "qkv.weight", torch.cat([part.weight for part in parts])
        yield "qkv.bias", torch.cat([part.bias for part in parts])
        yield "bias", cast(Tensor, self.to_out[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = _pixels(h).view(n, height * width, c)
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
    """The layers of one resolution; only a container, for the parameters' names."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layers(self) -> Iterator[tuple[Any, Any]]:
        """(residual block, what follows it): the middle's last residual block has no attention."""
        return zip_longest(self.resnets, self.attentions, fillvalue=IDENTITY)


class Downsample(nn.Module):
    def __init__(self, width: int, padding: int):
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)


class Upsample(nn.Module):
    """Nearest neighbours, twice the size, then a 3 x 3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)
        self.phases: Conv2d | None = None
        self.bias: nn.Parameter | None = None  # if a kernel adds it: `phases` then has none

    def fuse(self, kernels: bool) -> None:
        """Prepare for polyphase upsampling: convolve before the pixels are repeated. If kernels, one adds the bias.

        A 3 x 3 window of the upsampled image covers only 2 x 2 different input pixels. Which taps fall on the same
        input pixel depends only on the parity of the row and the column. So four 2 x 2 convolutions with summed taps,
        one per parity, give the result with half of the multiplications: 181 -> 60 ms in fp32, 25 -> 18 ms in bf16, for
        16 x 256 x 16 x 16 on a core of a Xeon with AMX, 2026-11-22. oneDNN adds the bias within the convolution; cuDNN
        would need a separate pass.
        """
        width = self.conv.in_channels
        self.phases = Conv2d(width, 4 * width, 2, padding=1, bias=not kernels)
        if kernels:
            self.bias = nn.Parameter(torch.empty(width))
        del self.conv

    def fused(self) -> Iterator[tuple[str, Tensor]]:
        """What `fuse` made room for."""
        width, tap, bias = self.conv.in_channels, self.conv.weight, cast(Tensor, self.conv.bias)
        meets = tap.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [parity, input pixel, tap]
        yield "phases.weight", torch.einsum("apk,bql,oikl->aboipq", meets, meets, tap).reshape(4 * width, width, 2, 2)
        yield "phases.bias", bias.repeat(4)
        yield "bias", bias

    def forward(self, x: Tensor) -> Tensor:
        if self.phases is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return ops.interleave(channels_last(self.phases(x)), self.bias)


class TimeMLP(nn.Module):
    def __init__(self, width: int, embed: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, embed), nn.Linear(embed, embed)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv2d(nn.Conv2d):
    """A convolution whose bias can come with the call, and whose weight can be kept in oneDNN's own layout.

    Packing spares the reordering of the weight in every call: 237 -> 118 us for 256 channels at 16 x 16 and batch 1 in
    bf16, 842 -> 736 us in fp32 (two cores of a Xeon with AMX, 2026-11-22).
    """

    kernels = False  # which take channels-last memory and no other
    pack = False
    packed: tuple[object, Tensor] | None = None
    version = 0  # of the weight

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: [1 or N, C_out], in place of the module's own."""
        if bias is not None and len(bias) > 1:
            return self._convolve(x, None) + bias.to(x.dtype)[:, :, None, None]
        return self._convolve(x, self.bias if bias is None else bias[0].to(x.dtype))

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.pack:
            y = F.conv2d(x, self.weight, bias, self.stride, cast("tuple[int, int]", self.padding))
            return channels_last(y) if self.kernels else y  # torch promises no memory format
        how = self.padding, self.stride, self.dilation, self.groups
        packed, now = self.packed, (x.shape, self.version)  # other threads may pack, too, or bring new weights
        if packed is None or packed[0] != now:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            self.packed = packed = now, reorder(self.weight.to_mkldnn(), *how, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(x, packed[1], bias, *how, "none", [], "")


class GroupNorm(nn.GroupNorm):
    """Group norm and activation, in x's dtype; the statistics in float32."""

    kernels = False

    def forward(
        self, x: Tensor, act: Activation | None = None, *, skip: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """skip: channels that follow x's; add: [1 or N, C], added to x before. Both need kernels."""
        if self.kernels:
            how: dict[str, Any] = {"eps": self.eps, "skip": skip, "add": add, "silu": act is silu}
            y = ops.group_norm(x, self.weight, self.bias, self.num_groups, **how)
            return y if act is None or act is silu else act(y)
        on_cpu = x.device.type == "cpu"
        if on_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled():
            y = _two_pass_group_norm(self, x)
        else:
            # torch's CPU kernel for 16 bits is slow below 1024 pixels: 2.0 ms instead of 0.9 ms by way of float32, for
            # 16 x 256 x 16 x 16 (two cores of a Xeon with AMX, 2026-11-22); this is more accurate, too
            widen = on_cpu and x.dtype in (torch.bfloat16, torch.float16) and x.shape[2:].numel() < 1024
            y = F.group_norm(x.float() if widen else x, self.num_groups, self.weight, self.bias, self.eps)
        return (y if act is None else act(y)).to(x.dtype)


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] channels-last -> [N * H * W, C], a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _two_pass_group_norm(norm: GroupNorm, x: Tensor) -> Tensor:
    """Group norm with the variance taken about the mean.

    torch's CPU kernel for channels-last takes E[x^2] - E[x]^2, whose error grows with (mean / std)^2. 16-bit inputs can
    be left to it: their own rounding costs more. Of the size of x there is one new tensor alone: the squares are summed
    in parts that stay in the cache (27.7 -> 15 ms for 1 x 128 x 256 x 256, two cores of a Xeon, 2026-11-22).
    """
    n, c = x.shape[:2]
    pixels = x.shape[2:].numel()
    mean = x.mean((2, 3), keepdim=True)
    centred = x - mean
    parts = _pixels(centred).view(n, pixels, c).split(max(1, CACHED_ELEMENTS // (n * c)), 1)
    variances = sum((part.square().sum(1) for part in parts), torch.zeros(n, c)) / pixels
    means = mean.view(n, norm.num_groups, -1).double()  # a group's mean, rounded, would cost half of the accuracy
    offset = (means - means.mean(2, keepdim=True)).float()  # of each channel from its group
    variance = (variances.view_as(offset) + offset.square()).mean(2, keepdim=True)
    scale = (variance + norm.eps).rsqrt() * norm.weight.view(offset.shape[1:])
    shift = norm.bias.view(offset.shape[1:]) + offset * scale
    return centred.mul_(scale.view(n, c, 1, 1)).add_(shift.view(n, c, 1, 1))


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """A full configuration: given keys over diffusers' defaults; raises ValueError for what is not supported."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(key for key in config.keys() - DEFAULTS.keys() if config[key] not in (None, False))
    if unknown:
        raise ValueError(f"UNet2D: unknown option {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    config = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    for key, (wanted, right) in RANGES.items():
        if not _real(config[key]) or not right(config[key]):
            raise ValueError(f"UNet2D: {key} is {config[key]!r}; want {wanted}")
    for key, values in SUPPORTED.items():
        if config[key] not in values:
            raise ValueError(f"UNet2D: {key} is {config[key]!r}, which is not supported; supported: {values}")
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config[key], list | tuple) or not config[key]:
            raise ValueError(f"UNet2D: {key} is {config[key]!r}; want a list with one entry per level")
        config[key] = tuple(config[key])
        if len(config[key]) != len(config["block_out_channels"]):
            raise ValueError(
                f"UNet2D: {key} has {len(config[key])} entries, but block_out_channels has "
                f"{len(config['block_out_channels'])}; give one of each per level"
            )
    for key, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
        config[key] = tuple(str(kind).removeprefix("UNetRes") for kind in config[key])  # an old name for the same
        for kind in config[key]:
            if kind not in kinds:
                raise ValueError(f"UNet2D: {key} holds {kind!r}, which is not supported; supported: {', '.join(kinds)}")
    widths = config["block_out_channels"]
    if not all(isinstance(width, int) and width >= 2 for width in widths):
        raise ValueError(f"UNet2D: block_out_channels is {widths}; want whole numbers, at least 2")
    if not _real(config["freq_shift"]) or not config["freq_shift"] < widths[0] // 2:
        raise ValueError(f"UNet2D: freq_shift is {config['freq_shift']!r}; want less than {widths[0] // 2}")
    attended = {width for kind, width in zip(config["down_block_types"], widths, strict=True) if DOWN[kind]}
    attended |= {width for kind, width in zip(config["up_block_types"], reversed(widths), strict=True) if UP[kind]}
    attended |= {widths[-1]} if config["mid_block_type"] is not None and config["add_attention"] else set()
    divisors = (("norm_num_groups", widths), ("attention_head_dim", attended), ("attn_norm_num_groups", widths[-1:]))
    for key, multiples in divisors:
        value = config[key]
        if value is None and key != "norm_num_groups":
            continue
        if not isinstance(value, int) or value < 1 or any(width % value for width in multiples):
            raise ValueError(f"UNet2D: {key} is {value!r}; want a whole number that divides {sorted(set(multiples))}")
    return config


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
