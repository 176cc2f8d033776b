"""The conditional 1-D U-Net of diffusion policies, with the parameter names of lerobot's `DiffusionConditionalUnet1d`.

Each residual block scales and shifts its features (FiLM, Perez et al. 2017, arXiv:1709.07871). A linear layer computes
the scales and shifts from the concatenated time embedding and condition. Applied to a concatenation, it is the sum of
one linear layer per part. So the part of the time is a row for each timestep, `time_rows`, and the part of the
condition a row for each sample, `condition_rows`, which stays the same from step to step. `denoise` takes their sum.

Chi et al. 2023 (arXiv:2303.04137), section III and appendix A.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.core.checks import flag, shown
from fastddpm.networks.config import (
    LARGEST,
    MOST_CHANNELS,
    MOST_PARAMETERS,
    Check,
    count_check,
    optional_check,
    per_level_check,
)
from fastddpm.networks.layers import Linear

Conv1d = partial(nn.Conv1d, dtype=torch.float32)
ConvTranspose1d = partial(nn.ConvTranspose1d, dtype=torch.float32)
GroupNorm = partial(nn.GroupNorm, dtype=torch.float32)

DEFAULTS: dict[str, Any] = {  # of diffusion_policy's ConditionalUnet1D, and then our own
    "input_dim": None,
    "global_cond_dim": None,
    "diffusion_step_embed_dim": 256,
    "down_dims": (256, 512, 1024),
    "kernel_size": 3,
    "n_groups": 8,
    "cond_predict_scale": False,
    "num_class_embeds": None,
    "frame": 1,
    "sample_size": None,
}
CHECKS: dict[str, Check] = {
    "input_dim": count_check(MOST_CHANNELS),
    "global_cond_dim": optional_check(count_check(LARGEST)),
    "diffusion_step_embed_dim": count_check(MOST_CHANNELS, low=4),
    "down_dims": per_level_check(count_check(MOST_CHANNELS)),
    "kernel_size": count_check(255),
    "n_groups": count_check(MOST_CHANNELS),
    "cond_predict_scale": flag,
    "num_class_embeds": optional_check(count_check(LARGEST)),
    "frame": count_check(MOST_CHANNELS),
    "sample_size": optional_check(count_check(LARGEST)),
}


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return all options: those given, and the defaults for the others. Ignores keys that begin with "_".

    Raises: ValueError: an option, or a value of one, is unknown or not supported; the message names it.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(config.keys() - DEFAULTS.keys()):
        raise ValueError(f"UNet1D: unknown option {shown(unknown)[1:-1]}; known: {', '.join(DEFAULTS)}")
    c = {key: check(f"UNet1D: {key}", config.get(key, DEFAULTS[key])) for key, check in CHECKS.items()}
    if c["num_class_embeds"] is not None and c["global_cond_dim"] is None:
        c["global_cond_dim"] = c["diffusion_step_embed_dim"]
    if c["diffusion_step_embed_dim"] % 2 or not c["kernel_size"] % 2:
        raise ValueError(
            f"UNet1D: diffusion_step_embed_dim is {c['diffusion_step_embed_dim']} and kernel_size is "
            f"{c['kernel_size']}; want diffusion_step_embed_dim even and kernel_size odd"
        )
    if any(width % c["n_groups"] for width in c["down_dims"]):
        raise ValueError(f"UNet1D: n_groups is {c['n_groups']}; want a divisor of each of down_dims {c['down_dims']}")
    if (count := least_parameters(c)) > MOST_PARAMETERS:
        raise ValueError(
            f"UNet1D: a network of this configuration has {count:.1e} parameters or more; want at most "
            f"{MOST_PARAMETERS:.0e}: reduce down_dims, diffusion_step_embed_dim, global_cond_dim or "
            "num_class_embeds"
        )
    return c


def least_parameters(c: dict[str, Any]) -> int:
    """A lower bound on the number of parameters of a complete configuration: all but the smaller layers."""
    embed, condition = c["diffusion_step_embed_dim"], c["global_cond_dim"] or 0
    blocks = sum((3 * c["kernel_size"] * width + embed + condition) * width for width in c["down_dims"])
    return blocks + 8 * embed * embed + (c["num_class_embeds"] or 0) * condition


class SequenceNetwork(nn.Module):
    """What a `UNet1D` and its fused copy share: the configuration, the time embedding, and the checks of their inputs.

    Attributes: config: all options, see `UNet1D`.
    """

    def __init__(self, **config: Any):
        super().__init__()
        self.config = c = complete_config(config)
        embed, classes = c["diffusion_step_embed_dim"], c["num_class_embeds"]
        self.diffusion_step_encoder = nn.Sequential(
            Sinusoid(embed), Linear(embed, 4 * embed), nn.Mish(), Linear(4 * embed, embed)
        )
        self.class_embedding = (
            None if classes is None else nn.Embedding(classes, c["global_cond_dim"], dtype=torch.float32)
        )

    @property
    def in_channels(self) -> int:
        """C, the channels of x."""
        return self.config["input_dim"]

    out_channels = in_channels

    def activated_time(self, t: Tensor) -> Tensor:
        """[N] -> [N, diffusion_step_embed_dim]: mish of the time embedding."""
        sinusoid, *layers = cast(Any, self.diffusion_step_encoder)
        embed = sinusoid(t).to(layers[0].weight.dtype)
        for layer in layers:
            embed = layer(embed)
        return F.mish(embed)

    def activated_condition(self, global_cond: Tensor | None, class_labels: Tensor | None) -> Tensor | None:
        """[N, global_cond_dim]: mish of the condition; None: the network has none.

        Raises: ValueError: a condition is missing or unexpected, or has another shape.
        """
        width = self.config["global_cond_dim"]
        if self.class_embedding is not None:
            if class_labels is None or global_cond is not None:
                raise ValueError(
                    "this network is class-conditional: pass class_labels, one per sample, and leave global_cond out"
                )
            return F.mish(self.class_embedding(class_labels))
        if class_labels is not None:
            raise ValueError("class_labels were given, but this network is not class-conditional; leave them out")
        if (global_cond is None) != (width is None):
            raise ValueError(
                "global_cond was given, but this network is unconditional; leave it out"
                if width is None
                else f"global_cond is missing: this network is conditional; pass global_cond [N, {width}]"
            )
        if global_cond is None:
            return None
        if global_cond.ndim != 2 or global_cond.shape[1] != width:
            raise ValueError(f"global_cond is {tuple(global_cond.shape)}; want [N, {width}]")
        return F.mish(global_cond)

    def check_shape(self, x: Tensor) -> None:
        """Check the shape of an input. Raises: ValueError: the network cannot take it."""
        factor = self.config["frame"] << (len(self.config["down_dims"]) - 1)
        if x.ndim != 3 or x.shape[1] != self.in_channels or not x.shape[2] or x.shape[2] % factor:
            raise ValueError(
                f"x is {tuple(x.shape)}; want [N, {self.in_channels}, L] with L a multiple of {factor} for this network"
            )


class UNet1D(SequenceNetwork):
    """eps_theta(x_t, t, condition) for sequences: actions of a robot, waveforms, letters.

    Args:
        input_dim: channels C of a sequence.
        global_cond_dim: size of each sample's condition; None: unconditional, or with classes diffusion_step_embed_dim.
        diffusion_step_embed_dim: of the time embedding; even.
        down_dims: channels of each level; each level after the first halves the length.
        kernel_size: of the convolutions; odd.
        n_groups: of the group norms.
        cond_predict_scale: whether the condition scales the features as well, besides shifting them.
        num_class_embeds: number of classes; the condition is then a learned embedding of the class label.
        frame: this many consecutive elements of a sequence, with all of their channels, form one position of the
            network, as for waveforms.
        sample_size: the length L of a sample that the network was trained for.
    Raises: ValueError: an option, or a value of one, is unknown or not supported; the message names it.
    """

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        channels = c["frame"] * c["input_dim"]
        block = partial(ResidualBlock, config=c)
        widths = list(pairwise((channels, *c["down_dims"])))
        first, last = c["down_dims"][0], c["down_dims"][-1]
        self.down_modules = nn.ModuleList(
            nn.ModuleList([block(n, m), block(m, m), nn.Identity() if i == len(widths) else Conv1d(m, m, 3, 2, 1)])
            for i, (n, m) in enumerate(widths, 1)
        )
        self.mid_modules = nn.ModuleList([block(last, last), block(last, last)])
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(2 * m, n), block(n, n), ConvTranspose1d(n, n, 4, 2, 1)])
            for n, m in reversed(widths[1:])
        )
        self.final_conv = nn.Sequential(ConvBlock(first, first, c), Conv1d(first, channels, 1))

    @property
    def blocks(self) -> Iterator["ResidualBlock"]:
        """The residual blocks in the order of execution."""
        for level in cast(Any, self.down_modules):
            yield from level[:2]
        yield from cast(Any, self.mid_modules)
        for level in cast(Any, self.up_modules):
            yield from level[:2]

    def forward(
        self, x: Tensor, t: int | Tensor, global_cond: Tensor | None = None, *, class_labels: Tensor | None = None
    ) -> Tensor:
        """Predict the noise in x_t (or x_0, or v: what the network was trained for).

        Args:
            x: [N, C, L], L a multiple of frame * 2^(levels - 1).
            t: the timestep, one for all or [N].
            global_cond: [N, global_cond_dim], in the parameters' dtype, for a network with a condition.
            class_labels: [N] integers, for a network of classes.
        Returns: [N, C, L] in x's dtype.
        Raises: ValueError: a shape is not as above, or a condition is missing or unexpected.
        """
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        rows = self.time_rows(t)
        condition = self.condition_rows(global_cond, class_labels)
        argument = "class_labels" if self.class_embedding is not None else "global_cond"
        for name, given in (("t", rows), (argument, rows if condition is None else condition)):
            if len(given) not in (1, len(x)):
                raise ValueError(f"{name} has {len(given)} entries, but x has a batch of {len(x)}; want 1 or {len(x)}")
        return self.denoise(x, rows if condition is None else rows + condition)

    def time_rows(self, t: Tensor) -> Tensor:
        """The part of FiLM's scales and shifts that depends on t alone: [len(t), columns]. Args: t: [N]."""
        embed, width = self.activated_time(t), self.config["diffusion_step_embed_dim"]
        return torch.cat([F.linear(embed, block.film.weight[:, :width], block.film.bias) for block in self.blocks], 1)

    def condition_rows(self, global_cond: Tensor | None = None, class_labels: Tensor | None = None) -> Tensor | None:
        """The part that depends on the condition alone: [N, columns]; None: the network has none.

        Raises: ValueError: a condition is missing or unexpected, or has another shape.
        """
        condition, width = self.activated_condition(global_cond, class_labels), self.config["diffusion_step_embed_dim"]
        if condition is None:
            return None
        return torch.cat([F.linear(condition, block.film.weight[:, width:]) for block in self.blocks], 1)

    def denoise(self, x: Tensor, rows: Tensor) -> Tensor:
        """Evaluate the network, given FiLM's scales and shifts of all blocks: one row for all, or [N, columns]."""
        self.check_shape(x)
        columns = iter(rows.split([block.columns for block in self.blocks], 1))
        h, skips = as_frames(x, self.config["frame"]), []
        for first, second, downsample in cast(Any, self.down_modules):
            h = second(first(h, next(columns)), next(columns))
            skips.append(h)
            h = downsample(h)
        for block in self.mid_modules:
            h = block(h, next(columns))
        for first, second, upsample in cast(Any, self.up_modules):
            h = first(torch.cat([h, skips.pop()], 1), next(columns))  # that of the finest level is not used
            h = upsample(second(h, next(columns)))
        return from_frames(self.final_conv(h), self.config["frame"])


class ConvBlock(nn.Module):
    """Convolution, group norm, Mish."""

    def __init__(self, c_in: int, c_out: int, config: dict[str, Any]):
        super().__init__()
        kernel = config["kernel_size"]
        self.block = nn.Sequential(
            Conv1d(c_in, c_out, kernel, padding=kernel // 2), GroupNorm(config["n_groups"], c_out), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualBlock(nn.Module):
    """Two convolution blocks with FiLM between them.

    Attributes: columns: how many numbers FiLM takes: the shifts of the channels, or their scales and then their shifts.
    """

    def __init__(self, c_in: int, c_out: int, config: dict[str, Any]):
        super().__init__()
        self.scales = config["cond_predict_scale"]
        self.columns = 2 * c_out if self.scales else c_out
        self.conv1, self.conv2 = ConvBlock(c_in, c_out, config), ConvBlock(c_out, c_out, config)
        width = config["diffusion_step_embed_dim"] + (config["global_cond_dim"] or 0)
        self.cond_encoder = nn.Sequential(nn.Mish(), Linear(width, self.columns))
        self.residual_conv = Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    @property
    def film(self) -> nn.Linear:
        return cast(nn.Linear, self.cond_encoder[1])

    def forward(self, x: Tensor, columns: Tensor) -> Tensor:
        h, film = self.conv1(x), columns[:, :, None].to(x.dtype)
        if self.scales:
            scale, shift = film.chunk(2, 1)
            h = scale * h + shift
        else:
            h = h + film
        return self.conv2(h) + self.residual_conv(x)


class Sinusoid(nn.Module):
    """[N] -> [N, width]: the sines of t at width / 2 frequencies, then the cosines."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        # an angle of 1000 would be off by 3e-5 in float32
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float64, device=t.device)
        angle = t[:, None] * torch.exp(exponent / (half - 1))
        return torch.cat([angle.sin(), angle.cos()], 1)


def as_frames(x: Tensor, frame: int) -> Tensor:
    """[N, C, L] -> [N, frame * C, L / frame]: neighbouring elements become channels. A view of channels-last memory."""
    return x if frame == 1 else x.mT.unflatten(1, (-1, frame)).flatten(2).mT


def from_frames(x: Tensor, frame: int) -> Tensor:
    """The inverse of `as_frames`."""
    return x if frame == 1 else x.mT.unflatten(2, (frame, -1)).flatten(1, 2).mT
