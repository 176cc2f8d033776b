"""Comparisons of builds: the judge on simulated clocks, turns with small processes, the command with small builds."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

pytest.importorskip("pytest_benchmark")  # bench needs it

from bench import compare, judge, trees, turns
from bench.judge import Case, Comparison

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "BENCH", "COMMIT"))}
LIMITS = {"threshold": 0.05, "p": 0.002}


# The judge


def clock(seconds, rounds, rng, drift=lambda t: 1.0, *, interleaved=True):
    """Return samples of two equal builds on a machine that is noisy, sometimes interrupted, and drifts."""
    order = np.tile([0, 1, 1, 0], rounds)[: 2 * rounds] if interleaved else np.repeat([0, 1], rounds)
    samples = [], []
    for now, side in enumerate(order):
        noise = rng.lognormal(0, 0.025) * (1 + (rng.random() < 0.05) * rng.exponential(0.5))
        samples[side].append(seconds * noise * drift(now / len(order)))
    return samples


def verdict(samples, slower=1.0, **limits):
    base, head = samples
    return judge.judge("a case", [base], [[slower * seconds for seconds in head]], **LIMITS | limits).verdict


@pytest.mark.parametrize(("rounds", "least"), [(10, 85), (20, 99), (50, 100)])
def test_planted_slowdown_is_found(rounds, least):
    rng = np.random.default_rng(rounds)
    for slower, want in ((1.1, "slower"), (1 / 1.1, "faster")):
        found = [verdict(clock(0.01, rounds, rng), slower) for _ in range(100)]
        assert found.count(want) >= least
        assert set(found) <= {want, "unchanged"}


DRIFTS = {
    "none": lambda t: 1.0,
    "warming up": lambda t: 1 + 0.3 * t,
    "throttled halfway": lambda t: 1.0 if t < 0.5 else 1.4,
    "waves": lambda t: 1 + 0.1 * np.sin(40 * t),
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("rounds", [7, 20])
def test_equal_builds_differ_no_more_often_than_by_chance(drift, rounds):
    """The threshold is 0, so that only p decides; p = 0.05 gives more differences to count."""
    rng = np.random.default_rng(rounds)
    runs = [clock(1e-4, rounds, rng, DRIFTS[drift]) for _ in range(1000)]
    for p in (0.002, 0.05):
        verdicts = [verdict(run, threshold=0, p=p) for run in runs]
        slower, faster = verdicts.count("slower"), verdicts.count("faster")
        assert slower <= binom.ppf(0.999, 1000, p / 2)
        assert faster <= binom.ppf(0.999, 1000, p / 2)
    if drift == "none" and rounds == 20:
        assert slower + faster >= binom.ppf(0.001, 1000, 0.05), "it is not simply blind"
    assert sum(verdict(run) != "unchanged" for run in runs) <= 1


def launches(number, effect, rng, drift=lambda t: 1.0):
    """Return samples of two equal builds whose processes differ in all of their rounds, on a machine that drifts."""
    runs = [clock(0.01 * drift(launch / number), 10, rng) for launch in range(number)]
    return [[np.multiply(run[side], rng.lognormal(0, effect)) for run in runs] for side in (0, 1)]


@pytest.mark.parametrize("drift", DRIFTS)
def test_slow_process_is_not_a_regression(drift):
    """Samples of one process are not independent of each other, so one launch with p alone is deceived."""
    rng = np.random.default_rng(1)

    def count(number, effect, slower=1.0):
        runs = [launches(number, effect, rng, DRIFTS[drift]) for _ in range(1000)]
        verdicts = [judge.judge("a case", base, [slower * run for run in head], **LIMITS) for base, head in runs]
        return sum(found.verdict == "slower" for found in verdicts)

    assert count(1, 0.03) > 50
    assert count(3, 0.03) <= binom.ppf(0.999, 1000, 0.002)
    if drift in ("none", "waves"):
        assert count(3, 0.01, slower=1.1) > 950


def test_unpaired_runs_are_compared_each_with_each():
    rng = np.random.default_rng(0)
    base, slow, equal = (rng.lognormal(0, 0.01, (3, 20)) * factor for factor in (1, 1.1, 1))
    assert judge.judge("a case", base, slow[:2], **LIMITS).verdict == "slower"
    assert judge.judge("a case", base, [slow[0], equal[0]], **LIMITS).verdict == "unchanged"
    assert judge.judge("a case", slow, base[:2], **LIMITS).verdict == "faster"


def test_without_turns_drift_looks_like_a_difference():
    rng = np.random.default_rng(0)
    runs = [clock(0.01, 20, rng, DRIFTS["warming up"], interleaved=False) for _ in range(20)]
    assert [verdict(run) for run in runs] == ["slower"] * 20


def test_small_differences_and_noise_do_not_count():
    steady, rng = np.linspace(1, 1.001, 20), np.random.default_rng(0)
    assert verdict((steady, 1.04 * steady)) == "unchanged"
    assert verdict((steady, 1.06 * steady)) == "slower"
    assert verdict((steady, 1.04 * steady), threshold=0.03) == "slower"
    assert verdict((1.06 * steady, steady)) == "faster"
    noise = rng.lognormal(0, 1, (2, 20))
    noise = min(noise, key=np.median), max(noise, key=np.median)
    assert np.median(noise[1]) > 1.1 * np.median(noise[0])
    assert verdict(noise) == "unchanged"


@pytest.mark.parametrize(("p", "n", "m"), [(0.002, 7, 7), (0.002, 5, 9), (0.05, 4, 4), (0.05, 3, 5), (1e-4, 9, 9)])
def test_too_few_samples_can_never_reach_p(p, n, m):
    base, head = list(range(1, n + 1)), list(range(100, 100 + m))
    found = judge.judge("a case", [base], [head], threshold=0.05, p=p)
    assert found.verdict == "slower"
    assert found.p == pytest.approx(judge.smallest_p(n, m))
    few = judge.judge("a case", [base[1:]], [head[1:]], threshold=0.05, p=p)
    assert (few.verdict, few.p, few.ratio > 1) == ("too few samples", None, True)
    assert "--launches 2" in few.reason


def test_suggested_number_of_launches_suffices():
    few = judge.judge("a case", [[1.0, 2.0]], [[3.0, 4.0]], **LIMITS)
    assert re.search(r"2 and 2 .*--launches 4", few.reason)
    assert judge.smallest_p(8, 8) < 0.002 <= judge.smallest_p(6, 6)


def test_equal_samples_are_unchanged():
    assert verdict(([0.01] * 10, [0.01] * 10)) == "unchanged"
    assert verdict(([0.01] * 10, [0.02] * 10)) == "slower"


# Records


def record(name, samples=(), **fields):
    samples = [float(seconds) for seconds in samples]
    return {
        **{"schema": 1, "run": "2026-11-22T21:00:00Z", "time": "2026-11-22T21:03:11Z"},
        **{"case": f"test_kernels.py::{name.partition('[')[0]}", "name": name, "params": {}, "hash": "a1b2c3d4e5f6"},
        **{"group": None, "contender": None, "outcome": "passed", "reason": None, "invalid": [], "samples_s": samples},
        **{"calls": 1, "clock": "wall", "cache": "hot", "bytes": 0, "flops": 0, "precision": None, "images": 0},
        **{"shares": {}, "errors": None, "facts": {}, "ceilings": {"copy": 10.0}, "device": "a-device", "scale": "cpu"},
        **{"machine": {"torch": "2.13.0"}, "watch": {}, "commit": "ab" * 20, "dirty": False},
        **fields,
    }


TEN = [1e-3 * (1 + 0.001 * k) for k in range(10)]
SLOW = [1.2 * seconds for seconds in TEN]


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def only(base, head, **limits):
    (case,) = judge.compare(base, head, **limits).cases
    return case


@pytest.mark.parametrize(
    ("base", "head", "reason"),
    [
        ({}, {"hash": "0"}, "the case itself differs: a1b2c3d4e5f6 and 0"),
        ({}, {"scale": "tiny"}, "scales differ: cpu and tiny"),
        ({"params": {"n": 1}}, {"params": {"n": 2}}, "parameters differ: {'n': 1} and {'n': 2}"),
        ({}, {"outcome": "skipped", "reason": "no GPU", "samples_s": []}, "skipped (no GPU) in head"),
        ({"outcome": "failed", "reason": "error is 1", "samples_s": []}, {}, "failed in base: error is 1"),
        ({"invalid": ["throttled", "shared"]}, {}, "invalid (throttled; shared) in base"),
        ({}, {"invalid": ["throttled"]}, "invalid (throttled) in head"),
        ({"samples_s": []}, {"samples_s": []}, "without timings in base"),
        (
            {"outcome": "skipped", "reason": "no", "samples_s": []},
            {"outcome": "failed", "reason": "x"},
            "failed in head: x",
        ),
    ],
)
def test_cases_that_are_not_compared_have_a_reason(base, head, reason):
    assert only([record("a", TEN, **base)], [record("a", SLOW, **head)]) == Case(
        "test_kernels.py::a", "not compared", reason
    )


def test_cases_of_one_side_are_not_compared():
    found = judge.compare([record("a", TEN), record("b", TEN)], [record("b", TEN), record("c", TEN)])
    assert [(case.case[-1], case.verdict, case.reason) for case in found.cases] == [
        ("b", "unchanged", None),
        ("a", "not compared", "only in base"),
        ("c", "not compared", "only in head"),
    ]


@pytest.mark.parametrize("samples", [TEN, []])
def test_case_that_fails_in_head_is_broken(samples):
    failed = record("a", outcome="failed", reason="rms error is 1, twice plain torch's 0.1")
    found = judge.compare([record("a", samples)], [failed])
    assert (found.cases[0].verdict, found.status) == ("broken", 1)
    assert "rms error is 1" in found.cases[0].reason
    assert only([record("a", TEN)], [record("a", TEN), failed]).verdict == "broken", "even if not in each run"


def test_case_that_runs_out_of_memory_in_head_is_broken():
    short = record("a", outcome="skipped", reason="out of memory: CUDA out of memory. Tried to allocate 2 GiB")
    found = judge.compare([record("a", TEN)], [short])
    assert (found.cases[0].verdict, found.status) == ("broken", 1)
    assert "Tried to allocate 2 GiB" in found.cases[0].reason
    assert only([short], [short]).verdict == "not compared"
    assert only([short], [record("a", TEN)]).verdict == "not compared"


def test_equal_names_in_two_modules_are_two_cases():
    other = {"case": "test_races.py::a"}
    found = judge.compare([record("a", TEN), record("a", TEN, **other)], [record("a", TEN), record("a", SLOW, **other)])
    assert [(case.case, case.verdict) for case in found.cases] == [
        ("test_races.py::a", "slower"),
        ("test_kernels.py::a", "unchanged"),
    ]


def test_runs_of_the_same_case_are_pooled():
    later = {"run": "2026-11-22T22:00:00Z"}
    few = [record("a", TEN[:4]), record("a", TEN[:4], **later)], [record("a", SLOW[:4]), record("a", SLOW[:4], **later)]
    found = only(*few)
    assert (found.verdict, found.samples) == ("slower", (8, 8))
    old = [record("a", SLOW, hash="0"), record("a", TEN, **later)]
    found = only(old, [record("a", TEN)])
    assert (found.verdict, found.samples) == ("unchanged", (10, 10)), "the latest alone"
    invalid = [record("a", SLOW, invalid=["throttled"]), record("a", TEN, **later)]
    found = only(invalid, [record("a", TEN)])
    assert (found.verdict, found.samples) == ("unchanged", (10, 10)), "the valid alone"


def test_records_of_different_devices_are_rejected(tmp_path, capsys):
    files = [write(tmp_path / f"{n}.jsonl", record("a", TEN, device=n)) for n in ("gpu-a", "gpu-b")]
    assert failure(files, capsys) == (
        "bench.compare: error: base was measured on gpu-a, head on gpu-b; want records of one device: measure both on "
        "it (see python -m bench.compare --help)"
    )


def test_only_common_devices_are_compared():
    base = [record("a", TEN, device=device) for device in ("one", "two")]
    found = judge.compare(base, [record("a", SLOW, device="two")])
    assert [(case.case, case.verdict) for case in found.cases] == [
        ("test_kernels.py::a on two", "slower"),
        ("test_kernels.py::a on one", "not compared"),
    ]


# The command on stored records


def failure(argv, capsys):
    """Return the one line on stderr of a command that fails with status 2."""
    with pytest.raises(SystemExit) as end:
        compare.main([str(word) for word in argv])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.strip()


@pytest.fixture
def stored(tmp_path):
    base = write(
        tmp_path / "base.jsonl",
        record("slow[64-bf16]", TEN),
        record("bad", TEN),
        record("same", TEN),
        record("fast", SLOW),
        record("few", [2.0, 3.0]),
        record("gone", TEN),
    )
    head = write(
        tmp_path / "results" / "a-device" / "head.jsonl",
        record("slow[64-bf16]", SLOW, commit="cd" * 20, dirty=True, machine={"torch": "2.14.0"}),
        record("bad", outcome="failed", reason="1 of 3 elements differ | in `x`"),
        record("same", TEN),
        record("fast", TEN),
        record("few", [2.0, 3.0]),
    )
    return [base, str(Path(head).parents[1])]


def test_text(stored, capsys):
    assert compare.main(stored) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "base abababababab, head cdcdcdcdcdcd-dirty, abababababab, on a-device"
    table = [re.split("  +", line) for line in lines if line.startswith("test_kernels.py::")]
    assert [row[0][17:] for row in table] == ["bad", "slow[64-bf16]", "few", "same", "fast"]
    assert table[0][1:] == ["-", "-", "-", "-", "broken: failed in head: 1 of 3 elements differ | in `x`"]
    assert table[1][1:] == ["1.004 ms", "1.205 ms", "1.200", "1.1e-05", "slower"], "exact: 2 / C(20, 10)"
    assert table[2][1:4] == ["2.5 s", "2.5 s", "1.000"]
    assert table[4][-1] == "faster"
    assert lines[-4:-2] == ["not compared:", "  test_kernels.py::gone: only in base"]
    assert lines[-1] == (
        "1 broken, 1 slower, 1 too few samples, 1 unchanged, 1 faster, 1 not compared (threshold 5 %, p < 0.002)"
    )


def test_json(stored, capsys):
    assert compare.main([*stored, "--json", "--threshold", "25"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["threshold"], found["p"], found["problems"]) == (1, 0.25, 0.002, [])
    cases = {case["case"]: case for case in found["cases"]}
    assert {name[17:]: case["verdict"] for name, case in cases.items()} == {
        **{"bad": "broken", "slow[64-bf16]": "unchanged", "same": "unchanged", "fast": "unchanged"},
        **{"few": "too few samples", "gone": "not compared"},
    }
    slow = cases["test_kernels.py::slow[64-bf16]"]
    assert slow["ratio"] == pytest.approx(1.2)
    assert slow["head_s"] == pytest.approx(1.2 * slow["base_s"])
    assert slow["samples"] == [10, 10]
    assert cases["test_kernels.py::bad"]["ratio"] is None


def test_markdown(stored, capsys):
    assert compare.main([*stored, "--markdown"]) == 1
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}, "no | in a cell"
    visible, _, folded = text.partition("<details>")
    assert [re.search(r"\*\*(.*)\*\*", line)[1] for line in visible.splitlines() if "| `test" in line] == [
        *("broken", "slower", "too few samples", "faster")
    ]
    assert r"`` failed in head: 1 of 3 elements differ \| in `x` ``" in visible
    assert "<summary>1 unchanged</summary>\n\n| case |" in folded
    assert "- `test_kernels.py::gone`: `only in base`" in folded
    assert text.count("<details>") == text.count("</details>") == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("test[a](b) <b> @you", "`test[a](b) <b> @you`"),
        ("two\nlines", "`two lines`"),
        ("`", "`` ` ``"),
        ("a``b", "``` a``b ```"),
    ],
)
def test_any_text_is_quoted_as_code(text, code):
    assert compare._code(text) == code
    assert compare._cell(text) == code


def test_bars_are_escaped_in_cells():
    assert compare._code(r"a|b\|c") == r"`a|b\|c`"
    assert compare._cell(r"a|b\|c") == r"`a\|b\ \|c`"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (1234.5, "1234 s"), (1, "1 s"), (0.9, "900 ms"), (1e-3, "1 ms"), (2.5e-5, "25 us"), (1e-7, "0.1 us")],
)
def test_readable(seconds, text):
    assert compare.readable(seconds) == text


@pytest.mark.parametrize(
    ("verdicts", "problems", "status"),
    [
        (["unchanged", "not compared"], [], 0),
        (["faster"], [], 0),
        (["unchanged", "slower"], [], 1),
        (["unchanged", "broken"], ["head died"], 1),
        (["unchanged"], ["head died"], 2),
        (["not compared", "too few samples"], [], 2),
        ([], [], 2),
    ],
)
def test_exit_status(verdicts, problems, status):
    cases = [Case("a case", verdict) for verdict in verdicts]
    assert Comparison([], cases, **LIMITS, problems=problems).status == status


def test_truncated_line_is_reported_and_skipped(tmp_path, capsys):
    base, head = (write(tmp_path / name, record("a", TEN)) for name in ("base.jsonl", "head.jsonl"))
    with Path(head).open("a") as file:
        file.write('{"schema": 1, "ru')
    assert compare.main([base, head]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"bench.compare: {head}, line 2: skipped")
    assert out.endswith("1 unchanged (threshold 5 %, p < 0.002)\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{file}", "{tree}"], "base is records, head is installed; want records for both, or a build for both"),
        (["HEAD~0", "{file}"], "base is revision, head is records; want records for both, or a build for both"),
        (["{file}", "nowhere"], "nowhere is neither records nor a build of the package; want a file or folder"),
        (["{file}", "{empty}"], "{empty} is neither records"),
        (["{file}", "{file}", "--launches", "2"], "stored records are not measured again; leave out --select"),
        (["{file}", "{file}", "--", "-x"], "stored records are not measured again"),
        (["{tree}", "{tree}", "--keep", "{empty}"], "--keep is {empty}, which exists; want a new folder"),
        (["{file}", "{file}", "--threshold", "-1"], "argument --threshold: '-1' is not a number from 0 to 1000"),
        (["{file}", "{file}", "--p", "nan"], "argument --p: 'nan' is not a number from 1e-12 to 1"),
        (["{file}", "{file}", "--launches", "0"], "argument --launches: '0' is not a whole number of 1 or more"),
        (["{file}", "{file}", "--json", "--markdown"], "argument --markdown: not allowed with argument --json"),
    ],
)
def test_invalid_arguments_are_rejected(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(trees, "kind", lambda name, kind=trees.kind: "revision" if name == "HEAD~0" else kind(name))
    places = {"file": write(tmp_path / "a.jsonl", record("a", TEN)), "empty": tmp_path / "empty"}
    places |= {"tree": build(tmp_path / "tree", "")}
    places["empty"].mkdir()
    line = failure([word.format(**places) for word in argv], capsys)
    assert f"bench.compare: error: {message.format(**places)}" in line


# Turns


PLAYER = """
import json, os, signal, sys, time
from types import SimpleNamespace
from bench import turns

name, log, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def note(*words):
    with open(log, "a") as file:
        print(name, *words, file=file)

note("starts", os.getpid())
turns.pytest_collection_finish(SimpleNamespace(items=[SimpleNamespace(nodeid=case) for case, _ in plan]))
for case, rounds in plan:
    if isinstance(rounds, str):
        exec(rounds)
        continue
    for number in range(rounds):
        turns.over(case)
        note("begins", case, number)
        note("ends", case, number)
note("stops")
"""


def play(tmp_path, *plans):
    """Run two processes in turns; a plan is a list of cases with their rounds, or with code to run there.

    Returns: (what the two did, in order; their exit statuses).
    """
    log, environment = tmp_path / "log", ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    sides = [
        turns.Side(
            [sys.executable, "-c", PLAYER, name, str(log), json.dumps(plan)],
            **{"cwd": tmp_path, "env": environment, "log": tmp_path / f"{name}.log"},
        )
        for name, plan in zip("AB", plans, strict=True)
    ]
    turns.alternate(sides, "playing")
    return [line.split() for line in log.read_text().splitlines()], [side.status for side in sides]


def rounds(events):
    """Return the rounds, like "A:x0", after checking that each ran alone."""
    timed = [event for event in events if event[1] in ("begins", "ends")]
    begun, ended = timed[::2], timed[1::2]
    assert [[name, *rest] for name, _, *rest in begun] == [[name, *rest] for name, _, *rest in ended]
    assert {event[1] for event in begun} | {event[1] for event in ended} == {"begins", "ends"}
    return [f"{name}:{case}{number}" for name, _, case, number in begun]


def test_rounds_alternate(tmp_path):
    plan = [("x", 5), ("y", 2)]
    events, statuses = play(tmp_path, plan, plan)
    assert [event[:2] for event in events[:2]] == [["A", "starts"], ["B", "starts"]]
    assert " ".join(rounds(events)) == ("A:x0 B:x0 B:x1 A:x1 A:x2 B:x2 B:x3 A:x3 A:x4 B:x4 B:y0 A:y0 A:y1 B:y1")
    assert statuses == [0, 0]


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ([("x", 3), ("y", 2)], [("x", 1), ("y", 2)], "A:x0 B:x0 A:x1 A:x2 B:y0 A:y0 A:y1 B:y1"),
        ([("x", 2), ("y", 2)], [("x", 0), ("y", 2)], "A:x0 A:x1 A:y0 B:y0 B:y1 A:y1"),
        ([("x", 0), ("y", 2)], [("x", 2), ("y", 2)], "B:x0 B:x1 A:y0 B:y0 B:y1 A:y1"),
        ([("y", 2)], [("x", 1), ("y", 2), ("z", 1)], "B:x0 A:y0 B:y0 B:y1 A:y1 B:z0"),
        ([("x", 1), ("z", 1)], [("y", 2), ("z", 1)], "B:y0 B:y1 A:x0 A:z0 B:z0"),
        ([], [("x", 2)], "B:x0 B:x1"),
        ([("x", 2), ("x", "sys.exit(3)"), ("y", 2)], [("x", 2), ("y", 1)], "A:x0 B:x0 B:x1 A:x1 B:y0"),
    ],
)
def test_side_that_is_behind_catches_up(tmp_path, one, other, want):
    events, statuses = play(tmp_path, one, other)
    assert " ".join(rounds(events)) == want
    assert statuses == [3 if "sys.exit(3)" in str(one) else 0, 0]


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
KILL_A = "pid = int(open(log).readline().split()[2]); os.kill(pid, signal.SIGKILL)"
OUTLIVED = "os.fork() or (time.sleep(4), note('outlives'), os._exit(0)); os._exit(7)"


@pytest.mark.parametrize(
    ("one", "other", "statuses"),
    [
        ([("x", KILLED), ("x", 3)], [("x", 3)], [-9, 0]),
        ([("x", 1), ("x", KILLED), ("x", 2)], [("x", 3)], [-9, 0]),
        ([("x", 3)], [("x", 3), ("x", KILLED)], [0, -9]),
        ([("x", 3)], [("x", 1), ("x", KILL_A), ("x", 2)], [-9, 0]),
        ([("x", 3)], [("x", KILL_A), ("x", 3)], [-9, 0]),
        ([("x", 1), ("x", KILLED)], [("x", 1), ("x", KILLED)], [-9, -9]),
        ([("x", 1), ("x", OUTLIVED)], [("x", 3)], [7, 0]),
        ([("x", 1), ("x", "os.close(int(os.environ['BENCH_TURNS'])); raise SystemExit")], [("x", 3)], [0, 0]),
    ],
)
def test_other_side_continues_when_one_dies(tmp_path, one, other, statuses):
    events, found = play(tmp_path, one, other)
    assert found == statuses
    assert "outlives" not in [event[1] for event in events], "nobody waits for a child of the dead"
    done = rounds([event for event in events if event[0] == "B"])
    assert done == [f"B:x{number}" for _, n in other if isinstance(n, int) for number in range(n)]


def test_waiting_takes_no_cpu_time(tmp_path):
    note = "began = time.process_time(), time.monotonic(); turns.over('x'); "
    note += "note('waited', time.process_time() - began[0], time.monotonic() - began[1])"
    events, _ = play(tmp_path, [("x", 1), ("x", "time.sleep(0.4)"), ("x", 1)], [("x", note)])
    ((cpu, wall),) = [map(float, event[2:]) for event in events if event[1] == "waited"]
    assert wall >= 0.4
    assert cpu < 0.1


def test_over_returns_at_once_without_a_partner(monkeypatch):
    monkeypatch.delenv("BENCH_TURNS", raising=False)
    turns.over("a case")


def test_process_ends_when_its_parent_has_ended():
    ours, theirs = socket.socketpair()
    with theirs:
        environment = ENVIRONMENT | {"BENCH_TURNS": str(theirs.fileno()), "PYTHONPATH": str(ROOT)}
        code = "from bench import turns; turns.over('a case')"
        run = [sys.executable, "-c", code]
        left = subprocess.Popen(run, env=environment, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    with ours:
        assert ours.makefile().readline() == '"a case"\n'
    _, err = left.communicate()
    assert left.returncode == -signal.SIGINT
    assert "KeyboardInterrupt: the process that gives turns has ended" in err


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ("abc", "abc", "abc"),
        ("ac", "abc", "abc"),
        ("", "ab", "ab"),
        ("bc", "ac", "abc"),
        ("ab", "bcd", "abcd"),
        ("ab", "ba", "ab"),
    ],
)
def test_two_orders_of_cases_are_merged(one, other, want):
    assert "".join(turns.merged(one, other)) == want


# The command on builds


def build(folder, source):
    """Return an installed package of this source."""
    (folder / "fastddpm" / "kernels").mkdir(parents=True)
    (folder / "fastddpm" / "__init__.py").write_text(source)
    (folder / "fastddpm" / "kernels" / "__init__.py").write_text("")
    return folder


CONFTEST = """
import os
from datetime import datetime, timezone
from pathlib import Path

import fastddpm
import pytest
from bench import records, turns

RUN = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
MEASURED = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--records", type=Path)


def pytest_sessionstart(session):
    commit = records.commit()[0]
    session.config.file = records.new_file(session.config.getoption("records"), "a-device", RUN, commit)
    session.config.note = Path(os.environ["EVENTS"]).open("a", buffering=1)
    print(commit, "starts", os.getpid(), fastddpm.__file__, file=session.config.note)


@pytest.fixture
def measure(request, pytestconfig):
    def measured(call, rounds):
        samples = request.node.stash[MEASURED] = []
        for number in range(rounds):
            turns.over(request.node.nodeid)
            for what in ("begins", "ends"):
                print(records.commit()[0], what, request.node.name, number, file=pytestconfig.note)
                if what == "begins":
                    samples.append(call())
    return measured


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        commit, dirty = records.commit()
        reason = call.excinfo and str(call.excinfo.value).partition("\\n")[0]
        samples = [] if call.excinfo else item.stash.get(MEASURED, [])
        record = RECORD | {"run": RUN, "time": RUN, "name": item.name, "commit": commit, "dirty": dirty}
        record |= {"case": f"{item.path.name}::{item.originalname}", "hash": records.source_hash(item.function)}
        record |= {"outcome": report.outcome, "reason": reason, "samples_s": samples}
        records.append(item.config.file, record)
    return report
"""
SUITE = """
import fastddpm
import pytest


def test_equal(measure):
    measure(lambda: fastddpm.wait(0.004), 8)


@pytest.mark.parametrize("how", ["a|b"])
def test_planted(measure, how):
    measure(lambda: fastddpm.wait(fastddpm.SECONDS), 12)


def test_gate(measure):
    assert fastddpm.RIGHT, "error is 1, twice plain torch's 0.1"
    measure(lambda: fastddpm.wait(0.004), 8)


def test_new(measure):
    if not hasattr(fastddpm, "new"):
        pytest.skip("there is no such thing")
    measure(lambda: fastddpm.wait(0.004), 8)


def test_crash(measure):
    measure(fastddpm.crash, 2)


def test_last(measure):
    measure(lambda: fastddpm.wait(0.004), 8)
"""
BUILD = """
import os, signal, time

SECONDS, RIGHT = 0.01, True


def wait(seconds):
    began = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - began


def crash():
    return wait(0.004)
"""


@pytest.fixture
def suite(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -s\n")
    (folder / "conftest.py").write_text(f"{CONFTEST}\nRECORD = {record('')!r}\n")
    (folder / "test_small.py").write_text(SUITE)
    return folder


def command(suite, *argv, events=None):
    """Start the command. Returns: its process."""
    run = [sys.executable, "-m", "bench.compare", *map(str, argv)]
    run[run.index("--") if "--" in run else len(run) : 0] = ["--suite", str(suite)]
    environment = ENVIRONMENT | {"EVENTS": str(events or suite / "events")}
    return subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events_of(suite):
    return [line.split() for line in (suite / "events").read_text().splitlines()]


def test_slower_build_is_found(tmp_path, suite):
    """It is slower in one case, wrong in another, lacks a third and dies in a fourth; the others are compared."""
    base = build(tmp_path / "before", BUILD + "\nnew = True\n")
    damage = "SECONDS, RIGHT = 0.03, False\ndef crash():\n    print('goodbye', flush=True), os.kill(os.getpid(), 9)\n"
    head = build(tmp_path / "after", BUILD + damage)
    kept = tmp_path / "kept"
    running = command(suite, base, head, "--keep", kept, "--json")
    out, err = running.communicate()
    assert running.returncode == 1, err
    found = json.loads(out)
    verdicts = {case["case"].removeprefix("test_small.py::test_"): case for case in found["cases"]}
    assert verdicts["planted[a|b]"]["verdict"] == "slower"
    assert verdicts["planted[a|b]"]["samples"] == [12, 12]
    assert verdicts["equal"]["samples"] == [8, 8]
    assert verdicts["gate"]["verdict"] == "broken"
    assert verdicts["gate"]["reason"] == "failed in head: error is 1, twice plain torch's 0.1"
    assert verdicts["new"]["reason"] == "skipped (there is no such thing) in head"
    assert verdicts["crash"]["reason"] == verdicts["last"]["reason"] == "only in base"
    (problem,) = found["problems"]
    assert problem.startswith(f"head died by signal {signal.SIGKILL.value} in or after test_small.py::test_crash")
    assert "goodbye" in problem

    events = events_of(suite)
    assert {event[0]: event[3] for event in events if event[1] == "starts"} == {
        folder.name: str(folder / "fastddpm" / "__init__.py") for folder in (base, head)
    }
    done = rounds([["BA"[name == "before"], *rest] for name, *rest in events if "crash" not in rest[1]])
    aligned = [item for item in done if "equal" in item or "planted" in item]
    assert [item[2:] for item in aligned[::2]] == [item[2:] for item in aligned[1::2]], (
        "each round, then the same again"
    )
    assert "".join(item[0] for item in aligned) == "ABBA" * 10
    assert [item[0] for item in done if "last" in item] == ["A"] * 8, "base went on"

    again = compare.main([str(kept / "base"), str(kept / "head")])
    assert again == 1
    assert "INTERNALERROR" not in (kept / "base.log").read_text()


@pytest.mark.slow
def test_build_is_as_fast_as_itself(tmp_path, suite):
    """Two launches, of which the second starts with the other side; pytest's options select the cases."""
    seeded = "import random\nnoise = random.Random(os.getpid() % 2)\n"
    seeded += "def wait(seconds):\n    return seconds * noise.lognormvariate(0, 0.02)\n"
    tree = build(tmp_path / "tree", BUILD + seeded)
    running = command(
        suite, tree, tree, "--launches", "2", "--markdown", "--select", "equal or planted", "--", "--deselect=nothing"
    )
    out, err = running.communicate()
    assert running.returncode == 0, out + err
    assert out.startswith("**2 unchanged (threshold 5 %, p < 0.002)**")
    assert r"`test_small.py::test_planted[a\|b]`" in out
    assert "launch 2 of 2: 100%" in err
    assert len([event for event in events_of(suite) if event[1] == "begins"]) == 2 * 2 * (8 + 12)


def test_launches_alternate_the_first_side(tmp_path, suite, monkeypatch):
    started = []
    monkeypatch.setattr(trees, "alternate", lambda sides, title: started.append([side.log.name for side in sides]))
    monkeypatch.setattr(trees, "ENDED", (None,))
    tree = str(build(tmp_path / "tree", BUILD))
    assert trees.measure(tree, tree, tmp_path / "out", launches=3, suite=suite) == []
    assert started == [["base.log", "head.log"], ["head.log", "base.log"], ["base.log", "head.log"]]


def test_nothing_to_compare_is_status_2(tmp_path, suite):
    tree = build(tmp_path / "tree", BUILD)
    running = command(suite, tree, tree, "--select", "and")
    out, err = running.communicate()
    assert running.returncode == 2, err
    assert "base died with status 4 before its first case" in out
    assert "Wrong expression passed to '-k': and" in out
    assert out.endswith("no cases (threshold 5 %, p < 0.002)\n")


def alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it takes /proc to see who lives")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_both_processes_end_with_the_command(tmp_path, suite, stop):
    tree = build(tmp_path / "tree", BUILD + "\nSECONDS = 0.2\n")
    running = command(suite, tree, tree, "--select", "planted")
    while not (suite / "events").exists() or sum(event[1] == "begins" for event in events_of(suite)) < 3:
        assert running.poll() is None
        time.sleep(0.02)
    pids = [int(event[2]) for event in events_of(suite) if event[1] == "starts"]
    running.send_signal(stop)
    out, err = running.communicate()
    assert out == ""
    if stop == signal.SIGINT:
        assert running.returncode == 130
        assert err.endswith("\nbench.compare: interrupted\n")
    until = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("raise RuntimeError('out of order')", "importing fastddpm of {tree} failed: RuntimeError: out of order"),
        (
            "__file__ = '/elsewhere/fastddpm/__init__.py'",
            "python imports /elsewhere/fastddpm/__init__.py, not what is in",
        ),
        ("kernels", "python imports None, not what is in {tree}; is that installation complete?"),
    ],
)
def test_build_that_cannot_be_imported_is_rejected(tmp_path, capsys, damage, message):
    tree = build(tmp_path / "tree", damage if damage != "kernels" else "")
    if damage == "kernels":
        (tree / "fastddpm" / "kernels" / "__init__.py").unlink()
    with pytest.raises(ValueError, match=re.escape(message.format(tree=tree))):
        trees.measure(str(tree), str(tree), tmp_path / "out")


def test_build_that_the_benchmarks_cannot_import_is_rejected(tmp_path):
    """Such as one from before the package was divided into folders."""
    tree = build(tmp_path / "tree", BUILD)
    message = f"the benchmarks of this checkout cannot measure {re.escape(str(tree))}: importing it failed: "
    reason = r"ModuleNotFoundError: No module named 'fastddpm\.\w+'; want a build with the modules"
    with pytest.raises(ValueError, match=message + reason):
        trees.measure(str(tree), str(tree), tmp_path / "out")


# Builds that are installed first


def git(folder, *command):
    who = ["-c", "user.name=me", "-c", "user.email=me@here"]
    run = ["git", "-C", str(folder), *who, *command]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A checkout with two commits, the first with the tag "old", and with leftovers of a build."""
    folder = build(tmp_path / "checkout", "SECONDS = 1")
    (folder / "fastddpm" / "kernels").rename(folder / "kernels")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "fastddpm"\nversion = "1"\n'
        '[tool.setuptools]\npackages = ["fastddpm", "fastddpm.kernels"]\n'
        'package-dir = { "fastddpm.kernels" = "kernels" }\n'
    )
    (folder / ".gitignore").write_text("build/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=one")
    git(folder, "tag", "old")
    (folder / "fastddpm" / "__init__.py").write_text("SECONDS = 2")
    git(folder, "commit", "--quiet", "--all", "--message=two")
    stale = folder / "build" / "lib" / "fastddpm"
    stale.mkdir(parents=True)
    (stale / "stale.py").write_text("")
    return folder


def test_records_and_builds_are_recognised(tmp_path, repository):
    assert trees.kind("old", repository) == trees.kind("HEAD~1", repository) == "revision"
    assert trees.kind(str(repository)) == "checkout"
    assert trees.kind(str(build(tmp_path / "tree", ""))) == "installed"
    assert trees.kind(write(tmp_path / "results" / "a.jsonl", record("a"))) == "records"
    assert trees.kind(str(tmp_path / "results")) == "records"
    with pytest.raises(ValueError, match=f"new is neither .*, or a git revision of {re.escape(str(repository))}"):
        trees.kind("new", repository)


@pytest.mark.slow
def test_revisions_and_checkouts_are_installed(tmp_path, repository):
    old = trees.install("old", tmp_path / "old", repository)
    assert old == (tmp_path / "old", git(repository, "rev-parse", "old"))
    assert (tmp_path / "old" / "fastddpm" / "__init__.py").read_text() == "SECONDS = 1"
    (repository / "fastddpm" / "__init__.py").write_text("SECONDS = 3")
    before = sorted(repository.rglob("*"))
    _, commit = trees.install(str(repository), tmp_path / "new")
    assert commit == git(repository, "rev-parse", "HEAD") + "-dirty"
    assert (tmp_path / "new" / "fastddpm" / "__init__.py").read_text() == "SECONDS = 3"
    assert (tmp_path / "new" / "fastddpm" / "kernels" / "__init__.py").exists()
    assert not (tmp_path / "new" / "fastddpm" / "stale.py").exists()
    assert [path for path in sorted(repository.rglob("*")) if ".git" not in path.parts] == [
        path for path in before if ".git" not in path.parts
    ]
    assert trees.kind(str(tmp_path / "new")) == "installed"


def test_name_of_a_checkout(tmp_path, repository):
    head = git(repository, "rev-parse", "HEAD")
    assert trees._commit(repository) == head
    (repository / "bench" / "results").mkdir(parents=True)
    (repository / "bench" / "results" / "a.jsonl").write_text("")
    assert trees._commit(repository) == head, "records are no change"
    (repository / "new.py").write_text("")
    assert trees._commit(repository) == f"{head}-dirty"
    shutil.rmtree(repository / ".git")
    assert trees._commit(repository) == "checkout"


def test_build_that_cannot_be_installed_is_rejected(tmp_path, repository):
    (repository / "pyproject.toml").write_text("[project")
    with pytest.raises(ValueError, match=r"installing .*checkout failed: "):
        trees.install(str(repository), tmp_path / "new")
