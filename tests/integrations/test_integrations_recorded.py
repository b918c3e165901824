"""Rollouts that other programs recorded: which tokens are the agent's, what makes a group, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mgrpo.engine import advantages, pack
from mgrpo.engine.integrations.recorded import recorded
from toy import EOS, make_model

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)
FORGETFUL = (  # drops an assistant's earlier turns, as templates do that drop earlier reasoning
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<{{ m.role }}>{{ m.content }}\n{% endif %}"
    "{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))
    found.chat_template = CHAT
    return found


def said(tokenizer: Any, tokens: np.ndarray, sampled: np.ndarray) -> list[str]:
    """Return the texts of the runs that are the agent's."""
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(sampled.astype(int))) + 1)
    return [tokenizer.decode(tokens[run]) for run in runs if len(run) and sampled[run[0]]]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def queued(**changes: Any) -> dict[str, Any]:
    """Return a line of MrlX's queue: three prompt tokens, a turn, a tool's result, a turn."""
    sample = {
        "id": "8d0c",
        "response": "…",
        "responseLength": 5,
        "status": "completed",
        "tokens": [5, 6, 7, 11, 12, 8, 13, 14],
        "lossMask": [1, 1, 0, 1, 1],
        "messages": [message("user", "q"), message("assistant", "a")],
        "reward": 1.0,
        "createdDate": "2025-11-20T10:00:00",
    }
    return json.loads(json.dumps(sample | changes))


def slime(**changes: Any) -> dict[str, Any]:
    """Return the same in slime's form."""
    own = {
        "group_index": 3,
        "response_length": 5,
        "loss_mask": [1, 1, 0, 1, 1],
        "rollout_log_probs": [-0.5, -1, -9, -2, 0],
    }
    return {"tokens": [5, 6, 7, 11, 12, 8, 13, 14], "reward": 0.5, "status": "completed"} | own | changes


def test_token_ids_are_taken_as_they_are() -> None:
    for row in (queued(), slime()):
        found = recorded([row])
        assert found.tokens[0].tolist() == [5, 6, 7, 11, 12, 8, 13, 14]
        assert found.sampled[0].tolist() == [False, False, False, True, True, False, True, True]
        assert found.offsets is None and found.keys is None
    assert recorded([queued()]).rewards.tolist() == [1.0]
    assert recorded([slime()]).sampler_logprobs[0].tolist() == [0, 0, 0, -0.5, -1, 0, -2, 0]
    everything = recorded([slime(loss_mask=None, rollout_log_probs=None)])
    assert everything.sampled[0].tolist() == [False] * 3 + [True] * 5 and everything.sampler_logprobs is None
    assert not recorded([slime(remove_sample=True)]).sampled[0].any()
    nothing = recorded([slime(response_length=0, loss_mask=[], rollout_log_probs=[])])
    assert not nothing.sampled[0].any() and len(nothing.tokens[0]) == 8


@pytest.mark.parametrize(("given", "reward"), [(True, 1.0), (False, 0.0), (2, 2.0)])
@pytest.mark.parametrize("kind", [lambda number: number, np.float32, np.int64, np.bool_, np.uint8])
def test_rewards_and_lengths_may_be_bools_and_of_numpys_types(kind, given, reward):
    row = {"tokens": [7] * 300, "response_length": np.uint8(2), "reward": kind(given)}
    found = recorded([row])
    assert found.rewards.tolist() == [min(reward, 1.0) if kind is np.bool_ else reward]
    assert found.sampled[0].tolist() == [False] * 298 + [True] * 2


def test_groups_stand_together_and_can_be_packed() -> None:
    rows = [
        slime(agent=agent, group_index=query, reward=reward, tokens=[5, 6, 7, 11, 12, 8, 13, n])
        for n, (agent, query, reward) in enumerate(
            [("main", 2, 1.0), ("sub", 2, 3.0), ("main", 1, 0.0), ("main", 2, 2.0), ("sub", 2, 5.0), ("main", 1, 4.0)]
        )
    ]
    found = recorded(rows, by=("agent", "group_index"))
    assert found.keys == [("main", 2), ("sub", 2), ("main", 1)] and found.offsets.tolist() == [0, 2, 4, 6]
    assert found.rewards.tolist() == [1.0, 2.0, 3.0, 5.0, 0.0, 4.0]
    assert [int(tokens[-1]) for tokens in found.tokens] == [0, 3, 1, 4, 2, 5]
    estimated = advantages(found.rewards, found.offsets).values
    np.testing.assert_allclose(estimated, [-1, 1] * 3)
    weights = np.full(6, 1 / 24)
    (batches,) = pack(found.tokens, found.sampled, estimated, weights, 16, sampler_logprobs=found.sampler_logprobs)
    assert sum(int((batch["weights"] != 0).sum()) for batch in batches) == 24


TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="<>"), min_size=1, max_size=8)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "tool", "assistant"]), TEXTS), max_size=6)


@given(TURNS)
@settings(max_examples=80)
def test_of_a_chat_the_assistants_words_and_their_end_are_the_agents(tokenizer: Any, turns: Any) -> None:
    messages = [message("system", "be brief"), *(message(*turn) for turn in turns)]
    found = recorded([{"messages": messages, "reward": 0}], tokenizer)
    expected = [text + EOS for role, text in turns if role == "assistant"]
    assert said(tokenizer, found.tokens[0], found.sampled[0]) == expected
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(tokenizer.decode(found.tokens[0])) and bool(len(found.tokens[0])) == bool(expected)


def test_of_a_prompt_and_its_completion_the_completion_is(tokenizer: Any) -> None:
    talk = {
        "prompt": [message("user", "hi"), message("assistant", "not now"), message("user", "2+2?")],
        "completion": [message("assistant", "use it"), message("tool", "4"), message("assistant", "four")],
    }
    plain = {"prompt": "The sky is", "completion": " blue."}
    found = recorded([talk, plain, talk], tokenizer, by=("prompt",))
    assert found.keys == [(talk["prompt"],), (plain["prompt"],)] and found.offsets.tolist() == [0, 2, 3]
    found = recorded([talk, plain], tokenizer)
    assert found.rewards is None
    assert said(tokenizer, found.tokens[0], found.sampled[0]) == ["use it" + EOS, "four" + EOS]
    assert said(tokenizer, found.tokens[1], found.sampled[1]) == [" blue."]
    assert tokenizer.decode(found.tokens[1]) == "The sky is blue."


def test_a_dataset_of_trls_is_read(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which trl brings")
    rows = [{"prompt": "1+1=", "completion": "2", "reward": 1.0}, {"prompt": "1+1=", "completion": "3", "reward": 0.0}]
    found = recorded(datasets.Dataset.from_list(rows), tokenizer, by=("prompt",))
    assert found.offsets.tolist() == [0, 2] and found.rewards.tolist() == [1.0, 0.0]
    assert [int(sampled.sum()) for sampled in found.sampled] == [1, 1]


@pytest.mark.parametrize(
    ("row", "message_"),
    [
        (queued(tokens="5 6 7"), "row 1, tokens: got '5 6 7', expected a list of numbers"),
        (queued(tokens=[1.5, 2.0]), "row 1, tokens: got"),
        (queued(tokens=[[1], [2]]), "row 1, tokens: got"),
        (queued(responseLength=9), "row 1, response_length: got 9, expected 0 to 8"),
        (queued(responseLength=None), "row 1, response_length: got None"),
        (queued(lossMask=[1, 0]), "row 1, lossMask: got 2 numbers, expected 5"),
        (queued(lossMask=[1, 0, 2, 0, 0]), r"row 1, lossMask: got .* expected numbers that are \(0, 1\)"),
        (slime(rollout_log_probs=[0.0]), "row 1, rollout_log_probs: got 1 numbers"),
        (slime(rollout_log_probs=[float("nan")] * 5), "row 1, rollout_log_probs: got .* finite"),
        (slime(), r"rollout_log_probs: got none in 1 of 2 rows"),
        (queued(reward=None), "reward: got none in 1 of 2 rows"),
        (queued(reward={"score": 1}), "row 1, reward: got {'score': 1}, expected a finite number"),
        (queued(reward=float("nan")), "row 1, reward: got nan"),
        ({"question": "?", "reward": 1}, r"row 1: got the fields \['question', 'reward'\], expected tokens and"),
        ({"prompt": "?", "reward": 1}, "row 1: got the fields"),
        ({"messages": "hello"}, "row 1, messages: got 'hello', expected a list of messages"),
        ({"messages": [{"content": "hello"}]}, "row 1, messages: got"),
        ({"prompt": "a", "completion": [message("assistant", "b")]}, "row 1, prompt: got 'a'"),
        (
            {"prompt": [message("assistant", "a")], "completion": [message("assistant", "b")]},
            "row 1, prompt: got an assistant's message at its end",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tokenizer: Any, row: dict[str, Any], message_: str) -> None:
    with pytest.raises(ValueError, match=message_):
        recorded([queued(), row], tokenizer)


def test_a_group_needs_its_fields_and_a_text_its_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="row 0, group_index: got none, expected one"):
        recorded([queued()], by=("group_index",))
    for row in ({"messages": [message("user", "a")]}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(ValueError, match="row 0: got text and no tokenizer"):
            recorded([row])


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    talk = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    assert recorded([{"messages": talk[:2]}], tokenizer).sampled[0].any()
    with pytest.raises(ValueError, match="row 0, message 3: the chat template changes earlier messages"):
        recorded([{"messages": talk}], tokenizer)
