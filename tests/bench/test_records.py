"""Records are not lost, changed or misread, and identify the source of their case."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark")  # bench needs it

from bench import records

ROOT = Path(__file__).parents[2]
DIRECTORIES = count()


def record(**changes):
    return {
        "schema": 1,
        "run": "2026-11-22T21:00:00Z",
        "time": "2026-11-22T21:03:11Z",
        "case": "test_kernels.py::test_step",
        "name": "test_step[bf16]",
        "params": {"shape": [64, 3, 32, 32]},
        "hash": "a1b2c3d4e5f6",
        "group": "step",
        "contender": "fastddpm bf16",
        "outcome": "passed",
        "reason": None,
        "invalid": ["shared: 1 other process on the GPU"],
        "samples_s": [0.0123, 1e-6, 2],
        "calls": 20,
        "clock": "wall",
        "cache": "cold",
        "bytes": 2097152,
        "flops": 0,
        "precision": None,
        "images": 0,
        "shares": {"GB/s": {"rate": 3100.0, "share": 0.72}},
        "errors": {"bits": "equal"},
        "facts": {"energy_j": 1.5},
        "ceilings": {"copy": 4300.0},
        "device": "nvidia-h200",
        "scale": "cuda",
        "machine": {"gpu": None},
        "watch": {"nvml": None},
        "commit": None,
        "dirty": None,
    } | changes


# Files


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ({"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "threads": 16}, "nvidia-h200"),
        ({"gpu": None, "cpu": "Intel(R) Xeon(R) Processor", "threads": 2}, "intel-r-xeon-r-processor-2-threads"),
        ({"cpu": "../Käse @ 2.20GHz", "threads": 1}, "k-se-2-20ghz-1-threads"),
        ({}, "unknown-1-threads"),
    ],
)
def test_folder_name_of_a_device(machine, name):
    assert records.device_name(machine) == name


def test_every_run_gets_a_new_file(tmp_path):
    name = partial(records.new_file, tmp_path / "results", "nvidia-h200", "2026-11-22T21:00:00Z")
    first = name("0123456789abcdef")
    assert first == tmp_path / "results/nvidia-h200/2026-11-22T210000Z-0123456.jsonl"
    first.write_text("kept")
    assert name("0123456789abcdef").name == "2026-11-22T210000Z-0123456-2.jsonl"
    assert name("0123456789abcdef").name == "2026-11-22T210000Z-0123456-3.jsonl"
    assert name(None).name == "2026-11-22T210000Z-unknown.jsonl"
    assert first.read_text() == "kept"


# Lines


def test_appended_records_are_read(tmp_path):
    first, second = record(), record(time="2026-11-22T21:04:00Z")
    records.append(tmp_path / "a.jsonl", first)
    written = (tmp_path / "a.jsonl").read_bytes()
    records.append(tmp_path / "a.jsonl", second)
    assert (tmp_path / "a.jsonl").read_bytes().startswith(written)
    assert records.read([tmp_path / "a.jsonl"]) == [first, second]


def test_line_is_one_write_and_flushed_to_disk(tmp_path, monkeypatch):
    done = []
    for name in ("write", "fsync", "close"):
        real = getattr(os, name)
        spy = lambda *args, name=name, real=real: done.append(name) or real(*args)
        monkeypatch.setattr(records.os, name, spy)
    records.append(tmp_path / "a.jsonl", record())
    monkeypatch.undo()
    assert done == ["write", "fsync", "close"]
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("rest", [b'{"schema": 1, "run', b"\xff\x00", b"\n\n"])
def test_record_after_a_truncated_line_is_on_a_new_line(tmp_path, rest):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{}\n" + rest)
    records.append(file, record())
    assert file.read_bytes().startswith(b"{}\n" + rest)
    assert json.loads(file.read_bytes().splitlines()[-1]) == record()


def test_full_disk_is_reported(tmp_path, monkeypatch):
    file, write = tmp_path / "a.jsonl", os.write
    monkeypatch.setattr(records.os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(OSError, match=r"10 of the record's .* is the disk full"):
        records.append(file, record())
    monkeypatch.undo()
    records.append(file, record())
    with pytest.warns(UserWarning, match=r"a\.jsonl, line 1: skipped, it is not JSON"):
        assert records.read([file]) == [record()]


def test_concurrent_appends(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: records.append(tmp_path / "a.jsonl", record(calls=n)), range(100)))
    assert sorted(found["calls"] for found in records.read([tmp_path])) == list(range(100))


def test_values_that_json_lacks_are_converted(tmp_path):
    facts = {"nan": math.nan, "list": (math.inf, -math.inf, 1.5), ("a", 1): np.float32(0.5), 7: np.int64(3), "no": True}
    records.append(tmp_path / "a.jsonl", record(facts=facts | {"path": Path("x"), "numpy nan": np.float64("nan")}))
    [found] = records.read([tmp_path])
    assert found["facts"] == {
        **{"nan": None, "list": [None, None, 1.5], "('a', 1)": 0.5, "7": 3, "no": True, "path": "x", "numpy nan": None}
    }
    assert found["facts"]["no"] is True


# Reading


def line(**changes):
    return json.dumps(record(**changes)).encode()


@pytest.mark.parametrize(
    ("foreign", "why"),
    [
        (line()[:-1], "it is not JSON, or was cut short"),
        (line()[:100], "it is not JSON, or was cut short"),
        (bytes(range(128, 192)).replace(b"\n", b"") + b"\xff", "it is not JSON, or was cut short"),
        ("ä".encode("latin-1"), "it is not JSON, or was cut short"),
        (line().decode().encode("utf-16"), "it is not JSON, or was cut short"),
        (b"[" * 100_000, "it is not JSON, or was cut short"),
        (b"9" * 10_000, "it is not"),
        (b"NaN", "it is not a record of a benchmark"),
        (b'"schema"', "it is not a record of a benchmark"),
        (b'["schema"]', "it is not a record of a benchmark"),
        (b'{"schem": 1}', "it is not a record of a benchmark"),
        (line(schema=2), "its schema is 2; want 1"),
        (line(schema={}), "its schema is {}; want 1"),
        (line(samples_s=[math.nan]), r"samples_s is \[nan\]; want a list of seconds above 0"),
        (line().replace(b"0.0123", b"1e999"), "samples_s is .inf, .* want a list of seconds above 0"),
        (line().replace(b"4300.0", b"9" * 400), "ceilings is"),
        (line(run="yesterday"), "run is 'yesterday'; want a time such as"),
        (line(run="2026-13-41T21:00:00Z"), "run is '2026-13-41T21:00:00Z'; want"),
    ],
)
def test_invalid_lines_are_skipped(tmp_path, foreign, why):
    file = tmp_path / "a.jsonl"
    file.write_bytes(line(calls=1) + b"\n\n" + foreign + b"\n" + line(calls=2))
    with pytest.warns(UserWarning, match="skipped") as warned:
        assert [found["calls"] for found in records.read([file])] == [1, 2]
    [warning] = warned
    assert re.fullmatch(rf"{re.escape(str(file))}, line 3: skipped, .*{why}.*", str(warning.message))
    assert len(str(warning.message)) < len(str(file)) + 200
    assert Path(warning.filename) == Path(__file__), "it names who has asked"


WRONG = {
    "case name hash device scale": [None, 1, []],
    "run time": [None, 1, "", "2026-11-22"],
    "group contender reason clock cache precision commit": [1, [], True],
    "params facts machine watch": [None, [], "x"],
    "calls bytes flops images": [None, "1", True, []],
    "outcome": [None, "xfailed", ["passed"]],
    "invalid": [None, "shared", [1], {}],
    "samples_s": [None, 1.0, ["1"], [None], [True], [0.1, 0], [-1.0], {"0": 1}],
    "shares": [None, [], {"GB/s": 1}, {"GB/s": {"rate": 1}}, {"GB/s": {"rate": 1, "share": None}}],
    "errors": [[], "equal", 0],
    "ceilings": [None, [], {"copy": None}, {"copy": "1"}],
    "dirty": [0, "no"],
}


@pytest.mark.parametrize("field", [field for field in record() if field != "schema"])
def test_every_field_is_checked(tmp_path, field):
    missing = record()
    del missing[field]
    [values] = [values for fields, values in WRONG.items() if field in fields.split()]
    wrong = [record(**{field: value}) for value in values]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [missing, *wrong, record()])))
    with pytest.warns(UserWarning, match="skipped") as warned:
        assert records.read([tmp_path]) == [record()]
    assert f"it has no {field}" in str(warned[0].message)
    assert all(f"skipped, {field} is " in str(warning.message) for warning in warned[1:])
    assert len(warned) == 1 + len(wrong)


def test_more_fields_and_nulls_are_accepted(tmp_path):
    nulls = dict.fromkeys(["group", "contender", "reason", "clock", "cache", "precision", "errors", "commit", "dirty"])
    full = record(samples_s=[], shares={}, ceilings={}, invalid=[], params={}, later="more", **nulls)
    records.append(tmp_path / "a.jsonl", full)
    assert records.read([tmp_path]) == [full]


def test_records_of_files_and_folders_are_in_order_of_time(tmp_path):
    def put(name, *times):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for run, time in times:
            made = record(run=f"2026-11-{run}T00:00:00Z", time=f"2026-11-{time}T00:00:00Z")
            records.append(tmp_path / name, made)

    put("b/deep/2.jsonl", ("02", "05"), ("02", "03"))
    put("b/1.jsonl", ("03", "03"))
    put("b/notes.txt", ("01", "01"))
    put("a.txt", ("01", "09"), ("01", "08"))
    (tmp_path / "b/empty.jsonl").touch()
    found = records.read([tmp_path / "b", tmp_path / "a.txt", tmp_path / "b/1.jsonl"])
    days = [(one["run"][8:10], one["time"][8:10]) for one in found]
    assert days == [("01", "08"), ("01", "09"), ("02", "03"), ("02", "05"), ("03", "03")]


def test_file_that_vanishes_is_skipped(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    records.append(tmp_path / "here.jsonl", record())
    with pytest.warns(UserWarning, match=r"gone\.jsonl: skipped, No such file"):
        assert records.read([tmp_path]) == [record()]


def test_missing_path_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; want a file or folder of records"):
        records.read([tmp_path / "nowhere"])


# Commits


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """git(...) in a repository that contains bench/, in which records.py believes it lies."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COMMIT", raising=False)
    bench = tmp_path / "tree/bench"
    (bench / "results").mkdir(parents=True)
    (bench / "case.py").write_text("1")
    (bench / "results/old.jsonl").write_text("1")
    (bench.parent / ".gitignore").write_text("*.pyc")
    monkeypatch.setattr(records, "HERE", bench)
    run = partial(subprocess.run, cwd=bench.parent, check=True, capture_output=True, text=True)
    return lambda *args: run(["git", *args]).stdout.strip()


def test_commit_and_dirty(repository):
    assert records.commit() == (None, None), "there is no repository yet"
    repository("init", "-q")
    assert records.commit() == (None, None), "there is no commit yet"
    repository("add", ".")
    repository("commit", "-q", "-m", "All")
    head = repository("rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", head)
    assert records.commit() == (head, False)
    (records.HERE / "results/new.jsonl").write_text("1")
    (records.HERE / "results/old.jsonl").write_text("2")
    (records.HERE / "case.pyc").write_text("ignored")
    assert records.commit() == (head, False)
    new = records.HERE.parent / "new.py"
    new.write_text("not added")
    assert records.commit() == (head, True)
    new.unlink()
    assert records.commit() == (head, False)
    (records.HERE / "case.py").write_text("2")
    assert records.commit() == (head, True)
    repository("add", ".")
    assert records.commit() == (head, True)


@pytest.mark.parametrize(
    ("given", "found"), [("abc", ("abc", False)), ("abc-dirty", ("abc", True)), ("", (None, None))]
)
def test_environment_variable_sets_the_commit(repository, monkeypatch, given, found):
    monkeypatch.setenv("COMMIT", given)
    assert records.commit() == found


def test_no_commit_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records.commit() == (None, None)


# Sources

FILES = {
    "__init__.py": "",
    "test_it.py": '''
"""Cases."""
from functools import partial

import pytest

from cases import machine, watch
from cases.machine import helper
from outside import FAR, far, quick as far_quick

SIZES = {"a": [1, 2], "b": (3.5, None), "c": machine.chosen, object(): 1}
LIMIT = 4
OTHER = 5
seen = {}
quick = partial(helper, times=3)


def inner(x):
    return x + LIMIT


@pytest.mark.parametrize("size", [1, 2])
def test_it(measure, data, size):
    """Measured."""
    def call(y=2):  # nested
        return inner(size), f"{size!r:>{y}} {machine.Thing().name['a']} is 'it' or \\"that\\""
    measure(call, quick, machine.DEEP, machine.deep(), SIZES, seen, machine.made, watch.Watch)
    measure(FAR, far, far_quick, machine.FAR)
    local_only = data
    return local_only


def local_only():
    return 11
''',
    "machine.py": '''
from outside import FAR

DEEP = "x"
WIDTH = 3
DATA = {"WIDTH": WIDTH}


def cached(f):
    def wrapper(*args):
        return f(*args)
    wrapper.__wrapped__ = f
    return wrapper


def helper(times):
    return deeper(times)


@cached
def deeper(times):
    return times * WIDTH


def chosen():
    return 21


def maker(size):
    def made():
        return size() + 31
    return made


def closed():
    return 41


made = maker(closed)


def deep():
    return Thing


class Base:
    kind = 51


class Thing(Base):
    """A thing."""

    size = 61

    def run(self):
        return recursion(2)


def recursion(n):
    return recursion(n - 1) if n else mutual(n)


def mutual(n):
    return recursion(n) + 71


def unused():
    return 81
''',
    "../outside.py": """
from functools import partial

FAR = 131
quick = partial(int, 141)


def far():
    return 151
""",
    "watch.py": """
class Watch:
    size = 91
""",
    "conftest.py": '''
import pytest

from cases import machine


@pytest.fixture
def data():
    return machine.unused() + 101


@pytest.fixture
def measure(data):
    """Measure."""
    return lambda *things: counted(data) + 111


def counted(data):
    return 121
''',
}


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """hashed(file, old, new): the hash of the case, in a package with one changed file."""

    def hash_of(*change):
        folder = tmp_path / str(next(DIRECTORIES))  # where nothing is cached
        write(folder, *change)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            try:
                return records.source_hash(import_module("cases.test_it").test_it)
            finally:
                for name in [name for name in sys.modules if name.partition(".")[0] in ("cases", "outside")]:
                    del sys.modules[name]

    return hash_of


def write(folder, file="test_it.py", old="", new=""):
    (folder / "cases").mkdir(parents=True)
    for name, text in FILES.items():
        assert name != file or old in text
        (folder / "cases" / name).write_text(text.replace(old, new) if name == file and old else text)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("test_it.py", "  # nested", "  # a comment\n        # or two"),
        ("test_it.py", '"""Measured."""', '"""Timed.\n\n    Twice."""'),
        ("test_it.py", '    """Measured."""\n', ""),
        ("test_it.py", '"""Cases."""', ""),
        ("test_it.py", "[1, 2])", "[1, 2, 3])"),
        ("test_it.py", '@pytest.mark.parametrize("size", [1, 2])\n', ""),
        ("test_it.py", "x + LIMIT", "(x\n    +   LIMIT)"),
        ("test_it.py", "'it'", "\\'it\\'"),
        ("test_it.py", "OTHER = 5", "OTHER = 6"),
        ("test_it.py", "seen = {}", "seen = {1: 2}"),
        ("test_it.py", "return 11", "return 12"),
        ("test_it.py", "def inner(x):", "def inner2(x):\n    return x\n\n\ndef inner(x):"),
        ("machine.py", "return 81", "return 82"),
        ("machine.py", "@cached\n", ""),
        ("machine.py", '    """A thing."""\n\n', ""),
        ("machine.py", '"WIDTH": WIDTH', '"WIDTH": 5'),
        ("machine.py", "WIDTH = 3", "WIDTH = 1 + 2"),
        ("watch.py", "91", "92"),
        ("../outside.py", "131", "132"),
        ("../outside.py", "141", "142"),
        ("../outside.py", "151", "152"),
        ("conftest.py", "101", "102"),
        ("conftest.py", '    """Measure."""\n', ""),
        ("conftest.py", "@pytest.fixture\ndef measure", "@pytest.fixture(scope='function')\ndef measure"),
    ],
)
def test_hash_ignores_changes_that_do_not_affect_a_measurement(hashed, file, old, new):
    assert hashed(file, old, new) == hashed()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("test_it.py", "def call(y=2)", "def call(y=3)"),
        ("test_it.py", "'it'", "'them'"),
        ("test_it.py", "{size!r:>{y}}", "{size!s:>{y}}"),
        ("test_it.py", "{size!r:>{y}}", "{size!r:<{y}}"),
        ("test_it.py", "x + LIMIT", "x - LIMIT"),
        ("test_it.py", "LIMIT = 4", "LIMIT = 5"),
        ("test_it.py", "LIMIT = 4", "LIMIT = 4.0"),
        ("test_it.py", '"a": [1, 2]', '"a": [1, 3]'),
        ("test_it.py", '"a": [1, 2]', '"a": [1]'),
        ("test_it.py", '"b": (3.5, None)', '"d": (3.5, None)'),
        ("test_it.py", "times=3", "times=4"),
        ("test_it.py", "partial(helper", "partial(machine.deep"),
        ("machine.py", 'DEEP = "x"', 'DEEP = "y"'),
        ("machine.py", "WIDTH = 3", "WIDTH = 4"),
        ("machine.py", "deeper(times)\n\n", "deeper(times + 1)\n\n"),
        ("machine.py", "return times * WIDTH", "return WIDTH * times"),
        ("machine.py", "return 21", "return 22"),
        ("machine.py", "31", "32"),
        ("machine.py", "return 41", "return 42"),
        ("machine.py", "51", "52"),
        ("machine.py", "61", "62"),
        ("machine.py", "71", "72"),
        ("conftest.py", "111", "112"),
        ("conftest.py", "121", "122"),
    ],
)
def test_hash_changes_with_the_measurement(hashed, file, old, new):
    assert hashed(file, old, new) != hashed()


def test_hash_is_the_same_in_every_process_and_python(hashed, tmp_path):
    """The literal is the hash in Python 3.10 to 3.13."""
    write(tmp_path)
    code = "from bench.records import source_hash; from cases.test_it import test_it; print(source_hash(test_it))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }  # fmt: skip
    assert found == {hashed()} == {"43aaa49e22f3"}


def test_objects_without_source_have_a_hash():
    functions = {}
    exec("def one(x):\n    return len(x)\ndef two(x):\n    return sum(x)\ndef three(x):\n    return two(x)", functions)
    one, two, three = (functions[name] for name in ("one", "two", "three"))
    pair = (lambda: 1, lambda: 2)
    for other in (len, print, object(), None, 5, partial(len), int, pair[0], "text".upper):
        assert re.fullmatch("[0-9a-f]{12}", records.source_hash(other))
    for function in (one, two, three):
        function.__module__ = __name__
    assert len({records.source_hash(function) for function in (one, two, three)}) == 3


def test_all_cases_have_different_hashes():
    found = {}
    for file in sorted((ROOT / "bench").glob("test_*.py")):
        module = import_module(f"bench.{file.stem}")
        found |= {f"{file.name}::{name}": case for name, case in vars(module).items() if name.startswith("test_")}
    assert found
    hashes = {name: records.source_hash(case) for name, case in found.items()}
    assert len(set(hashes.values())) == len(hashes)
