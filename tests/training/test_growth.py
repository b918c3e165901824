"""Test that the memory of every process of a run stays as it is, however many steps the run takes.

STEPS_OF_GROWTH: of the run; its first quarter is left out, in which caches and pools fill up. The last to be full is
the tokenizers' own, of 10,000 pieces of text for each agent, some 2 MB.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from faults import Run

STEPS = int(os.environ.get("STEPS_OF_GROWTH", "10000"))
MOST = 1024.0  # bytes a step
LOOK = 2.0  # seconds between two looks
PARTS = 4  # of the steps, in each of which the least memory counts, as a process needs more for a moment

Sample = tuple[int, int]  # a step, and the bytes that a process had then


def growth(samples: Sequence[Sample]) -> float:
    """Return how many bytes a step a process has grown by, from the first part of its steps to the last."""
    first, last = samples[0][0], samples[-1][0]
    parts: defaultdict[int, list[Sample]] = defaultdict(list)
    for step, size in samples:
        parts[min(PARTS - 1, PARTS * (step - first) // (last - first))].append((step, size))
    (step, size), (step_later, size_later) = (min(parts[at], key=lambda sample: sample[1]) for at in (0, PARTS - 1))
    return (size_later - size) / (step_later - step)


def anonymous(pid: int) -> int:
    """Return the bytes of a process that belong to no file."""
    return 1024 * int(re.findall(r"(?m)^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


@pytest.mark.parametrize(("bytes_a_step", "noise"), [(0, 0), (0, 300_000), (2000, 300_000)])
def test_growth_is_found_among_moments_in_which_more_is_needed(bytes_a_step: int, noise: int):
    samples = [(step, 10**8 + bytes_a_step * step + noise * (step % 7 == 3)) for step in range(500, 2500, 20)]
    assert growth(samples) == pytest.approx(bytes_a_step, abs=20)


@pytest.mark.nightly
def test_no_process_grows_by_a_kibibyte_a_step(tmp_path: Path, request: pytest.FixtureRequest):
    told: Callable[[str], None] = lambda line: request.node.user_properties.append(("measured", line))  # noqa: E731
    run = Run(tmp_path, told, steps=STEPS, queries_per_step=1, sampling={"max_staleness": 1}, checkpoint={"every": 50})
    launcher = run.start("train")
    found: defaultdict[str, list[Sample]] = defaultdict(list)
    try:
        while launcher.poll() is None:
            time.sleep(LOOK)
            step = min(run.steps().values(), default=0)
            for pid, who in (*run.living().items(), (launcher.pid, "launcher")):
                if step > STEPS // 4 and launcher.poll() is None:
                    found[who].append((step, anonymous(pid)))
    finally:
        run.end()
    assert launcher.returncode == 0 and len(run.begun()) == 3, run.told()
    grown = {who: growth(samples) for who, samples in found.items()}
    told(f"{STEPS} steps, bytes a step: {grown}")
    assert set(grown) == {"launcher", "main", "clerk", "worker-0"} and max(grown.values()) < MOST, grown
