"""`fastddpm info`: one screen of facts, and the report on the kernels only on request."""

import json
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from fastddpm import __version__, ops
from fastddpm.cli import info
from fastddpm.cli.main import main
from fastddpm.core.precision import Compute


def test_info_fits_on_one_screen(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


def test_many_gpus_fit_on_one_screen(capsys, monkeypatch):
    facts = info.machine_facts()
    machine = {name: value for name, value in facts["machine"].items() if not name.startswith("cuda")}
    machine |= {f"cuda:{i}": "A" for i in range(8)} | {"cuda:8": "B", "cuda:9": "A"}
    monkeypatch.setattr(info, "machine_facts", lambda: facts | {"machine": machine})
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    gpus = [line.split() for line in lines if "cuda:" in line]
    assert gpus == [["machine", "cuda:0-7", "A"], ["machine", "cuda:8", "B"], ["machine", "cuda:9", "A"]]
    assert len(lines) <= 24


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_info_starts_no_other_python_and_compiles_nothing(flags, capsys, monkeypatch):
    commands, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: (commands.append(command), run(command, **options))[1]
    )
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["info", *flags]) == 0
    assert not any(command[0] == sys.executable for command in commands)
    assert 'kernels":' not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_info_shows_versions_and_defaults(precision, capsys, monkeypatch):
    monkeypatch.setattr(Compute, "resolve", lambda: Compute(torch.device("cpu"), precision))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^version +fastddpm +{re.escape(__version__)}$", text, re.MULTILINE)
    assert re.search("^default +device +cpu$", text, re.MULTILINE)
    assert re.search(rf"^default +precision +{precision}$", text, re.MULTILINE)
    assert re.search(r"^default +backend +cpp \(C\+\+ kernels, instruction set \w+\)$", text, re.MULTILINE)


def test_info_explains_the_backend(capsys, monkeypatch):
    monkeypatch.setattr(Compute, "resolve", lambda: Compute(torch.device("cuda:0"), "fp32"))
    monkeypatch.setattr(ops, "backend", lambda device: f"the backend of {device}")
    monkeypatch.setattr(ops, "backend_reason", lambda device: f"the reason for {device}")
    assert main(["info", "--json"]) == 0
    default = json.loads(capsys.readouterr().out)["default"]
    assert (default["backend"], default["backend_reason"]) == ("the backend of cuda:0", "the reason for cuda:0")


@pytest.mark.parametrize(
    ("flags", "capabilities"), [("--kernels", ()), ("--kernels --cc 80,90", (80, 90)), ("--cc 80,90", (80, 90))]
)
def test_report_on_the_kernels_follows_the_facts(flags, capabilities, capsys, monkeypatch):
    monkeypatch.setattr(info, "kernel_report", lambda capabilities, *options: f"the report for {capabilities}")
    assert main(["info", *flags.split()]) == 0
    text = capsys.readouterr().out
    assert text.startswith("version ")
    assert text.endswith(f"\n\nthe report for {capabilities}\n")


def test_report_on_the_kernels_is_kept(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    compiled, version = [], ["3.6.0"]
    monkeypatch.setattr(
        info, "_compiled_report", lambda arguments: compiled.append(arguments) or f"report {len(compiled)}"
    )
    monkeypatch.setattr("fastddpm.storage.fingerprint.installed", lambda package: version[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def report(*arguments):
        return info.kernel_report(*arguments), capsys.readouterr().err

    told = "fastddpm: compiling the kernels: about {} seconds on one core\n"
    assert report([80]) == ("report 1", told.format(30))
    assert report([80]) == ("report 1", "")
    assert report([80, 90]) == ("report 2", told.format(60))
    assert report([80], "--json") == ("report 3", told.format(30))
    version[0] = "3.7.0"
    assert report([80])[0] == "report 4"
    monkeypatch.setattr(info, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "__init__.py")))
    (tmp_path / "step.py").write_text("one kernel")
    assert [report([80])[0], report([80])[0]] == ["report 5", "report 5"]
    (tmp_path / "step.py").write_text("another")
    assert report([80])[0] == "report 6"
    assert compiled == [["--cc", *cc.split()] for cc in ("80", "80 90")] + [["--json", "--cc", "80"]] + 3 * [
        ["--cc", "80"]
    ]


@pytest.mark.parametrize("home", ["missing", "file", "none"])
def test_report_on_the_kernels_needs_no_cache(home, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(info, "_compiled_report", lambda arguments: "report")
    (tmp_path / "file").touch()  # no folder can be made in it
    monkeypatch.setenv("XDG_CACHE_HOME", "no absolute path" if home == "none" else str(tmp_path / home))
    assert info.kernel_report([90]) == "report"


@pytest.mark.slow
def test_info_as_json_with_the_report_on_the_kernels(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the report compiles the kernels nevertheless
    assert main(["info", "--kernels", "--cc", "90", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"]["torch"] == torch.__version__
    assert facts["default"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert {(record["cc"], record["spill_bytes"]) for record in facts["kernels"]} == {(90, 0)}


def test_kernels_without_triton(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["info", "--kernels"]) == 0
    assert "no kernels: Triton is not installed" in capsys.readouterr().out
    assert main(["info", "--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] is None


def test_unknown_compute_capability_is_an_error(capsys):
    assert main(["info", "--cc", "1"]) == 2
    err = capsys.readouterr().err
    told, error = err.splitlines()
    assert told.startswith("fastddpm: compiling the kernels")
    assert re.fullmatch(r"fastddpm: error: RuntimeError: the report on the kernels failed: .+", error)
