"""What samples are given on the command line: guidance, arguments of the network, images to change or to complete."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastddpm.core.checks import shown

if TYPE_CHECKING:
    from fastddpm.sampling.sampler import Sampler

_FILES = "an image for all samples, a folder of images, or an .npy or .npz with one entry per sample"


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("conditions")
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="classifier-free guidance; 1 gives plain conditional samples, 2 to 8 are usual",
    )
    group.add_argument(
        "--null-label", type=int, metavar="K", help="the class label that means no class (default: the checkpoint's)"
    )
    group.add_argument(
        "--cond", metavar="FILE", help="an .npz with further arguments of the network, one entry per sample"
    )
    group.add_argument("--concat", metavar="PATH", help=f"channels that follow those of x_t: {_FILES}")
    group.add_argument("--init", metavar="PATH", help=f"begin with these, noised as --strength says: {_FILES}")
    group.add_argument(
        "--strength",
        type=float,
        metavar="R",
        help="with --init: take only this share of the steps, the last ones; 0 < R <= 1",
    )
    group.add_argument("--known", metavar="PATH", help=f"complete these where --mask is black: {_FILES}")
    group.add_argument("--mask", metavar="PATH", help="white (or 1) where --known is kept: an image, or an .npy")
    group.add_argument(
        "--resample",
        type=int,
        default=1,
        metavar="R",
        help="with --known: take each step but the last R times (default: 1)",
    )
    group.add_argument(
        "--round", action="store_true", help="replace the predicted x_0 of each step by the nearest letters (texts)"
    )


def condition_arguments(args: argparse.Namespace, sampler: "Sampler", count: int) -> dict[str, Any]:
    """The arguments of `Sampler.batches` that the options mean; those not given are left out.

    Raises: ValueError: a file cannot be read, or does not fit the samples.
    """
    found: dict[str, Any] = {}
    if args.cond is not None:
        found["model_kwargs"] = _arrays("--cond", args.cond)
    for name in ("concat", "init", "known"):
        if (path := getattr(args, name)) is not None:
            found[name] = _states(f"--{name}", path, sampler, count, own_channels=name == "concat")
    if args.mask is not None:
        found["mask"] = _mask(args.mask)
    if args.round:
        found["x_0_fn"] = _rounding(sampler)
    for name, default in (("guidance_scale", None), ("strength", None), ("resample", 1)):
        if getattr(args, name) != default:
            found[name] = getattr(args, name)
    if args.null_label is not None and args.guidance_scale is None:
        raise ValueError("--null-label is given without --guidance-scale; give both")
    if args.null_label is not None:
        found["uncond_kwargs"] = {"class_labels": args.null_label}
    elif args.guidance_scale is not None and sampler.null_label is None:
        raise ValueError(
            "--guidance-scale is given, but the checkpoint names no null label; name it with --null-label K"
        )
    return found


def steps_of(args: argparse.Namespace, sampler: "Sampler") -> int:
    """How many steps a run with these options takes."""
    from fastddpm.sampling.beginning import steps_of_strength, with_visits

    steps = sampler.schedule.num_train_timesteps if args.steps is None else args.steps
    if args.strength is not None:
        steps = steps_of_strength(steps, args.strength)
    return with_visits(steps, args.resample)


def _rounding(sampler: "Sampler") -> Callable[..., Any]:
    from fastddpm.text import Text

    if not isinstance(sampler.medium, Text):
        raise ValueError("--round is for models of texts, such as names; leave it out")
    return sampler.medium.nearest


def _states(option: str, path: str, sampler: "Sampler", count: int, *, own_channels: bool) -> np.ndarray:
    """[count, *shape] float32 in data units."""
    shape = sampler.shape
    values = _values(option, path)
    if values.dtype == np.uint8:  # images, channels last
        values = values.reshape(-1, *values.shape[-3:])
        if not own_channels and values.shape[-1] == 3 and shape[0] == 1:
            raise ValueError(
                f"{option} is {path}, whose images have colour, but those of the model are grey; convert them"
            )
        low, high = sampler.value_range or (-1.0, 1.0)
        values = np.moveaxis(values, -1, 1) * np.float32((high - low) / 255) + np.float32(low)
    elif values.ndim == len(shape):
        values = values[None]
    if values.shape[2:] != shape[1:] or not (own_channels or values.shape[1] == shape[0]):
        wanted = ", ".join(["C" if own_channels else str(shape[0]), *map(str, shape[1:])])
        raise ValueError(
            f"{option} is {path}, which holds {values.shape[1:]} per sample; want ({wanted}), channels first"
        )
    if len(values) not in (1, count):
        raise ValueError(
            f"{option} is {path}, which holds {len(values)} entries for {count} samples; want one, or one each"
        )
    return np.ascontiguousarray(np.broadcast_to(values, (count, *values.shape[1:])), dtype=np.float32)


def _mask(path: str) -> np.ndarray:
    """A mask for all samples, or [N, 1, ...]: of images, white (more than 127); of arrays, their values."""
    values = _values("--mask", path)
    if Path(path).suffix.lower() in (".npy", ".npz"):
        return values > 127 if values.dtype == np.uint8 and values.max(initial=0) > 1 else values
    masks = values[..., 0] > 127
    return masks[0] if len(masks) == 1 else masks[:, None]


def _values(option: str, path: str) -> np.ndarray:
    """uint8 images [N, H, W, C], or the array of a file."""
    from PIL import Image

    from fastddpm.storage.datasets import load_images

    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        return _read(option, path)
    if suffix == ".npz":
        arrays = _arrays(option, path)
        if len(arrays) != 1:
            raise ValueError(f"{option} is {path}, which holds {', '.join(arrays) or 'no arrays'}; want a single array")
        return next(iter(arrays.values()))
    if os.path.isdir(path):
        return load_images(path, progress=False)
    try:
        with Image.open(path) as image:
            kept = image if image.mode in ("L", "RGB") else image.convert("RGB")
            pixels = np.asarray(kept)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot read {path} ({error}); want {_FILES}") from error
    return pixels.reshape(1, *pixels.shape[:2], -1)


def _arrays(option: str, path: str) -> dict[str, np.ndarray]:
    arrays = _read(option, path)
    if isinstance(arrays, np.ndarray):
        raise ValueError(f"{option} is {path}, a single array; want an .npz with named arrays")
    with arrays:
        return {name: arrays[name] for name in arrays.files}


def _read(option: str, path: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot read {shown(path)} ({error}); want an .npy or .npz of numbers") from error
