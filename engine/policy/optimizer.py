"""fp32 master weights beside a model that one process holds in bf16, and gradients summed in fp32.

Each gradient is added to its master the moment it is made, and freed; the optimizer moves the masters, and `publish`
rounds them into the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Masters:
    """fp32 master weights of a model's parameters, and their gradients.

    What is float32 or wider, or is not trained (requires_grad is false), is its own master.
    """

    def __init__(self, model: nn.Module):
        self.params = dict(model.named_parameters())
        self.weights = {name: self._master(param) for name, param in self.params.items()}
        self.trained = [weight for weight in self.weights.values() if weight.requires_grad]

    def _master(self, param: nn.Parameter) -> nn.Parameter:
        if param.dtype != torch.bfloat16 or not param.requires_grad:
            return param
        master = nn.Parameter(param.detach().float())

        def take_gradient(param: Tensor) -> None:
            assert param.grad is not None
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad.add_(param.grad)
            param.grad = None

        param.register_post_accumulate_grad_hook(take_gradient)
        return master

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for name, param in self.params.items():
            if self.weights[name] is not param:
                param.copy_(self.weights[name])
