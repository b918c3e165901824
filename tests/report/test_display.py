"""Test the display: every number under its heading, one line per row, and no odd metric that breaks it."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mgrpo.engine.report.display import COLUMNS, RECENT, Display, Progress, clock, make_display

AGENTS = ["main", "search"]
METRICS = {
    "reward_mean": 0.6123,
    "format": 0.98,
    "length_mean": 172.4,
    "entropy_mean": 0.417,
    "grad_norm": 0.8123,
    "lr": 1e-5,
    "perf/tokens_per_second": 123456.7,
}
EVALUATION = {
    "stage": "rl",
    "step": 10,
    "eval/held_out_accuracy": 0.41,
    "eval/low": 0.3441,
    "eval/high": 0.4792,
    "eval/questions": 200,
    "eval/failed": 3,
}


class Counting(io.StringIO):
    """A stream that counts its flushes."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def training_row(step: int = 11, seconds: float = 41.04) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": "rl",
        "step": step,
        "time/step": seconds,
        "rollouts/failed": 2,
        "rollouts/unscored": 0,
    }
    for agent in AGENTS:
        row |= {f"{agent}/{metric}": value for metric, value in METRICS.items()}
    row["search/reward_mean"] = 0.25
    return row | {"main/correct": 0.575, "search/expert": 0.433, "search/calls_mean": 1.93}


def lines(agents: list[str] = AGENTS) -> tuple[Display, Counting]:
    out = Counting()
    return make_display(agents, Console(file=out, force_terminal=False)), out


def table(width: int = 80) -> tuple[Display, Console]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, record=True, _environ={})
    return make_display(AGENTS, console), console


def frame(display: Any, width: int = 80) -> list[str]:
    """Return what the live table would show now."""
    console = Console(file=io.StringIO(), width=width, _environ={})
    with console.capture() as capture:
        console.print(display._render())
    return capture.get().splitlines()


def test_a_line_per_row_at_once_with_the_key_numbers_of_each_agent():
    display, out = lines()
    display.stage("rl", 10, 20)
    display.row(EVALUATION)
    display.row(training_row())
    display.say("saved [rl-00012]")
    assert out.flushed.splitlines() == [
        "rl: steps 11 to 20",
        "rl 10/20 | held-out 41.0% (34.4% to 47.9%) after 10 steps, 3 of 200 failed",
        "rl 12/20 | main reward 0.612 correct 0.575 entropy 0.42"
        " | search reward 0.250 expert 0.433 calls 1.93 entropy 0.42 | 2 failed | 41.0 s, 5:28 left",
        "saved [rl-00012]",
    ]
    display.close()


def test_steps_without_a_gradient_are_told_once_there_are_some():
    display, out = lines()
    display.stage("rl", 0, 9)
    for step, norm in enumerate([0.0, 0.0, 0.5, 0.0, None, 0.0, 0.0]):
        display.row({"stage": "rl", "step": step, "main/grad_norm": norm, "clerk/grad_norm": 0.0, "time/step": 1.0})
    told = [
        re.search(r"no gradient in the last (\d) steps: all rewards of a group are equal", line)
        for line in out.flushed.splitlines()
    ]
    assert [found and found[1] for found in told] == [None] * 6 + ["3", "4"]


def test_what_takes_time_is_a_line_of_its_own_once():
    display, out = lines()
    for part in (None, 0.0, 0.5, 1.0):
        display.doing("loading main", part)
    display.doing("evaluating")
    assert out.flushed.splitlines() == ["loading main", "evaluating"]


def test_a_part_is_told_again_after_a_while(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("mgrpo.engine.report.display.time.monotonic", lambda: now)
    display, out = lines()
    display.doing("downloading", 0.0)
    now += 9.0
    display.doing("downloading", 0.2)
    now += 2.0
    display.doing("downloading", 0.31)
    assert out.flushed.splitlines() == ["downloading", "downloading: 31%"]


def test_the_table_shows_what_takes_time_until_a_row_comes():
    display, _ = table()
    display.doing("loading main", 0.5)
    assert frame(display)[0].startswith("loading main") and "50%" in frame(display)[0]
    display.stage("rl", 11, 20)
    assert "loading main" not in "".join(frame(display))
    display.doing("evaluating")
    assert frame(display)[-1].startswith("evaluating") and "%" not in frame(display)[-1]
    display.row(training_row())
    assert "evaluating" not in "".join(frame(display))
    display.close()


def test_a_stage_without_steps_is_not_announced_and_an_agent_without_numbers_not_named():
    display, out = lines()
    display.stage("warmup", 0, 0)
    assert out.getvalue() == ""
    display.stage("warmup", 0, 2)
    display.row({"stage": "warmup", "step": 0, "time/step": 3.0, "main/logprob_mean": -1.25})
    assert out.flushed.splitlines() == ["warmup: steps 1 to 2", "warmup 1/2 | main logprob -1.250 | 3.0 s, 0:03 left"]


def test_the_table_fits_80_columns_with_every_number_under_its_heading():
    display, _ = table()
    display.stage("rl", 11, 20)
    display.row(EVALUATION)
    display.row(training_row())
    head, notes, headings, main, search = frame(display)
    assert "rl  step 12 of 20" in head and "ETA 5:28" in head and "elapsed 0:0" in head
    assert notes == "held-out 41.0% (34.4% to 47.9%) after 10 steps, 3 of 200 failed   2 failed"
    assert headings.split() == ["agent", *(heading for heading, _, _ in COLUMNS["rl"])]
    assert " ".join(main.split()) == "main 0.612 0.98 0.575 - - 172 0.42 0.812 1.0e-05 123,457"
    assert " ".join(search.split()) == "search 0.250 0.98 - 0.433 1.93 172 0.42 0.812 1.0e-05 123,457"
    ends = [headings.index(heading) + len(heading) for heading, _, _ in COLUMNS["rl"]]
    assert all(main[end - 1] != " " for end in ends), "right-aligned under the headings"
    display.close()


def test_decoupled_agents_show_their_newest_steps_and_notes_on_processes():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30, _environ={})
    display = make_display(AGENTS, console, decoupled=True)
    display.stage("rl", 11, 20)
    display.row(training_row())
    newest = training_row() | {"main/step": 14, "search/step": 12, "main/time/waiting": 3.21, "main/reward_mean": 0.75}
    display.now(newest, ["worker-0 3.1 rollouts/s", "trainer-search starts soon, restarts: 1"])
    head, _, headings, main, search, *notes = frame(display)
    assert "step 12 of 20" in head, "of the slowest"
    assert headings.split()[:3] == ["agent", "step", "reward"] and headings.split()[-1] == "wait"
    assert main.split()[:3] == ["main", "14", "0.750"] and main.split()[-1] == "3.2"
    assert search.split()[:2] == ["search", "12"] and search.split()[-1] == "-"
    assert notes == ["worker-0 3.1 rollouts/s", "trainer-search starts soon, restarts: 1"]
    assert len(headings) <= 80 and len(main.rstrip()) <= 80
    display.close()
    plain, out = lines()
    plain.stage("rl", 11, 20)
    plain.now(newest, ["a note"])
    assert out.getvalue() == "rl: steps 12 to 20\n", "what stands for ever waits for the whole row"


def test_messages_stand_above_the_table_and_the_last_table_stays():
    display, console = table(100)
    display.say("resumed from rl-00010")  # before the first table
    display.stage("rl", 10, 20)
    display.row(training_row())
    display.say("a [bold] word")
    display.close()
    display.close()
    text = console.export_text()
    assert text.index("resumed from rl-00010") < text.index("step 10 of 20") < text.index("a [bold] word")
    assert "step 12 of 20" in text[text.index("a [bold] word") :]


def test_a_new_stage_begins_with_no_numbers_but_keeps_the_accuracy():
    display, _ = table()
    display.stage("warmup", 0, 3)
    assert frame(display)[1] == "not evaluated yet"
    display.row({"stage": "warmup", "step": 0, "time/step": 3.2, "main/logprob_mean": -1.2345})
    assert frame(display)[3].split()[:2] == ["main", "-1.234"]
    display.row(EVALUATION)
    display.stage("rl", 0, 20)
    head, notes, _, main, _ = frame(display)
    assert "step 0 of 20" in head and "ETA -" in head and notes.startswith("held-out 41.0%")
    assert set(main.split()[1:]) == {"-"}
    display.close()


def test_the_remaining_time_is_estimated_by_the_median_of_the_recent_steps():
    progress = Progress()
    progress.stage("rl", 0, 100)
    for step, seconds in enumerate([500.0, 400.0, *[2.0] * (RECENT - 1), 900.0]):
        progress.row(training_row(step, seconds))
    assert progress.done == RECENT + 2
    assert progress.eta == clock(2.0 * (100 - progress.done)) == "2:56"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "1:00:00"), (90061, "25:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


keys = [
    f"{agent}/{metric}" for agent in AGENTS for metric in (*METRICS, "correct", "expert", "calls_mean", "logprob_mean")
]
keys += ["time/step", "rollouts/failed", "rollouts/unscored"]
numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e12), st.integers(0, 10**12)
)
odd = st.sampled_from([None, math.nan, math.inf])
rows = st.builds(
    lambda stage, step, row, seconds: {"stage": stage, "step": step, **row, **seconds},
    st.sampled_from(["warmup", "rl"]),
    st.integers(0, 10**6),
    st.dictionaries(st.sampled_from(keys[:-3]), st.one_of(numbers, odd)),
    st.dictionaries(st.sampled_from(keys[-3:]), numbers),
)
evaluations = st.dictionaries(
    st.sampled_from(sorted(EVALUATION.keys() - {"step", "stage"})), st.one_of(numbers, odd)
).map(lambda row: {**EVALUATION, **row})


@given(st.lists(st.one_of(rows, evaluations), max_size=5), st.integers(20, 200))
def test_any_row_is_one_line_and_a_table_as_high_as_before(told, width):
    display, out = lines()
    live, _ = table(width)
    for row in told:
        live.progress.stage(row["stage"], 0, 10**6)  # type: ignore[attr-defined]  # no thread per example
        live.progress.row(row)  # type: ignore[attr-defined]
        before = out.getvalue().count("\n")
        display.row(row)
        assert out.getvalue().count("\n") == before + 1 and out.flushed == out.getvalue()
        assert len(frame(live, 250)) == 5
        frame(live, width)
