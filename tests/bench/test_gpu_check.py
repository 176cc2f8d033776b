"""The GPU check: a stage that hangs or crashes does not affect the others, and results become records."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import needs_gpu

pytest.importorskip("pytest_benchmark")  # bench needs it

from bench import gpu_check, gpu_records, gpu_results, readme, records
from bench.gpu_check import Stage
from bench.history import Result

ROOT = Path(__file__).parents[2]
MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "scale": "cuda"}
CEILINGS = {"copy": 4000.0, "bf16": 800.0}
STEPS = [  # batch, engine, cudnn.benchmark, milliseconds
    (64, "graph", False, 2.25),
    (64, "eager", False, 9),
    (1, "graph", False, 0.96),
    (64, "graph", True, 2),
    (1, "eager", False, 9.5),
]
PASSED = {"time": "2026-11-29T10:00:00Z", "outcome": "passed", "reason": None}
FILES = {"check.jsonl", "check.log", "check.txt", "report.html"}


def stage(name, code, seconds=60):
    """A stage that runs Python code, with `write_result` imported."""
    return Stage(name, seconds, [sys.executable, "-c", f"from bench.gpu_results import write_result\n{code}"])


def run(out, *stages, seconds=600):
    gpu_check.start_results(out, seconds, "cpu")
    gpu_check.run_stages(out, seconds, "cpu", stages)
    gpu_check.write_summary(out)
    return gpu_results.read_results(out)


def outcomes(lines):
    return {(line["stage"], line["name"]): (line["outcome"], line["reason"]) for line in lines[1:]}


def test_hanging_and_crashing_stages_do_not_affect_others(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    began = time.monotonic()
    lines = run(
        tmp_path,
        stage("hangs", f"write_result('before')\n{child}\nimport time; time.sleep(600)", seconds=3),
        stage("crashes", "write_result('before')\nimport os; print('the last words', flush=True); os.abort()"),
        stage("raises", "raise ValueError('first\\nsecond')"),
        Stage("is not there", 60, ["/nowhere/at-all"]),
        stage("works", "write_result('after', facts={'x': 1})"),
    )
    assert time.monotonic() - began < 60
    found = outcomes(lines)
    assert found["hangs", "before"] == found["crashes", "before"] == found["works", "after"] == ("passed", None)
    assert found["hangs", ""] == ("failed", "timed out after 3 s")
    assert found["crashes", ""][1].startswith("exit status -6: ")
    assert b"the last words" in (tmp_path / "check.log").read_bytes()
    assert found["raises", ""] == ("failed", "exit status 1: second")
    assert found["is not there", ""][0] == "failed"
    assert found["works", ""] == ("passed", None)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    printed = capsys.readouterr().out
    for name in ("hangs", "crashes", "raises", "is not there", "works"):
        assert printed.count(name) >= 2  # as progress, and in the summary
    assert (tmp_path / "check.txt").read_text() in printed
    assert "crashes: exit status -6: " in (tmp_path / "check.txt").read_text()


def test_long_output_is_cut_in_the_log_and_failures_have_tracebacks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "MAX_LOG", 1000)
    run(tmp_path, stage("talks", "print('first\\n' + 'x' * 5000)\nraise ValueError('last')"), stage("works", ""))
    log = (tmp_path / "check.log").read_text()
    assert len(log) < 2000
    assert log.index("== talks") < log.index("first") < log.index("... cut ...") < log.index("ValueError: last")
    assert "== works" in log


@pytest.mark.parametrize(("printed", "outcome"), [("0 errors", "passed"), ("2 errors", "failed")])
def test_stage_passes_only_with_its_proof(tmp_path, printed, outcome):
    lines = run(tmp_path, stage("memcheck", f"print({printed!r})")._replace(proof="0 errors"))
    assert outcomes(lines)["memcheck", ""][0] == outcome


def test_child_processes_are_killed_with_their_stage(tmp_path):
    file = tmp_path / "pid"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '600']); open({str(file)!r}, 'w').write(str(p.pid))"
    run(tmp_path / "out", stage("leaves a process", code))
    pid = int(file.read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still running")


def test_no_stage_starts_after_the_time_limit(tmp_path):
    lines = run(
        tmp_path, stage("long", "import time; time.sleep(600)"), stage("late", "write_result('never')"), seconds=6
    )
    assert [line["reason"] for line in lines[1:]] == ["timed out after 6 s", "no time left"]
    assert [line["outcome"] for line in lines[1:]] == ["failed", "skipped"]


def test_files_of_an_earlier_check_are_deleted(tmp_path):
    run(tmp_path, stage("first", "write_result('one')"))
    lines = run(tmp_path, stage("second", "write_result('two')"))
    assert [line["stage"] for line in lines[1:]] == ["second", "second"]
    assert b"first" not in (tmp_path / "check.log").read_bytes()


def test_device_is_passed_to_the_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code = "import os; write_result(repr([os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'GPU_CHECK_DEVICE')]))"
    assert run(tmp_path, stage("asks", code))[1]["name"] == "['', 'cpu']"


def test_interrupted_check_still_writes_its_summary(tmp_path):
    code = f"""
import sys
from bench import gpu_check
tells = [sys.executable, "-c", "from bench.gpu_results import write_result; write_result('one')"]
stages = [gpu_check.Stage("quick", 60, tells), gpu_check.Stage("endless", 60, ["sleep", "60"])]
gpu_check.all_stages = lambda: stages
gpu_check.main(["--out", {str(tmp_path)!r}, "--device", "cpu"])
"""
    check = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "quick          passed" not in check.stdout.readline():
        assert check.poll() is None
    check.send_signal(signal.SIGTERM)
    assert "quick" in check.communicate()[0]
    assert check.returncode == 143
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_each_test_is_one_result_even_under_xdist(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest, warnings\n"
        "def test_passes(): warnings.warn('of another version')\n"
        "def test_fails(): assert 1 == 2, 'one is\\nnot two'\n"
        "@pytest.mark.skip(reason='for a reason')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no such thing')\n"
        "def test_broken(broken): pass\n"
    )
    pytest_ini = tmp_path / "pytest.ini"
    pytest_ini.write_text("[pytest]\nfilterwarnings = error\n")
    [_, _, _, _, *options] = gpu_check._pytest(["x"], "not nothing", processes=2)
    options[options.index("cuda")] = "not cuda"
    command = [sys.executable, "-m", "pytest", "-c", str(pytest_ini), str(file), *options]
    lines = run(tmp_path / "out", Stage("tests", 120, command))
    found = {name.rpartition("::")[2]: result for (_, name), result in outcomes(lines).items()}
    assert found["test_passes"] == ("passed", None)
    assert found["test_fails"] == ("failed", "AssertionError: one is")
    assert found["test_skipped"] == ("skipped", "Skipped: for a reason")
    assert found["test_broken"] == ("failed", "OSError: no such thing")
    assert len(lines) == 6
    recorded = [record["name"].rpartition("::")[2] for record in gpu_records.to_records(lines)]
    assert sorted(recorded) == ["test_broken", "test_fails", "tests"]
    assert gpu_records.to_records(lines)[-1]["facts"]["results"] == {"passed": 1, "failed": 2, "skipped": 1}


def test_stages_refer_to_existing_files_and_functions():
    """Test files and measuring functions exist, and memcheck runs without torch's caching allocator."""
    from bench.gpu_stages import STAGES

    planned = {stage.name: stage for stage in gpu_check.all_stages()}
    measured = [shlex.split(part)[0] for s in planned.values() for part in s.command if "gpu_stages" in part]
    assert len(measured) == len(STAGES) == 9
    for name in STAGES:
        assert any(f"main({name!r})" in " ".join(stage.command) for stage in planned.values())
    tests = [part for stage in planned.values() for part in stage.command if part.startswith("tests/")]
    assert tests
    assert all((ROOT / path).exists() for path in tests)
    assert planned["memcheck"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_memcheck_runs_under_compute_sanitizer_if_installed(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho sanitizer ran\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    memcheck = next(stage for stage in gpu_check.all_stages() if stage.name == "memcheck")
    assert memcheck.command[:2] == [str(tool), "--report-api-errors=no"]
    assert outcomes(run(tmp_path / "out", memcheck))["memcheck", ""] == ("failed", "exit status 9: sanitizer ran")


@pytest.mark.parametrize("options", [["--seconds=0"], ["--seconds=nan"], ["--only", "nothing"]])
def test_invalid_options_are_rejected(tmp_path, options, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--out", str(tmp_path / "out"), *options])
    assert left.value.code == 2
    assert options[0].partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_rejected(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--out", str(tmp_path / "file"), "--device", "cpu"])
    assert left.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["smoke", "steps", "kernels", "hardware", "upsampling", "parallel", "robot", "diffusers", "memcheck"]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_measuring_stages_pass_at_tiny_sizes(tmp_path, monkeypatch, name, device):
    monkeypatch.setenv("BENCH_TINY", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu_check.start_results(tmp_path, 600, device)
    planned = {stage.name: stage._replace(limit_s=600) for stage in gpu_check.all_stages()}
    gpu_check.run_stages(tmp_path, 600, device, [planned[name]])
    lines = gpu_results.read_results(tmp_path)
    no_sanitizer = ("skipped", "compute-sanitizer was not found, so memory accesses were not checked")
    assert set(outcomes(lines).values()) <= {("passed", None), no_sanitizer}, (tmp_path / "check.log").read_text()
    assert (no_sanitizer in outcomes(lines).values()) == (name == "memcheck" and not planned[name].proof)
    found = gpu_records.to_records(lines)
    assert [records._fault(record) for record in found] == [None] * len(found)
    names = {record["name"].partition(": ")[2] for record in found}
    if name == "smoke":
        fast = "graph" if device == "cuda" else "auto"
        assert names == {"", "machine", f"{fast} equals eager, bf16", f"{fast} equals eager, fp32"}
        assert found[0]["machine"]["torch"]
        assert found[0]["scale"] == "tiny"
    elif name == "steps":
        assert {"batch 2, eager", "batch 2, eager, cudnn.benchmark"} <= names
        assert all(record["samples_s"] and record["errors"] for record in found[:-1])
    elif name == "kernels":
        profile = found[0]["facts"]
        assert profile["launches"].keys() == profile["kinds_s"].keys()
        assert profile["names_us"]
        assert next(iter(profile["names_us"])) in gpu_check.summary(lines)
    elif name == "hardware":
        assert {"ceilings", "200 empty kernels"} <= names
        assert found[0]["ceilings"]["copy"] > 0
        assert sum(" x conv " in text for text in names) > 10
    elif name == "upsampling":
        assert {"batch 2, interpolated", "batch 2, polyphase", "batch 2, polyphase, repeated"} <= names
    elif name == "parallel":
        assert {"one sample, law fp32, window 3", "one sample, bits fp32, window 3"} <= names
        assert all(record["samples_s"] and record["errors"] for record in found[:-1])
    elif name == "memcheck":
        assert {"step", "chains", "interleave", "group_norm, one pixel"} <= names


# Records


def h200_records(tmp_path, *more):
    """Write result lines as on an H200. Returns: their records."""
    gpu_check.start_results(tmp_path, 540, "cuda")
    measured = {"hash": "abc", "calls": 10, "clock": "cuda events", "cache": "hot", "precision": "bf16"}
    lines = [{"stage": "smoke", "name": "machine", "facts": MACHINE}]
    for batch, engine, cudnn_benchmark, ms in STEPS:
        params = {"batch": batch, "engine": engine, "cudnn_benchmark": cudnn_benchmark}
        work = {"flops": 12.4e9 * batch, "bytes": 10**9, "images": batch / 1000}
        name = f"batch {batch}, {engine}{', cudnn.benchmark' * cudnn_benchmark}"
        lines.append(
            {"stage": "steps", "name": name, "params": params, "samples_s": [ms / 1e3] * 3, **measured, **work}
        )
    lines.append({"stage": "hardware", "name": "ceilings", "facts": {"ceilings": CEILINGS}})
    diffusers = {"stage": "diffusers", "name": "batch 1, diffusers eager bf16", "samples_s": [0.02], "images": 0.001}
    for line in [*lines, diffusers | measured, *more]:
        records.append(tmp_path / "check.jsonl", PASSED | line)
    return gpu_records.to_records(gpu_results.read_results(tmp_path))


def test_main_writes_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123456789abcdef")
    h200_records(tmp_path / "check")
    results = tmp_path / "results"
    command = [str(tmp_path / "check"), "--results", str(results)]
    assert gpu_records.main(command) == 0
    [path] = results.rglob("*.jsonl")
    assert path.parent.name == "nvidia-h200"
    assert path.name.endswith("-0123456-check.jsonl")
    found = records.read([results])
    assert len(found) == 8
    assert {record["commit"] for record in found} == {"0123456789abcdef"}
    step = next(record for record in found if record["name"] == "steps: batch 64, graph")
    assert step["shares"]["TFLOP/s"]["share"] == pytest.approx(64 * 12.4e9 / 2.25e-3 / 800e12)
    assert step["shares"]["GB/s"]["rate"] == pytest.approx(1 / 2.25e-3)
    assert Result(step).images == pytest.approx(64 / 2.25)
    table = readme.tables(found)["GPU"]
    assert table.startswith("Measured on one NVIDIA H200 (torch 2.11.0, ")
    assert "| 1 | 20.0 | 9.50 | 0.960 | – | 1.04 | 1.6 % |" in table
    assert "| 64 | – | 9.00 | 2.25 | 2.00 | 32.0 | 50 % |" in table
    before = path.read_bytes()
    assert gpu_records.main(command) == 0  # running it again changes nothing
    assert path.read_bytes() == before
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [str(path)] * 2


def test_check_of_a_cpu_has_its_own_folder(tmp_path):
    gpu_check.start_results(tmp_path, 540, "cpu")
    line = {"stage": "smoke", "name": "machine", "facts": MACHINE | {"gpu": None, "cpu": "Xeon", "scale": "tiny"}}
    records.append(tmp_path / "check.jsonl", PASSED | line)
    assert gpu_records.main([str(tmp_path), "--results", str(tmp_path)]) == 0
    found = records.read([tmp_path / "xeon-1-threads"])
    assert len(found) == 1
    assert readme.tables(found) == {name: f"{text}\n" for name, text in readme.NOTHING.items()}


def test_records_are_never_overwritten(tmp_path, capsys):
    found = h200_records(tmp_path / "check")
    path = gpu_records.write_records(found, tmp_path)
    with pytest.raises(ValueError, match="exists with other records"):
        gpu_records.write_records(found[:-1], tmp_path)
    assert len(path.read_text().splitlines()) == len(found)


@pytest.mark.parametrize("text", ["", '{"schema": 1}\n', "nonsense\n"])
def test_other_files_are_rejected(tmp_path, text, capsys):
    (tmp_path / "check.jsonl").write_text(text)
    with pytest.raises(SystemExit) as left:
        gpu_records.main([str(tmp_path)])
    assert left.value.code == 2
    assert "is not a result file of make gpu-check" in capsys.readouterr().err


def test_truncated_line_is_skipped(tmp_path):
    found = h200_records(tmp_path)
    path = tmp_path / "check.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len(gpu_records.to_records(gpu_results.read_results(tmp_path))) == len(found) - 1


def test_summary_names_the_machine_and_the_failures(tmp_path):
    why = {"outcome": "failed", "reason": "RuntimeError: the bits differ"}
    h200_records(tmp_path, {"stage": "smoke", "name": "graph equals eager, bf16", **why})
    text = gpu_check.summary(gpu_results.read_results(tmp_path))
    assert text.startswith("NVIDIA H200: torch 2.11.0, triton 3.6.0")
    assert "copy 4,000 GB/s, bf16 800 TFLOP/s" in text
    assert "smoke: graph equals eager, bf16: RuntimeError: the bits differ" in text
    [line] = [line for line in text.splitlines() if "batch 64, graph " in line]
    assert "2.25 ms" in line
    assert "28.4 images/s" in line


@pytest.mark.slow
def test_make_runs_the_check_without_installing(tmp_path):
    """As on a GPU machine with the packages installed and without network access."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET", "MAKE"))}
    kept |= {"BENCH_TINY": "1", "OUT": str(tmp_path), "PIP_NO_INDEX": "1", "COMMIT": "abc-dirty"}
    check = ["make", "gpu-check", f"PYTHON={sys.executable}", "GPU_CHECK=--device cpu --only smoke"]
    done = subprocess.run(check, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "check.jsonl").read_text().splitlines()[0])["commit"] == "abc"
