"""mgrpo.kernels: advantages, token log-probs and the M-GRPO loss, from logits or straight from the LM head's input.

Plain PyTorch is the definition and the path of a CPU and of float64; on a GPU the same functions launch Triton kernels.
Bottom up: `objective`, `rows` (vectors over rows), `checks`; `shard` (a head split over ranks), `head` (the sweep over
chunks) and for a GPU `fused`, `epilogue`, `row_kernel`; `logprob`, `loss`, `given`. Apart: `advantages` and for a GPU
`groups`.
"""

from .advantages import Advantages, group_advantages
from .given import logprob_loss
from .logprob import linear_logprob, token_logprob
from .loss import Loss, grpo_loss, linear_grpo_loss
from .metrics import merge_metrics
from .objective import Objective, Rule, RuleRows

__all__ = [
    "Advantages",
    "Loss",
    "Objective",
    "Rule",
    "RuleRows",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "logprob_loss",
    "merge_metrics",
    "token_logprob",
]
