"""Test episodes: call and return, running side by side, exact tokens; a user's error ends one episode only."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest

from cases.episodes import AGENTS, TOKENIZER, FakeSampler, Lines, Play, encode, in_time, make_config, spell
from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import Session
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.rollout import episodes as rollout_module
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.rollout.records import call_record
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.types import Answer, Call, CallScore, Delegate, Malformed, Score, Task, ToolCall
from toy import make_model, toy_config


def one(replies: dict[str, list[str]], **options: Any) -> Rollout:
    return Play(replies, **options).rollouts[0]


# ---- call and return


def test_a_sub_agents_answer_returns_to_the_main_agents_next_turn():
    rollout = one({"t:": ["ask clerk six sevens", "say 42"], "six sevens:": ["use upper x", "say 42!"]})
    main, (clerk,) = rollout.episode.main, rollout.episode.calls
    assert rollout.status == "scored" and rollout.score == Score(True, 1.0, (CallScore(True, 0.5),))
    assert rollout.error == "" and rollout.seconds > 0
    assert [t.text for t in main.turns] == ["ask clerk six sevens", "say 42"]
    assert [t.observation for t in main.turns] == ["42!\n", ""] and [t.observation for t in clerk.turns] == ["X\n", ""]
    assert (main.agent, main.request, main.answer, main.ended) == ("main", "", "42", "answer")
    assert (clerk.agent, clerk.request, clerk.answer, clerk.ended) == ("clerk", "six sevens", "42!", "answer")
    assert main.task is clerk.task is rollout.job.task and not main.truncated


def test_tokens_are_those_shown_and_those_sampled_never_encoded_again():
    rollout = one({"t:": ["ask clerk as", "say as"], "as:": ["say say"]})
    pieces = [
        [(encode("t:"), False), (spell("ask clerk as"), True), (encode("say\n"), False), (spell("say as"), True)],
        [(encode("as:"), False), (spell("say say"), True)],
    ]
    for trajectory, parts in zip(rollout.trajectories, pieces, strict=True):
        tokens = [token for ids, _ in parts for token in ids]
        sampled = [mine for ids, mine in parts for _ in ids]
        assert trajectory.tokens.tolist() == tokens and trajectory.sampled.tolist() == sampled
        assert trajectory.logprobs.tolist() == [-0.5 if mine else 0.0 for mine in sampled]
        assert trajectory.version == 7
        assert encode(TOKENIZER.decode(tokens)) != tokens  # tokenising the text again would give other tokens


def test_uses_of_one_turn_run_side_by_side_and_return_in_their_order():
    replies = {
        "t:": ["ask clerk aaa; use upper x; ask scout b; use fail y; ask clerk c", "ask clerk b", "say done"],
        "aaa:": ["use upper a", "say the first"],  # ends last
        "b:": ["say 2"],
        "c:": ["say 3"],
    }
    play = Play(replies)
    episode, trajectories = play.rollouts[0].episode, play.rollouts[0].trajectories
    assert episode.main.turns[0].observation == "the first\nX\n2\nerror: cannot y\n3\n"
    assert [(c.agent, c.request, c.answer) for c in episode.calls] == [
        ("clerk", "aaa", "the first"),
        ("scout", "b", "2"),
        ("clerk", "c", "3"),
        ("clerk", "b", "2"),
    ]
    for trajectory, call in zip(trajectories[1:], episode.calls, strict=True):
        text = "".join(turn.text + turn.observation for turn in call.turns)
        assert TOKENIZER.decode(trajectory.tokens) == f"{call.request}:{text}"
    # "c" is written beside "aaa", not after it: the clerk takes the steps of its longest call, then of "b"
    assert play.samplers["clerk"].steps == len("use upper a") + len("say the first") + len("say 2")


class Meeting(Lines):
    """Tools that end only when both have begun, and one that is slow."""

    def __init__(self):
        self.begun: dict[str, asyncio.Event] = {}

    async def tool(self, call, use):
        if use.name == "nap":
            await asyncio.sleep(0.02)
            return "awake"
        for name in ("here", "there"):
            self.begun.setdefault(name, asyncio.Event())
        self.begun[use.name].set()
        await asyncio.gather(*(event.wait() for event in self.begun.values()))
        return use.name


def test_async_tools_of_one_turn_run_side_by_side():
    rollout = one({"t:": ["use here x; use there x", "say ok"]}, environment=Meeting())
    assert rollout.status == "scored" and rollout.episode.main.turns[0].observation == "here\nthere\n"


def test_an_async_tool_that_takes_its_time_does_not_hang_the_run():
    replies = {"t:": ["use nap x; ask clerk c", "say ok"], "c:": ["use nap x", "say 1"]}
    rollout = one(replies, environment=Meeting())
    assert rollout.status == "scored" and rollout.episode.main.turns[0].observation == "awake\n1\n"


def test_every_method_may_be_async():
    class Async(Lines):
        async def prompt(self, call):
            await asyncio.sleep(0)
            return super().prompt(call)

        async def parse(self, call, text):
            await asyncio.sleep(0)
            return super().parse(call, text)

        async def observation(self, call, results):
            await asyncio.sleep(0)
            return "".join(f"{text}." for _, text in results)

        async def score(self, episode):
            await asyncio.sleep(0.01)
            return super().score(episode)

    rollout = one({"t:": ["ask clerk c", "say ok"], "c:": ["say 1"]}, environment=Async())
    assert rollout.status == "scored" and rollout.episode.main.turns[0].observation == "1."


@pytest.mark.parametrize("count", [1, 12])
def test_episodes_advance_together_not_one_after_the_other(count):
    replies = {f"t{i}:": ["ask clerk c", "say yes"] for i in range(count)} | {"c:": ["say 1"]}
    play = Play(replies, tasks=[f"t{i}" for i in range(count)])
    assert all(rollout.status == "scored" for rollout in play.rollouts)
    assert play.steps == len("ask clerk c") + len("say 1") + len("say yes")


def test_ragged_episodes_take_little_more_steps_than_the_longest():
    tasks = [f"t{i}" for i in range(16)]
    replies = {f"t{i}:": ["ask clerk c"] * (i % 4) + ["say " + "y" * (1 + 3 * i)] for i in range(16)} | {
        "c:": ["say 1"]
    }
    longest = max(Play(replies, tasks=[task]).steps for task in tasks)
    assert Play(replies, tasks=tasks).steps <= 1.5 * longest


# ---- what the agents do wrong


def test_what_an_agent_may_not_do_comes_back_as_text():
    replies = {
        "t:": ["use fail it; use nothing x; ask nobody y; ask main z; ask clerk c", "say ok"],
        "c:": ["ask scout x; ask clerk y; ask main z", "say 1"],
    }
    episode = one(replies).episode
    assert episode.main.turns[0].observation.splitlines() == [
        "error: cannot it",
        "error: there is no tool named 'nothing'",
        "error: main cannot ask 'nobody'",
        "error: main cannot ask 'main'",
        "1",
    ]
    assert episode.calls[0].turns[0].observation.splitlines() == [
        f"error: clerk cannot ask {name!r}" for name in ("scout", "clerk", "main")
    ]
    assert len(episode.calls) == 1


def test_a_malformed_action_ends_its_call_and_main_reads_that_there_is_no_answer():
    rollout = one({"t:": ["ask clerk c", "hm"], "c:": ["what do I do"]})
    main, (clerk,) = rollout.episode.main, rollout.episode.calls
    assert (clerk.ended, clerk.answer, main.ended, main.answer) == ("malformed", None, "malformed", None)
    assert main.turns[0].observation == "error: clerk gave no answer\n"
    assert clerk.turns[0].action == Malformed("what?") and not clerk.truncated
    assert rollout.status == "scored"  # the judge decides; it is not an error of the run


def test_a_call_ends_at_max_turns_after_the_last_ones_results():
    rollout = one({"t:": ["ask clerk c", "say ok"], "c:": ["use upper a"] * 9}, max_turns=3)
    (clerk,) = rollout.episode.calls
    assert (clerk.ended, clerk.answer, clerk.truncated, len(clerk.turns)) == ("turns", None, True, 3)
    assert rollout.episode.main.turns[0].observation == "error: clerk gave no answer\n"
    assert TOKENIZER.decode(rollout.trajectories[1].tokens) == "c:" + "use upper aA\n" * 3


def test_a_call_ends_when_its_context_is_full():
    long = "x" * 60
    rollout = one({"t:": ["ask clerk c", "say ok"], "c:": [f"use upper {long}", "say 1"]}, max_context=100)
    (clerk,) = rollout.episode.calls
    assert (clerk.ended, clerk.answer, clerk.truncated, len(clerk.turns)) == ("context", None, True, 1)
    assert rollout.status == "scored" and rollout.episode.main.ended == "answer"


def test_a_sub_agents_prompt_beyond_its_context_is_a_call_without_an_answer():
    request = "x" * 70
    rollout = one({"t:": [f"ask clerk {request}", "say ok"], f"{request}:": []}, max_context=71)
    (clerk,) = rollout.episode.calls
    assert (clerk.ended, clerk.turns) == ("context", []) and not rollout.trajectories[1].sampled.any()


def test_a_truncated_turn_is_marked():
    rollout = one({"t:": ["say 4~"]})
    assert rollout.episode.main.truncated and rollout.episode.main.ended == "answer"


NO_ROOM = r"agents\.main\.max_context: 40 given: the prompt of task 'long\w+' has 81 tokens already, expected room"
SHORT = {f"t{i}:": ["ask clerk c", "say 1"] for i in (1, 2)} | {"c:": ["say 1"]}


@pytest.mark.parametrize("tasks", [["t1", "long" * 20, "t2"], ["long" * 20, "t1", "t2"], ["t1", "t2", "long" * 20]])
def test_a_prompt_without_room_for_an_answer_fails_its_own_episodes_only(tasks, caplog):
    rollouts = Play(SHORT, [*tasks, *tasks], max_context=40).rollouts
    for task, rollout in zip([*tasks, *tasks], rollouts, strict=True):
        if task.startswith("long"):
            assert rollout.status == "failed" and re.match(NO_ROOM, rollout.error)
            assert rollout.trajectories == [None]
        else:
            assert (rollout.status, rollout.error) == ("scored", "")
    assert caplog.text.count("expected room for an answer") == 1 + caplog.text.count("UserCodeError: ")


def test_prompts_that_all_lack_room_are_the_users_error_and_leave_nothing_open():
    with pytest.raises(ValueError, match=NO_ROOM):
        Play({}, ["long" * 20, "long" + "y" * 76], max_context=40)


def test_ctrl_c_in_the_middle_of_a_step_leaves_nothing_open(monkeypatch):
    def interrupt(self: FakeSampler) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeSampler, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Play({"t:": ["say 1"]}, tasks=["t", "t"])


# ---- what the environment does wrong


class Broken(Lines):
    """Do `misdeed` in one method, for one agent, in the task named bad."""

    def __init__(self, method: str, misdeed: Callable[[], Any], agent: str = "main"):
        self.method, self.misdeed, self.agent = method, misdeed, agent

    def _or(self, method, call, right):
        mine = method == self.method and call.task.id == "bad" and call.agent == self.agent
        return self.misdeed() if mine else right

    def prompt(self, call):
        return self._or("prompt", call, super().prompt(call))

    def parse(self, call, text):
        return self._or("parse", call, super().parse(call, text))

    def tool(self, call, use):
        return self._or("tool", call, super().tool(call, use))

    def observation(self, call, results):
        return self._or("observation", call, super().observation(call, results))

    def score(self, episode):
        return self._or("score", episode.main, super().score(episode))


def boom() -> Any:
    raise RuntimeError("boom")


USUAL = {f"{name}:": ["ask clerk c; use upper x", "say ok"] for name in ("good", "bad")} | {
    "c:": ["use upper x", "say 1"]
}
MIXED = ["good", "bad", "good", "bad"]


@pytest.mark.parametrize("agent", ["main", "clerk"])
@pytest.mark.parametrize("method", ["prompt", "parse", "tool", "observation"])
def test_an_exception_fails_its_own_episodes_and_is_logged_once(caplog, method, agent):
    play = Play(USUAL, MIXED, environment=Broken(method, boom, agent))
    assert [rollout.status for rollout in play.rollouts] == ["scored", "failed", "scored", "failed"]
    for rollout in play.rollouts[1::2]:
        assert rollout.error == f"Broken.{method}: RuntimeError: boom" and rollout.score is None
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    text = record.getMessage()
    assert "task bad" in text and "Traceback" in text and 'raise RuntimeError("boom")' in text


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("prompt", None, "prompt: NoneType returned: expected str"),
        ("prompt", "", "prompt"),
        ("tool", 5, "tool: int returned: expected str"),
        ("observation", b"x", "observation: bytes returned: expected str"),
        ("parse", None, "parse: None returned: expected Answer"),
        ("parse", (), r"parse: \(\) returned: expected Answer"),
        ("parse", [ToolCall("upper", "x")], "parse: .* returned: expected Answer, Malformed, or a tuple"),
        ("parse", ("say",), "parse: .* returned: expected Answer"),
        ("parse", Answer(5), "parse: .*5"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("agent", ["main", "clerk"])
def test_a_value_of_the_wrong_kind_fails_its_own_episode(method, wrong, message, agent):
    play = Play(USUAL, MIXED, environment=Broken(method, lambda: wrong, agent))
    assert [rollout.status for rollout in play.rollouts] == ["scored", "failed", "scored", "failed"]
    assert all(re.search(message, rollout.error) for rollout in play.rollouts[1::2])


def test_the_sibling_of_a_failing_call_runs_to_its_end():
    class Bad(Lines):
        def parse(self, call, text):
            return boom() if call.request == "b" else super().parse(call, text)

    rollout = one(
        {"t:": ["ask clerk b; ask clerk c"], "b:": ["say 1"], "c:": ["use upper x", "say 2"]}, environment=Bad()
    )
    assert rollout.status == "failed" and rollout.episode.calls[1].answer == "2"
    assert [len(t) > 0 for t in rollout.trajectories] == [True] * 3


CALL = CallScore(True, 0.5)


@pytest.mark.parametrize(
    ("misdeed", "message"),
    [
        (boom, "score: RuntimeError: boom"),
        (lambda: next(iter(())), "score: .*StopIteration"),
        (lambda: None, "score: NoneType returned: expected a Score"),
        (lambda: 0.5, "score: float returned: expected a Score"),
        (lambda: Score(True, 1.0), "score: calls has 0 scores: expected one for each of 1"),
        (lambda: Score(True, 1.0, (CALL, CALL)), "score: calls has 2 scores: expected one for each of 1"),
        (lambda: Score(True, float("nan"), (CALL,)), "score: correct is nan: expected a finite number"),
        (lambda: Score(True, float("-inf"), (CALL,)), "score: correct is -inf: expected a finite number"),
        (lambda: Score(True, 1.0, (CallScore(True, float("inf")),)), r"score: calls\[0\]\.expert is inf: expected"),
        (lambda: Score(True, "yes", (CALL,)), "score: correct is .*yes.*: expected"),  # type: ignore[arg-type]
        (lambda: Score(True, None, (CALL,)), "score: correct is None: expected"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, (CallScore(True, None),)), r"score: calls\[0\]\.expert is None"),  # type: ignore[arg-type]
        (lambda: Score(float("nan"), 1.0, (CALL,)), "score: format is nan: expected True or False"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, (CallScore("no", 1.0),)), r"score: calls\[0\]\.format is 'no'"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, (0.5,)), r"score: calls.*: expected"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, None), "score: calls.*: expected"),  # type: ignore[arg-type]
    ],
)
def test_a_judge_that_fails_leaves_its_own_episode_unscored(caplog, misdeed, message):
    play = Play(USUAL, ["good", "bad", "good"], environment=Broken("score", misdeed))
    assert [rollout.status for rollout in play.rollouts] == ["scored", "unscored", "scored"]
    assert re.search(message, play.rollouts[1].error) and play.rollouts[1].score is None
    assert play.rollouts[1].episode.main.answer == "ok" and len(play.rollouts[1].trajectories) == 2
    assert len(caplog.records) == 1


def pops(episode):
    episode.calls.pop()


def renames(episode):
    for call in (episode.main, *episode.calls):
        call.agent, call.ended = "main", ""
        call.turns.clear()


def appends(episode):
    episode.calls.append(Call("clerk", episode.task))


@pytest.mark.parametrize("change", [pops, renames, appends])
def test_a_judge_cannot_change_what_is_recorded(change):
    class Judge(Lines):
        def score(self, episode):
            score = super().score(episode)
            change(episode)
            return score

    plain, changed = (Play(USUAL, ["good"], environment=judge).rollouts[0] for judge in (Lines(), Judge()))
    assert changed.status == "scored" and changed.score == plain.score
    records = [[call_record(r, index, Position("f", 0, 0)) for index in range(2)] for r in (plain, changed)]
    assert records[0] == records[1]


def test_a_judge_sees_the_calls_that_the_environment_saw_before():
    """Environments keep what belongs to a call by the call's identity."""

    class Known(Lines):
        def __init__(self):
            self.calls = []

        def prompt(self, call):
            self.calls.append(call)
            return super().prompt(call)

        def score(self, episode):
            assert [episode.main, *episode.calls] == self.calls
            assert all(a is b for a, b in zip([episode.main, *episode.calls], self.calls, strict=True))
            return super().score(episode)

    assert Play(USUAL, ["good"], environment=Known()).rollouts[0].status == "scored"


def test_a_judge_that_hangs_is_given_up_and_the_others_are_scored():
    hang = Broken("score", threading.Event().wait)
    play = Play(USUAL, ["good", "bad", "good"], environment=hang, timeout=1)
    assert [rollout.status for rollout in play.rollouts] == ["scored", "unscored", "scored"]
    assert play.rollouts[1].error == "score: no result within reward.timeout = 1.0 s"


def test_an_async_judge_that_hangs_is_unscored_too():
    class Hanging(Lines):
        async def score(self, episode):
            await asyncio.Event().wait()

    rollout = one({"t:": ["say 1"]}, environment=Hanging(), timeout=0.05)
    assert rollout.status == "unscored" and "reward.timeout = 0.05 s" in rollout.error


def test_judges_that_take_their_time_run_side_by_side():
    class Slow(Lines):
        barrier = threading.Barrier(6)

        def score(self, episode):
            self.barrier.wait(5)  # each waits for the five others
            return super().score(episode)

    assert all(r.status == "scored" for r in Play({"t:": ["say 1"]}, ["t"] * 6, environment=Slow()).rollouts)


# ---- the real sampler


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[Config, Callable[[int], dict[str, InProcessSampler]]]:
    folder = tmp_path_factory.mktemp("toy")
    make_model(folder / "model")
    config = toy_config(folder)
    agent = config.agents["main"]
    model, tokenizer = load_model("main", agent, config.compute), load_tokenizer("main", agent)
    return config, lambda slots: {n: InProcessSampler(model, tokenizer, config.agents[n], slots) for n in config.agents}


class Chatty(Environment):
    """Whatever the untrained main agent writes is a request to its clerk, twice; some tasks' clerks break."""

    def prompt(self, call):
        return f"{call.agent} {call.task.id}\n"

    def parse(self, call, text):
        if call.agent == "clerk":
            return boom() if call.task.id == "bad" else Answer("yes")
        return (Delegate("clerk", text),) if len(call.turns) < 2 else Answer(text)

    def score(self, episode):
        return Score(True, 1.0, tuple(CALL for _ in episode.calls))


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_an_episode_does_not_depend_on_the_others_or_on_the_samplers_slots(toy, slots):
    config, make = toy
    jobs = [Job(i // 3, i % 3, Task("bad" if i == 4 else "ok", {})) for i in range(9)]
    samplers = make(slots)
    rollouts = in_time(lambda: Episodes(config, Chatty(), samplers).run(jobs)).result()
    assert [r.status for r in rollouts] == ["failed" if i == 4 else "scored" for i in range(9)]
    for sampler in samplers.values():
        assert sampler.pending == 0
        sampler.release_cache()  # no slot is left in use
    for job, rollout in list(zip(jobs, rollouts, strict=True))[2::3]:
        (alone,) = in_time(lambda: Episodes(config, Chatty(), make(1)).run([job])).result()  # noqa: B023
        assert len(alone.trajectories) == 3
        for mine, other in zip(rollout.trajectories, alone.trajectories, strict=True):
            assert np.array_equal(mine.tokens, other.tokens) and np.array_equal(mine.sampled, other.sampled)
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=2e-5)


@pytest.mark.parametrize("beside", [1, 3])
def test_episodes_that_come_as_others_end_are_those_of_a_batch(toy, beside):
    config, make = toy
    jobs = [Job(i // 3, i % 3, Task("bad" if i == 4 else "ok", {})) for i in range(9)]
    batch = in_time(lambda: Episodes(config, Chatty(), make(16)).run(jobs)).result()
    left, streamed, running = list(jobs), [], []

    def more(count: int) -> list[Job]:
        running.append(count)
        return [left.pop(0) for _ in range(min(beside - count, len(left)))]

    in_time(lambda: Episodes(config, Chatty(), make(16)).stream(more, streamed.append)).result()
    assert max(running) == beside and running[-1] == 0
    streamed.sort(key=lambda rollout: jobs.index(rollout.job))
    for one_by_one, together in zip(streamed, batch, strict=True):
        assert (one_by_one.status, one_by_one.score) == (together.status, together.score)
        for mine, other in zip(one_by_one.trajectories, together.trajectories, strict=True):
            assert np.array_equal(mine.tokens, other.tokens) and np.array_equal(mine.sampled, other.sampled)
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=2e-5)


@pytest.mark.parametrize("who", ["more", "ended"])
def test_what_the_one_who_is_asked_raises_ends_all_episodes(who):
    samplers = {name: FakeSampler({"t:": ["say 1"], "u:": ["say " + "1" * 99]}, 400) for name in AGENTS}
    jobs = iter([[Job(0, 0, Task("t", {})), Job(1, 0, Task("u", {}))], [], []])
    episodes = Episodes(make_config(), Lines(), samplers)

    def more(_: int) -> list[Job]:
        return boom() if (new := next(jobs, None)) is None and who == "more" else new or []

    def ended(_: Rollout) -> None:
        return boom() if who == "ended" else None

    with pytest.raises(RuntimeError, match="boom"):
        in_time(lambda: episodes.stream(more, ended)).result()
    assert not any(sampler.left or sampler.writing for sampler in samplers.values())


def test_an_episode_that_does_not_end_in_time_fails_and_the_others_go_on():
    class Stuck(Lines):
        async def tool(self, call, use):
            await asyncio.Event().wait()

    samplers = {name: FakeSampler({"t:": ["ask clerk c"], "c:": ["use x y"], "u:": ["say 1"]}, 400) for name in AGENTS}
    episodes = Episodes(make_config(), Stuck(), samplers, timeout=0.1)
    jobs = [Job(i, 0, Task(name, {})) for i, name in enumerate("tu")]
    stuck, fine = in_time(lambda: episodes.run(jobs)).result()
    assert (stuck.status, fine.status) == ("failed", "scored")
    assert re.fullmatch(r"no end within sampling\.timeout = 0\.1 s, during \S*Stuck\.tool", stuck.error)
    assert [len(t) > 0 for t in stuck.trajectories] == [True, True]
    assert not any(sampler.left or sampler.writing for sampler in samplers.values())


def test_errors_that_differ_each_time_are_logged_and_remembered_up_to_a_bound(caplog, monkeypatch):
    class Counts(Lines):
        number = itertools.count()

        def parse(self, call, text):
            raise ValueError(f"number {next(self.number)}")

    monkeypatch.setattr(rollout_module, "LOGGED", 3)
    play = Play({"t:": ["say 1"]}, ["t"] * 6, environment=Counts())
    assert all(rollout.status == "failed" for rollout in play.rollouts)
    assert len(caplog.records) == 3 and caplog.messages[-1].endswith(
        "3 different errors are logged: further ones are counted only"
    )


class Slow(FakeSampler):
    """A sampler on a slow machine."""

    def step(self) -> None:
        time.sleep(0.02)
        super().step()


@pytest.mark.parametrize(
    ("topology", "evaluated", "status"),
    [("colocated", False, "scored"), ("local", True, "scored"), ("local", False, "failed")],
)
def test_a_slow_machine_is_no_reason_to_give_up_where_all_episodes_are_sampled_at_once(topology, evaluated, status):
    samplers = {name: Slow({"t:": ["say " + "x" * 20]}, 400) for name in AGENTS}
    config = msgspec.structs.replace(make_config(), topology=topology)
    episodes = Episodes(config, Lines(), samplers, timeout=0.2)
    (rollout,) = in_time(lambda: episodes.run([Job(0, 0, Task("t", {}), evaluated=evaluated)])).result()
    assert rollout.status == status


def beside_one_that(deed: Callable[[], Any], **options: Any) -> list[Rollout]:
    """Play two episodes side by side, one of which uses a tool that does something else."""

    class Deeds(Lines):
        def tool(self, call, use):
            return deed()

    samplers = {name: FakeSampler({"t:": ["use x y", "say 1"], "u:": ["say 1"]}, 400) for name in AGENTS}
    episodes = Episodes(make_config(), Deeds(), samplers, **options)
    rollouts = in_time(lambda: episodes.run([Job(i, 0, Task(name, {})) for i, name in enumerate("tu")])).result()
    assert not any(sampler.left or sampler.writing for sampler in samplers.values())
    return rollouts


def test_a_plain_tool_that_blocks_times_out_and_the_others_go_on():
    free = threading.Event()
    stuck, fine = beside_one_that(lambda: free.wait(10), timeout=0.1)
    free.set()
    assert (stuck.status, fine.status) == ("failed", "scored")
    assert re.fullmatch(r"no end within sampling\.timeout = 0\.1 s, during \S*Deeds\.tool", stuck.error)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError()])
def test_an_exit_in_a_tool_fails_its_own_episode_only(error):
    def leave() -> Any:
        raise error

    failed, fine = beside_one_that(leave)
    assert (failed.status, fine.status) == ("failed", "scored")
    assert failed.error.startswith(f"{beside_one_that.__name__}.<locals>.Deeds.tool: {type(error).__name__}")


def test_an_episode_whose_task_the_environment_cancels_fails_alone():
    class Cancels(Lines):
        async def observation(self, call, results):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)

    play = Play({"t:": ["use upper y", "say 1"], "u:": ["say 1"]}, ["t", "u"], environment=Cancels())
    assert [rollout.status for rollout in play.rollouts] == ["failed", "scored"]
    assert play.rollouts[0].error == "the environment's code has cancelled its own episode"


def test_a_time_that_passes_as_a_turn_is_sampled_is_one_episodes_failure(toy):
    """The sampler may end a turn after its episode was given up, and before that has let go of it."""
    sampler = toy[1](1)["main"]

    async def play() -> None:
        session = Session((0,))
        session.append([1, 2, 3])
        task = asyncio.create_task(sampler.act(session))
        await asyncio.sleep(0)
        task.cancel()
        while sampler.pending:
            sampler.step()
        with pytest.raises(asyncio.CancelledError):
            await task
        sampler.close(session)

    asyncio.run(play())


def test_an_evaluation_asks_for_correctness_alone():
    class Judge(Lines):
        def score(self, episode):
            return Score(None, 0.25, None)  # type: ignore[arg-type]

    samplers = {name: FakeSampler({"t:": ["say 1"]}, 400) for name in AGENTS}
    jobs = [Job(0, 0, Task("t", {}), evaluated=evaluated) for evaluated in (True, False)]
    asked, unasked = in_time(lambda: Episodes(make_config(), Judge(), samplers).run(jobs)).result()
    assert (asked.status, asked.score.correct, unasked.status) == ("scored", 0.25, "unscored")


class Blocks(Lines):
    def __init__(self) -> None:
        self.held, self.free = threading.Event(), threading.Event()
        self.waits = False

    async def tool(self, call, use):
        self.block()
        return "x"

    def block(self) -> None:
        self.held.set()
        self.free.wait(10)


class BlocksWhenGivenUp(Blocks):
    async def tool(self, call, use):
        self.waits = True
        try:
            await asyncio.Event().wait()
        finally:
            self.block()


class BlocksInATaskOfItsOwn(Blocks):
    async def tool(self, call, use):
        self.own = asyncio.create_task(BlocksWhenGivenUp.tool(self, call, use))
        await asyncio.sleep(0)
        return "x"


@pytest.mark.parametrize("kind", [Blocks, BlocksWhenGivenUp, BlocksInATaskOfItsOwn])
def test_where_an_async_function_holds_up_the_loop_is_told(kind: type[Blocks]):
    environment = kind()
    samplers = {name: FakeSampler({"t:": ["use x y", "say 1"], "u:": ["say 1"]}, 400) for name in AGENTS}
    episodes = Episodes(make_config(), environment, samplers)
    told: list[str] = []

    def watch() -> None:
        environment.held.wait(10)
        while not (error := episodes.blocked(0.02)):
            pass
        told.extend([error, episodes.blocked(60.0)])
        environment.free.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    jobs, ended = [[Job(i, 0, Task(name, {})) for i, name in enumerate("tu")]], list[Rollout]()

    def more(running: int) -> list[Job]:
        if running == 1 and kind is BlocksWhenGivenUp and environment.waits:
            raise InterruptedError
        return jobs.pop() if jobs else []

    with suppress(InterruptedError):
        in_time(lambda: episodes.stream(more, ended.append)).result()
    watcher.join(10)
    assert re.match(r"environment: \w+ \(.*\.py, line \d+\) has held up the event loop for", told[0])
    assert told[1] == "" and episodes.blocked(0.0) == "" and "scored" in {rollout.status for rollout in ended}


class Naps(Lines):
    def tool(self, call, use):
        time.sleep(0.1)
        return "x"


class HereNaps(Naps):
    in_threads = False


class AsyncNaps(Lines):
    async def tool(self, call, use):
        for _ in range(2):  # at once, and after it was resumed
            time.sleep(0.1)
            await asyncio.sleep(0)
        return "x"


@pytest.mark.parametrize("environment", [Naps, HereNaps, AsyncNaps])
def test_calls_that_follow_one_another_in_the_loops_thread_do_not_add_up(environment):
    samplers = {name: FakeSampler({"t:": ["use x y", "say 1"]}, 400) for name in AGENTS}
    episodes = Episodes(msgspec.structs.replace(make_config(), deterministic=True), environment(), samplers)
    told, over = set[str](), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            told.add(episodes.blocked(0.6))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    rollouts = in_time(lambda: episodes.run([Job(i, 0, Task("t", {})) for i in range(9)])).result()
    over.set()
    watcher.join(10)
    assert told == {""} and {rollout.status for rollout in rollouts} == {"scored"}


def test_rollouts_of_one_query_differ_and_the_same_job_does_not(toy):
    config, make = toy
    jobs = [Job(0, 0, Task("t", {})), Job(0, 1, Task("t", {})), Job(1, 0, Task("t", {})), Job(0, 0, Task("t", {}))]
    rollouts = in_time(lambda: Episodes(config, Chatty(), make(16)).run(jobs)).result()
    texts = ["".join(t.text for t in rollout.episode.main.turns) for rollout in rollouts]
    assert len(set(texts)) == 3 and texts[0] == texts[3]
    calls = [call.turns[0].text for rollout in rollouts[:2] for call in rollout.episode.calls if call.turns]
    assert len(calls) == 4 == len(set(calls))
    greedy = [Job(i, i, Task("t", {}), greedy=True) for i in range(2)]
    first, second = in_time(lambda: Episodes(config, Chatty(), make(16)).run(greedy)).result()
    assert first.episode.main == second.episode.main and not first.trajectories[0].logprobs.any()


def test_no_jobs_give_no_rollouts():
    assert Play({}, tasks=[]).rollouts == []
