"""Test scripted episodes: the script acts, an agent needs only a tokenizer, and an error ends one episode."""

from __future__ import annotations

from cases.episodes import AGENTS, TOKENIZER, Lines, encode, in_time, make_config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.rollout.demonstrations import Demonstrations
from mgrpo.engine.rollout.episodes import Job, Rollout
from mgrpo.engine.types import Task


class Lesson(Lines):
    def script(self, call):
        if call.agent == "main" and not call.turns:
            return "ask clerk say"
        return "say as"


def demonstrate(environment: Environment) -> Rollout:
    episodes = Demonstrations(make_config(), environment, dict.fromkeys(AGENTS, TOKENIZER))
    (rollout,) = in_time(lambda: episodes.run([Job(0, 0, Task("t", {}))])).result()
    return rollout


def test_the_script_takes_every_action_and_tokenizers_suffice():
    rollout = demonstrate(Lesson())
    assert rollout.status == "scored" and rollout.episode.main.answer == "as"
    main = [(encode("t:"), False), (encode("ask clerk say"), True), (encode("as\n"), False), (encode("say as"), True)]
    sub = [(encode("say:"), False), (encode("say as"), True)]
    for trajectory, parts in zip(rollout.trajectories, (main, sub), strict=True):
        assert trajectory.tokens.tolist() == [token for ids, _ in parts for token in ids]
        assert trajectory.sampled.tolist() == [mine for ids, mine in parts for _ in ids]
        assert not trajectory.logprobs.any()


def test_a_script_that_raises_or_is_missing_fails_its_episode():
    class Bad(Lesson):
        def script(self, call):
            if call.agent == "clerk":
                raise RuntimeError("boom")
            return super().script(call)

    for environment, error in [(Bad(), "Bad.script: RuntimeError: boom"), (Lines(), "Lines has no script(), which")]:
        rollout = demonstrate(environment)
        assert rollout.status == "failed" and error in rollout.error
