"""Test how long, how often and with which pauses a call is tried again, and which errors are raised at once."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time

import pytest

from mgrpo.engine.system import retry
from mgrpo.engine.system.process import Interrupted, asked_to_end
from mgrpo.engine.system.retry import Retry, doubling, patiently


class Clock:
    """Stand in for the module `time`: sleeping only moves the hands."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


class Failing:
    """Fail a number of times, then return the arguments."""

    def __init__(self, times: int, error: Exception) -> None:
        self.left, self.calls, self.error = times, 0, error

    def __call__(self, *args: object, **kwargs: object) -> tuple[object, ...]:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return (*args, *kwargs.items())


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0.5, 15.0, [0.5, 1, 2, 4, 8, 15, 15, 15]), (1.0, 1.0, [1] * 8), (3.0, 2.0, [3] + [2] * 7)],
)
def test_pauses_double_up_to_the_longest_and_stay_there(first, last, expected):
    assert list(itertools.islice(doubling(first, last), 8)) == expected


def test_a_call_is_repeated_until_it_succeeds(clock, caplog):
    work = Failing(3, OSError("the disk is full"))
    with caplog.at_level(logging.WARNING):
        assert Retry(wait=clock.sleep)(work, 1, b=2) == (1, ("b", 2))
    assert work.calls == 4 and clock.slept == [0.5, 1.0, 2.0]
    assert [record.getMessage() for record in caplog.records] == [
        f"the disk is full; trying again in {pause} s" for pause in ("0.5", "1.0", "2.0")
    ]


def test_the_last_error_is_raised_before_the_deadline_would_pass(clock, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 10.0)
    work = Failing(99, OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        Retry(wait=clock.sleep)(work)
    assert clock.slept == [0.5, 1, 2, 4] and work.calls == 5  # with 8 s more it would be 15.5 s


def test_the_time_that_a_call_itself_takes_counts(clock, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 10.0)

    def slow() -> None:
        clock.now += 9.9
        raise OSError("the server did not answer")

    with pytest.raises(OSError, match="did not answer"):
        Retry(wait=clock.sleep)(slow)
    assert clock.slept == []


def test_other_errors_are_raised_at_once(clock):
    work = Failing(1, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        Retry(wait=clock.sleep)(work)
    assert work.calls == 1 and not clock.slept
    assert Retry((OSError, ValueError), clock.sleep)(Failing(1, ValueError("wrong"))) == ()
    assert clock.slept == [0.5]


def test_waiting_may_end_the_retries(clock):
    class Stopped(Exception):
        pass

    def wait(_: float) -> None:
        raise Stopped

    work = Failing(9, OSError("gone"))
    with pytest.raises(Stopped):
        Retry(wait=wait)(work)
    assert work.calls == 1


def test_ranks_give_up_together(clock, monkeypatch):
    """Rank 0 decides: its time may be up while that of another rank is not, and the other way round."""
    with pytest.raises(OSError, match="gone"):
        Retry(wait=clock.sleep, agree=lambda late: True)(Failing(9, OSError("gone")))
    monkeypatch.setattr(retry, "PATIENCE", 0.0)
    asked: list[bool] = []

    def agree(late: bool) -> bool:
        asked.append(late)
        return False

    assert Retry(wait=clock.sleep, agree=agree)(Failing(2, OSError("gone"))) == ()
    assert asked == [True, True]


def test_a_quiet_retry_logs_nothing(clock, caplog):
    with caplog.at_level(logging.WARNING):
        Retry(wait=clock.sleep, quiet=True)(Failing(2, OSError("gone")))
    assert not caplog.records


def test_patiently_really_sleeps(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.001, 0.002))
    work = Failing(3, OSError("gone"))
    assert patiently(work, "x") == ("x",) and work.calls == 4


def test_an_error_that_waiting_does_not_mend_is_raised_at_once(clock):
    work = Failing(9, FileNotFoundError("deleted"))
    with pytest.raises(FileNotFoundError, match="deleted"):
        Retry(wait=clock.sleep, final=(FileNotFoundError,))(work)
    assert work.calls == 1 and not clock.slept


def test_a_process_that_is_asked_to_stop_waits_no_longer():
    """The request comes while it waits, or before; the call itself is made once in any case."""
    with asked_to_end():
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        for _ in range(2):
            work = Failing(99, OSError("gone"))
            with pytest.raises(Interrupted, match="stopped while it waited"):
                patiently(work)
            assert work.calls >= 1
        assert time.monotonic() - began < 60, "not until it gives up"
    patiently(Failing(1, OSError("gone")))  # whoever catches the request may wait again
