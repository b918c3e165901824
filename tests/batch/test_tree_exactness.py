"""Training on a prefix tree is training on its trajectories one by one: log-probs, loss and gradients in float64.

The naive path runs every trajectory alone through a small transformer and sums the literal loss of each. The tree path
runs the packed tokens once, each attending to the keys that `tree_kv_index` lists, and takes the loss over the
prediction rows.

Legend: P packed tokens, L tokens of a trajectory, H width, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from cases.tree import LOGPROBS, fill, flat, forests, random_batch
from mgrpo import _packing as packing
from mgrpo.kernels import Objective, linear_grpo_loss
from mgrpo.kernels.reference import linear_grpo_loss_ref

VOCABULARY, WIDTH, HEADS, LAYERS, LONGEST = 5, 8, 2, 2, 80
TOLERANCE = 1e-9


class Transformer(nn.Module):
    """Run a causal pre-norm transformer with learned positions. A mask says which keys a token sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens_VH = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LONGEST, WIDTH)
        self.attention = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in range(LAYERS)
        )
        self.head_VH = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.double()

    def forward(self, input_ids_P: Tensor, positions_P: Tensor, sees_PP: Tensor) -> Tensor:
        x_PH = self.tokens_VH(input_ids_P) + self.positions(positions_P)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            qkv = attention(F.layer_norm(x_PH, (WIDTH,))).view(len(x_PH), 3, HEADS, -1).permute(1, 2, 0, 3)
            mixed = F.scaled_dot_product_attention(*qkv, attn_mask=sees_PP)
            x_PH = x_PH + mixed.transpose(0, 1).reshape(-1, WIDTH)
            x_PH = x_PH + mlp(F.layer_norm(x_PH, (WIDTH,)))
        return F.layer_norm(x_PH, (WIDTH,))


def tree_mask(filled: dict[str, NDArray[Any]]) -> Tensor:
    """Return the mask of a tree: a segment's queries are the last of its path's keys, as in flash-attention."""
    sees_PP = torch.zeros(len(filled["input_ids"]), len(filled["input_ids"]), dtype=torch.bool)
    for queries, keys in zip(
        itertools.pairwise(filled["tree_cu_seqlens_q"]), itertools.pairwise(filled["tree_cu_seqlens_k"]), strict=True
    ):
        path = torch.from_numpy(filled["tree_kv_index"][slice(*keys)])
        count = queries[1] - queries[0]
        for i in range(count):
            sees_PP[queries[0] + i, path[: len(path) - count + 1 + i]] = True
    return sees_PP


def tree_hidden(model: Transformer, filled: dict[str, NDArray[Any]]) -> Tensor:
    input_ids_P, positions_P = torch.from_numpy(filled["input_ids"]), torch.from_numpy(filled["positions"])
    return model(input_ids_P, positions_P, tree_mask(filled))


def alone(model: Transformer, tokens: NDArray[Any]) -> Tensor:
    """Return the hidden states of one trajectory."""
    ids_L = torch.from_numpy(tokens.astype(np.int64))
    return model(ids_L, torch.arange(len(ids_L)), torch.ones(len(ids_L), len(ids_L), dtype=torch.bool).tril())


def double(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float64))


def naive_loss(model: Transformer, batch: dict[str, Any], ids: Any, objective: Objective) -> Tensor:
    """Return the sum of the losses of the trajectories, each computed separately."""
    total = model.head_VH.sum() * 0
    for n in ids:
        start, stop = batch["offsets"][n : n + 2]
        last = min(start + batch["rows"][n], stop - 1)  # row i predicts token i + 1, if there is one
        if last == start:
            continue
        count = last - start
        weights = batch["weights"][n] * batch["sampled"][start + 1 : last + 1]
        logprobs = {f"{name}_N": double(values[start + 1 : last + 1]) for name, values in batch["logprobs"].items()}
        total = (
            total
            + linear_grpo_loss_ref(
                alone(model, batch["tokens"][start:last]),
                model.head_VH,
                torch.from_numpy(batch["tokens"][start + 1 : last + 1].astype(np.int64)),
                torch.full((count,), batch["advantages"][n], dtype=torch.float64),
                double(weights),
                objective,
                cu_seqlens=torch.tensor([0, count]),
                **logprobs,
            )[0]
        )
    return total


def tree_loss(
    model: Transformer, batch: dict[str, Any], bins: list[Any], objective: Objective, merge: bool, loss: Any
) -> Tensor:
    total = model.head_VH.sum() * 0
    for ids, shared in bins:
        filled = fill(batch, ids, shared, merge)
        rows = {name: torch.from_numpy(filled[name]) for name in ("token_index", "targets", "segment_id")}
        counts = torch.bincount(rows["segment_id"], minlength=len(ids))
        total = (
            total
            + loss(
                tree_hidden(model, filled)[rows["token_index"]],
                model.head_VH,
                rows["targets"],
                double(filled["advantages"]),
                double(filled["weights"]),
                objective,
                cu_seqlens=F.pad(counts.cumsum(0), (1, 0)),
                **{f"{name}_N": double(filled[name]) for name in batch["logprobs"]},
            )[0]
        )
    return total


def gradients(model: Transformer, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([loss.detach()[None], *(part.flatten() for part in parts)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Draw the columns of a forest over the vocabulary, and a cap."""
    sequences = [[token % VOCABULARY for token in tokens] for tokens in draw(forests(6))]
    names = draw(st.sampled_from([("old_logprobs",), ("old_logprobs", "sampler_logprobs"), LOGPROBS]))
    batch = random_batch(sequences, draw(st.integers(0, 2**32)), names, draw(st.sampled_from([np.int32, np.int64])))
    return batch, int(batch["rows"].max(initial=1)) + draw(st.integers(0, 40))


def planned(batch: dict[str, Any], cap: int) -> list[Any]:
    bounds, ids, shared = packing.tree_plan(batch["tokens"], batch["offsets"], batch["rows"], cap)
    return [(ids[a:b], shared[a:b]) for a, b in itertools.pairwise(bounds)]


@given(cases())
def test_logprobs_are_those_of_each_trajectory_alone(case):
    """Return log-probs of every (trajectory, position), read through `leaf` and `tree_kv_index`."""
    batch, cap = case
    model = Transformer()
    for ids, shared in planned(batch, cap):
        filled = fill(batch, ids, shared)
        tree_PV = F.log_softmax(tree_hidden(model, filled) @ model.head_VH.T, -1)
        for n, leaf in zip(ids, filled["leaf"], strict=True):
            start = batch["offsets"][n]
            alone_LV = F.log_softmax(
                alone(model, batch["tokens"][start : start + batch["rows"][n]]) @ model.head_VH.T, -1
            )
            path = filled["tree_kv_index"][slice(*filled["tree_cu_seqlens_k"][leaf : leaf + 2])]
            torch.testing.assert_close(tree_PV[path], alone_LV, rtol=TOLERANCE, atol=TOLERANCE)


@given(
    cases(),
    st.sampled_from([None, 1.3]),
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from([None, 1.1]),
    st.sampled_from([linear_grpo_loss, linear_grpo_loss_ref]),
    st.booleans(),
)
def test_gradients_are_those_of_each_trajectory_alone(case, dual_clip, kl, sampler_cap, loss, merge):
    batch, cap = case
    kl_coef = 0.3 if "ref_logprobs" in batch["logprobs"] else 0.0
    objective = Objective(dual_clip=dual_clip, kl=kl, kl_coef=kl_coef, entropy_coef=0.1, sampler_cap=sampler_cap)
    model = Transformer()
    expected = gradients(model, naive_loss(model, batch, range(len(batch["rows"])), objective))
    got = gradients(model, tree_loss(model, batch, planned(batch, cap), objective, merge, loss))
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@given(cases(), st.sampled_from(["sequence", "trajectory"]))
def test_gradients_of_shared_ratios_are_too_without_merging(case, importance):
    batch, cap = case
    objective = Objective(importance=importance)
    model = Transformer()
    expected = gradients(model, naive_loss(model, batch, range(len(batch["rows"])), objective))
    got = gradients(model, tree_loss(model, batch, planned(batch, cap), objective, False, linear_grpo_loss_ref))
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("fault", ["signs", "logprobs"])
def test_what_is_kept_apart_must_be(fault):
    """If rows with opposite advantages or other log-probs were merged, the loss would change."""
    tokens, offsets = flat([[1, 2], [1, 2]])
    batch: dict[str, Any] = {
        "tokens": tokens,
        "offsets": offsets,
        "sampled": np.ones(4, np.bool_),
        "rows": np.ones(2, np.int64),
        "advantages": np.array([1.0, -1.0 if fault == "signs" else 1.0]),
        "weights": np.ones(2),
        "logprobs": {"old_logprobs": np.array([0, -1, 0, -1 if fault == "signs" else -9], np.float32)},
    }
    filled = fill(batch, [0, 1], [0, 1])
    assert filled["token_index"].tolist() == [0, 0] and len(filled["input_ids"]) == 1
    model = Transformer()
    apart = naive_loss(model, batch, [0, 1], Objective())
    batch["advantages"][:] = batch["advantages"].mean()
    batch["logprobs"]["old_logprobs"][:] = batch["logprobs"]["old_logprobs"][1]
    assert (naive_loss(model, batch, [0, 1], Objective()) - apart).abs() > 1e-3
