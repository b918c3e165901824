"""Say what keeps a sampler from drawing any token that it likes.

The trainer's log-probs are those of all tokens at the agent's temperature. A token that was drawn from a part of them
(the likeliest ones, those that a JSON schema allows), or from changed ones (a penalty, a bias), was drawn from another
distribution, and training on it would follow another gradient than the policy's. So such options are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Options of samplers (OpenAI's API, vLLM, SGLang, transformers), each with the values that leave all tokens as they
# are; None always does.
FREE: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "allowed_token_ids": (),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "watermarking": (False,),
}
# Names that SGLang gives to such options and that may mean something else outside a dictionary of options.
SHORT = ("json_schema", "regex", "ebnf")
# Arguments of vLLM's server by which it samples from another distribution, or reports the log-probs of another.
SERVER = (
    "--config",  # a file that may hold any of the others
    "--generation-config",
    "--logits-processors",
    "--logprobs-mode",
    "--override-generation-config",
    "--watermark",
    "--watermark-config",
)
WHY = "because the trainer's log-probs are those of all tokens"


def check_free(options: Mapping[str, Any], where: str, *, only_options: bool = True) -> None:
    """Check that a sampler with these options draws from all tokens, as they are. Unknown names are passed over.

    where: what the error puts before the option. only_options: whether the dictionary holds nothing but a sampler's
    options. Raises ValueError naming the option and what was given.
    """
    for name in (*FREE, *SHORT) if only_options else FREE:
        value, free = options.get(name), FREE.get(name, ())
        if value is not None and not any(value == each for each in free):
            expected = " or ".join(map(repr, free)) or "none"
            raise ValueError(f"{where}{name}: {value!r} given: expected {expected}, {WHY}")


def check_server(arguments: Iterable[str], key: str) -> None:
    """Check that arguments of a vLLM server leave the distribution that it samples, and its log-probs, as they are.

    key: what the error puts before the argument. Raises ValueError naming the argument.
    """
    # vLLM also takes an entry of a JSON argument by itself, as --argument.entry=value.
    named = (re.split(r"[=.]", argument)[0].replace("_", "-") for argument in arguments if argument.startswith("--"))
    for name in named:
        if name in SERVER:
            raise ValueError(
                f"{key}: {name} given: expected no argument that changes what the server of a trained agent samples "
                f"from, {WHY}"
            )
