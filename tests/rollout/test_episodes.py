"""Episodes: call and return, side by side; exact tokens; the user's errors end an episode and nothing else."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.engine.config.schema import Config, EnvironmentConfig, parse_config
from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import Completion, Session
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.rollout.episodes import Demonstrations, Episodes, Job, Rollout, load_environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Malformed, Score, Task, ToolCall
from toy import EOS, SUMS, make_model, toy_config


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Encodes "say" and "ask" as one token, which the scripted samplers spell letter by letter."""
    vocabulary = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "sa", "say", "as", "ask"]
    merges = [("s", "a"), ("sa", "y"), ("a", "s"), ("as", "k")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


TOKENIZER = merging_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def spell(text: str) -> list[int]:
    return [encode(letter)[0] for letter in text]


class FakeSampler:
    """Follows the protocol: the call whose prompt is P writes replies[P], turn by turn, a letter a step."""

    tokenizer, version, weights_step = TOKENIZER, 7, 2

    def __init__(self, replies: dict[str, list[str]], max_context: int):
        self.replies, self.max_context, self.steps = replies, max_context, 0
        self.left: dict[int, list[str]] = {}  # replies that an open session has left
        self.writing: dict[int, tuple[Session, list[int], str, asyncio.Future[Completion]]] = {}

    @property
    def pending(self) -> int:
        return len(self.writing)

    async def act(self, session: Session) -> Completion:
        if id(session) not in self.left:
            self.left[id(session)] = list(self.replies[TOKENIZER.decode(session.tokens)])
        if len(session.tokens) >= self.max_context:
            return Completion("", 0, truncated=True)
        text = self.left[id(session)].pop(0)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self.writing[id(session)] = (session, spell(text), text, future)
        return await future

    def step(self) -> None:
        assert self.writing
        self.steps += 1
        for key, (session, ids, text, future) in list(self.writing.items()):
            session.append([ids.pop(0)], [-0.5])
            if not ids:
                del self.writing[key]
                future.set_result(Completion(text, len(text), truncated=text.endswith("~")))

    def close(self, session: Session) -> None:
        self.left.pop(id(session), None)
        self.writing.pop(id(session), None)


class Lines(Environment):
    """`ask AGENT REQUEST`, `use TOOL ARGUMENT`, several with `; ` between them, or `say ANSWER`."""

    def prompt(self, call):
        return f"{call.request or call.task.id}:"

    def parse(self, call, text):
        if text.startswith("say "):
            return Answer(text[4:])
        words = [part.split(" ", 2) for part in text.split("; ")]
        if not all(len(w) == 3 and w[0] in ("ask", "use") for w in words):
            return Malformed("what?")
        return tuple((Delegate if verb == "ask" else ToolCall)(name, rest) for verb, name, rest in words)

    def tool(self, call, use):
        if use.name == "upper":
            return use.argument.upper()
        if use.name == "fail":
            raise ToolError(f"cannot {use.argument}")
        return super().tool(call, use)

    def score(self, episode):
        return Score(True, 1.0, tuple(CallScore(True, 0.5) for _ in episode.calls))


AGENTS = ("main", "clerk", "scout")


def make_config(timeout: float = 20.0, **agent: Any) -> Config:
    agent = {"model": "", "max_turns": 4, "max_context": 400, **agent}
    return parse_config(
        {
            "run_dir": "",
            "environment": {"use": ""},
            "agents": dict.fromkeys(AGENTS, agent),
            "reward": {"timeout": timeout},
        }
    )


def in_time(function: Callable[[], Any]) -> Future[Any]:
    """The function's result or error; a hang fails the test and not the whole suite."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    assert wait([outcome], timeout=10).done, "the run hangs"
    return outcome


class Play:
    """A run of scripted episodes, one for each task; afterwards no session is left open."""

    def __init__(self, replies: dict[str, list[str]], tasks: Sequence[str] = ("t",), environment=None, **config: Any):
        self.config = make_config(**config)
        context = self.config.agents["main"].max_context
        self.samplers = {name: FakeSampler(replies, context) for name in AGENTS}
        self.jobs = [Job(i, 0, Task(name, {})) for i, name in enumerate(tasks)]
        episodes = Episodes(self.config, environment or Lines(), dict(self.samplers))
        outcome = in_time(lambda: episodes.run(self.jobs))
        assert not any(sampler.left or sampler.writing for sampler in self.samplers.values())
        self.rollouts: list[Rollout] = outcome.result()
        assert [rollout.job for rollout in self.rollouts] == self.jobs

    @property
    def steps(self) -> int:
        return sum(sampler.steps for sampler in self.samplers.values())


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
        assert encode(TOKENIZER.decode(tokens)) != tokens  # it would have shown


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
    """Tools that end only when both have begun, and one that takes its time."""

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
    assert rollout.status == "scored"  # the judge sees it; it is no error of the run


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


def test_a_prompt_without_room_for_an_answer_is_the_users_error_and_leaves_nothing_open():
    tasks = ["t1", "long" * 20, "t2"]
    message = r"main\.max_context: 40 given: the prompt of task 'long\w+' has 81 tokens already, expected room"
    with pytest.raises(ValueError, match=message):
        Play({f"t{i}:": ["ask clerk c", "say 1"] for i in (1, 2)} | {"c:": ["say 1"]}, tasks, max_context=40)


def test_ctrl_c_in_the_middle_of_a_step_leaves_nothing_open(monkeypatch):
    def interrupt(self: FakeSampler) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeSampler, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Play({"t:": ["say 1"]}, tasks=["t", "t"])


# ---- what the environment does wrong


class Broken(Lines):
    """Does `misdeed` in one method for one agent of the task named bad."""

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
        ("prompt", None, "prompt: NoneType returned, expected str"),
        ("prompt", "", "prompt"),
        ("tool", 5, "tool: int returned, expected str"),
        ("observation", b"x", "observation: bytes returned, expected str"),
        ("parse", None, "parse: None returned, expected Answer"),
        ("parse", (), r"parse: \(\) returned, expected Answer"),
        ("parse", [ToolCall("upper", "x")], "parse: .* returned, expected Answer, Malformed, or a tuple"),
        ("parse", ("say",), "parse: .* returned, expected Answer"),
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
        (lambda: None, "score: NoneType returned, expected a Score"),
        (lambda: 0.5, "score: float returned, expected a Score"),
        (lambda: Score(True, 1.0), "score: calls has 0 scores, expected one for each of 1"),
        (lambda: Score(True, 1.0, (CALL, CALL)), "score: calls has 2 scores, expected one for each of 1"),
        (lambda: Score(True, float("nan"), (CALL,)), "score: correct is nan, expected a finite number"),
        (lambda: Score(True, float("-inf"), (CALL,)), "score: correct is -inf, expected a finite number"),
        (lambda: Score(True, 1.0, (CallScore(True, float("inf")),)), r"score: calls\[0\]\.expert is inf, expected"),
        (lambda: Score(True, "yes", (CALL,)), "score: correct is .*yes.*, expected"),  # type: ignore[arg-type]
        (lambda: Score(True, None, (CALL,)), "score: correct is None, expected"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, (CallScore(True, None),)), r"score: calls\[0\]\.expert is None"),  # type: ignore[arg-type]
        (lambda: Score(float("nan"), 1.0, (CALL,)), "score: format is nan, expected True or False"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, (CallScore("no", 1.0),)), r"score: calls\[0\]\.format is 'no'"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, (0.5,)), r"score: calls.*, expected"),  # type: ignore[arg-type]
        (lambda: Score(True, 1.0, None), "score: calls.*, expected"),  # type: ignore[arg-type]
    ],
)
def test_a_judge_that_fails_leaves_its_own_episode_unscored(caplog, misdeed, message):
    play = Play(USUAL, ["good", "bad", "good"], environment=Broken("score", misdeed))
    assert [rollout.status for rollout in play.rollouts] == ["scored", "unscored", "scored"]
    assert re.search(message, play.rollouts[1].error) and play.rollouts[1].score is None
    assert play.rollouts[1].episode.main.answer == "ok" and len(play.rollouts[1].trajectories) == 2
    assert len(caplog.records) == 1


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


# ---- demonstrations, and the real sampler


class Lesson(Lines):
    def script(self, call):
        if call.agent == "main" and not call.turns:
            return "ask clerk say"
        return "say as"


def demonstrate(environment: Environment) -> Rollout:
    samplers = {name: FakeSampler({}, 400) for name in AGENTS}
    episodes = Demonstrations(make_config(), environment, dict(samplers))
    (rollout,) = in_time(lambda: episodes.run([Job(0, 0, Task("t", {}))])).result()
    assert not any(sampler.steps for sampler in samplers.values())
    return rollout


def test_demonstrations_take_the_scripts_actions_and_sample_nothing():
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
            return boom() if call.agent == "clerk" else super().script(call)

    for environment, error in [(Bad(), "Bad.script: RuntimeError: boom"), (Lines(), "Lines has no script(), which")]:
        rollout = demonstrate(environment)
        assert rollout.status == "failed" and error in rollout.error


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
    rollouts = in_time(lambda: Episodes(config, Chatty(), dict(samplers)).run(jobs)).result()
    assert [r.status for r in rollouts] == ["failed" if i == 4 else "scored" for i in range(9)]
    for sampler in samplers.values():
        assert sampler.pending == 0
        sampler.release_cache()  # no slot is left in use
    for job, rollout in list(zip(jobs, rollouts, strict=True))[2::3]:
        (alone,) = in_time(lambda: Episodes(config, Chatty(), dict(make(1))).run([job])).result()  # noqa: B023
        assert len(alone.trajectories) == 3
        for mine, other in zip(rollout.trajectories, alone.trajectories, strict=True):
            assert np.array_equal(mine.tokens, other.tokens) and np.array_equal(mine.sampled, other.sampled)
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=2e-5)


@pytest.mark.parametrize("beside", [1, 3])
def test_episodes_that_come_as_others_end_are_those_of_a_batch(toy, beside):
    config, make = toy
    jobs = [Job(i // 3, i % 3, Task("bad" if i == 4 else "ok", {})) for i in range(9)]
    batch = in_time(lambda: Episodes(config, Chatty(), dict(make(16))).run(jobs)).result()
    left, streamed, running = list(jobs), [], []

    def more(count: int) -> list[Job]:
        running.append(count)
        return [left.pop(0) for _ in range(min(beside - count, len(left)))]

    in_time(lambda: Episodes(config, Chatty(), dict(make(16))).stream(more, streamed.append)).result()
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
    episodes = Episodes(make_config(), Lines(), dict(samplers))

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
    episodes = Episodes(make_config(), Stuck(), dict(samplers), timeout=0.1)
    jobs = [Job(i, 0, Task(name, {})) for i, name in enumerate("tu")]
    stuck, fine = in_time(lambda: episodes.run(jobs)).result()
    assert (stuck.status, stuck.error, fine.status) == ("failed", "no end within 0.1 s", "scored")
    assert [len(t) > 0 for t in stuck.trajectories] == [True, True]
    assert not any(sampler.left or sampler.writing for sampler in samplers.values())


def test_rollouts_of_one_query_differ_and_the_same_job_does_not(toy):
    config, make = toy
    jobs = [Job(0, 0, Task("t", {})), Job(0, 1, Task("t", {})), Job(1, 0, Task("t", {})), Job(0, 0, Task("t", {}))]
    rollouts = in_time(lambda: Episodes(config, Chatty(), dict(make(16))).run(jobs)).result()
    texts = ["".join(t.text for t in rollout.episode.main.turns) for rollout in rollouts]
    assert len(set(texts)) == 3 and texts[0] == texts[3]
    calls = [call.turns[0].text for rollout in rollouts[:2] for call in rollout.episode.calls if call.turns]
    assert len(calls) == 4 == len(set(calls))
    greedy = [Job(i, i, Task("t", {}), greedy=True) for i in range(2)]
    first, second = in_time(lambda: Episodes(config, Chatty(), dict(make(16))).run(greedy)).result()
    assert first.episode.main == second.episode.main and not first.trajectories[0].logprobs.any()


def test_no_jobs_give_no_rollouts():
    assert Play({}, tasks=[]).rollouts == []


# ---- load_environment


def use(target: str, **options: Any) -> EnvironmentConfig:
    return EnvironmentConfig(use=target, options=options)


def test_an_environment_is_loaded_from_a_file_or_a_module_with_its_options(tmp_path):
    assert type(load_environment(use(f"{SUMS}:Sums"))).__name__ == "Sums"
    assert type(load_environment(use("mgrpo.engine.environment.base:Environment"))) is Environment
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from mgrpo.engine.environment.base import Environment\n"
        "@dataclass\nclass Mine(Environment):\n    size: int = 1\n"
    )
    assert load_environment(use(f"{file}:Mine", size=3)).size == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"environment\.options: \{'height': 3\} given: .*'height'"):
        load_environment(use(f"{file}:Mine", height=3))


def test_a_files_name_shadows_no_module(tmp_path):
    (tmp_path / "logging.py").write_text(SUMS.read_text())
    assert type(load_environment(use(f"{tmp_path}/logging.py:Sums"))).__name__ == "Sums"
    assert sys.modules["logging"] is logging


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Sums", r"environment\.use: 'Sums' given: expected file\.py:Class or package\.module:Class"),
        (":Sums", r"environment\.use: ':Sums' given: expected file\.py:Class"),
        ("nowhere.py:Sums", r"environment\.use: nowhere\.py is no file, expected a Python file"),
        ("no.such.package:Sums", r"environment\.use: 'no\.such\.package' given: No module named"),
        (".relative:Sums", r"environment\.use: '\.relative' given"),
        (f"{SUMS}:Nope", r"environment\.use: 'Nope' in .*environment\.py is None: expected a subclass of Environment"),
        (f"{SUMS}:Answer", r"environment\.use: 'Answer' in .* is <class .*: expected a subclass of Environment"),
        (f"{SUMS}:", r"environment\.use: '' in .* expected a subclass of Environment"),
    ],
)
def test_an_environment_that_cannot_be_found_is_a_value_error(target, message):
    with pytest.raises(ValueError, match=message):
        load_environment(use(target))
