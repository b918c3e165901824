"""A low-rank adapter on the LM head never gets a gradient: the head's weight is read past it.

PEFT's target_modules="all-linear" makes such an adapter. With the usual start, B = 0, the check at loading sees no
difference. (With another B the model is refused.)
"""

import numpy as np
import torch
from torch import nn

from mgrpo.engine import Objective, Policy, pack
from reproduction import cannot, fault, held
from reproduction.models import VOCABULARY, llama, true_logprobs


class Adapted(nn.Linear):
    """A frozen linear layer and a low-rank one beside it."""

    def __init__(self, base, rank=4):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


ids = np.random.default_rng(0).integers(1, VOCABULARY, 20)


def difference(model, weight: str) -> float:
    """Return the largest difference between the policy's gradient of a weight and the model's own.

    Raises ValueError if the policy refuses the model.
    """
    with torch.enable_grad():
        loss = -true_logprobs.__wrapped__(model, torch.tensor(ids)).sum()
    (true,) = torch.autograd.grad(loss, model.get_parameter(weight))
    policy = Policy.of(model)
    (batches,) = pack([ids], [np.arange(20) > 0], [1.0], [1.0], cap=64)
    policy.forward_backward(batches, Objective(sampler_cap=None))
    found = policy.model.get_parameter(weight).grad
    return float("inf") if found is None else float((found - true).abs().max())


healthy = difference(llama(tie_word_embeddings=False), "lm_head.weight")
if healthy > 1e-3:
    cannot(f"a plain Llama's gradient of its head differs by {healthy}")
model = llama(tie_word_embeddings=False)
model.set_output_embeddings(Adapted(model.lm_head))
try:
    found = difference(model, "lm_head.B")
except ValueError as error:
    held(f"refused: {error}")
if found > 1e-3:
    fault(f"the adapter's gradient differs by {found} (inf: there is none)")
held(f"the adapter's gradient differs by {found}")
