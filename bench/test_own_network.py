"""A small network of the user's own, in `Sampler` and in its author's loop: pytest bench/test_own_network.py

With some 100,000 weights at 28 x 28, the network takes so little time that everything else in a step shows.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine import DEVICE, SCALE, judged
from fastddpm import Sampler, Schedule
from fastddpm.core import noise
from fastddpm.reference.diffusion import linear_betas

T = {"cuda": 1000, "cpu": 1000, "tiny": 10}[SCALE]
SHAPE = 1, 28, 28
BATCHES = {"cuda": (1, 64), "cpu": (1,), "tiny": (2,)}[SCALE]
CONTENDERS = ("naive torch loop", "fastddpm Sampler")

Draw = Callable[[int], Tensor]  # t -> N(0, I), where t = T is for x_T


class Network(nn.Module):
    """A U-Net of two levels: six convolutions, and a row of an embedding for each t."""

    def __init__(self, width: int = 28):
        super().__init__()
        self.embedding = nn.Embedding(T, 2 * width)
        self.conv_in = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wide = F.relu(self.conv_in(x))
        deep = F.relu(self.down(wide) + self.embedding(t)[:, :, None, None])
        wide = torch.cat([wide, F.relu(self.up(F.relu(self.middle(deep))))], 1)
        return self.conv_out(F.relu(self.join(wide)))


@torch.no_grad()
def naive(net: Network, betas: Tensor, draw: Draw) -> Tensor:
    """Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239), line by line, with sigma_t^2 = beta_t."""
    alphas, alphas_cumprod = 1 - betas, (1 - betas).cumprod(0)
    x = draw(T)
    for t in reversed(range(T)):
        z = draw(t) if t > 0 else torch.zeros_like(x)
        eps = net(x, torch.full((len(x),), t, device=DEVICE))
        mean = (x - betas[t] / torch.sqrt(1 - alphas_cumprod[t]) * eps) / torch.sqrt(alphas[t])
        x = mean + torch.sqrt(betas[t]) * z
    return x.cpu()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONTENDERS)
def test_own_network(measure, name, batch):
    torch.manual_seed(0)
    net, betas = Network().to(DEVICE).eval(), linear_betas(T).to(DEVICE)
    schedule = Schedule(num_train_timesteps=T, variance_type="fixed_large", clip_sample=False)
    sampler = Sampler(net, schedule, shape=SHAPE, device=DEVICE, precision="fp32")
    address = noise.address(0, batch)

    def addressed(t: int) -> Tensor:
        stream = noise.START if t == T else noise.STEP
        return noise.normal(address, SHAPE, stream=stream, t=t).contiguous().to(DEVICE)

    def ours() -> Tensor:
        return sampler.sample(batch, seed=0, batch_size=batch, progress=False)

    exact = naive(net.double(), betas, lambda t: addressed(t).double())
    net, betas = net.float(), betas.float()
    errors = judged(ours(), naive(net, betas, addressed), exact)

    def theirs() -> Tensor:
        return naive(net, betas, lambda t: torch.randn(batch, *SHAPE, device=DEVICE))

    run = ours if name.startswith("fastddpm") else theirs
    measure(run, T, group=f"own network, batch {batch}", contender=name, images=batch / T, errors=errors)
