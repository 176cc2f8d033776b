"""The options of a `UNet2D`: each has a type and a range, whatever a configuration file may hold."""

import json
import math

import numpy as np
import pytest
import torch

from fastddpm import UNet2D
from fastddpm.networks.config import CHECKS, DEFAULTS, MOST_PARAMETERS, complete_config, least_parameters
from tests.support.check import error_line

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SWITCHES = ("center_input_sample", "flip_sin_to_cos", "add_attention")
NUMBERS = ("freq_shift", "dropout", "norm_eps", "mid_block_scale_factor")
COUNTS = (
    "sample_size", "in_channels", "out_channels", "time_embedding_dim", "layers_per_block", "downsample_padding",
    "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "num_class_embeds", "num_train_timesteps",
)  # fmt: skip
NAMES = (
    "time_embedding_type", "mid_block_type", "downsample_type", "upsample_type", "act_fn", "resnet_time_scale_shift",
    "class_embed_type",
)  # fmt: skip
LEVELS = ("block_out_channels", "down_block_types", "up_block_types")


def test_every_option_is_checked():
    assert list(CHECKS) == list(DEFAULTS)
    assert {*SWITCHES, *NUMBERS, *COUNTS, *NAMES, *LEVELS} == CHECKS.keys()
    assert complete_config({}) == DEFAULTS


@pytest.mark.parametrize(
    "value",
    ["false", "x", 0, 1, math.nan, [], [True], {}, 10**23, 10**5000],
    ids=lambda value: str(value)[:9] if value != 10**5000 else "huge",
)
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_booleans(name, value):
    assert f"UNet2D: {name} is " in error_line(UNet2D, **TINY, **{name: value})


@pytest.mark.parametrize(
    "value",
    ["1", "", True, False, math.nan, math.inf, -math.inf, 10**23, -(10**23), 10**5000, [1], {}, 1j],
    ids=lambda value: str(value)[:9] if value != 10**5000 else "huge",
)
@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS])
def test_numbers_are_finite_numbers_in_a_range(name, value):
    line = error_line(UNet2D, **{**TINY, name: value})
    assert line.startswith(f"UNet2D: {name}")
    assert "want a" in line
    assert len(line) < 300


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, "2", [2, 2, 2]])
@pytest.mark.parametrize("name", sorted({*COUNTS} - {"downsample_padding"}))
def test_counts_are_whole_and_positive(name, value):
    assert f"UNet2D: {name} is " in error_line(UNet2D, **{**TINY, name: value})


@pytest.mark.parametrize("value", [False, 0, "", "none", ["conv"], {}, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_among_the_known(name, value):
    assert f"UNet2D: {name} is " in error_line(UNet2D, **TINY, **{name: value})


@pytest.mark.parametrize("value", [None, 8, "DownBlock2D", [], {}, [8] * 17, [[8], [16]], [None, None], [8, 10**23]])
@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_lists(name, value):
    assert f"UNet2D: {name}" in error_line(UNet2D, **{**TINY, name: value})


@pytest.mark.parametrize("size", [8, [8, 16], (8, 16), np.int64(8), [np.int64(8), 16]])
def test_sample_size_is_one_side_or_two(size):
    got = complete_config(TINY | {"sample_size": size})["sample_size"]
    assert got == (size if isinstance(size, tuple) else json.loads(json.dumps(np.array(size).tolist())))


@pytest.mark.parametrize("size", [[8], [8, 8, 8], [8, "8"], [8, 0], [8, 10**23], {"height": 8}])
def test_bad_sample_size(size):
    assert "UNet2D: sample_size" in error_line(UNet2D, **TINY, sample_size=size)


def test_numbers_of_numpy_become_json():
    numpy = {"in_channels": np.int64(3), "norm_eps": np.float32(0.5), "num_class_embeds": np.int32(4), "freq_shift": 0}
    config = complete_config(TINY | numpy | {"block_out_channels": [np.int64(8), np.uint8(16)]})
    assert json.loads(json.dumps(config)) == json.loads(
        json.dumps(complete_config(TINY | {"norm_eps": 0.5, "num_class_embeds": 4}))
    )
    assert json.dumps(config["freq_shift"]) == "0"


def test_unknown_options_are_named_without_control_characters():
    assert error_line(UNet2D, **{"\ud800\x1b[2J": 1}).startswith(r"UNet2D: unknown option '\ud800\x1b[2J'; known: ")
    assert len(error_line(UNet2D, **{"x" * 100_000: 1})) < 1000
    assert complete_config({"a": None, "b": False, "_c": 3}) == DEFAULTS


# Sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 3},
        {"mid_block_type": None, "in_channels": 1},
        {"num_class_embeds": 5, "time_embedding_dim": 20},
        {"num_class_embeds": 5, "class_embed_type": "identity"},
        {"block_out_channels": (16, 8), "norm_num_groups": 8, "attention_head_dim": None},
        {"resnet_time_scale_shift": "scale_shift", "add_attention": False},
    ],
    ids=str,
)
def test_least_parameters_is_a_lower_bound(options):
    config = complete_config(TINY | options)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in UNet2D(**config).parameters())
    assert parameters / 4 < least_parameters(config) <= parameters


@pytest.mark.parametrize(
    "options",
    [
        {"layers_per_block": 100, "block_out_channels": (8192, 8192)},
        {"block_out_channels": (8, 65536)},
        {"time_embedding_dim": 1 << 24},
        {"time_embedding_dim": 1 << 12, "num_class_embeds": 1 << 24},
    ],
    ids=str,
)
def test_huge_networks_are_refused_before_memory_is_allocated(options):
    line = error_line(UNet2D, **{**TINY, **options})
    assert f"parameters or more; want at most {MOST_PARAMETERS:.0e}" in line


def test_too_many_layers_are_refused_before_they_are_built():
    line = error_line(UNet2D, **{**TINY, "layers_per_block": 20_000})
    assert line == "UNet2D: layers_per_block is 20000; want a whole number from 1 to 100"
