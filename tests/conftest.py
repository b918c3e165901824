"""Share fixtures, mark the slow tests, and print at the end what tests measured.

`pytest -q` hides what a passing test prints, so a test records a line as the property `measured`.
"""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("cases")  # so that asserts of shared checks show their values

try:
    from postgres import connect, server

    __all__ = ["connect", "server"]
except ModuleNotFoundError as missing:  # the tests of the kernels run where only torch and triton are installed
    if str(missing.name).partition(".")[0] in ("mgrpo", "postgres"):
        raise

TESTS = Path(__file__).parent
# Files and folders whose tests start processes or take seconds. `make quick` leaves them out, as it does the tests that
# need the PostgreSQL server.
SLOW = (
    "bench",
    "cli/test_check_environment.py",
    "cli/test_check_peak.py",
    "cli/test_cli.py",
    "examples/test_cluster.py",
    "examples/test_geography.py",
    "hub/test_hub_run.py",
    "integrations/test_integrations_grid.py",
    "integrations/test_integrations_hf.py",
    "integrations/test_integrations_trl.py",
    "integrations/test_integrations_verl.py",
    "kernels/test_kernels_graph.py",
    "kernels/test_kernels_vocab_parallel.py",
    "kernels/triton_kernels",
    "policy/test_distributed_faults.py",
    "policy/test_distributed_policy.py",
    "policy/test_embed.py",
    "repo/test_docs.py",
    "repo/test_reproductions.py",
    "repo/test_wheel.py",
    "report/test_logger_tools.py",
    "rollout/test_worker_vllm.py",
    "run/test_directory.py",
    "store/test_store_processes.py",
    "system/test_distributed.py",
    "system/test_supervisor.py",
    "training",
)

# Processes that a test starts find the helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")]))

# No test asserts a time: hypothesis' limit of 200 ms per example would do so, and fail on a busy machine.
settings.register_profile("mgrpo", deadline=None)
settings.load_profile("mgrpo")


@pytest.fixture(autouse=True)
def secrets_of_one_test(monkeypatch, request):
    """Let a test know only the secrets that it sets itself; those with real servers share the servers' token."""
    module = sys.modules.get("mgrpo.engine.system.secrets")
    if module and not request.node.get_closest_marker("vllm"):
        monkeypatch.setattr(module, "_taken", {})


@pytest.hookimpl(tryfirst=True)  # -m selects in a hook of the same name
def pytest_collection_modifyitems(items):
    """Mark the slow tests before -m selects."""
    for item in items:
        path = item.path.relative_to(TESTS)
        if any(path.is_relative_to(slow) for slow in SLOW) or _needs_postgres(item):
            item.add_marker(pytest.mark.slow)


def _needs_postgres(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "server" in item.fixturenames or parameters.get("connect") == "postgresql"


def pytest_sessionstart():
    """Check that SLOW names what is there, so that a file that moves does not become part of `make quick`."""
    missing = [name for name in SLOW if not (TESTS / name).exists()]
    assert not missing, f"tests/conftest.py: SLOW names {missing}, which do not exist"


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded as `measured`."""
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
