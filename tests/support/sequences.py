"""Small networks for sequences, with all kinds of options, and what they should compute."""

import torch
from torch import nn

from fastddpm.networks.fused import fastest_forward, fused
from fastddpm.networks.unet1d import UNet1D
from fastddpm.reference import unet1d as reference

TINY = {"input_dim": 3, "down_dims": (8, 16), "diffusion_step_embed_dim": 8, "n_groups": 4, "sample_size": 16}
OPTIONS = {
    "no condition": {},
    "kernel of 5": {"kernel_size": 5},
    "kernel of 1": {"kernel_size": 1},
    "one level": {"down_dims": (8,)},
    "three levels": {"down_dims": (8, 12, 16)},
    "equal widths": {"down_dims": (12, 12)},
    "halving widths": {"down_dims": (16, 8)},
    "condition": {"global_cond_dim": 5},
    "condition that scales": {"global_cond_dim": 5, "cond_predict_scale": True},
    "scale without a condition": {"cond_predict_scale": True},
    "classes": {"num_class_embeds": 4},
    "classes, scale": {"num_class_embeds": 4, "global_cond_dim": 6, "cond_predict_scale": True},
    "frames": {"frame": 4, "cond_predict_scale": True},
    "frames of one channel": {"frame": 8, "input_dim": 1},
    "one channel": {"input_dim": 1},
    "odd width": {"down_dims": (9, 15), "n_groups": 3},
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A network with random parameters, the reference with the same, and inputs."""

    def __init__(self, n=3, length=32, **options):
        torch.manual_seed(0)
        self.net = UNet1D(**{**TINY, **options}).eval()
        for parameter in self.net.parameters():  # norms and biases differ from 1 and 0
            nn.init.normal_(parameter, std=0.3)
        c = self.net.config
        self.x, self.t = numbers(n, c["input_dim"], length), torch.tensor([0, 500, 999, 7][:n])
        self.given = {}
        if c["num_class_embeds"]:
            self.given = {"class_labels": torch.arange(n) % c["num_class_embeds"]}
        elif c["global_cond_dim"]:
            self.given = {"global_cond": numbers(n, c["global_cond_dim"], seed=1)}

    @torch.no_grad()
    def plain(self, dtype, x=None):
        """The reference's output, for the input rounded to this dtype."""
        net = reference.UNet1D(self.net.config)
        net.load_state_dict(self.net.state_dict())
        given = {name: v.to(dtype) if v.is_floating_point() else v for name, v in self.given.items()}
        return net.to(dtype)((self.x if x is None else x).to(dtype), self.t, **given)

    @torch.no_grad()
    def fast(self, dtype):
        """The output of the fused copy, by whatever evaluates it fastest."""
        copy = fused(self.net, dtype, torch.device("cpu"), pack=True)
        rows, condition = copy.time_rows(self.t), copy.condition_rows(**self.given)
        return fastest_forward(copy)(self.x.to(dtype), rows if condition is None else rows + condition)
