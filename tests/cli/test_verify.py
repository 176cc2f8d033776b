"""`fastddpm verify`: its options, its exit status and its errors."""

import json
import math

import pytest

from fastddpm.cli import verify as command
from fastddpm.cli.main import main
from fastddpm.verify import Record
from tests.support.command_line import error_line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 7", "steps is 7; want a whole number from 1 to 6"),
        ("--steps few", "invalid int value"),
        ("--device abacus", "device is 'abacus'"),
        ("--damage glass", "damage is 'glass'; want one of"),
        ("--precision fp32", "unrecognized arguments: --precision fp32"),
    ],
)
def test_verify_errors(tiny, flags, message, capsys):
    assert message in error_line(["verify", tiny, "--quiet", *flags.split()], capsys)


def test_verify_of_no_checkpoint(capsys):
    assert "nowhere" in error_line(["verify", "nowhere"], capsys)


def test_verify_passes_all_options(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "verify", lambda source, **options: calls.append((source, options)) or [])
    flags = "--variant fp16 --device cpu --steps 3 --damage step --quiet"
    assert main(["verify"]) == 0
    assert main(["verify", "a", *flags.split()]) == 0
    defaults = {"variant": None, "device": None, "steps": None, "damage": None, "progress": True}
    given = {"variant": "fp16", "device": "cpu", "steps": 3, "damage": "step", "progress": False}
    assert calls == [(None, defaults), ("a", given)]


@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (2.0, 1), (math.nan, 1)])
def test_exit_status_of_verify_is_1_if_a_comparison_fails(error, status, monkeypatch, capsys):
    monkeypatch.setattr(command, "verify", lambda source, **options: [Record("step", "x with y", error, 1.0, "")])
    assert main(["verify"]) == status
    capsys.readouterr()
    assert main(["verify", "--json"]) == status
    output = json.loads(capsys.readouterr().out)
    assert output["passed"] == (status == 0)
    assert output["records"][0]["verdict"] == ("pass" if status == 0 else "FAIL")
