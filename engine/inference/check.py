"""Hold the in-process sampler to the model before it samples: a prefill, then token by token, against the model itself.

The same small copy of the config as the trainer's check uses (model/probe.py), in float64: two calls of different
lengths side by side, one of them longer than any window, so that every way in which the cache attends is seen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from mgrpo.engine.inference.kv_cache import CachedLayout, KVCache
from mgrpo.engine.model.attention import UnsupportedAttentionError, hidden_states, output_head
from mgrpo.engine.model.logits import LogitMap
from mgrpo.engine.model.probe import SMALL, Comparison, small_copy

LENGTHS, PREFILLED = (53, 31), (24, 7)  # tokens of the two calls, and how many of each are there at the start
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
    if small is not None:
        what = f"sampler: {type(model).__name__}"
        comparison = Comparison(what, small, LENGTHS, SMALL)
        try:
            found = _sampled(small, comparison.ids, comparison.find_map())
        except (UnsupportedAttentionError, IndexError, RuntimeError) as error:
            raise ValueError(f"{what} {error}: expected attention that a key-value cache can carry") from error
        comparison.require(found, comparison.own(), "keeps more from token to token than keys and values")
    vars(model)[CHECKED] = most


def _sampled(model: PreTrainedModel, calls: list[torch.Tensor], to_logits: LogitMap) -> list[torch.Tensor]:
    """Return the log-probs of each call's tokens but the first, as steps of the sampler compute them."""
    cache, counts = KVCache(len(calls), max(map(len, calls))), list(PREFILLED)
    cache.reserve(max(map(len, calls)))
    found: list[list[torch.Tensor]] = [[] for _ in calls]
    starts = [0] * len(calls)
    while live := [i for i, ids in enumerate(calls) if starts[i] < len(ids)]:
        new = [counts[i] if starts[i] == 0 else 1 for i in live]
        layout = CachedLayout(cache, live, [starts[i] for i in live], new, model.device)
        ids_T = torch.cat([calls[i][starts[i] : starts[i] + n] for i, n in zip(live, new, strict=True)])
        hidden_TH = hidden_states(model, ids_T, layout.positions_T, layout)
        head = output_head(model)
        logps_TV = to_logits(F.linear(hidden_TH, head.weight, head.bias)).log_softmax(-1)
        for i, rows in zip(live, logps_TV.split(new), strict=True):
            found[i].append(rows)
            starts[i] += len(rows)
    return [torch.cat(rows)[:-1].gather(-1, ids[1:, None])[:, 0] for rows, ids in zip(found, calls, strict=True)]
