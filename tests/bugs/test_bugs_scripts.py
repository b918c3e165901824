"""Run the reproductions of bugs in the treatment of models, in public interfaces and in commands.

Each script is also of use alone: `python tests/support/reproduction tests/bugs/attention/sliding_window.py` exits with
1 if the bug is there, 0 if it is not, 2 if it could not be tried (a healthy model or command must go well first).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduction.verdicts import check, parameters

LIMIT = 600.0  # seconds for one script on a busy machine; most take ten
STANDING = (  # bugs that are there; who mends one removes its line
    "attention/attention_not_contiguous",
    "attention/attention_twice_a_layer",
    "attention/hybrid_state_leaks",
    "attention/mask_of_the_model",
    "attention/positions_not_asked",
    "attention/rope_by_length",
    "attention/sliding_window",
    "commands/tool_never_returns",
    "models/adapter_on_the_head",
    "models/reference_loses_buffers",
    "models/refused_by_accident",
    "models/routing_drawn_in_training",
)


@pytest.mark.nightly
@pytest.mark.parametrize("script", parameters(Path(__file__).parent, STANDING, {}))
def test_a_bug_is_gone(script: Path) -> None:
    check(script, LIMIT)
