"""Run the reproductions of faults: runs that hang or end, silent losses, trust in other machines, growth.

Each script is also of use alone: `python tests/support/reproduction tests/faults/hangs/user_exit0_hangs_run.py` exits
with 1 if the fault is there, 0 if it is not, 2 if it could not be tried (a healthy run must end well first).
FAULT_LIMIT: seconds after which a run that does not end counts as hung.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduction.verdicts import check, parameters

LIMIT = 1500.0  # seconds for one script on a busy machine; those of hanging runs take five minutes
STANDING: tuple[str, ...] = ()  # faults that are there; who mends one removes its name
NEEDS = {"crashes/object_store_outage_ends_processes": "moto"}  # with its server, and s3fs: 'moto[server]' s3fs


@pytest.mark.nightly
@pytest.mark.parametrize("script", parameters(Path(__file__).parent, STANDING, NEEDS))
def test_a_fault_is_gone(script: Path) -> None:
    check(script, LIMIT)
