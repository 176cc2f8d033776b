"""What all commands have in common: parsing, exit statuses, one-line errors, --help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastddpm import __version__
from fastddpm.cli.main import COMMANDS, main
from fastddpm.storage import images
from tests.support.command_line import error_line

STARTS = [[sys.executable, "-m", "fastddpm"], [str(Path(sys.executable).with_name("fastddpm"))]]


def test_debug_shows_the_traceback(tiny, capsys):
    assert main(["sample", tiny, "--steps", "0", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("fastddpm: error: steps is 0")


def test_unexpected_error_is_one_line_with_its_type(tiny, capsys, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("on\ntwo lines")

    monkeypatch.setattr(images, "save_grid", broken)
    line = error_line(["sample", tiny, "--quiet"], capsys)
    assert "ZeroDivisionError: on two lines (--debug shows where)" in line


def test_keyboard_interrupt_exits_with_130(tiny, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "save_grid", interrupted)
    assert main(["sample", tiny, "--quiet"]) == 130
    assert capsys.readouterr().err == "\nfastddpm: interrupted; files written before are complete\n"


@pytest.mark.parametrize("arguments", [[], ["paint"], ["sample", "--help-me"]])
def test_misuse_is_one_line(arguments, capsys):
    assert "--help)" in error_line(arguments, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fastddpm {command}")
    assert "\nexamples:\n" in text
    assert "fastest" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_120_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_help_does_not_break_names(capsys, monkeypatch):
    for columns in range(60, 110):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            main(["fid", "--help"])
        assert "default: fashion-mnist," in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastddpm {__version__}\n"


@pytest.mark.parametrize("start", STARTS)
def test_closed_pipe_exits_with_141(start, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with a buffer the text is written at the end
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*start, "info"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("start", STARTS)
def test_installed_command(start, tiny):
    done = subprocess.run([*start, "sample", tiny, "--steps", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastddpm: error: steps is 0")
    assert done.stderr.count("\n") == 1
