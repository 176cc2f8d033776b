"""The 1-D U-Nets of diffusion policies, of huggingface/lerobot and real-stanford/diffusion_policy.

lerobot writes a folder of `config.json` and `model.safetensors`, where the network is `diffusion.unet.*`.
diffusion_policy has the same network under other names. Its own `.ckpt` holds Python objects and is refused; a state
dict of tensors alone can be read. The shapes of the weights show the network, except for n_groups. That and the noise
schedule are in `config.json`, or come from keywords with lerobot's names, or are the defaults of both projects.

The network is a `UNet1D`. Its x is channels-first, [N, action, horizon], where both projects have [N, horizon, action].
The policy's encoder and its statistics are not read: global_cond is what the encoder returns for the observations, and
a sample is a sequence of normalised actions.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.files import CONFIG, SUFFIXES, check_tensors
from fastddpm.checkpoints.parameters import first_few, load_into
from fastddpm.checkpoints.reading import named, read_json
from fastddpm.core.checks import one_of, shown, whole
from fastddpm.core.schedule import Schedule
from fastddpm.networks.unet1d import UNet1D

POLICY_PROJECTS = ("lerobot", "diffusion_policy")
FIRST = "diffusion_step_encoder.1.weight"  # which every such network has
WEIGHTS = "model.safetensors"
SUBFOLDER = "pretrained_model"  # of a checkpoint that lerobot's training wrote
SCHEDULE = {  # options of the noise schedule, with the defaults of both projects
    "num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0,
}  # fmt: skip
DEFAULTS = {**SCHEDULE, "n_groups": 8}  # of all that the file does not show, but that decides the samples
OPTIONS = (
    *(*DEFAULTS, "horizon", "noise_scheduler_type", "num_inference_steps"),
    *("down_dims", "kernel_size", "diffusion_step_embed_dim", "use_film_scale_modulation"),
)
SCHEDULERS = ("DDPM", "DDIM")
RANGES = {"MIN_MAX": "to -1 ... 1", "MEAN_STD": "to mean 0 and standard deviation 1"}
_STATISTICS = re.compile(r"normali[sz]|stat(istic)?s$", re.IGNORECASE)  # in the name of an option
_BLOCK = re.compile(r"\.blocks\.([01])\.")  # of diffusion_policy
_RESIZING = re.compile(r"((?:down|up)_modules\.\d+\.2)\.conv\.")  # of diffusion_policy
_PLACEHOLDER = "_dummy_variable"  # a parameter without use in modules of diffusion_policy


class Found(NamedTuple):
    """The network among the content of a file.

    Attributes:
        parameters: those of the network, as they are named there, without their common prefix.
        project: one of POLICY_PROJECTS.
        others: the other parts of the policy, such as "diffusion.rgb_encoder".
    """

    parameters: dict[str, Any]
    project: str
    others: tuple[str, ...]


def find(content: Mapping[str, Any]) -> Found | None:
    """The network among the content of a file; None: there is none. Averages of the weights are preferred."""
    states = {"": content, **content}
    if isinstance(nested := content.get("state_dicts"), Mapping):
        states |= {f"state_dicts.{name}": state for name, state in nested.items()}
    found = []
    for place, state in states.items():
        names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
        prefixes = [name.removesuffix(FIRST) for name in names if name == FIRST or name.endswith(f".{FIRST}")]
        found += [(f"{place}.{prefix}".lower(), prefix, state, names) for prefix in prefixes]
    if not found:
        return None
    _, prefix, state, names = next((item for item in found if "ema" in item[0]), found[0])
    own = {name.removeprefix(prefix): state[name] for name in names if name.startswith(prefix)}
    others = {_part(name, prefix) for name in names if not name.startswith(prefix) and _PLACEHOLDER not in name}
    return Found(own, POLICY_PROJECTS[any(map(_BLOCK.search, own))], tuple(sorted(others)))


def _part(name: str, prefix: str) -> str:
    """The part of a policy, beside the one with this prefix, that a parameter belongs to."""
    path, shared = name.split("."), 0
    for own, other in zip(prefix.split("."), path[:-1], strict=False):
        if own != other:
            break
        shared += 1
    return ".".join(path[: shared + 1])


def is_policy(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a diffusion policy of lerobot."""
    old = "type" not in config and {"noise_scheduler_type", "down_dims"} <= config.keys()  # of 2024
    return old or config.get("type") == "diffusion"


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder of lerobot; None: it is none.

    Raises: ValueError: its policy is of another kind, or has no weights.
    """
    for place in (folder, folder / SUBFOLDER):
        names = os.listdir(place) if os.path.isdir(place) else []
        config = read_json(place / CONFIG) if CONFIG in names else {}
        if is_policy(config):
            if WEIGHTS in names:
                return place / WEIGHTS
            if not any(name.endswith(SUFFIXES) for name in names):
                raise ValueError(
                    f"{place} holds the configuration of a lerobot policy, but no {WEIGHTS}; copy it there"
                )
        elif "n_obs_steps" in config and isinstance(config.get("type"), str):
            kind = shown(config["type"])
            raise ValueError(f"{place} holds a policy of lerobot of type {kind}; only 'diffusion' is supported")
        elif WEIGHTS in names and not config and not any(name.endswith(SUFFIXES) for name in {*names} - {WEIGHTS}):
            return place / WEIGHTS
    return None


def build(
    path: Path,
    found: Found,
    options: Mapping[str, Any],
    keywords: Mapping[str, Any],
    schedule: Schedule | None,
) -> Checkpoint:
    """A checkpoint from the network in a file.

    Args: options: those in the JSON file beside it; keywords: those of the call, which come first.
    Raises: ValueError: the file holds another network, an option differs from what it shows, is unknown or has a value
        that it cannot have, or is for something that is not part of the network.
    """
    _check_names(keywords)
    given = {k: v for k, v in {**options, **keywords}.items() if k in OPTIONS and v is not None}
    parameters = check_tensors(path, _with_our_names(path, found.parameters))
    shape = _shown_by(path, parameters)
    _check_options(path, shape, given, options)
    horizon = _checked_horizon(path, given.get("horizon"), len(shape["down_dims"]))
    network = _network(path, parameters, {**shape, "n_groups": given.get("n_groups", DEFAULTS["n_groups"])}, horizon)
    notes = _notes_on_others(path, found, options, shape["global_cond_dim"])
    if schedule is None:
        schedule, defaults = _schedule(path, {**SCHEDULE, **given}), DEFAULTS
        notes += _notes_on_sampling(path, given, schedule.num_train_timesteps)
    else:
        defaults = {name: value for name, value in DEFAULTS.items() if name not in SCHEDULE}
    if assumed := [f"{name} {value}" for name, value in defaults.items() if name not in given]:
        notes += (
            f"{path} does not show all options, so the defaults of {found.project} were assumed: {', '.join(assumed)}; "
            "if the policy was trained otherwise, pass them by these names",
        )
    if not is_policy(options) and (ignored := options.keys() - {*OPTIONS}):
        notes += (f"entries beside {path} that are not options of a policy were ignored: {first_few(ignored)}",)
    of_sample = None if horizon is None else (shape["input_dim"], horizon)
    return Checkpoint({}, {}, schedule, notes=notes, shape=of_sample, network=network)


def is_option(name: str) -> bool:
    """Whether this is an option of a policy. Raises: ValueError: it asks for statistics."""
    if _STATISTICS.search(name):
        raise ValueError(
            f"there is no option {shown(name)}, because normalisation is not part of the network; normalise the "
            "observations and unnormalise the samples with the policy's statistics, as the policy does"
        )
    return name in OPTIONS


def _check_names(keywords: Mapping[str, Any]) -> None:
    """Raises: ValueError: a name is that of no option."""
    for name in keywords:
        if not is_option(name):
            raise ValueError(
                f"there is no option {shown(name)}; the options of a diffusion policy are {', '.join(OPTIONS)}"
            )


def _with_our_names(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters under their names in a `UNet1D`. Raises: ValueError: two get the same name."""
    if any(name.startswith("local_cond_encoder.") for name in parameters):
        raise ValueError(
            f"{path} holds a network with local conditioning (local_cond_encoder), which is not supported; want one "
            "that is conditioned by global_cond alone"
        )
    ours = {name: _BLOCK.sub(lambda found: f".conv{int(found[1]) + 1}.", name) for name in parameters}
    ours = {name: _RESIZING.sub(r"\1.", new) for name, new in ours.items()}
    if len(set(ours.values())) < len(ours):
        twice = [name for name, new in ours.items() if name != new and new in parameters]
        raise ValueError(
            f"{path} holds the same parameters under the names of diffusion_policy and of lerobot "
            f"({first_few(twice)}); want one set of names"
        )
    return {ours[name]: value for name, value in parameters.items()}


def _shown_by(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of a `UNet1D` that a file shows. Raises: ValueError: it does not hold such a network."""
    try:
        embed = parameters[FIRST].shape[1]
        first = parameters["down_modules.0.0.conv1.block.0.weight"]  # [width, input_dim, kernel_size]
        rows, columns = parameters["down_modules.0.0.cond_encoder.1.weight"].shape
        widths: list[int] = []
        while (name := f"down_modules.{len(widths)}.0.conv1.block.0.weight") in parameters:
            widths.append(len(parameters[name]))
        return {
            "input_dim": first.shape[1],
            "global_cond_dim": columns - embed or None,
            "diffusion_step_embed_dim": embed,
            "down_dims": tuple(widths),
            "kernel_size": first.shape[2],
            "cond_predict_scale": rows == 2 * widths[0],
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        misfit = "it has no parameter" if isinstance(error, KeyError) else "a parameter has an unexpected shape:"
        raise ValueError(f"{path} does not hold the 1-D U-Net of a diffusion policy: {misfit} {error}") from error


def _check_options(path: Path, shape: Mapping[str, Any], given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check the options that the file shows. Raises: ValueError: one differs."""
    shows = {name: shape[name] for name in ("down_dims", "kernel_size", "diffusion_step_embed_dim")}
    shows["use_film_scale_modulation"] = shape["cond_predict_scale"]
    for name in shows.keys() & given.keys():
        value = tuple(given[name]) if isinstance(given[name], list | tuple) else given[name]
        if value != shows[name]:
            raise ValueError(_mismatch(path, name, shown(value), shows[name]))
    features = options.get("output_features", options.get("output_shapes"))  # the latter in 2024
    action = features.get("action") if isinstance(features, Mapping) else None
    value = action.get("shape") if isinstance(action, Mapping) else action
    if value is not None and value != [shape["input_dim"]]:
        raise ValueError(_mismatch(path, "output_features.action.shape", shown(value), [shape["input_dim"]]))


def _checked_horizon(path: Path, horizon: Any, levels: int) -> int | None:
    """Raises: ValueError: a network of so many levels cannot take sequences of this length."""
    factor = 1 << (levels - 1)
    if horizon is not None and whole("horizon", horizon, 1) % factor:
        raise ValueError(f"horizon is {horizon}; want a multiple of {factor} for the {levels} levels of {path}")
    return horizon


def _mismatch(path: Path, name: str, given: str, shows: Any) -> str:
    return f"{name} is {given}, but {path} holds a network with {name} {shows}; correct the option or leave it out"


def _network(path: Path, parameters: Mapping[str, Tensor], options: dict[str, Any], horizon: int | None) -> UNet1D:
    """The network with its parameters, on the CPU."""
    try:
        with torch.device("meta"):
            network = UNet1D(**options, sample_size=horizon)
        # before memory is allocated, in which a damaged file could ask for a network of any size
        load_into(network, {name: value.to("meta") for name, value in parameters.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_into(network.to_empty(device="cpu"), parameters)
    return network.eval()


def _schedule(path: Path, given: Mapping[str, Any]) -> Schedule:
    """The schedule of diffusers' DDPMScheduler or DDIMScheduler, as the policies build them."""
    try:
        return Schedule(
            **{name: given[name] for name in SCHEDULE},
            variance_type="fixed_small",
            timestep_spacing="leading",
            steps_offset=0,
            set_alpha_to_one=True,
            use_clipped_model_output=False,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _notes_on_sampling(path: Path, given: Mapping[str, Any], T: int) -> tuple[str, ...]:
    """A note if the policy does not sample as `Sampler` does by default."""
    kind = one_of("noise_scheduler_type", given.get("noise_scheduler_type", "DDPM"), SCHEDULERS)
    steps = whole("num_inference_steps", given.get("num_inference_steps", T), 1, T)
    arguments = [f"steps={steps}"] * (steps != T) + ['sampler="ddim"'] * (kind == "DDIM")
    if not arguments:
        return ()
    return (f"the policy of {path} takes {steps} steps of {kind}: pass {', '.join(arguments)} to draw as it does",)


def _notes_on_others(
    path: Path, found: Found, options: Mapping[str, Any], global_cond_dim: int | None
) -> tuple[str, ...]:
    """A note about what is the user's: the encoder of the observations, and the normalisation."""
    beside = [name for name in os.listdir(path.parent) if re.match(r"policy_(pre|post)processor.*\.safetensors", name)]
    encoders = [part for part in found.others if "encoder" in part]
    statistics = [part for part in found.others if "normali" in part and part not in encoders]
    rest = [part for part in found.others if part not in (*encoders, *statistics)]
    kinds = (("vision encoder", encoders), ("normalisation statistics", statistics + beside), ("other parts", rest))
    parts = [f"{kind} ({first_few(names, 4)})" for kind, names in kinds if names]
    mapping = options.get("normalization_mapping", options.get("output_normalization_modes"))
    modes = mapping if isinstance(mapping, Mapping) else {}
    mode = str(modes.get("ACTION", modes.get("action", ""))).upper()
    if not parts:
        return ()
    text = f"{path} also holds the policy's {' and '.join(parts)}, which are not part of the network and not loaded"
    if encoders or global_cond_dim is not None:
        text += "; global_cond is what the policy's encoder returns for the observations"
    if mode != "IDENTITY":
        known = f" ({named(mode)}: {RANGES[mode]})" if mode in RANGES else ""
        text += f"; the samples are normalised actions{known}: unnormalise them with the policy's statistics"
    return (text,)
