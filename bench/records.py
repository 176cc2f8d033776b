"""Records of measurements: JSON lines under bench/results, one per case and run, which are never changed."""

import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

SCHEMA = 1
HERE = Path(__file__).parent
BESIDE = ("records", "turns", "watch")  # modules that store or observe: they do not change what a case measures


# The fields that a case may fill in, with their defaults
FIELD_DEFAULTS: dict[str, Any] = {
    "group": None, "contender": None, "invalid": [], "samples_s": [], "calls": 1, "clock": None, "cache": None,
    "bytes": 0, "flops": 0, "precision": None, "images": 0, "shares": {}, "errors": None, "facts": {}, "watch": {},
}  # fmt: skip


def now() -> str:
    """Return the time in UTC, in the format of records."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# Names


def device_name(machine: dict[str, Any]) -> str:
    """Return the folder of a machine's records: its GPU, or its CPU and threads, as a-z, 0-9 and dashes."""
    name = machine.get("gpu") or f"{machine.get('cpu') or 'unknown'} {machine.get('threads') or 1} threads"
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of the repository of bench/, ignoring bench/results; (None, None) without a repository.

    The environment variable COMMIT takes precedence, for a copy of the tree without its repository: "abc" or, if the
    tree has changes, "abc-dirty".
    """
    if given := os.environ.get("COMMIT"):
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    try:
        changed = _git("status", "--porcelain", "--untracked-files=normal", "--", ":/", ":!results")
        return _git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(*args: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(HERE), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def new_file(folder: Path, device: str, run: str, commit: str | None) -> Path:
    """Create an empty file for the records of a run: folder/device/run-commit.jsonl, numbered if that exists."""
    (folder / device).mkdir(parents=True, exist_ok=True)
    stem, number = f"{run.replace(':', '')}-{(commit or 'unknown')[:7]}", 1
    while True:
        path = folder / device / f"{stem}{f'-{number}' if number > 1 else ''}.jsonl"
        try:
            path.touch(exist_ok=False)  # another run may begin in the same second
            return path
        except FileExistsError:
            number += 1


# Lines


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a record as a line in one write, and wait until it is on the disk; NaN and infinity become null.

    Raises: OSError: the line was not written completely. The next record starts on a new line nevertheless.
    """
    line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = os.fstat(file).st_size
        if end and os.pread(file, 1, end - 1) != b"\n":
            line = b"\n" + line
        if (written := os.write(file, line)) != len(line):
            raise OSError(f"{path}: {written} of the record's {len(line)} bytes were written; is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def _plain(value: Any) -> Any:
    """Convert to the types of JSON; other objects become their str()."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the records in files and in all *.jsonl of folders, in order of run and time.

    Invalid lines, such as truncated ones, are skipped with a warning that contains the file, the line and the reason.

    Raises: FileNotFoundError: one of the paths does not exist.
    """
    files: dict[Path, None] = {}  # each once, in order
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; want a file or folder of records, such as bench/results")
        files.update(dict.fromkeys(sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]))
    return sorted((record for file in files for record in _records(file)), key=lambda r: (r["run"], r["time"]))


def _records(file: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        warnings.warn(f"{file}: skipped, {error.strerror}", stacklevel=4)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
            why = "it is not JSON, or was cut short"
        else:
            why = _fault(record)
        if why:
            warnings.warn(f"{file}, line {number}: skipped, {why}", stacklevel=4)
        else:
            yield record


def _fault(record: Any) -> str | None:
    """Return why it is not a record of this schema, or None."""
    if not isinstance(record, dict) or "schema" not in record:
        return "it is not a record of a benchmark"
    if record["schema"] != SCHEMA:
        return f"its schema is {record['schema']!r:.40}; want {SCHEMA}"
    for field, (right, want) in FIELDS.items():
        if field not in record:
            return f"it has no {field}"
        if not right(record[field]):
            return f"{field} is {record[field]!r:.80}; want {want}"
    return None


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _time(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        return bool(datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ"))
    return False


def _samples(value: Any) -> bool:
    return isinstance(value, list) and all(number(item) and item > 0 for item in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(number, value.values()))


def _shares(value: Any) -> bool:
    return isinstance(value, dict) and all(_numbers(of) and of.keys() == {"rate", "share"} for of in value.values())


NOTHING = type(None)
TEXT, TEXT_OR_NULL, OBJECT = (_is(str), "text"), (_is(str, NOTHING), "text or null"), (_is(dict), "an object")
TIME, NUMBER = (_time, "a time such as 2026-11-22T21:00:00Z"), (number, "a number")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{"run": TIME, "time": TIME, "case": TEXT, "name": TEXT, "params": OBJECT, "hash": TEXT},
    **{"group": TEXT_OR_NULL, "contender": TEXT_OR_NULL, "reason": TEXT_OR_NULL},
    "outcome": (lambda value: value in ("passed", "failed", "skipped"), "passed, failed or skipped"),
    "invalid": (lambda value: isinstance(value, list) and all(map(_is(str), value)), "a list of texts"),
    "samples_s": (_samples, "a list of seconds above 0"),
    **{"calls": NUMBER, "bytes": NUMBER, "flops": NUMBER, "images": NUMBER},
    **{"clock": TEXT_OR_NULL, "cache": TEXT_OR_NULL, "precision": TEXT_OR_NULL},
    "shares": (_shares, "an object of rates and shares"),
    "errors": (_is(dict, NOTHING), "an object or null"),
    **{"facts": OBJECT, "machine": OBJECT, "watch": OBJECT, "device": TEXT, "scale": TEXT, "commit": TEXT_OR_NULL},
    "ceilings": (_numbers, "an object of numbers"),
    "dirty": (_is(bool, NOTHING), "true, false or null"),
}


# The source of a case


def source_hash(function: Callable[..., Any]) -> str:
    """Return 12 hex digits that identify the source of a case: cases with different ones do not compare. Never fails.

    The source is that of the function and of everything that it names, directly or indirectly, in its own package:
    functions, classes and constants in capital letters (numbers, strings; lists, tuples and dicts of what counts).
    Decorators, and with them parameters, do not count; nor do comments, docstrings and formatting. Of the fixtures only
    `measure` counts.
    """
    found: dict[object, str] = {}
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    with suppress(Exception):  # what was found before the error has to suffice
        _add("", function, package, found)
    with suppress(Exception):  # there may be no such fixture
        if "measure" in inspect.signature(function).parameters:
            _add("", import_module(f"{package}.conftest").measure, package, found)
    return sha256(repr(sorted(found.values())).encode()).hexdigest()[:12]


def _add(name: str, value: Any, package: str, found: dict[object, str]) -> None:
    """Add to `found` the value of a constant under its name, or the source of a function or class under its id."""
    with suppress(Exception):  # some objects raise on any access
        value = inspect.unwrap(value)
    if isinstance(value, partial):
        value = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        value = list(value.items())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        found[name] = f"{name} = {value!r}"
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _add(f"{name}[{number}]", item, package, found)
    elif isinstance(value, FunctionType | type) and _counts(value.__module__, package) and id(value) not in found:
        found[id(value)] = ""  # it may refer to itself
        found[id(value)], paths = _source(value)
        for path in paths:
            _follow(path, value, package, found)


def _counts(module: str | None, package: str) -> bool:
    return str(module).partition(".")[0] == package and module not in [f"{package}.{name}" for name in BESIDE]


def _follow(path: str, value: FunctionType | type, package: str, found: dict[object, str]) -> None:
    """Add the object that a dotted name refers to in a function or class."""
    module = sys.modules.get(value.__module__)
    names = dict(getattr(value, "__globals__", None) or vars(module))
    if isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # the cell is empty
                names[name] = cell.cell_contents
    name, *rest = path.split(".")
    item = names.get(name)
    for part in rest:
        if not isinstance(item, ModuleType) or not _counts(item.__name__, package):
            break
        module, name, item = item, part, getattr(item, part, None)
    if (callable(item) or name.isupper()) and name not in _foreign(module, package):
        _add(f"{value.__module__}.{path}", item, package, found)


@cache
def _foreign(module: ModuleType | None, package: str) -> set[str]:
    """Return the names that a module imports from other packages."""
    try:
        nodes = ast.walk(ast.parse(inspect.getsource(module)))
    except (OSError, TypeError, SyntaxError):
        return set()
    others = (n for n in nodes if isinstance(n, ast.ImportFrom) and f"{n.module}.".partition(".")[0] != package)
    return {alias.asname or alias.name for node in others for alias in node.names}


def _source(value: FunctionType | type) -> tuple[str, list[str]]:
    """Return the normalised source, or the bytecode if there is none, and its dotted names that are not local."""
    code = getattr(value, "__code__", None)
    try:
        text = inspect.getsource(value)
        tree = ast.parse(f"if 1:\n{text}" if text[0].isspace() else text).body[0]
    except (OSError, TypeError, SyntaxError):
        return (repr((code.co_code, code.co_names)), list(code.co_names)) if code else (value.__qualname__, [])
    tree = _Bare().visit(tree.body[0] if isinstance(tree, ast.If) else tree)
    local = code.co_varnames + code.co_cellvars if code else ()
    paths = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute))
    return _dump(tree), [path for path in paths if NAME.fullmatch(path) and path.partition(".")[0] not in local]


def _dump(node: object) -> str:
    """Return a syntax tree as text, the same in all versions of Python, which ast.dump and ast.unparse do not give."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_dump, node))}]" if isinstance(node, list) else repr(node)


NAME = re.compile(r"\w+(\.\w+)*")


class _Bare(ast.NodeTransformer):
    """Removes decorators and docstrings."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.decorator_list = []
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        elif isinstance(node, ast.JoinedStr):
            node.values = [part for part in node.values if part.value != ""]  # Python 3.12 adds empty ones
        return node
