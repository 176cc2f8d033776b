"""The command line."""

from fastddpm.cli.main import main

__all__ = ["main"]
