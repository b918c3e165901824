"""Chats read with real chat templates: what the agent sampled is its own, and what is not known exactly is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mgrpo.engine.integrations.recorded import recorded
from toy import make_model

TRL = find_spec("trl")
pytestmark = pytest.mark.skipif(TRL is None, reason="needs trl, which has the chat templates: pip install 'mgrpo[dev]'")
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]
ASK, HI = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "hi"}


def say(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def tokenizer(folder: Path, template: str, end: str = "<|im_end|>") -> Any:
    """Return a tokenizer with a real template, whose end-of-sequence token is `end`."""
    assert TRL is not None and TRL.origin is not None
    found = AutoTokenizer.from_pretrained(folder)
    found.add_special_tokens(
        {"bos_token": "<|begin|>", "eos_token": end, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    found.chat_template = (Path(TRL.origin).parent / "chat_templates" / f"{template}.jinja").read_text()
    return found


def said(of: Any, row: dict[str, Any], **options: Any) -> list[str]:
    """Return the texts of the runs that are the agent's."""
    found = recorded([row], of, **options)
    tokens, sampled = found.tokens[0], found.sampled[0]
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(sampled.astype(int))) + 1)
    return [of.decode(tokens[run]) for run in runs if len(run) and sampled[run[0]]]


def test_the_prompts_turns_and_the_templates_words_are_not_the_agents(folder: Path) -> None:
    row = {
        "prompt": [HI, say("not now"), ASK],
        "completion": [say("use it"), {"role": "tool", "content": "4"}, say("4!")],
    }
    assert said(tokenizer(folder, "qwen2_5"), row) == ["use it<|im_end|>", "4!<|im_end|>"]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_a_turn_ends_with_its_token_also_where_that_ends_no_text(folder: Path, end: str) -> None:
    assert said(tokenizer(folder, "qwen2_5", end), {"messages": [ASK, say("4")]}) == ["4<|im_end|>"]


def test_tools_are_in_the_text_before(folder: Path) -> None:
    of, row = (
        tokenizer(folder, "qwen2_5"),
        {"messages": [ASK, say("", tool_calls=[{"function": {"name": "search", "arguments": {}}}])]},
    )
    call = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call><|im_end|>'
    assert said(of, row, tools=TOOLS) == [call] == said(of, row | {"tools": TOOLS})
    with_tools, without = (recorded([row], of, tools=tools).tokens[0] for tools in (TOOLS, None))
    assert "# Tools" in of.decode(with_tools) and "# Tools" not in of.decode(without)


def test_a_reasoning_is_the_agents(folder: Path) -> None:
    of, whole = tokenizer(folder, "qwen3"), "<think>\nadd\n</think>\n\n4<|im_end|>"
    assert said(of, {"messages": [ASK, say("4", reasoning_content="add")]}) == [whole]
    assert said(of, {"messages": [ASK, say("<think>\nadd\n</think>\n\n4")]}) == [whole]


def test_an_empty_reasoning_that_the_template_writes_is_the_prompts_or_refused(folder: Path) -> None:
    of, row = tokenizer(folder, "qwen3"), {"messages": [ASK, say("4")]}
    with pytest.raises(
        ValueError, match=r"row 0, message 1: the chat template writes '<think>.* beside the message's text"
    ):
        recorded([row], of)
    assert said(of, row, chat_template_kwargs={"enable_thinking": False}) == ["4<|im_end|>"]
    assert said(of, row | {"chat_template_kwargs": {"enable_thinking": False}}) == ["4<|im_end|>"]


def test_a_template_that_drops_earlier_reasoning_is_refused(folder: Path) -> None:
    talk = [ASK, say("4", reasoning_content="add"), HI, say("hi", reasoning_content="greet")]
    with pytest.raises(ValueError, match="row 0, message 3: the chat template changes earlier messages"):
        recorded([{"messages": talk}], tokenizer(folder, "qwen3"))
    prompt = {"prompt": talk[:3], "completion": talk[3:]}  # there the first reasoning was not read either
    assert said(tokenizer(folder, "qwen3"), prompt) == ["<think>\ngreet\n</think>\n\nhi<|im_end|>"]


def test_a_text_that_the_template_strips_is_refused(folder: Path) -> None:
    of = tokenizer(folder, "llama3", "<|eot_id|>")
    assert said(of, {"messages": [ASK, say("4")]}) == ["4<|eot_id|>"]
    with pytest.raises(ValueError, match=r"row 0, message 1: the chat template changes the text '4 .n'"):
        recorded([{"messages": [ASK, say("4 \n")]}], of)


def test_a_chat_that_the_template_refuses_is_named(folder: Path) -> None:
    of = tokenizer(folder, "gemma", "<end_of_turn>")  # roles must alternate
    with pytest.raises(
        ValueError, match="row 0: the chat template refuses the chat: Conversation roles must alternate"
    ):
        recorded([{"messages": [ASK, HI, say("4")]}], of)


def test_a_message_of_weight_0_is_not_learnt(folder: Path) -> None:
    talk = {"messages": [ASK, say("5", weight=0), HI, say("hi", weight=1)]}
    assert said(tokenizer(folder, "qwen2_5"), talk) == ["hi<|im_end|>"]
    with pytest.raises(ValueError, match=r"row 0, message 1, weight: got 0.5, expected 0 or 1"):
        recorded([{"messages": [ASK, say("5", weight=0.5)]}], tokenizer(folder, "qwen2_5"))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tools": "search"}, "row 0, tools: got 'search', expected a list, or its JSON"),
        ({"tools": {"search": 1}}, "row 0, tools: got dict, expected a list of tools"),
        ({"chat_template_kwargs": ["x"]}, "row 0, chat_template_kwargs: got list, expected a dictionary"),
        ({"chat_template_kwargs": {"tokenize": True}}, "row 0, chat_template_kwargs: got tokenize, expected"),
        ({"top_k": 20}, "row 0, top_k: 20 given: expected 0 or -1"),
        ({"sampling_params": {"json_schema": "{}"}}, "row 0, sampling_params.json_schema: '{}' given: expected none"),
        ({"tool_choice": "required"}, "row 0, tool_choice: 'required' given: expected 'auto' or 'none'"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        recorded([{"messages": [ASK, say("4")], **fields}], tokenizer(folder, "qwen2_5"))
