"""The trainer on a GPU: it does not wait for the GPU, and its gradients are as accurate as plain torch's."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastddpm import Schedule, UNet2D, checkpoints
from fastddpm.core import noise
from fastddpm.processes.distributed import Ranks
from fastddpm.reference.diffusion import Diffusion, add_noise
from fastddpm.reference.unet import UNet
from fastddpm.train import TrainOptions, train
from fastddpm.train import trainer as training
from fastddpm.train.batches import Batch
from fastddpm.train.trainer import Trainer
from tests.conftest import needs_gpu
from tests.support.check import assert_as_accurate

pytestmark = [
    *needs_gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),  # it is a prototype of torch
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # fp32 must not use them
]
OPTIONS = TrainOptions(
    steps=6,
    batch_size=16,
    learning_rate=1e-30,  # leaves the weights unchanged
    warmup=0,
    grad_clip=float("inf"),
    flip=True,
    channels=(32, 64),
    attention=(1,),
    seed=3,
    schedule=Schedule(num_train_timesteps=100),
)


def pictures(n=40):
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def trainer(folder, **options):
    return Trainer(pictures(), None, folder, dataclasses.replace(OPTIONS, **options), Ranks(device="cuda"))


def gradient(net):
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


@pytest.mark.parametrize("engine", ["eager", "compiled", "compiled+graph"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_gradients_are_as_accurate_as_plain_torchs(tmp_path, precision, engine):
    """After enough steps for CUDA graphs to be replayed."""
    ours, k = trainer(tmp_path, precision=precision, engine=engine), 4
    network = ours.wrapped_network()
    for step in range(k + 1):
        ours.step(network, step)

    x_0, t, address, _ = ours.batches.of_step(k)
    eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)
    exact = UNet2D(**ours.net.config).cuda().double()
    exact.load_state_dict(ours.net.state_dict())
    process = Diffusion(OPTIONS.schedule.betas)
    value = (x_0.double() - 127.5) / 127.5
    process.loss(exact, value, t, eps.double()).backward()

    plain = UNet(**ours.net.config).cuda().to(memory_format=torch.channels_last)
    dtype = ours.compute.dtype
    plain.load_state_dict(ours.net.state_dict())
    x_t = add_noise(value.float(), eps, ours.loss.table[t])
    with ours.compute.arithmetic():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            model_output = plain(x_t, t)
        F.mse_loss(model_output.float(), eps).backward()
    named = dict(plain.named_parameters())
    of_plain = torch.cat([named[name].grad.flatten() for name, _ in ours.net.named_parameters()])
    assert_as_accurate(gradient(ours.net), of_plain, gradient(exact))


@pytest.mark.parametrize("held", ["on the GPU", "on the host"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.1},
        {"label_dropout": 0.1},
        {"schedule": Schedule(num_train_timesteps=10, variance_type="learned_range")},  # t = 0 in most batches
        {"schedule": Schedule(num_train_timesteps=1000, variance_type="learned_range")},  # and in few
    ],
    ids=str,
)
def test_steps_do_not_wait_for_the_gpu(tmp_path, monkeypatch, held, options):
    if held == "on the host":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 30))
    options, labels = dataclasses.replace(OPTIONS, precision="bf16", engine="eager", **options), np.arange(40) % 3
    ours = Trainer(pictures(), labels, tmp_path, options, Ranks(device="cuda"))
    assert ours.batches.data.device.type == ("cpu" if held == "on the host" else "cuda")
    network = ours.wrapped_network()
    for k in range(2):
        ours.step(network, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [ours.step(network, k)[0] for k in range(2, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.item() > 0 for loss in losses)


def test_batches_equal_those_on_a_cpu(tmp_path):
    on_gpu = trainer(tmp_path / "gpu")
    on_cpu = Trainer(pictures(), None, tmp_path / "cpu", OPTIONS, Ranks(device="cpu"))
    for k in (0, 7):
        for a, b in zip(on_gpu.batches.of_step(k)[:3], on_cpu.batches.of_step(k)[:3], strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_killed_run_resumes_and_learns(tmp_path, monkeypatch, engine):
    options = dataclasses.replace(
        OPTIONS, steps=60, learning_rate=2e-3, engine=engine, log_every=20, save_every=30, sample_every=60
    )
    average, calls = training.update_average, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 45:
            raise KeyboardInterrupt
        average(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "update_average", killed)
        with pytest.raises(KeyboardInterrupt):
            train(pictures(), tmp_path, options, device="cuda", progress=False)
    train(pictures(), tmp_path, options, device="cuda", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert all(math.isfinite(line["loss"]) for line in lines)
    net = UNet2D(**checkpoints.load(tmp_path).config)
    checkpoints.load_into(net, checkpoints.load(tmp_path).parameters)
    eps = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    value = torch.from_numpy(pictures(16)).movedim(-1, 1).float() / 127.5 - 1
    with torch.no_grad():
        loss = Diffusion(options.schedule.betas).loss(net, value, torch.arange(16) * 6, eps)
    assert loss < eps.square().mean()  # the loss of predicting eps = 0


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_gradients_are_averaged_by_nccl(tmp_path, monkeypatch, engine):
    """One process plays rank 0 of 2: the mean over the group is its own gradient, of its half of the batch."""
    options = dataclasses.replace(OPTIONS, precision="fp32", engine=engine)
    device = torch.device("cuda", torch.cuda.current_device())
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1, device_id=device)
    try:
        joined = Trainer(pictures(), None, tmp_path, options, Ranks(0, 2, device))
        joined.step(joined.wrapped_network(), 0)
    finally:
        dist.destroy_process_group()
    x_0, t, address, _ = joined.batches.of_step(0)
    eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)
    exact = UNet2D(**joined.net.config).cuda().double()
    exact.load_state_dict(joined.net.state_dict())  # a learning rate of 1e-30 has not changed them
    Diffusion(OPTIONS.schedule.betas).loss(exact, (x_0.double() - 127.5) / 127.5, t, eps.double()).backward()
    single = trainer(tmp_path, precision="fp32", engine="eager", batch_size=8)
    monkeypatch.setattr(single.batches, "of_step", lambda k: Batch(x_0, t, address, None))
    single.step(single.wrapped_network(), 0)
    assert_as_accurate(gradient(joined.net), gradient(single.net), gradient(exact))
