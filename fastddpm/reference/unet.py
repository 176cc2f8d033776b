"""The network of the specification: the U-Net of Ho et al. 2020 (arXiv:2006.11239), appendix B, in eager torch.

A PixelCNN++ backbone (a U-Net of Wide ResNet blocks) with group normalisation, SiLU, self-attention at chosen
resolutions, and a sinusoidal embedding of t that enters every residual block. Plain and slow: NCHW, any float dtype. It
takes the configuration of diffusers' UNet2DModel and has its parameter names, so it loads diffusers' checkpoints. In
float64 it is the reference of the fast U-Net.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN_BLOCKS = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UP_BLOCKS = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


def timestep_embedding(t: Tensor, width: int, *, flip_sin_to_cos: bool = False, freq_shift: float = 0) -> Tensor:
    """Sines, then cosines, of t times width // 2 frequencies that fall geometrically from 1 to about 1/10000.

    Args:
        t: [N], whole or fractional.
        flip_sin_to_cos: whether the cosines come first.
        freq_shift: with 1 the last frequency is 1/10000; with 0 it is one geometric step larger.
    Returns: [N, width] float64; if width is odd, the last column is zero.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / (half - freq_shift)
    angles = t[:, None] * torch.exp(-math.log(10000) * exponents)
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, 1), (0, width % 2))


class EmbeddingMLP(nn.Module):
    """[N, waves] -> [N, width]: two linear layers with SiLU between them."""

    def __init__(self, waves: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(waves, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


def halve(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H/2, W/2]: the mean of 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]: every pixel four times."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class ResidualBlock(nn.Module):
    """[N, channels, H, W], embedding [N, emb_width] -> [N, out, H, W]: two normalised convolutions and a shortcut.

    The embedding is added between the convolutions; with scale_shift it scales and shifts the second norm's output.
    resample (halve or double) changes the size before the first convolution and on the shortcut.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        emb_width: int,
        groups: int,
        eps: float,
        act: Callable[[Tensor], Tensor],
        scale_shift: bool,
        dropout: float,
        rescale: float = 1,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.act, self.scale_shift, self.rescale = act, scale_shift, rescale
        self.resample: Callable[[Tensor], Tensor] = resample or nn.Identity()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_width, 2 * out if scale_shift else out)
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        emb = self.time_emb_proj(self.act(embedding))[:, :, None, None]
        h = self.conv1(self.resample(self.act(self.norm1(x))))
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        return (self.conv_shortcut(self.resample(x)) + self.conv2(self.dropout(self.act(h)))) / self.rescale


class Attention(nn.Module):
    """[N, channels, H, W] -> the same: each pixel attends to all, with channels // head_dim heads, and a shortcut."""

    def __init__(self, channels: int, *, head_dim: int | None, groups: int | None, eps: float, rescale: float = 1):
        super().__init__()
        head_dim = head_dim or channels
        self.rescale = rescale
        self.heads = channels // head_dim
        if not self.heads:
            raise ValueError(f"attention_head_dim is {head_dim}; want at most the {channels} channels of its block")
        width = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()
        self.to_q = nn.Linear(channels, width)
        self.to_k = nn.Linear(channels, width)
        self.to_v = nn.Linear(channels, width)
        self.to_out = nn.ModuleList([nn.Linear(width, channels)])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, H W, channels]
        q, k, v = (self._heads(project(pixels)) for project in (self.to_q, self.to_k, self.to_v))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), 3)  # [N, heads, H W, H W]
        h = self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        return (x + h.transpose(1, 2).reshape(x.shape)) / self.rescale

    def _heads(self, pixels: Tensor) -> Tensor:
        """[N, H W, width] -> [N, heads, H W, head_dim]."""
        return pixels.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """[N, C, H, W] -> [N, C, H/2, W/2]: a convolution of stride 2. Padding 0 pads below and on the right."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.pad = (1, 1, 1, 1) if padding else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """[N, C, H, W] -> [N, C, 2H, 2W]: repeats every pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


class Resample(nn.Module):
    """Changes the size by a function alone: halve or double."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class DownBlock(nn.Module):
    """One resolution on the way down: residual blocks, each followed by its attention, then what halves the size."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], downsamplers: Iterable[nn.Module]
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the input of the next block; append to skips the inputs of the way up."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(h, embedding))
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h, embedding) if isinstance(downsample, ResidualBlock) else downsample(h)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    """The lowest resolution: attention between two residual blocks."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.attentions[0](self.resnets[0](h, embedding))
        return self.resnets[1](h, embedding)


class UpBlock(nn.Module):
    """One resolution on the way up: residual blocks, which also take a skip, each with its attention; then doubling."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], upsamplers: Iterable[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the input of the next block; pop from skips, the last first."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(torch.cat([h, skips.pop()], 1), embedding))
        for upsample in self.upsamplers:
            h = upsample(h, embedding) if isinstance(upsample, ResidualBlock) else upsample(h)
        return h


class UNet(nn.Module):
    """eps_theta(x_t, t). The arguments are the configuration of diffusers' UNet2DModel, with its defaults.

    Beyond those: num_attention_heads of every attention (one number, or that of the way down and the middle, and that
    of the way up), time_proj_dim sines and cosines of t, downsample_type "pool" and upsample_type "nearest".
    Options that start with "_" are ignored.

    Raises: ValueError: an option, or a value of one, is unknown or not supported.
    """

    def __init__(
        self,
        *,
        sample_size: object = None,  # unused: H and W may be any multiples of 2^(levels - 1)
        num_train_timesteps: object = None,  # unused: t may be any number
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: float = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_attention_heads: int | Sequence[int] | None = None,
        time_proj_dim: int | None = None,
        **others: object,
    ):
        super().__init__()
        _check_known("time_embedding_type", [time_embedding_type], ["positional"])
        _check_known("down_block_types", down_block_types, DOWN_BLOCKS)
        _check_known("mid_block_type", [mid_block_type], ["UNetMidBlock2D", None])
        _check_known("up_block_types", up_block_types, UP_BLOCKS)
        _check_known("downsample_padding", [downsample_padding], [0, 1])
        _check_known("downsample_type", [downsample_type], ["conv", "resnet", "pool"])
        _check_known("upsample_type", [upsample_type], ["conv", "resnet", "nearest"])
        _check_known("act_fn", [act_fn], [*ACTIVATIONS])
        _check_known("resnet_time_scale_shift", [resnet_time_scale_shift], ["default", "scale_shift"])
        _check_known("class_embed_type", [class_embed_type], [None, "timestep", "identity"])
        for name, value in others.items():
            if not name.startswith("_"):
                raise ValueError(f"{name} is {value!r}, but there is no such option; leave it out")
        levels = len(block_out_channels)
        if not levels == len(down_block_types) == len(up_block_types):
            raise ValueError(
                f"block_out_channels has {levels} levels; want as many entries in down_block_types and up_block_types"
            )

        channels, bottom = block_out_channels[0], block_out_channels[-1]
        emb_width = time_embedding_dim or 4 * channels
        scale_shift = resnet_time_scale_shift == "scale_shift"
        mid_groups = attn_norm_num_groups or (None if scale_shift else norm_num_groups)

        resnet = functools.partial(
            ResidualBlock,
            emb_width=emb_width,
            groups=norm_num_groups,
            eps=norm_eps,
            act=ACTIVATIONS[act_fn],
            scale_shift=scale_shift,
            dropout=dropout,
        )
        heads = num_attention_heads if isinstance(num_attention_heads, Sequence) else (num_attention_heads,) * 2

        def attention(width: int, groups: int | None = norm_num_groups, *, up: bool = False, **options) -> Attention:
            count = heads[up]
            head_dim = width // count if count else attention_head_dim
            return Attention(width, head_dim=head_dim, groups=groups, eps=norm_eps, **options)

        waves = time_proj_dim or channels
        self.embed = functools.partial(
            timestep_embedding, width=waves, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
        )
        self.time_embedding = EmbeddingMLP(waves, emb_width)
        self.class_embed_type = class_embed_type
        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = EmbeddingMLP(waves, emb_width)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, emb_width)

        self.center_input_sample = center_input_sample
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        skips = [channels]  # channels of the tensors that the way down passes to the way up
        self.down_blocks = nn.ModuleList()
        for level, (kind, out) in enumerate(zip(down_block_types, block_out_channels, strict=True), 1):
            resnets = [resnet(c, out) for c in [channels, *[out] * (layers_per_block - 1)]]
            attended, downsamplers = kind == "AttnDownBlock2D", list[nn.Module]()
            attentions = [attention(out) if attended else nn.Identity() for _ in resnets]
            if level < levels:
                if kind == "ResnetDownsampleBlock2D" or (attended and downsample_type == "resnet"):
                    downsamplers.append(resnet(out, out, resample=halve))
                else:
                    downsamplers.append(
                        Resample(halve) if downsample_type == "pool" else Downsample(out, downsample_padding)
                    )
            self.down_blocks.append(DownBlock(resnets, attentions, downsamplers))
            skips += [out] * (len(resnets) + len(downsamplers))
            channels = out

        self.mid_block: nn.Module | None = None
        if mid_block_type is not None:
            scale = mid_block_scale_factor
            resnets = [resnet(bottom, bottom, rescale=scale) for _ in range(2)]
            attentions = [attention(bottom, mid_groups, rescale=scale) if add_attention else nn.Identity()]
            self.mid_block = MidBlock(resnets, attentions)

        self.up_blocks = nn.ModuleList()
        for level, (kind, out) in enumerate(zip(up_block_types, reversed(block_out_channels), strict=True), 1):
            resnets = [resnet(c + skips.pop(), out) for c in [channels, *[out] * layers_per_block]]
            attended, upsamplers = kind == "AttnUpBlock2D", list[nn.Module]()
            attentions = [attention(out, up=True) if attended else nn.Identity() for _ in resnets]
            if level < levels:
                if kind == "ResnetUpsampleBlock2D" or (attended and upsample_type == "resnet"):
                    upsamplers = [resnet(out, out, resample=double)]
                else:
                    upsamplers = [Resample(double) if upsample_type == "nearest" else Upsample(out)]
            self.up_blocks.append(UpBlock(resnets, attentions, upsamplers))
            channels = out
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, norm_eps)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.float()  # whatever torch's default dtype is

    def forward(self, x: Tensor, t: int | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict eps.

        Args:
            x: [N, in_channels, H, W] in the dtype of the parameters; H and W are multiples of 2^(levels - 1).
            t: one timestep, or [N].
            class_labels: [N] classes; [N, embedding width] if class_embed_type is "identity".
        Returns: [N, out_channels, H, W].
        Raises: ValueError: class_labels are missing, or were given to a network without classes.
        """
        embedding = self.time_embedding(self.embed(torch.as_tensor(t, device=x.device).expand(len(x))).to(x.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels are missing; this network wants one for each entry of x")
            labels = self.embed(class_labels).to(x.dtype) if self.class_embed_type == "timestep" else class_labels
            embedding = embedding + self.class_embedding(labels)
        elif class_labels is not None:
            raise ValueError("class_labels were given, but this network has no classes; leave them out")

        h = self.conv_in(2 * x - 1 if self.center_input_sample else x)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, embedding, skips)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding)
        for block in self.up_blocks:
            h = block(h, embedding, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _check_known(name: str, values: Iterable, known: list) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name} has {value!r}; want one of {', '.join(map(str, known))}")
