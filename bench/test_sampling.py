"""Whole sampling on the CPU next to diffusers' pipeline, same weights and batch: pytest bench/test_sampling.py -s

Each contender is timed per step of its loop. What fastddpm does once before the loop is in the column "prepare".
"""

import math
import time
from functools import partial
from statistics import median

import pytest
import torch
from check import assert_as_accurate
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from test_unet import CIFAR10

from fastddpm import Sampler, Schedule, UNet2D, checkpoint, noise
from fastddpm.sampler import shipped_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 5


def shipped():
    config, parameters, _ = checkpoint.load(shipped_model())
    return config, {name: value.float() for name, value in parameters.items()}


def cifar10():
    torch.manual_seed(0)
    net = UNet2D(**CIFAR10)
    return net.config, net.state_dict()


MODELS = {"cifar10-32": cifar10, "shipped": shipped}


@pytest.fixture(scope="module")
def times():
    """{case: {contender: seconds per step}}, printed as ratios when all are done."""
    cases = {}
    yield cases
    print(f"\n\n{'case':<24}{'contender':<26}{'ms per step':>12}{'images/s':>10}{'speed-up':>10}{'prepare, s':>12}")
    for (model, batch), contenders in cases.items():
        for name, (step, prepare) in contenders.items():
            baseline, _ = contenders.get("diffusers fp32", (math.nan, 0))
            row = f"{model + f', batch {batch}':<24}{name:<26}{1e3 * step:>12.1f}{batch / step / 1000:>10.3f}"
            print(f"{row}{baseline / step:>9.2f}x" + (f"{prepare:>12.2f}" if prepare else ""))
    print("images/s: with all 1000 steps")


@pytest.mark.parametrize("contender", ["diffusers fp32", "diffusers bf16", "fastddpm fp32", "fastddpm bf16"])
@pytest.mark.parametrize(("model", "batch", "steps"), [
    ("cifar10-32", 1, 20), ("cifar10-32", 16, 4), ("shipped", 1, 50), ("shipped", 16, 20)
])  # fmt: skip
def test_sampling(benchmark, times, model, batch, steps, contender):
    config, parameters = MODELS[model]()
    library, precision = contender.split()
    prepare = 0.0
    if library == "fastddpm":
        net = UNet2D(**config)
        net.load_state_dict(parameters)
        sampler = Sampler(net, Schedule(), device="cpu", precision=precision)
        table, address = sampler.schedule.table(steps), noise.address(0, batch)
        began = time.perf_counter()
        network = sampler._network(table)
        prepare = time.perf_counter() - began
        gate(config, parameters, batch, precision)
        call = partial(sampler._run, network, table, address, None, None, Silent())
    else:
        unet = UNet2DModel(**config).eval()
        unet.load_state_dict(parameters)
        if precision == "bf16":  # the fastest that diffusers' documentation tells, short of torch.compile
            unet.to(torch.bfloat16).to(memory_format=torch.channels_last)
        pipeline = DDPMPipeline(unet, DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        call = partial(pipeline, batch_size=batch, num_inference_steps=steps, output_type="pt")
    benchmark.group = f"{model}, batch {batch}, {steps} steps"
    benchmark.name = contender
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    seconds = median(benchmark.stats.stats.data) / steps
    benchmark.extra_info.update(ms_per_step=1e3 * seconds, prepare_s=prepare, threads=torch.get_num_threads())
    times.setdefault((model, batch), {})[contender] = seconds, prepare


class Silent:
    def update(self):
        pass


@torch.no_grad()
def gate(config, parameters, batch, precision):
    """No timing of a wrong network: its distance to float64 is at most twice that of diffusers' in the same dtype."""
    dtype = DTYPES[precision]
    x, t = torch.randn(batch, config["in_channels"], *2 * [config["sample_size"]]), torch.tensor([500])
    theirs = UNet2DModel(**config).eval().to(memory_format=torch.channels_last)
    theirs.load_state_dict(parameters)
    plain = theirs.to(dtype)(x.to(dtype), t).sample
    theirs.double().load_state_dict(parameters)
    ref = theirs(x.to(dtype).double(), t).sample
    ours = UNet2D(**config)
    ours.load_state_dict(parameters)
    net = ours.for_inference(dtype)
    assert_as_accurate(net.denoise(x.to(dtype), net.time_rows(t).to(dtype)), plain, ref)
