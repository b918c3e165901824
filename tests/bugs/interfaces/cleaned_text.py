"""With a tokenizer that cleans up spaces, the environment's parse gets other text than the agent wrote.

clean_up_tokenization_spaces (set by Llama 3's tokenizer and GPT-2's older ones) turns " ." into ".", " n't" into "n't"
and so on, in code, in tools' arguments and in stop strings too: a stop string " ." is never found.
"""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mgrpo.engine.inference.sampler import Ending
from reproduction import cannot, fault, held

WORDS = ["<eos>", "x", "Ġ=", "Ġ[", "1", "Ġ,", "Ġ2", "]", "Ġ."]
WRITTEN, TEXT = [1, 2, 3, 4, 5, 6, 7, 8], "x = [1 , 2] ."


def given(clean: bool) -> tuple[str, bool]:
    """Return the text that parse gets of what was written, and whether the stop string " ." is found in it."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", clean_up_tokenization_spaces=clean)
    return Ending(tokenizer, []).text(WRITTEN), Ending(tokenizer, [" ."]).reached(WRITTEN)


if given(clean=False) != (TEXT, True):
    cannot(f"without clean-up: {given(clean=False)}")
text, stopped = given(clean=True)
found = f"written {TEXT!r}, given to parse {text!r}; the stop string ' .' found: {stopped}"
if text != TEXT or not stopped:
    fault(found)
held(found)
