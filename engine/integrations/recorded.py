"""Read rollouts that other programs recorded, as the ragged columns that `pack` and `advantages` take.

A row is a dictionary, from a line of JSON or a `datasets.Dataset`, in one of these forms:
* token ids, as in slime's `Sample`: `tokens`; `response_length`, how many of the last tokens are the response;
  `loss_mask` over these (null: all are the agent's; with `remove_sample` none is); and optionally `rollout_log_probs`.
  MrlX's queue has `tokens`, `responseLength` and `lossMask`. Its messages are not read, and its masks, which include
  the header of each of the agent's turns, are taken as they are.
* `messages` of a chat: those of the assistant are the agent's, but for those with `weight` 0.
* TRL's `prompt` and `completion`, two texts or two lists of messages: in the completion, the text or the assistant's
  messages are the agent's.
`reward` is a number, Python's or numpy's, or true or false (1 or 0), in all rows or in none.

A chat may have `tools` and `chat_template_kwargs`. Text is tokenized again, which may give other tokens than were
sampled, so it is better to record ids. Each text of the agent is tokenized separately, because it was sampled after
what the agent saw. What a chat template writes is not the agent's (`chats.py`). Nothing is added to a text, so a
completion without an end-of-sequence token has no end.

Legend: N trajectories, G groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mgrpo.engine.config.masks import check_free
from mgrpo.engine.integrations.chats import Template, read_chat, template_of

Row = Mapping[str, Any]
NUMPY = np.floating | np.integer | np.bool_  # of numpy's scalars, those that count as numbers here
FORMS = "tokens and response_length; or messages; or prompt and completion"


class Recorded(NamedTuple):
    """Hold N trajectories: an array each of tokens int64, sampled bool, sampler_logprobs float32 (nats, 0 elsewhere).

    rewards (N,). offsets (G + 1,): the bounds of the groups; keys (G,): the values that their rows have in `by`. A
    field that the rows lack, or that was not asked for, is None.
    """

    tokens: list[NDArray[np.int64]]
    sampled: list[NDArray[np.bool_]]
    rewards: NDArray[np.float64] | None
    sampler_logprobs: list[NDArray[np.float32]] | None
    offsets: NDArray[np.int64] | None
    keys: list[tuple[Any, ...]] | None


class _Tokens(NamedTuple):
    tokens: NDArray[np.int64]
    sampled: NDArray[np.bool_]
    logprobs: NDArray[np.float32] | None = None


def recorded(
    rows: Iterable[Row],
    tokenizer: Any = None,
    by: Sequence[str] = (),
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Recorded:
    """Return the rows' trajectories, sorted by group in the order of first appearance if `by` names their fields.

    tokenizer: one of transformers, needed for text; for messages it needs a chat template. by: the fields that make a
    group. For group-relative advantages that is the query, and the agent if there are several: ("agent",
    "group_index"). MrlX's queue has neither. tools, chat_template_kwargs: what the chat template was called with, for
    all rows or, as fields of the same names, for one.

    Raises ValueError, naming row and field, for a field that is missing, malformed, or in some rows only; for options
    of a sampler that was not free to draw every token (top_p, response_format, …, as fields or in `sampling_params`);
    and for a template that changes a message, its beginning, or earlier messages once others follow (as those do that
    drop earlier reasoning), since it is then not known what the agent sampled, or after what.
    """
    rows = list(rows)
    keys_N = [tuple(_field(row, name, n) for name in by) for n, row in enumerate(rows)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for n, key in enumerate(keys_N):  # a prompt may be a list of messages, which has no hash
        groups.setdefault(tuple(each if isinstance(each, Hashable) else repr(each) for each in key), []).append(n)
    order = [n for members in groups.values() for n in members]
    template = (tokenizer, tools, chat_template_kwargs)
    found = [_read(rows[n], template, f"row {n}") for n in order]
    offsets = np.cumsum([0, *map(len, groups.values())]) if by else None
    rewards = _of_all("reward", [_reward(rows[n], n) for n in order])
    return Recorded(
        [each.tokens for each in found],
        [each.sampled for each in found],
        None if rewards is None else np.array(rewards),
        _of_all("rollout_log_probs", [each.logprobs for each in found]),
        offsets,
        [keys_N[members[0]] for members in groups.values()] if by else None,
    )


def _read(row: Row, template: tuple[Any, Any, Any], where: str) -> _Tokens:
    """Read a row in any of the forms. template: tokenizer, tools, and further arguments of the chat template."""
    check_free(row, f"{where}, ", only_options=False)
    if isinstance(row.get("sampling_params"), Mapping):
        check_free(row["sampling_params"], f"{where}, sampling_params.")
    if "tokens" in row:
        return _from_tokens(row, where)
    if "messages" in row:
        return _from_messages(_messages(row, "messages", where), 0, _template(row, template, where), where)
    if not {"prompt", "completion"} <= row.keys():
        raise ValueError(f"{where}: got the fields {sorted(row)}, expected {FORMS}")
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        texts = _template(row, template, where)
        seen = list(texts.tokenizer(row["prompt"])["input_ids"])
        return _joined([(seen, False), (texts.ids(row["completion"]), True)])
    prompt, completion = (_messages(row, name, where) for name in ("prompt", "completion"))
    return _from_messages(prompt + completion, len(prompt), _template(row, template, where), where)


def _template(row: Row, given: tuple[Any, Any, Any], where: str) -> Template:
    """Return the template of a row, whose own tools and arguments go before those of all rows."""
    tokenizer, tools, options = given
    own = row.get("chat_template_kwargs") or {}
    if isinstance(own, Mapping) and isinstance(options, Mapping):
        own = {**options, **own}
    return template_of(tokenizer, tools if row.get("tools") is None else row["tools"], own or options, where)


def _from_tokens(row: Row, where: str) -> _Tokens:
    tokens = _numbers(row, "tokens", "iu", where)
    response = row.get("response_length", row.get("responseLength"))
    if not isinstance(response, int | np.integer) or not 0 <= response <= len(tokens):
        raise ValueError(f"{where}, response_length: got {response!r}, expected 0 to {len(tokens)}, as tokens has")
    sampled = np.zeros(len(tokens), bool)
    response = int(response)  # a narrow type of numpy's would overflow below
    own = slice(len(tokens) - response, None)
    mask = next((name for name in ("loss_mask", "lossMask") if row.get(name) is not None), None)
    sampled[own] = True if mask is None else _numbers(row, mask, "iub", where, response, only=(0, 1)).astype(bool)
    sampled &= not row.get("remove_sample", False)
    if row.get("rollout_log_probs") is None:
        return _Tokens(tokens, sampled)
    logprobs = np.zeros(len(tokens), np.float32)
    logprobs[own] = _numbers(row, "rollout_log_probs", "fiu", where, response)
    return _Tokens(tokens, sampled, np.where(sampled, logprobs, np.float32(0)))


def _numbers(
    row: Row, name: str, kinds: str, where: str, length: int | None = None, only: tuple[int, ...] = ()
) -> NDArray[Any]:
    """Return a field that must be a list of `length` finite numbers of these kinds; an empty list is of any kind.

    kinds: numpy's letters for dtypes. only: the values allowed; empty: all.
    """
    given = row[name]
    values = np.asarray(given) if isinstance(given, list | np.ndarray) and len(given) else np.zeros(0, np.int64)
    if not isinstance(given, list | np.ndarray) or values.ndim != 1 or values.dtype.kind not in kinds:
        raise ValueError(f"{where}, {name}: got {_short(given)}, expected a list of numbers")
    if length is not None and len(values) != length:
        raise ValueError(f"{where}, {name}: got {len(values)} numbers, expected {length}, as response_length says")
    if not np.isfinite(values).all() or (only and not np.isin(values, only).all()):
        raise ValueError(f"{where}, {name}: got {_short(given)}, expected numbers that are {only or 'finite'}")
    return values.astype(np.int64) if name == "tokens" else values


def _from_messages(messages: list[dict[str, Any]], first: int, template: Template, where: str) -> _Tokens:
    """Read messages; those of the assistant from `first` on are the agent's."""
    if first and messages[first - 1]["role"] == "assistant":
        raise ValueError(f"{where}, prompt: got an assistant's message at its end, expected another role's")
    return _joined(read_chat(list(messages), first, template))


def _messages(row: Row, name: str, where: str) -> list[dict[str, Any]]:
    given = row[name]
    if not isinstance(given, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in given):
        raise ValueError(f"{where}, {name}: got {_short(given)}, expected a list of messages, each with a role")
    return given


def _joined(pieces: list[tuple[list[int], bool]]) -> _Tokens:
    tokens = np.array([token for ids, _ in pieces for token in ids], np.int64)
    return _Tokens(tokens, np.array([own for ids, own in pieces for _ in ids], bool))


def _field(row: Row, name: str, n: int) -> Any:
    if row.get(name) is None:
        raise ValueError(f"row {n}, {name}: got none, expected one, as `by` names it")
    return row[name]


def _reward(row: Row, n: int) -> float | None:
    given = row.get("reward")
    if given is None:
        return None
    if not isinstance(given, int | float | NUMPY) or not np.isfinite(given):
        raise ValueError(f"row {n}, reward: got {_short(given)}, expected a finite number, True or False")
    return float(given)


def _of_all(name: str, values: list[Any]) -> list[Any] | None:
    """Return what all rows have, None if none has it. Raises ValueError if only some have it."""
    missing = sum(value is None for value in values)
    if 0 < missing < len(values):
        raise ValueError(f"{name}: got none in {missing} of {len(values)} rows, expected it in all or in none")
    return None if missing else values


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) < 80 else f"{text[:77]}..."
