"""The flags of guided-diffusion's and improved-diffusion's scripts: their types, defaults, and what they stand for.

guided_diffusion/script_util.py and improved_diffusion/script_util.py, `model_and_diffusion_defaults`.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fastddpm.core.checks import is_real, shown

UNETMODEL_PROJECTS = ("guided-diffusion", "improved-diffusion")

Parse = Callable[[str, Any], Any]  # (name, value) -> value, or ValueError


def _flag(name: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"{name} is {shown(value)}; want true or false")
    return text in ("true", "1", "yes")


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise ValueError(f"{name} is {shown(value)}; want a whole number")
    return int(number)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not is_real(number) or abs(number) > 1 << 30:
        raise ValueError(f"{name} is {shown(value)}; want a number")
    return number


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """Numbers separated by commas, as the scripts take them; or a list of them."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    return tuple(
        _number(f"{name}: an entry", entry) for entry in (value if isinstance(value, list | tuple) else [value])
    )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | int):
        raise ValueError(f"{name} is {shown(value)}; want text")
    return str(value)


def _optional(parse: Parse) -> Parse:
    return lambda name, value: None if value is None else parse(name, value)


FLAGS: dict[str, tuple[Parse, Any]] = {  # what parses a flag, and its default
    "image_size": (_whole, 64),
    "num_channels": (_whole, 128),
    "num_res_blocks": (_whole, 2),
    "num_heads": (_whole, 4),
    "num_heads_upsample": (_whole, -1),
    "num_head_channels": (_whole, -1),
    "attention_resolutions": (_numbers, (16, 8)),
    "channel_mult": (_numbers, ()),
    "dropout": (_number, 0.0),
    "class_cond": (_flag, False),
    "use_scale_shift_norm": (_flag, True),
    "resblock_updown": (_flag, False),
    "use_new_attention_order": (_flag, False),
    "conv_resample": (_flag, True),  # of UNetModel; no flag of the scripts
    "learn_sigma": (_flag, False),
    "sigma_small": (_flag, False),
    "diffusion_steps": (_whole, 1000),
    "noise_schedule": (_text, "linear"),
    "timestep_respacing": (_text, ""),
    "predict_xstart": (_flag, False),
    "rescale_timesteps": (_flag, False),
    "NUM_CLASSES": (_optional(_whole), None),  # a constant of the scripts, 1000
    "large_size": (_optional(_whole), None),  # of super-resolution, in place of image_size
    "small_size": (_optional(_whole), None),
}
DEFAULTS = {
    "guided-diffusion": {name: default for name, (_, default) in FLAGS.items()},
    "improved-diffusion": {name: default for name, (_, default) in FLAGS.items()} | {"rescale_timesteps": True},
}
OF_ONE_FORMAT = {  # flags that the other project's scripts do not have
    "guided-diffusion": {"num_head_channels", "resblock_updown", "use_new_attention_order", "channel_mult", "use_fp16"},
    "improved-diffusion": {"sigma_small"},
}
CHANNEL_MULT: dict[str, dict[int, tuple[float, ...]]] = {  # by image_size, where channel_mult is empty
    "guided-diffusion": {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
    },
    "improved-diffusion": {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
}
# of the scripts too, but without effect on what a trained network computes
WITHOUT_EFFECT = {
    *("use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "data_dir", "schedule_sampler", "lr"),
    *("weight_decay", "lr_anneal_steps", "batch_size", "microbatch", "ema_rate", "log_interval", "save_interval"),
    *("resume_checkpoint", "fp16_scale_growth", "clip_denoised", "num_samples", "use_ddim", "model_path"),
    *("project", "commit", "checkpoint", "sampling"),  # of a file of options
    *("base_samples", "anneal_lr", "iterations", "eval_interval", "noised", "val_data_dir", "in_channels"),
}


def parse_flags(given: Mapping[str, Any], source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the flags that decide what a network computes, the names of those that were ignored).

    Args: given: by name; a value may be text, as on a command line. source: what the errors call where they are from.
    Raises: ValueError: a flag has a value that it cannot have.
    """
    known: dict[str, Any] = {}
    ignored = []
    for name, value in given.items():
        if name in FLAGS:
            known[name] = FLAGS[name][0](f"{source}: {name}", value)
        elif name not in WITHOUT_EFFECT and not name.startswith(("classifier_", "_")):
            ignored.append(name)
    return known, tuple(ignored)


def check_names(names: list[str]) -> None:
    """Raises: ValueError: a name is that of no flag."""
    for name in names:
        if name not in FLAGS and name not in WITHOUT_EFFECT:
            alike = difflib.get_close_matches(name, FLAGS, 1)
            hint = f"; did you mean {alike[0]}?" if alike else ""
            raise ValueError(f"there is no flag {shown(name)}{hint}; want {', '.join(FLAGS)}")


def heads(flags: Mapping[str, Any], widths: list[int]) -> dict[str, Any]:
    """The options of a `UNet2D` for the heads of its attentions. Args: widths: of all attentions.

    Raises: ValueError: the heads do not divide a width.
    """
    channels, count, above = (flags[name] for name in ("num_head_channels", "num_heads", "num_heads_upsample"))
    if channels != -1:
        if channels < 1 or any(width % channels for width in widths):
            raise ValueError(f"num_head_channels is {channels}; want a divisor of the attentions' widths {widths}")
        return {"attention_head_dim": channels}
    above = count if above == -1 else above
    for name, number in (("num_heads", count), ("num_heads_upsample", above)):
        if number < 1 or any(width % number for width in widths):
            raise ValueError(f"{name} is {number}; want a divisor of the attentions' widths {widths}")
    if above == count and len(set(widths)) == 1:
        return {"attention_head_dim": widths[0] // count}  # an option that diffusers has, too
    return {"num_attention_heads": count if above == count else (count, above)}
