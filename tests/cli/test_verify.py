"""`fastddpm verify`: its options, its exit status and its errors."""

import json
import math

import pytest

from fastddpm.cli.main import main
from fastddpm.verify import Record, ladder, table
from tests.support.command_line import error_line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 7", "steps is 7; want a whole number from 1 to 6"),
        ("--steps few", "invalid int value"),
        ("--steps 9223372036854775808", "steps is 9223372036854775808; want a whole number from 1 to 6"),
        ("--seconds 0", "seconds is 0.0; want a finite number, above 0"),
        ("--seconds nan", "seconds is nan; want a finite number"),
        ("--seconds 9 --steps 3", "argument --steps: not allowed with argument --seconds"),
        ("--device abacus", "device is 'abacus'"),
        ("--damage glass", "damage is 'glass'; want one of"),
        ("--precision fp32", "unrecognized arguments: --precision fp32"),
    ],
)
def test_verify_errors(tiny, flags, message, capsys):
    assert message in error_line(["verify", tiny, "--quiet", *flags.split()], capsys)


def test_verify_of_no_checkpoint(capsys):
    assert "nowhere" in error_line(["verify", "nowhere", "--quiet"], capsys)


def test_verify_passes_all_options(monkeypatch):
    calls = []
    monkeypatch.setattr(ladder, "verify", lambda source, **options: calls.append((source, options)) or [])
    flags = "--variant fp16 --device cpu --steps 3 --damage step --quiet"
    assert main(["verify"]) == 0
    assert main(["verify", "a", *flags.split()]) == 0
    assert main(["verify", "--seconds", "9"]) == 0
    defaults = {"variant": None, "device": None, "steps": None, "seconds": None, "damage": None, "progress": True}
    given = {"variant": "fp16", "device": "cpu", "steps": 3, "seconds": None, "damage": "step", "progress": False}
    assert calls == [(None, defaults), ("a", given), (None, defaults | {"seconds": 9.0})]


def test_verify_says_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(ladder, "verify", lambda source, **options: [])
    told = {}
    for arguments in ("", "fashion-mnist", "a", "--seconds 9", "--quiet"):
        main(["verify", *arguments.split()])
        told[arguments] = capsys.readouterr().err
    assert (
        told[""]
        == told["fashion-mnist"]
        == ("fastddpm: this takes a minute or two on a CPU; --seconds 60 would shorten it\n")
    )
    assert "hours" in told["a"]
    assert told["--seconds 9"] == told["--quiet"] == ""


def test_verbose_prints_every_comparison(monkeypatch, capsys):
    records = [Record("words", "a with b", 0, 0), Record("words", "c with d", 0, 0)]
    monkeypatch.setattr(ladder, "verify", lambda source, **options: records)
    assert main(["verify", "--quiet"]) == 0
    assert capsys.readouterr().out == "words  pass  2 comparisons\npassed: all 2 comparisons; 0 skipped\n"
    assert main(["verify", "--quiet", "--verbose"]) == 0
    assert capsys.readouterr().out == table(records) + "\n"


@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (2.0, 1), (math.nan, 1)])
def test_exit_status_of_verify_is_1_if_a_comparison_fails(error, status, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "verify", lambda source, **options: [Record("step", "x with y", error, 1.0, "")])
    assert main(["verify"]) == status
    capsys.readouterr()
    assert main(["verify", "--json"]) == status
    output = json.loads(capsys.readouterr().out)
    assert output["passed"] == (status == 0)
    assert output["records"][0]["verdict"] == ("pass" if status == 0 else "FAIL")
