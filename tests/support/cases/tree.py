"""Make random forests for the tests of prefix trees, columns of a batch of them, and calls with these."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mgrpo import _packing as packing

Sequences = list[list[int]]


@st.composite
def forests(draw: st.DrawFn, most: int = 12) -> Sequences:
    """Draw sequences that fork off earlier ones, with identical ones and ones that are a prefix of another."""
    token = st.sampled_from([0, 1, 2, -(2**31), 2**31 - 1])
    sequences: Sequences = []
    for _ in range(draw(st.integers(0, most))):
        stem = draw(st.sampled_from(sequences)) if sequences and draw(st.booleans()) else []
        tokens = stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(token, max_size=6))
        sequences.append(tokens or [0])
    return sequences


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def flat(sequences: Sequences, dtype: Any = np.int64) -> tuple[NDArray[Any], NDArray[np.int64]]:
    tokens = np.array(list(itertools.chain(*sequences)), dtype)
    return tokens, np.cumsum([0, *map(len, sequences)], dtype=np.int64)


def lengths(sequences: Sequences) -> NDArray[np.int64]:
    return ints([len(tokens) for tokens in sequences])


LOGPROBS = ("old_logprobs", "sampler_logprobs", "ref_logprobs")


def random_batch(sequences: Sequences, seed: int, names: Any = LOGPROBS, dtype: Any = np.int64) -> dict[str, Any]:
    """Draw columns for the sequences: as many rows as tokens or one fewer, exact merged weights and advantages."""
    random = np.random.default_rng(seed)
    tokens, offsets = flat(sequences, dtype)
    count = len(sequences)
    return {
        "tokens": tokens,
        "offsets": offsets,
        "sampled": random.random(len(tokens)) < 0.8,
        "rows": np.maximum(lengths(sequences) - random.integers(0, 2, count), 1),
        "advantages": random.choice([-2.0, -1.0, 0.0, 1.0, 3.0], count) * 27720 / 2**15,
        "weights": random.choice([0.0, 1.0, 1.0, 2.0], count) / 64,
        "logprobs": {name: random.choice([-1.5, -1.75], len(tokens)).astype(np.float32) for name in names},
    }


def fill(batch: dict[str, Any], ids: Any, shared: Any, merge: bool = True, **options: Any) -> Any:
    head = [batch[name] for name in ("tokens", "offsets", "sampled")]
    tail = [batch[name] for name in ("rows", "advantages", "weights")]
    logprobs = {f"{name}_T": values for name, values in batch["logprobs"].items()}
    return packing.tree_fill(*head, ints(ids), ints(shared), *tail, **logprobs, merge=merge, **options)


def trajectories(batch: dict[str, Any], ids: Any) -> list[dict[str, Any]]:
    """Return the columns as one dictionary per trajectory."""
    out = []
    for n in ids:
        span = slice(batch["offsets"][n], batch["offsets"][n + 1])
        columns = {name: values[span].tolist() for name, values in batch["logprobs"].items()}
        out.append(
            {
                "tokens": batch["tokens"][span].tolist(),
                "sampled": batch["sampled"][span].tolist(),
                "rows": int(batch["rows"][n]),
                "advantage": float(batch["advantages"][n]),
                "weight": float(batch["weights"][n]),
                **columns,
            }
        )
    return out
