"""The routers' balance loss in a policy's step: of all tokens of the step, however they are packed and dealt to ranks.

The truth is the definition in float64: each trajectory alone through the model, and the loss of all of them together.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from cases.ranked_policy import batches, mine
from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.config.schema import ComputeConfig
from mgrpo.engine.model.causal_lm import load_model
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system import distributed
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.kernels import Objective
from ranks import run_ranks
from toy import make_model, toy_config

PLAIN, COEF, EXPERTS, CHOSEN = Objective(sampler_cap=None), 3.0, 4, 2
Found = dict[str, Tensor]


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        initializer_range=0.3,
        experts_implementation="eager",
        attn_implementation="eager",
    )
    return MixtralForCausalLM(config).double().eval()


def gradients(policy: Policy, given: list[Batch], coef: float = COEF) -> tuple[dict[str, float], Found]:
    metrics = policy.forward_backward(given, PLAIN, router_aux_coef=coef).metrics
    found = {name: weight.grad for name, weight in policy.masters.weights.items()}
    policy.optimizer.zero_grad()
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return metrics, whole


def sequences(given: list[Batch]) -> list[Tensor]:
    """Return the rows of each sequence that has a weight."""
    found = []
    for batch in given:
        bounds = batch.cu_seqlens_B1.tolist()
        rows = [slice(a, b) for a, b in pairwise(bounds)]
        found += [batch.input_ids_P[each] for each in rows if batch.weights_P[each].any()]
    return found


def defined(given: list[Batch]) -> tuple[float, Found]:
    """Return the balance loss of some sequences together, and its gradient, as Switch Transformer defines it."""
    model, chosen, probs = mixtral(), [], []
    for ids in sequences(given):
        for logits in model(input_ids=ids[None], output_router_logits=True, use_cache=False).router_logits:
            probs.append(logits.softmax(-1))
            chosen.append(torch.nn.functional.one_hot(logits.topk(CHOSEN).indices, EXPERTS).sum(1).double())
    loss = EXPERTS * (torch.cat(chosen).mean(0) * torch.cat(probs).mean(0)).sum()
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return float(loss.detach()), grads


def close(found: Found, truth: Found) -> None:
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("max_tokens", [40, 64, 1000])
def test_it_is_that_of_the_whole_step_in_any_micro_batches(max_tokens: int) -> None:
    given = batches(0, max_tokens=max_tokens)
    assert (len(given) == 1) == (max_tokens == 1000)
    plain, without = gradients(Policy.of(mixtral()), given, 0.0)
    metrics, found = gradients(Policy.of(mixtral()), given)
    loss, truth = defined(given)
    close({name: (found[name] - without[name]) / COEF for name in truth}, truth)
    assert max(float(slope.abs().max()) for slope in truth.values()) > 1e-2
    assert metrics["router_aux"] == pytest.approx(loss, rel=1e-6)
    assert metrics["loss"] == pytest.approx(plain["loss"] + COEF * loss, rel=1e-6)
    assert "router_aux" not in plain


def test_a_step_moves_by_it_in_every_epoch() -> None:
    given, ends = batches(0), []
    for coef in (0.0, COEF):
        policy = Policy.of(mixtral(), lr=1e-2, grad_clip=1e9)
        row = policy.step(given, PLAIN, epochs=2, router_aux_coef=coef)
        ends.append({name: weight.detach().clone() for name, weight in policy.masters.weights.items()})
    assert row["router_aux"] < defined(given)[0]
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(ends[0][router], ends[1][router])


def test_it_goes_through_activation_checkpointing() -> None:
    given, model = batches(0), mixtral()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy.of(model)
    model.train()
    close(gradients(policy, given)[1], gradients(Policy.of(mixtral()), given)[1])


def on_ranks(out: Path) -> None:
    policy = Policy.of(mixtral(), compute=ComputeConfig(device="cpu"))
    metrics, found = gradients(policy, mine(batches(0)[:3]))  # one rank gets a dummy, which counts for nothing
    if distributed.rank() == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, out / "gradients.safetensors")
        (out / "loss").write_text(f"{metrics['loss']} {metrics['router_aux']}")


@pytest.mark.slow
def test_ranks_share_it(tmp_path: Path) -> None:
    given = batches(0)[:3]
    run_ranks(on_ranks, 2, tmp_path)
    metrics, truth = gradients(Policy.of(mixtral()), given)
    close(load_file(tmp_path / "gradients.safetensors"), truth)
    assert [float(x) for x in (tmp_path / "loss").read_text().split()] == pytest.approx(
        [metrics["loss"], metrics["router_aux"]], rel=1e-9
    )


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, algorithm={"rollouts": 4, "router_aux_coef": 0.01})
    model: Any = load_model("main", config.agents["main"], config.compute)
    policy = Policy("main", config.agents["main"], config.compute, model=model)
    with pytest.raises(ValueError, match=r"config: algorithm.router_aux_coef: 0.01 given: expected no balance"):
        AgentTrainer(config, policy, str(tmp_path))
    with pytest.raises(ValueError, match=r"router_aux_coef: 0.5 given: expected no balance loss of LlamaForCausalLM"):
        policy.step(batches(0), PLAIN, router_aux_coef=0.5)
