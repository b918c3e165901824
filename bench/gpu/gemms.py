"""Measure the rates of the head's three matmuls at each number of rows, which bound what its chunks can reach.

Legend: M rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from mgrpo.bench.gpu.session import Session
from mgrpo.bench.harness import Candidate, interleave

HEAD = (4096, 151_936)
ROWS = (256, 512, 1024, 2048, 4096, 8192)


def rates(session: Session) -> None:
    """Measure logits into float32, dX into bf16, and dW into float32, written and added."""
    width, vocabulary = HEAD if session.on_gpu else (64, 500)
    for rows in ROWS if session.on_gpu else ROWS[:2]:
        flop = 2 * rows * width * vocabulary
        for name, timing in interleave(
            _matmuls(rows, width, vocabulary, session), rounds=5, device=session.device
        ).items():
            session.add(f"{rows} rows, {name}", flop / timing.seconds / 1e12, "TFLOP/s")


def _matmuls(rows: int, width: int, vocabulary: int, session: Session) -> dict[str, Candidate]:
    hidden_MH, weight_VH = (
        torch.randn(count, width, device=session.device, dtype=torch.bfloat16) for count in (rows, vocabulary)
    )
    logits_MV = torch.empty(rows, vocabulary, device=session.device)
    gradient_MV, dweight_VH = logits_MV.to(torch.bfloat16), torch.zeros(vocabulary, width, device=session.device)
    from mgrpo.kernels.triton.linear_head import multiply

    return {
        "X W^T": lambda: multiply(hidden_MH, weight_VH.t(), logits_MV),
        "G W": lambda: multiply(gradient_MV, weight_VH, torch.empty_like(hidden_MH)),
        "G^T X, written": lambda: multiply(gradient_MV.t(), hidden_MH, dweight_VH),
        "G^T X, added": lambda: multiply(gradient_MV.t(), hidden_MH, dweight_VH, add=True),
    }
