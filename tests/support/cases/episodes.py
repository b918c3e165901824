"""Play episodes of scripted agents, whose sampler writes given replies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.engine.config.schema import Config, EnvironmentConfig, parse_config
from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.inference.sampler import Completion, Session
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.types import Answer, CallScore, Delegate, Malformed, Score, Task, ToolCall, WeightsVersion
from toy import EOS


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that encodes "say" and "ask" as one token; the scripted samplers spell them by letters."""
    vocabulary = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "sa", "say", "as", "ask"]
    merges = [("s", "a"), ("sa", "y"), ("a", "s"), ("as", "k")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


TOKENIZER = merging_tokenizer()


def encode(text: str) -> list[int]:
    """Return the token ids of a text."""
    return TOKENIZER.encode(text)


def spell(text: str) -> list[int]:
    """Return the token ids of a text, one a letter."""
    return [encode(letter)[0] for letter in text]


class FakeSampler:
    """A sampler in which the call whose prompt is P writes replies[P], turn by turn, one letter per step."""

    tokenizer, version = TOKENIZER, WeightsVersion(7, 2)

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
    """Parse `say ANSWER`, or `ask AGENT REQUEST` and `use TOOL ARGUMENT`, several with `; ` between them."""

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
    """Return a config of three agents. agent: keys of each."""
    agent = {"model": "", "max_turns": 4, "max_context": 400, **agent}
    return parse_config(
        {
            "run_dir": "",
            "environment": {"use": ""},
            "agents": dict.fromkeys(AGENTS, agent),
            "reward": {"timeout": timeout, "tries": 1},
        }
    )


def in_time(function: Callable[[], Any]) -> Future[Any]:
    """Return a function's result or error; a function that hangs fails the test, and not the whole suite."""
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
    """Play scripted episodes, one per task, and check that no session is left open."""

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


def use(target: str, **options: Any) -> EnvironmentConfig:
    """Return the config of an environment."""
    return EnvironmentConfig(use=target, options=options)
