"""Encode and decode pieces of a call's text with its tokenizer, to the letter, and say which tokens end a turn.

A call's text is made of pieces: a prompt, turns and observations. Tokenizers are made for whole texts. Those with
SentencePiece's conventions put a space before each text that they encode and take one from each that they decode, and
some tidy up spaces before punctuation. Of a piece in the middle of a text, both would change what was written.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase

PREFIXES = ("▁", "Ġ", " ")  # how tokenizers write the space in front of a token


def for_pieces(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy, that neither adds a space in front of a text nor takes one from there.

    Pass clean_up_tokenization_spaces=False to its `decode`. Raises ValueError if the tokenizer is written in Python and
    adds a space: there is no general way to switch that off.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        _check_no_prefix(tokenizer)
        return tokenizer
    backend = tokenizer.backend_tokenizer
    parts = {name: _state(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    changed = {name: _without_prefix(part, name) for name, part in parts.items()}
    if changed == parts:
        return tokenizer
    whole = json.loads(backend.to_str()) | changed
    copied = copy.deepcopy(tokenizer)
    copied._tokenizer = Tokenizer.from_str(json.dumps(whole))
    return copied


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> frozenset[int]:
    """Return the ids that end a turn: the tokenizer's end-of-sequence token and those of the generation config.

    A single id that transformers copied from the model's config does not count: models made without one have the
    default of their class there, which may be any token.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if generation is None or generation.eos_token_id is None:
        return frozenset(own)
    given = generation.eos_token_id
    if isinstance(given, int):
        given = [] if generation._from_model_config else [given]
    return frozenset([*own, *given])


def generation_config(folder: str | Path) -> GenerationConfig | None:
    """Return the generation config of a model directory, or None if it has none.

    Raises ValueError if it cannot be read.
    """
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/generation_config.json cannot be read: {error}") from error


def _state(part: Any) -> Any:
    """Return the description of a part of a tokenizer, or None for a part that it has not."""
    return None if part is None else json.loads(part.__getstate__())


def _without_prefix(part: Any, name: str) -> Any:
    """Return the description of a part of a tokenizer without what adds or takes spaces. name: which part it is."""
    if isinstance(part, list):
        return [_without_prefix(each, name) for each in part if not _prepends(each)]
    if not isinstance(part, dict):
        return part
    if _prepends(part):
        return None
    kind = part.get("type")
    part = {key: _without_prefix(value, name) for key, value in part.items()}
    if kind == "Metaspace":
        part["prepend_scheme"] = "never"
    elif kind == "ByteLevel" and name == "pre_tokenizer":
        part["add_prefix_space"] = False
    elif kind == "Strip" and name == "decoder":
        part |= {"start": 0, "stop": 0}
    elif kind == "WordPiece" and name == "decoder":
        part["cleanup"] = False
    return part


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"


def _check_no_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a tokenizer adds a space in front of a text."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    if str(tokens[0]).startswith(PREFIXES):  # some give bytes
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} given, which puts a space in front of each text: expected one of "
            "the library `tokenizers`, such as AutoTokenizer makes of a tokenizer.json, where that can be switched off"
        )
