"""Models that cap or multiply their logits after the head: trained, sampled and run flat as their own code says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mgrpo.engine.inference.check import check_sampler
from mgrpo.engine.integrations.flat import flatten, run_flat
from mgrpo.engine.model.causal_lm import lay_out
from mgrpo.engine.model.logits import LogitMap, logit_map
from mgrpo.engine.policy.policy import Policy
from mgrpo.kernels import linear_logprob

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "eos_token_id": 0,
    "bos_token_id": None,
}
SCALE, CAP, TEMPERATURE = 0.25, 0.75, 0.7


class _Changed(LlamaForCausalLM):
    """Change the logits in a subclass, as models of their own do."""

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


class MultipliedThenCapped(_Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return CAP * torch.tanh(SCALE * logits / CAP)


class CappedThenMultiplied(_Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return SCALE * CAP * torch.tanh(logits / CAP)


class Clamped(_Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.clamp(-CAP, CAP)


class ClampedFarAway(_Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.clamp(-500, 500)


def made(kind: type[LlamaForCausalLM], **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind._from_config(LlamaConfig(**SIZES, **config), dtype=torch.float64, attn_implementation="eager").eval()


def true_logprobs(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].detach() / TEMPERATURE
    return logits_TV.log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]


KINDS = [(MultipliedThenCapped, LogitMap(SCALE, CAP / SCALE)), (CappedThenMultiplied, LogitMap(SCALE, CAP))]


@pytest.mark.parametrize(("kind", "expected"), KINDS)
def test_a_cap_and_a_factor_are_found_in_their_order(kind: type[LlamaForCausalLM], expected: LogitMap) -> None:
    model = made(kind, final_logit_softcapping=CAP)
    lay_out(model)
    found = logit_map(model)
    assert found.scale == pytest.approx(expected.scale, rel=1e-5)
    assert found.softcap == pytest.approx(expected.softcap, rel=1e-5)
    assert logit_map(copy.deepcopy(model)) == found
    check_sampler(model)


@pytest.mark.parametrize(("kind", "expected"), KINDS)
def test_all_paths_give_the_models_own_log_probs(kind: type[LlamaForCausalLM], expected: LogitMap) -> None:
    model, ids_T = made(kind, final_logit_softcapping=CAP), torch.arange(1, 30)
    truth_T = true_logprobs(model, ids_T)
    policy = Policy.of(copy.deepcopy(model), temperature=TEMPERATURE)
    sampled_T = torch.tensor(policy.logprobs(ids_T.tolist()), dtype=torch.float64)
    torch.testing.assert_close(sampled_T, truth_T, rtol=1e-5, atol=1e-5)
    run_flat(model)
    flat = flatten(ids_T[None], torch.ones(1, 29, dtype=torch.bool), torch.ones(1, 29, dtype=torch.bool))

    def work(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, softcap: float | None) -> torch.Tensor:
        settings: Any = {"bias_V": bias, "temperature": TEMPERATURE, "softcap": softcap}
        return linear_logprob(hidden, weight, flat.targets, **settings)[0]

    torch.testing.assert_close(model(flat=flat, work=work).detach(), truth_T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MultipliedThenCapped, {}),  # its config says nothing of a cap
        (CappedThenMultiplied, {"final_logit_softcapping": 2 * CAP}),
        (Clamped, {"final_logit_softcapping": CAP}),
        (ClampedFarAway, {}),
    ],
)
def test_what_else_is_done_to_logits_is_refused(kind: type[LlamaForCausalLM], config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"model: {kind.__name__} changes its logits after the head: expected a mult"):
        lay_out(made(kind, **config))


def test_a_cap_that_only_the_config_has_is_none() -> None:
    model = made(LlamaForCausalLM, final_logit_softcapping=CAP)
    lay_out(model)
    assert logit_map(model) == LogitMap()
