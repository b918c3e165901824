"""keep_reference() over several ranks makes the copy anew from the config and gives it the parameters only.

A buffer that routes experts (e_score_correction_bias of GLM-4 MoE, MiniMax M2, dots1, DeepSeek V3) is zero in the copy,
so that the KL term holds the policy to another model than the one that was kept. Two processes, gloo, CPU.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from mgrpo.engine import Objective, Policy, pack
from ranks import run_ranks
from reproduction import cannot, fault, held
from reproduction.models import SIZES, llama


def glm() -> Glm4MoeForCausalLM:
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {"head_dim": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "initializer_range": 0.3}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES | {"pad_token_id": 0}, **experts, **sizes)).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(3 * torch.randn(buffer.shape))
    return model


def keep(kind: str, out: Path) -> None:
    """Write the KL divergence of a policy from the reference that it has just kept."""
    rank = torch.distributed.get_rank()
    policy = Policy.of(glm() if kind == "glm" else llama())
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 97, n) for n in (9, 20, 13, 30)]
    sampled = [np.arange(len(t)) > 0 for t in tokens]
    (batches,) = pack(tokens, sampled, [1.0, -1.0, 0.5, -0.5], [0.1] * 4, cap=40, ranks=2, rank=rank)
    policy.keep_reference()
    metrics = policy.forward_backward(batches, Objective(kl_coef=0.1, sampler_cap=None)).metrics
    if rank == 0:
        out.write_text(str(metrics["kl_mean"]))


def divergence(kind: str) -> float:
    """Return the KL divergence of a policy of two ranks from the reference that it has just kept."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(keep, 2, kind, Path(folder) / "kl")
        return float((Path(folder) / "kl").read_text())


if __name__ == "__main__":
    healthy = divergence("llama")
    if abs(healthy) > 1e-5:
        cannot(f"a plain Llama's KL divergence from its reference is {healthy}")
    try:
        found = divergence("glm")
    except Exception as error:  # of a rank: spawn wraps it
        if "ValueError" not in str(error):
            raise
        held(f"refused: {str(error).strip().splitlines()[-1]}")
    if abs(found) > 1e-5:
        fault(f"kl_mean of a policy to the reference that it has just kept: {found:.4g}")
    held(f"kl_mean {found:.4g}")
