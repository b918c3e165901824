"""Train one agent from a store and trajectory files: compare numbers with hand-made ones, and check who is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter
from mgrpo.engine.store import CallRecord, RolloutRecord, Store
from mgrpo.engine.training import trainer as trainer_module
from mgrpo.engine.training.trainer import AgentTrainer, DamagedGroupsError, Row
from mgrpo.engine.types import Trajectory
from toy import make_model, toy_config

AGENTS = ("main", "clerk")
GAP = 0.25  # added error of the sampler's log-probs, in nats
BODIES = {  # prompt, turn (capitals are sampled), observation, …
    "short": "abAB",
    "long": "abcABcdCDE",
    "tail": "abcABefgh",
    "mute": "abcd",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    make_model(folder / "model", hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    return folder


@pytest.fixture(autouse=True)
def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip measuring the ceiling, which takes seconds."""
    monkeypatch.setattr(trainer_module, "matmul_ceiling", lambda *_: 1e12)


def body(text: str, model: Any) -> Trajectory:
    """Return the model's own log-probs minus GAP, as the sampler's."""
    tokens, sampled = np.array([ord(c) for c in text], np.int32), np.array([c.isupper() for c in text])
    with torch.no_grad():
        logp_LV = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
    own = np.array([0, *(float(logp_LV[i, t]) for i, t in enumerate(tokens[1:]))])
    return Trajectory(tokens, sampled, np.where(sampled, own - GAP, 0).astype(np.float32), 0)


class World:
    """Hold the store and the trajectory files of a run, filled call by call."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root / "trajectories"
        self.store = Store(f"sqlite:///{root}/store.db", "run")
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        self.bodies = {name: body(text, model) for name, text in BODIES.items()}
        self.writers = {agent: TrajectoryWriter(str(self.root), agent) for agent in AGENTS}

    def query(self, query: int, rollouts: list[dict[str, Any]], step: int = 0) -> None:
        """Add a query. Each rollout has status, format, correct, main=(body, …) and clerk=[(body, expert), …]."""
        self.store.queries.open([(query, "task")], AGENTS, len(rollouts), step)
        for number, given in enumerate(rollouts):
            told = {"status": "scored", "format": True, "correct": 0.0, "main": "short", "clerk": []} | given
            record = RolloutRecord(query, number, told["status"], told["format"], told["correct"], 1.0)
            calls = [self.call("main", query, number, 0, told["main"], told["format"], None)]
            calls += [
                self.call("clerk", query, number, n, name, True, expert)
                for n, (name, expert) in enumerate(told["clerk"])
            ]
            self.store.queries.record([record], calls)

    def call(
        self, agent: str, query: int, rollout: int, n: int, name: str, valid: bool, expert: float | None
    ) -> CallRecord:
        trajectory = self.bodies[name]
        position: Position = self.writers[agent].append([trajectory])[0]
        actions, turns, cut = int(trajectory.sampled.sum()), 2 if name == "long" else 1, name == "tail"
        size = (len(trajectory), actions, turns, cut, "answer", position)
        alike = {"rows": trajectory.rows, "digest": trajectory.digest, "sampler_digest": trajectory.sampler_digest}
        return CallRecord(agent, query, rollout, n, valid, expert, 0, *size, **alike)

    def trainer(self, agent: str = "main", algorithm: dict[str, Any] | None = None, **changes: Any) -> AgentTrainer:
        config = toy_config(self.folder, algorithm={"rollouts": 4, "aligned_calls": 2} | (algorithm or {}))
        if changes:
            agents = {name: msgspec.structs.replace(config.agents[name], **changes) for name in AGENTS}
            config = msgspec.structs.replace(config, agents=agents)
        policy = Policy(agent, config.agents[agent], config.compute)
        return AgentTrainer(config, policy, str(self.root))

    def step(self, trainer: AgentTrainer, step: int) -> Row:
        """Train on the next groups in the store."""
        groups = self.store.groups.claim(trainer.name, trainer.config.queries_per_step, holder="me").groups
        return trainer.train(step, groups)


@pytest.fixture
def world(folder: Path, tmp_path: Path) -> Iterator[World]:
    world = World(folder, tmp_path)
    yield world
    world.store.close()


def weights(trainer: AgentTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.policy.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def about(row: Row, **expected: float) -> bool:
    return {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


MIXED = [
    {"correct": 1.0, "main": "long", "clerk": [("short", 1.0), ("tail", 0.0)]},
    {"correct": 0.0, "main": "short", "clerk": [("long", 0.5)]},
    {"correct": 1.0, "format": False, "main": "tail", "clerk": []},
    {"status": "unscored", "correct": 0.0, "main": "long", "clerk": [("long", 0.9)]},
]
ALIKE = [{"correct": 1.0, "main": "short"}, {"correct": 1.0, "main": "short"}]


# ---- metrics


def test_the_main_agents_numbers_by_hand(world):
    """The rewards are 1, 0.1, 0 (format invalid) and twice 1; the unscored rollout does not appear."""
    world.query(0, MIXED)
    world.query(1, ALIKE)
    trainer = world.trainer()
    row = world.step(trainer, 0)
    rewards = [1.0, 0.1, 0.0, 1.0, 1.0]
    assert about(row, reward_mean=np.mean(rewards), reward_std=np.std(rewards), format=0.8, correct=0.8, zero_std=0.5)
    lengths = [10, 4, 9, 4, 4]
    assert about(row, length_mean=np.mean(lengths), length_min=4, length_max=10, actions_mean=13 / 5, turns_mean=6 / 5)
    assert about(row, truncated=1 / 5, staleness_mean=0, staleness_worst=0)
    # identical ones are left out: rows up to the last action of long, short and tail
    assert about(row, trajectories=5, trajectories_trained=3, micro_batches=1, tokens_trained=9 + 3 + 4, rows=5 + 2 + 2)
    assert about(row, gap_mean=GAP, gap_max=GAP, ratio_mean=1, ratio_max=1, clip_low=0, clip_high=0, lr=3e-3)
    assert row["loss"] == pytest.approx(0, abs=1e-6) and row["grad_norm"] > 0  # on-policy: minus the mean advantage
    live = [world.bodies[name].logprobs[world.bodies[name].sampled] for name in ("long", "short", "tail")]
    assert row["logprob_mean"] == pytest.approx(np.concatenate(live).mean() + GAP, abs=1e-5)
    assert 0 < row["entropy_mean"] < np.log(257)
    assert "expert" not in row and "calls_mean" not in row and trainer.policy.version == 1


def test_a_sub_agents_numbers_by_hand(world):
    """The rewards are 0.1 + 0.4 * correct + 0.5 * expert, whatever the main agent's format."""
    world.query(0, MIXED)
    world.query(1, ALIKE)
    trainer = world.trainer("clerk")
    row = world.step(trainer, 0)
    rewards = [1.0, 0.5, 0.35]
    assert about(row, reward_mean=np.mean(rewards), reward_std=np.std(rewards), format=1, expert=0.5)
    assert about(row, calls_mean=3 / 5, zero_std=0.5, length_mean=23 / 3, truncated=1 / 3, turns_mean=4 / 3)
    assert about(row, trajectories=3, trajectories_trained=3, tokens_trained=3 + 4 + 9)
    assert about(row, gap_mean=GAP, staleness_mean=0) and "correct" not in row
    assert row["loss"] == pytest.approx(0, abs=1e-6)


def test_identical_trajectories_are_trained_once_and_all_epochs_counted(world):
    alike = [{"correct": c, "main": "short"} for c in (1.0, 1.0, 0.0, 0.0)]
    world.query(0, alike)
    row = world.step(world.trainer(algorithm={"epochs": 3}), 0)
    assert about(
        row, trajectories=4, trajectories_trained=2, tokens_trained=3 * 2 * 3
    )  # one with a positive and one with a negative advantage


def test_trajectories_that_differ_for_the_sampler_alone_are_one_unless_they_are_corrected(world):
    world.bodies["other"] = replace(world.bodies["short"], logprobs=world.bodies["short"].logprobs * 2)
    for cap, trained in (None, 2), (2.0, 3):
        query = 0 if cap is None else 1
        world.query(query, [{"correct": 1.0}, {"correct": 1.0, "main": "other"}, {"correct": 0.0}])
        assert world.step(world.trainer(algorithm={"sampler_cap": cap}), 0)["trajectories_trained"] == trained


def test_a_penalty_keeps_what_has_no_advantage(world):
    world.query(0, ALIKE)
    trainer = world.trainer(algorithm={"kl_coef": 0.1})
    trainer.policy.keep_reference()
    row = world.step(trainer, 0)
    assert about(row, trajectories_trained=1, kl_mean=0, rows=2, zero_std=1)


# ---- who is trained


OBJECTIVES = """
import torch

def clipped(rows, settings):
    ratio = (rows.logprobs - rows.old).exp()
    held = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -torch.minimum(ratio * rows.advantages, held * rows.advantages)

def by_size(rows, settings):
    # not linear in the advantage, and not zero where the advantage is
    return (1 + rows.advantages.square()) * rows.logprobs
"""


def test_an_objective_of_the_users_own(world, tmp_path):
    """Our own objective, written by the user, trains like the built-in one, up to rounding."""
    (tmp_path / "mine.py").write_text(OBJECTIVES)
    world.query(0, MIXED)
    groups = world.store.groups.claim("main", 1, holder="me").groups
    ours, theirs = world.trainer(), world.trainer(algorithm={"objective": f"{tmp_path}/mine.py:clipped"})
    rows = [trainer.train(0, groups) for trainer in (ours, theirs)]
    assert about(rows[1], loss=rows[0]["loss"], grad_norm=rows[0]["grad_norm"], ratio_mean=1.0)
    for one, other in zip(weights(ours).values(), weights(theirs).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_an_objective_of_the_users_own_sees_every_advantage_as_it_is(world, tmp_path):
    """Identical trajectories with different advantages stay apart, and those without advantage count."""
    (tmp_path / "mine.py").write_text(OBJECTIVES)
    trainer = world.trainer(algorithm={"objective": f"{tmp_path}/mine.py:by_size"})
    world.query(0, [{"correct": c, "main": "short"} for c in (1.0, 0.5, 0.0, 1.0)])
    row = world.step(trainer, 0)
    assert row["trajectories"] == 4 and row["trajectories_trained"] == 3
    world.query(1, ALIKE)
    assert world.step(trainer, 1)["trajectories_trained"] == 1


def test_the_step_takes_its_queries_and_the_rate_of_its_number(world):
    for query in range(5):
        world.query(query, MIXED)
    trainer = world.trainer(lr_schedule="linear")
    rows = [world.step(trainer, step) for step in range(2)]
    assert [row["trajectories"] for row in rows] == [9, 6]  # queries_per_step = 3, and then the two that are left
    assert [row["lr"] for row in rows] == pytest.approx([3e-3, 2e-3])


def test_staleness_is_how_many_versions_the_sampler_was_behind(world):
    trainer = world.trainer(algorithm={"epochs": 2})
    for query in range(6):
        world.query(query, ALIKE if query % 3 else MIXED)  # all sampled by version 0
    rows = [world.step(trainer, step) for step in range(2)]
    assert [(row["staleness_mean"], row["staleness_worst"]) for row in rows] == [(0, 0), (2, 2)]
    assert trainer.policy.version == 4


def test_a_frozen_agent_is_measured_but_never_changed(world):
    world.query(0, MIXED)
    trainer = world.trainer(train=False)
    before = weights(trainer)
    row = world.step(trainer, 0)
    assert about(row, reward_mean=1.1 / 3, staleness_mean=0)
    assert "grad_norm" not in row and trainer.policy.version == 0 and same(weights(trainer), before)


@pytest.mark.parametrize(
    ("agent", "rollouts"),
    [
        ("main", []),
        ("main", [{"status": "failed"}, {"status": "unscored"}]),
        ("clerk", [{"correct": 1.0}, {"correct": 0.0}]),
    ],
)
def test_without_a_scored_call_there_is_no_optimizer_step(world, agent, rollouts):
    """Momentum alone does not move the weights either."""
    trainer = world.trainer(agent)
    world.query(7, MIXED)
    world.step(trainer, 0)
    before = weights(trainer)
    if rollouts:
        world.query(8, rollouts)
    row = world.step(trainer, 1)
    assert same(weights(trainer), before) and trainer.policy.version == 1
    assert about(row, reward_mean=0, reward_std=0, length_mean=0, length_max=0, staleness_mean=0)
    assert "grad_norm" not in row


def test_with_calls_but_nothing_to_learn_momentum_goes_on(world):
    world.query(0, MIXED)
    trainer = world.trainer()
    world.step(trainer, 0)
    before = weights(trainer)
    world.query(1, ALIKE)
    row = world.step(trainer, 1)
    assert about(row, trajectories=2, trajectories_trained=0, micro_batches=0, tokens_trained=0, grad_norm=0, loss=0)
    assert trainer.policy.version == 2 and not same(weights(trainer), before)


def test_a_call_without_an_action_counts_in_the_group_and_is_not_trained(world):
    world.query(0, [{"correct": 1.0, "main": "short"}, {"correct": 0.0, "format": False, "main": "mute"}])
    row = world.step(world.trainer(), 0)
    assert about(row, reward_mean=0.5, trajectories=2, trajectories_trained=1, rows=2)
    assert row["loss"] == pytest.approx(-1 / 2)  # advantage 1, and K is 2


def test_a_trajectory_too_long_for_a_micro_batch_is_a_users_mistake(world):
    world.query(0, MIXED)
    trainer = world.trainer()
    compute = msgspec.structs.replace(trainer.config.compute, max_tokens=8)
    trainer.config = msgspec.structs.replace(trainer.config, compute=compute)
    with pytest.raises(ValueError, match=r"compute\.max_tokens: 8 given: expected at least 9"):
        world.step(trainer, 0)


def test_a_group_with_a_damaged_trajectory_is_named_and_nothing_is_trained(world):
    model = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    for query in range(3):  # in every group another text, as identical trajectories are read once
        world.bodies |= {f"{query}{kind}": body(f"{query}{kind}XY", model) for kind in "ab"}
        world.query(query, [{"correct": float(kind == "a"), "main": f"{query}{kind}"} for kind in "ab"])
    trainer = world.trainer()
    groups = world.store.groups.claim("main", 3, holder="me").groups
    last = groups[1].calls[0]
    shifted = replace(last.position, offset=last.position.offset + 8)
    calls = [replace(last, position=shifted), *groups[1].calls[1:]]
    lost = [replace(call, position=replace(call.position, file="main-00099.arrow")) for call in groups[2].calls]
    damaged = [groups[0], replace(groups[1], calls=calls), replace(groups[2], calls=lost)]
    before = weights(trainer)
    with pytest.raises(DamagedGroupsError, match=r"agent main: trajectories of queries \[1, 2\]") as caught:
        trainer.train(0, damaged)
    assert caught.value.queries == [1, 2] and trainer.policy.version == 0 and same(before, weights(trainer))
    assert trainer.train(0, groups)["trajectories_trained"]  # all are whole
