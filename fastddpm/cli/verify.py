"""`fastddpm verify`: compare what this machine computes with the reference."""

import argparse
from dataclasses import asdict

from fastddpm.cli.options import add_checkpoint, add_device, json_text
from fastddpm.cli.terminal import tell
from fastddpm.core.names import SHIPPED_MODELS

SUMMARY = "check that this machine computes what the reference does"
EPILOG = """
examples:
  fastddpm verify                                          the bundled model: a minute or two on two cores
  fastddpm verify --seconds 60 --verbose                   a shorter trajectory; every comparison with its numbers
  fastddpm verify google/ddpm-cifar10-32 --steps 100       a diffusers checkpoint, with a trajectory of 100 steps

The noise, the update and the noising must have the same bits as the reference. The network may err by at most twice
as much as plain torch does in the same precision; float64 judges both. The exit status is 1 if a comparison fails. A
comparison is skipped where both of its sides are the same code, as some are on a CPU.
"""


def add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="S", help="steps of the trajectory (default: all T)")
    length.add_argument(
        "--seconds", type=float, metavar="X", help="shorten the trajectory so that all takes about X seconds"
    )
    parser.add_argument("--verbose", action="store_true", help="print every comparison, not a line for each rung")
    parser.add_argument("--json", action="store_true", help="print the comparisons as one JSON object")
    parser.add_argument("--damage", metavar="RUNG", help=argparse.SUPPRESS)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from fastddpm.verify import ladder, summary, table

    if not args.quiet and args.seconds is args.steps is None and not str(args.device).startswith("cuda"):
        length = (
            "a minute or two"
            if args.checkpoint in (None, *SHIPPED_MODELS)
            else "minutes, or hours for a large network,"
        )
        tell(f"this takes {length} on a CPU; --seconds 60 would shorten it")
    records = ladder.verify(
        args.checkpoint,
        variant=args.variant,
        device=args.device,
        steps=args.steps,
        seconds=args.seconds,
        damage=args.damage,
        progress=not args.quiet,
    )
    passed = all(record.verdict != "FAIL" for record in records)
    if args.json:
        rows = [asdict(record) | {"verdict": record.verdict} for record in records]
        print(json_text({"passed": passed, "records": rows}))
    else:
        print(table(records) if args.verbose else summary(records))
    return 0 if passed else 1
