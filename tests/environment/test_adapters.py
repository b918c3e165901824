"""Test text games and chat loops as environments: turns, rewards, what the agent reads, and what stays in memory."""

from __future__ import annotations

import asyncio
import gc
import re
from typing import Any

import pytest

from cases.episodes import TOKENIZER, Play
from mgrpo.engine.environment.adapters import Chat, ChatLoop, TextGame
from mgrpo.engine.types import Task


class Count:
    """Play a game in Gymnasium's form: count up from the task's number. Three right numbers win, a wrong one loses."""

    def __init__(self, start: int):
        self.at, self.left = start, 3

    def reset(self) -> tuple[str, dict[str, Any]]:
        return f"from {self.at}\n", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "faint":
            return "", 0.0, False, True, {}
        if action != str(self.at + 1):
            return "wrong\n", -1.0, True, False, {}
        self.at, self.left = self.at + 1, self.left - 1
        return "right\n", 0.5, self.left == 0, False, {}


class Counting(TextGame):
    def make(self, task: Task) -> Count:
        return Count(int(task.id))


@pytest.mark.parametrize(
    ("replies", "reward", "valid", "read"),
    [
        (["5\n", "6", "7"], 1.5, True, ["right\n", "right\n", ""]),
        (["5", "7"], -0.5, True, ["right\n", ""]),
        (["5", "faint"], 0.5, True, ["right\n", ""]),
    ],
)
def test_each_turn_is_a_step_and_the_reward_is_their_sum(replies, reward, valid, read):
    (rollout,) = Play({"from 4\n": replies}, ["4"], Counting()).rollouts
    assert rollout.error == "" and rollout.score.correct == reward and rollout.score.format == valid
    assert [turn.observation for turn in rollout.episode.main.turns] == read
    text = "from 4\n" + "".join(a + b for a, b in zip(replies, read, strict=True))
    assert TOKENIZER.decode(rollout.trajectories[0].tokens) == text


def test_an_unfinished_game_has_an_invalid_format():
    (rollout,) = Play({"from 4\n": ["5", "6"]}, ["4"], Counting(), max_turns=2).rollouts
    assert rollout.score.correct == 1.0 and rollout.score.format is False


def test_concurrent_games_are_independent_and_freed_with_their_episodes():
    environment = Counting()
    rollouts = Play({"from 4\n": ["5", "6", "7"], "from 8\n": ["9", "1"]}, ["4", "8", "4"], environment).rollouts
    assert [rollout.score.correct for rollout in rollouts] == [1.5, -0.5, 1.5]
    del rollouts
    gc.collect()
    assert not environment._matches._values


class Haggle(ChatLoop):
    """Ask for a price until it is low enough."""

    begin, end = "[{role}]", "."

    async def play(self, chat: Chat, task: Task) -> float:
        messages = [{"role": "system", "content": "sell"}, {"role": "user", "content": task.id}]
        for _ in range(3):
            reply = await chat(messages)
            if reply.isdigit() and int(reply) < 5:
                return 10 - int(reply)
            await asyncio.sleep(0)
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "less"}]
        return 0


PROMPT = "[system]sell.\n[user]{}.\n[assistant]"


def haggle(replies: list[str], kind: type[ChatLoop] = Haggle, **config: Any) -> Any:
    (rollout,) = Play({PROMPT.format("car"): replies}, ["car"], kind(), **config).rollouts
    return rollout


def test_each_request_is_a_turn_and_new_messages_follow_the_reply():
    rollout = haggle(["9.", "4."])
    assert rollout.error == "" and rollout.score.correct == 6 and rollout.score.format is True
    assert [turn.observation for turn in rollout.episode.main.turns] == ["\n[user]less.\n[assistant]", ""]
    expected = PROMPT.format("car") + "9.\n[user]less.\n[assistant]4."
    assert TOKENIZER.decode(rollout.trajectories[0].tokens) == expected


def test_a_reply_that_was_cut_off_is_closed():
    rollout = haggle(["nine~", "4."])
    assert rollout.episode.main.turns[0].observation == ".\n[user]less.\n[assistant]" and rollout.score.correct == 6


def test_concurrent_conversations_are_independent():
    replies = {PROMPT.format(name): [f"{price}."] for name, price in (("car", 1), ("cat", 4))}
    rollouts = Play(replies, ["car", "cat", "car"], Haggle()).rollouts
    assert [rollout.score.correct for rollout in rollouts] == [9, 6, 9]


def test_a_loop_that_runs_out_of_turns_has_an_invalid_format_and_is_ended():
    rollout = haggle(["9.", "8."], max_turns=2)
    assert rollout.score.format is False and rollout.score.correct == 0


class Rewrites(ChatLoop):
    begin, end = Haggle.begin, Haggle.end

    async def play(self, chat: Chat, task: Task) -> float:
        await chat([{"role": "system", "content": "sell"}, {"role": "user", "content": task.id}])
        await chat([{"role": "user", "content": "forget it"}])
        return 1.0


class Hurries(ChatLoop):
    begin, end = Haggle.begin, Haggle.end

    async def play(self, chat: Chat, task: Task) -> float:
        asked = [{"role": "system", "content": "sell"}, {"role": "user", "content": task.id}]
        await asyncio.gather(chat(asked), chat(asked))
        return 1.0


class Breaks(Haggle):
    async def play(self, chat: Chat, task: Task) -> float:
        await chat([{"role": "system", "content": "sell"}, {"role": "user", "content": task.id}])
        raise KeyError("no such car")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Rewrites,
            r"chat: \[\{'role': 'user', 'content': 'forget it'\}\] given: expected \[.*'sell'.* and new messages",
        ),
        (Hurries, "chat: called while a reply is being written: expected one call at a time"),
        (Breaks, "no such car"),
    ],
)
def test_a_mistake_of_a_loop_ends_only_its_episode(kind, message):
    rollout = haggle(["9.", "4."], kind)
    assert rollout.status == "failed"
    assert re.search(message, rollout.error)


class Silent(ChatLoop):
    async def play(self, chat: Chat, task: Task) -> float:
        return 1.0


def test_a_loop_that_never_calls_chat_is_refused():
    (rollout,) = Play({}, ["car"], Silent()).rollouts
    assert rollout.status == "failed" and "play: it returned without calling chat" in rollout.error
