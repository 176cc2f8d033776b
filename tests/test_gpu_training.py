"""What only a GPU shows of the trainer: it does not wait, and its gradients are as near to float64 as plain torch's."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from conftest import needs_gpu

from fastddpm import Schedule, UNet2D, checkpoint, noise
from fastddpm.distributed import Ranks
from fastddpm.engine import PRECISIONS, arithmetic
from fastddpm.reference.diffusion import Diffusion, add_noise
from fastddpm.reference.unet import UNet
from fastddpm.train import Trainer, TrainOptions, train

pytestmark = [
    *needs_gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of torch, in torch
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # fp32 is not to use them
]
OPTIONS = TrainOptions(
    steps=6,
    batch_size=16,
    learning_rate=1e-30,  # the weights stay
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
    made = Trainer(pictures(), None, folder, dataclasses.replace(OPTIONS, **options), Ranks(device="cuda"))
    made.net.train()
    return made


def gradient(net):
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


@pytest.mark.parametrize("engine", ["eager", "compiled", "compiled+graph"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_gradients_are_as_near_to_float64_as_plain_torchs(tmp_path, precision, engine):
    """After steps enough for graphs to be replayed."""
    ours, k = trainer(tmp_path, precision=precision, engine=engine), 4
    network = ours._network()
    for step in range(k + 1):
        ours._step(network, step)

    x_0, t, address, _ = ours._batch(k)
    eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)
    exact = UNet2D(**ours.net.config).cuda().double()
    exact.load_state_dict(ours.net.state_dict())
    process, value = Diffusion(OPTIONS.schedule.betas), (x_0.double() - 127.5) / 127.5
    process.loss(exact, value, t, eps.double()).backward()

    plain, dtype = UNet(**ours.net.config).cuda().to(memory_format=torch.channels_last), PRECISIONS[precision]
    plain.load_state_dict(ours.net.state_dict())
    x_t = add_noise(value.float(), eps, ours.table[t])
    with arithmetic(precision, ours.device):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            m = plain(x_t, t)
        F.mse_loss(m.float(), eps).backward()
    named = dict(plain.named_parameters())
    of_plain = torch.cat([named[name].grad.flatten() for name, _ in ours.net.named_parameters()])
    assert_as_accurate(gradient(ours.net), of_plain, gradient(exact))


@pytest.mark.parametrize("held", ["on the GPU", "on the host"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_steps_do_not_wait(tmp_path, monkeypatch, held, dropout):
    if held == "on the host":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 30))
    ours = trainer(tmp_path, precision="bf16", engine="eager", dropout=dropout)
    assert ours.pixels.device.type == ("cpu" if held == "on the host" else "cuda")
    network = ours._network()
    for k in range(2):
        ours._step(network, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [ours._step(network, k)[0] for k in range(2, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.item() > 0 for loss in losses)


def test_batches_are_those_of_a_cpu(tmp_path):
    on_gpu = trainer(tmp_path / "gpu")
    on_cpu = Trainer(pictures(), None, tmp_path / "cpu", OPTIONS, Ranks(device="cpu"))
    for k in (0, 7):
        for a, b in zip(on_gpu._batch(k)[:3], on_cpu._batch(k)[:3], strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_run_learns_and_goes_on(tmp_path, engine):
    options = dataclasses.replace(
        OPTIONS, steps=60, learning_rate=2e-3, engine=engine, log_every=20, save_every=30, sample_every=60
    )
    first = train(pictures(), tmp_path, options, device="cuda", progress=False)
    lines = (first / "log.jsonl").read_text().splitlines()
    assert len(lines) == 3
    before = checkpoint.load(first)[1]
    net = UNet2D(**checkpoint.load(first)[0])
    checkpoint.load_into(net, before)
    eps = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    value = torch.from_numpy(pictures(16)).movedim(-1, 1).float() / 127.5 - 1
    with torch.no_grad():
        loss = Diffusion(options.schedule.betas).loss(net, value, torch.arange(16) * 6, eps)
    assert loss < eps.square().mean()  # that of predicting eps = 0
    train(pictures(), tmp_path, options, device="cuda", progress=False)
    assert (first / "log.jsonl").read_text().splitlines() == lines
    assert all(torch.equal(before[name], value) for name, value in checkpoint.load(first)[1].items())
