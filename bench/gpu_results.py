"""The results of a GPU check: one line of JSON each, written as soon as it is known.

As a pytest plugin (-p bench.gpu_results) it writes the outcome of each test.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import records

Line = dict[str, Any]

FILE = "check.jsonl"
# Environment variables of a stage: its result file, name, device, the path of compute-sanitizer or "", and its limit
FILE_VARIABLE, STAGE_VARIABLE = "GPU_CHECK_FILE", "GPU_CHECK_STAGE"
DEVICE_VARIABLE, SANITIZER_VARIABLE = "GPU_CHECK_DEVICE", "GPU_CHECK_SANITIZER"
LIMIT_VARIABLE = "GPU_CHECK_LIMIT_S"


def write_result(name: str, outcome: str = "passed", reason: str | None = None, **fields: Any) -> None:
    """Append the line of one result of this stage.

    Args:
        name: of the result; of a test, its node id.
        outcome: "passed", "failed" or "skipped".
        reason: why it failed or was skipped, in one line.
        fields: more fields of the line, named as in a record.
    """
    line = {"stage": os.environ[STAGE_VARIABLE], "name": name, "time": records.now()}
    records.append(Path(os.environ[FILE_VARIABLE]), line | {"outcome": outcome, "reason": reason} | fields)


def read_results(folder: Path) -> list[Line]:
    """Read the lines of a check. The first describes the whole check. Truncated lines are skipped.

    Raises: ValueError: the folder holds no results of a check.
    """
    path, lines = folder / FILE, []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    if not lines or "check" not in lines[0]:
        raise ValueError(f"{path} is not a result file of make gpu-check; want its {FILE}")
    return lines


def pytest_configure(config: Any) -> None:
    # under pytest-xdist the controller receives the reports of all workers
    config.pluginmanager.register(FaultPlugin() if hasattr(config, "workerinput") else ResultPlugin())


class ResultPlugin:
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        reason = None
        if report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.failed:
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or report.longreprtext
        reason = reason and reason.strip().partition("\n")[0]
        write_result(report.nodeid, report.outcome, reason, seconds=report.duration)


class FaultPlugin:
    """Ends a worker whose GPU context is broken: xdist starts another, and not all later tests fail."""

    def pytest_runtest_setup(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(3)
