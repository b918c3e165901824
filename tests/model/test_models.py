"""The kinds of model that people train: exact over packed rows and in the sampler, or refused by the mechanism's name.

All others are tried by `python tests/model/model_sweep.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from model_sweep import SIZES, judge, tiny
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from mgrpo.engine.inference.check import check_sampler
from mgrpo.engine.model.probe import check_exact, without_dropout
from mgrpo.engine.policy.policy import Policy

EXACT = (
    "llama",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "ministral",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "cohere",
    "cohere2",
    "exaone4",
    "smollm3",
    "gpt_oss",
    "granite",
    "granitemoe",
    "deepseek_v3",
    "glm4_moe",
    "llama4_text",
    "gpt2",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "falcon_h1",
    "lfm2",
    "lfm2_moe",
    "kimi_linear",
    "olmo_hybrid",
    "granitemoehybrid",
    "bamba",
)
REFUSED = {
    "jamba": "recurrent layers (JambaMambaMixer) that do not get the arguments",
    "minimax": "layers without attention",
    "zamba2": "attends more than once in a layer",
    "bart": "counts positions by itself",
    "doge": "packed row",
    "diffllama": "attends more than once in a layer",
    "phimoe": "training mode",
    "bert": "attends to later tokens",
}


@pytest.mark.parametrize("model_type", EXACT)
def test_a_kind_that_people_train_is_exact(model_type: str) -> None:
    assert judge(tiny(model_type)) == ("exact", "")


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_kind_that_cannot_be_packed_is_refused_by_what_it_does(model_type: str) -> None:
    outcome, said = judge(tiny(model_type))
    assert outcome == "refused" and REFUSED[model_type] in said, said


def test_the_sweep_of_all_kinds_found_none_wrong_and_none_that_crashes() -> None:
    kinds = json.loads(Path(__file__).with_name("model_sweep.json").read_text())["kinds"]
    found = Counter(outcome for outcome, _ in kinds.values())
    assert found["wrong"] == found["crash"] == 0 and found["exact"] >= 95
    assert {kinds[name][0] for name in EXACT} == {"exact"}
    assert all(cause in kinds[name][1] for name, cause in REFUSED.items())


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("mgrpo")
    without_dropout(model)
    return model


def test_rope_by_length_is_refused_unless_no_sequence_is_so_long() -> None:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        **sizes,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters=rope | {"rope_theta": 10000.0, "original_max_position_embeddings": 128},
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM._from_config(config)
    with pytest.raises(ValueError, match="RoPE whose frequencies follow the longest sequence"):
        Policy.of(model)
    check_exact("model", prepared(model), longest=128)
    check_sampler(model, longest=128)
    with pytest.raises(ValueError, match="sampler: Phi3ForCausalLM"):
        check_sampler(model, longest=129)
    with pytest.raises(ValueError, match="RoPE whose frequencies follow the longest sequence"):
        check_exact("model", prepared(model), longest=129)
