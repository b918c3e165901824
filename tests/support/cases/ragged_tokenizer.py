"""Make a tokenizer whose tokens are parts of characters and of stop strings."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from toy import EOS


def ragged_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose pieces cut characters and words anywhere."""
    pieces = [b"\n", b"a", b"b", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x99\x82", b"ab", b"b\na", b" "]
    pieces += [b"a\n", b"\xa9b", b"</", b"s>", b"\xac\n\xe2"]
    hidden = [
        c for c in range(256) if not chr(c).isprintable() or chr(c) in " \xad"
    ]  # in the order in which GPT-2 writes bytes
    shown = {c: chr(256 + hidden.index(c)) if c in hidden else chr(c) for c in range(256)}
    texts = ["".join(shown[byte] for byte in piece) for piece in pieces]
    texts += [f"w{i}" for i in range(256 - len(texts))]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate([EOS, *texts])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


RAGGED = ragged_tokenizer()
# Any token, and sequences that make up one of the tests' stop strings.
FRAGMENTS = [(i,) for i in range(18)] + [(4, 5), (4, 14), (6, 7), (6, 17), (8, 9), (15, 16), (1, 1)]
