"""Hold fp32 master weights beside a model that one process holds in bf16, sum gradients in fp32, schedule the rate.

Each gradient is added to its master as soon as it is made, and freed. On a GPU the head's, the largest, is made in its
master's. The optimizer moves the masters, and `publish` rounds them into the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mgrpo.engine.config.schema import AgentConfig


class Masters:
    """Hold fp32 master weights of a model's parameters, and their gradients.

    A parameter that is float32 or wider, or that is not trained (requires_grad is false), is its own master.
    """

    def __init__(self, model: nn.Module):
        self.params = dict(model.named_parameters())
        self.weights = {name: self._master(param) for name, param in self.params.items()}
        self.trained = [weight for weight in self.weights.values() if weight.requires_grad]
        self.sums = any(param.is_cuda for param in self.params.values())

    def _master(self, param: nn.Parameter) -> nn.Parameter:
        if param.dtype != torch.bfloat16 or not param.requires_grad:
            return param
        master = nn.Parameter(param.detach().float())

        def take_gradient(param: Tensor) -> None:
            if param.grad is None:  # the loss has added it to the master's itself
                return
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad.add_(param.grad)
            param.grad = None

        param.register_post_accumulate_grad_hook(take_gradient)
        return master

    def summed(self, weight: Tensor) -> nn.Parameter | None:
        """Return the master to whose gradient the loss adds that of the head's weight itself, in float32.

        None: autograd adds it. It does so on a CPU, where the sums so keep their rounding; for a weight that FSDP2
        gathers, whose gradient the ranks must first sum; and for one that is computed or not trained.
        """
        if not self.sums or not weight.requires_grad:
            return None
        found = [self.weights[name] for name, param in self.params.items() if param is weight]
        return found[0] if found and not isinstance(found[0], DTensor) else None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for name, param in self.params.items():
            if self.weights[name] is not param:
                param.copy_(self.weights[name])


def learning_rate(agent: AgentConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: a linear rise, then the schedule, to zero at the end."""
    if step < agent.lr_warmup_steps:
        return agent.lr * (step + 1) / (agent.lr_warmup_steps + 1)
    done = (step - agent.lr_warmup_steps) / max(1, steps - agent.lr_warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return agent.lr * factors[agent.lr_schedule]
