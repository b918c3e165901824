"""Test that the heartbeat is regular, goes on after errors, and stops when it is told to."""

from __future__ import annotations

import logging
import threading
import time

from mgrpo.engine.system.heartbeat import Heartbeat


class Beats:
    """Count beats, the first `failing` of which raise an error."""

    def __init__(self, failing: int = 0, error: Exception | None = None) -> None:
        self.count, self.failing, self.error = 0, failing, error or OSError("the store is out of reach")
        self.heard = threading.Condition()

    def __call__(self) -> None:
        with self.heard:
            self.count += 1
            self.heard.notify_all()
        if self.count <= self.failing:
            raise self.error

    def wait_for(self, count: int) -> bool:
        with self.heard:
            return self.heard.wait_for(lambda: self.count >= count, timeout=10)


def test_it_beats_from_start_to_stop():
    beats = Beats()
    heartbeat = Heartbeat(beats, 0.01)
    time.sleep(0.05)
    assert beats.count == 0  # not started
    heartbeat.start()
    assert beats.wait_for(5)
    heartbeat.stop(timeout=10)
    count = beats.count
    time.sleep(0.05)
    assert beats.count == count and not heartbeat._thread.is_alive()


def test_it_waits_before_the_first_beat():
    beats = Beats()
    heartbeat = Heartbeat(beats, 30.0)
    heartbeat.start()
    heartbeat.stop(timeout=10)  # and is not kept by the interval
    assert beats.count == 0 and not heartbeat._thread.is_alive()


def test_it_goes_on_after_an_error_and_logs_it(caplog):
    beats = Beats(failing=2)
    heartbeat = Heartbeat(beats, 0.01, "leases not extended")
    with caplog.at_level(logging.WARNING):
        heartbeat.start()
        assert beats.wait_for(4)
        heartbeat.stop(timeout=10)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["leases not extended: the store is out of reach"] * 2


def test_it_survives_the_errors_named_and_no_others(monkeypatch):
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_value))
    known, unknown = Beats(2, RuntimeError("fenced")), Beats(1, RuntimeError("a bug"))
    first = Heartbeat(known, 0.01, errors=(RuntimeError, OSError))
    first.start()
    assert known.wait_for(4)
    first.stop(timeout=10)
    second = Heartbeat(unknown, 0.01)
    second.start()
    second._thread.join(10)
    assert not second._thread.is_alive() and unknown.count == 1
    assert [str(error) for error in died] == ["a bug"]


def test_stop_without_start_returns():
    Heartbeat(Beats(), 0.01).stop(timeout=10)


def test_stop_waits_for_a_beat_under_way_but_no_longer_than_told():
    begun, end = threading.Event(), threading.Event()

    def beat() -> None:
        begun.set()
        end.wait(10)

    heartbeat = Heartbeat(beat, 0.01)
    heartbeat.start()
    assert begun.wait(10)
    heartbeat.stop(timeout=0.05)
    assert heartbeat._thread.is_alive()  # stuck in the store: it is a daemon, and holds up nobody
    end.set()
    heartbeat.stop(timeout=10)
    assert not heartbeat._thread.is_alive()
