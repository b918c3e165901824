"""Compare a head split by vocabulary over real processes with the whole head in each of them."""

import pytest
import torch
import torch.distributed as dist

from cases.vocab_parallel import everything, run_ranks
from mgrpo.kernels import Objective, linear_grpo_loss, linear_logprob, token_logprob


def dtensors_are_refused(rank, group):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (group.size(),))
    inputs = {"hidden_NH": torch.ones(2, 4), "weight_VH": torch.ones(6, 4), "bias_V": torch.ones(6)}
    targets, ones = torch.tensor([0, 5]), torch.ones(2)
    for name, tensor in inputs.items():
        for placement in (Shard(0), Replicate()):
            held = inputs | {name: torch.nn.Parameter(distribute_tensor(tensor, mesh, [placement]))}
            with pytest.raises(ValueError, match=rf"{name}: got a DTensor, expected the full tensor: call unshard\(\)"):
                linear_grpo_loss(
                    targets_N=targets, advantages_N=ones, loss_weights_N=ones, objective=Objective(), **held
                )
            with pytest.raises(ValueError, match=f"{name}: got a DTensor"):
                linear_logprob(targets_N=targets, **held)
    with pytest.raises(ValueError, match="logits_NV: got a DTensor"):
        token_logprob(distribute_tensor(torch.ones(2, 6), mesh, [Shard(0)]), targets)


def fsdp_head_agrees(rank, group):
    """Check that the head's weight is whole inside the module's forward, and its gradient returns as the shard's."""
    from torch.distributed.fsdp import fully_shard

    class Head(torch.nn.Linear):
        def forward(self, hidden):
            return linear_grpo_loss(hidden, self.weight, targets, advantages, weights, Objective()).loss

    torch.manual_seed(0)
    head, hidden = Head(6, 9, bias=False), torch.randn(8, 6)
    targets, advantages, weights = torch.randint(9, (8,)), torch.randn(8), torch.rand(8)
    expected = torch.autograd.grad(head(hidden), head.weight)[0]
    fully_shard(head, mesh=dist.init_device_mesh("cpu", (group.size(),)))
    head(hidden).backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected)


def test_a_tensor_that_fsdp_holds_sharded_is_refused(tmp_path):
    run_ranks(dtensors_are_refused, 1, tmp_path)


def test_an_unsharded_fsdp_head_is_welcome(tmp_path):
    run_ranks(fsdp_head_agrees, 1, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_give_what_the_whole_head_gives(ranks, tmp_path):
    run_ranks(everything, ranks, tmp_path)
