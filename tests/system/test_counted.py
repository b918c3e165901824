"""Test that one thing is not called several."""

from __future__ import annotations

import pytest

from mgrpo.engine.system.words import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 threads"), (1, "1 thread"), (2, "2 threads"), (1000, "1000 threads")]
)
def test_a_noun_follows_its_number(number: int, text: str):
    assert counted(number, "thread") == text
    assert counted(number, "query", "queries") == text.replace("threads", "queries").replace("thread", "query")
