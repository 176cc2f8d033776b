"""The configuration of a `UNet2D`: diffusers' options, their defaults, and which values are supported."""

from collections.abc import Callable
from typing import Any

from fastddpm.core.checks import flag, one_of, real, shown, whole
from fastddpm.networks.layers import ACTIVATIONS

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
HAS_ATTENTION = {kind: kind.startswith("Attn") for kind in (*DOWN_BLOCKS, *UP_BLOCKS)}

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

MOST_PARAMETERS = 10**10  # 40 GB in float32
MOST_LEVELS, MOST_LAYERS, MOST_CHANNELS = 16, 100, 1 << 16
LARGEST = 1 << 24  # of sizes and counts for which there is no natural limit

Check = Callable[[str, Any], Any]  # (name, value) -> value, or ValueError


def count_check(high: int, low: int = 1) -> Check:
    return lambda name, value: whole(name, value, low, high)


def _number(low: float, high: float, *, above: bool = False) -> Check:
    def check(name: str, value: Any) -> int | float:
        number = real(name, value, low, high, above=above)
        return value if isinstance(value, int) else number  # a configuration keeps its 0, which is not written as 0.0

    return check


def _choice(*known: str) -> Check:
    return lambda name, value: one_of(name, value, known)


def optional_check(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _size(name: str, value: Any) -> Any:
    """A sample_size: one side, or height and width."""
    if not isinstance(value, list | tuple):
        return whole(name, value, 1, LARGEST)
    if len(value) != 2:
        raise ValueError(f"{name} is {shown(value)}; want a whole number, or height and width")
    sides = [whole(f"{name}: an entry", side, 1, LARGEST) for side in value]
    return tuple(sides) if isinstance(value, tuple) else sides


def _heads(name: str, value: Any) -> int | tuple[int, ...]:
    """A num_attention_heads: one number, or that of the way down and the middle, and that of the way up."""
    if not isinstance(value, list | tuple):
        return whole(name, value, 1, MOST_CHANNELS)
    if len(value) != 2:
        raise ValueError(
            f"{name} is {shown(value)}; want a whole number, or two: one for the way down and the middle, and one for "
            "the way up"
        )
    return tuple(whole(f"{name}: an entry", heads, 1, MOST_CHANNELS) for heads in value)


def per_level_check(check: Check) -> Check:
    def check_all(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not 0 < len(value) <= MOST_LEVELS:
            raise ValueError(f"{name} is {shown(value)}; want a list with one entry per level, 1 to {MOST_LEVELS}")
        return tuple(check(f"{name}: an entry", entry) for entry in value)

    return check_all


def _block(*known: str) -> Check:
    """A kind of block, under its current name or that of 2022."""
    return lambda name, value: one_of(name, value.removeprefix("UNetRes") if isinstance(value, str) else value, known)


CHECKS: dict[str, Check] = {  # of every option; those of one option alone
    "sample_size": optional_check(_size),
    "in_channels": count_check(MOST_CHANNELS),
    "out_channels": count_check(MOST_CHANNELS),
    "center_input_sample": flag,
    "time_embedding_type": _choice("positional"),
    "time_embedding_dim": optional_check(count_check(LARGEST)),
    "freq_shift": _number(-LARGEST, LARGEST),
    "flip_sin_to_cos": flag,
    "down_block_types": per_level_check(_block(*DOWN_BLOCKS)),
    "mid_block_type": optional_check(_choice("UNetMidBlock2D")),
    "up_block_types": per_level_check(_block(*UP_BLOCKS)),
    "block_out_channels": per_level_check(count_check(MOST_CHANNELS, low=2)),
    "layers_per_block": count_check(MOST_LAYERS),
    "mid_block_scale_factor": _number(0, LARGEST, above=True),
    "downsample_padding": count_check(1, low=0),
    "downsample_type": _choice("conv", "resnet", "pool"),
    "upsample_type": _choice("conv", "resnet", "nearest"),
    "dropout": _number(0, 1),
    "act_fn": _choice(*ACTIVATIONS),
    "attention_head_dim": optional_check(count_check(MOST_CHANNELS)),
    "norm_num_groups": count_check(MOST_CHANNELS),
    "attn_norm_num_groups": optional_check(count_check(MOST_CHANNELS)),
    "norm_eps": _number(0, 1, above=True),
    "resnet_time_scale_shift": _choice("default", "scale_shift"),
    "add_attention": flag,
    "class_embed_type": optional_check(_choice("timestep", "identity")),
    "num_class_embeds": optional_check(count_check(LARGEST)),
    "num_train_timesteps": optional_check(count_check(LARGEST)),
}


OWN: dict[str, Check] = {  # options that diffusers lacks; a complete configuration has those that are not None
    "num_attention_heads": _heads,
    "time_proj_dim": count_check(LARGEST, low=2),
}


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return all options: those given, and diffusers' defaults for the others. Ignores keys that begin with "_".

    As in diffusers, "resnet" as downsample_type or upsample_type affects only blocks with attention; for others, use
    ResnetDownsampleBlock2D and ResnetUpsampleBlock2D. Options beyond diffusers:
        num_attention_heads: the heads of each attention, whatever its width, instead of attention_head_dim; one number,
            or two: for the way down and the middle, and for the way up.
        time_proj_dim: the number of sines and cosines of t; None: block_out_channels[0].
        downsample_type "pool": the mean of 2 x 2 pixels; upsample_type "nearest": nearest neighbours; no convolution.

    Raises: ValueError: an option, or a value of one, is unknown or not supported; the message names it.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(
        key
        for key in config.keys() - DEFAULTS.keys() - OWN.keys()
        if config[key] is not None and config[key] is not False
    )
    if unknown:
        raise ValueError(f"UNet2D: unknown option {shown(unknown)[1:-1]}; known: {', '.join([*DEFAULTS, *OWN])}")
    own = {key: check(f"UNet2D: {key}", config[key]) for key, check in OWN.items() if config.get(key) is not None}
    config = {key: check(f"UNet2D: {key}", config.get(key, DEFAULTS[key])) for key, check in CHECKS.items()} | own
    widths = config["block_out_channels"]
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != len(widths):
            raise ValueError(
                f"UNet2D: {key} has {len(config[key])} entries, but block_out_channels has {len(widths)}; "
                "give one of each per level"
            )
    waves = config.get("time_proj_dim", widths[0]) // 2
    if not config["freq_shift"] < waves:
        raise ValueError(f"UNet2D: freq_shift is {config['freq_shift']!r}; want less than {waves}")
    _check_divisors(config)
    if (count := least_parameters(config)) > MOST_PARAMETERS:
        raise ValueError(
            f"UNet2D: a network of this configuration has {count:.1e} parameters or more; want at most "
            f"{MOST_PARAMETERS:.0e}, by smaller block_out_channels, layers_per_block, time_embedding_dim or "
            "num_class_embeds"
        )
    return config


def least_parameters(config: dict[str, Any]) -> int:
    """A lower bound on the number of parameters of a complete configuration: all but the smaller layers."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    embed = config["time_embedding_dim"] or 4 * widths[0]
    ends = 9 * widths[0] * (config["in_channels"] + config["out_channels"])
    residual_blocks = sum(9 * width * width * (4 * layers + 1) for width in widths)
    classes = 0 if config["class_embed_type"] else config["num_class_embeds"] or 0
    return ends + residual_blocks + embed * (embed + classes)


def beyond_diffusers(config: dict[str, Any]) -> list[str]:
    """What of a complete configuration diffusers' UNet2DModel cannot express, as sentences without a subject."""
    widths, found = config["block_out_channels"], []
    if (heads := config.get("num_attention_heads")) is not None:
        found.append(f"has num_attention_heads {heads}, not attention_head_dim channels in each head")
    if (waves := config.get("time_proj_dim", widths[0])) != widths[0]:
        found.append(f"embeds t by {waves} sines and cosines, not by block_out_channels[0] = {widths[0]}")
    for key, kinds, value in (
        ("downsample_type", config["down_block_types"], "pool"), ("upsample_type", config["up_block_types"], "nearest")
    ):  # fmt: skip
        if config[key] == value and len(widths) > 1 and any(sampler_of(config, kind) == value for kind in kinds[:-1]):
            found.append(f"has {key} '{value}', without a convolution")
    return found


def heads_of(config: dict[str, Any], width: int, *, up: bool) -> int:
    """The number of heads of an attention of `width` channels. Args: up: whether it is on the way up."""
    heads = config.get("num_attention_heads")
    if heads is None:
        return width // (config["attention_head_dim"] or width)
    return heads[up] if isinstance(heads, tuple) else heads


def sampler_of(config: dict[str, Any], kind: str) -> str:
    """How a block of this kind changes the size: "conv", "resnet", "pool" or "nearest"."""
    if kind.startswith("Resnet"):
        return "resnet"
    chosen = config["downsample_type" if kind in DOWN_BLOCKS else "upsample_type"]
    return "conv" if chosen == "resnet" and not HAS_ATTENTION[kind] else chosen  # as in diffusers


def _check_divisors(config: dict[str, Any]) -> None:
    """Check that the widths divide into groups of the norms, and into heads where there is attention."""
    widths = config["block_out_channels"]
    kinds = (*config["down_block_types"], *config["up_block_types"])
    attended = {width for kind, width in zip(kinds, (*widths, *reversed(widths)), strict=True) if HAS_ATTENTION[kind]}
    if config["mid_block_type"] is not None and config["add_attention"]:
        attended.add(widths[-1])
    heads = "num_attention_heads" if "num_attention_heads" in config else "attention_head_dim"
    divisors = (("norm_num_groups", widths), (heads, attended), ("attn_norm_num_groups", widths[-1:]))
    for key, multiples in divisors:
        value = config[key]
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(width % number for width in multiples for number in values):
            raise ValueError(f"UNet2D: {key} is {value}; want a whole number that divides {sorted(set(multiples))}")
