"""The trainer: Algorithm 1 on small pictures, resumable to the bit, its checkpoint readable by diffusers."""

import dataclasses
import errno
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from unittest import mock

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
from fastddpm.storage import images
from fastddpm.train import run_folder, trainer
from fastddpm.train.trainer import Trainer, TrainOptions, draws, train
from tests.support.check import assert_as_accurate, error_line

SMALL = TrainOptions(
    steps=4,
    batch_size=3,
    warmup=2,
    channels=(8, 16),
    attention=(1,),
    groups=4,
    save_every=2,
    sample_every=4,
    precision="fp32",
    schedule=Schedule(num_train_timesteps=20),
)


def pictures(n=7, channels=1):
    """Bright squares on black, somewhere in 8 x 8."""
    rng = np.random.default_rng(0)
    data = np.zeros((n, 8, 8, channels), np.uint8)
    for image, (i, j) in zip(data, rng.integers(0, 4, (n, 2)), strict=True):
        image[i : i + 4, j : j + 4] = rng.integers(128, 256, channels)
    return data


def run(out, options=SMALL, data=None, **how):
    return train(pictures() if data is None else data, out, options, progress=False, **how)


def batch(data, k, options=SMALL, labels=None, ranks=None):
    """Images, timesteps, addresses and labels of step k."""
    with TemporaryDirectory() as out:
        return Trainer(data, labels, Path(out), options, ranks or Ranks())._batch(k)


def parameters(folder):
    return checkpoints.load(folder)[1]


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_run_leaves(tmp_path):
    out = run(tmp_path / "run")
    assert [step for step, _ in losses(out)] == [4]
    for picture in ("samples/step-0000004.png", "loss.png"):
        with Image.open(out / picture) as grid:
            assert grid.size[0] > 64
    net = DDPMPipeline.from_pretrained(out).unet
    assert_same(dict(net.state_dict()), parameters(out))
    drawn = Sampler.from_pretrained(out).sample(2, steps=2, progress=False, output="uint8")
    assert drawn.shape == (2, 8, 8, 1)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_one_step_is_algorithm_1(tmp_path):
    """The loss in the log is the specification's, of the initial weights at the addressed draws."""
    options = dataclasses.replace(SMALL, steps=1)
    run(tmp_path, options)
    torch.manual_seed(options.seed)
    net = UNet2D(**options.unet_config(8, 8, 1))
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
def test_a_run_is_the_plain_loop_written_by_hand(tmp_path, predicts, classes):
    """To the bit: AdamW, clipping, warm-up and cosine, the average and its warm-up, a t for each image, dropout."""
    seed, size, rate, data = (1 << 63) + 5, 3, 5e-3, pictures()
    options = dataclasses.replace(SMALL, seed=seed, learning_rate=rate, grad_clip=0.1, ema=0.15, dropout=0.3)
    options = dataclasses.replace(options, steps=6, log_every=3, weight_decay=0.3)
    options = dataclasses.replace(options, schedule=Schedule(num_train_timesteps=20, prediction_type=predicts))
    labels = None if classes is None else np.array([0, 2, 1, 1, 0, 2, 2], np.uint8)
    out = run(tmp_path, options, data, labels=labels)

    torch.manual_seed(seed)
    net = UNet2D(**options.unet_config(8, 8, 1, classes))
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
        m = net(channels_last(add_noise(x_0, eps, table[t])), t, given)
        loss = squared_error(m, target(x_0, eps, table[t], predicts)).sum() / (size * 64)
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


def test_the_network_is_the_one_asked_for():
    options = TrainOptions(channels=(8, 16, 24), layers=3, attention=(0, 2), groups=4, dropout=0.25)
    assert options.unet_config(8, 12, 3) == {
        "sample_size": (8, 12),
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16, 24),
        "layers_per_block": 3,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 4,
        "dropout": 0.25,
    }
    assert options.unet_config(8, 8, 1)["sample_size"] == 8


def test_it_learns(tmp_path):
    options = dataclasses.replace(SMALL, steps=100, batch_size=16, learning_rate=4e-3, save_every=100, sample_every=100)
    out = run(tmp_path, options)
    torch.manual_seed(options.seed)
    net = UNet2D(**options.unet_config(8, 8, 1))
    x_0 = torch.from_numpy(pictures(64)).movedim(-1, 1).float() / 127.5 - 1
    t = torch.arange(64) % 20
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    process = Diffusion(options.schedule.betas)
    with torch.no_grad():
        untrained = process.loss(net, x_0, t, eps)
        checkpoints.load_into(net, parameters(out))
        trained = process.loss(net, x_0, t, eps)
    assert trained < min(untrained, eps.square().mean())  # the latter is the loss of predicting eps = 0


class Killed(BaseException):
    """Nothing in the trainer may catch it."""


def killed_run(monkeypatch, owner, name, call, out, options=SMALL):
    """A run that dies in its call number `call`, from 1 on, of owner.name."""
    original, calls = getattr(owner, name), []

    def killed(*args, **how):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            run(out, options)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("owner", "name", "call"), [(trainer, "_average", 2), (trainer, "_average", 4), (checkpoints, "save", 1)]
)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, owner, name, call, dropout):
    options = dataclasses.replace(SMALL, dropout=dropout, log_every=1)
    whole = run(tmp_path / "whole", options)
    killed_run(monkeypatch, owner, name, call, tmp_path / "killed", options)
    again = run(tmp_path / "killed", options)
    assert_same(parameters(whole), parameters(again))
    assert losses(whole) == losses(again)
    assert [step for step, _ in losses(again)] == [1, 2, 3, 4]


def test_a_kill_between_the_last_state_and_its_checkpoint_is_made_good(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    killed_run(monkeypatch, checkpoints, "save", 2, tmp_path / "killed")
    assert_same(parameters(whole), parameters(run(tmp_path / "killed")))


def test_resuming_mends_the_log_and_counts_the_seconds_on(tmp_path, monkeypatch):
    killed_run(monkeypatch, trainer, "_average", 3, tmp_path)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    done = state["progress"]
    assert (done["step"], done["seconds"] < 1000, len(done["losses"])) == (2, True, 2)
    torch.save({**state, "progress": done | {"seconds": 1000.0}}, tmp_path / "training.pt")
    for name in (".training.pt.1.tmp", "unet/.config.json.23.tmp", ".mine.tmp"):
        (tmp_path / name).touch()
    kept = '{"step": 2, "loss": 0.5, "seconds": 1.0}'
    (tmp_path / "log.jsonl").write_bytes(
        f'{kept}\n7\n{{"step": 3, "loss": 0.5}}\n{{"step": 4, "lo'.encode() + b"\0\xff"
    )
    run(tmp_path)
    first, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert first == kept
    assert json.loads(last)["step"] == 4
    assert 1000 < json.loads(last)["seconds"] < 2000
    assert [path.name for path in tmp_path.rglob(".*.tmp")] == [".mine.tmp"]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


class Touch:
    """Its pickle makes the file `ran`."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda path: path.write_text("notes on a training"),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"step": 2}, path),
        lambda path: torch.save([torch.zeros(2)], path),
        lambda path: torch.save({**torch.load(path, weights_only=True), "net": {}}, path),
        lambda path: torch.save(Touch(), path),
    ],
    ids=["truncated", "text", "empty", "another dict", "a list", "no weights", "a pickle that runs code"],
)
def test_a_state_that_cannot_be_resumed_is_named(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    out = run(tmp_path / "run", dataclasses.replace(SMALL, steps=1))
    before = parameters(out)
    damage(out / "training.pt")
    line = error_line(run, out, dataclasses.replace(SMALL, steps=1))
    assert line.startswith(f"{out / 'training.pt'} is damaged, or not of a run (")
    assert line.endswith("train into another folder")
    assert_same(parameters(out), before)
    assert not Path("ran").exists()


@pytest.mark.parametrize("held", ["unet/config.json", "model_index.json", "config.json"])
def test_a_checkpoint_of_another_origin_is_not_overwritten(tmp_path, held):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("{}")
    line = error_line(run, tmp_path)
    assert f"holds a checkpoint ({held.split('/')[0]}) and no training.pt to resume; train into another folder" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / held]


OTHERWISE = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "warmup": 1, "ema": 0.5, "weight_decay": 0.0}
OTHERWISE |= {"grad_clip": 2.0, "flip": True, "channels": (8, 8), "layers": 2, "attention": (), "groups": 2}
OTHERWISE |= {"dropout": 0.1, "seed": 1, "schedule": Schedule(num_train_timesteps=21)}
FREE = {"log_every": 3, "save_every": 3, "sample_every": 3, "precision": "bf16", "engine": "auto"}


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_options_are_another_run(tmp_path, name):
    run(tmp_path, dataclasses.replace(SMALL, steps=1))
    options = dataclasses.replace(SMALL, steps=1) if name != "steps" else SMALL
    line = error_line(run, tmp_path, dataclasses.replace(options, **{name: OTHERWISE[name]}))
    assert f'holds a run with other "{name}"' in line


def test_what_may_change_between_two_starts(tmp_path):
    before = parameters(run(tmp_path))
    assert_same(parameters(run(tmp_path, dataclasses.replace(SMALL, **FREE))), before)
    fields = {field.name for field in dataclasses.fields(TrainOptions)}
    assert fields == OTHERWISE.keys() | FREE.keys() | {"init"}


@pytest.mark.parametrize(
    "text",
    [
        '{"iteration": 1}\n',
        "epoch,loss\n1,0.5\n",
        "epoch,loss",
        "[1, 2",
        '{"step": 1, "accuracy": 1}\n',
        '{"step": "a", "loss": 1}',
        '{"step": NaN, "loss": 1}',
        '{"step": 1, "loss": 0.3}\n{"step": 2, "no\n{"step": 3, "loss": 0.3}\n',
    ],
)
def test_a_log_of_another_origin_is_not_overwritten(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    line = error_line(run, tmp_path)
    assert line == f"{tmp_path} holds a log.jsonl that is not of a run; train into another folder"
    assert (tmp_path / "log.jsonl").read_text() == text


@pytest.mark.parametrize("rest", ["", "{", '{"step": 4, "lo', '{"step": 4, "loss": 0.3}\n{"st'])
def test_a_line_that_a_kill_left_is_dropped(tmp_path, rest):
    (tmp_path / "log.jsonl").write_text(rest)
    assert [step for step, _ in losses(run(tmp_path))] == [4]


def test_temporary_files_of_other_runs_stay(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".training.pt.7.tmp").touch()
    run(tmp_path)
    assert (tmp_path / "other" / ".training.pt.7.tmp").exists()


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    def full(file, buffer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def atomic(path):
        yield type("File", (), {"write": full})()

    monkeypatch.setattr(run_folder, "atomic", atomic)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path)


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as failed:
        run_folder.log(tmp_path, {"step": 1})
    assert failed.value.filename == str(tmp_path / "log.jsonl")


def test_a_state_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    run(tmp_path)
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "training.pt"))
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    with pytest.raises(PermissionError):
        run(tmp_path)


def test_whatever_modes_the_caller_is_in(tmp_path):
    before = parameters(run(tmp_path / "plain"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        after = parameters(run(tmp_path / "within"))
    assert_same(before, after)


def test_ranks_have_other_dropout(tmp_path):
    options = dataclasses.replace(SMALL, dropout=0.5)
    a, b = (Trainer(pictures(), None, tmp_path, options, Ranks(rank, 2)) for rank in range(2))
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr(torch, "manual_seed", lambda seed: drawn.append(seed))
        for trainer in (a, b, a):
            trainer._step(trainer.net, 3)
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("classes", "columns", "rows"), [(1, 8, 8), (3, 9, 7), (7, 7, 9), (11, 11, 5), (16, 16, 4), (17, 8, 8)]
)
def test_a_column_of_the_grid_shows_one_class(tmp_path, monkeypatch, classes, columns, rows):
    seen, shown = [], []
    monkeypatch.setattr(Sampler, "sample", lambda *args, class_labels, **how: seen.append(class_labels))
    monkeypatch.setattr(images, "save_grid", lambda *args, columns: shown.append(columns))
    run(tmp_path, data=pictures(20), labels=np.arange(20) % classes)
    assert shown == [columns]
    assert torch.equal(seen[0], torch.arange(rows * columns) % classes)


@pytest.mark.parametrize(
    ("steps", "warmup", "peak"), [(1, None, 0), (100, None, 9), (20_000, None, 499), (100, 7, 6), (100, 0, 0)]
)
def test_the_rate_reaches_its_peak(steps, warmup, peak):
    rates = [trainer._rate(k, TrainOptions(steps=steps, warmup=warmup)) for k in range(steps)]
    assert rates[peak] == max(rates) == 1
    assert rates[:peak] == sorted(set(rates[:peak]))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("before", ["fp32", "bf16"])
def test_a_run_stays_in_its_precision(tmp_path, before):
    run(tmp_path, dataclasses.replace(SMALL, precision=before))
    for asked, found in (("auto", before), ("fp32", "fp32"), ("bf16", "bf16")):
        resumed = Trainer(pictures(), None, tmp_path, dataclasses.replace(SMALL, precision=asked), Ranks())
        resumed.resume()
        assert resumed.precision == found
        resumed.run(progress=False)
        run_folder.save(tmp_path, resumed.described, resumed.parts, resumed.done)
        assert torch.load(tmp_path / "training.pt")["progress"]["how"]["precision"] == found
        run_folder.save(
            tmp_path, resumed.described, resumed.parts, run_folder.Progress(step=4, how={"precision": before})
        )


def test_a_precision_that_is_not_to_be_had_is_that_of_the_run(tmp_path):
    first = Trainer(pictures(), None, tmp_path, SMALL, Ranks(device="cpu"))
    run_folder.save(tmp_path, first.described, first.parts, run_folder.Progress(how={"precision": "tf32"}))
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, precision="auto"), device="cpu")
    assert line == f"{tmp_path} holds a run whose precision is 'tf32', which 'cpu' does not have; use fp32 or bf16"


def test_the_default_warmup_may_be_given(tmp_path):
    options = dataclasses.replace(SMALL, steps=20, warmup=None, save_every=20)
    before = parameters(run(tmp_path, options))
    assert_same(parameters(run(tmp_path, dataclasses.replace(options, warmup=2))), before)
    assert '"warmup": 2' in error_line(run, tmp_path, dataclasses.replace(options, warmup=0))


def test_a_run_says_what_it_runs_on(tmp_path, capsys):
    train(pictures(), tmp_path, SMALL, device="cpu")
    what = "device cpu, precision fp32, engine eager, processes 1"
    weights = sum(value.numel() for value in parameters(tmp_path).values())
    line = capsys.readouterr().err.splitlines()[0]
    assert line == f"{tmp_path}: {what}, parameters {weights}, images 7, batch 3"


def test_other_images_are_another_run(tmp_path):
    run(tmp_path)
    other = pictures()
    other[3, 2, 1] ^= 1
    assert f'{tmp_path} holds a run with other "data": {{"crc32": ' in error_line(run, tmp_path, data=other)
    assert '"data": {"shape": [7, 8, 8, 1]}' in error_line(run, tmp_path, data=pictures().reshape(7, 4, 16, 1))


def test_labels_make_another_run(tmp_path):
    labels = np.arange(7) % 3
    run(tmp_path / "with", labels=labels)
    run(tmp_path / "without")
    assert 'holds a run with other "labels": {"crc32": ' in error_line(run, tmp_path / "with")
    assert 'holds a run with other "labels": null; give those' in error_line(run, tmp_path / "without", labels=labels)
    assert '"labels": {"crc32": ' in error_line(run, tmp_path / "with", labels=(labels + 1) % 3)


def test_of_the_schedule_what_differs_is_told(tmp_path):
    run(tmp_path)
    options = dataclasses.replace(SMALL, schedule=dataclasses.replace(SMALL.schedule, beta_end=0.03))
    told = f'"schedule": {{"beta_end": {SMALL.schedule.beta_end}}}'
    assert (
        error_line(run, tmp_path, options) == f"{tmp_path} holds a run with other {told}; give those, or another folder"
    )


def test_images_in_any_memory(tmp_path):
    data = pictures()
    mirrored = data[:, :, ::-1]
    frozen = mirrored.copy()
    frozen.flags.writeable = False
    assert_same(parameters(run(tmp_path / "a", data=mirrored)), parameters(run(tmp_path / "b", data=frozen)))


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    run(tmp_path, dataclasses.replace(SMALL, dropout=0.3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_network_and_of_the_grid(tmp_path, precision, dtype):
    seen = set()

    def watch(module, args, output):
        if module.training and isinstance(module, nn.Conv2d):
            seen.add(output.dtype)

    with nn.modules.module.register_module_forward_hook(watch):
        out = run(tmp_path, dataclasses.replace(SMALL, precision=precision, seed=3))
    assert seen == {dtype}
    sampler = Sampler.from_pretrained(out, precision=precision)
    want = images.grid(sampler.sample(64, seed=3, steps=20, output="uint8", progress=False))
    with Image.open(out / "samples" / "step-0000004.png") as grid:
        assert np.array_equal(np.asarray(grid), want[..., 0])


def test_a_finished_run_is_left_as_it_is(tmp_path):
    out = run(tmp_path)
    before = (out / "training.pt").read_bytes()
    run(tmp_path)
    assert (out / "training.pt").read_bytes() == before


def test_two_runs_are_the_same_and_another_seed_is_not(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert_same(parameters(a), parameters(b))
    other = run(tmp_path / "c", dataclasses.replace(SMALL, seed=1))
    assert not torch.equal(parameters(a)["conv_in.weight"], parameters(other)["conv_in.weight"])


def test_every_epoch_sees_every_image_once_in_a_new_order():
    seen = torch.cat([draws(k, 7, SMALL)[0] for k in range(14)]).tolist()
    epochs = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_flips_mirror_half_of_the_images():
    data = pictures()
    for flip in (False, True):
        options = dataclasses.replace(SMALL, batch_size=100, flip=flip)
        x_0, *_ = batch(data, 3, options)
        index, _, mirrored, _ = draws(3, len(data), options)
        plain = torch.from_numpy(data[index.numpy()]).movedim(-1, 1)
        assert torch.equal(x_0, torch.where((mirrored * flip).bool()[:, None, None, None], plain.flip(-1), plain))
    mirrored = sum(int(draws(k, len(data), options)[2].sum()) for k in range(10))
    assert abs(mirrored - 500) <= 5 * 1000**0.5 / 2  # five standard deviations


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ranks_share_the_batch_of_one_process(size):
    options, labels = dataclasses.replace(SMALL, batch_size=5, flip=True), np.arange(7) % 3
    whole = batch(pictures(), 1, options, labels)
    parts = [batch(pictures(), 1, options, labels, Ranks(rank, size)) for rank in range(size)]
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))


def test_images_that_do_not_fit_a_gpu_stay_on_the_host(monkeypatch):
    pixels, gpu = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (959, 80 << 30))
    assert trainer._placed(pixels, gpu) is pixels
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (960, 80 << 30))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device))
    trainer._placed(pixels, gpu)
    assert moved == [gpu]


def gradients(options, dtype=torch.float32):
    """Of the first step, clipped, all in one vector; in float64 by the reference's loss of the same draws."""
    with TemporaryDirectory() as out:
        trainer = Trainer(pictures(), None, Path(out), options, Ranks())
    net, (x_0, t, address, _) = trainer.net, trainer._batch(0)
    if dtype == torch.float64:
        eps = noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)
        value = (x_0.double() - 127.5) / 127.5
        Diffusion(options.schedule.betas).loss(net.double(), value, t, eps.double()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), options.grad_clip)
    else:
        trainer._step(trainer._network(), 0)
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch, in torch
@pytest.mark.parametrize(("precision", "clip"), [("bf16", math.inf), ("fp32", 0.1)])
def test_compiled_gradients_are_as_near_to_float64_as_eager_ones(precision, clip):
    options = dataclasses.replace(SMALL, channels=(8,), attention=(), precision=precision, grad_clip=clip)
    eager, compiled = (gradients(dataclasses.replace(options, engine=engine)) for engine in ("eager", "compiled"))
    exact = gradients(options, torch.float64)
    assert_as_accurate(compiled, eager, exact)
    assert 0 < float(exact.norm()) <= clip * (1 + 1e-9)


def test_a_class_conditional_run(tmp_path):
    labels = np.arange(7) % 3
    out = run(tmp_path, labels=labels)
    assert checkpoints.load(out)[0]["num_class_embeds"] == 3
    a, b = (Sampler.from_pretrained(out).sample(1, steps=2, class_labels=[label], progress=False) for label in (0, 2))
    assert not torch.equal(a, b)
    assert '"labels"' in error_line(run, tmp_path, labels=labels[::-1])


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (np.arange(6), "labels are int64 (6,); want one whole number for each of the 7 images"),
        (np.arange(7.0), "labels are float64 (7,)"),
        (np.arange(7) - 1, "labels are 7 numbers from -1 to 5; want classes 0, 1, ... without gaps: np.unique"),
        (np.arange(7) * 10**12, "labels are 7 numbers from 0 to 6000000000000; want"),
        (np.full(7, 2023), "labels are 1 numbers from 2023 to 2023; want"),
        (np.zeros((7, 1), int), "labels are int64 (7, 1)"),
    ],
)
def test_bad_labels(tmp_path, labels, what):
    assert what in error_line(run, tmp_path / "run", labels=labels)
    assert not (tmp_path / "run").exists()


FROM = TrainOptions(steps=4, batch_size=3, warmup=2, save_every=2, sample_every=4, precision="fp32")


@pytest.mark.parametrize("options", [{"channels": (8, 16)}, {"dropout": 0.1}, {"num_train_timesteps": 20}], ids=str)
def test_what_a_checkpoint_brings_is_not_asked_for_besides(tmp_path, options):
    first, name = run(tmp_path / "first"), *options
    asked = {"schedule": Schedule(**options)} if name == "num_train_timesteps" else options
    line = error_line(run, tmp_path / "second", dataclasses.replace(FROM, init=str(first), **asked))
    given = f"{name} is {options[name]!r}"
    assert line == f"{given}, but init brings its own layout and schedule; leave out one of the two"


def test_a_run_starts_from_a_checkpoint(tmp_path):
    """With its weights, layout and schedule; a rate of almost nothing leaves the weights as they are."""
    first = run(tmp_path / "first")
    options = dataclasses.replace(FROM, init=str(first), steps=1, learning_rate=1e-30)
    second = run(tmp_path / "second", options)
    assert_same(parameters(first), parameters(second))
    (config, _, schedule), (before, _, of_first) = checkpoints.load(second), checkpoints.load(first)
    assert (config, schedule) == (before, of_first)
    assert schedule.num_train_timesteps == 20


def test_a_run_goes_on_without_what_it_started_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, relative = run(tmp_path / "first"), dataclasses.replace(FROM, init="first")
    options = dataclasses.replace(FROM, init=str(first))
    before = parameters(run(tmp_path / "second", options))
    first.rename(tmp_path / "elsewhere")
    for same in (options, relative):
        assert_same(parameters(run(tmp_path / "second", same)), before)
        assert "first" in error_line(run, tmp_path / "third", same)
    other = dataclasses.replace(FROM, init="elsewhere")
    assert f'holds a run with other "init": "{first}"' in error_line(run, tmp_path / "second", other)


@pytest.mark.parametrize("lost", ["training.pt", "unet/diffusion_pytorch_model.safetensors"])
def test_a_run_without_a_checkpoint_of_its_own_needs_the_first(tmp_path, lost):
    options = dataclasses.replace(FROM, init=str(run(tmp_path / "first")))
    second = run(tmp_path / "second", options)
    before = parameters(second)
    (second / lost).unlink()
    if lost == "training.pt":
        shutil.rmtree(second / "unet")
        (second / "model_index.json").unlink()
    assert_same(parameters(run(second, options)), before)
    shutil.rmtree(tmp_path / "first")
    (second / lost).unlink()
    assert "first" in error_line(run, second, options)


@pytest.mark.parametrize("damaged", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_a_damaged_checkpoint_of_its_own_is_made_anew(tmp_path, damaged):
    options = dataclasses.replace(FROM, init=str(run(tmp_path / "first")))
    second = run(tmp_path / "second", options)
    before = parameters(second)
    half = (second / damaged).read_bytes()[:100]
    (second / damaged).unlink()  # `before` is mapped
    (second / damaged).write_bytes(half)
    assert_same(parameters(run(second, options)), before)


def test_a_start_that_cannot_be_sampled_is_refused(tmp_path):
    config, weights, schedule = checkpoints.load(run(tmp_path / "first"))
    learned = dataclasses.replace(schedule, variance_type="learned_range")
    checkpoints.save(tmp_path / "learned", config, weights, learned)
    line = error_line(run, tmp_path / "second", dataclasses.replace(FROM, init=str(tmp_path / "learned")))
    assert line.startswith("variance_type is 'learned_range'; sampling with learned variances is not")
    assert not (tmp_path / "second").exists()


def test_a_checkpoint_for_other_images_is_no_start(tmp_path):
    first = run(tmp_path / "first")
    options = dataclasses.replace(FROM, init=str(first))
    line = error_line(run, tmp_path / "second", options, pictures(channels=3))
    assert f"init is {first}, whose in_channels is 1; these images need 3" in line
    line = error_line(run, tmp_path / "second", options, labels=np.arange(7))
    assert "whose num_class_embeds is None; these images need 7: leave labels out, or start from another" in line
    classes = dataclasses.replace(FROM, init=str(run(tmp_path / "classes", labels=np.arange(7))))
    line = error_line(run, tmp_path / "second", classes)
    assert "whose num_class_embeds is 7; these images need None: give labels (--class-conditional), or start" in line
    assert "nowhere" in error_line(run, tmp_path / "second", dataclasses.replace(FROM, init="nowhere"))
    assert not (tmp_path / "second").exists()
    assert "images are 9 x 8" in error_line(run, tmp_path / "second", options, np.zeros((2, 9, 8, 1), np.uint8))


def test_colour_flips_and_dropout_in_bf16(tmp_path):
    options = dataclasses.replace(SMALL, precision="bf16", flip=True, dropout=0.1)
    out = run(tmp_path, options, pictures(channels=3))
    assert parameters(out)["conv_in.weight"].dtype == torch.float32
    assert checkpoints.load(out)[0]["in_channels"] == 3


def test_graphs_need_a_gpu(tmp_path):
    options = dataclasses.replace(SMALL, engine="compiled+graph")
    line = error_line(run, tmp_path / "run", options, device="cpu")
    assert line == "engine is 'compiled+graph', and 'cpu' has no CUDA graphs; use 'eager' or 'compiled'"
    assert not (tmp_path / "run").exists()


def test_samples_before_the_first_line_of_the_log(tmp_path):
    out = run(tmp_path, dataclasses.replace(SMALL, sample_every=1, log_every=3))
    assert len(list((out / "samples").iterdir())) == 4


def test_two_processes_do_not_share_a_folder(tmp_path):
    whole = run(tmp_path / "whole")
    (tmp_path / "held").mkdir()
    code = "import sys; from fastddpm.storage.files import locked\nwith locked(sys.argv[1]): print(flush=True); input()"
    with Popen([sys.executable, "-c", code, tmp_path / "held"], stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        line = error_line(run, tmp_path / "held")
        other.kill()
    assert f"{tmp_path / 'held'} is being written by another process; wait until it has ended, or name" in line
    assert_same(parameters(whole), parameters(run(tmp_path / "held")))


def test_another_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, learning_rate=1.0))
    assert line == f'{tmp_path} holds a run with other "learning_rate": 0.0005; give those, or another folder'


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, learning_rate=1e38, grad_clip=1e38))
    assert "the loss is" in line
    assert "lower learning_rate" in line


@pytest.mark.parametrize(
    ("step", "what"), [(3, "the loss is nan at step 4"), (4, "the weights are not finite at step 4")]
)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path, monkeypatch, step, what):
    average, calls = trainer._average, []

    def poisoned(ema, net, decay):
        calls.append(decay)
        if len(calls) == step:
            nn.init.constant_(net.conv_in.bias, float("nan"))
        average(ema, net, decay)

    monkeypatch.setattr(trainer, "_average", poisoned)
    assert what in error_line(run, tmp_path, dataclasses.replace(SMALL, steps=6))
    assert all(value.isfinite().all() for value in parameters(tmp_path).values())
    assert torch.load(tmp_path / "training.pt", weights_only=True)["progress"]["step"] == 2


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), {}, "data is uint8 (2, 8, 8)"),
        (np.zeros((2, 8, 8, 1), np.float32), {}, "data is float32"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.uint8), {}, "data is a torch.Tensor; want a numpy array, uint8"),
        (np.zeros((0, 8, 8, 1), np.uint8), {}, "at least one image"),
        (np.zeros((2, 7, 8, 1), np.uint8), {}, "images are 7 x 8; with 2 levels both sides must be multiples of 2"),
        (None, {"steps": 0}, "steps is 0"),
        (None, {"batch_size": 1.5}, "batch_size is 1.5"),
        (None, {"schedule": Schedule(rescale_betas_zero_snr=True)}, "prediction_type is 'epsilon', but abar is 0"),
        (None, {"groups": 3}, "groups is 3; want a divisor of each of channels, 8, 16"),
        (None, {"precision": "fp8"}, "precision is 'fp8'; want one of auto, fp32, tf32, bf16"),
        (None, {"precision": "fp16"}, "precision is 'fp16'; want one of auto, fp32, tf32, bf16"),
        (np.zeros((2, 8, 8, 2), np.uint8), {}, "data is uint8 (2, 8, 8, 2)"),
        (np.zeros((2, 0, 8, 1), np.uint8), {}, "images are 0 x 8"),
        (None, {"schedule": Schedule(rescale_betas_zero_snr=True)}, "abar is 0 at t=999"),
        (None, {"schedule": Schedule(steps_offset=100)}, "steps_offset 100"),
        (None, {"steps": True}, "steps is True"),
        (None, {"save_every": 0}, "save_every is 0"),
        (None, {"sample_every": -1}, "sample_every is -1"),
        (None, {"layers": 0}, "layers is 0"),
        (None, {"groups": 0}, "groups is 0"),
        (None, {"warmup": -1}, "warmup is -1"),
        (None, {"schedule": None}, "schedule is None; want a Schedule"),
        (None, {"grad_clip": 0.0}, "grad_clip is 0.0"),
        (None, {"grad_clip": float("nan")}, "grad_clip is nan"),
        (None, {"ema": 1.0}, "ema is 1.0"),
        (None, {"log_every": 0}, "log_every is 0"),
        (None, {"engine": "fast"}, "engine is 'fast'; want one of auto, eager, compiled, compiled+graph"),
        (None, {"ema": -0.1}, "ema is -0.1"),
        (None, {"dropout": 1.0}, "dropout is 1.0"),
        (None, {"dropout": -0.1}, "dropout is -0.1"),
        (None, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (None, {"learning_rate": float("inf")}, "learning_rate is inf"),
        (None, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (None, {"flip": 1}, "flip is 1"),
        (None, {"channels": ()}, "channels is ()"),
        (None, {"channels": (8, 0)}, "channels is (8, 0)"),
        (None, {"channels": (8, 16.0)}, "channels is (8, 16.0)"),
        (None, {"channels": 8}, "channels is 8"),
        (None, {"attention": (2,)}, "attention is (2,); want levels, each from 0 to 1"),
        (None, {"attention": (-1,)}, "attention is (-1,)"),
        (None, {"seed": -1}, "seed is -1"),
        (None, {"seed": 1 << 64}, f"seed is {1 << 64}"),
    ],
    ids=str,
)
def test_bad_input_leaves_nothing_behind(tmp_path, data, options, message):
    assert message in error_line(run, tmp_path / "run", dataclasses.replace(SMALL, **options), data)
    assert not (tmp_path / "run").exists()
