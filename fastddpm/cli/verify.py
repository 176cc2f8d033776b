"""`fastddpm verify`: compare what this machine computes with the reference."""

import argparse
from dataclasses import asdict

from fastddpm.cli.options import add_checkpoint, add_device, json_text
from fastddpm.verify.ladder import verify
from fastddpm.verify.table import table

SUMMARY = "check that this machine computes what the reference does"
EPILOG = """
examples:
  fastddpm verify                                          the bundled model: a minute or two on two cores
  fastddpm verify google/ddpm-cifar10-32 --steps 100       a diffusers checkpoint, with a trajectory of 100 steps

The noise, the update and the noising must have the same bits as the reference. The network may err by at most twice
as much as plain torch does in the same precision; float64 judges both. The exit status is 1 if a comparison fails.
"""


def add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--steps", type=int, metavar="S", help="steps of the trajectory (default: all T)")
    parser.add_argument("--json", action="store_true", help="print the comparisons as one JSON object")
    parser.add_argument("--damage", metavar="RUNG", help=argparse.SUPPRESS)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    records = verify(
        args.checkpoint,
        variant=args.variant,
        device=args.device,
        steps=args.steps,
        damage=args.damage,
        progress=not args.quiet,
    )
    passed = all(record.verdict != "FAIL" for record in records)
    if args.json:
        rows = [asdict(record) | {"verdict": record.verdict} for record in records]
        print(json_text({"passed": passed, "records": rows}))
    else:
        print(table(records))
    return 0 if passed else 1
