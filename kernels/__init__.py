"""mgrpo.kernels: advantages, token log-probs and the M-GRPO loss, from logits or straight from the LM head's input.

Plain PyTorch today; the public names and signatures stay when Triton versions take over on a GPU.
"""

from .advantages import Advantages, group_advantages
from .logprob import linear_logprob, token_logprob
from .loss import Loss, grpo_loss, linear_grpo_loss
from .metrics import merge_metrics
from .objective import Objective

__all__ = [
    "Advantages",
    "Loss",
    "Objective",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "merge_metrics",
    "token_logprob",
]
