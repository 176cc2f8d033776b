"""The process in which Triton interprets the kernels."""

import subprocess
import sys

import pytest
import torch

from fastddpm.verify import interpreter
from fastddpm.verify.accuracy import Record
from fastddpm.verify.rungs import OF_KERNELS
from tests.verify.checkpoint import SCHEDULE


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_damage_reaches_the_interpreter():
    pytest.importorskip("triton")
    records = interpreter.interpreted_records(SCHEDULE, "step")
    assert {record.rung for record in records} == set(OF_KERNELS)
    assert {record.rung for record in records if record.verdict != "pass"} == {"step"}
    assert all(isinstance(record, Record) for record in records)


def test_without_triton_the_interpreter_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text("raise ImportError('it is not for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records = interpreter.interpreted_records(SCHEDULE, None)
    assert [record.rung for record in records] == list(OF_KERNELS)
    assert {(record.verdict, record.note) for record in records} == {
        ("skipped", "no Triton: it is not for this machine")
    }


def test_a_crashed_interpreter_fails_all_its_rungs(tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text("raise SystemError('triton is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records = interpreter.interpreted_records(SCHEDULE, None)
    assert {record.rung for record in records} == set(OF_KERNELS)
    assert {(record.verdict, record.note) for record in records} == {("FAIL", "SystemError: triton is broken")}


def test_verify_on_a_cpu_does_not_import_triton(tiny):
    code = """
import sys
from fastddpm.verify import interpreter, ladder
interpreter.interpreted_records = lambda *_: []  # in another process
ladder.verify(sys.argv[1], device="cpu", steps=1, progress=False)
assert not {"triton", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, tiny], check=True)
