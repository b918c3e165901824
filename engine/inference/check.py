"""Hold the in-process sampler to the model before it samples: what its steps compute against the model itself.

The same small copy of the config as the trainer's check uses (model/probe.py), in float64. Three calls are played as
turns are: a prompt, tokens one by one, an observation of several tokens, and tokens again. The first is longer than any
window, the second joins while it is under way, and the third begins with a copy of the first one's prompt, so that
every way in which the cache attends, and carries states on, is seen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.engine.inference.kv_cache import CachedLayout, KVCache
from mgrpo.engine.model.attention import UnsupportedAttentionError, hidden_states, output_head
from mgrpo.engine.model.logits import LogitMap
from mgrpo.engine.model.probe import FAILURES, ROUNDING, SMALL, Comparison, small_copy

LENGTHS = (53, 31)  # tokens of the two calls that differ
PROMPTS = (24, 7, 24)  # tokens of each call's prompt; the third call is the first one again
JOINS = (0, 2, 4)  # the step in which each call begins
OBSERVED, OBSERVATION = 9, 5  # after so many tokens a call is shown as many at once
CHECKED = "mgrpo_sampler_checked"  # attribute of a model that has passed: for calls of how many tokens


@torch.no_grad()
def check_sampler(model: PreTrainedModel, longest: int | None = None) -> None:
    """Compare the sampler's log-probs with the model's own. longest: no call has more tokens; None: any may come.

    Raises ValueError if it cannot sample the model exactly.
    """
    most = math.inf if longest is None else longest
    if vars(model).get(CHECKED, 0) >= most:
        return
    small = small_copy(model, longest)
    tried, limit = (model, ROUNDING[model.dtype]) if small is None else (small, SMALL)
    what = f"sampler: {type(model).__name__}"
    comparison = Comparison(what, tried, LENGTHS, limit)
    to_logits = comparison.find_map()
    try:
        found = _sampled(tried, [*comparison.ids, comparison.ids[0]], to_logits)
    except (UnsupportedAttentionError, *FAILURES) as error:
        raise ValueError(f"{what} {error}: expected layers that a cache can carry from token to token") from error
    own = comparison.own()
    comparison.require(found, [*own, own[0]], "keeps more from token to token than keys, values and states")
    vars(model)[CHECKED] = most


def _sampled(model: PreTrainedModel, calls: list[Tensor], to_logits: LogitMap) -> list[Tensor]:
    """Return the log-probs of each call's tokens but the first, as steps of the sampler compute them."""
    cache, head = KVCache(len(calls), max(map(len, calls))), output_head(model)
    cache.reserve(max(map(len, calls)))
    found: list[list[Tensor]] = [[] for _ in calls]
    starts, step = [0] * len(calls), 0
    while any(start < len(ids) for start, ids in zip(starts, calls, strict=True)):
        if step == JOINS[-1]:
            starts[-1] = _copy_prompt(cache, found, min(PROMPTS[-1], len(calls[-1])) - 1)
        live = [i for i, ids in enumerate(calls) if step >= JOINS[i] and starts[i] < len(ids)]
        new = [calls[i][starts[i] :][: _count(i, starts[i])] for i in live]
        layout = CachedLayout(cache, live, [starts[i] for i in live], list(map(len, new)), model.device)
        hidden_TH = hidden_states(model, torch.cat(new), layout.positions_T, layout)
        logps_TV = to_logits(F.linear(hidden_TH, head.weight, head.bias)).log_softmax(-1)
        for i, rows in zip(live, logps_TV.split(list(map(len, new))), strict=True):
            found[i].append(rows)
            starts[i] += len(rows)
        step += 1
    return [torch.cat(rows)[:-1].gather(-1, ids[1:, None])[:, 0] for rows, ids in zip(found, calls, strict=True)]


def _copy_prompt(cache: KVCache, found: list[list[Tensor]], tokens: int) -> int:
    """Let the last call begin with so many tokens of the first, and their log-probs; returns their number."""
    cache.copy(0, len(found) - 1, tokens)
    found[-1].append(torch.cat(found[0])[:tokens])
    return tokens


def _count(call: int, start: int) -> int:
    """Return how many tokens a call adds in a step: its prompt, an observation or one."""
    if start == 0:
        return PROMPTS[call]
    return OBSERVATION if start == PROMPTS[call] + OBSERVED else 1
