"""The environment of all tests; set here, before anything imports torch or prefect."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from absl.logging import get_absl_handler
from hypothesis import settings

_home = tempfile.TemporaryDirectory(prefix="bitladder-prefect-", ignore_cleanup_errors=True)

os.environ |= {
    "PREFECT_HOME": _home.name,  # nothing is read from or left in the user's own
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # a flow called by accident fails at once
    "DO_NOT_TRACK": "1",
}
os.environ.pop("PREFECT_API_URL", None)  # a server that happens to run is not a test's business
os.environ.setdefault("OMP_NUM_THREADS", "2")  # sums depend on the number of threads

# TensorBoard logs through absl, which closes its stream when Prefect sets up logging: it is not to
# be the one that pytest captures into
get_absl_handler().python_handler.setStream(sys.__stderr__)

# a busy machine is no failure, and the same tree is tested on the same values every time
settings.register_profile("bitladder", deadline=None, derandomize=True)
settings.load_profile("bitladder")


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The command line sets the level of our loggers; what it sets ends with the test."""
    ours = logging.getLogger("bitladder")
    before = ours.level
    yield
    ours.setLevel(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the golden entries that ran came to: `test_golden` recorded it."""
    recorded = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "golden"
    ]
    if recorded:
        from test_golden import Outcome, summary

        terminalreporter.section("golden numbers")
        for line in summary(Outcome(**value) for value in recorded):
            terminalreporter.write_line(line)


def pytest_unconfigure() -> None:
    _home.cleanup()
