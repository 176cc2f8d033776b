"""Draws the pictures of README.md with the model in the package: `python docs/pictures.py` (minutes on a CPU).

samples.png shows samples 0 to 31 of seed 0, all 1000 steps, in float32. trajectory.png shows how samples 0 to 3 come
about: the noisy state x_t that the network is given, and the x_0 that it predicts from it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fastddpm import Sampler
from fastddpm.storage.images import grid, save_grid, to_uint8

HERE = Path(__file__).parent
SHOWN = (999, 800, 600, 500, 400, 300, 200, 100, 50, 0)  # timesteps t, from noise to garment


class Watched(torch.nn.Module):
    """A network that also keeps its input x_t at the timesteps that are shown."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.states = network, {}

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if int(t[0]) in SHOWN:
            self.states[int(t[0])] = x.clone()
        return self.network(x, t)


def draw(count: int = 32) -> tuple[torch.Tensor, dict, dict]:
    """The samples [N, 1, 28, 28] of seed 0, and {t: x_t} and {t: predicted x_0} for the timesteps that are shown."""
    shipped = Sampler.from_pretrained(device="cpu", precision="fp32")
    network = Watched(shipped.model)
    predicted = {}

    def keep(step: int, t: int, x_0: torch.Tensor, indices: torch.Tensor) -> None:
        if t in SHOWN:
            predicted[t] = x_0

    sampler = Sampler(network, shipped.schedule, shape=shipped.shape, device="cpu", precision="fp32")
    x = sampler.sample(count, seed=0, batch_size=count, callback=keep)
    return x, network.states, predicted


def save_trajectory(states: dict, predicted: dict, path: Path, rows: int = 4) -> None:
    """A figure with two rows for each sample, x_t above and the predicted x_0 below, and a column for each timestep."""
    pairs = [pictures[t][row] for row in range(rows) for pictures in (states, predicted) for t in SHOWN]
    picture = grid(to_uint8(torch.stack(pairs)), columns=len(SHOWN), width=0)[..., 0]
    scale, side = 2, 30  # pixels of the figure for one of a garment; pixels from a garment to the next
    height, width = picture.shape
    figure = plt.figure(figsize=(scale * width / 100 + 0.4, scale * height / 100 + 0.3), dpi=100)
    figure.figimage(picture.repeat(scale, axis=0).repeat(scale, axis=1), xo=40, yo=0, cmap="gray", vmin=0, vmax=255)
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[], zorder=2)
    axes.set(xlim=(-40 / scale, width), ylim=(height, -30 / scale))
    for column, t in enumerate(SHOWN):
        axes.text(side * (column + 0.5), -3, f"t = {t}", ha="center", va="bottom", fontsize=8)
    for row in range(2 * rows):
        axes.text(-3, side * (row + 0.5), ("$x_t$", "$x_0$")[row % 2], ha="right", va="center", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    x, states, predicted = draw()
    save_grid(to_uint8(x), HERE / "samples.png", columns=8)
    save_trajectory(states, predicted, HERE / "trajectory.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main()
