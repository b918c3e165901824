"""The routers' balance loss: that of transformers for each kind, over flat rows; no loss for models without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_sweep import tiny

from mgrpo.engine.model.attention import Packed, run_backbone
from mgrpo.engine.model.causal_lm import lay_out
from mgrpo.engine.model.routers import Routers, balance_loss, coefficient, routers_of, usage

KINDS = (
    *("ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "jetmoe", "minimax_m2", "mixtral", "olmoe", "phimoe"),
    *("qwen2_moe", "qwen3_moe"),
)


def made(kind: str) -> Any:
    model = tiny(kind).double().eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_models_own_forward_adds(kind: str) -> None:
    model = made(kind)
    ids = torch.randint(2, 90, (13,), generator=torch.Generator().manual_seed(0))
    truth = model(input_ids=ids[None], output_router_logits=True, use_cache=False)
    lay_out(model)
    cu_seqlens = torch.tensor([0, 13], dtype=torch.int32)
    out = run_backbone(model, ids, torch.arange(13), Packed(cu_seqlens, 13), output_router_logits=True)
    found = balance_loss(out.router_logits, routers_of(model, "here"), torch.ones(13))
    torch.testing.assert_close(found.double(), truth.aux_loss.double(), rtol=1e-4, atol=0)
    assert found > 0.5 and coefficient(model) > 0
    # Its gradient in the routers' weights and in all below them.
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    names, weights = zip(*trained, strict=True)
    both = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in (found, truth.aux_loss)]
    for name, ours, theirs in zip(names, *both, strict=True):
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, msg=name)


def test_tokens_that_do_not_count_are_not_there() -> None:
    logits = [torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    routers, counted = Routers(4, 2), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    kept = [layer[counted] for layer in logits]
    torch.testing.assert_close(
        balance_loss(logits, routers, counted), balance_loss(kept, routers, torch.ones(4)), rtol=1e-12, atol=0
    )
    found = usage(logits, routers, counted)
    assert float(found.rows) == 8 and float(found.times_E.sum()) == 16


def test_no_token_at_all_is_balanced() -> None:
    found = balance_loss([torch.randn(3, 4)], Routers(4, 2), torch.zeros(3))
    assert float(found) == 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("llama", "LlamaForCausalLM, which has no routers"),
        ("deepseek_v3", "DeepseekV3ForCausalLM, which has no routers, or none that transformers balances"),
        ("doge", "DogeForCausalLM, as its own is another than Switch's"),
    ],
)
def test_a_model_without_such_a_loss_is_refused(kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"router_aux_coef: 0.1 given: expected no balance loss of {why}"):
        routers_of(tiny(kind), "router_aux_coef: 0.1")


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a router with logits \(3, 5\) given: expected \(3, 4\)"):
        usage([torch.randn(3, 5)], Routers(4, 2), torch.ones(3))
