"""What all commands have in common: parsing, exit statuses, one-line errors, --help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastddpm import __version__
from fastddpm.cli import merge
from fastddpm.cli.main import COMMANDS, main
from fastddpm.processes.signals import Stopped
from tests.support.command_line import error_line

STARTS = [[sys.executable, "-m", "fastddpm"], [str(Path(sys.executable).with_name("fastddpm"))]]


def test_debug_shows_the_traceback(tiny, capsys):
    assert main(["sample", tiny, "--steps", "0", "--quiet", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("fastddpm: error: steps is 0")


def raising(error):
    def run(args):
        raise error

    return run


def test_unexpected_error_is_one_line_with_its_type(capsys, monkeypatch):
    monkeypatch.setattr(merge, "run", raising(ZeroDivisionError("on\ntwo lines")))
    line = error_line(["merge", "a", "b"], capsys)
    assert "ZeroDivisionError: on two lines (--debug shows where)" in line


def test_keyboard_interrupt_exits_with_130(capsys, monkeypatch):
    monkeypatch.setattr(merge, "run", raising(KeyboardInterrupt))
    assert main(["merge", "a", "b"]) == 130
    told = "fastddpm: interrupted; files written before are complete, and the same command starts again"
    assert capsys.readouterr().err == f"\n{told}\n"


def test_a_stopped_job_exits_with_the_number_of_its_signal(capsys, monkeypatch):
    monkeypatch.setattr(merge, "run", raising(Stopped("3 of 8 samples are done; the same command resumes", 15)))
    assert main(["merge", "a", "b"]) == 143
    assert capsys.readouterr().err == "\nfastddpm: 3 of 8 samples are done; the same command resumes\n"


@pytest.mark.parametrize("arguments", [["paint"], ["sample", "--help-me"]])
def test_misuse_is_one_line(arguments, capsys):
    assert "--help)" in error_line(arguments, capsys)


def test_without_a_command_it_prints_the_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: fastddpm [-h] [--version]\n")
    assert err == ""


@pytest.mark.parametrize("arguments", ["", "--version", "--help", *(f"{command} --help" for command in COMMANDS)])
def test_help_does_not_import_torch(arguments):
    code = f"""
import sys
from fastddpm.cli import main
try:
    main({arguments.split()})
finally:
    assert not {{"torch", "triton", "matplotlib", "PIL", "tqdm", "diffusers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
    done = subprocess.run(
        [*start, "sample", tiny, "--steps", "0", "--quiet"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastddpm: error: steps is 0")
    assert done.stderr.count("\n") == 1
