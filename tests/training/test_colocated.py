"""Train a tiny model in this process: check what a run leaves behind, and that every option works end to end."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cases.launcher import Recording
from mgrpo.engine.config.schema import Config, parse_config
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.rollout.curriculum import WARMUP_QUERIES, pick
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.store import Store
from mgrpo.engine.store.groups import Groups
from mgrpo.engine.system import retry
from mgrpo.engine.training import colocated
from toy import SUMS, make_model, raw_config

WARMUP = {"steps": 16, "episodes": 8, "lr": 2e-2}  # enough for some of the toy's episodes to be well-formed
ODD_ENVIRONMENTS = f"""
import itertools, sys
sys.path.insert(0, {str(SUMS.parent)!r})
from environment import Sums
from mgrpo.engine.types import Answer, CallScore, Delegate, Malformed, Score

class NoTasks(Sums):
    def __init__(self, split):
        self.empty = split
    def tasks(self, split):
        return [] if split == self.empty else super().tasks(split)

class BrokenJudge(Sums):
    def score(self, episode):
        raise RuntimeError("the judge is down")

class NanJudge(Sums):
    def score(self, episode):
        return Score(True, float("nan"))

class EverySecondNan(Sums):
    scored = itertools.count()
    def score(self, episode):
        score = super().score(episode)
        return Score(score.format, float("nan"), score.calls) if next(self.scored) % 2 else score

class Twins(Sums):
    def parse(self, call, text):
        verb, _, rest = text.strip().partition(" ")
        if verb == "ask" and call.agent == "main":
            return (Delegate("clerk", rest), Delegate("twin", rest))
        return Answer(rest) if verb == "say" else Malformed(text)
"""


class Run:
    """Hold a finished run: its configuration, what it displayed and what it left on disk."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.config: Config = parse_config(raw)
        self.display = Recording()
        colocated.train(self.config, False, self.display)
        self.path = Path(self.config.run_dir)
        self.rows = read_metrics(self.path / "metrics.jsonl")
        self.warmup = [row for row in self.rows if row["stage"] == "warmup"]
        self.evals = [row for row in self.rows if "eval/held_out_accuracy" in row]
        self.rl = [row for row in self.rows if row["stage"] == "rl" and row not in self.evals]

    def weights(self, checkpoint: str, agent: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / "checkpoints" / checkpoint / agent / "weights.safetensors")


@pytest.fixture(scope="module", autouse=True)
def settings_of_this_process() -> Iterator[None]:
    """Restore what a run sets for its whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_model(folder / "model")
    (folder / "odd.py").write_text(ODD_ENVIRONMENTS)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return Run(raw(folder, "run", checkpoint={"every": 1, "keep": 100}, eval={"questions": 7, "every": 2}))


def raw(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return raw_config(folder, run_dir=str(folder / name), **{"warmup": WARMUP, "checkpoint": {"every": 50}} | changes)


@pytest.fixture(scope="module")
def taught(run: Run, folder: Path) -> Path:
    """Return a folder with models of both agents that have already been through the warm-up."""
    for agent in ("main", "clerk"):
        shutil.copytree(folder / "model", folder / agent)
        save_file(run.weights("warmup-00016", agent), folder / agent / "model.safetensors", metadata={"format": "pt"})
    return folder


def skilled(taught: Path, name: str, **changes: Any) -> dict[str, Any]:
    config = raw(taught, name, **{"warmup": {"steps": 0}, "steps": 2} | changes)
    for agent in config["agents"]:
        config["agents"][agent]["model"] = str(taught / agent)
    return config


def odd(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    environment = {"use": f"{folder / 'odd.py'}:{name}", "options": options}
    return raw(folder, name, environment=environment, warmup={"steps": 0})


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


# ---- what a run leaves behind


def test_a_run_directory_has_every_file(run: Run):
    for name in ("config.json", "metrics.jsonl", "store.db", "curves.png", "log.txt", "lock"):
        assert (run.path / name).is_file(), name
    assert {path.name for path in (run.path / "trajectories").iterdir()} == {"main-00000.arrow", "clerk-00000.arrow"}
    names = [f"warmup-{step:05d}" for step in range(1, 17)] + [f"rl-{step:05d}" for step in range(4)]
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == sorted(names)
    for name in names:
        RunDirectory.open_checkpoint(run.path / "checkpoints" / name)


def test_the_rows_of_metrics_come_step_by_step_and_the_display_is_told_the_same(run: Run):
    assert [row["step"] for row in run.warmup] == list(range(16))
    assert [row["step"] for row in run.rl] == [0, 1, 2]
    assert [row["step"] for row in run.evals] == [0, 2, 3]
    assert [row["stage"] for row in run.rows] == ["warmup"] * 16 + ["rl"] * 6
    assert json.loads(json.dumps(run.display.rows)) == run.rows
    assert run.display.stages == [("warmup", 0, 16), ("rl", 0, 3)]


def test_a_row_has_the_metrics_of_every_agent(run: Run):
    of_rollouts = {"rollouts/scored", "rollouts/unscored", "rollouts/failed", "time/step", "perf/peak_memory_gib"}
    of_warmup = {"logprob_mean", "entropy_mean", "grad_norm", "lr", "tokens_trained"}
    of_training = of_warmup | {"loss", "ratio_max", "clip_low", "clip_high"}
    of_groups = {"reward_mean", "reward_std", "format", "zero_std", "length_mean", "turns_mean", "truncated"}
    of_groups |= {"staleness_mean", "time/train", "trajectories", "trajectories_trained", "tokens_trained"}
    agents = ("main", "clerk")
    of_played = {"rollouts/played", "rollouts/failed"} | (of_rollouts - {"rollouts/scored", "rollouts/unscored"})
    for row in run.warmup:
        assert not {"rollouts/scored", "rollouts/unscored"} & row.keys()
        assert row.keys() >= of_played | {f"{agent}/{key}" for agent in agents for key in of_warmup}
    for row in run.rl:
        assert row.keys() >= of_rollouts | {f"{agent}/{key}" for agent in agents for key in of_groups}
        assert row.keys() >= {"time/rollout", "main/correct", "clerk/expert", "clerk/calls_mean"}
        trained = [agent for agent in agents if row[f"{agent}/tokens_trained"]]
        assert row.keys() >= {f"{agent}/{key}" for agent in trained for key in of_training}
    assert all(value is not None for row in run.rows for value in row.values())


def test_the_rl_stage_trains_both_agents_on_the_weights_that_sampled(run: Run):
    for agent in ("main", "clerk"):
        assert any(row[f"{agent}/reward_std"] > 0 for row in run.rl)
        assert any(row.get(f"{agent}/grad_norm", 0) > 0 for row in run.rl)
        assert moved(run.weights("rl-00000", agent), run.weights("rl-00003", agent))
        for row in run.rl:
            assert row[f"{agent}/staleness_mean"] == 0
            assert row.get(f"{agent}/ratio_max", 1) == 1  # one epoch is on-policy
            assert row.get(f"{agent}/gap_max", 0) < 1e-4  # sampler and trainer agree on every token's log-prob


def test_the_store_has_every_query_of_every_step_acked_once_by_each_agent(run: Run):
    store = Store(f"sqlite:///{run.path / 'store.db'}", run="colocated")
    config = run.config
    nothing_else = {"acked": config.steps * config.queries_per_step}
    assert {a: {s: n for s, n in counts.items() if n} for a, counts in store.audit.status()["agents"].items()} == {
        agent: nothing_else for agent in config.agents
    }
    for query in range(config.steps * config.queries_per_step):
        everyone = list(range(config.algorithm.rollouts))
        assert [record.rollout for record in store.groups.rollouts_of(query)] == everyone
        assert [c.rollout for c in store.groups.calls_of(query) if c.agent == "main"] == everyone
    assert store.groups.rollouts_of(config.steps * config.queries_per_step) == []
    store.close()


def test_evaluation_asks_at_the_start_when_due_and_at_the_end(run: Run):
    for row in run.evals:
        assert row["eval/questions"] == 7
        assert 0 <= row["eval/low"] <= row["eval/held_out_accuracy"] <= row["eval/high"] <= 1
        assert row["eval/failed"] == 0


# ---- the warm-up


def script_logprob(model: Any, tokenizer: Any, question: str, answer: str) -> torch.Tensor:
    """Return the log-likelihood that transformers itself gives the main agent's tokens in a scripted episode."""
    parts = [(f"{question}\n", False), (f"ask {question}\n", True), (f"{answer}\n", False), (f"say {answer}\n", True)]
    ids = [token for text, _ in parts for token in tokenizer.encode(text)]
    sampled = torch.tensor([flag for text, flag in parts for _ in tokenizer.encode(text)])
    with torch.no_grad():
        logps_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logps_TV[:-1].gather(1, torch.tensor(ids)[1:, None])[sampled[1:], 0]


def test_the_warm_up_maximises_the_likelihood_that_transformers_gives_the_script(run: Run, folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    environment = load_environment(run.config.environment)
    tasks = environment.tasks("train")
    first = [pick(tasks, run.config.seed, WARMUP_QUERIES + i) for i in range(WARMUP["episodes"])]
    texts = [(task.data["question"], task.data["answer"]) for task in first]
    before = torch.cat([script_logprob(model, tokenizer, *text) for text in texts]).mean().item()
    assert run.warmup[0]["main/logprob_mean"] == pytest.approx(before, abs=1e-4)

    model.load_state_dict(run.weights("warmup-00016", "main"), strict=False)
    after = torch.cat([script_logprob(model, tokenizer, *text) for text in texts]).mean().item()
    assert after > before + 2
    for agent in ("main", "clerk"):
        assert run.warmup[-1][f"{agent}/logprob_mean"] > run.warmup[0][f"{agent}/logprob_mean"] + 2


def test_a_run_may_be_warm_up_only_or_without_a_warm_up(folder: Path):
    only = Run(raw(folder, "warm", steps=0, warmup={"steps": 2, "episodes": 2}))
    assert [(row["stage"], row["step"]) for row in only.rows] == [("warmup", 0), ("warmup", 1), ("rl", 0)]
    without = Run(raw(folder, "cold", steps=1, warmup={"steps": 0}))
    assert [(row["stage"], row["step"]) for row in without.rows] == [("rl", 0)] * 2 + [("rl", 1)]


# ---- agents


def test_a_frozen_agent_keeps_its_weights_in_the_rl_stage(taught: Path):
    config = skilled(taught, "frozen", checkpoint={"every": 50, "keep": 9})
    config["agents"]["clerk"]["train"] = False
    run = Run(config)
    assert not moved(run.weights("rl-00000", "clerk"), run.weights("rl-00002", "clerk"))
    assert moved(run.weights("rl-00000", "main"), run.weights("rl-00002", "main"))
    assert "clerk/reward_mean" in run.rl[0]
    assert "clerk/loss" not in run.rl[0]


def test_a_main_agent_alone_trains(taught: Path):
    config = skilled(taught, "alone")
    del config["agents"]["clerk"]
    run = Run(config)
    assert [key for key in run.rl[0] if key.startswith("clerk/")] == []
    assert run.rl[0]["main/turns_mean"] > 1  # it asked, and was told that there is no clerk
    assert any(row["main/grad_norm"] > 0 for row in run.rl)


def test_three_agents_train_side_by_side(folder: Path):
    config = odd(folder, "Twins") | {"warmup": WARMUP}
    config["agents"]["twin"] = config["agents"]["clerk"]
    run = Run(config)
    assert run.rl[-1]["clerk/calls_mean"] == run.rl[-1]["twin/calls_mean"] > 0
    store = Store(f"sqlite:///{run.path / 'store.db'}", run="colocated")
    acked = {agent: states["acked"] for agent, states in store.audit.status()["agents"].items()}
    assert acked == dict.fromkeys(config["agents"], 9)
    store.close()
    for agent in config["agents"]:
        assert run.warmup[-1][f"{agent}/logprob_mean"] > run.warmup[0][f"{agent}/logprob_mean"] + 2


# ---- every option


@pytest.mark.parametrize(
    "algorithm",
    [
        {"kl_coef": 0.1, "entropy_coef": 0.01, "epochs": 2, "importance": "sequence", "alignment": "expected"},
        {"kl_coef": 0.1, "kl": "k2", "epochs": 2, "importance": "trajectory", "length_norm": "token", "dual_clip": 3.0},
        {"baseline": "leave_one_out", "scale": "none", "length_norm": "constant", "sampler_cap": 2.0},
        {"baseline": "median", "aligned_calls": 1, "kl_coef": 0.1, "kl": "k1"},
    ],
    ids=["sequence", "trajectory", "unscaled", "median"],
)
def test_every_algorithm_trains_end_to_end(taught: Path, algorithm: dict[str, Any], tmp_path: Path):
    run = Run(skilled(taught, str(tmp_path), algorithm={"rollouts": 4, **algorithm}))
    trained = [row for row in run.rl if row.get("main/grad_norm", 0) > 0]
    assert trained
    for row in trained:
        assert all(math.isfinite(value) for key, value in row.items() if key.startswith("main/"))
        assert ("main/kl_mean" in row) == bool(algorithm.get("kl_coef"))
        assert (row["main/ratio_max"] != 1) == (algorithm.get("epochs", 1) > 1)


def test_activation_checkpointing_changes_no_number(run: Run, folder: Path):
    compute = {"device": "cpu", "dtype": "float32", "max_tokens": 256, "activation_checkpointing": True}
    other = Run(raw(folder, "checkpointing", steps=1, compute=compute))
    for ours, theirs in zip(run.warmup, other.warmup, strict=True):
        assert theirs["main/logprob_mean"] == pytest.approx(ours["main/logprob_mean"], abs=1e-5)
        assert theirs["main/grad_norm"] == pytest.approx(ours["main/grad_norm"], rel=1e-3)


def test_bfloat16_trains_like_float32_on_float32_masters(run: Run, folder: Path):
    other = Run(raw(folder, "bf16", steps=1, compute={"device": "cpu", "dtype": "bfloat16", "max_tokens": 256}))
    for ours, theirs in zip(run.warmup, other.warmup, strict=True):
        assert theirs["main/logprob_mean"] == pytest.approx(ours["main/logprob_mean"], abs=0.2)
    weights = other.weights("rl-00001", "main")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16()) for weight in weights.values())


# ---- what cannot run


def test_a_step_without_a_scored_rollout_ends_the_run_with_the_first_reason(folder: Path):
    message = r"step 0: none of 12 rollouts was scored; the first error: .*score: RuntimeError: the judge is down"
    with pytest.raises(ValueError, match=message + ": given up after 3 tries"):
        Run(odd(folder, "BrokenJudge"))


def test_a_step_without_a_score_is_sampled_anew_as_if_nothing_had_happened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.01))
    plain, play, calls = Run(raw(folder, "plain", steps=2)), colocated.Colocated._play, itertools.count()

    def without_scores_at_first(self: Any, step: int) -> Any:
        rollouts = play(self, step)
        if next(calls) < 2:
            return [replace(rollout, score=None, status="unscored", error="the judge is down") for rollout in rollouts]
        return rollouts

    monkeypatch.setattr(colocated.Colocated, "_play", without_scores_at_first)
    run = Run(raw(folder, "anew", steps=2))
    reason = "step 0: none of 12 rollouts was scored; the first error: the judge is down; sampled anew in 0.0 s"
    assert [text for text in run.display.said if "sampled anew" in text] == [reason] * 2
    same = ("main/reward_mean", "main/loss", "clerk/loss", "main/grad_norm", "rollouts/scored")
    assert [[row.get(key) for key in same] for row in run.rl] == [[row.get(key) for key in same] for row in plain.rl]
    with closing(Store(f"sqlite:///{run.path}/store.db", "colocated")) as store:
        assert store.audit.status()["agents"]["main"]["acked"] == 2 * run.config.queries_per_step


def test_a_damaged_trajectory_expires_its_group_and_the_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    claim = Groups.claim

    def damaged(self: Groups, agent: str, *args: Any, **kwargs: Any) -> Any:
        found = claim(self, agent, *args, **kwargs)
        if agent == "main" and found.groups[0].step == 1:
            lost = [replace(call, sampler_digest="0" * 32) for call in found.groups[0].calls]
            found.groups[0] = replace(found.groups[0], calls=lost)
        return found

    monkeypatch.setattr(Groups, "claim", damaged)
    run = Run(raw(folder, "damaged", algorithm={"kl_coef": 0.01}))  # with a penalty every trajectory is read
    with closing(Store(f"sqlite:///{run.path}/store.db", "colocated")) as store:
        agents = store.audit.status()["agents"]
    assert agents["main"]["expired"] == 1 and agents["clerk"]["expired"] == 0
    assert agents["main"]["acked"] == agents["clerk"]["acked"] - 1


def test_a_warm_up_without_a_script_is_refused_by_name_before_it_begins(folder: Path):
    config = raw(folder, "mute", environment={"use": f"{folder / 'mute.py'}:Mute"}, warmup={"steps": 2})
    (folder / "mute.py").write_text(
        "from mgrpo import Environment, Task\n"
        "class Mute(Environment):\n    def tasks(self, split): return [Task('t', {})]\n"
    )
    with pytest.raises(ValueError, match=r"warmup\.steps: 2 given: Mute has no script\(\): expected one"):
        Run(config)


def test_a_score_that_is_no_number_leaves_the_rollout_unscored(folder: Path):
    message = "step 0: none of 12 rollouts was scored; the first error: score: correct is nan: expected a finite number"
    with pytest.raises(ValueError, match=message):
        Run(odd(folder, "NanJudge"))
    run = Run(odd(folder, "EverySecondNan") | {"reward": {"tries": 1}})
    assert [(row["rollouts/scored"], row["rollouts/unscored"]) for row in run.rl] == [(6, 6)] * 3
    assert run.evals[0]["eval/failed"] == 5


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_environment_without_tasks_is_refused(folder: Path, split: str):
    with pytest.raises(ValueError, match=rf"environment: NoTasks.tasks\('{split}'\) is empty, expected tasks"):
        Run(odd(folder, "NoTasks", split=split) | {"run_dir": str(folder / split)})


def test_a_run_directory_with_a_run_in_it_needs_resume(run: Run):
    with pytest.raises(ValueError, match=r"run_dir: .* holds a run; pass --resume to go on, or choose another run_dir"):
        colocated.train(run.config, False, Recording())


def test_a_run_directory_that_another_process_holds_is_refused(folder: Path):
    path = folder / "held"
    path.mkdir()
    hold = "import fcntl, os; f = open('lock', 'w'); fcntl.flock(f, 2); f.write(str(os.getpid())); f.flush()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); input()"],
        cwd=path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(ValueError, match=rf"run_dir: {path} is in use by process {other.pid}"):
            Run(raw(folder, "held"))
        other.communicate(b"\n")
