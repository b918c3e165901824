"""Pieces of a text: encoded and decoded to the letter by tokenizers that add, take or tidy up spaces of whole texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mgrpo.engine.inference.sampler import Ending
from mgrpo.engine.model.pieces import end_tokens, for_pieces, generation_config

WORDS = ["</s>", "▁", "▁a", "▁b", "a", "b", ".", "▁.", ",", "\n"]
BYTES = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def wrapped(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)


def llama() -> PreTrainedTokenizerFast:
    """Return a tokenizer like that of Llama 2: a normalizer puts the space in front."""
    merges = [("▁", "a"), ("▁", "b"), ("▁", ".")]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    return wrapped(tokenizer)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer like that of T5 or of a newer Llama: the pre-tokenizer puts the space in front."""
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 - 0.1 * (len(word) == 1)) for word in WORDS], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return wrapped(tokenizer)


def roberta() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that puts a space in front, and tidies up spaces before punctuation."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(BYTES)}, unk_token="</s>"))
    split = pre_tokenizers.Split("", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True), split])
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, clean_up_tokenization_spaces=True)


MAKERS = [llama, lambda: metaspace("first"), lambda: metaspace("always"), roberta]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("text", ["a", " a", "  a", "a .", " .", "a b a", "b a , b", "</s>a", "a</s> b"])
def test_a_piece_is_encoded_and_decoded_to_the_letter(make, text):
    tokenizer = make()
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = for_pieces(tokenizer).encode(text, add_special_tokens=False)
    assert for_pieces(tokenizer).decode(ids, clean_up_tokenization_spaces=False) == text
    assert Ending(tokenizer, []).text([*ids, 0]) == text
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before, "the tokenizer itself stays as it is"


@pytest.mark.parametrize("make", MAKERS)
def test_a_stop_string_that_begins_with_a_space_is_seen_at_the_beginning_of_a_turn(make):
    tokenizer = make()
    ids = for_pieces(tokenizer).encode(" .", add_special_tokens=False)
    assert Ending(tokenizer, [" ."]).reached(ids)
    assert Ending(tokenizer, [" ."]).length(ids + ids) == len(ids)
    assert not Ending(tokenizer, [" .."]).reached(ids)


def test_a_tokenizer_that_adds_nothing_is_used_as_it_is():
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = wrapped(tokenizer)
    assert for_pieces(made) is made


class InPython(PreTrainedTokenizerBase):
    """A tokenizer without the library's, whose texts begin with `first`."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first

    def encode(self, text: str, **options: Any) -> list[int]:
        return [5]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.first]


def test_a_tokenizer_whose_space_cannot_be_switched_off_is_refused():
    with pytest.raises(ValueError, match="InPython given, which puts a space in front of each text: expected"):
        for_pieces(InPython("▁a"))
    plain = InPython("a")
    assert for_pieces(plain) is plain


@pytest.mark.parametrize("between", [1, 2, 40])
def test_a_stop_string_is_seen_across_ids_that_decode_to_nothing(between):
    tokenizer = llama()
    a, b = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b"))
    nothing = [len(WORDS) + 7] * between  # rows of the embedding that are there for its size alone
    assert tokenizer.decode(nothing) == ""
    ending = Ending(tokenizer, ["ab"])
    assert ending.reached([b, a, *nothing, b]) and ending.length([b, a, *nothing, b, a]) == between + 3
    assert not ending.reached([b, a, *nothing])


def test_each_end_of_sequence_token_ends_a_turn_and_is_left_out_of_its_text():
    tokenizer = llama()
    a, b, stop = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "."))
    ending = Ending(tokenizer, [], end_tokens(tokenizer, GenerationConfig(eos_token_id=[stop])))
    assert [ending.reached([a, last]) for last in (b, stop, 0)] == [False, True, True]
    assert ending.text([a, stop]) == "a" and ending.length([a, stop, b]) == 2
    assert Ending(tokenizer, []).text([a, stop]) == "a." and not Ending(tokenizer, []).reached([a, stop])


def test_the_generation_config_names_end_of_sequence_tokens(tmp_path):
    tokenizer = llama()
    assert end_tokens(tokenizer, generation_config(tmp_path)) == {0}
    for given, copied, found in [(5, False, {0, 5}), (5, True, {0}), ([5, 0, 6], True, {0, 5, 6}), (None, False, {0})]:
        saved = {"eos_token_id": given, "_from_model_config": copied}
        (tmp_path / "generation_config.json").write_text(json.dumps(saved))
        assert end_tokens(tokenizer, generation_config(tmp_path)) == found
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        generation_config(tmp_path)
