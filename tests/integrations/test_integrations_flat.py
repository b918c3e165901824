"""A model's second forward, over flat rows: balance losses, autocast, adapters and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mgrpo.engine.integrations.flat import asks_for_balance, causal_lm, flatten, run_flat
from mgrpo.engine.integrations.hf import NO_LABEL, _has_plain_padding, _rows
from mgrpo.engine.integrations.trl import _counted, _in_float32
from mgrpo.engine.model.attention import Packed, attention
from mgrpo.kernels import Objective

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def mixture(**changes: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**SIZES | experts | {"output_router_logits": True} | changes))


def inputs(masked: bool = True) -> dict[str, Tensor]:
    """Return rows padded on either side, tokens behind the last label, and a row without any label."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (4, 9), generator=g)
    labels = ids.clone()
    labels[:, :2], labels[2], labels[3, 5:] = NO_LABEL, NO_LABEL, NO_LABEL
    if not masked:
        return {"input_ids": ids, "labels": labels}
    columns = torch.arange(9)
    mask = torch.stack([columns < 6, columns >= 3, columns < 8, columns < 9])
    labels[1, 3] = NO_LABEL  # padding would predict it
    return {"input_ids": ids, "labels": labels.masked_fill(~mask, NO_LABEL), "attention_mask": mask.long()}


@pytest.mark.parametrize(
    ("labels", "mask", "plain"),
    [
        ([9, 9, 9, -100], [1, 1, 1, 0], True),
        ([-100, -100, 9, 9], [0, 1, 1, 1], True),
        ([-100, 9, 9, 9], [0, 1, 1, 1], False),
        ([9, 9, 9, 9], [1, 1, 0, 0], False),
        ([9, 9, -100, -100], [1, 1, 0, 1], False),
    ],
)
def test_labels_that_padding_predicts_are_left_to_the_trainer(labels: Any, mask: Any, plain: bool) -> None:
    found = _has_plain_padding(torch.tensor([[9, 9, 9, 9], labels]), torch.tensor([[1, 1, 1, 1], mask]))
    assert found == plain


def test_a_mask_of_another_shape_is_left_to_the_trainer() -> None:
    assert not _has_plain_padding(torch.ones(2, 4), torch.ones(2, 1, 4, 4)) and _has_plain_padding(
        torch.ones(2, 4), None
    )


def flat_loss(model: Any, given: dict[str, Tensor]) -> Tensor:
    flat, targets_P = _rows(given, asks_for_balance(model))

    def work(hidden_PH: Tensor, weight_VH: Tensor, *_: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden_PH @ weight_VH.T, targets_P)

    return model(flat=flat, work=work)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_the_balance_loss_is_the_models_own(coefficient: float, masked: bool) -> None:
    model, given = mixture(router_aux_loss_coef=coefficient), inputs(masked)
    expected = model(**given).loss
    theirs = gradients(model, expected)
    run_flat(model)
    loss = flat_loss(model, given)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-5, msg=name)
    assert "_loss_function" not in vars(model)
    torch.testing.assert_close(model(**given).loss, expected, rtol=1e-5, atol=1e-5)  # its own forward is as it was


def test_without_router_logits_there_is_no_balance_loss() -> None:
    model, given = mixture(output_router_logits=False), inputs()
    expected = model(**given).loss
    run_flat(model)
    torch.testing.assert_close(flat_loss(model, given), expected, rtol=1e-5, atol=1e-5)


class OwnForward(MixtralForCausalLM):
    """Compute the loss in its own way."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.loss = None if labels is None else out.logits.mean()
        return out


class Renamed(MixtralForCausalLM):
    """Change nothing."""


def test_a_balance_loss_that_is_not_known_is_refused() -> None:
    assert asks_for_balance(Renamed(mixture().config))
    with pytest.raises(ValueError, match="output_router_logits = true given: expected no balance loss of OwnForward"):
        asks_for_balance(OwnForward(mixture().config))


@pytest.mark.parametrize("window", [None, 4])
def test_autocast_reaches_attention_as_in_the_models_own_forward(window: int | None) -> None:
    torch.manual_seed(0)
    model, given = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)), inputs()
    exact = model(**given).loss
    truth = gradients(model, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**given).loss
    theirs = gradients(model, expected)
    run_flat(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = flat_loss(model, given)
    ours = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert gap(theirs, truth) > 1e-3  # bfloat16 did round
    assert gap(ours, truth) < 2 * gap(theirs, truth)


def gap(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the distance of two gradients, as a share of the second."""
    first, second = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (found, truth))
    return float((first - second).norm() / second.norm())


def test_capped_scores_are_the_same_with_autocast_around_them() -> None:
    """Hold what runs without torch's fused kernel to the dtype of its backward, which autocast never reaches."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=g) for heads in (4, 2, 2))
    module: Any = SimpleNamespace(layer_idx=0, is_causal=True)
    layout = Packed(torch.tensor([0, 7, 12], dtype=torch.int32), 7)
    narrow = [x.bfloat16() for x in (q, k, v)]
    expected, _ = attention(module, *narrow, None, layout=layout, softcap=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = attention(module, q, k.bfloat16(), v, None, layout=layout, softcap=2.0)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_a_prepared_models_autocast_is_not_taken_for_another_model() -> None:
    """Hold a forward that accelerate has put under autocast to the check at start, which runs without."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    own = model._original_forward = model.forward

    def prepared(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return own(*args, **kwargs)

    model.forward = prepared
    run_flat(model)
    assert model(input_ids=inputs()["input_ids"]).logits.dtype == torch.bfloat16  # it is under autocast still


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "lora"])
def test_dropout_is_kept_as_the_models_own_forward_draws_it(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model = whole = dropping(kind).train(training)
    ids = torch.arange(1, 12)
    flat = flatten(ids[None], torch.ones(1, 11, dtype=torch.bool), torch.ones(1, 11, dtype=torch.bool))
    torch.manual_seed(1)
    expected = model(input_ids=flat.input_ids[None], use_cache=False).logits[0]
    state = torch.get_rng_state()
    run_flat(causal_lm(whole))
    assert torch.equal(torch.get_rng_state(), state) and model.training == training
    torch.manual_seed(1)
    logits = model(flat=flat, work=lambda hidden_PH, weight_VH, bias_V, _: F.linear(hidden_PH, weight_VH, bias_V))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    again = model(input_ids=flat.input_ids[None], use_cache=False).logits[0]
    assert torch.allclose(again, expected, atol=1e-4) != training  # it did drop


def dropping(kind: str) -> Any:
    """Return a model with dropout outside its attention."""
    if kind == "gpt2":
        drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, **drops))
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'mgrpo[dev]'")
    config = peft.LoraConfig(
        target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False, exclude_modules=["lm_head"]
    )
    return peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)


def test_a_capped_model_still_runs_padded_rows_as_its_own_attention_does() -> None:
    """Padding further away than a window sees no token at all."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=1.0, sliding_window=2)
    model = Gemma2ForCausalLM(config).eval()
    ids, mask = torch.arange(1, 9)[None].repeat(2, 1), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :5] = 0
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    run_flat(model)
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask.bool()], expected, rtol=1e-4, atol=1e-4)


def test_dropout_in_attention_is_refused_and_left_as_it_was() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.2))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has a dropout of 0.2 in its attention: expected none over"):
        run_flat(model)
    assert model.model.layers[0].self_attn.attention_dropout == 0.2


def test_an_adapter_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'mgrpo[dev]'")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)
    with pytest.raises(
        ValueError, match=r"head of class peft\..*Linear: expected a plain nn.Linear, .* exclude_modules"
    ):
        run_flat(causal_lm(model))


@pytest.mark.parametrize("kind", ["learned, of columns", "learned, of the mask", "rotary"])
def test_positions_behind_padding_are_the_models_own(kind: str) -> None:
    """Pad before a text: GPT-2 counts the padding, OPT does not, and to RoPE it is all the same."""
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0, "attention_dropout": 0, "init_std": 0.2}
    model: Any = {
        "learned, of columns": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **drops)
        ),
        "learned, of the mask": lambda: OPTForCausalLM(OPTConfig(**SIZES, **opt)),
        "rotary": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    }[kind]()
    given = inputs()
    expected = model(**given).loss
    run_flat(model)
    torch.testing.assert_close(flat_loss(model, given), expected, rtol=1e-5, atol=1e-5)


def test_the_causal_lm_is_found_inside_an_adapters_wrapper() -> None:
    model = object()
    lora = SimpleNamespace(is_prompt_learning=False, peft_type="LORA")
    prefix = SimpleNamespace(is_prompt_learning=True, peft_type="PREFIX_TUNING")
    assert causal_lm(model) is model
    assert causal_lm(SimpleNamespace(get_base_model=lambda: model, active_peft_config=lora)) is model
    with pytest.raises(ValueError, match="an adapter of kind PREFIX_TUNING given: expected one without tokens"):
        causal_lm(SimpleNamespace(get_base_model=lambda: model, active_peft_config=prefix))


def test_a_shared_ratio_counts_every_action_of_a_sequence_with_an_advantage() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    advantages = torch.tensor([[0.0, 2, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]])
    token = _counted(mask, advantages, Objective())
    assert token.int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    sequence = _counted(mask, advantages, Objective(importance="sequence"))
    assert sequence.int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(_counted(mask, advantages, Objective(kl_coef=0.1)), mask)


def test_a_float32_head_runs_without_autocast() -> None:
    def work(hidden_PH: Tensor, weight_VH: Tensor) -> Tensor:
        return hidden_PH @ weight_VH.T

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _in_float32(work)(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32
