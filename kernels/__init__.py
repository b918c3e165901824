"""mgrpo.kernels: group advantages, token log-probs and the M-GRPO loss, from logits or from the LM head's input.

Plain PyTorch defines every quantity, and runs on a CPU and in float64. On a GPU the same functions launch Triton
kernels.

    advantages      group-relative advantages of rewards
    objective       the settings of the loss, and its closed form per row
    terms           the loss and its slopes over the rows of a micro-batch
    checks          checks of tensors that a caller hands in
    inputs          checks a loss's inputs and plans which rows reach the head
    vocab_parallel  an LM head whose vocabulary is split over ranks
    linear_head     the LM head and its softmax, one chunk of rows at a time
    logprob         log-probs and entropies of the target tokens
    loss            the three losses: of logits, of the head's input, of log-probs
    metrics         what a loss reports besides its value
    inplace         scales and rounds a gradient without a copy
    reference       the literal definitions that the tests compare with
    dispatch        decides between PyTorch and Triton
    graph           the losses as operations of a torch.compile graph
    triton          the Triton kernels
"""

from .advantages import Advantages, group_advantages, running_sum
from .logprob import linear_logprob, token_logprob
from .loss import Loss, grpo_loss, linear_grpo_loss, logprob_loss
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
    "running_sum",
    "token_logprob",
]
