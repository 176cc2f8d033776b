"""The trainer: Algorithm 1 on small pictures, with the bits of a plain loop and a checkpoint that diffusers reads."""

import dataclasses
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from torch import nn

from fastddpm import Sampler, Schedule, UNet2D, checkpoints
from fastddpm.core import noise
from fastddpm.core.layout import channels_last
from fastddpm.processes.distributed import Ranks
from fastddpm.reference.diffusion import Diffusion, add_noise, squared_error, target
from fastddpm.storage.files import TEMPORARY
from fastddpm.storage.images import grid
from fastddpm.train import TrainOptions, train, trainer
from fastddpm.train.trainer import Trainer
from fastddpm.train.updates import learning_rate_at
from tests.support.check import assert_as_accurate, error_line
from tests.support.training import SMALL, assert_same, batch, losses, parameters, pictures, run


def test_run_writes_checkpoint_log_and_pictures(tmp_path):
    out = run(tmp_path / "run")
    assert [step for step, _ in losses(out)] == [4]
    for picture in ("samples/step-0000004.png", "loss.png"):
        with Image.open(out / picture) as image:
            assert image.size[0] > 64
    net = DDPMPipeline.from_pretrained(out).unet
    assert_same(dict(net.state_dict()), parameters(out))
    drawn = Sampler.from_pretrained(out).sample(2, steps=2, progress=False, output="uint8")
    assert drawn.shape == (2, 8, 8, 1)
    assert not list(out.rglob(f"*{TEMPORARY}"))


def test_first_loss_is_that_of_algorithm_1(tmp_path):
    """The logged loss equals the reference's, of the initial weights with the same t and noise."""
    options = dataclasses.replace(SMALL, steps=1)
    run(tmp_path, options)
    torch.manual_seed(options.seed)
    net = UNet2D(**options.unet_config((1, 8, 8)))
    x_0, t, address, _ = batch(pictures(), 0, options)
    assert torch.equal(address, noise.address(options.seed, 3))
    eps = noise.normal(address, (1, 8, 8), stream=noise.TRAIN, t=0)
    process = Diffusion(options.schedule.betas)
    with torch.no_grad():
        loss = process.loss(net.double(), x_0.double() / 127.5 - 1, t, eps.double())
        plain = process.loss(net.float(), x_0.float() / 127.5 - 1, t, eps)
    (_, logged) = losses(tmp_path)[0]
    assert_as_accurate(torch.tensor(logged), plain, loss)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("classes", [None, 3])
def test_run_equals_plain_training_loop(tmp_path, predicts, classes):
    """Bit for bit: AdamW, clipping, warm-up and cosine, the average and its warm-up, a t per image, dropout."""
    seed, size, rate, data = (1 << 63) + 5, 3, 5e-3, pictures()
    options = dataclasses.replace(SMALL, seed=seed, learning_rate=rate, grad_clip=0.1, ema=0.15, dropout=0.3)
    options = dataclasses.replace(options, steps=6, log_every=3, weight_decay=0.3)
    options = dataclasses.replace(options, schedule=Schedule(num_train_timesteps=20, prediction_type=predicts))
    labels = None if classes is None else np.array([0, 2, 1, 1, 0, 2, 2], np.uint8)
    out = run(tmp_path, options, data, labels=labels)

    torch.manual_seed(seed)
    net = UNet2D(**options.unet_config((1, 8, 8), classes))
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.3, fused=True)
    pixels = torch.from_numpy(data).movedim(-1, 1)
    table, norms, values = options.schedule.noising_table(), [], []
    falling = [0.5 + 0.5 * math.cos(math.pi * left) for left in (0, 1 / 4, 1 / 2, 3 / 4)]
    for k, (share, decay) in enumerate(zip([1 / 2, 1, *falling], [1 / 10] + 5 * [0.15], strict=True)):
        seen = range(k * size, (k + 1) * size)
        orders = [np.random.default_rng((seed, 0, epoch)).permutation(7) for epoch in range(3)]
        index = [orders[i // 7][i % 7] for i in seen]
        x_0 = (pixels[index].float() - 127.5) * (2 / 255)
        t = torch.from_numpy(np.random.default_rng((seed, 1, k)).integers(20, size=size))
        eps = noise.normal(noise.address(seed, seen), (1, 8, 8), stream=noise.TRAIN, t=0)
        torch.manual_seed(int(np.random.SeedSequence((seed, 2, k, 0)).generate_state(1, np.uint64)[0]))
        given = None if classes is None else torch.from_numpy(labels[index]).long()
        model_output = net(channels_last(add_noise(x_0, eps, table[t])), t, given)
        loss = squared_error(model_output, target(x_0, eps, table[t], predicts)).sum() / (size * 64)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
        values.append(loss.item())
        optimizer.param_groups[0]["lr"] = share * rate
        optimizer.step()
        for name, value in net.state_dict().items():
            ema[name].lerp_(value, 1 - decay)
    assert min(norms) > 0.1
    assert_same(parameters(out), ema)
    first, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert (first["loss"], last["loss"]) == (sum(values[:3]) / 3, sum(values[3:]) / 3)
    assert (first["grad_norm"], last["grad_norm"]) == (norms[2].item(), norms[5].item())
    assert (first["learning_rate"], last["learning_rate"]) == (rate, rate * falling[-1])
    assert (last["step"], last["images_per_second"] > 0, first["seconds"] < last["seconds"]) == (6, True, True)


def test_training_lowers_the_loss(tmp_path):
    options = dataclasses.replace(SMALL, steps=100, batch_size=16, learning_rate=4e-3, save_every=100, sample_every=100)
    out = run(tmp_path, options)
    torch.manual_seed(options.seed)
    net = UNet2D(**options.unet_config((1, 8, 8)))
    x_0 = torch.from_numpy(pictures(64)).movedim(-1, 1).float() / 127.5 - 1
    t = torch.arange(64) % 20
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    process = Diffusion(options.schedule.betas)
    with torch.no_grad():
        untrained = process.loss(net, x_0, t, eps)
        checkpoints.load_into(net, parameters(out))
        trained = process.loss(net, x_0, t, eps)
    assert trained < min(untrained, eps.square().mean())  # eps.square().mean() is the loss of predicting eps = 0


def test_torch_modes_of_the_caller_do_not_matter(tmp_path):
    before = parameters(run(tmp_path / "plain"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        after = parameters(run(tmp_path / "within"))
    assert_same(before, after)


def test_random_state_of_the_caller_is_restored(tmp_path):
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    run(tmp_path, dataclasses.replace(SMALL, dropout=0.3))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_between_ranks(tmp_path):
    options = dataclasses.replace(SMALL, dropout=0.5)
    a, b = (Trainer(pictures(), None, tmp_path, options, Ranks(rank, 2)) for rank in range(2))
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr(torch, "manual_seed", lambda seed: drawn.append(seed))
        for trainer in (a, b, a):
            trainer.step(trainer.net, 3)
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("steps", "warmup", "peak"), [(1, None, 0), (100, None, 9), (20_000, None, 499), (100, 7, 6), (100, 0, 0)]
)
def test_learning_rate_rises_to_its_peak_and_falls(steps, warmup, peak):
    options = TrainOptions(steps=steps, warmup=warmup)
    rates = [learning_rate_at(k, options) for k in range(steps)]
    assert rates[peak] == max(rates) == options.learning_rate
    assert rates[:peak] == sorted(set(rates[:peak]))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_first_line_says_what_the_run_uses(tmp_path, capsys):
    train(pictures(), tmp_path, SMALL, device="cpu")
    weights = sum(value.numel() for value in parameters(tmp_path).values())
    what = f"device cpu, precision fp32, engine eager, processes 1, parameters {weights}, images 7, batch 3"
    line = capsys.readouterr().err.splitlines()[0]
    how_long = "this may take minutes or hours; the bar shows how long"
    assert line == f"{tmp_path}: training for 4 steps, {what}; {how_long}"
    train(pictures(), tmp_path, SMALL, device="cpu")
    assert capsys.readouterr().err.splitlines()[0] == f"{tmp_path}: 4 of 4 steps are done, {what}"


def test_images_may_be_strided_or_read_only(tmp_path):
    data = pictures()
    mirrored = data[:, :, ::-1]
    frozen = mirrored.copy()
    frozen.flags.writeable = False
    assert_same(parameters(run(tmp_path / "a", data=mirrored)), parameters(run(tmp_path / "b", data=frozen)))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_applies_to_the_network_and_the_grid(tmp_path, precision, dtype):
    run_ = Trainer(pictures(), None, tmp_path, dataclasses.replace(SMALL, precision=precision, seed=3), Ranks())
    seen = set()
    run_.net.conv_in.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    run_.resume()
    run_.run(progress=False)
    assert seen == {dtype}
    sampler = Sampler.from_pretrained(tmp_path, precision=precision)
    samples = sampler.sample(run_.grids.samples, seed=3, steps=20, output="uint8", progress=False)
    with Image.open(tmp_path / "samples" / "step-0000004.png") as drawn:
        assert np.array_equal(np.asarray(drawn), grid(samples)[..., 0])


def test_weights_are_determined_by_the_seed(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert_same(parameters(a), parameters(b))
    other = run(tmp_path / "c", dataclasses.replace(SMALL, seed=1))
    assert not torch.equal(parameters(a)["conv_in.weight"], parameters(other)["conv_in.weight"])


def gradients(options, dtype=torch.float32):
    """Clipped gradients of the first step, as one vector; in float64 those of the reference's loss."""
    with TemporaryDirectory() as out:
        trainer = Trainer(pictures(), None, Path(out), options, Ranks())
    net, (x_0, t, address, _) = trainer.net, trainer.batches.of_step(0)
    if dtype == torch.float64:
        eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)
        value = (x_0.double() - 127.5) / 127.5
        Diffusion(options.schedule.betas).loss(net.double(), value, t, eps.double()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), options.grad_clip)
    else:
        trainer.step(trainer.wrapped_network(), 0)
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "clip"), [("bf16", math.inf), ("fp32", 0.1)])
def test_compiled_gradients_are_as_accurate_as_eager_ones(precision, clip):
    options = dataclasses.replace(SMALL, channels=(8,), attention=(), precision=precision, grad_clip=clip)
    eager, compiled = (gradients(dataclasses.replace(options, engine=engine)) for engine in ("eager", "compiled"))
    exact = gradients(options, torch.float64)
    assert_as_accurate(compiled, eager, exact)
    assert 0 < float(exact.norm()) <= clip * (1 + 1e-9)


def test_class_conditional_run(tmp_path):
    labels = np.arange(7) % 3
    out = run(tmp_path, labels=labels)
    assert checkpoints.load(out).config["num_class_embeds"] == 3
    a, b = (Sampler.from_pretrained(out).sample(1, steps=2, class_labels=[label], progress=False) for label in (0, 2))
    assert not torch.equal(a, b)
    assert '"labels"' in error_line(run, tmp_path, labels=labels[::-1])


def test_colour_flips_and_dropout_in_bf16(tmp_path):
    options = dataclasses.replace(SMALL, precision="bf16", flip=True, dropout=0.1)
    out = run(tmp_path, options, pictures(channels=3))
    assert parameters(out)["conv_in.weight"].dtype == torch.float32
    assert checkpoints.load(out).config["in_channels"] == 3


def test_infinite_loss_stops_the_run(tmp_path):
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, learning_rate=1e38, grad_clip=1e38))
    assert "the loss is" in line
    assert "; lower learning_rate (1e+38) in a run in another folder; " in line
    assert line.endswith(f"{tmp_path} has no checkpoint yet")


@pytest.mark.parametrize(
    ("step", "what"), [(3, "the loss is nan at step 4"), (4, "the weights are not finite at step 4")]
)
def test_diverged_run_keeps_its_last_good_checkpoint(tmp_path, monkeypatch, step, what):
    average, calls = trainer.update_average, []

    def poisoned(ema, net, decay):
        calls.append(decay)
        if len(calls) == step:
            nn.init.constant_(net.conv_in.bias, float("nan"))
        average(ema, net, decay)

    monkeypatch.setattr(trainer, "update_average", poisoned)
    assert what in error_line(run, tmp_path, dataclasses.replace(SMALL, steps=6))
    assert all(value.isfinite().all() for value in parameters(tmp_path).values())
    assert torch.load(tmp_path / "training.pt", weights_only=True)["progress"]["step"] == 2
