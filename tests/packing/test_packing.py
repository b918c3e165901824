"""Test all of mgrpo._packing: a long call lets other Python threads run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fill_cases import ints

from mgrpo import _packing as packing


def long_calls() -> dict[str, Callable[[], Any]]:
    """Return calls of 0.05 s and more. Their arguments are made here, so that nothing else is timed."""
    random = np.random.default_rng(0)
    counts, keys = ints([1] * 16), np.ones(16, np.uint64)
    lengths = random.integers(1, 16_384, 4_000_000)
    size = 2**23
    offsets, tokens, silent = ints([0, size]), np.zeros(size, np.int32), np.zeros(8 * size, np.bool_)
    columns = (tokens, offsets, silent[:size], ints([0]), ints([size - 1]), np.ones(1), np.ones(1))
    return {
        "align": lambda: packing.align(counts, 2**20, "sampled", 0, keys),
        "trainable_rows": lambda: packing.trainable_rows(ints([0, 8 * size]), silent),
        "plan": lambda: packing.plan(lengths, 16_384),
        "fill": lambda: packing.fill(*columns, threads=1),
    }


def stopped_share(call: Callable[[], Any]) -> float:
    """Return the longest stop of this thread while another one made the call, over the time of the call."""
    seconds: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    moments = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        moments.append(time.perf_counter())
    return max(np.diff(moments)) / seconds[0]


@pytest.mark.parametrize("name", ["align", "trainable_rows", "plan", "fill"])
def test_the_gil_is_released(name):
    """Check that this thread runs during calls: a call that held the GIL would always stop it from start to end."""
    call = long_calls()[name]
    assert min(stopped_share(call) for _ in range(4)) < 0.5
