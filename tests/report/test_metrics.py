"""Test that rows of many processes read as those of one run, also while they are written and rewound."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tracemalloc
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine.config.schema import Config, dump_config
from mgrpo.engine.report.follow import Watch
from mgrpo.engine.report.metrics import Tail, merge, place_of, read_rows
from mgrpo.engine.report.summary import summary
from mgrpo.engine.run.directory import RunPaths
from toy import toy_config


def trained(step: int, stage: str = "rl", **metrics: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, **metrics}


def evaluated(step: int, accuracy: float) -> dict[str, Any]:
    return {"stage": "rl", "step": step, "eval/held_out_accuracy": accuracy, "eval/questions": 10}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_a_step_of_all_agents_is_merged_with_the_workers_rows_of_it():
    agents = {
        "main": [trained(0, "warmup", loss=1.0), trained(0, reward_mean=0.5, **{"time/step": 2.0}), trained(1)],
        "sub": [trained(0, "warmup", loss=2.0), trained(0, reward_mean=0.25, **{"time/step": 3.0})],
    }
    workers = [
        [
            evaluated(0, 0.25),
            trained(0, **{"rollouts/scored": 3, "rollouts/failed": 1, "time/waiting": 1.0}),
            trained(0, **{"rollouts/scored": 2, "time/waiting": 0.5, "staleness_mean": 7.0}),
        ],
        [trained(0, **{"rollouts/scored": 4, "time/waiting": 1.25, "time/rollout": 9.0}), evaluated(0, 0.75)],
    ]
    assert merge(agents, workers) == [
        {"stage": "warmup", "step": 0, "main/loss": 1.0, "sub/loss": 2.0},
        evaluated(0, 0.75),  # the last one counts
        {
            "stage": "rl",
            "step": 0,
            "rollouts/scored": 9,
            "rollouts/failed": 1,
            "workers/time/waiting": 1.5,  # of the worker that waited longest
            "time/rollout": 9.0,
            "main/reward_mean": 0.5,
            "main/time/step": 2.0,
            "sub/reward_mean": 0.25,
            "sub/time/step": 3.0,
            "time/step": 3.0,
        },
    ]


stages = st.sampled_from(["warmup", "rl"])
agent_rows = st.lists(st.builds(trained, st.integers(0, 5), stages, x=st.integers(0, 99)), max_size=12)
worker_rows = st.lists(
    st.one_of(
        st.builds(lambda step, n: trained(step, **{"rollouts/scored": n}), st.integers(0, 5), st.integers(0, 9)),
        st.builds(evaluated, st.integers(0, 5), st.floats(0, 1)),
    ),
    max_size=8,
)


@given(st.dictionaries(st.sampled_from(["main", "a", "b"]), agent_rows, min_size=1), st.lists(worker_rows, max_size=3))
def test_merging_finds_the_same_as_looking_up_each_step(agents, workers):
    found = merge(agents, workers)
    assert found == sorted(found, key=place_of) and len({place_of(row) for row in found}) == len(found)
    for stage in ("warmup", "rl"):
        for step in range(6):
            mine = [row for row in found if (row["stage"], row["step"]) == (stage, step)]
            of = {
                name: [r["x"] for r in rows if (r["stage"], r["step"]) == (stage, step)]
                for name, rows in agents.items()
            }
            counts = [r["rollouts/scored"] for w in workers for r in w if r["step"] == step and "rollouts/scored" in r]
            expected = {f"{name}/x": values[-1] for name, values in of.items() if values}
            steps = [row for row in mine if "eval/questions" not in row]
            assert len(steps) == all(of.values())
            if steps:
                sampled = {"rollouts/scored": sum(counts)} if counts and stage == "rl" else {}
                assert steps[0] == trained(step, stage) | expected | sampled
            accuracies = [
                r["eval/held_out_accuracy"] for w in workers for r in w if "eval/questions" in r and r["step"] == step
            ]
            told = [row["eval/held_out_accuracy"] for row in mine if "eval/questions" in row]
            assert told == (accuracies[-1:] if stage == "rl" else [])


@settings(max_examples=30)
@given(st.lists(st.one_of(st.integers(1, 7), st.none()), max_size=12))
def test_a_tail_follows_a_file_that_grows_in_pieces_and_is_replaced(tmp_path_factory, pieces):
    """Each piece is a number of bytes that are appended; None: the file is replaced by its first complete line."""
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    tail, size, seen = Tail(path), 0, []
    content = b"".join(b'{"stage": "rl", "step": %d}\n' % 7**n for n in range(40))
    first = content.index(b"\n") + 1
    assert not tail.renewed() and not [*tail.rows()]
    for piece in pieces:
        if piece is None:
            size = first if size >= first else 0
            path.with_suffix(".new").write_bytes(content[:size])
            path.with_suffix(".new").rename(path)
        else:
            with path.open("ab") as file:
                file.write(content[size : size + piece])
            size += piece
        seen = ([] if tail.renewed() else seen) + [row["step"] for row in tail.rows()]
        assert seen == [7**n for n in range(content[:size].count(b"\n"))]
    tail.restart()
    assert [row["step"] for row in tail.rows()] == seen
    tail.close()


def test_a_tail_notices_a_new_file_that_has_the_inode_number_of_the_old(tmp_path):
    """It is replaced twice between two looks: most file systems give the first file's number to the third."""
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside"
    line = '{{"stage": "rl", "step": {}}}\n'.format
    path.write_text(line(100))
    tail = Tail(path)
    for value in range(101, 121):
        assert tail.renewed() and next(tail.rows())["step"] == value - 1
        for content in ("", line(value) * 2):
            aside.write_text(content)
            aside.rename(path)
    tail.close()


def test_a_tail_leaves_out_what_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(trained(3)).encode()
    path.write_bytes(b"\n".join([b"\0" * 40, b"7", b'{"stage": "?", "step": 1}', b'{"stage": "rl"}', good, good[:9]]))
    tail = Tail(path)
    assert tail.renewed() and [*tail.rows()] == [trained(3)]
    tail.close()


# ---- the whole run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = toy_config(tmp_path, topology="local", warmup={"steps": 1}, steps=3)
    os.makedirs(config.run_dir)
    (Path(config.run_dir) / "config.json").write_text(dump_config(config))
    return config


def agent_file(config: Config, name: str) -> Path:
    return Path(config.run_dir) / "agents" / name / "metrics.jsonl"


def test_a_decoupled_run_is_summed_up_as_one(config: Config):
    times = {"time/step": 4.0, "time/train": 1.5, "time/waiting": 2.5}
    for name, reward in (("main", 0.5), ("clerk", 0.25)):
        rows = [trained(0, "warmup"), *(trained(step, reward_mean=reward + step / 10, **times) for step in range(2))]
        write(agent_file(config, name), rows)
    write(agent_file(config, "main"), [*read_tail(config, "main"), trained(2)])
    sampled = [trained(step, **{"rollouts/scored": 12, "time/rollout": 2.0, "time/waiting": 1.0}) for step in range(2)]
    write(Path(config.run_dir) / "workers/worker-0/metrics.jsonl", [evaluated(0, 0.5), *sampled])
    lines = summary(Path(config.run_dir)).splitlines()
    assert "1 of 1 warm-up steps, 2 of 3 rl steps" in lines[0]
    assert "after 0 rl steps: 50.0 %" in lines[1]
    assert lines[-2:] == [
        "rollouts: 24 scored, 0 unscored, 0 failed",
        "time: 4.0 s per rl step on average: main 1.5 s training, 2.5 s waiting; "
        "clerk 1.5 s training, 2.5 s waiting; workers 2.0 s sampling, 1.0 s waiting",
    ]
    assert any(line.split() == ["clerk", "0.250", "->", "0.350", "-", "-", "-", "-"] for line in lines)


def read_tail(config: Config, name: str) -> list[dict[str, Any]]:
    tail = Tail(agent_file(config, name))
    tail.renewed()
    rows = [*tail.rows()]
    tail.close()
    return rows


class Silent:
    """A display that shows nothing."""

    def stage(self, name: str, first: int, steps: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def now(self, row: Any, notes: Any) -> None: ...

    def say(self, text: str) -> None: ...

    def doing(self, text: str, part: float | None = None) -> None: ...

    def close(self) -> None: ...


class Recorder:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.newest: dict[str, Any] = {}
        self.notes: list[str] = []

    def stage(self, name: str, first: int, steps: int) -> None:
        self.told.append((name, first, steps))

    def row(self, row: dict[str, Any]) -> None:
        self.told.append((row["stage"], row["step"]))

    def now(self, row: Any, notes: Any) -> None:
        self.newest, self.notes = dict(row), list(notes)

    def say(self, text: str) -> None:
        self.told.append(text)

    def doing(self, text: str, part: float | None = None) -> None: ...

    def close(self) -> None: ...


def test_a_row_is_shown_once_and_again_after_a_rewind(config: Config):
    display = Recorder()
    watch = Watch(config, display)
    assert display.told == [("warmup", 0, 1)]
    for name in config.agents:
        append(agent_file(config, name), trained(0, "warmup"))
    watch.look({})
    assert display.told[1:] == [("warmup", 0), ("rl", 0, 3)]
    append(agent_file(config, "main"), trained(0, reward_mean=1.0))
    watch.look({"trainer-main": "running", "trainer-clerk": "starts soon, restarts: 1"})
    assert len(display.told) == 3, "the clerk has not taken the step"
    assert display.newest == {"main/reward_mean": 1.0, "main/step": 1}
    assert display.notes == ["trainer-clerk starts soon, restarts: 1"]
    append(agent_file(config, "clerk"), trained(0))
    append(Path(config.run_dir) / "workers/worker-0/metrics.jsonl", evaluated(0, 0.5))
    watch.look({})
    watch.look({})
    assert display.told[3:] == [("rl", 0), ("rl", 0)], "the evaluation, then the step"
    write(agent_file(config, "clerk"), [trained(0, "warmup")])  # restarted from an earlier checkpoint
    watch.look({})
    append(agent_file(config, "clerk"), trained(0))
    append(agent_file(config, "clerk"), trained(1))
    append(agent_file(config, "main"), trained(1))
    watch.look({})
    assert display.told[5:] == [("rl", 0), ("rl", 1)]
    watch.close()
    held = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink() and file.exists()]
    assert not [name for name in held if name.startswith(config.run_dir)]


def test_a_rewound_agent_is_waited_for_again_with_the_rows_that_the_others_wrote_before(config: Config):
    display = Recorder()
    watch = Watch(config, display)
    files = [agent_file(config, name) for name in config.agents]
    worker = Path(config.run_dir) / "workers/worker-0/metrics.jsonl"
    for row in (trained(0, "warmup"), *map(trained, range(5))):
        for file in files:
            append(file, row)
        append(worker, evaluated(row["step"], 0.5) if row["step"] == 2 else trained(row["step"], x=1.0))
        watch.look({})
    told = len(display.told)
    write(files[1], [trained(0, "warmup"), *map(trained, range(2))])
    watch.look({})
    assert len(display.told) == told
    for step in (2, 3, 4):
        append(files[1], trained(step, again=1.0))
    append(worker, evaluated(4, 0.5))
    watch.look({})
    assert display.told[told:] == [("rl", 2), ("rl", 3), ("rl", 4), ("rl", 4)]
    watch.close()


def test_a_launcher_that_follows_a_run_keeps_less_than_100_bytes_a_step(config: Config):
    """24 KiB a step were kept, and all rows merged again for each new one."""
    files = [agent_file(config, name) for name in config.agents]
    files.append(Path(config.run_dir) / "workers/worker-0/metrics.jsonl")
    many = {f"metric_{number}": 0.1 for number in range(40)}

    def take_steps(first: int, last: int) -> int:
        for step in range(first, last):
            for file in files:
                append(file, trained(step, **many))
            append(files[-1], evaluated(step, 0.5))
            watch.look({"worker-0": "running"})
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with closing(Watch(config, Silent())) as watch:
        tracemalloc.start()
        try:
            before = take_steps(0, 100)
            assert (take_steps(100, 500) - before) / 400 < 100
        finally:
            tracemalloc.stop()


def test_a_full_disk_is_reported_as_processes_may_have_no_room_to_log_it(config: Config, monkeypatch):
    display = Recorder()
    write(agent_file(config, "main"), [trained(0, "warmup")])
    for free, notes in ((1 << 20, []), (4096, [f"the disk is full: 4096 bytes free in {config.run_dir}"])):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with closing(Watch(config, display)) as watch:
            watch.look({"worker-0": "running"})
        assert display.notes == notes


def test_a_run_that_goes_on_is_shown_from_where_it_is(config: Config):
    for name in config.agents:
        write(agent_file(config, name), [trained(0, "warmup"), trained(0), trained(1)])
    display = Recorder()
    with closing(Watch(config, display)) as watch:
        watch.look({})
    assert display.told == [("rl", 2, 3)]
    assert [row["step"] for row in read_rows(Path(config.run_dir), config)] == [0, 0, 1]


def test_what_an_agent_waits_for_is_noted_and_said_once(config: Config):
    display = Recorder()
    with closing(Watch(config, display)) as watch:
        waiting = RunPaths(config.run_dir).agent("main").waiting
        waiting.parent.mkdir(parents=True, exist_ok=True)
        for reason in ("no score", "no score", "still none", ""):
            waiting.write_text(f"{reason}\n")
            watch.look({})
            assert display.notes == ([f"main waits: {reason}"] if reason else [])
        waiting.unlink()
        watch.look({})
    said = [text for text in display.told if isinstance(text, str)]
    assert said == ["main waits: no score", "main waits: still none"]
