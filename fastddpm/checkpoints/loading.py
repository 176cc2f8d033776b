"""Loads a checkpoint of any format: finds or downloads it, recognises its format and calls that format's module."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.checkpoints import diffusers, files, guided_diffusion, lerobot, lucidrains
from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.flags import OF_ONE_FORMAT, UNETMODEL_PROJECTS, check_names, parse_flags
from fastddpm.checkpoints.reading import named
from fastddpm.checkpoints.shipped import SHIPPED_MODELS, shipped_model
from fastddpm.checkpoints.weights import WEIGHTS
from fastddpm.core.checks import checked_call, one_of, shown
from fastddpm.core.schedule import Schedule

FORMATS = ("diffusers", *UNETMODEL_PROJECTS, "lucidrains", *lerobot.POLICY_PROJECTS)
_OF_DIFFUSERS = ("model_index.json", "unet", "unet_ema", "scheduler", "scheduler_config.json")
_ARGUMENTS = (  # of this function and of `Sampler.from_pretrained`
    *("variant", "schedule", "format", "shape", "device", "precision", "engine", "batch_invariant"),
    *("timestep_scale", "value_range"),
)
_FILE = "a .pt file of guided-diffusion, improved-diffusion, denoising-diffusion-pytorch or diffusion_policy"


@checked_call
def load(
    source: str | os.PathLike[str],
    *,
    variant: str | None = None,
    schedule: Schedule | None = None,
    format: str = "auto",
    **config: Any,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        source: a folder; or one of SHIPPED_MODELS, which are bundled; or the id of a model on
            the Hugging Face hub ("google/ddpm-cifar10-32"), which is downloaded once; or a file of weights of another
            project, such as `256x256_diffusion.pt` or `model-100.pt`, or the folder that holds it; or a diffusion
            policy of lerobot, its folder or hub id.
        variant: the variant of the weights, such as "fp16" for diffusion_pytorch_model.fp16.safetensors.
        schedule: use this one and not that of the checkpoint, which then needs none.
        format: one of FORMATS; "auto": recognise it.
        config: how a file of weights was made, under the original names: the flags of guided-diffusion's and
            improved-diffusion's scripts, the options of lucidrains' Unet and GaussianDiffusion, or those of lerobot's
            DiffusionConfig. They come before those in the JSON file beside it, which has the file's name or is called
            config.json.
    Raises: ValueError: there is no checkpoint, or one of its files is missing, damaged or for another class; or an
        option is unknown, or differs from what the file shows.
    """
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not path or not isinstance(path, str):
        raise ValueError(f"the checkpoint is {shown(source)}; {diffusers.WANTED}, or {_FILE}")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}; want a Schedule, or None for the checkpoint's")
    one_of("format", format, ("auto", *FORMATS))
    place, notes = _file_of_weights(path, format)
    folder = Path(path)
    if place is None:
        _check_no_options(config, of_hub=not os.path.isdir(path) and path not in SHIPPED_MODELS)
        if not os.path.isdir(path):
            folder = shipped_model(path) if path in SHIPPED_MODELS else diffusers.download(path, variant)
            place = None if format == "diffusers" else lerobot.weights_in(folder)
    if place is None:
        _check_no_options(config)
        return diffusers.read(folder, variant, schedule)
    if variant is not None:
        raise ValueError(f"variant is {shown(variant)}, but {place} is one file; leave it out")
    return _load_file(place, format, config, schedule, notes)


def _check_no_options(config: Mapping[str, Any], *, of_hub: bool = False) -> None:
    """Raises: ValueError: there are options, which a checkpoint of diffusers does not need.

    Args: of_hub: it is not downloaded yet, so it may be a policy of lerobot, which has options.
    """
    for unknown in config:
        if of_hub and lerobot.is_option(unknown):
            continue
        alike = difflib.get_close_matches(unknown, _ARGUMENTS, 1)
        hint = f"did you mean '{alike[0]}'?" if alike else "a checkpoint of diffusers needs none; leave it out"
        raise ValueError(f"there is no argument {shown(unknown)}; {hint}")


def _file_of_weights(path: str, format: str) -> tuple[Path | None, tuple[str, ...]]:
    """(the file of weights that a source stands for, notes); None: the source is a checkpoint of diffusers."""
    place = Path(path)
    if format == "diffusers":
        return None, ()
    is_file = os.path.lexists(place) and not os.path.isdir(place)
    if place.suffix in files.SUFFIXES and is_file:
        return place, ()
    if place.suffix in files.SUFFIXES[:3] and not os.path.isdir(place):
        raise ValueError(f"there is no file {named(path)}; want {_FILE}, or {diffusers.WANTED.removeprefix('want ')}")
    if not os.path.isdir(place) or any(os.path.lexists(place / name) for name in _OF_DIFFUSERS):
        return None, ()
    if any(name.startswith(WEIGHTS) for name in os.listdir(place)):
        return None, ()
    if (policy := lerobot.weights_in(place)) is not None:
        return policy, ()
    found, notes = files.weights_in(place)
    if found is None and not os.path.lexists(place / files.CONFIG):
        raise ValueError(
            f"{place} is not a DDPM checkpoint: it has no unet/{files.CONFIG} and no {files.CONFIG}, as diffusers "
            f"writes them, and no {_FILE.removeprefix('a ')}"
        )
    return found, notes


def _load_file(
    path: Path,
    format: str,
    config: Mapping[str, Any],
    schedule: Schedule | None,
    notes: tuple[str, ...],
) -> Checkpoint:
    content = files.read_content(path)
    options, place = files.read_options(path)
    state = files.find_state(content, guided_diffusion.FIRST)
    if files.find_state(content, "first_stage_model.decoder.conv_in.weight"):
        raise ValueError(f"{path} holds a latent diffusion model with its first stage, which is not supported")
    if format in ("auto", "lucidrains") and lucidrains.is_lucidrains(content):
        known = {*lucidrains.UNET, *lucidrains.DIFFUSION, *lucidrains.SECTIONS}
        beside = {name: value for name, value in options.items() if name in known}
        found = lucidrains.build(path, content, {**beside, **config}, schedule)
    elif format in ("auto", *UNETMODEL_PROJECTS) and state is not None:
        found = _of_unetmodel(path, state, format, options, place, config, schedule)
    elif (policy := lerobot.find(content)) is not None and format in ("auto", policy.project):
        found = lerobot.build(path, policy, options, config, schedule)
    else:
        wanted = (
            f"{guided_diffusion.FIRST} (guided-diffusion, improved-diffusion), {lerobot.FIRST} (lerobot, "
            "diffusion_policy) or ema with model.init_conv.weight"
        )
        raise ValueError(
            f"{path} is not a checkpoint of {'a known format' if format == 'auto' else format}: it has no {wanted} "
            "(lucidrains); want one of those files, or the folder that diffusers wrote"
        )
    return found.with_notes(notes)


def _of_unetmodel(
    path: Path,
    state: tuple[dict[str, Any], str],
    format: str,
    options: Mapping[str, Any],
    place: Path | None,
    config: Mapping[str, Any],
    schedule: Schedule | None,
) -> Checkpoint:
    """A checkpoint of guided-diffusion or improved-diffusion. Args: options: those in the file `place`."""
    in_file = files.section(options, "flags") if "flags" in options else options
    if options.get("NUM_CLASSES") is not None:
        in_file = {**in_file, "NUM_CLASSES": options["NUM_CLASSES"]}
    beside, ignored = parse_flags(in_file, str(place))
    check_names(list(config))
    given = beside | parse_flags(config, "a flag")[0]
    project = _project(format, options, {**in_file, **config})
    notes: tuple[str, ...] = ()
    if ignored:
        names = ", ".join(map(shown, ignored[:5]))
        notes += (f"{place} has entries that are not flags of {project} and were ignored: {names}",)
    if state[1]:
        notes += (f"{path} holds the network under {shown(state[1])}",)
    found = guided_diffusion.build(path, files.check_tensors(path, state[0]), given, project, schedule)
    return found.with_notes(notes)


def _project(format: str, options: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """Which of the two projects a UNetModel is from: the file shows nothing, but some flags belong to one of them."""
    if format != "auto":
        return format
    named = str(options.get("project", ""))
    for project in UNETMODEL_PROJECTS:
        if project in named:
            return project
    guided, improved = (bool(OF_ONE_FORMAT[project] & flags.keys()) for project in UNETMODEL_PROJECTS)
    steps = str(flags.get("diffusion_steps", 1000))
    if not guided and not improved and steps != "1000" and "rescale_timesteps" not in flags:
        raise ValueError(
            f"diffusion_steps is {shown(steps)[1:-1]}, for which the network of guided-diffusion gets t, but that of "
            "improved-diffusion t * 1000 / T, and nothing tells whose it is; pass format= or rescale_timesteps="
        )
    return UNETMODEL_PROJECTS[improved and not guided]
