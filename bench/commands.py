"""What the commands that read records share: errors of one line, and warnings about invalid lines."""

import argparse
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from bench import records
from bench.history import Record


class Parser(argparse.ArgumentParser):
    """A parser of a command `python -m NAME`, whose errors are one line with exit status 2."""

    @property
    def name(self) -> str:
        return self.prog.removeprefix("python -m ")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.name}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def read_records(places: Iterable[Path], command: str) -> list[Record]:
    """Return the records in files and folders, in order of run and time; print a warning for each invalid line.

    Args: command: its name, for the warnings.
    Raises: FileNotFoundError: one of the places does not exist.
    """
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        found = records.read(places)
    for warning in skipped:
        print(f"{command}: {warning.message}", file=sys.stderr)
    return found
