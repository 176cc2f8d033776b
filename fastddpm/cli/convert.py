"""`fastddpm convert`: write another project's checkpoint as a folder in the format of diffusers."""

import argparse
import os
import secrets
import shutil
from typing import Any

from fastddpm.cli.options import add_quiet

SUMMARY = "write another project's checkpoint as a folder in diffusers' format"
EPILOG = """
examples:
  fastddpm convert 256x256_diffusion.pt --out imagenet/      the flags are in 256x256_diffusion.json or config.json
  fastddpm convert ema_0.9999_500000.pt --out bedrooms/ --format improved-diffusion \\
      --set image_size=256 --set num_heads=1 --set noise_schedule=linear
"""
CONVERTIBLE = ("auto", "diffusers", "guided-diffusion", "improved-diffusion")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pt file, or a folder that holds one")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the folder to write; it must not exist yet")
    text = "the project that wrote it (default: auto; where no flag tells the two apart, guided-diffusion is assumed)"
    parser.add_argument("--format", choices=CONVERTIBLE, default="auto", help=text)
    text = "a flag that the checkpoint was trained with, under its original name; may be repeated"
    parser.add_argument("--set", metavar="FLAG=VALUE", action="append", default=[], type=_setting, help=text)
    add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    from fastddpm import checkpoints
    from fastddpm.cli import terminal
    from fastddpm.storage.files import as_path, check_writable

    out = as_path("--out", args.out)
    if os.path.lexists(out):
        raise ValueError(f"--out is {out}, which exists; choose a folder that does not")
    checkpoint = checkpoints.load(args.checkpoint, format=args.format, **dict(args.set))
    for note in checkpoint.notes:
        terminal.tell(f"note: {note}")
    if checkpoint.network is not None:
        raise ValueError(
            f"{args.checkpoint} holds a {type(checkpoint.network).__name__} of another package, which diffusers' "
            "format cannot hold; Sampler.from_pretrained loads it as it is"
        )
    check_writable(out, folder=True, make=False)
    parts = checkpoint.config, checkpoint.parameters, checkpoint.schedule
    checkpoints.load_into(_network(checkpoint.config), checkpoint.parameters)  # whether they fit
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        null_label, scale = checkpoint.null_label, checkpoint.timestep_scale
        checkpoints.save(temporary, *parts, null_label=null_label, timestep_scale=scale)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not args.quiet:
        count = sum(value.numel() for value in checkpoint.parameters.values())
        print(f"{out}: {count / 1e6:.1f} million parameters")
    for reason in checkpoints.beyond_diffusers(checkpoint.config, checkpoint.timestep_scale):
        terminal.tell(f"note: fastddpm loads {out}, but diffusers cannot, because the network {reason}")


def _network(config: dict[str, Any]) -> Any:
    """A network whose parameters have no values yet."""
    import torch

    from fastddpm.networks.unet2d import UNet2D

    with torch.device("meta"):
        net = UNet2D(**config)
    return net.to_empty(device="cpu")


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if name in ("source", "variant", "schedule", "format"):
        raise argparse.ArgumentTypeError(f"{name} is no flag of a checkpoint")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE, such as num_heads=4")
    return name, value
