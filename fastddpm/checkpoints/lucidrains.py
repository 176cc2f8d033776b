"""Checkpoints of lucidrains' denoising-diffusion-pytorch: `model-N.pt`, as its Trainer writes it.

The file holds an average of the weights (`ema`), the weights themselves (`model`), and the noise schedule. The network
is the package's own `Unet`, which the installed package builds; nearly all of its options show in the file. What does
not show (the size of the images) comes from keywords, or from a JSON file beside it with sections `unet` and
`diffusion`.
"""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.files import check_tensors, section
from fastddpm.checkpoints.parameters import load_into
from fastddpm.checkpoints.reading import in_one_line
from fastddpm.core.checks import one_of, real, shown, whole
from fastddpm.core.schedule import Schedule

PACKAGE = "denoising_diffusion_pytorch"
UNET = {  # options of Unet, with their defaults
    "dim": None, "init_dim": None, "out_dim": None, "dim_mults": (1, 2, 4, 8), "channels": 3, "self_condition": False,
    "learned_variance": False, "learned_sinusoidal_cond": False, "random_fourier_features": False,
    "learned_sinusoidal_dim": 16, "sinusoidal_pos_emb_theta": 10000, "dropout": 0.0, "attn_dim_head": 32,
    "attn_heads": 4, "full_attn": None, "flash_attn": False,
}  # fmt: skip
DIFFUSION = {  # options of GaussianDiffusion
    "image_size", "timesteps", "sampling_timesteps", "objective", "beta_schedule", "schedule_fn_kwargs",
    "ddim_sampling_eta", "auto_normalize", "offset_noise_strength", "min_snr_loss_weight", "min_snr_gamma",
    "immiscible",
}  # fmt: skip
SECTIONS = ("unet", "diffusion", "unet_class", "diffusion_class")
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")


def is_lucidrains(content: Mapping[str, Any]) -> bool:
    """Whether a file is one of this project's."""
    return any(_with_prefix(content, *place) for place in _PLACES)


_PLACES = (("ema", "ema_model."), ("model", ""))  # of the diffusion's state, the best first


def _with_prefix(content: Mapping[str, Any], key: str, prefix: str) -> dict[str, Any]:
    """The state of a GaussianDiffusion among the content of a file; empty: there is none."""
    state = content.get(key)
    if not isinstance(state, Mapping) or f"{prefix}model.init_conv.weight" not in state:
        return {}
    names = [name for name in state if isinstance(name, str) and name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name] for name in names}


def build(path: Path, content: Mapping[str, Any], given: Mapping[str, Any], schedule: Schedule | None) -> Checkpoint:
    """A checkpoint from the content of a file.

    Args: given: options of Unet and GaussianDiffusion by name, also in sections `unet` and `diffusion`.
    Raises: ValueError: the network or its training has something that is not supported, an option differs from what
        the file shows, or the package is not installed or does not have this network.
    """
    try:
        return _build(path, content, given, schedule)
    except KeyError as error:
        raise ValueError(f"{path} does not hold the whole state of a GaussianDiffusion: it has no {error}") from error


def _build(path: Path, content: Mapping[str, Any], given: Mapping[str, Any], schedule: Schedule | None) -> Checkpoint:
    unet, diffusion = _sorted_options(given)
    found = [(state, key) for key, prefix in _PLACES if (state := _with_prefix(content, key, prefix))]
    state = check_tensors(path, found[0][0])
    notes: tuple[str, ...] = (
        () if found[0][1] == "ema" else (f"{path} has no average of the weights; the last ones were read",)
    )
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    options = _unet_options(path, weights, unet)
    if schedule is None:
        schedule, assumed = _schedule(path, state, diffusion)
        notes += assumed
    if diffusion.get("auto_normalize") is False:
        notes += (f"{path} was trained without auto_normalize: its samples are in the range of its own data",)
    size = diffusion.get("image_size")
    sides = size if isinstance(size, list | tuple) else (size, size)
    if size is not None and len(sides) != 2:
        raise ValueError(f"image_size is {shown(size)}; want a whole number, or height and width")
    shape = None if size is None else (options["channels"], *(whole("image_size", side, 1) for side in sides))
    return Checkpoint({}, {}, schedule, notes=notes, shape=shape, network=_network(path, options, weights))


def _sorted_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of Unet, options of GaussianDiffusion). Raises: ValueError: an option is unknown or not supported."""
    for name, want in (("unet_class", "Unet"), ("diffusion_class", "GaussianDiffusion")):
        if given.get(name, want) != want:
            raise ValueError(f"{name} is {shown(given[name])}; of lucidrains' networks only {want} is supported")
    flat = {name: value for name, value in given.items() if name in UNET or name in DIFFUSION}
    sections = [section(given, name) for name in ("unet", "diffusion")]
    for name in (*sections[1], *given):  # options in the section `unet` are checked by the package
        one_of("an option of lucidrains", name, (*UNET, *DIFFUSION, *SECTIONS))
    unet, diffusion = ({**options, **flat} for options in sections)
    for name, reason in (
        ("self_condition", "the network is given its own last prediction"),
        ("learned_variance", "LearnedGaussianDiffusion learns the variances in a way of its own"),
    ):
        if unet.get(name):
            raise ValueError(f"{name} is True, which is not supported: {reason}")
    return {k: v for k, v in unet.items() if k not in DIFFUSION}, {k: v for k, v in diffusion.items() if k in DIFFUSION}


def _unet_options(path: Path, weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of Unet, which the file shows.

    Raises: ValueError: one that was given differs, or is not supported.
    """
    first, last = weights["init_conv.weight"], weights.get("final_conv.weight")
    if first.ndim != 4 or last is None or "time_mlp.1.weight" not in weights:
        raise ValueError(f"{path} does not hold lucidrains' Unet for images, the only one of its networks supported")
    dim, channels = len(weights["time_mlp.1.weight"]) // 4, first.shape[1]
    if len(last) != channels:
        raise ValueError(
            f"{path} holds a network of {channels} channels in and {len(last)} out: self_condition and "
            "learned_variance are not supported"
        )
    widths: list[int] = []
    full, heads, head_dims = list[bool](), list[int](), list[int]()
    while (attention := f"downs.{len(widths)}.2.") + "to_qkv.weight" in weights:
        names = (f"downs.{len(widths)}.3.weight", f"downs.{len(widths)}.3.1.weight")
        widths.append(len(next(weights[name] for name in names if name in weights)))
        full.append(f"{attention}to_out.weight" in weights)
        memory = weights[f"{attention}mem_kv"].shape  # [2, heads, 4, head_dim], or of linear attention the transpose
        heads.append(memory[1])
        head_dims.append(memory[3 if full[-1] else 2])
    if not widths or any(width % dim for width in widths):
        raise ValueError(f"{path} does not hold the Unet of {PACKAGE} 2.x, the only version supported")
    shows = {
        "dim": dim, "init_dim": len(first), "channels": channels, "dim_mults": tuple(width // dim for width in widths),
        "full_attn": tuple(full), "attn_heads": tuple(heads), "attn_dim_head": tuple(head_dims),
    }  # fmt: skip
    for name in shows.keys() & given.keys():
        value = same = given[name]
        if name == "full_attn" and not value:
            same = (*[False] * (len(widths) - 1), True)
        elif isinstance(value, list | tuple):
            same = tuple(value)
        elif name in ("full_attn", "attn_heads", "attn_dim_head"):
            same = (value,) * len(widths)
        if value is not None and same != shows[name]:
            raise ValueError(
                f"{name} is {shown(value)}, but {path} holds a network with {name} {shows[name]}; correct the option, "
                "or leave it out"
            )
    rest = {name: value for name, value in given.items() if name not in shows and value is not None}
    if "time_mlp.0.weights" in weights:
        rest["learned_sinusoidal_dim"] = 2 * len(weights["time_mlp.0.weights"])
        rest["learned_sinusoidal_cond"] = not rest.get("random_fourier_features")
    return {**rest, **shows}


def _network(path: Path, options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """The network, built by the package."""
    try:
        package = importlib.import_module(PACKAGE)
        network = package.Unet(**options)
    except ImportError as error:
        raise ValueError(
            f"{path} holds the network of another package, which cannot be imported ({in_one_line(error)}); "
            "pip install denoising-diffusion-pytorch"
        ) from error
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"the installed {PACKAGE} does not build the network of {path}: {in_one_line(error)}; install the version "
            "that trained it"
        ) from error
    load_into(network, weights)
    return network.eval()


def _schedule(path: Path, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[Schedule, tuple[str, ...]]:
    """(the schedule, notes), from the options and from what the file shows."""
    saved, steps = state["betas"].double(), len(state["betas"])
    if given.get("timesteps", steps) != steps:
        raise ValueError(
            f"timesteps is {given['timesteps']}, but {path} holds a schedule of {steps} timesteps; correct the option "
            "or leave it out"
        )
    name, options = given.get("beta_schedule"), section({"schedule_fn_kwargs": {}, **given}, "schedule_fn_kwargs")
    if name is not None:
        one_of("beta_schedule", name, BETA_SCHEDULES)
    names = BETA_SCHEDULES if name is None else (name,)
    betas = {each: named_betas(each, steps, **options if each == name else {}) for each in names}
    close = [each for each in names if torch.allclose(betas[each], saved, rtol=1e-5, atol=1e-7)]
    notes: tuple[str, ...] = ()
    if close:
        used = betas[close[0]]
    elif name is None:
        used, notes = (
            saved,
            (f"{path}: its betas match no known beta_schedule, so they were used as they are stored, in float32",),
        )
    else:
        raise ValueError(f"beta_schedule is {name} with {options}, but {path} holds other betas; correct the options")
    objective, assumed = _objective(path, state, used, given)
    return Schedule(
        num_train_timesteps=steps,
        trained_betas=used,
        variance_type="fixed_small",
        prediction_type=OBJECTIVES[objective],
        timestep_spacing="trailing",
        clip_sample=True,
        use_clipped_model_output=True,
    ), notes + assumed


def _objective(
    path: Path, state: Mapping[str, Tensor], betas: Tensor, given: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """(what the network predicts, notes). The weights of the loss, which the file holds, depend on it."""
    wanted = one_of("objective", given.get("objective", "pred_v"), tuple(OBJECTIVES))
    saved = state.get("loss_weight")
    if saved is None:
        note = f"{path} does not show its objective; {wanted} was assumed. If it was trained otherwise, pass objective="
        return wanted, () if "objective" in given else (note,)
    abar = (1 - betas).cumprod(0)
    snr = abar / (1 - abar)
    gammas = (
        [real("min_snr_gamma", given.get("min_snr_gamma", 5))] if given.get("min_snr_loss_weight") else [math.inf, 5]
    )
    matches = [
        objective
        for gamma in gammas
        for objective, divisor in (("pred_noise", snr), ("pred_x0", 1), ("pred_v", snr + 1))
        if torch.allclose((snr.clamp(max=gamma) / divisor).float(), saved.float(), rtol=1e-3, atol=1e-5)
    ]
    if "objective" in given and (wanted in matches or not matches):
        return wanted, ()
    if not matches:
        return wanted, (
            f"{path} has loss weights of no known objective; {wanted} was assumed. If it was trained otherwise, pass "
            "objective=",
        )
    if "objective" in given:
        raise ValueError(
            f"objective is {wanted}, but the loss weights in {path} are those of {matches[0]}; correct the option or "
            "leave it out"
        )
    return matches[0], ()


def named_betas(name: str, steps: int, **options: Any) -> Tensor:
    """[T] float64: the betas of one of BETA_SCHEDULES. Args: options: schedule_fn_kwargs.

    Raises: ValueError: the schedule has no such option.
    """
    defaults: dict[str, dict[str, float]] = {
        "linear": {}, "cosine": {"s": 0.008}, "sigmoid": {"start": -3, "end": 3, "tau": 1, "clamp_min": 1e-5}
    }  # fmt: skip
    for option, value in options.items():
        real(one_of(f"schedule_fn_kwargs of {name}", option, tuple(defaults[name])), value)
    o = {**defaults[name], **options}
    if name == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu")
    u = torch.linspace(0, steps, steps + 1, dtype=torch.float64, device="cpu") / steps
    if name == "cosine":
        abar = torch.cos((u + o["s"]) / (1 + o["s"]) * math.pi * 0.5) ** 2
    else:
        start, end = (  # rounded to float32, as there
            torch.tensor(o[side] / o["tau"], dtype=torch.float32, device="cpu").sigmoid() for side in ("start", "end")
        )
        abar = (end - ((u * (o["end"] - o["start"]) + o["start"]) / o["tau"]).sigmoid()) / (end - start)
    abar = abar / abar[0]
    return (1 - abar[1:] / abar[:-1]).clip(0, 0.999)
