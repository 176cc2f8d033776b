"""The configuration of a `UNet2D`: diffusers' options, their defaults, and which values are supported."""

from collections.abc import Callable
from typing import Any

from fastddpm.networks.layers import ACTIVATIONS

HAS_ATTENTION = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")

DEFAULTS: dict[str, Any] = {  # diffusers' UNet2DModel
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "downsample_padding": (0, 1),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
    "act_fn": tuple(ACTIVATIONS),
}

Range = tuple[str, Callable[[Any], bool]]  # what is wanted, and whether a number is so
COUNT: Range = "a whole number, at least 1", lambda value: isinstance(value, int) and value >= 1
RANGES: dict[str, Range] = {
    "in_channels": COUNT,
    "out_channels": COUNT,
    "layers_per_block": COUNT,
    "norm_eps": ("a number > 0", lambda value: value > 0),
    "dropout": ("a number, 0 <= dropout < 1", lambda value: 0 <= value < 1),
    "mid_block_scale_factor": ("a number > 0", lambda value: value > 0),
}


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return all options: those given, and diffusers' defaults for the others. Ignores keys that begin with "_".

    Raises: ValueError: an option, or a value of one, is unknown or not supported; the message names it.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(key for key in config.keys() - DEFAULTS.keys() if config[key] not in (None, False))
    if unknown:
        raise ValueError(f"UNet2D: unknown option {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    config = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    for key, (wanted, is_right) in RANGES.items():
        if not _is_number(config[key]) or not is_right(config[key]):
            raise ValueError(f"UNet2D: {key} is {config[key]!r}; want {wanted}")
    for key, values in SUPPORTED.items():
        if config[key] not in values:
            raise ValueError(f"UNet2D: {key} is {config[key]!r}, which is not supported; supported: {values}")
    config |= _checked_levels(config)
    if not _is_number(config["freq_shift"]) or not config["freq_shift"] < config["block_out_channels"][0] // 2:
        most = config["block_out_channels"][0] // 2
        raise ValueError(f"UNet2D: freq_shift is {config['freq_shift']!r}; want less than {most}")
    _check_divisors(config)
    return config


def _checked_levels(config: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The options that have one entry per level, as tuples."""
    levels: dict[str, tuple[Any, ...]] = {}
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config[key], list | tuple) or not config[key]:
            raise ValueError(f"UNet2D: {key} is {config[key]!r}; want a list with one entry per level")
        levels[key] = tuple(config[key])
        if len(levels[key]) != len(levels["block_out_channels"]):
            raise ValueError(
                f"UNet2D: {key} has {len(levels[key])} entries, but block_out_channels has "
                f"{len(levels['block_out_channels'])}; give one of each per level"
            )
    for key, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        levels[key] = tuple(str(kind).removeprefix("UNetRes") for kind in levels[key])  # the prefix of old names
        for kind in levels[key]:
            if kind not in kinds:
                raise ValueError(f"UNet2D: {key} holds {kind!r}, which is not supported; supported: {', '.join(kinds)}")
    widths = levels["block_out_channels"]
    if not all(isinstance(width, int) and width >= 2 for width in widths):
        raise ValueError(f"UNet2D: block_out_channels is {widths}; want whole numbers, at least 2")
    return levels


def _check_divisors(config: dict[str, Any]) -> None:
    """Check that the widths divide into groups of the norms, and into heads where there is attention."""
    widths = config["block_out_channels"]
    kinds = (*config["down_block_types"], *config["up_block_types"])
    attended = {width for kind, width in zip(kinds, (*widths, *reversed(widths)), strict=True) if HAS_ATTENTION[kind]}
    if config["mid_block_type"] is not None and config["add_attention"]:
        attended.add(widths[-1])
    divisors = (("norm_num_groups", widths), ("attention_head_dim", attended), ("attn_norm_num_groups", widths[-1:]))
    for key, multiples in divisors:
        value = config[key]
        if value is None and key != "norm_num_groups":
            continue
        if not isinstance(value, int) or value < 1 or any(width % value for width in multiples):
            raise ValueError(f"UNet2D: {key} is {value!r}; want a whole number that divides {sorted(set(multiples))}")


def _is_number(value: object) -> bool:
    """Whether value is a number of Python, which JSON can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool)
