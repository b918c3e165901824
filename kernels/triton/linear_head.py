"""The sweeps of `kernels/linear_head.py` on a GPU, with the row kernel of `rows.py`.

Unlike the PyTorch version, this keeps logits in float32, as the matmul sums them, for a few rows at a time in one
reused buffer. Their gradient, in the matmul's dtype, fills a second buffer of more rows: each pass over dW reads and
writes all of it in float32, which takes longer than the matmul itself unless that has some thousand rows.

Legend: L live rows, C rows of a chunk, B rows of a block of logits, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear_head import HeadPlan, Sweep, earlier_sum
from ..terms import Coefficients
from ..vocab_parallel import Statistics
from .buffers import plan_buffers, tiled_slices, whole_tiles
from .rows import new_statistics, run_rows


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b, summed and written in out's dtype: that of a and b, or float32."""
    beta = 1 if add else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # torch has no such matmul on a CPU, where only tests reach this line
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def linear_sweep(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    plan: HeadPlan,
    coefficients: Coefficients | None,
    needs: tuple[bool, ...],
) -> Sweep:
    """Compute `sweep` on a GPU."""
    (vocabulary, width), count = weight_VH.shape, len(plan.targets_L)
    matmul_VH = weight_VH.to(plan.matmul_dtype)
    new = hidden_NH.new_empty
    earlier_VH = earlier_sum(plan)
    statistics = new_statistics(hidden_NH, count, for_gradient=plan.shard is not None)
    out = Sweep(
        statistics.logprobs_L,
        statistics.entropy_L,
        new(count, width, dtype=torch.float32 if plan.shard else hidden_NH.dtype) if needs[0] else None,
        (new(vocabulary, width, dtype=torch.float32) if earlier_VH is None else earlier_VH) if needs[1] else None,
        hidden_NH.new_zeros(vocabulary, dtype=torch.float32) if needs[2] else None,
    )
    if not count and out.dweight_VH is not None and earlier_VH is None:
        out.dweight_VH.zero_()
    room = plan_buffers(plan, plan.widest(vocabulary), hidden_NH.device)
    chunks = list(tiled_slices(count, room.chunk))
    longest = max((rows.stop - rows.start for rows in chunks), default=0)
    logits_BV = new(whole_tiles(min(longest, room.block)), vocabulary, dtype=torch.float32)
    gradient_CV = new(longest, vocabulary, dtype=plan.matmul_dtype) if coefficients else None
    for rows in chunks:
        hidden_CH = plan.take(hidden_NH, rows).to(plan.matmul_dtype)
        for inside in tiled_slices(len(hidden_CH), len(logits_BV)):
            logits = logits_BV[: inside.stop - inside.start]
            multiply(hidden_CH[inside], matmul_VH.t(), logits)
            block = slice(rows.start + inside.start, rows.start + inside.stop)
            gradient = None if gradient_CV is None else gradient_CV[inside]
            _do_rows(logits, bias_V, plan, block, statistics, coefficients, gradient)
        if gradient_CV is not None:
            holds = rows.start > 0 or earlier_VH is not None
            _add_gradients(out, rows, gradient_CV[: len(hidden_CH)], hidden_CH, matmul_VH, holds)
    return out


def _do_rows(
    logits_BV: Tensor,
    bias_V: Tensor | None,
    plan: HeadPlan,
    rows: slice,
    statistics: Statistics,
    coefficients: Coefficients | None,
    gradient_BV: Tensor | None,
) -> None:
    """Compute statistics and gradient of a block: in one launch, or in one before and one after the ranks' merge."""

    def launch(*, known: bool, **gradient: Any) -> None:
        run_rows(
            logits_BV,
            bias_V,
            plan.targets_L,
            plan.temperature,
            rows,
            statistics,
            known=known,
            softcap=plan.softcap,
            **gradient,
        )

    if plan.shard is None:
        return launch(known=False, coefficients=coefficients, gradient_CV=gradient_BV)
    launch(known=False)
    temperature = plan.temperature[rows] if isinstance(plan.temperature, Tensor) else plan.temperature
    mine = Statistics(*(t[rows] for t in statistics if t is not None))
    for whole_L, merged_B in zip(statistics, plan.shard.merge(mine, temperature), strict=True):
        assert whole_L is not None and merged_B is not None
        whole_L[rows] = merged_B
    if gradient_BV is not None:
        launch(known=True, coefficients=coefficients, gradient_CV=gradient_BV)


def _add_gradients(
    out: Sweep, rows: slice, gradient_CV: Tensor, hidden_CH: Tensor, matmul_VH: Tensor, holds: bool
) -> None:
    """Add a chunk's part to the gradients that are asked for.  holds: whether dW holds a sum already."""
    if out.dhidden_LH is not None:
        multiply(gradient_CV, matmul_VH, out.dhidden_LH[rows])
    if out.dweight_VH is not None:
        multiply(gradient_CV.t(), hidden_CH, out.dweight_VH, add=holds)
    if out.dbias_V is not None:
        out.dbias_V.add_(gradient_CV.sum(0, dtype=out.dbias_V.dtype))


def token_forward(
    logits_NV: Tensor, plan: HeadPlan, coefficients: Coefficients | None = None, gradient_NV: Tensor | None = None
) -> Statistics:
    """Return the statistics of the plan's rows of existing logits, which are read once.

    With coefficients also write the gradient of these rows, in the same launch; gradient_NV may be the logits.
    """
    statistics = new_statistics(logits_NV, len(plan.targets_L), for_gradient=coefficients is None)
    rows = slice(0, len(plan.targets_L))
    run_rows(
        logits_NV,
        None,
        plan.targets_L,
        plan.temperature,
        rows,
        statistics,
        coefficients=coefficients,
        gradient_CV=gradient_NV,
        index_L=plan.index_L,
        softcap=plan.softcap,
    )
    return statistics


def token_backward(
    logits_NV: Tensor, plan: HeadPlan, statistics: Sequence[Tensor], coefficients: Coefficients, gradient_NV: Tensor
) -> None:
    """Write the gradient of the live rows' logits, with one read and one write; gradient_NV may be the logits."""
    run_rows(
        logits_NV,
        None,
        plan.targets_L,
        plan.temperature,
        slice(0, len(plan.targets_L)),
        Statistics(*statistics),
        coefficients=coefficients,
        gradient_CV=gradient_NV,
        index_L=plan.index_L,
        known=True,
        softcap=plan.softcap,
    )
