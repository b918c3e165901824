"""Test what loggers are sent, with loggers that only keep it, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import pytest

from mgrpo.engine.config.schema import Config, dump_config, load_config
from mgrpo.engine.report.loggers import choose, feed
from mgrpo.engine.report.loggers.base import LoggedRun, Logger, public_config
from mgrpo.engine.report.loggers.episodes import hide, secrets_of
from mgrpo.engine.report.loggers.feed import End, Feed, Note, Order, numbers_of
from mgrpo.engine.report.loggers.rows import NewRows
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import Row
from toy import toy_config


class Keeper(Logger):
    """Keep what it is sent."""

    def __init__(self) -> None:
        self.begun: list[LoggedRun] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.statuses: list[str] = []

    def begin(self, run: LoggedRun) -> None:
        self.begun.append(run)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def finish(self, status: str) -> None:
        self.statuses.append(status)


class Board(Keeper):
    """Keep only what it was sent since it began, as TensorBoard."""

    replays: ClassVar[bool] = True

    def begin(self, run: LoggedRun) -> None:
        super().begin(run)
        self.rows = []


class Ended(End):
    """Stand for a run that ended long ago."""

    def __init__(self) -> None:
        self.status = "finished"

    def has_come(self) -> bool:
        return True

    def wait(self, seconds: float) -> None:
        pass


class Case(NamedTuple):
    """Hold a run directory without a run."""

    run: RunPaths
    config: Config

    def write(self, rows: Iterable[Row], path: Path | None = None) -> None:
        """Add rows to a metrics file."""
        path = path or self.run.metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def rewind(self, rows: Iterable[Row]) -> None:
        """Replace the rows, as a run that goes back to a checkpoint does."""
        self.run.metrics.rename(self.run.path / "old")
        self.write(rows)

    def feed(self, logger: Logger, said: list[str] | None = None) -> Feed:
        """Return the feed of the logger, of a run that has ended."""
        self.run.loggers.mkdir(exist_ok=True)
        order = Order("file.py:Own", str(self.run.path), dump_config(self.config), 1.0)
        return Feed(order, logger, Ended(), lambda note: None if said is None else said.append(note.say))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    config = toy_config(tmp_path, topology="colocated")
    Path(config.run_dir).mkdir()
    return Case(RunPaths(config.run_dir), config)


def step(number: int, stage: str = "rl", **values: Any) -> Row:
    return {"stage": stage, "step": number, "main/reward_mean": 0.5 * number, **values}


def evaluation(number: int) -> Row:
    return {"stage": "rl", "step": number, "eval/held_out_accuracy": 0.1 * number, "eval/questions": 10}


ROWS = [step(0, "warmup"), step(1, "warmup"), evaluation(0), step(0), step(1), evaluation(2), step(2)]


def test_every_number_is_sent_once_by_its_key(case: Case):
    case.write([step(0, "warmup", bad=None, note="x"), *ROWS[1:]])
    keeper = Keeper()
    case.feed(keeper).run()
    assert keeper.rows == [(row["step"], numbers_of(row)) for row in read_rows(case.run.path, case.config)]
    assert keeper.rows[0] == (0, {"warmup/main/reward_mean": 0.0})
    assert keeper.rows[2] == (0, {"eval/held_out_accuracy": 0.0, "eval/questions": 10})
    assert keeper.statuses == ["finished"]


def test_a_run_that_goes_on_is_the_same_one_and_no_step_comes_twice(case: Case):
    case.write(ROWS[:5])
    first, second = Keeper(), Keeper()
    case.feed(first).run()
    case.rewind([*ROWS[:4], step(1) | {"main/reward_mean": 9.0}, *ROWS[5:]])  # step 1 was taken again
    case.feed(second).run()
    assert [number for number, _ in second.rows] == [2, 2]
    assert second.begun[0].id == first.begun[0].id
    assert (first.begun[0].rows, second.begun[0].rows) == (0, 5)


def test_a_board_shows_what_the_metrics_hold_after_a_run_went_back(case: Case):
    case.write(ROWS)
    board = Board()
    following = case.feed(board)
    following._begin()
    following._look(over=False)
    case.rewind([*ROWS[:4], step(1) | {"main/reward_mean": 9.0}])
    following._look(over=False)
    following.rows.close()
    assert board.rows == [(row["step"], numbers_of(row)) for row in read_rows(case.run.path, case.config)]
    case.feed(board).run()  # the next process
    assert board.rows == [(row["step"], numbers_of(row)) for row in read_rows(case.run.path, case.config)]
    assert len({run.id for run in board.begun}) == 1


def test_a_decoupled_run_is_logged_whole_with_its_workers_and_evaluations(tmp_path: Path):
    config = toy_config(tmp_path, topology="local")
    case = Case(RunPaths(config.run_dir), config)
    rows = NewRows(case.run.path, config)

    def train(number: int) -> None:
        for agent in config.agents:
            case.write(
                [{"stage": "rl", "step": number, "reward_mean": 0.25, "time/step": 1.0}], case.run.agent(agent).metrics
            )

    def sample(number: int, scored: int) -> None:
        case.write([{"stage": "rl", "step": number, "rollouts/scored": scored}], case.run.worker("a").metrics)

    sample(0, 5)
    train(0)
    assert rows.read(over=False) == []
    sample(0, 7)  # late
    train(1)
    case.write([evaluation(0)], case.run.worker("b").metrics)
    sent = rows.read(over=False)
    assert [row["step"] for row in sent] == [0, 0] and sent[1]["rollouts/scored"] == 12
    sample(1, 3)
    sent += rows.read(over=False)
    sent += rows.read(over=True)
    assert sent == read_rows(case.run.path, config) and len(sent) == 3
    rows.close()


class Broken(Keeper):
    """Raise at each call, or exit."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no server"), SystemExit(3)], ids=["raises", "exits"])
def test_what_a_broken_logger_was_not_sent_is_said_and_sent_later(case: Case, error: BaseException):
    case.write(ROWS)
    said: list[str] = []
    case.feed(Broken(error), said).run()
    assert len(said) == 2 and type(error).__name__ in said[0]
    assert said[1] == f"logger Own: {len(ROWS)} rows are not logged yet; `mgrpo log {case.run.path}` logs them"
    keeper = Keeper()
    case.feed(keeper).run()
    assert len(keeper.rows) == len(ROWS)


def test_a_row_that_cannot_be_logged_is_given_up_after_a_while(case: Case, monkeypatch: pytest.MonkeyPatch):
    class Choosy(Keeper):
        def numbers(self, step: int, values: Mapping[str, float]) -> None:
            if "eval/questions" in values:
                raise ValueError("no evaluations, please")
            super().numbers(step, values)

    class Later(Ended):
        """Let the run end after the first look."""

        asked = 0

        def has_come(self) -> bool:
            self.asked += 1
            return self.asked > 3 * len(ROWS)

    monkeypatch.setattr(feed, "PATIENCE", 0.0)
    case.write(ROWS)
    choosy, said = Choosy(), list[str]()
    feeding = case.feed(choosy, said)
    feeding.end = Later()
    feeding.run()
    assert len(choosy.rows) == 5 and feeding.sent.skipped == 2
    assert said[-1] == "logger Own: 2 rows are missing, because they could not be logged"


def test_nothing_is_logged_while_the_disk_is_nearly_full(case: Case, monkeypatch: pytest.MonkeyPatch):
    case.write(ROWS)
    keeper, said = Keeper(), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, feed.SCARCE - 1))  # type: ignore[attr-defined]
        case.feed(keeper, said).run()
    assert keeper.rows == [] and "disk is nearly full" in said[0]
    case.feed(keeper).run()
    assert len(keeper.rows) == len(ROWS)


def test_a_damaged_state_begins_anew(case: Case):
    case.write(ROWS)
    first, second = Keeper(), Keeper()
    case.feed(first).run()
    (case.run.loggers / "Own.json").write_text("{")
    case.feed(second).run()
    assert len(second.rows) == len(ROWS) and second.begun[0].id != first.begun[0].id


def test_no_secret_and_no_address_is_in_the_config_that_is_logged(tmp_path: Path):
    password = "correct horse battery"
    config = toy_config(tmp_path, store={"url": "postgresql://me@db.example/mgrpo"})
    options = {"api": {"token": password}, "level": 3}
    environment = msgspec.structs.replace(config.environment, options=options)
    config = msgspec.structs.replace(config, environment=environment)
    logged = public_config(config)
    assert logged["environment.options"] == ["api", "level"]
    assert logged["algorithm.rollouts"] == 4 and logged["agents.main.lr"] == 3e-3
    assert password not in repr(logged) and "db.example" not in repr(logged)


def test_secrets_that_are_known_are_hidden_in_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEARCH_API_KEY", "abcdefgh-1")
    monkeypatch.setenv("OTHER_TOKEN", "abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "is")
    config = toy_config(tmp_path)
    options = {"tools": [{"password": "swordfish"}], "name": "harmless words"}
    config = msgspec.structs.replace(config, environment=msgspec.structs.replace(config.environment, options=options))
    text = hide("this is abcdefgh-1, abcdefgh, swordfish, harmless words", secrets_of(config))
    assert text == "this is [hidden], [hidden], [hidden], harmless words"


@pytest.mark.parametrize(
    "to", ["wand", "own.py:", "own.py:1", ["wandb", "wandb"], ["a.py:Own", "b.py:Own"], "x.py:wandb"]
)
def test_a_logger_that_is_not_known_is_refused_by_name(tmp_path: Path, to: Any):
    with pytest.raises(ValueError, match=r"log\.to: .* given: expected"):
        toy_config(tmp_path, log={"to": to if isinstance(to, list) else [to]})


def test_a_logger_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"log\.to: 'wandb' given: wandb is not installed: pip install 'mgrpo\[wandb\]'"
    ):
        choose.check_installed(["own.py:Own", "wandb"])


def test_a_users_class_is_found_and_another_object_refused(tmp_path: Path):
    file = tmp_path / "own_logger.py"
    file.write_text("from mgrpo import Logger\nclass Own(Logger): ...\nclass Other: ...\n")
    assert isinstance(choose.make_logger(f"{file}:Own"), Logger)
    for name in ("Other", "Missing"):
        with pytest.raises(ValueError, match=r"log\.to: .*expected a subclass of mgrpo\.Logger"):
            choose.make_logger(f"{file}:{name}")


def test_the_path_of_a_users_logger_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(
        'run_dir = "run"\nsteps = 0\n[environment]\nuse = "e.py:E"\n[agents.main]\nmodel = "m"\n'
        '[log]\nto = ["mine.py:Mine", "wandb"]\n'
    )
    assert load_config("run.toml").log.to == (f"{tmp_path}/mine.py:Mine", "wandb")


def test_notes_are_small_and_whole():
    assert msgspec.json.encode(Note(say="x")) == b'{"say":"x"}'
