"""Checkpoints of openai/guided-diffusion and openai/improved-diffusion: a `.pt` file of weights, and flags.

The file holds the state dict of a `UNetModel`. Its names and shapes show the network, but for a few flags: how many
heads, the order of queries, keys and values, and the noise schedule. These come from keywords, or from a JSON beside
the file, or are the defaults of the scripts.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.flags import CHANNEL_MULT, DEFAULTS, heads
from fastddpm.checkpoints.parameters import first_few
from fastddpm.core.checks import one_of
from fastddpm.core.schedule import Schedule

GROUPS = 32  # of all norms
FIRST = "input_blocks.0.0.weight"  # which every such network has
_OF_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AROUND = {  # the blocks
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class Layout(NamedTuple):
    """What the names and shapes of a file show of its network.

    Attributes:
        widths: of each level.
        layers: residual blocks of a level on the way down.
        attended: whether each level has attention.
        resize: what changes the size: "conv", "resnet" or "pool" (without a convolution).
        model_channels: the number of sines and cosines of t.
        in_channels, out_channels: of the network.
        classes: how many; None: the network has none.
        scale_shift: whether the time scales and shifts the norms.
    """

    widths: tuple[int, ...]
    layers: int
    attended: tuple[bool, ...]
    resize: str
    model_channels: int
    in_channels: int
    out_channels: int
    classes: int | None
    scale_shift: bool


def build(
    path: Path, state: Mapping[str, Tensor], given: dict[str, Any], project: str, schedule: Schedule | None
) -> Checkpoint:
    """A checkpoint from the parameters of a file.

    Args: path: of the file, for messages; given: flags by name; project: one of `flags.UNETMODEL_PROJECTS`.
    Raises: ValueError: the file holds another network, or a flag differs from what the file shows.
    """
    layout = read_layout(path, state)
    flags = DEFAULTS[project] | _shown_by(layout, given) | given
    _check_flags(path, layout, given, flags, project)
    widths = [width for width, attended in zip(layout.widths, layout.attended, strict=True) if attended]
    config = _config(layout, flags) | heads(flags, [*widths, layout.widths[-1]])
    notes = _notes(path, given, project)
    steps = flags["diffusion_steps"]
    if steps < 1 or (flags["noise_schedule"] == "linear" and steps <= 20):
        raise ValueError(f"diffusion_steps is {steps}; want at least 1, and more than 20 for the linear noise_schedule")
    scale = 1000 / steps if flags["rescale_timesteps"] and steps != 1000 else None
    size, channels = config["sample_size"], layout.out_channels // (2 if flags["learn_sigma"] else 1)
    return Checkpoint(
        config,
        dict(_parameters(path, state, layout, flags, config)),
        _schedule(flags) if schedule is None else schedule,
        notes=notes,
        timestep_scale=scale,
        shape=(channels, size, size),
    )


def read_layout(path: Path, state: Mapping[str, Tensor]) -> Layout:
    """Raises: ValueError: these are not the parameters of a `UNetModel`."""
    count = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"output_blocks\.\d{1,3}\.", key)), default=-1)
    try:
        layers, sampling = _levels(state, count)
        each = layers + 1
        first = [level * each + 1 for level in range(count // each)]  # input_blocks with a level's first residual block
        widths = tuple(len(state[f"input_blocks.{i}.0.out_layers.0.weight"]) for i in first)
        attended = tuple(f"input_blocks.{i}.1.qkv.weight" in state for i in first)
        model_channels = state["time_embed.0.weight"].shape[1]
        columns = len(state["input_blocks.1.0.emb_layers.1.weight"])
        ends = state[FIRST].shape[1], len(state["out.2.weight"])
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        lack = (
            f"it has no parameter {error}"
            if isinstance(error, KeyError)
            else f"a parameter has another shape ({error})"
        )
        raise ValueError(
            f"{path} does not hold the UNetModel of guided-diffusion or improved-diffusion: {lack}"
        ) from error
    if not widths or not layers or count % each or columns not in (widths[0], 2 * widths[0]):
        raise ValueError(f"{path} does not hold a whole UNetModel of guided-diffusion or improved-diffusion")
    classes = len(state["label_emb.weight"]) if "label_emb.weight" in state else None
    return Layout(widths, layers, attended, sampling, model_channels, *ends, classes, columns == 2 * widths[0])


def _levels(state: Mapping[str, Tensor], count: int) -> tuple[int, str]:
    """(residual blocks of a level on the way down, what changes the size). Args: count: of output_blocks."""
    for i in range(1, count):
        if f"input_blocks.{i}.0.op.weight" in state:
            return i - 1, "conv"
        if not any(key.startswith(f"input_blocks.{i}.") for key in state):
            return i - 1, "pool"
    for i in range(count):
        if any(f"output_blocks.{i}.{j}.in_layers.0.weight" in state for j in (1, 2)):
            return i, "resnet"
    return count - 1, "conv"  # a single level


def _shown_by(layout: Layout, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a file shows, except those that depend on the size of the images."""
    images = layout.in_channels // (2 if _enlarges(given) else 1)
    return {
        "num_channels": layout.model_channels,
        "num_res_blocks": layout.layers,
        "class_cond": layout.classes is not None,
        "learn_sigma": layout.out_channels == 2 * images,
        "use_scale_shift_norm": layout.scale_shift,
        "resblock_updown": layout.resize == "resnet",
        "conv_resample": layout.resize != "pool",
    }


def _enlarges(given: Mapping[str, Any]) -> bool:
    """Whether a network is one of super-resolution, which takes the enlarged image, too."""
    return any(given.get(name) is not None for name in ("large_size", "small_size"))


def _check_flags(path: Path, layout: Layout, given: Mapping[str, Any], flags: Mapping[str, Any], project: str) -> None:
    """Check the flags that were given, against what the file shows."""
    shown = _shown_by(layout, given)
    if _enlarges(given) and layout.in_channels % 2:
        raise ValueError(
            f"large_size or small_size is given, but {path} holds a network that takes {layout.in_channels} channels, "
            "not twice those of an image; leave them out"
        )
    if len(layout.widths) == 1 or layout.resize == "resnet":
        del shown["conv_resample"]  # without effect
    if len(layout.widths) == 1:
        del shown["resblock_updown"]  # likewise
    images, rest = divmod(layout.out_channels, 2 if flags["learn_sigma"] else 1)
    possible = (2 * images,) if _enlarges(given) else (images, 2 * images)  # twice: super-resolution
    if not rest and layout.in_channels in possible:
        del shown["learn_sigma"]
    elif "learn_sigma" not in given:
        raise ValueError(
            f"{path} holds a network that takes {layout.in_channels} channels and returns {layout.out_channels}; want "
            "as many out as in (twice as many if learn_sigma is true), or half as many for super-resolution"
        )
    else:
        shown["learn_sigma"] = not flags["learn_sigma"]
    if layout.classes is not None and given.get("NUM_CLASSES") is not None:
        shown["NUM_CLASSES"] = layout.classes
    for name in shown.keys() & given.keys():
        if given[name] != shown[name]:
            raise ValueError(_mismatch(path, name, given[name], shown[name]))
    _check_levels(path, layout, given, flags["large_size"] or flags["image_size"], project)


def _check_levels(path: Path, layout: Layout, given: Mapping[str, Any], size: int, project: str) -> None:
    """Check the flags that say what each level is like. Args: size: of the images."""
    factors = [1 << level for level in range(len(layout.widths))]
    if size < 1 or size % factors[-1]:
        raise ValueError(
            f"image_size is {size}; want a multiple of {factors[-1]} for the {len(factors)} levels of {path}"
        )
    if "channel_mult" in given:
        mult = given["channel_mult"] or CHANNEL_MULT[project].get(size)
        if mult is None:
            raise ValueError(f"channel_mult is empty, and image_size {size} has no default; want one factor per level")
        if tuple(int(factor * layout.model_channels) for factor in mult) != layout.widths:
            of_file = [width / layout.model_channels for width in layout.widths]
            raise ValueError(_mismatch(path, "channel_mult", _listed(mult), _listed(of_file)))
    if "attention_resolutions" in given:
        attended = [factor for factor, attention in zip(factors, layout.attended, strict=True) if attention]
        wanted = {size // int(side) for side in given["attention_resolutions"] if side >= 1}
        if [factor for factor in factors if factor in wanted] != attended:
            text = f"{_listed(given['attention_resolutions'])} at image_size {size}"
            shown = _listed([size // factor for factor in attended]) or "none"
            raise ValueError(_mismatch(path, "attention_resolutions", text, shown))


def _mismatch(path: Path, name: str, given: Any, shown: Any) -> str:
    return f"{name} is {given}, but {path} holds a network with {name} {shown}; correct the flag or leave it out"


def _listed(numbers: Any) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _config(layout: Layout, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `UNet2D`, except for the heads."""
    resnet = layout.resize == "resnet"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    down, up = (
        tuple(f"Attn{kind}Block2D" if attended else name for attended in layout.attended)
        for kind, name in zip(("Down", "Up"), plain, strict=True)
    )
    samplers = {"conv": ("conv", "conv"), "resnet": ("resnet", "resnet"), "pool": ("pool", "nearest")}[layout.resize]
    config = {
        "sample_size": flags["large_size"] or flags["image_size"],
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": layout.widths,
        "layers_per_block": layout.layers,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "downsample_type": samplers[0],
        "upsample_type": samplers[1],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "dropout": flags["dropout"],
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
        "attn_norm_num_groups": GROUPS if layout.scale_shift else None,
        "num_class_embeds": layout.classes,
    }
    if layout.widths[0] != layout.model_channels:
        config |= {"time_embedding_dim": 4 * layout.model_channels, "time_proj_dim": layout.model_channels}
    return config


def _schedule(flags: Mapping[str, Any]) -> Schedule:
    steps, name = flags["diffusion_steps"], one_of("noise_schedule", flags["noise_schedule"], ("linear", "cosine"))
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if name == "linear":
        betas = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    return Schedule(
        num_train_timesteps=steps,
        **betas,
        variance_type="learned_range" if flags["learn_sigma"] else fixed,
        prediction_type="sample" if flags["predict_xstart"] else "epsilon",
        timestep_spacing="leading" if flags["timestep_respacing"].startswith("ddim") else "linspace",
        clip_sample=True,
        use_clipped_model_output=True,
    )


def _parameters(
    path: Path, state: Mapping[str, Tensor], layout: Layout, flags: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names that they have in a `UNet2D`."""
    places, left = dict(_places(layout)), set(state)
    new_order = flags["use_new_attention_order"]
    for key, value in state.items():
        place = next((there for there in _prefixes(key) if there in places), None)
        if place is None:
            continue
        rest, leaf = key[len(place) + 1 :].rpartition(".")[::2]
        name = places[place]
        if rest == "qkv":
            if value.ndim == 0:
                raise ValueError(f"{path}: {key} is a number; want rows of queries, keys and values")
            width = len(value) // 3
            count = config.get("num_attention_heads") or width // config["attention_head_dim"]
            count = count if isinstance(count, int) else count[name.startswith("up_blocks")]
            if not count or len(value) % (3 * count):
                heads_text = (
                    f"{3 * count}: queries, keys and values of {count} heads" if count else "attention_head_dim"
                )
                raise ValueError(f"{path}: {key} has {len(value)} rows; want a multiple of {heads_text}")
            for part, rows in zip("qkv", _split_heads(value, count, new_order), strict=True):
                yield f"{name}.to_{part}.{leaf}", rows
        elif rest in ("norm", "proj_out"):
            inner = "group_norm" if rest == "norm" else "to_out.0"
            yield f"{name}.{inner}.{leaf}", value.flatten(1) if rest == "proj_out" and leaf == "weight" else value
        elif rest in ("", "op", "conv"):
            yield f"{name}{'.conv' * bool(rest)}.{leaf}", value
        elif rest in _OF_RESNET:
            yield f"{name}.{_OF_RESNET[rest]}.{leaf}", value
        else:
            continue
        left.discard(key)
    if left:
        raise ValueError(f"{path} holds parameters that no UNetModel of this layout has ({first_few(left)})")


def _places(layout: Layout) -> Iterator[tuple[str, str]]:
    """(the place of a part in a UNetModel, its place in a `UNet2D`)."""
    yield from _AROUND.items()
    levels, each = len(layout.widths), layout.layers + 1
    for level in range(levels):
        for i in range(layout.layers):
            block = f"input_blocks.{level * each + 1 + i}"
            yield f"{block}.0", f"down_blocks.{level}.resnets.{i}"
            yield f"{block}.1", f"down_blocks.{level}.attentions.{i}"
        if level + 1 < levels:
            yield f"input_blocks.{(level + 1) * each}.0", f"down_blocks.{level}.downsamplers.0"
        attended = layout.attended[levels - 1 - level]
        for i in range(each):
            block = f"output_blocks.{level * each + i}"
            yield f"{block}.0", f"up_blocks.{level}.resnets.{i}"
            if attended:
                yield f"{block}.1", f"up_blocks.{level}.attentions.{i}"
        if level + 1 < levels:
            yield f"output_blocks.{(level + 1) * each - 1}.{1 + attended}", f"up_blocks.{level}.upsamplers.0"


def _prefixes(key: str) -> Iterator[str]:
    """What may be the place of a parameter's part: its name without the last one, two or three words."""
    words = key.split(".")
    yield from (".".join(words[:-count]) for count in (1, 2, 3))


def _split_heads(rows: Tensor, count: int, new_order: bool) -> Iterator[Tensor]:
    """The rows of queries, keys and values, which are [q, k, v][head] in the new order, else [head][q, k, v]."""
    width = len(rows) // 3
    if rows.ndim > 1:
        rows = rows.flatten(1)  # a convolution with a kernel of 1
    if new_order:
        yield from rows.chunk(3)
    else:
        yield from (part.reshape(width, *rows.shape[1:]) for part in rows.unflatten(0, (count, 3, -1)).unbind(1))


def _notes(path: Path, given: Mapping[str, Any], project: str) -> tuple[str, ...]:
    hidden = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "noise_schedule",
              "diffusion_steps")  # fmt: skip
    notes: tuple[str, ...] = ()
    if "," in (respacing := given.get("timestep_respacing", "")):
        notes = (f"{path}: timestep_respacing {respacing} is not kept; list the timesteps when you sample",)
    if any(name in given for name in (*hidden, "large_size")):
        return notes
    defaults = DEFAULTS[project]
    listed = ", ".join(f"{name} {defaults[name]}" for name in hidden)
    return (
        *notes,
        f"{path} does not say which flags it was trained with, so the defaults of {project} were assumed ({listed}); "
        "pass the flags that differ, or put them into a JSON file of the same name beside it",
    )
