"""Helpers for tests of the command line."""

import re

import numpy as np

from fastddpm.cli.main import main
from fastddpm.sampling.sampler import Sampler


def error_line(arguments: list[str], capsys) -> str:
    """Run a command that must fail with status 2. Returns: the one line that it prints, on stderr."""
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"fastddpm: error: .+\n", err)
    return err


def draw_uint8(model: str, samples, **options) -> np.ndarray:
    """The images that a sampler draws in Python, with which those of a command are compared."""
    return Sampler.from_pretrained(model).sample(samples, output="uint8", progress=False, **options).numpy()


def record_calls(monkeypatch, owner, name: str) -> list[tuple[tuple, dict]]:
    """A list that receives (args, kwargs) of each call of owner.name, which still runs."""
    calls, function = [], getattr(owner, name)

    def recorded(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)
    return calls
