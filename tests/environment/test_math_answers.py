"""Answers are compared by math-verify in a process of its own, which may hang or die without harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'mgrpo[math]'")
from mgrpo.engine.environment import math_answers
from mgrpo.engine.environment.math_answers import MathAnswers


@pytest.fixture(scope="module")
def answers() -> Iterator[MathAnswers]:
    with closing(MathAnswers(timeout=30.0)) as answers:
        yield answers


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        ("1/2", "0.5", True),
        (r"\frac{2}{4}", "1/2", True),
        (r"$x^2 + 2x + 1$", "(x+1)^2", True),
        (r"\boxed{14}", "14", True),
        ("1,000", "1000", True),
        ("13", "14", False),
        ("", "14", False),
        ("no idea", "14", False),
        ("\n\0$$\\", "14", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
    ],
)
def test_what_is_the_same_and_what_is_not(answers: MathAnswers, given: str, right: str, same: bool) -> None:
    assert answers.equal(given, right) is same


def test_many_threads_may_ask(answers: MathAnswers) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: answers.equal(str(n % 3), "1"), range(60)))
    assert found == [n % 3 == 1 for n in range(60)]


def test_what_takes_too_long_is_wrong_and_the_next_answer_is_compared(answers: MathAnswers) -> None:
    answers.equal("1", "1")  # the child is there
    child = answers._child
    answers.timeout = 1.0
    try:
        started = time.monotonic()
        assert not answers.equal("9^{9^{9^{9}}}", "9^{9^{9^{8}}}")
        assert time.monotonic() - started < 20
    finally:
        answers.timeout = 30.0
    assert answers.equal("2/2", "1")
    assert child is not None and child.poll() is not None


def test_a_child_that_was_killed_is_replaced(answers: MathAnswers) -> None:
    answers.equal("1", "1")
    assert answers._child is not None
    os.kill(answers._child.pid, signal.SIGKILL)
    assert answers.equal("1", "1") in (True, False)  # the pair it died with counts as wrong
    assert answers.equal("1", "1")


def test_close_ends_the_child_and_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(MathAnswers(30.0)) as answers:
        answers.equal("1", "1")
        child = answers._child
    assert child is not None and child.poll() is not None
    monkeypatch.setattr(math_answers, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"math-verify is not installed.*pip install 'mgrpo\[math\]'"):
        MathAnswers()
