"""Test `mgrpo store init|status|dump|gc`, with a run's file and with a URL."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from cases.store import episode
from mgrpo.bench.postgres import PASSWORD
from mgrpo.engine.cli import main
from mgrpo.engine.cli.store import remove
from mgrpo.engine.config.resume import fingerprint
from mgrpo.engine.config.schema import load_config
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.store import Publication, Store
from mgrpo.engine.store.open import begin, open_store

FILE = """
run_dir = "{folder}/run"
topology = "local"
queries_per_step = 2
[environment]
use = "sums.py:Sums"
[agents.main]
model = "{folder}/model"
[agents.search]
model = "{folder}/model"
[algorithm]
rollouts = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FILE.format(folder=tmp_path))
    return path


@pytest.fixture
def mgrpo(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mgrpo", "store", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def fill(file: Path) -> Store:
    """Record two queries, ack them for the main agent, and write their files of 10 bytes."""
    config = load_config(file)
    RunDirectory(config.run_dir, resume=True).close()
    store = open_store(config)
    begin(store, config)
    for agent in config.agents:
        store.roles.hold(f"trainer:{agent}", "host:7", 50)
        weights = {"file": "f", "checksum": "", "size": 1, "trained": 1, "version": 1}
        store.roles.publish(Publication(agent=agent, step=1, **weights), "host:7")
    store.queries.take("worker-1", 2, ahead=1, total=9, task_of=str, lease=50)
    for rollout in range(2):
        store.queries.record(*episode(0, rollout))
        store.queries.record(*episode(1, rollout))
    store.groups.claim("main", 2, "host:7")
    store.groups.ack("main", [0, 1], "host:7")
    for agent in config.agents:
        (Path(config.run_dir) / "trajectories" / f"{agent}-00000.arrow").write_bytes(b"0123456789")
    return store


def test_init_makes_the_run_once_and_not_as_another(file, mgrpo):
    for _ in range(2):
        code, out, _ = mgrpo("init", file)
        assert code == 0 and "store.db: run 'local' of main, search is ready" in out
    file.write_text(file.read_text().replace("rollouts = 2", "rollouts = 3"))
    code, _, err = mgrpo("init", file)
    assert code == 1 and err.startswith("error: run 'local': rollouts: 3 given: expected 2")


def test_status_and_dump_of_a_file_and_of_its_url(file, mgrpo):
    store = fill(file)
    for target in (file, store.name):
        code, out, _ = mgrpo("status", target)
        assert code == 0
        assert "run local: 2 queries, 4 rollouts, 12 calls" in out
        assert "main: 2 acked, 2 opened; step 1 published" in out and "search: 2 sealed, 2 opened" in out
        assert "trainer:main is held by host:7, for another" in out
        assert "violations: 1 agents with more acked than published" in out
        code, out, _ = mgrpo("dump", target)
        rows = [json.loads(line) for line in out.splitlines()]
        assert code == 0 and sum(row["table"] == "calls" for row in rows) == 12
        assert {row["run"] for row in rows} == {"local"}


def test_a_store_that_is_not_there_is_not_made(file, mgrpo, tmp_path):
    for target in (file, f"sqlite:///{tmp_path}/none.db"):
        for command in ("status", "dump"):
            code, _, err = mgrpo(command, target)
            assert code == 1 and err.startswith("error: store: ") and err.endswith("is not there\n")
    assert not list(tmp_path.rglob("*.db"))


def test_gc_waits_for_the_run_to_end_and_deletes_what_is_finished(file, mgrpo):
    store = fill(file)
    folder = Path(load_config(file).run_dir)
    code, _, err = mgrpo("gc", file)
    assert code == 1 and "gc: run 'local' is alive (trainer:main, trainer:search): stop it first" in err
    for agent in ("main", "search"):
        store.roles.release(f"trainer:{agent}", "host:7")
    held = RunDirectory(folder, resume=True)
    code, _, err = mgrpo("gc", file)
    assert code == 1 and "is in use by process" in err
    held.close()
    for target in (file, store.name):
        code, out, _ = mgrpo("gc", target)
        assert code == 0 and out == (
            "run local: 1 file of 4 calls deleted, 10 bytes\n"
            if target == file
            else "run local: 0 files of 0 calls deleted, 0 bytes\n"
        )
    assert [path.name for path in (folder / "trajectories").iterdir()] == ["search-00000.arrow"]
    assert len(store.groups.calls_of(0)) == 4


def test_gc_does_not_wait_for_a_run_that_died_while_the_clock_was_ahead(file, mgrpo):
    store = fill(file)
    with store.database.engine.begin() as db:
        db.exec_driver_sql(f"update roles set deadline = {time.time() + 1e6}")
    assert mgrpo("gc", file)[:2] == (0, "run local: 1 file of 4 calls deleted, 10 bytes\n")


def test_gc_waits_for_idle_workers_and_keeps_the_last_files_of_silent_ones(file, mgrpo):
    store = fill(file)
    for agent in ("main", "search"):
        store.roles.release(f"trainer:{agent}", "host:7")
    trajectories = Path(load_config(file).run_dir) / "trajectories"
    (trajectories / "main-00000.arrow").rename(trajectories / "main-w-1-00000.arrow")
    (trajectories / "main-w-1-00001.arrow").write_bytes(b"0123456789")
    with store.database.engine.begin() as db:
        db.exec_driver_sql("update calls set file = 'main-w-1-0000' || (query % 2) || '.arrow' where agent = 'main'")
    store.roles.hold("worker:w-1", "w-1", 50)  # it waits for work, and leases no query
    code, _, err = mgrpo("gc", file)
    assert code == 1 and "gc: run 'local' is alive (worker:w-1): stop it first" in err
    for seconds, told in (
        (0.0, "1 file of 2 calls deleted, 10 bytes; 1 file kept of w-1"),
        (-1e5, "1 file of 2 calls"),
    ):
        with store.database.engine.begin() as db:
            db.exec_driver_sql(f"update roles set deadline = {time.time() + seconds - 1} where role = 'worker:w-1'")
        code, out, _ = mgrpo("gc", file)
        assert code == 0 and out.startswith(f"run local: {told}")
        left = {path.name for path in trajectories.iterdir()}
        assert ("main-w-1-00001.arrow" in left) == (seconds == 0.0) and "main-w-1-00000.arrow" not in left


def test_gc_of_a_server_takes_the_run_of_that_directory_alone(server, file, mgrpo, monkeypatch, tmp_path):
    monkeypatch.setenv("MGRPO_STORE_PASSWORD", PASSWORD)
    url = server.create()
    file.write_text(f'{file.read_text()}\n[store]\nurl = "{url}"\n')
    store = fill(file)
    assert store.run == "run"
    code, _, err = mgrpo("gc", url)
    assert code == 1 and "expected --run-dir" in err
    for agent in ("main", "search"):
        store.roles.release(f"trainer:{agent}", "host:7")
    (tmp_path / "other" / "trajectories").mkdir(parents=True)
    assert mgrpo("gc", url, "--run-dir", tmp_path / "other")[1] == f"{url}: no run 'other'\n"
    code, _, err = mgrpo("gc", url, "--run-dir", tmp_path / "nowhere")
    assert code == 1 and "expected a run directory with trajectories" in err
    assert mgrpo("gc", url, "--run-dir", tmp_path / "run")[1].startswith("run run: 1 file of 4 calls deleted")
    assert mgrpo("status", url)[0] == 0
    store.close()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", "..", "a\\..\\b"])
def test_gc_deletes_nothing_outside_the_run(tmp_path, name):
    root = tmp_path / "trajectories"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "main-00000.arrow").write_text("x")
    with pytest.raises(ValueError, match="expected a path below"):
        remove(str(root), ["main-00000.arrow", name])
    assert (tmp_path / "secret").exists() and (root / "main-00000.arrow").exists()


def test_init_of_a_cluster_run_takes_what_may_change_and_names_what_may_not(file, mgrpo):
    file.write_text(file.read_text().replace('"local"', '"cluster"'))
    assert mgrpo("init", file)[:2] == (0, mgrpo("init", file)[1])
    file.write_text(file.read_text().replace("queries_per_step = 2", "queries_per_step = 2\nsteps = 99"))
    code, out, _ = mgrpo("init", file)
    assert code == 0 and out.startswith("resume: steps: 99 from here on, it was 20\n")
    file.write_text(file.read_text().replace("rollouts = 2", "rollouts = 2\nkl_coef = 0.5"))
    code, _, err = mgrpo("init", file)
    assert code == 1 and err.startswith(
        "error: resume: algorithm.kl_coef: 0.5 given: expected 0.0, as the run was begun"
    )


def test_init_takes_an_option_that_the_environment_calls_volatile(file, mgrpo, tmp_path):
    (tmp_path / "env.py").write_text(
        "from mgrpo import Environment\nclass E(Environment):\n    volatile = ('judge',)\n"
        "    def __init__(self, judge): pass\n"
    )
    text = file.read_text().replace('"local"', '"cluster"').replace("sums.py:Sums", f"{tmp_path}/env.py:E")
    for judge, told in (
        ("http://a", ""),
        ("http://b", "resume: environment.options.judge: 'http://b' from here on, it was"),
    ):
        file.write_text(text.replace("[agents.main]", f'options = {{ judge = "{judge}" }}\n[agents.main]'))
        code, out, err = mgrpo("init", file)
        assert code == 0 and out.startswith(told), err
    with closing(open_store(load_config(file))) as store:
        begin(store, load_config(file))  # as the processes of the run do next


def test_a_run_is_the_same_with_other_steps_or_machines_but_not_with_other_rewards(file):
    def changed(*overrides: str) -> str:
        return fingerprint(load_config(file, overrides))

    assert len(changed()) == 32
    for override in (
        "sampling.workers=9",
        "checkpoint.every=3",
        "steps=99",
        "agents.main.ranks=2",
        "run_dir=elsewhere",
        "agents.main.lr=1e-3",
        "agents.main.grad_clip=1.0",  # the default
    ):
        assert changed(override) == changed()
    for override in ("reward.main_correct=0.5", "agents.main.grad_clip=2.0", "seed=1", "queries_per_step=3"):
        assert changed(override) != changed()
