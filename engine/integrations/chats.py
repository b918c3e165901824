"""Find in a chat what the agent itself wrote, as its chat template spells it.

The template is asked for the text before each of the agent's messages, with the beginning of the reply, and for the
text after it. What the second adds is the message: the agent's own text, and what the template writes around it. Of the
latter only the end-of-sequence token (or another special token that ends the turn) was sampled. A reasoning and tool
calls are the agent's in the template's spelling, since the chat does not say how they were sampled.

A template may change a message: strip it, put an empty reasoning before it, drop earlier reasoning. Then the text that
was sampled, or what it was sampled after, is not known any more, and the chat is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateError

from mgrpo.engine.model.pieces import for_pieces

Message = Mapping[str, Any]
Piece = tuple[list[int], bool]  # tokens, and whether the agent sampled them
# Arguments of `apply_chat_template` that are given here.
TAKEN = ("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict")
STRUCTURED = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # of a message, beside its text


class Template(NamedTuple):
    """Hold a tokenizer with a chat template, and what it is called with.

    options: further arguments of the template. where: which chat it is, for errors.
    """

    tokenizer: Any
    tools: list[Any] | None
    options: Mapping[str, Any]
    where: str

    def text(self, messages: list[Message], prompt: bool) -> str:
        """Return the text of a chat; prompt: with the beginning of the agent's reply."""
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tools=self.tools, tokenize=False, add_generation_prompt=prompt, **self.options
            )
        except TemplateError as error:
            raise ValueError(f"{self.where}: the chat template refuses the chat: {error}") from error
        return rendered

    def ids(self, text: str, *, begin: bool = False) -> list[int]:
        """Return the tokens of a piece of a text. begin: whether it is the first piece."""
        tokenizer = self.tokenizer if begin else for_pieces(self.tokenizer)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def template_of(tokenizer: Any, tools: Any, options: Any, where: str) -> Template:
    """Return a template. tools: a list, or its JSON. Raises ValueError, after `where`, for anything else."""
    if tokenizer is None:
        raise ValueError(f"{where}: got text and no tokenizer, expected one, or token ids")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, tools: got {tools[:60]!r}, expected a list, or its JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}, tools: got {type(tools).__name__}, expected a list of tools")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"{where}, chat_template_kwargs: got {type(options).__name__}, expected a dictionary")
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if taken := sorted(options.keys() & set(TAKEN)):
        raise ValueError(f"{where}, chat_template_kwargs: got {taken[0]}, expected arguments of the template itself")
    return Template(tokenizer, tools or None, options, where)


def read_chat(messages: list[Message], first: int, template: Template) -> list[Piece]:
    """Return the tokens of a chat up to the agent's last message; its messages from `first` on are the agent's.

    A message with a `weight` of 0, as OpenAI's files for training have it, is not. Raises ValueError for a chat in
    which it is not known exactly what the agent wrote.
    """
    pieces: list[Piece] = []
    where, done = template.where, ""
    for i, message in enumerate(messages):
        if i < first or not _is_agents(message, f"{where}, message {i}"):
            continue
        before = template.text(messages[:i], True) if i else ""
        after = template.text(messages[: i + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"{where}, message {i}: the chat template changes earlier messages, or the beginning of this one: "
                "expected one that does not, or token ids"
            )
        pieces.append((template.ids(before[len(done) :], begin=not done), False))
        pieces += _said(after[len(before) :], message, template, f"{where}, message {i}", begin=not before)
        done = after
    return pieces


def _is_agents(message: Message, where: str) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"{where}, weight: got {weight!r}, expected 0 or 1")
    return message["role"] == "assistant" and weight != 0


def _said(said: str, message: Message, template: Template, where: str, *, begin: bool) -> list[Piece]:
    """Return the tokens of a message: the agent's up to the token that ended its turn, then the template's."""
    text, structured = _text(message, where), any(message.get(name) for name in STRUCTURED)
    at = said.rfind(text) if structured else said.find(text)
    if at < 0:
        raise ValueError(f"{where}: the chat template changes the text {text[:60]!r}: expected it to the letter")
    ids = template.ids(said, begin=begin)
    ends = _ends(ids, template.tokenizer)
    if ends:
        own, rest = ids[: ends[-1] + 1], ids[ends[-1] + 1 :]
        until = said.rfind(template.tokenizer.decode(own[-1:]))
    else:  # no token ends the turn: of what follows the text nothing was sampled
        until = len(said) if structured else at + len(text)
        own, rest = template.ids(said[:until], begin=begin), template.ids(said[until:])
    around = [] if structured else [said[:at], said[at + len(text) : until]]
    for written in around:
        if written.strip():
            raise ValueError(
                f"{where}: the chat template writes {written[:60]!r} beside the message's text: expected it in the "
                "beginning of the reply (chat_template_kwargs), in the message, or token ids"
            )
    return [(own, True), (rest, False)]


def _ends(ids: list[int], tokenizer: Any) -> list[int]:
    """Return where tokens stand that may have ended a turn: end-of-sequence tokens, or else other special ones."""
    found = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return found or [i for i, token in enumerate(ids) if token in tokenizer.all_special_ids]


def _text(message: Message, where: str) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{where}, content: got {type(content).__name__}, expected text")
    return content or ""
