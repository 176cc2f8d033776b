"""The training loss with a learned variance, next to the specification in float64."""

import copy
import dataclasses
import math

import pytest
import torch
from diffusers import DDPMPipeline

from fastddpm import Sampler, Schedule, UNet2D, checkpoints
from fastddpm.core import layout, noise
from fastddpm.evaluate.likelihood import bound
from fastddpm.processes.distributed import Ranks
from fastddpm.reference.diffusion import Diffusion
from fastddpm.reference.likelihood import HYBRID_WEIGHT, hybrid_loss, log_variance, term
from fastddpm.train import TrainOptions
from fastddpm.train.loss import TrainingLoss
from fastddpm.train.trainer import Trainer
from tests.support.check import assert_as_accurate, error_line
from tests.support.draws import generator
from tests.support.training import SMALL, losses, pictures, run

SHAPE = (6, 3, 4, 4)
T = torch.tensor([0, 1, 7, 0, 500, 999])
AT_0 = torch.tensor([0, 3])
LEARNED = dataclasses.replace(
    SMALL, sample_every=0, schedule=Schedule(num_train_timesteps=20, variance_type="learned_range")
)


def inputs(schedule, dtype=torch.float32):
    """The network's output, x_0 as bytes, and addresses. Some pixels are black, some white: their bins have no end."""
    x_0 = torch.randint(-60, 316, SHAPE, generator=generator(1)).clamp(0, 255).to(torch.uint8)
    m, v = torch.randn((2, *SHAPE), generator=generator(2))
    if schedule.variance_type == "learned":
        v = schedule.betas[T].float().view(-1, 1, 1, 1) * (v / 2).exp()
    return layout.channels_last(torch.cat([m, v], 1).to(dtype)), layout.channels_last(x_0), noise.address(3, len(T))


def ours(schedule, output, x_0, address):
    """(the mean over entries and elements of our loss, its gradient)."""
    output = output.detach().requires_grad_()
    t, at_0 = T.to(output.device), AT_0.to(output.device)
    value = TrainingLoss(schedule, output.device)(output, x_0, t, address, at_0).sum() / x_0.numel()
    value.backward()
    return value.detach(), output.grad


def by_specification(schedule, output, x_0, address, dtype):
    """The same of the specification, in any dtype."""
    output = output.to(dtype, copy=True).requires_grad_()
    eps = noise.normal(address, SHAPE[1:], stream=noise.TRAIN, t=0).to(dtype)
    process = Diffusion(schedule.betas)
    value = hybrid_loss(
        process,
        lambda x_t, t: output,
        (x_0.to(dtype) - 127.5) / 127.5,
        T,
        eps,
        predicts=schedule.prediction_type,
        variance_type=schedule.variance_type,
    )
    value.backward()
    return value.detach(), output.grad


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_as_accurate_as_the_specification(predicts, variance_type, dtype, device):
    schedule = Schedule(prediction_type=predicts, variance_type=variance_type)
    output, x_0, address = inputs(schedule, dtype)
    exact = by_specification(schedule, output, x_0, address, torch.float64)
    plain = by_specification(schedule, output, x_0, address, torch.float32)
    got = ours(schedule, output.to(device), x_0.to(device), address.to(device))
    assert exact[1].isfinite().all()
    assert_as_accurate(got[0].cpu(), plain[0], exact[0])
    for half in (slice(0, 3), slice(3, 6)):  # gradients of the mean and of the variance: their sizes differ
        mine, theirs, true = (gradient.cpu()[:, half] for gradient in (got[1], plain[1], exact[1]))
        assert_as_accurate(mine, theirs.to(dtype), true)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_bound_does_not_train_the_mean(variance_type):
    """Bit for bit: the gradient of the mean's half is that of the loss of a fixed variance."""
    schedule = Schedule(variance_type=variance_type)
    output, x_0, address = inputs(schedule)
    _, gradient = ours(schedule, output, x_0, address)
    simple_value, simple = ours(Schedule(), layout.channels_last(output[:, :3]), x_0, address)
    assert torch.equal(gradient[:, :3], simple)
    assert (gradient[:, 3:].flatten(1).abs().amax(1) > 0).all()
    exact, in_float64 = by_specification(schedule, output, x_0, address, torch.float64)
    assert exact > simple_value
    only_mean = output[:, :3].double().requires_grad_()
    eps = noise.normal(address, SHAPE[1:], stream=noise.TRAIN, t=0).double()
    (only_mean - eps).square().mean().backward()
    torch.testing.assert_close(in_float64[:, :3], only_mean.grad, rtol=1e-14, atol=0)


def test_hybrid_loss_is_the_simple_one_and_the_bound_in_bits():
    """Over all t, L_vlb is the bound without L_T, in bits per dimension."""
    schedule = Schedule(num_train_timesteps=20, variance_type="learned_range")
    process = Diffusion(schedule.betas)
    x_0 = (torch.arange(20 * 4, dtype=torch.float64).view(20, 1, 2, 2) * 3 - 127.5) / 127.5
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=generator(4))
    t, v = torch.arange(20), torch.full_like(x_0, 0.3)
    model = lambda x_t, t: torch.cat([eps + 0.1, v], 1)
    nats = term(process, model, x_0, t, eps, variance_type="learned_range").sum()
    want = 0.1**2 + HYBRID_WEIGHT * nats / (4 * math.log(2))
    torch.testing.assert_close(hybrid_loss(process, model, x_0, t, eps), want, rtol=1e-13, atol=0)


def test_learned_variance_of_gaussian_pixels_is_the_true_one():
    """With the optimal mean, the minimum over a variance for each t is that of the true reverse process."""
    schedule = Schedule(num_train_timesteps=8, beta_start=0.01, beta_end=0.4, variance_type="learned_range")
    process, spread, n = Diffusion(schedule.betas), 0.2**2, 64
    pixels = torch.randn((8 * n, 1, 8, 8), generator=generator(5)) * 0.2 * 127.5 + 127.5
    x_0, t = layout.channels_last(pixels.round().clamp(0, 255).to(torch.uint8)), torch.arange(8).repeat_interleave(n)
    address = noise.address(0, len(t))
    eps = noise.normal(address, (1, 8, 8), stream=noise.TRAIN, t=0)
    x_t = process.noised(x_0 / 127.5 - 1, t, eps)
    abar = process.alphas_cumprod.float()[t].view(-1, 1, 1, 1)
    m = (1 - abar).sqrt() * x_t / (abar * spread + 1 - abar)  # E[eps | x_t]
    v = torch.zeros(8, requires_grad=True)
    loss, at_0 = TrainingLoss(schedule, torch.device("cpu")), (t == 0).nonzero()[:, 0]
    optimizer = torch.optim.Adam([v], lr=0.3)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.3 * 0.96**step
        optimizer.zero_grad()
        output = layout.channels_last(torch.cat([m, v[t].view(-1, 1, 1, 1).expand_as(m)], 1))
        loss(output, x_0, t, address, at_0).sum().backward()
        optimizer.step()
    like = torch.zeros(8, 1, dtype=torch.float64)
    found = log_variance(process, torch.arange(8), "learned_range", v.detach().double()[:, None], like)[:, 0].exp()
    abar, previous = process.alphas_cumprod, process.alphas_cumprod_prev
    A = previous.sqrt() * process.betas / (1 - abar)
    true = process.posterior_var + A**2 * spread * (1 - abar) / (abar * spread + 1 - abar)
    assert ((found / true).log().abs() <= 5 * math.sqrt(2 / (n * 64))).all()  # five standard deviations of a variance


def gradient(net):
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


def specified(trainer, options, dtype, k):
    """(loss, gradient) of step k by the specification."""
    net, (x_0, t, address, _) = copy.deepcopy(trainer.net).to(dtype), trainer.batches.of_step(k)
    eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0).to(dtype)
    net.zero_grad()
    loss = hybrid_loss(Diffusion(options.schedule.betas), net, (x_0.to(dtype) - 127.5) / 127.5, t, eps)
    loss.backward()
    return loss.detach(), gradient(net)


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_steps_take_the_loss_and_the_gradient_of_the_specification(tmp_path, engine):
    """Of several steps, in which the weights do not change; with each t in the batch."""
    schedule = Schedule(num_train_timesteps=4, variance_type="learned_range")
    options = dataclasses.replace(LEARNED, batch_size=6, grad_clip=math.inf, engine=engine, schedule=schedule)
    options = dataclasses.replace(options, channels=(8,), attention=(), seed=4, learning_rate=1e-30)
    trainer = Trainer(pictures(), None, tmp_path, options, Ranks())
    network = trainer.wrapped_network()
    values = []
    for k in range(12):
        plain, exact = (specified(trainer, options, dtype, k) for dtype in (torch.float32, torch.float64))
        loss, _ = trainer.step(network, k)
        values.append((loss, plain[0], exact[0]))
        assert_as_accurate(gradient(trainer.net), plain[1], exact[1])
    assert_as_accurate(*map(torch.stack, zip(*values, strict=True)))
    assert len(trainer.batches.at_0(0)) == 2


def test_ranks_together_take_the_gradient_of_one_process(tmp_path):
    """Unequal shares, of which one has no t = 0; the mean of the ranks' gradients is that of the whole batch."""
    schedule = Schedule(num_train_timesteps=4, variance_type="learned_range")
    options = dataclasses.replace(LEARNED, batch_size=7, grad_clip=math.inf, seed=4, schedule=schedule)
    ranks = [Trainer(pictures(), None, tmp_path, options, Ranks(rank, 3)) for rank in range(3)]
    assert sorted(len(one.batches.at_0(0)) for one in ranks) == [0, 1, 1]
    alone = Trainer(pictures(), None, tmp_path, options, Ranks())
    plain, exact = (specified(alone, options, dtype, 0)[1] for dtype in (torch.float32, torch.float64))
    for one in ranks:
        one.step(one.net, 0)
    assert_as_accurate(torch.stack([gradient(one.net) for one in ranks]).mean(0), plain, exact)


def bounds(out, x_0, variance_types):
    """L_vlb in bits per dimension of a checkpoint with each variance, over all t, and L_simple."""
    checkpoint = checkpoints.load(out)
    net = UNet2D(**checkpoint.config)
    checkpoints.load_into(net, checkpoint.parameters)
    process, steps = Diffusion(checkpoint.schedule.betas), checkpoint.schedule.num_train_timesteps
    x_0, t = x_0.repeat(steps, 1, 1, 1), torch.arange(steps).repeat_interleave(len(x_0))
    eps = torch.randn(x_0.shape, generator=generator(6), dtype=torch.float64)
    with torch.no_grad():
        output = net(process.noised(x_0, t, eps).float(), t).double()
    for variance_type in variance_types:
        shown = output if variance_type.startswith("learned") else output[:, :1]
        nats = term(process, lambda *_, shown=shown: shown, x_0, t, eps, variance_type=variance_type)
        yield float(nats.mean()) * steps / (64 * math.log(2))
    yield float((output[:, :1] - eps).square().mean())


def test_training_lowers_the_loss_and_the_variance_beats_the_fixed_ones(tmp_path):
    schedule = dataclasses.replace(LEARNED.schedule, beta_start=0.01, beta_end=0.4)
    options = dataclasses.replace(
        LEARNED, steps=1, batch_size=32, learning_rate=4e-3, save_every=150, schedule=schedule
    )
    x_0 = torch.from_numpy(pictures()).movedim(-1, 1).double() / 127.5 - 1
    kinds = ("learned_range", "fixed_small", "fixed_large")
    before, *_, first = bounds(run(tmp_path / "a", options), x_0, kinds)
    after, *fixed, last = bounds(run(tmp_path / "b", dataclasses.replace(options, steps=40)), x_0, kinds)
    assert last < first
    assert after < min(before, *fixed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_learned_variance_is_written_and_read(tmp_path, precision):
    """By this package and by diffusers, whose network returns the same."""
    out = run(tmp_path, dataclasses.replace(LEARNED, precision=precision), pictures(channels=3))
    checkpoint = checkpoints.load(out)
    assert (checkpoint.config["in_channels"], checkpoint.config["out_channels"]) == (3, 6)
    assert checkpoint.schedule == LEARNED.schedule
    pipeline = DDPMPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    images = pipeline(2, num_inference_steps=4, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape == (2, 8, 8, 3)
    sampler = Sampler.from_pretrained(out, device="cpu")
    got = bound(sampler, pictures(2, channels=3), progress=False)
    assert got.per_image.isfinite().all()


def test_variance_itself_is_not_learned_from_random_weights(tmp_path):
    """diffusers' "learned" is positive by nothing but training; a checkpoint with such a variance may be trained on."""
    learned = dataclasses.replace(LEARNED.schedule, variance_type="learned")
    line = error_line(run, tmp_path / "a", dataclasses.replace(LEARNED, schedule=learned))
    assert line.startswith("variance_type is 'learned': the network returns the variance itself, which is")
    first = checkpoints.load(run(tmp_path / "b", dataclasses.replace(LEARNED, steps=1)))
    weights = dict(first.parameters)
    weights["conv_out.weight"] = weights["conv_out.weight"] * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    weights["conv_out.bias"] = torch.tensor([0.0, 0.01])
    checkpoints.save(tmp_path / "c", first.config, weights, learned)
    options = TrainOptions(
        steps=2, batch_size=3, precision="fp32", sample_every=0, init=str(tmp_path / "c"), learning_rate=1e-6
    )
    assert checkpoints.load(run(tmp_path / "d", options)).schedule == learned
    assert len(losses(tmp_path / "d")) == 1


def test_checkpoint_without_the_channels_of_its_variance_is_refused(tmp_path):
    first = checkpoints.load(run(tmp_path / "a", dataclasses.replace(SMALL, steps=1, sample_every=0)))
    checkpoints.save(tmp_path / "b", first.config, first.parameters, LEARNED.schedule)
    options = TrainOptions(steps=1, batch_size=3, init=str(tmp_path / "b"), sample_every=0)
    assert "whose out_channels is 1; these images need 2" in error_line(run, tmp_path / "c", options)
