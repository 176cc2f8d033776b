"""The command line, `fastddpm sample | merge | train | likelihood | fid | convert | verify | info`."""

import argparse
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from fastddpm._version import __version__
from fastddpm.cli import convert, fid, info, likelihood, merge, sample, terminal, train, verify
from fastddpm.processes.signals import Stopped
from fastddpm.storage.caches import library_caches

# A command is a module with SUMMARY, EPILOG, add(parser) and run(args). It imports torch, and what needs it, in the
# functions that use it: --help and --version come at once.
COMMANDS = {
    "sample": sample,
    "merge": merge,
    "train": train,
    "likelihood": likelihood,
    "fid": fid,
    "convert": convert,
    "verify": verify,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. An error is one line on stderr.

    Returns: the exit status: 0; 1 if `verify` found a difference; 2 after an error, also if stdout could not be
        written; 130 after Ctrl-C and 143 after SIGTERM; 141, as a shell reports it, if the reader of the output closed
        the pipe. A closed stdout and any failure of stderr change nothing.
    """
    with terminal.streams() as stdout:
        try:
            status = _run(arguments)
        except SystemExit as exit_:  # of argparse: --help, --version, or a mistake
            raise SystemExit(_with_output(stdout, int(exit_.code or 0))) from None
        return _with_output(stdout, status)


def _run(arguments: Sequence[str] | None) -> int:
    debug = False
    try:
        parser = command_parser()
        args = parser.parse_args(arguments)
        if "run" not in args:
            parser.print_help()
            return 0
        debug = args.debug
        with library_caches():
            return args.run(args) or 0
    except Stopped as stop:
        if str(stop):
            print(file=sys.stderr)  # the terminal shows ^C, perhaps after a bar
            terminal.tell(str(stop))
        return 128 + stop.number
    except KeyboardInterrupt:
        print(file=sys.stderr)
        terminal.tell("interrupted; files written before are complete, and the same command starts again")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug or isinstance(error, ValueError | OSError | MemoryError) else " (--debug shows where)"
        terminal.tell(f"error: {terminal.explained(error)}{hint}")
        return 2


def _with_output(stdout: terminal.Stream, status: int) -> int:
    """The exit status, given whether all that was printed has been written."""
    stdout.flush()
    if stdout.failure is None or status:
        return status
    if isinstance(stdout.failure, BrokenPipeError):
        return 141
    terminal.tell(
        f"error: stdout could not be written, so what was printed is lost: {stdout.failure}; free some space, "
        "or send the output to another place"
    )
    return 2


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands. The arguments that it returns have the command's function as `run`."""
    parser = _OneLineErrors(
        prog="fastddpm", description="Exact DDPM sampling with fused kernels. Start with: fastddpm sample"
    )
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(metavar=" | ".join(COMMANDS), title="commands")
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
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.color = False  # Python 3.14 would colour --help, and `terminal.Stream` would show the escapes

    def error(self, message: str) -> NoReturn:
        terminal.tell(f"error: {message} (see {self.prog} --help)")
        self.exit(2)
