"""The lines of a GPU check: each result is written as soon as it is known. As a pytest plugin, each test's outcome."""

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import records

# Environment variables of a stage: where its lines go, its name, the device, and what watches its accesses of memory
FILE, STAGE, DEVICE, WATCHED = (f"GPU_CHECK_{name}" for name in ("FILE", "STAGE", "DEVICE", "WATCHED"))


def tell(name: str, outcome: str = "passed", reason: str | None = None, **fields: Any) -> None:
    """Append a line about one result of this stage.

    Args: outcome: "passed", "failed" or "skipped"; reason: of the latter two, one line; fields: those of a record.
    """
    about = {"stage": os.environ[STAGE], "name": name, "time": now(), "outcome": outcome, "reason": reason}
    records.append(Path(os.environ[FILE]), about | fields)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # of several processes the first hears of all tests
        config.pluginmanager.register(Listener())


class Listener:
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        reason = None
        if report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.failed:
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or report.longreprtext
        tell(report.nodeid, report.outcome, reason and reason.strip().partition("\n")[0], seconds=report.duration)
