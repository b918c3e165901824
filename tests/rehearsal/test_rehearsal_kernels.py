"""Losses and log-probs as they run on a GPU: launches, waits of the host, shapes, dtypes and devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rehearsal import GPU, Answer, rehearse, skip_unless_rehearsed
from torch import Tensor

from mgrpo.kernels import Objective, grpo_loss, linear_grpo_loss, linear_logprob, logprob_loss, token_logprob

skip_unless_rehearsed()

FULL = {"kl_coef": 0.1, "entropy_coef": 0.1}
OBJECTIVES = [Objective(), *(Objective(importance=i, **FULL) for i in ("token", "sequence", "trajectory"))]  # type: ignore[arg-type]


def live(count: int) -> Answer:
    """Answer the checks of a loss: nothing is wrong, and so many rows are live."""
    return lambda read: [0] * (read.numel() - 1) + [count]


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the arguments of `linear_grpo_loss` on the GPU, within a rehearsal."""
    new = dict(device=GPU, dtype=torch.float32)
    return {
        "hidden_NH": torch.empty(rows, width, device=GPU, dtype=dtype, requires_grad=True),
        "weight_VH": torch.empty(vocabulary, width, device=GPU, dtype=dtype, requires_grad=True),
        "targets_N": torch.empty(rows, device=GPU, dtype=torch.int64),
        "advantages_N": torch.empty(rows, **new),
        "loss_weights_N": torch.empty(rows, **new),
        "old_logprobs_N": torch.empty(rows, **new),
        "sampler_logprobs_N": torch.empty(rows, **new),
        "ref_logprobs_N": torch.empty(rows, **new),
        "cu_seqlens": torch.empty(9, device=GPU, dtype=torch.int32),
    }


def like(got: Tensor | None, wanted: Tensor) -> bool:
    return got is not None and (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device)


@pytest.mark.parametrize("count", [0, 64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_linear_loss(objective: Objective, dtype: torch.dtype, count: int) -> None:
    with rehearse(live(count)) as done:
        given = inputs(256, 64, 4096, dtype)
        out = linear_grpo_loss(objective=objective, **given)
        out.loss.backward()
        assert done.reads == ["tolist"]
        assert like(given["hidden_NH"].grad, given["hidden_NH"]) and like(given["weight_VH"].grad, given["weight_VH"])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(x.is_cuda and x.dtype == wide for x in (out.loss, out.logprobs_N, *out.metrics.values()))
        assert out.logprobs_N.shape == out.entropy_N.shape == (256,)
    assert (done.kernels["row_kernel"] > 0) == (count > 0 and dtype != torch.float64)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_logits(objective: Objective, inplace: bool) -> None:
    with rehearse(live(64)) as done:
        given = inputs(256, 64, 4096)
        logits_NV = given.pop("hidden_NH") @ given.pop("weight_VH").t()
        logits_NV.retain_grad()
        grpo_loss(logits_NV, objective=objective, inplace=inplace, **given).loss.backward()
        assert done.reads == ["tolist"] and like(logits_NV.grad, logits_NV)
    assert done.kernels["row_kernel"] == (1 if objective.importance == "token" else 2)
    assert done.kernels["scale_kernel"] == 1


def test_log_probs_and_their_loss() -> None:
    with rehearse(live(64)) as done:
        given = inputs(256, 64, 4096)
        hidden_NH, weight_VH, targets_N = (given.pop(name) for name in ("hidden_NH", "weight_VH", "targets_N"))
        done.answer = lambda read: [0] * read.numel()
        for logprobs_N, entropy_N in (
            linear_logprob(hidden_NH, weight_VH, targets_N),
            token_logprob(hidden_NH @ weight_VH.t(), targets_N),
        ):
            (logprobs_N.sum() + entropy_N.sum()).backward()
        assert done.reads == ["tolist"] * 2


def test_the_loss_of_log_probs() -> None:
    with rehearse(live(64)) as done:
        given = inputs(256, 64, 4096)
        logprobs_N = torch.empty(256, device=GPU, requires_grad=True)
        rows = {name: x for name, x in given.items() if name not in ("hidden_NH", "weight_VH", "targets_N")}
        logprob_loss(logprobs_N, objective=Objective(**FULL), entropies_N=logprobs_N, **rows).loss.backward()  # type: ignore[arg-type]
        assert done.reads == ["tolist"] and like(logprobs_N.grad, logprobs_N)


@pytest.mark.parametrize(
    ("shape", "most", "most_small"), [((8192, 4096, 151_936), 101, 15), ((1024, 576, 49_152), 22, 15)]
)
@pytest.mark.parametrize(("objective", "share"), [(Objective(), 1.0), (Objective(**FULL), 1.0), (Objective(), 0.25)])  # type: ignore[arg-type]
def test_a_loss_launches_few_kernels(
    objective: Objective, share: float, shape: tuple[int, int, int], most: int, most_small: int, record_property: Any
) -> None:
    """Count what a whole loss launches, forward and backward, with all its inputs, if a share of the rows is live.

    Small are all launches but matmuls, the copies of their rows and passes over logits. 86 of the large shape's are
    matmuls and passes, in the least of buffers.
    """
    with rehearse(live(int(share * shape[0]))) as done:
        linear_grpo_loss(objective=objective, buffer_bytes=400 << 20, **inputs(*shape)).loss.backward()
        assert done.reads == ["tolist"]
    kernels = sum(n for name, n in done.kernels.items() if name != "row_kernel")
    small = done.small + kernels - done.launches["index_select"]
    names = dict(done.launches + done.kernels)
    record_property("measured", f"{shape}, {share:.0%} live: {done.total} launches, {small} of them small: {names}")
    spread = 0 if share == 1 else 7  # a launch picks the live rows, and six put three results back among all rows
    assert done.total <= most and small <= most_small + spread
