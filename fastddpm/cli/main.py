"""The command line, `fastddpm sample | merge | train | likelihood | fid | verify | info`."""

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fastddpm._version import __version__
from fastddpm.cli import fid, info, likelihood, merge, sample, train, verify
from fastddpm.processes.signals import Stopped

COMMANDS = {  # a command is a module with SUMMARY, EPILOG, add(parser) and run(args)
    "sample": sample,
    "merge": merge,
    "train": train,
    "likelihood": likelihood,
    "fid": fid,
    "verify": verify,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. An error is one line on stderr.

    Returns: the exit status: 0; 1 if `verify` found a difference; 2 after an error; 130 after Ctrl-C and 143 after
        SIGTERM; 141, as a shell reports it, if the reader of the output closed the pipe.
    """
    args = command_parser().parse_args(arguments)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # the interpreter flushes stdout once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Stopped as stop:
        if str(stop):
            print(f"\nfastddpm: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("\nfastddpm: interrupted; files written before are complete", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        hint = "" if args.debug or not kind else " (--debug shows where)"
        print(f"fastddpm: error: {kind}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return status or 0


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands. The arguments that it returns have the command's function as `run`."""
    parser = _OneLineErrors(
        prog="fastddpm", description="Exact DDPM sampling with fused kernels. Start with: fastddpm sample"
    )
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS), title="commands")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=command.EPILOG,
            formatter_class=_HelpFormatter,
        )
        command.add(added)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=command.run)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of an epilog, and does not break names such as fashion-mnist."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _OneLineErrors(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastddpm: error: {message} (see {self.prog} --help)\n")
