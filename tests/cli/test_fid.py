"""`fastddpm fid`: its options and how it prints the result. More tests are in tests/evaluate/test_fid.py."""

import json

import pytest

from fastddpm.cli.main import main
from fastddpm.evaluate import fid as module
from fastddpm.evaluate.fid import Fid

DEFAULTS = {
    "features": "fashion-mnist",
    "input_size": None,
    "scale": None,
    "device": None,
    "batch_size": None,
    "replicates": 20,
    "seed": 0,
    "cache": True,
    "progress": True,
}


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        (
            "--features net.onnx --input-size 32 --scale bytes --device cpu --batch-size 8 --bootstrap 3 --seed 9",
            {
                "features": "net.onnx",
                "input_size": 32,
                "scale": "bytes",
                "device": "cpu",
                "batch_size": 8,
                "replicates": 3,
                "seed": 9,
            },
        ),
        ("--cache folder --quiet", {"cache": "folder", "progress": False}),
        ("--no-cache", {"cache": False}),
    ],
)
def test_fid_passes_all_options(flags, options, monkeypatch):
    calls = []

    def record(a, b, **arguments):
        calls.append((a, b, arguments))
        raise ValueError("enough")

    monkeypatch.setattr(module, "fid", record)
    assert main(["fid", "a.npz", "b.npz", *flags.split()]) == 2
    assert calls == [("a.npz", "b.npz", DEFAULTS | options)]


RESULT = Fid(12.345678, 0.0456, (7, None), 128, "fashion-mnist", ("stats.npz", None), ("A has few images",))


def test_fid_prints_the_distance_and_what_was_compared(monkeypatch, capsys):
    monkeypatch.setattr(module, "fid", lambda a, b, **options: RESULT)
    assert main(["fid", "a", "b", "--bootstrap", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Fréchet distance 12.3457 ± 0.046 (standard error, 3 replicates)",
        "A: 7 images of a, statistics in stats.npz",
        "B: b",
        "features: 128 of fashion-mnist",
        "note: A has few images",
    ]


def test_fid_as_json(monkeypatch, capsys):
    monkeypatch.setattr(module, "fid", lambda a, b, **options: RESULT)
    assert main(["fid", "a", "b", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["distance"], record["a"], record["bootstrap"]) == (12.345678, "a", 20)
