"""The options of a run and its data: the network that they describe, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from fastddpm import Schedule
from fastddpm.train import TrainOptions, check_options
from tests.support.check import error_line
from tests.support.training import SMALL, run


def test_unet_config_follows_the_options():
    options = TrainOptions(channels=(8, 16, 24), layers=3, attention=(0, 2), groups=4, dropout=0.25)
    assert options.unet_config((3, 8, 12)) == {
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
    assert options.unet_config((1, 8, 8))["sample_size"] == 8
    learned = dataclasses.replace(options, schedule=Schedule(variance_type="learned_range")).unet_config((3, 8, 8), 11)
    assert (learned["in_channels"], learned["out_channels"], learned["num_class_embeds"]) == (3, 6, 11)


def test_numbers_of_numpy_become_numbers_of_python():
    """The state and the checkpoint on the disk can hold only Python's."""
    given = dataclasses.replace(
        SMALL, steps=np.int64(4), seed=np.uint64(5), warmup=np.int32(2), ema=np.float32(0.5), channels=(np.int64(8), 16)
    )
    checked = check_options(given, "cpu")
    assert checked == dataclasses.replace(SMALL, seed=5, ema=0.5)
    numbers = [checked.steps, checked.seed, checked.warmup, *checked.channels]
    assert {type(number) for number in numbers} == {int}
    assert type(checked.ema) is float


def test_cuda_graphs_need_a_gpu(tmp_path):
    options = dataclasses.replace(SMALL, engine="compiled+graph")
    line = error_line(run, tmp_path / "run", options, device="cpu")
    assert line == "engine is 'compiled+graph', but 'cpu' has no CUDA graphs; use 'eager' or 'compiled'"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (np.arange(6), "labels are int64 (6,); want one whole number for each of the 7 samples"),
        (np.arange(7.0), "labels are float64 (7,)"),
        (
            np.arange(7) - 1,
            "labels have 7 distinct values, from -1 to 5; want classes 0, 1, ... without gaps: np.unique",
        ),
        (np.arange(7) * 10**12, "labels have 7 distinct values, from 0 to 6000000000000; want"),
        (np.full(7, 2023), "labels have 1 distinct value, from 2023 to 2023; want"),
        (np.zeros((7, 1), int), "labels are int64 (7, 1)"),
    ],
)
def test_bad_labels_are_refused(tmp_path, labels, what):
    assert what in error_line(run, tmp_path / "run", labels=labels)
    assert not (tmp_path / "run").exists()


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
        (None, {"label_dropout": 1.0}, "label_dropout is 1.0; want a number, 0 <= label_dropout < 1"),
        (None, {"label_dropout": "0.1"}, "label_dropout is '0.1'"),
        (None, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (None, {"learning_rate": float("inf")}, "learning_rate is inf"),
        (None, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (None, {"flip": 1}, "flip is 1"),
        (None, {"channels": ()}, "channels is ()"),
        (None, {"channels": (8, 0)}, "channels is (8, 0)"),
        (None, {"channels": (8, 16.0)}, "channels is (8, 16.0)"),
        (None, {"channels": 8}, "channels is 8"),
        (None, {"attention": (2,)}, "attention is (2,); want a list of whole numbers, each from 0 to 1"),
        (None, {"attention": (-1,)}, "attention is (-1,)"),
        (None, {"seed": -1}, "seed is -1"),
        (None, {"seed": 1 << 64}, f"seed is {1 << 64}"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_the_folder_is_made(tmp_path, data, options, message):
    assert message in error_line(run, tmp_path / "run", dataclasses.replace(SMALL, **options), data)
    assert not (tmp_path / "run").exists()
