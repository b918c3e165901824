"""Test sampling from hybrids: each call's recurrent state is its own, wherever it begins, waits, joins or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hybrids import CONFIGS, hybrid
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.inference.check import check_sampler
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.recurrent_states import RecurrentStates
from mgrpo.engine.inference.sampler import Session
from mgrpo.engine.model.causal_lm import lay_out
from mgrpo.engine.types import WeightsVersion

LIMIT = 1e-3  # nats; the recurrences of transformers compute in float32, in another order for one token than for many
VOCABULARY = 257


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0")


def sampler(name: str, concurrency: int = 3) -> InProcessSampler:
    model = hybrid(name)
    lay_out(model)
    agent = AgentConfig(model="", max_new_tokens=9, max_context=256)
    return InProcessSampler(model, tokenizer(), agent, concurrency, WeightsVersion(0, 0))


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, length).tolist()


def session(seed: int, tokens: list[int]) -> Session:
    made = Session((seed,))
    made.append(tokens)
    return made


async def talk(made: InProcessSampler, call: Session, observations: Sequence[list[int]]) -> None:
    await made.act(call)
    for tokens in observations:
        call.append(tokens)
        await made.act(call)
    made.close(call)


async def drive(made: InProcessSampler, coroutines: Sequence[Any]) -> None:
    running = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    while not all(task.done() for task in running):
        for _ in range(3):
            await asyncio.sleep(0)
        if made.pending:
            made.step()
    for task in running:
        task.result()


@torch.no_grad()
def gap(model: Any, call: Session) -> float:
    """Return the largest difference between the call's log-probs and those of the model's own forward on it alone."""
    ids = torch.tensor(call.tokens)
    logps_TV = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    truth = logps_TV[:-1].gather(-1, ids[1:, None])[:, 0]
    at = torch.tensor(call.sampled)[1:]
    assert at.any()
    return float((truth - torch.tensor(call.logprobs)[1:].double())[at].abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_calls_that_join_wait_and_leave_are_sampled_as_if_alone(name: str) -> None:
    made = sampler(name)
    calls = [session(i, prompt(i, n)) for i, n in enumerate((1, 30, 2, 70, 7, 1, 19))]
    observations = [[prompt(50, 6), prompt(51, 1)], [], [prompt(52, 40)], [[], prompt(53, 2)]]
    asyncio.run(drive(made, [talk(made, call, observations[i % 4]) for i, call in enumerate(calls)]))
    assert max(gap(made.model, call) for call in calls) <= LIMIT


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_that_a_live_call_holds_is_copied_with_its_states(name: str, monkeypatch: Any) -> None:
    made, shared = sampler(name, 4), prompt(0, 21)
    began: list[int] = []
    begin = RecurrentStates.begin
    monkeypatch.setattr(
        RecurrentStates, "begin", lambda self, *args: began.append(args[2].shape[1]) or begin(self, *args)
    )
    calls = [session(i, shared) for i in range(9)]
    asyncio.run(drive(made, [talk(made, call, [prompt(60 + i, 1 + i)]) for i, call in enumerate(calls)]))
    assert began == [21] * len(made.cache.states.layers)  # one prefill for all nine
    assert max(gap(made.model, call) for call in calls) <= LIMIT
    assert not made.cache.states.begins


@pytest.mark.parametrize("name", CONFIGS)
def test_new_weights_between_turns_compute_the_states_again(name: str) -> None:
    made, call, other = sampler(name), session(0, prompt(0, 12)), session(1, prompt(0, 12))
    tensors = {key: param * 1.2 for key, param in made.model.named_parameters()}

    async def play() -> None:
        await drive(made, [made.act(call)])
        assert made.update(tensors, WeightsVersion(1, 1))
        before = len(call.tokens)
        call.append(prompt(5, 4))
        await drive(made, [made.act(call), made.act(other)])
        call.sampled[:before] = [False] * before  # of the old weights

    asyncio.run(play())
    assert max(gap(made.model, one) for one in (call, other)) <= LIMIT


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_of_given_tokens_are_the_models(name: str) -> None:
    made, ids = sampler(name), prompt(3, 44)
    logps_TV = made.model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].log_softmax(-1)
    truth = logps_TV[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    assert (torch.tensor(made.logprobs(ids)) - truth).abs().max() <= LIMIT


def test_states_that_are_not_carried_on_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("qwen3_5")
    lay_out(model)
    monkeypatch.setattr(RecurrentStates, "advance", lambda self, mixer, slots, hidden: mixer.run(hidden))
    with pytest.raises(ValueError, match="keeps more from token to token than keys, values and states"):
        check_sampler(model)


def test_states_that_are_copied_too_late_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("lfm2")
    lay_out(model)

    def copy(self: RecurrentStates, source: int, target: int) -> None:
        for state in self.layers.values():
            for x in state.values():
                x[target] = x[source]

    monkeypatch.setattr(RecurrentStates, "copy", copy)
    with pytest.raises(ValueError, match="keeps more from token to token than keys, values and states"):
        check_sampler(model)
