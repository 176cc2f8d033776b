"""The conditional 1-D U-Net of diffusion policies (Chi et al. 2023, arXiv:2303.04137), in eager torch.

Convolutions along the sequence; the time and the condition scale and shift the features of every residual block (FiLM,
Perez et al. 2017, arXiv:1709.07871). Plain and slow: [N, C, L], any float dtype, the parameter names of lerobot's
`DiffusionConditionalUnet1d`. It takes the configuration of `fastddpm.networks.unet1d.UNet1D`. In float64 it is the
reference of that network.
"""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm.reference.unet import timestep_embedding


class ConvBlock(nn.Module):
    """[N, channels, L] -> [N, out, L]: convolution, group norm, Mish."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(channels, out, kernel, padding=kernel // 2), nn.GroupNorm(groups, out), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualBlock(nn.Module):
    """[N, channels, L], condition [N, width] -> [N, out, L]: two convolution blocks with FiLM between, a shortcut."""

    def __init__(self, channels: int, out: int, width: int, kernel: int, groups: int, scales: bool):
        super().__init__()
        self.scales = scales
        self.conv1, self.conv2 = ConvBlock(channels, out, kernel, groups), ConvBlock(out, out, kernel, groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(width, 2 * out if scales else out))
        self.residual_conv = nn.Identity() if channels == out else nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h, film = self.conv1(x), self.cond_encoder(condition)[:, :, None]
        if self.scales:
            scale, shift = film.chunk(2, 1)
            h = scale * h + shift
        else:
            h = h + film
        return self.conv2(h) + self.residual_conv(x)


class UNet1D(nn.Module):
    """eps_theta(x_t, t, condition) of a complete configuration of `fastddpm.networks.unet1d.UNet1D`."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.embed, self.frame = config["diffusion_step_embed_dim"], config["frame"]
        channels, widths = config["frame"] * config["input_dim"], config["down_dims"]
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(self.embed, 4 * self.embed), nn.Mish(), nn.Linear(4 * self.embed, self.embed)
        )
        if config["num_class_embeds"]:
            self.class_embedding = nn.Embedding(config["num_class_embeds"], config["global_cond_dim"])

        def block(c_in: int, c_out: int) -> ResidualBlock:
            width, scales = self.embed + (config["global_cond_dim"] or 0), config["cond_predict_scale"]
            return ResidualBlock(c_in, c_out, width, config["kernel_size"], config["n_groups"], scales)

        self.down_modules = nn.ModuleList()
        for c_in, c_out in pairwise((channels, *widths)):
            last = len(self.down_modules) == len(widths) - 1
            halve = nn.Identity() if last else nn.Conv1d(c_out, c_out, 3, stride=2, padding=1)
            self.down_modules.append(nn.ModuleList([block(c_in, c_out), block(c_out, c_out), halve]))
        self.mid_modules = nn.ModuleList([block(widths[-1], widths[-1]) for _ in range(2)])
        self.up_modules = nn.ModuleList()
        for below, c_out in pairwise(reversed(widths)):
            double = nn.ConvTranspose1d(c_out, c_out, 4, stride=2, padding=1)
            self.up_modules.append(nn.ModuleList([block(2 * below, c_out), block(c_out, c_out), double]))
        last_block = ConvBlock(widths[0], widths[0], config["kernel_size"], config["n_groups"])
        self.final_conv = nn.Sequential(last_block, nn.Conv1d(widths[0], channels, 1))

    def forward(
        self, x: Tensor, t: Tensor, global_cond: Tensor | None = None, class_labels: Tensor | None = None
    ) -> Tensor:
        """Args: x: [N, C, L]; t: [N]; global_cond: [N, width]; class_labels: [N]. Returns: like x."""
        embedding = timestep_embedding(t, self.embed, freq_shift=1).to(x.dtype)
        condition = [self.diffusion_step_encoder(embedding)]
        if class_labels is not None:
            global_cond = self.class_embedding(class_labels)
        if global_cond is not None:
            condition.append(global_cond)
        features = torch.cat(condition, 1)
        n, channels, length = x.shape
        h = x.unflatten(2, (-1, self.frame)).permute(0, 3, 1, 2).reshape(n, -1, length // self.frame)
        skips = []
        for first, second, halve in cast(Any, self.down_modules):
            h = second(first(h, features), features)
            skips.append(h)
            h = halve(h)
        for block in self.mid_modules:
            h = block(h, features)
        for first, second, double in cast(Any, self.up_modules):
            h = first(torch.cat([h, skips.pop()], 1), features)
            h = double(second(h, features))
        h = self.final_conv(h).view(n, self.frame, channels, -1)
        return h.permute(0, 2, 3, 1).reshape(x.shape)
