"""Test the ablation: its arms, statistics, groups by arrival, which runs are repeated, and its report."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.bench.ablation import run as ablation
from mgrpo.bench.ablation.arrival import by_arrival, cuts
from mgrpo.bench.ablation.report import band, collect, final, interval, report, t_quantile
from mgrpo.bench.ablation.run import ARMS, make_run
from mgrpo.engine.batch.advantages import Origin
from mgrpo.engine.config.schema import dump_config

# ---- statistics


@pytest.mark.parametrize(
    ("freedom", "known"), [(1, 12.7062), (4, 2.77645), (29, 2.04523), (31, 2.03951), (120, 1.97993)]
)
def test_the_quantiles_are_students(freedom, known):
    assert t_quantile(freedom) == pytest.approx(known, abs=2e-4)


def test_the_quantiles_fall_towards_the_normals():
    all_of = [t_quantile(n) for n in range(1, 200)]
    assert all(a > b > 1.959 for a, b in pairwise(all_of))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_an_interval_is_the_standard_error_times_the_quantile(values):
    found = interval(values)
    mean = sum(values) / len(values)
    error = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    assert found["mean"] == pytest.approx(mean)
    assert [found["low"], found["high"]] == pytest.approx(
        [mean + s * t_quantile(len(values) - 1) * error for s in (-1, 1)]
    )


def test_one_seed_has_no_interval():
    assert interval([0.25]) == {"mean": 0.25, "low": None, "high": None}
    assert [part.tolist() for part in band(np.array([[1.0, 2.0]]))] == [[1.0, 2.0]] * 3


def test_a_band_is_each_steps_interval():
    curves_SN = np.random.default_rng(0).random((5, 7))
    steps = [interval(column.tolist()) for column in curves_SN.T]
    for part, key in zip(band(curves_SN), ("mean", "low", "high"), strict=True):
        assert part == pytest.approx([step[key] for step in steps])


# ---- groups by arrival


def naive_by_arrival(rewards: list[float], weights: list[int], seconds: list[float], groups: int) -> list[float]:
    """List every copy in the order of arrival; a sample belongs to the group of its first copy."""
    order = sorted(range(len(rewards)), key=lambda i: (seconds[i], i))
    share, before = sum(weights) / groups, 0
    members: dict[int, list[int]] = {}
    for i in order:
        members.setdefault(next(g for g in reversed(range(groups)) if before >= share * g - 1e-9 * share), []).append(i)
        before += weights[i]
    found = [0.0] * len(rewards)
    for group in members.values():
        copies = [rewards[i] for i in group for _ in range(weights[i])]
        mean = sum(copies) / max(len(copies), 1)
        std = (sum((c - mean) ** 2 for c in copies) / max(len(copies), 1)) ** 0.5
        for i in group:
            found[i] = (rewards[i] - mean) / std if std > 1e-6 else 0.0
    return found


samples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 4), st.sampled_from([1.0, 2.0, 3.0, 4.0])), max_size=24
)


@given(samples, st.data())
def test_by_arrival_is_the_naive_one(drawn, data):
    bounds = sorted(data.draw(st.lists(st.integers(0, len(drawn)), max_size=4)))
    offsets = np.array([0, *bounds, len(drawn)])
    rewards, weights, seconds = (list(column) for column in zip(*drawn, strict=True)) if drawn else ([], [], [])
    got = by_arrival(np.array(rewards, float), offsets, np.array(weights, float), Origin("sub", np.array(seconds)))
    groups = int((np.diff(offsets) > 0).sum())
    assert got.tolist() == pytest.approx(naive_by_arrival(rewards, weights, seconds, max(groups, 1)))


def test_by_arrival_leaves_the_main_agent_its_queries():
    offsets, seconds = np.array([0, 2, 4]), np.array([1.0, 4.0, 2.0, 3.0])
    given = np.array([0.0, 1.0, 5.0, 5.0]), offsets, np.ones(4)
    assert by_arrival(*given, Origin("main", seconds)).tolist() == [-1, 1, 0, 0]
    assert by_arrival(*given, Origin("sub", seconds)).tolist() == [-1, -1, 1, 1]  # {0, 5} arrive before {5, 1}


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 6))
def test_every_sample_is_in_one_group_and_groups_are_as_even_as_samples_allow(weights, groups):
    bounds = cuts(np.array(weights, float), groups)
    assert len(bounds) == groups + 1 and bounds[-1] == len(weights) and (np.diff(bounds) >= 0).all()
    if groups and sum(weights):
        assert bounds[0] == 0
        sums = [sum(weights[a:b]) for a, b in pairwise(bounds)]
        assert max(sums) < sum(weights) / groups + max(weights) + 1e-6


# ---- arms


def test_arms_differ_in_what_they_say_and_in_nothing_else(tmp_path: Path):
    flat = {arm: msgspec.to_builtins(make_run(tmp_path, arm, 3, "tiny").config) for arm in ARMS}
    for arm, config in flat.items():
        assert Path(config.pop("run_dir")) == tmp_path / "runs" / "tiny" / f"{arm}-3" and config["seed"] == 3
    single = flat.pop("single")
    assert single["environment"]["options"].pop("arm") == "single" and not single["agents"]["sub"].pop("train")
    for key in ("model", "max_context"):
        assert single["agents"]["main"].pop(key) != flat["co-train"]["agents"]["main"][key]
    assert all(
        single["agents"]["main"][key] == flat["co-train"]["agents"]["main"][key] for key in single["agents"]["main"]
    )
    assert not flat["main-only"]["agents"]["sub"].pop("train") and flat["co-train"]["agents"]["sub"]["train"]
    flat["main-only"]["agents"]["sub"]["train"] = True
    assert (
        flat["by-arrival"]["algorithm"].pop("advantage")
        and flat["no-alignment"]["algorithm"].pop("alignment") == "none"
    )
    flat["by-arrival"]["algorithm"]["advantage"], flat["no-alignment"]["algorithm"]["alignment"] = "", "sampled"
    assert all(config == flat["co-train"] for config in flat.values())


def test_other_weights_take_the_examples_own_settings(tmp_path: Path):
    config = make_run(tmp_path, "main-only", 0, "/models/big", ["steps=7"]).config
    assert config.run_dir == str(tmp_path / "runs" / "big" / "main-only-0") and config.steps == 7
    assert {agent.model for agent in config.agents.values()} == {"/models/big"} and not config.agents["sub"].train
    assert config.compute.dtype == "bfloat16"


# ---- the report


def write_run(out: Path, arm: str, seed: int, accuracies: list[float], done: bool = True) -> None:
    """Write a folder as a run leaves it, with as many steps as there are evaluations between."""
    run = make_run(out, arm, seed, "tiny", [f"steps={len(accuracies) - 1}"])
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(dump_config(run.config))
    (run.folder / "commits").write_text("abc1234\nabc1234\n")
    rows: list[dict[str, Any]] = []
    for step, accuracy in enumerate(accuracies):
        rows.append({"stage": "rl", "step": step, "eval/held_out_accuracy": accuracy})
        rows.append({"stage": "rl", "step": step, "main/reward_mean": accuracy, "sub/reward_mean": step / 4 + seed})
        rows[-1]["sub/calls_mean"] = 2.0
    rows = [{"stage": "warmup", "step": 0}, *rows[:-1]] if done else rows[:-2]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_report_is_made_of_the_folders_of_runs_that_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed, end in enumerate([0.5, 0.7, 0.6]):
        write_run(tmp_path, "co-train", seed, [0.2, 0.3, end])
        write_run(tmp_path, "main-only", seed, [0.2, 0.3, end - 0.1 * seed], done=seed < 2)
    report(tmp_path / "runs", tmp_path / "results")
    said = json.loads((tmp_path / "results" / "ablation.json").read_text())["models"]["tiny"]
    assert said["co-train"]["seeds"] == [0, 1, 2] and said["main-only"]["seeds"] == [0, 1]
    assert said["co-train"]["end"] == pytest.approx(interval([0.5, 0.7, 0.6]))
    assert said["main-only"]["start"]["mean"] == pytest.approx(0.2)
    assert said["main-only"]["less co-train"].pop("seeds") == [0, 1]
    assert said["main-only"]["less co-train"] == pytest.approx(interval([0.0, -0.1]))
    assert said["main-only"]["accuracies"]["1"] == pytest.approx([0.2, 0.3, 0.6])
    assert said["co-train"]["last steps"]["sub/reward_mean"] == pytest.approx(1 + 0.125)
    assert said["co-train"]["commits"] == ["abc1234"]
    assert (tmp_path / "results" / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert "main-only" in capsys.readouterr().out


def test_without_a_run_that_ended_nothing_is_written(tmp_path: Path):
    write_run(tmp_path, "co-train", 0, [0.2, 0.3], done=False)
    report(tmp_path / "runs", tmp_path / "results")
    assert collect(tmp_path / "runs") == {} and not (tmp_path / "results").exists()


# ---- which runs are repeated

SMALL = ["warmup.steps=1", "warmup.episodes=2", "eval.questions=2", "queries_per_step=2", "algorithm.rollouts=2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    ablation.prepare(folder, changes=SMALL)
    return folder


def test_what_the_runs_begin_with_is_made_once(out: Path, monkeypatch: pytest.MonkeyPatch):
    made = {path: path.stat().st_mtime_ns for path in (out / "taught").rglob("*.safetensors")}
    assert {path.parent.name for path in made} == {"main", "sub", "single"}
    monkeypatch.setattr(ablation.colocated, "train", lambda *_: pytest.fail("taught again"))
    monkeypatch.setattr(ablation.subprocess, "run", lambda *_, **__: pytest.fail("prepared again"))
    ablation.prepare(out)
    assert made == {path: path.stat().st_mtime_ns for path in (out / "taught").rglob("*.safetensors")}


@pytest.mark.parametrize("arm", ["by-arrival", "single"])
def test_a_run_that_was_stopped_goes_on_and_one_that_ended_does_not(
    out: Path, arm: str, monkeypatch: pytest.MonkeyPatch
):
    make_run(out, arm, 0, "tiny", [*SMALL, "steps=1"]).train()
    command = ["--out", str(out), "--arms", arm, "--seeds", "0", "--set", *SMALL, "steps=2"]
    monkeypatch.setattr(ablation, "report", lambda runs: None)
    ablation.main(command)
    ended = final(out / "runs" / "tiny" / f"{arm}-0")
    assert ended is not None and [row["step"] for row in ended.rows if "time/step" in row] == [0, 1]
    assert not (out / "runs" / "tiny" / f"{arm}-0" / "checkpoints").exists()
    monkeypatch.setattr(ablation.colocated, "train", lambda *_: pytest.fail("begun again"))
    ablation.main(command)
    with pytest.raises(ValueError, match=r"warmup\.steps: 9 given: expected 1"):
        ablation.main([*command, "warmup.steps=9"])
