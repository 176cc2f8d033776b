"""The `UNetModel` of guided-diffusion and improved-diffusion, for tests: its parameter names, and what it computes.

Written anew after the description in arXiv:2105.05233 and the names in published checkpoints, in NCHW and any dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(32, channels)


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    def __init__(self, channels, embed, out, dropout, scale_shift, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(Norm(out), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.scale_shift, self.resample = scale_shift, resample or (lambda x: x)

    def forward(self, x, embedding):
        h = self.in_layers[2](self.resample(self.in_layers[1](self.in_layers[0](x))))
        of_time = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = of_time.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + of_time)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, head_channels, new_order):
        super().__init__()
        self.norm, self.qkv = Norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.heads, self.new_order = heads if head_channels == -1 else channels // head_channels, new_order

    def forward(self, x, embedding):
        n, channels = x.shape[:2]
        pixels = x.flatten(2)
        rows, width = self.qkv(self.norm(pixels)), channels // self.heads
        if self.new_order:
            q, k, v = (part.reshape(n * self.heads, width, -1) for part in rows.chunk(3, 1))
        else:
            q, k, v = rows.reshape(n * self.heads, 3 * width, -1).split(width, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(width), -1)
        h = (v @ weights.transpose(1, 2)).reshape(n, channels, -1)
        return (pixels + self.proj_out(h)).reshape(x.shape)


class Sampling(nn.Module):
    """Downsample (with `op`) or Upsample (with `conv`), without parameters if conv_resample is off."""

    def __init__(self, channels, up, conv):
        super().__init__()
        self.up, self.convolves = up, conv
        if conv and up:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        elif conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        if self.up:
            return self.conv(doubled(x)) if self.convolves else doubled(x)
        return self.op(x) if self.convolves else halved(x)


class Plain(nn.Conv2d):
    def forward(self, x, embedding):
        return super().forward(x)


class UNetModel(nn.Module):
    def __init__(
        self, *, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention=(2,), dropout=0.0,
        channel_mult=(1, 2), conv_resample=True, num_classes=None, num_heads=1, num_head_channels=-1,
        num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False,
    ):  # fmt: skip
        super().__init__()
        embed, self.model_channels = 4 * model_channels, model_channels
        widths = [int(mult * model_channels) for mult in channel_mult]
        self.time_embed = nn.Sequential(nn.Linear(model_channels, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label_emb = nn.Embedding(num_classes, embed) if num_classes else None

        def res(channels, out, resample=None):
            return ResBlock(channels, embed, out, dropout, use_scale_shift_norm, resample)

        def attend(channels, heads):
            return AttentionBlock(channels, heads, num_head_channels, use_new_attention_order)

        blocks, ch, chans, ds = [[Plain(in_channels, widths[0], 3, padding=1)]], widths[0], [widths[0]], 1
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                blocks.append([res(ch, width), *([attend(width, num_heads)] if ds in attention else [])])
                ch = width
                chans.append(ch)
            if level < len(widths) - 1:
                blocks.append([res(ch, ch, halved) if resblock_updown else Sampling(ch, False, conv_resample)])
                chans.append(ch)
                ds *= 2
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.middle_block = nn.ModuleList([res(ch, ch), attend(ch, num_heads), res(ch, ch)])
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                block = [res(ch + chans.pop(), width)]
                ch = width
                if ds in attention:
                    block.append(attend(ch, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and i == num_res_blocks:
                    block.append(res(ch, ch, doubled) if resblock_updown else Sampling(ch, True, conv_resample))
                    ds //= 2
                blocks.append(block)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(Norm(ch), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(y)
        skips, h = [], x
        for block in self.input_blocks:
            for layer in block:
                h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], 1)
            for layer in block:
                h = layer(h, embedding)
        return self.out(h)
