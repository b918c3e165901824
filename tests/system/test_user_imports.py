"""Test functions of the user that a config names by import path: found, refused by name, and used as an estimator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mgrpo.engine.batch.advantages import objective, weigh
from mgrpo.engine.config.schema import AlgorithmConfig, RewardConfig, load_config
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import CallRecord, Group, RolloutRecord
from mgrpo.engine.system.imports import load_function, takes

ESTIMATORS = """
import numpy as np

def against_best(rewards, offsets, weights):
    '''Reward less the best of its group; rewards (N,), offsets (G + 1,), weights (N,).'''
    assert rewards.dtype == weights.dtype == np.float64 and offsets[-1] == len(rewards) == len(weights)
    best = [rewards[a:b].max(initial=0) for a, b in zip(offsets, offsets[1:])]
    return rewards - np.repeat(best, np.diff(offsets))

def weighted(rewards, offsets, weights):
    return (rewards * weights).tolist()

def told(rewards, offsets, weights, *, origin):
    assert origin.agent == "sub" and origin.seconds.dtype == np.float64
    return origin.seconds

def short(rewards, offsets, weights):
    return rewards[1:]

def broken(rewards, offsets, weights):
    return rewards / 0 * 0

constant = 3

def in_place(rewards, offsets, weights):
    for values in (offsets, weights):
        values[:] = 0
    rewards -= rewards.mean()
    return rewards
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(ESTIMATORS)
    return path


def group(query: int, experts: list[list[float]]) -> Group:
    """Make a query whose rollouts, all correct, made calls with these scores."""
    rollouts = [RolloutRecord(query, n, "scored", True, 1.0, 1.0 + query + n / 8) for n in range(len(experts))]
    calls = [
        CallRecord("sub", query, n, i, True, expert, 0, 9, 3, 1, False, "answer", Position("f", query, 9 * n + i))
        for n, scores in enumerate(experts)
        for i, expert in enumerate(scores)
    ]
    return Group(query, "task", 0, rollouts, calls)


def weighted(groups: list[Group], **algorithm: str):
    return weigh("sub", 1, groups, AlgorithmConfig(alignment="expected", **algorithm), RewardConfig(), 0)


def test_an_estimator_of_the_users_own_says_the_advantages_and_nothing_else(file):
    groups = [group(0, [[0.0, 1.0], [], [0.5]]), group(1, [[], []]), group(2, [[1.0], [1.0]])]
    ours = weighted(groups)
    theirs = weighted(groups, advantage=f"{file}:against_best")
    assert theirs.adv == pytest.approx([-0.5, 0, -0.25, 0, 0])
    for name in ("rewards", "multiplicities", "weight", "zero_std"):
        assert np.array_equal(getattr(theirs, name), getattr(ours, name))
    changed = weighted(groups, advantage=f"{file}:in_place")
    for name in ("rewards", "multiplicities", "weight", "zero_std"):
        assert np.array_equal(getattr(changed, name), getattr(ours, name))
    counted = weighted(groups, advantage=f"{file}:weighted")
    assert counted.adv == pytest.approx(ours.rewards * ours.multiplicities)


def test_an_estimator_that_asks_is_told_whose_and_of_which_rollouts_they_are(file):
    groups = [group(0, [[0.0, 1.0], [], [0.5]]), group(2, [[1.0], [1.0]])]
    assert weighted(groups, advantage=f"{file}:told").adv.tolist() == [1.0, 1.0, 1.25, 3.0, 3.125]


def test_what_a_function_of_c_does_not_say_it_takes_it_is_not_given():
    assert takes(lambda origin: 0, "origin") and not takes(lambda seed: 0, "origin") and not takes(dict, "origin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"algorithm\.advantage: an array of shape \(1,\) given: expected \(2,\), one for each trajectory"),
        ("broken", r"algorithm\.advantage: nan returned: expected finite advantages"),
        ("constant", r"algorithm\.advantage: 'constant' in .*mine\.py is 3: expected a function"),
        ("missing", r"algorithm\.advantage: 'missing' in .*mine\.py is not defined: expected a function"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_an_estimator_that_does_not_serve_is_named(file, name, message):
    with pytest.raises(ValueError, match=message):
        weighted([group(0, [[0.0], [1.0]])], advantage=f"{file}:{name}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine", r"algorithm\.objective: 'mine' given: expected file\.py:function or package\.module:function"),
        ("nowhere.py:f", r"algorithm\.objective: nowhere\.py is not a file: expected a Python file"),
        ("no.such.package:f", r"algorithm\.objective: 'no\.such\.package' given: No module named"),
        ("math:pi", r"algorithm\.objective: 'pi' in math is 3\.14\d*: expected a function"),
    ],
)
def test_an_objective_that_cannot_be_found_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        objective(AlgorithmConfig(objective=path))


def test_a_function_is_loaded_once(file):
    assert load_function(f"{file}:short", "key") is load_function(f"{file}:short", "key")
    assert load_function("math:sqrt", "key")(4) == 2


def test_paths_in_a_config_do_not_depend_on_the_working_directory_later(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    Path("run.toml").write_text(
        'run_dir = "run"\n[environment]\nuse = "e.py:E"\n[agents.main]\nmodel = "m"\n'
        '[algorithm]\nadvantage = "mine.py:short"\nobjective = "package.module:f"\n'
    )
    algorithm = load_config("run.toml").algorithm
    assert algorithm.advantage == f"{file.resolve()}:short" and algorithm.objective == "package.module:f"
