"""A robot's diffusion policy: the 1-D U-Net of its published size, batch 1, horizon 16, 100 steps.

The baseline is what users run today: the plain module with diffusers' scheduler, as in lerobot and diffusion_policy,
eager or compiled.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import DEVICE, SCALE, Call, judged
from fastddpm import Sampler, Schedule
from fastddpm.networks.unet1d import UNet1D
from fastddpm.reference import unet1d

T, HORIZON, ACTION, CONDITION = {"tiny": 4}.get(SCALE, 100), 16, 2, 132  # of the policy for PushT
WIDTHS = {"tiny": (8, 16)}.get(SCALE, (512, 1024, 2048))
SCHEDULE = Schedule(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
CONTENDERS = {
    "cuda": (
        "fastddpm graph bf16",
        "fastddpm graph fp32",
        "fastddpm eager fp32",
        "diffusers eager fp32",
        "diffusers compiled fp32",
        "diffusers eager bf16",
    ),
    "cpu": ("fastddpm eager fp32", "diffusers eager fp32"),
    "tiny": ("fastddpm eager fp32", "diffusers eager fp32"),
}[SCALE]


@cache
def network() -> UNet1D:
    """The policy's network, with random parameters."""
    torch.manual_seed(0)
    net = UNet1D(
        input_dim=ACTION,
        global_cond_dim=CONDITION,
        diffusion_step_embed_dim=128,
        down_dims=WIDTHS,
        kernel_size=5,
        cond_predict_scale=True,
        sample_size=HORIZON,
    )
    return net.to(DEVICE).eval().requires_grad_(False)


@cache
def plain(dtype: torch.dtype) -> nn.Module:
    """The plain module, in a dtype."""
    net = network()
    with torch.device("meta"):
        module = unet1d.UNet1D(net.config)
    module.to(dtype).to_empty(device=DEVICE).load_state_dict(net.state_dict())
    return module.eval().requires_grad_(False)


def condition() -> Tensor:
    return torch.randn(1, CONDITION, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def action(name: str) -> tuple[Call, dict[str, Any]]:
    """(what draws one action, the errors of the network at the middle timestep).

    Args: name: one of CONTENDERS.
    """
    who, engine, precision = name.split()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, t, given = torch.randn(1, ACTION, HORIZON, generator=torch.Generator().manual_seed(2)).to(DEVICE), T // 2, None
    given = {"global_cond": condition()}
    told = torch.full((1,), t, device=DEVICE)
    theirs = plain(dtype)(x.to(dtype), told, given["global_cond"].to(dtype))
    exact = plain(torch.float64)(x.to(dtype).double(), told, given["global_cond"].double())
    if who == "diffusers":
        return partial(_of_diffusers, _compiled(plain(dtype), engine), dtype, given["global_cond"]), judged(
            theirs, theirs, exact
        )
    sampler = Sampler(network(), SCHEDULE, device=DEVICE, precision=precision, engine=engine)
    with sampler.engine.network(1, capture=False) as batch:
        batch.prepare(torch.arange(T), given)
        with batch.working():
            ours = batch(x, t).clone()
    return partial(sampler.sample, 1, model_kwargs=given, progress=False), judged(ours, theirs, exact)


def _compiled(net: nn.Module, engine: str) -> Callable[..., Tensor]:
    """As lerobot's option compile_model does it."""
    return torch.compile(net, mode="reduce-overhead") if engine == "compiled" else net


@torch.no_grad()
def _of_diffusers(net: Callable[..., Tensor], dtype: torch.dtype, global_cond: Tensor) -> Tensor:
    """The loop of lerobot's `conditional_sample`."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(T)
    x = torch.randn(1, ACTION, HORIZON, dtype=dtype, device=DEVICE)
    global_cond = global_cond.to(dtype)
    for t in scheduler.timesteps:
        output = net(x, torch.full((1,), int(t), dtype=torch.int64, device=DEVICE), global_cond)
        x = scheduler.step(output, t, x).prev_sample
    return x.cpu()
