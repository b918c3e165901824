"""Test `mgrpo eval`: which weights it takes, arms, what it writes, and that Ctrl-C keeps what was played."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

from fake_vllm import FakeVLLM
from mgrpo.engine.cli.evaluate import command, weights
from mgrpo.engine.cli.evaluate.arms import arms_of, compared, difference
from mgrpo.engine.cli.evaluate.command import Options, evaluate
from mgrpo.engine.cli.evaluate.weights import base, latest, replaced, saved
from mgrpo.engine.config.schema import Config, dump_config, load_config, parse_config
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.rollout.episodes import Episodes
from mgrpo.engine.rollout.evaluation import SetOutcome
from mgrpo.engine.run.checksums import seal
from mgrpo.engine.store.open import open_store
from mgrpo.engine.system.process import Interrupted
from mgrpo.engine.types import NO_WEIGHTS
from toy import make_model, raw_config

ENVIRONMENT = """
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task

class Letters(Environment):
    def tasks(self, split):
        return [Task(f"{split} {i}", {}) for i in range(6)]

    def prompt(self, call):
        return f"{call.agent} {call.task.id}\\n"

    def parse(self, call, text):
        return (Delegate("clerk", "now"),) if call.agent == "main" and not call.turns else Answer(text)

    def score(self, episode):
        right = sum(map(len, [episode.main.turns[0].text, episode.calls[0].turns[0].text])) % 2
        return Score(True, float(right), tuple(CallScore(True, 0.0) for _ in episode.calls))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_model(folder / "model")
    make_model(folder / "export" / "main", seed=1)
    make_model(folder / "export" / "clerk", seed=2)
    (folder / "letters.py").write_text(ENVIRONMENT)
    return folder


@pytest.fixture
def config(folder: Path) -> Config:
    raw = raw_config(folder, environment={"use": f"{folder / 'letters.py'}:Letters"}, eval={"questions": 4})
    return parse_config(raw)


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Config:
    """Return the config of a colocated run with checkpoints of other weights after 1 and 2 steps."""
    config = msgspec.structs.replace(config, run_dir=str(tmp_path / "run"), eval=replace_eval(config, every=1))
    policies = {name: Policy(name, agent, config.compute) for name, agent in config.agents.items()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(dump_config(config))
    for step in (1, 2):
        place = tmp_path / "run" / "checkpoints" / f"rl-{step:05d}"
        place.mkdir(parents=True)
        for name, policy in policies.items():
            with torch.no_grad():
                for weight in policy.masters.weights.values():
                    weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
            policy.save_state(place / name)
        (place / "state.json").write_text(json.dumps({"stage": "rl", "step": step, "agents": dict.fromkeys(policies)}))
        seal(place)
    return config


def replace_eval(config: Config, **changes: Any) -> Any:
    return msgspec.structs.replace(config.eval, **changes)


@pytest.fixture
def told() -> Iterator[Console]:
    with open(os.devnull, "w") as nowhere:
        yield Console(file=nowhere, record=True, width=160)


def said(weights: Any) -> dict[str, str]:
    return {name: one.said for name, one in weights.items()}


# ---- which weights


def test_the_latest_checkpoint_is_taken_or_the_models_if_there_is_none(run: Config, config: Config, folder: Path):
    place = f"{run.run_dir} (the latest)"
    assert said(latest(run, None)) == {name: f"rl-00002 of {place}" for name in ("main", "clerk")}
    assert latest(run, "1")["main"].state == Path(run.run_dir) / "checkpoints" / "rl-00001" / "main"
    assert said(latest(config, None)) == {name: f"{folder / 'model'}, untrained" for name in ("main", "clerk")}
    with pytest.raises(ValueError, match=r"--step: 3 given: expected one of the checkpoints that are kept: .*rl-00001"):
        latest(run, "3")
    with pytest.raises(ValueError, match=r"--step: 'x' given: expected the number of rl steps, or 'best'"):
        latest(run, "x")
    with pytest.raises(ValueError, match=r"--step: 1 given: expected a run in run_dir"):
        latest(config, "1")


def test_the_best_checkpoint_is_that_of_the_best_score(run: Config):
    with pytest.raises(ValueError, match=r"RUN: .* given: expected a run directory with a store.db"):
        latest(run, "best")
    store = open_store(run)
    with pytest.raises(ValueError, match=r"--step: best given: expected a run that was evaluated"):
        latest(run, "best")
    for step, score in ((0, 0.1), (1, 0.5), (2, 0.5)):
        store.roles.note_evaluation(step, {"eval/held_out_accuracy": score})
    assert said(latest(run, "best"))["main"] == f"rl-00001 of {run.run_dir} (step best)"
    store.roles.note_evaluation(3, {"eval/held_out_accuracy": 0.6})
    with pytest.raises(ValueError, match=r"--step: best, which is rl step 3, given: expected one of the checkpoints"):
        latest(run, "best")
    store.close()


def test_a_checkpoint_of_all_agents_or_a_run_is_taken(run: Config):
    checkpoint = Path(run.run_dir) / "checkpoints" / "rl-00001"
    assert saved(run, checkpoint)["clerk"].state == checkpoint / "clerk"
    assert saved(run, Path(run.run_dir))["clerk"].state == checkpoint.with_name("rl-00002") / "clerk"
    with pytest.raises(ValueError, match=r"--step: 1 given with --checkpoint .*: expected the directory of a run"):
        saved(run, checkpoint, "1")
    other = msgspec.structs.replace(run, agents={"main": run.agents["main"]})
    for place in (checkpoint, Path(run.run_dir)):
        with pytest.raises(ValueError, match=r"agents \['clerk', 'main'\] found, expected \['main'\]"):
            saved(other, place)
    with pytest.raises(ValueError, match=r"--checkpoint: .*/no is not a directory: expected a run, or one of its"):
        saved(run, checkpoint / "no")


def test_models_are_given_for_one_agent_or_as_a_directory_of_all(config: Config, folder: Path):
    export = folder / "export"
    one = replaced(config, base(config), [f"clerk={export / 'clerk'}"])
    assert said(one) == {"main": f"{folder / 'model'}, untrained", "clerk": str(export / "clerk")}
    both = replaced(config, base(config), [str(export)])
    assert [weights.agent.model for weights in both.values()] == [str(export / "main"), str(export / "clerk")]
    assert replaced(config, base(config), ["main=http://10.0.0.1:8000/"])["main"].server == "http://10.0.0.1:8000/"
    alone = msgspec.structs.replace(config, agents={"main": config.agents["main"]})
    assert replaced(alone, base(alone), [str(export / "main")])["main"].agent.model == str(export / "main")
    with pytest.raises(ValueError, match=r"--model: 'judge=x' given: expected one of the agents"):
        replaced(config, base(config), ["judge=x"])
    with pytest.raises(ValueError, match=r"--model: .* given: expected AGENT=MODEL with one of the agents"):
        replaced(config, base(config), [str(export / "main")])
    with pytest.raises(ValueError, match=r"--model: 'main=' given"):
        replaced(config, base(config), ["main="])


def test_two_origins_are_refused(config: Config):
    with pytest.raises(ValueError, match=r"--base: given with --checkpoint or --step: expected one of them"):
        evaluate(config, Options(base=True, step="best"))


# ---- arms


def test_arms_change_one_side_at_a_time(config: Config, folder: Path):
    old, new = base(config), replaced(config, base(config), [str(folder / "export")])
    arms = arms_of(config, old, new)
    assert {arm: (w["main"] is new["main"], w["clerk"] is new["clerk"]) for arm, w in arms.items()} == {
        "old main, old subs": (False, False),
        "new main, old subs": (True, False),
        "new main, new subs": (True, True),
        "old main, new subs": (False, True),
    }
    with pytest.raises(ValueError, match=r"--arms: the old and the new weights of \['clerk'\] are the same"):
        arms_of(config, old, replaced(config, old, [f"main={folder / 'export' / 'main'}"]))
    with pytest.raises(ValueError, match=r"--arms: given for agents"):
        arms_of(msgspec.structs.replace(config, agents={"main": config.agents["main"]}), old, new)


def outcome(*scores: float | None) -> SetOutcome:
    found = SetOutcome([str(i) for i in range(len(scores))])
    for samples, score in zip(found.correct, scores, strict=True):
        samples |= {} if score is None else {0: score}
    return found


def test_arms_are_compared_task_by_task():
    gain = difference(outcome(1, 1, 0, None, 1), outcome(0, 1, 0, 1, 0))
    assert gain is not None and gain.value == 0.5 and gain.low <= 0.5 <= gain.high
    assert difference(outcome(None, 1), outcome(1, None)) is None
    same = difference(outcome(1, 0), outcome(1, 0))
    assert same is not None and same.values == (0.0, 0.0, 0.0)
    found = {"old main, old subs": {"s": outcome(0, 0)}, "new main, old subs": {"s": outcome(1, 0)}}
    assert list(compared(found, "s")) == ["new main, beside old subs"]  # the others were not played


# ---- the command


def test_the_numbers_are_those_of_the_metrics_and_change_with_the_weights(run: Config, told: Console, tmp_path: Path):
    settings = replace_eval(run, samples=3, temperature=1.0)
    several = msgspec.structs.replace(run, eval=settings)
    evaluate(several, Options(arms=True, k=[1, 3], out=tmp_path / "out.json", episodes=1, console=told))
    text = told.export_text()
    assert "main: rl-00002 of" in text and "3 samples of each task, temperature 1, 95 % intervals" in text
    assert re.search(r"^arm +set +tasks +failed +avg@3 +pass@1 +pass@3$", text, re.M)
    assert "differences in points, task by task:" in text and "new subs, beside new main" in text
    assert "task held_out" in text and "main -> clerk, call 1" in text and "<<" in text
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["complete"] and len(found["arms"]) == 4 and found["samples"] == 3
    sets = [arm["held_out"] for arm in found["arms"].values()]
    assert all(
        len(one["tasks"]) == 4 and one["pass@1"]["value"] == pytest.approx(one["avg@3"]["value"]) for one in sets
    )
    assert len({json.dumps(one["tasks"]) for one in sets}) == 4
    gain = found["differences"]["held_out"]["all new"]["value"]
    means = {arm: one["held_out"]["avg@3"]["value"] for arm, one in found["arms"].items()}
    assert gain == pytest.approx(means["new main, new subs"] - means["old main, old subs"])


def test_an_evaluation_again_gives_the_same_numbers(run: Config, told: Console, tmp_path: Path):
    texts = []
    for name in ("a", "b"):
        evaluate(run, Options(step="1", out=tmp_path / name, console=told))
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] and json.loads(texts[0])["weights"]["main"].startswith("rl-00001 of")


def test_k_above_the_samples_and_an_out_that_cannot_be_are_refused(config: Config, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--k: 2 given: expected 1 to 1, the samples of each task \(--samples\)"):
        evaluate(config, Options(k=[2]))
    with pytest.raises(ValueError, match=r"--out: .* given: expected a file in a directory that exists"):
        evaluate(config, Options(out=tmp_path / "no" / "out.json"))


def test_ctrl_c_keeps_what_was_played(config: Config, told: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stream = Episodes.stream

    def interrupted(self: Episodes, more: Any, ended: Any) -> None:
        count = 0

        def counted(rollout: Any) -> None:
            nonlocal count
            ended(rollout)
            count += 1
            if count == 2:
                os.kill(os.getpid(), signal.SIGINT)

        stream(self, more, counted)

    monkeypatch.setattr(Episodes, "stream", interrupted)
    one = msgspec.structs.replace(config.compute, concurrency=1)
    with pytest.raises(Interrupted, match=r"stopped after [23] of 4 episodes"):
        evaluate(msgspec.structs.replace(config, compute=one), Options(out=tmp_path / "out.json", console=told))
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["complete"] and len(found["sets"]["held_out"]["tasks"]) in (2, 3)


def test_a_server_samples_an_agent_without_a_trainer(config: Config, told: Console, tmp_path: Path):
    fake = FakeVLLM(load_tokenizer("main", config.agents["main"]), weights=NO_WEIGHTS)
    try:
        evaluate(config, Options(model=[f"main={fake.url}"], out=tmp_path / "out.json", console=told))
    finally:
        fake.kill()
    assert fake.requests and {request["sampling_params"]["temperature"] for request in fake.requests} == {0.0}
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["weights"]["main"] == f"the server {fake.url}" and found["sets"]["held_out"]["failed"] == 0


def test_a_server_that_does_not_answer_ends_the_evaluation(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "_announce", lambda *_: None)
    monkeypatch.setattr(weights, "PATIENCE", 0.2)
    with pytest.raises(
        ValueError, match=r"--model: .*no server for 0.2 s.*: expected a server that `mgrpo serve` started"
    ):
        evaluate(config, Options(model=["main=http://127.0.0.1:9"]))


@pytest.mark.parametrize(
    "override, message",
    [
        ("eval.samples=4", "eval.samples: 4 given with eval.temperature = 0: expected a temperature above 0"),
        ("eval.patience=2", "eval.patience: 2 given with eval.every = 0"),
        ('eval.sets=["train"]', "eval.sets: .* given: expected each name once, and not 'train' first"),
        ('eval.sets=["a","a"]', "eval.sets: .* given: expected each name once"),
        ("eval.sets=[]", "eval.sets"),
        ('eval.sets=["a b"]', "eval.sets"),
        ("eval.samples=0", "eval.samples: 0 given"),
    ],
)
def test_settings_that_do_not_suit_each_other_are_refused(folder: Path, override: str, message: str, tmp_path: Path):
    file = tmp_path / "run.toml"
    model = folder / "model"
    file.write_text(f'run_dir = "r"\nenvironment.use = "a:B"\nagents.main.model = "{model}"\nsteps = 0\n')
    with pytest.raises(ValueError, match=message):
        load_config(file, [override])
