"""Batches: which images, in which order, on which rank, and where the images are kept."""

import dataclasses

import numpy as np
import pytest
import torch

from fastddpm.processes.distributed import Ranks
from fastddpm.train import batches
from fastddpm.train.batches import draws
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
    options, labels = dataclasses.replace(SMALL, batch_size=5, flip=True), np.arange(7) % 3
    whole = batch(pictures(), 1, options, labels)
    parts = [batch(pictures(), 1, options, labels, Ranks(rank, size)) for rank in range(size)]
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))


def test_images_that_do_not_fit_a_gpu_stay_on_the_host(monkeypatch):
    pixels, gpu = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (959, 80 << 30))
    assert batches.images_on_device(pixels, gpu) is pixels
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (960, 80 << 30))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device))
    batches.images_on_device(pixels, gpu)
    assert moved == [gpu]
