"""`fastddpm likelihood`: the variational bound on the negative log-likelihood of images, sounds or texts."""

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastddpm.cli.labels import parse_labels
from fastddpm.cli.options import (
    add_batch_size,
    add_checkpoint,
    add_device,
    add_network,
    add_seed,
    checkpoint_files,
    how_long,
    json_text,
)
from fastddpm.cli.terminal import one_line, tell
from fastddpm.core.checks import whole
from fastddpm.core.names import LEARNED_VARIANCE_TYPES, VARIANCE_TYPES
from fastddpm.storage.files import as_path, atomic, check_not_input, check_writable

if TYPE_CHECKING:
    import numpy as np

    from fastddpm.evaluate.likelihood import Bound
    from fastddpm.networks.fused import Network
    from fastddpm.sampling.sampler import Sampler

SUMMARY = "bound the negative log-likelihood of images, sounds or texts, in bits/dim"
EPILOG = """
examples:
  fastddpm likelihood runs/mine test.npz                         every term for every image
  fastddpm likelihood fashion-mnist test.npz --num-images 1000 --terms 20 --plot bound.png
  fastddpm likelihood runs/names held-out.txt                    texts, one per line

Prints a bound on -log2 p(image) in bits per dimension, as the DDPM paper reports it: the rate L_1 + ... + L_T and the
distortion L_0, each with its standard error over the images. DATA is read and prepared as in `fastddpm train`; from an
.npz with x_train and x_test, x_test is used, unless FILE.npz:NAME names another array. With --terms K only K timesteps
of each image are evaluated, and the bound remains unbiased. On a CPU all T terms of each image take a long time: begin
with --num-images 100 --terms 20.
"""


def add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, required=True)
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images, sounds or texts: an .npz, .npy, .txt or MNIST-format file, a folder, .zip or .tar",
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="use the first N images, sounds or texts of DATA (default: all)"
    )
    parser.add_argument(
        "--terms", type=int, metavar="K", help="timesteps evaluated for each image (default: all T - 1)"
    )
    add_seed(parser, "the noise and the choice of timesteps")
    add_batch_size(parser, "terms")
    variances = (*VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES)
    parser.add_argument(
        "--variance-type",
        choices=variances,
        metavar="NAME",
        help=f"variance of the reverse process: {', '.join(variances)} (default: the checkpoint's)",
    )
    parser.add_argument(
        "--class-labels",
        metavar="L,M",
        help="classes for a class-conditional model, one per image, as numbers or names (default: the labels in DATA)",
    )
    parser.add_argument("--out", metavar="X.npz", help="write every term, by image and timestep, in bits/dim")
    parser.add_argument("--plot", metavar="X.png", help="plot the terms over t")
    parser.add_argument("--json", action="store_true", help="print the bound and its parts as one JSON object")
    add_network(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from fastddpm.evaluate.likelihood import bound
    from fastddpm.storage import datasets

    _check_before_loading(args)
    sampler = _load_with_variance_type(args)
    if sampler.decoder is not None:
        raise ValueError(
            f"{args.checkpoint} is a model of latents, but DATA are images; fastddpm.evaluate.likelihood.bound takes "
            "latents, as floating-point numbers"
        )
    labels: Sequence[int] | np.ndarray | None = None
    if args.class_labels is not None:
        labels = parse_labels(args.class_labels, sampler.classes)
    images, texts = _load_data(args, sampler)
    array = None if texts else datasets.array_name(args.data, held_out=True)
    if labels is None:
        labels = _labels_of_data(args, sampler, count=len(images))
    if not args.quiet:
        tell(_what_is_evaluated(args, sampler, len(images)))
    began = time.monotonic()
    result = bound(
        sampler,
        images[: args.num_images],
        terms=args.terms,
        seed=args.seed,
        batch_size=args.batch_size,
        class_labels=labels,
        progress=not args.quiet,
    )
    seconds = time.monotonic() - began
    variance_type = sampler.schedule.variance_type
    if args.json:
        print(_bound_json(result, args.data, array, args.seed, seconds, variance_type))
    else:
        print(
            _bound_text(result, array, seconds, variance_type, _kind(sampler))
            + _of_medium(result, texts[: args.num_images], sampler)
        )
    if args.out is not None:
        _save_terms(result, args.out)
    if args.plot is not None:
        _plot_terms(result, args.plot)


def _load_data(args: argparse.Namespace, sampler: "Sampler") -> tuple[Any, list[str]]:
    """(the data as `bound` takes them, the texts that they are or nothing)."""
    from fastddpm.storage import datasets, sequences
    from fastddpm.text import Text, read_texts

    if isinstance(sampler.medium, Text):
        texts = read_texts(args.data)
        return sampler.medium.encode(texts), texts
    if len(sampler.shape) == 3:
        return datasets.load_images(args.data, held_out=True, progress=not args.quiet), []
    return sequences.load_sequences(args.data, held_out=True, like=sampler.medium).data, []


def _kind(sampler: "Sampler") -> str:
    """What messages call the data of a model."""
    from fastddpm.text import Text

    if len(sampler.shape) == 3:
        return "images"
    return "sequences" if sampler.medium is None else "texts" if isinstance(sampler.medium, Text) else "sounds"


def _of_medium(result: "Bound", texts: list[str], sampler: "Sampler") -> str:
    """A further line for sounds and texts: what the bound says about the bits of one, and of a character."""
    from fastddpm.text import Text

    medium = sampler.medium
    if medium is None or medium.code == "waveform":
        return ""
    if not isinstance(medium, Text) or medium.code != "bits":
        what = "text" if isinstance(medium, Text) else "sound"
        return f"\nL_0 is a density, so the bound does not say how many bits a {what} takes"
    per_text = result.summary()["total"][0] * result.dimensions
    characters = sum(min(len(text) + 1, medium.length) for text in texts) / len(texts)  # with the end symbol
    return (
        f"\na text is {medium.length} symbols of {medium.shape[0]} bits, each -1 or 1, and L_0 is the probability of "
        f"all signs: {per_text:.2f} bits per text, {per_text / characters:.3f} per character (with the end of a text)"
    )


def _check_before_loading(args: argparse.Namespace) -> None:
    from fastddpm.storage.image_folder import would_hold

    for option, path, suffix in (("--out", args.out, ".npz"), ("--plot", args.plot, ".png")):
        if path is None:
            continue
        if as_path(option, path).suffix.lower() != suffix:
            raise ValueError(f"{option} is {path}; want a {suffix} file")
        if os.path.exists(path):
            check_not_input(option, path, *checkpoint_files(args.checkpoint), *_files_of_data(args.data))
    if args.plot is not None and would_hold(args.data, args.plot):
        raise ValueError(f"--plot is {args.plot}, in DATA, which would hold one more image; name another place")
    if args.out and args.plot and os.path.realpath(args.out) == os.path.realpath(args.plot):
        raise ValueError(f"--out and --plot are both {args.out}; want two files")
    for path in filter(None, (args.out, args.plot)):
        check_writable(path)
    if args.num_images is not None:
        whole("--num-images", args.num_images, 1)


def _files_of_data(data: str) -> list[Path]:
    """The files that DATA are read from."""
    from fastddpm.storage import datasets, sequences

    return [datasets.split_array(data)[0]] if sequences.is_sequences(data) else datasets.image_files(data)


def _load_with_variance_type(args: argparse.Namespace) -> "Sampler":
    """The sampler, with the variance type of --variance-type if that is given."""
    from fastddpm.sampling.sampler import Sampler

    sampler = Sampler.from_pretrained(
        args.checkpoint,
        variant=args.variant,
        device=args.device,
        precision=args.precision,
        engine=args.engine,
    )
    if args.variance_type is not None:
        sampler.schedule = replace(sampler.schedule, variance_type=args.variance_type)
    if args.plot is not None and sampler.schedule.num_train_timesteps == 1:
        raise ValueError("--plot does not apply to a model with T = 1: its bound has no terms over t; leave it out")
    return sampler


def _labels_of_data(args: argparse.Namespace, sampler: "Sampler", count: int) -> "np.ndarray | None":
    """The labels that come with DATA; None for a model without classes. Args: count: images in all of DATA."""
    from fastddpm.storage import datasets

    config = cast("Network", sampler.model).config
    classes = config["num_class_embeds"] if sampler.null_label is None else sampler.null_label
    if not classes and not config.get("class_embed_type"):
        return None
    try:
        labels = datasets.load_labels(args.data, count=count, held_out=True, classes=sampler.classes or classes)
    except ValueError as error:
        raise ValueError(f"the model is class-conditional, but {error}; or give --class-labels") from error
    return labels[: args.num_images]


def _what_is_evaluated(args: argparse.Namespace, sampler: "Sampler", count: int) -> str:
    """Args: count: images in all of DATA."""
    images = min(count, args.num_images or count)
    terms = sampler.schedule.num_train_timesteps if args.terms is None else args.terms + 1
    long = how_long(sampler, images * terms)
    shorter = "; --terms and --num-images shorten it" if long else ""
    where = f"{sampler.precision} on {sampler.device}"
    return f"evaluating {terms} terms of each of {images} {_kind(sampler)}, {where}{long}{shorter}"


def _save_terms(result: "Bound", path: str) -> None:
    import numpy as np

    t, mean, error = result.per_timestep()
    arrays = {
        "prior": result.bits(result.prior),
        "decoder": result.bits(result.decoder),
        "terms": result.bits(result.terms),
        "bits_per_dim": result.per_image,
        "timesteps": result.timesteps,
        "weights": result.weights,
        "t": t,
        "mean": mean,
        "error": error,
        "count": result.timesteps.flatten().bincount()[t],
    }
    with atomic(path) as file:
        np.savez(file, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]


def _plot_terms(result: "Bound", path: str) -> None:
    from fastddpm.storage.plots import bound_terms

    t, mean, error = result.binned()
    summary = result.summary()
    bound_terms(
        t,
        mean,
        error,
        prior=summary["prior"],
        decoder=summary["distortion"],
        total=summary["total"],
        num_train_timesteps=result.num_train_timesteps,
        path=path,
    )


def _bound_json(result: "Bound", data: str, array: str | None, seed: int, seconds: float, variance_type: str) -> str:
    images, terms = result.terms.shape
    about = {
        "data": data,
        "array": array,
        "images": images,
        "terms": terms,
        "timesteps": result.num_train_timesteps,
        "seed": seed,
        "seconds": seconds,
        "variance_type": variance_type,
        "unit": "bits/dim",
    }
    return json_text(about | {name: {"mean": mean, "error": error} for name, (mean, error) in result.summary().items()})


def _bound_text(result: "Bound", array: str | None, seconds: float, variance_type: str, kind: str) -> str:
    titles = {
        "rate": "rate L_1 + ... + L_T",
        "prior": "  of which L_T",
        "distortion": "distortion L_0",
        "total": "bound",
    }
    images, terms = result.terms.shape
    source = f" of {one_line(array)}" if array else ""
    limit = result.num_train_timesteps - 1
    lines = [f"{images} {kind}{source}, {terms} of {limit} terms each, {variance_type}, {seconds:.1f} s"]
    lines.append(f"{'':<22} bits/dim   standard error")
    summary = result.summary()
    for name, title in titles.items():
        mean, error = summary[name]
        lines.append(f"{title:<22} {mean:8.5f}   {'-' if math.isnan(error) else f'{error:.2g}'}")  # NaN: one image
    return "\n".join(lines)
