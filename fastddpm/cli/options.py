"""What several commands share: options, argument types, and JSON output."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastddpm.core.checks import shown
from fastddpm.core.names import ENGINES, PARALLEL, PRECISION_NAMES, SHIPPED_MODEL, SHIPPED_MODELS
from fastddpm.storage.indices import Indices

A_MINUTE = 4000  # evaluations of a network for one image from which on a CPU may need more than a minute

ANY_PRECISION = ("auto", *PRECISION_NAMES)
CHECKPOINT_SUFFIXES = (".json", ".jsonl", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MOST_NUMBERS = 10_000_000  # in a list that is kept in memory


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the argument CHECKPOINT and the option --variant."""
    text = "a checkpoint: a folder, a Hugging Face Hub id, another project's .pt file, or a bundled model: "
    text += ", ".join(SHIPPED_MODELS)
    if required:
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    else:
        text = f"{text} (default: {SHIPPED_MODEL})"
        parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help=text)
    parser.add_argument("--variant", metavar="NAME", help="variant of the weight files, such as fp16")


def checkpoint_files(source: str | None) -> list[Path]:
    """The files of a checkpoint, or of the training run that it is in, which no output may replace.

    Args: source: the argument CHECKPOINT; a hub id has none of the user's files.
    """
    from fastddpm.checkpoints.shipped import shipped_model

    folder = source or ""
    if source in (None, *SHIPPED_MODELS) and not os.path.isdir(folder):
        folder = str(shipped_model(source or SHIPPED_MODEL))
    if os.path.isfile(folder):
        path = Path(folder)
        return [path, path.with_suffix(".json"), path.parent / "config.json"]
    if not os.path.isdir(folder):
        return []
    files = [*Path(folder).glob("*"), *Path(folder).glob("*/*")]
    return [path for path in files if path.suffix in CHECKPOINT_SUFFIXES]


def add_seed(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the option --seed. Args: purpose: what it is the seed of."""
    parser.add_argument(
        "--seed", type=int, default=0, help=f"seed of {purpose}, 0 <= seed < 2^64 (default: %(default)s)"
    )


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Add the options --parallel and --window."""
    parser.add_argument(
        "--parallel",
        choices=PARALLEL,
        default="off",
        help="take several steps per network call, to draw a few samples with less delay: law (exact in distribution) "
        "or bits (the bits of --parallel off with the same --window; for fp32)",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="W",
        help="steps of a sample that one network call evaluates (default with --parallel: 16)",
    )


def add_batch_size(parser: argparse.ArgumentParser, items: str) -> None:
    """Add the option --batch-size. Args: items: what a batch consists of."""
    text = f"{items} computed together (default: chosen for the device)"
    parser.add_argument("--batch-size", type=int, metavar="B", help=text)


def add_network(
    parser: argparse.ArgumentParser,
    *,
    engines: Sequence[str] = ("auto", *ENGINES),
    precisions: Sequence[str] = ANY_PRECISION,
    auto_precision: str = "chosen for the device",
) -> None:
    """Add the options --engine and --precision. Args: auto_precision: how the precision "auto" is chosen."""
    text = "how the network runs (default: auto, chosen for the device)"
    parser.add_argument("--engine", choices=engines, default="auto", help=text)
    text = f"precision of the network (default: auto, {auto_precision})"
    parser.add_argument("--precision", choices=precisions, default="auto", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options --device and --quiet."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add the option --quiet."""
    parser.add_argument("--quiet", action="store_true", help="print results and errors only, no progress")


def how_long(sampler: Any, evaluations: int) -> str:
    """What a command adds to the line before its work, if that may take minutes.

    Args: evaluations: of the network, for one image each.
    """
    long = sampler.device.type == "cpu" and evaluations >= A_MINUTE
    return "; on a CPU this may take minutes or hours; the bar shows how long" if long else ""


def index_list(text: str) -> Indices:
    """Parse an argument such as 5,7,100-120. A range such as 0-999999 takes little memory."""
    try:
        return Indices.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def number_list(text: str) -> tuple[int, ...]:
    """Parse an argument such as 5,7,100-103: (5, 7, 100, 101, 102, 103)."""
    try:
        numbers = Indices.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of whole numbers like 5,7,100-120") from error
    if len(numbers) > MOST_NUMBERS:
        raise argparse.ArgumentTypeError(f"{len(numbers)} numbers; want at most {MOST_NUMBERS}")
    return tuple(numbers)


def json_text(value: Any) -> str:
    """A value as JSON. NaN and infinities, for which JSON has no numbers, become strings."""
    return json.dumps(_with_finite_numbers(value))


def _with_finite_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_finite_numbers(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_with_finite_numbers(content) for content in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
