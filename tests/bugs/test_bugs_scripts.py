"""Run the reproductions of bugs in the treatment of models, in public interfaces and in commands.

Each script is also of use alone: `python tests/support/reproduction tests/bugs/attention/sliding_window.py` exits with
1 if the bug is there, 0 if it is not, 2 if it could not be tried (a healthy model or command must go well first).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduction.verdicts import check, parameters

LIMIT = 600.0  # seconds for one script on a busy machine; most take ten
STANDING = ()  # bugs that are there; who mends one removes its line


@pytest.mark.nightly
@pytest.mark.parametrize("script", parameters(Path(__file__).parent, STANDING, {}))
def test_a_bug_is_gone(script: Path) -> None:
    check(script, LIMIT)
