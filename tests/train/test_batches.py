"""Batches: which images, in which order, on which rank, and where the images are kept."""

import dataclasses

import numpy as np
import pytest
import torch

from fastddpm import Schedule
from fastddpm.processes.distributed import Ranks
from fastddpm.train import batches
from fastddpm.train.batches import Batches, draws, dropped
from tests.support.training import SMALL, batch, pictures


def test_every_epoch_visits_every_image_once_in_a_new_order():
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
def test_ranks_share_the_batch_of_one_process(size):
    options, labels = dataclasses.replace(SMALL, batch_size=5, flip=True, label_dropout=0.5), np.arange(7) % 3
    whole = batch(pictures(), 1, options, labels)
    parts = [batch(pictures(), 1, options, labels, Ranks(rank, size)) for rank in range(size)]
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))


def test_dropped_labels_are_null_and_nothing_else_changes():
    labels = np.arange(7) % 3
    options = dataclasses.replace(SMALL, batch_size=400, label_dropout=0.1)
    count = 0
    for k in range(5):
        *same, plain = batch(pictures(), k, dataclasses.replace(options, label_dropout=0.0), labels)
        *others, got = batch(pictures(), k, options, labels)
        assert all(map(torch.equal, same, others))
        assert torch.equal(got, torch.where(dropped(k, options), 3, plain))
        count += int((got == 3).sum())
    assert abs(count - 200) <= 5 * (2000 * 0.1 * 0.9) ** 0.5  # five standard deviations
    assert not torch.equal(dropped(0, options), dropped(1, options))
    assert not torch.equal(dropped(0, options), dropped(0, dataclasses.replace(options, seed=1)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_entries_at_0_are_those_of_the_share(size):
    """And are drawn only for a variance that is learned."""
    schedule = Schedule(num_train_timesteps=3, variance_type="learned_range")
    options, cpu = dataclasses.replace(SMALL, batch_size=20, schedule=schedule), torch.device("cpu")
    found = 0
    for rank in range(size):
        one = Batches(pictures(), None, None, options, Ranks(rank, size), cpu)
        at_0 = one.at_0(2)
        assert at_0.tolist() == [i for i, t in enumerate(one.of_step(2).t.tolist()) if t == 0]
        found += len(at_0)
    assert found > 0
    assert Batches(pictures(), None, None, SMALL, Ranks(), cpu).at_0(2) is None


def test_images_that_do_not_fit_a_gpu_stay_on_the_host(monkeypatch):
    pixels, gpu = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (959, 80 << 30))
    assert batches.on_device(pixels, gpu) is pixels
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (960, 80 << 30))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device))
    batches.on_device(pixels, gpu)
    assert moved == [gpu]
