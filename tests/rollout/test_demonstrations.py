"""Test scripted episodes: the script acts, an agent needs only a tokenizer, and an error ends one episode."""

from __future__ import annotations

import copy

import msgspec
import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cases.episodes import AGENTS, TOKENIZER, Lines, encode, in_time, make_config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.rollout.demonstrations import Demonstrations, check_played, check_script
from mgrpo.engine.rollout.episodes import Job, Rollout
from mgrpo.engine.rollout.records import demonstrated
from mgrpo.engine.types import Task
from toy import EOS


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


def test_no_space_is_put_in_front_of_what_continues_a_call():
    spaced = copy.deepcopy(TOKENIZER)
    backend = spaced.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    episodes = Demonstrations(make_config(), Lesson(), dict.fromkeys(AGENTS, spaced))
    (rollout,) = in_time(lambda: episodes.run([Job(0, 0, Task("t", {}))])).result()
    ids = [encode(" t:"), encode("ask clerk say"), encode("as\n"), encode("say as")]  # only the text's own beginning
    assert rollout.trajectories[0].tokens.tolist() == [token for piece in ids for token in piece]


def test_a_scripted_call_ends_when_its_context_is_full(caplog):
    class Talkative(Lesson):
        def script(self, call):
            return "use upper ab" if len(call.turns) < 5 else "say end"

        def observation(self, call, results):
            return "x" * 30

    def played(most: int) -> Rollout:
        episodes = Demonstrations(
            make_config(max_context=most, max_turns=9), Talkative(), dict.fromkeys(AGENTS, TOKENIZER)
        )
        (rollout, again) = in_time(lambda: episodes.run([Job(0, k, Task("t", {})) for k in range(2)])).result()
        assert again.trajectories[0].tokens.tolist() == rollout.trajectories[0].tokens.tolist()
        return rollout

    whole = played(1000)
    assert whole.episode.main.ended == "answer" and not caplog.text
    tokens, sampled = whole.trajectories[0].tokens.tolist(), whole.trajectories[0].sampled
    ends = [i + 1 for i in range(len(tokens)) if sampled[i] and (i + 1 == len(tokens) or not sampled[i + 1])]
    for most, turns in [(ends[2], 3), (ends[2] - 1, 2), (ends[3] - 1, 3)]:
        caplog.clear()
        cut = played(most)
        assert (cut.episode.main.ended, len(cut.episode.main.turns)) == ("context", turns)
        assert cut.trajectories[0].tokens.tolist() == tokens[: len(cut.trajectories[0])]
        assert cut.trajectories[0].rows + 1 == ends[turns - 1] <= most
        assert caplog.text.count(f"agents.main.max_context: {most} given: turn {turns + 1} of a scripted call") == 1


class Tiring(Lesson):
    """Use a tool in each turn, ask the clerk in the last; tell what was asked of the environment."""

    def __init__(self):
        self.asked = []

    def script(self, call):
        if call.agent == "clerk":
            return "say as"
        return "use upper a" if len(call.turns) < 3 else "use upper b; ask clerk say"

    def tool(self, call, use):
        self.asked.append(use.argument)
        return super().tool(call, use)

    def observation(self, call, results):
        self.asked.append(len(results))
        return super().observation(call, results)

    def score(self, episode):
        self.asked.append("score")
        return super().score(episode)


def test_a_warm_up_asks_for_no_score_and_no_tool_that_no_turn_follows():
    played = []
    for judged in (True, False):
        environment = Tiring()
        tokenizers = dict.fromkeys(AGENTS, TOKENIZER)
        episodes = Demonstrations(make_config(), environment, tokenizers, judged=judged)
        played += in_time(lambda: episodes.run([Job(0, 0, Task("t", {}))])).result()  # noqa: B023
        asked = ["a", 1, "a", 1, "a", 1]
        assert environment.asked == asked + (["b", 2, "score"] if judged else [])
    judged, unjudged = played
    assert (judged.status, unjudged.status, unjudged.score) == ("scored", "played", None)
    for agent in ("main", "clerk"):  # what is trained is the same
        (one,), (other,) = demonstrated(agent, [judged]), demonstrated(agent, [unjudged])
        assert one.rows == other.rows and one.tokens.tolist()[: one.rows + 1] == other.tokens.tolist()[: one.rows + 1]


def test_a_warm_up_without_a_script_or_without_an_episode_is_refused():
    config = make_config()
    check_script(config, Lines())
    config = msgspec.structs.replace(config, warmup=msgspec.structs.replace(config.warmup, steps=5))
    with pytest.raises(ValueError, match=r"warmup\.steps: 5 given: Lines has no script\(\): expected one"):
        check_script(config, Lines())
    check_script(config, Lesson())
    failed = demonstrate(Lines())
    check_played(0, [failed, demonstrate(Lesson())])
    with pytest.raises(ValueError, match=r"warmup: step 3: each of 2 scripted episodes failed: .* Lines has no script"):
        check_played(3, [failed, failed])


def test_an_agent_without_a_turn_has_shown_nothing():
    class Long(Lesson):
        def script(self, call):
            return "ask clerk " + "y" * 100 if call.agent == "main" and not call.turns else "say as"

    episodes = Demonstrations(make_config(max_context=120), Long(), dict.fromkeys(AGENTS, TOKENIZER))
    rollouts = in_time(lambda: episodes.run([Job(0, 0, Task("t", {}))])).result()
    assert [len(demonstrated(agent, rollouts)) for agent in ("main", "clerk")] == [1, 1]
    tight = Demonstrations(make_config(max_context=120), Long(), dict.fromkeys(AGENTS, TOKENIZER))
    tight.config.agents["clerk"] = msgspec.structs.replace(tight.config.agents["clerk"], max_context=101)
    rollouts = in_time(lambda: tight.run([Job(0, 0, Task("t", {}))])).result()
    assert [len(demonstrated(agent, rollouts)) for agent in ("main", "clerk")] == [1, 0]
