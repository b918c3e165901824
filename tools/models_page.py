"""Write docs/models.md, which models are exact or refused, from what tests/model/model_sweep.py found.

`python tools/pages.py` writes the page from tests/model/model_sweep.json.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

FOUND = Path(__file__).resolve().parents[1] / "tests" / "model" / "model_sweep.json"
LONGEST = 200  # characters of a reason
ORDER = {"exact": 0, "refused": 1, "not built": 2, "wrong": 3, "crash": 4}
PAGE = """\
# Models

<!-- Written by tools/pages.py from tests/model/model_sweep.json. Change tools/models_page.py, not this page. -->

A model is trained exactly, or refused with an error that names what differs. Before the first step every model is
compared with its own forward on random ids: sequences packed in one row against each one alone, in eval and training
mode, on a small copy of its config in float64 and on its real weights, and the in-process sampler's cache against
both. The ids go beyond every window, chunk and change of RoPE of the copy. This takes seconds.

Exact are, packed and in the sampler: sliding windows, chunked attention, attention sinks (gpt-oss), capped scores and
logits (Gemma 2, 3, 4), scaled logits (Granite, Cohere), latent attention and value heads of another size (DeepSeek),
layers that share keys and values (Gemma 4), and hybrids, whose recurrent layers begin anew with each sequence. On a
GPU, in bfloat16, flash attention runs all of these but capped scores and sinks, which run through torch's
FlexAttention. That is a kernel of Triton, compiled when it is first called; its mathematics is tested on a CPU in
float64, and it has not run on a GPU here yet.

## Vision-language checkpoints

A directory whose config describes a model that also sees or hears (Gemma 3, Qwen2.5-VL, Qwen3-VL, Llama 4, …) is
trained on text alone:

* It is loaded whole, and its log-probs are those of the whole model given a text and no image. With M-RoPE the three
  positions of a text's token are equal, so that plain positions are exact.
* The weights of towers and projectors run nowhere and are frozen: no gradient, no weight decay. They are in
  checkpoints and published with the rest, so that nothing is lost and a server of the whole checkpoint gets every
  weight. A caller's own model still takes images in its own forward.
* Published weights have the names that transformers gives them in memory, such as `model.language_model.layers.0…`.
  vLLM's classes of these models rename them and those of the files alike. A server is asked before anything is sent
  to it, and names the first weight that it does not expect.
* A checkpoint that lacks its tower is refused: its name in `architectures` has to be that of a causal LM.

## Every type of causal LM

{total} types have a causal LM in transformers {transformers}: {counts}. Of each, a tiny model with random weights in
float64 is taken over by a `Policy`; log-probs over packed rows, their gradients, and log-probs by the sampler's cache
are compared with the model's own forward on each sequence alone, to 1e-3. Commit {commit}, torch {torch}, by
`{command}`.

A type that says "not built" was not tried: it has no config of so few weights, its model gives no log-probs of plain
token ids by itself, or it needs a package that is not there. When such a model is loaded, it is checked like any
other.

| type | | reason |
|---|---|---|
"""


def row(name: str, outcome: str, said: str) -> str:
    """Return a line of the table."""
    reason = said if len(said) <= LONGEST else f"{said[:LONGEST].rsplit(' ', 1)[0]} …"
    for mark in "\\|`*_<>[]":
        reason = reason.replace(mark, f"\\{mark}")
    return f"| `{name}` | {outcome} | {reason} |\n"


def page() -> str:
    """Return the page."""
    found = json.loads(FOUND.read_text())
    kinds: dict[str, list[str]] = found["kinds"]
    counts = Counter(outcome for outcome, _ in kinds.values())
    head = PAGE.format(
        total=len(kinds),
        counts=", ".join(f"{counts[outcome]} {outcome}" for outcome in ORDER),
        commit=found["commit"],
        command=found["command"],
        **found["versions"],
    )
    ordered = sorted(kinds.items(), key=lambda kind: (ORDER[kind[1][0]], kind[0]))
    return head + "".join(row(name, outcome, said) for name, (outcome, said) in ordered)
