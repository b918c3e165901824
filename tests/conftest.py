"""What the tests share; and what they measured, printed at the end: `pytest -q` hides what a passing test prints."""

import os
from pathlib import Path

from hypothesis import settings

from postgres import connect, server

__all__ = ["connect", "server"]

# Processes that a test starts find the helpers too.
SUPPORT = str(Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SUPPORT, os.environ.get("PYTHONPATH")]))

# No test asserts a time: on a busy machine hypothesis' 200 ms an example would.
settings.register_profile("mgrpo", deadline=None)
settings.load_profile("mgrpo")


def pytest_terminal_summary(terminalreporter):
    reports = (report for kind in terminalreporter.stats.values() for report in kind)
    lines = [
        line
        for report in reports
        for name, line in getattr(report, "user_properties", [])
        if name == "measured" and getattr(report, "when", "") == "call"
    ]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
