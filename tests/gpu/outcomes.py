"""Pytest plugin (``-p tests.gpu.outcomes``) that writes each outcome at once, so that a killed run keeps them."""

import json
import os
from pathlib import Path

import pytest

PATH_VARIABLE = "SEGRAY_TEST_OUTCOMES"
_MAX_MESSAGE_LENGTH = 4000


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a test's outcome as a line of JSON: after its call, or after a set-up or tear-down that did not pass."""
    if report.when != "call" and report.passed:
        return
    outcome = report.outcome if report.when == "call" or report.skipped else "error"
    entry = {"test": report.nodeid, "outcome": outcome, "duration_s": round(report.duration, 3)}
    if report.failed:
        entry["message"] = report.longreprtext[-_MAX_MESSAGE_LENGTH:]
    elif report.skipped and isinstance(report.longrepr, tuple):
        entry["message"] = report.longrepr[2]
    with Path(os.environ[PATH_VARIABLE]).open("a") as file:
        file.write(json.dumps(entry) + "\n")
