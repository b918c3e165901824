"""Test that a run keeps its best checkpoint by name, and that it ends when its score has ceased to rise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mgrpo.engine.config.schema import parse_config
from mgrpo.engine.report.display import make_display
from mgrpo.engine.report.summary import summary
from mgrpo.engine.rollout.evaluation import Evaluation
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.training import colocated, launcher
from toy import make_model, raw_config


@pytest.fixture(scope="module", autouse=True)
def settings_of_this_process() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the evaluations after so many rl steps get these scores, and stop the run in the middle of a step."""
    plan: dict[str, Any] = {"at": {}, "die": None, "step": 0}
    evaluate, step_of = colocated.Colocated._evaluate, colocated.Colocated._sample

    def row(*_: Any) -> dict[str, float]:
        score = plan["at"][plan["step"]]
        counts = {"eval/low": score, "eval/high": score, "eval/questions": 3, "eval/failed": 0, "eval/calls_mean": 0.0}
        return {"eval/held_out_accuracy": score, **counts}

    def noted(self: Any, step: int) -> None:
        plan["step"] = step
        evaluate(self, step)

    def dying(self: Any, step: int) -> Any:
        if step == plan["die"]:
            raise RuntimeError("killed")
        return step_of(self, step)

    monkeypatch.setattr(Evaluation, "row", row)
    monkeypatch.setattr(colocated.Colocated, "_evaluate", noted)
    monkeypatch.setattr(colocated.Colocated, "_sample", dying)
    return plan


def train(folder: Path, resume: bool = False, **changes: Any) -> Path:
    if not (folder / "model").exists():
        make_model(folder / "model")
    few = {"warmup": {}, "steps": 5, "queries_per_step": 2, "algorithm": {"rollouts": 2}}
    config = parse_config(raw_config(folder, **few | {"eval": {"questions": 3, "every": 1}} | changes))
    run = launcher.train if config.topology == "local" else colocated.train
    run(config, resume, make_display(list(config.agents)))
    return Path(config.run_dir)


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


RARE = {"every": 3, "keep": 1}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of the run that died
def test_the_best_checkpoint_outlives_pruning_a_kill_and_a_resume(tmp_path: Path, scores: dict[str, Any], capsys):
    scores |= {"at": {0: 0.1, 1: 0.5, 2: 0.4, 3: 0.2, 4: 0.3, 5: 0.2}, "die": 4}
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, checkpoint=RARE)
    assert kept(tmp_path / "run") == ["rl-00001", "rl-00003"]  # the first was saved because it is the best
    scores["die"] = None
    run = train(tmp_path, resume=True, checkpoint=RARE)
    assert kept(run) == ["rl-00001", "rl-00005"]
    assert "resume: evaluations so far: 4, the last after 3 rl steps with 20.0%, the best after 1 with 50.0%" in (
        capsys.readouterr().out
    )
    assert "best held-out score: 50.0 % after 1 rl steps, kept as rl-00001" in summary(run)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of the run that died
def test_a_best_score_of_weights_that_a_kill_lost_counts_no_more(tmp_path: Path, scores: dict[str, Any], monkeypatch):
    scores |= {"at": {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.3, 4: 0.1, 5: 0.1}}
    save = colocated.Colocated._save

    def dying(self: Any, stage: str, step: int) -> None:
        if step == 2 and scores["die"] is None:
            scores["die"] = -1
            raise RuntimeError("killed")
        save(self, stage, step)

    monkeypatch.setattr(colocated.Colocated, "_save", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, checkpoint=RARE)
    scores["at"][2] = 0.25  # sampled anew, it is another one
    run = train(tmp_path, resume=True, checkpoint=RARE)
    assert kept(run) == ["rl-00003", "rl-00005"]


def test_no_best_checkpoint_is_kept_if_it_is_not_asked_for(tmp_path: Path, scores: dict[str, Any]):
    scores |= {"at": {0: 0.1, 1: 0.5, 2: 0.4, 3: 0.2, 4: 0.3, 5: 0.2}}
    assert kept(train(tmp_path, checkpoint={**RARE, "best": False})) == ["rl-00005"]


def test_a_run_ends_early_with_its_state_saved_and_says_so(tmp_path: Path, scores: dict[str, Any], capsys):
    scores |= {"at": {0: 0.1, 1: 0.5, 2: 0.4, 3: 0.5, 4: 0.9, 5: 0.9}}
    patient = {"questions": 3, "every": 1, "patience": 2}
    run = train(tmp_path, checkpoint={"every": 50, "keep": 1}, eval=patient)
    assert kept(run) == ["rl-00001", "rl-00003"]
    ended = "ends after 3 of 5 rl steps: the held-out score has not risen for 2 evaluations (eval.patience)"
    assert ended in capsys.readouterr().out and f"the run {ended}" in summary(run)
    train(tmp_path, resume=True, eval=patient)  # it ends again at once
    assert ended in capsys.readouterr().out and kept(run) == ["rl-00001", "rl-00003"]
    train(tmp_path, resume=True, eval={**patient, "patience": 0})
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "time/step" in row] == [0, 1, 2, 3, 4]
    assert ended not in summary(run)


def test_a_local_run_ends_early_with_all_agents_at_the_same_step(tmp_path: Path, capsys):
    """The untrained agents answer nothing right, so that the score stays at 0."""
    patient = {"questions": 2, "every": 1, "patience": 1}
    run = train(tmp_path, topology="local", steps=8, eval=patient, checkpoint={"every": 50, "keep": 1})
    saved = [sorted(path.name for path in run.glob(f"agents/{name}/checkpoints/*")) for name in ("main", "clerk")]
    assert saved[0][-1] == saved[1][-1] and saved[0][-1] in ("rl-00002", "rl-00003")
    assert saved[0][0] == saved[1][0] == "rl-00000"  # the best: of equal scores the first
    assert "of 8 rl steps: the held-out score has not risen for 1 evaluations" in capsys.readouterr().out
