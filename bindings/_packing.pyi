from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

Ragged: TypeAlias = NDArray[Any] | Sequence[NDArray[Any]]  # one array (T,), or one per trajectory

def align(
    counts_R: NDArray[np.int64],
    target: int,
    mode: Literal["sampled", "expected"],
    seed: int,
    keys_R: NDArray[np.uint64],
) -> NDArray[np.float64]: ...
def trainable_rows(offsets_N1: NDArray[np.int64], sampled_T: Ragged) -> NDArray[np.int64]: ...
def plan(
    lengths_N: NDArray[np.int64],
    cap: int,
    ranks: int = 1,
    cost: tuple[float, float] = (1.0, 0.0),
    *,
    groups_N: NDArray[np.int64] | None = None,
    mini_batches: int = 1,
    seed: int = 0,
    allow_empty: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def l2_bound(lengths_N: NDArray[np.int64], cap: int) -> int: ...
@overload
def fill(
    tokens_T: Ragged,
    offsets_N1: NDArray[np.int64],
    sampled_T: Ragged,
    ids_B: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    advantages_N: NDArray[Any],
    weights_N: NDArray[Any],
    *,
    old_logprobs_T: Ragged | None = None,
    sampler_logprobs_T: Ragged | None = None,
    ref_logprobs_T: Ragged | None = None,
    bins_M1: None = None,
    live: Literal["weight", "advantage"] | None = None,
    narrow: bool = False,
    arena: Arena | None = None,
    threads: int = 0,
) -> dict[str, Any]: ...
@overload
def fill(
    tokens_T: Ragged,
    offsets_N1: NDArray[np.int64],
    sampled_T: Ragged,
    ids_B: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    advantages_N: NDArray[Any],
    weights_N: NDArray[Any],
    *,
    old_logprobs_T: Ragged | None = None,
    sampler_logprobs_T: Ragged | None = None,
    ref_logprobs_T: Ragged | None = None,
    bins_M1: NDArray[np.int64],
    live: Literal["weight", "advantage"] | None = None,
    narrow: bool = False,
    arena: Arena | None = None,
    threads: int = 0,
) -> list[dict[str, Any]]: ...
def from_lists(lists_N: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

class Arena:
    def __init__(self, allocate: Callable[[int], Any] | None = None) -> None: ...
    @property
    def held(self) -> int: ...

def tree_plan(
    tokens_T: NDArray[Any],
    offsets_N1: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    cap: int,
    groups_N: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
@overload
def tree_fill(
    tokens_T: NDArray[Any],
    offsets_N1: NDArray[np.int64],
    sampled_T: NDArray[Any],
    ids_B: NDArray[np.int64],
    shared_B: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    advantages_N: NDArray[Any],
    weights_N: NDArray[Any],
    *,
    old_logprobs_T: NDArray[np.float32] | None = None,
    sampler_logprobs_T: NDArray[np.float32] | None = None,
    ref_logprobs_T: NDArray[np.float32] | None = None,
    merge: bool = True,
    bins_M1: None = None,
    arena: Arena | None = None,
    threads: int = 0,
) -> dict[str, NDArray[Any]]: ...
@overload
def tree_fill(
    tokens_T: NDArray[Any],
    offsets_N1: NDArray[np.int64],
    sampled_T: NDArray[Any],
    ids_B: NDArray[np.int64],
    shared_B: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    advantages_N: NDArray[Any],
    weights_N: NDArray[Any],
    *,
    old_logprobs_T: NDArray[np.float32] | None = None,
    sampler_logprobs_T: NDArray[np.float32] | None = None,
    ref_logprobs_T: NDArray[np.float32] | None = None,
    merge: bool = True,
    bins_M1: NDArray[np.int64],
    arena: Arena | None = None,
    threads: int = 0,
) -> list[dict[str, NDArray[Any]]]: ...
