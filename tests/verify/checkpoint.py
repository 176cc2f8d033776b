"""A checkpoint that is small enough to climb the ladder with."""

import torch

from fastddpm import checkpoints
from fastddpm.core.schedule import Schedule
from fastddpm.networks.unet2d import UNet2D
from tests.support import check

NETWORK = {**check.TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1}
SCHEDULE = Schedule(num_train_timesteps=12, beta_end=0.4)  # x_T is noise: abar_T = 0.05
CPU = torch.device("cpu")


def save_tiny(folder, schedule=SCHEDULE, *, seed=0, **config):
    torch.manual_seed(seed)
    net = UNet2D(**NETWORK | config)
    checkpoints.save(folder, net.config, net.state_dict(), schedule)
    return str(folder)
