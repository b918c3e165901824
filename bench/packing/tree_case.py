"""Make the trajectories that the trees are measured on, and compute the fewest tokens that any tree of them has.

Legend: N trajectories of T tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

ROLLOUTS, PROMPT, TURN, SAMPLED = 16, 512, 320, 256
SHARERS = (4, 2)  # rollouts that share the first and the second turn after the prompt
WORDS = (
    f"tree: queries of {ROLLOUTS} rollouts that share a prompt of {PROMPT} tokens; of the turns ({SAMPLED} tokens "
    f"sampled, {TURN - SAMPLED} from a tool) the first is shared by 4 rollouts each, the second by 2; "
    "1000 to 4000 tokens after the prompt; int64, every token computed"
)


@dataclass(frozen=True)
class Case:
    """Hold trajectories: n is tokens_T[offsets_N1[n]:offsets_N1[n + 1]], of query groups_N[n]."""

    tokens_T: NDArray[np.int64]
    sampled_T: NDArray[np.bool_]
    logprobs_T: NDArray[np.float32]
    offsets_N1: NDArray[np.int64]
    groups_N: NDArray[np.int64]
    advantages_N: NDArray[np.float64]

    @property
    def rows_N(self) -> NDArray[np.int64]:
        return np.diff(self.offsets_N1)


def make(queries: int) -> Case:
    """Make the trajectories of some queries."""
    random = np.random.default_rng(queries)
    lengths_N = PROMPT + random.integers(1000, 4001, queries * ROLLOUTS)
    tokens = [t for lengths_R in lengths_N.reshape(queries, -1) for t in _query(random, lengths_R)]
    places = np.concatenate([np.arange(length) for length in lengths_N]) - PROMPT
    tokens_T = np.concatenate(tokens)
    return Case(
        tokens_T,
        (places >= 0) & (places % TURN < SAMPLED),
        (-(tokens_T % 97) / 64).astype(np.float32),  # equal where the tokens are equal
        np.concatenate([[0], np.cumsum(lengths_N)]),
        np.arange(queries).repeat(ROLLOUTS),
        random.normal(size=len(lengths_N)),
    )


def _query(random: np.random.Generator, lengths_R: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Draw the tokens of a query's rollouts. Rollouts that share a turn are neighbours."""
    tokens_RL = random.integers(0, 150_000, (ROLLOUTS, lengths_R.max()))
    tokens_RL[:, :PROMPT] = tokens_RL[0, :PROMPT]
    for turn, sharers in enumerate(SHARERS):
        begin = PROMPT + turn * TURN
        shared = tokens_RL[::sharers, begin : begin + TURN]
        tokens_RL[:, begin : begin + TURN] = shared.repeat(sharers, axis=0)
    return [row[:length] for row, length in zip(tokens_RL, lengths_R, strict=True)]


def distinct_prefixes(case: Case) -> int:
    """Return the fewest tokens that need computing.

    If the trajectories are sorted, by any order of tokens, each adds the tokens that it does not share with the one
    before.
    """
    tokens = sorted(case.tokens_T[begin:end].tobytes() for begin, end in pairwise(case.offsets_N1.tolist()))
    return len(case.tokens_T) - sum(_common(a, b) for a, b in pairwise(tokens))


def _common(a: bytes, b: bytes) -> int:
    shorter = min(len(a), len(b)) // 8
    differ = np.frombuffer(a, np.int64, shorter) != np.frombuffer(b, np.int64, shorter)
    return int(differ.argmax()) if differ.any() else shorter
