"""Define prefix trees with plain dictionaries; `tree_plan` and `tree_fill` are compared with these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

Prefix = tuple[int, ...]


def prefixes(sequences: Sequence[Sequence[int]]) -> set[Prefix]:
    """Return the distinct prefixes: each is one token of the trie."""
    return {tuple(tokens[: i + 1]) for tokens in sequences for i in range(len(tokens))}


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def next_fit(sequences: Sequence[Sequence[int]], cap: int) -> int:
    """Count TRL's micro-batches: one open row in the given order, closed when the next sequence does not fit."""
    bins, row = 0, list[Sequence[int]]()
    for tokens in sequences:
        if not row or len(prefixes([*row, tokens])) > cap:
            bins, row = bins + 1, []
        row.append(tokens)
    return bins


def fewest_tokens(sequences: Sequence[Sequence[int]], cap: int) -> int:
    """Return a lower bound on the tokens of any packing.

    The tokens after a prefix of d tokens have room for cap - d in each micro-batch; this determines how many
    micro-batches hold the prefix. (The distinct prefixes are fewer: a cap may make them impossible to reach.)
    """
    held, after = (
        Counter[Prefix](),
        Counter[Prefix](),
    )  # held: micro-batches with the prefix; after: tokens beyond it, in all of these
    for prefix in sorted(prefixes(sequences), key=len, reverse=True):
        held[prefix] = max(held[prefix], 1)
        if after[prefix]:
            held[prefix] = max(held[prefix], ceil(after[prefix] / (cap - len(prefix))))
        after[prefix[:-1]] += held[prefix] + after[prefix]
        held[prefix[:-1]] = max(held[prefix[:-1]], held[prefix])
    return after[()]


def segment_ends(sequences: Sequence[Sequence[int]]) -> set[Prefix]:
    """Return the prefixes at which a sequence ends, or after which sequences differ."""
    following: dict[Prefix, set[int]] = {}
    for tokens in sequences:
        for i in range(len(tokens) - 1):
            following.setdefault(tuple(tokens[: i + 1]), set()).add(tokens[i + 1])
    forks = {prefix for prefix, tokens in following.items() if len(tokens) > 1}
    return forks | {tuple(tokens) for tokens in sequences}


def prediction_rows(
    batch: Sequence[dict[str, Any]], logprobs: Sequence[str], *, merge: bool
) -> list[tuple[Prefix, int, int, float, float, tuple[bytes, ...]]]:
    """Return (prefix, target, first trajectory, weight, advantage, bits of the log-probs) of every row.

    `batch`: dictionaries of tokens, sampled, rows, advantage, weight, and each of `logprobs`.
    """
    merged: dict[Any, list[tuple[float, float, int]]] = {}
    for b, given in enumerate(batch):
        tokens = given["tokens"]
        for t in range(1, min(given["rows"] + 1, len(tokens))):
            if not given["sampled"][t] or given["weight"] == 0:
                continue
            bits = tuple(np.float32(given[name][t]).tobytes() for name in logprobs)
            key: tuple[Any, ...] = (tuple(tokens[:t]), tokens[t], bits, given["advantage"] < 0)
            if not merge:
                key = (*key, b)
            merged.setdefault(key, []).append((given["weight"], given["advantage"], b))
    rows = []
    for (prefix, target, bits, *_), terms in merged.items():
        weight = sum(w for w, _, _ in terms)
        advantage = sum(w * a for w, a, _ in terms) / weight
        rows.append((prefix, target, terms[0][2], weight, advantage, bits))
    return rows
