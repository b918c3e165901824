"""Checkpoints that also see are trained on text: exact, under their own names, with the vision tower as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from mgrpo.engine.batch.packing import pack
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.inference.check import check_sampler
from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer, read_model_config
from mgrpo.engine.model.composite import auto_class, text_lm, text_part
from mgrpo.engine.model.probe import small_copy
from mgrpo.engine.policy.policy import Policy
from toy import make_model

CPU = ComputeConfig(device="cpu", dtype="float32")
TEXT = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
EYE = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
QWEN_EYE = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}  # of heads of 16
QWEN_IDS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"head_dim": 16, "sliding_window": 8},
        "vision_config": EYE | {"image_size": 28},
        "mm_tokens_per_image": 4,
        "image_token_id": 250,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": QWEN_EYE | {"fullatt_block_indexes": [1]},
        **QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_interleaved": True}},
        "vision_config": QWEN_EYE | {"deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        **QWEN_IDS,
    },
    "llama4": {
        "text_config": TEXT
        | {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}
        | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
        "vision_config": EYE
        | {"image_size": 28, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        "image_token_index": 250,
    },
}
TOKENS = [np.random.default_rng(n).integers(1, 249, n) for n in (40, 3, 17)]


def config_of(kind: str) -> PreTrainedConfig:
    config = AutoConfig.for_model(kind, **KINDS[kind])
    config._experts_implementation = config.text_config._experts_implementation = "eager"  # the other has no float64
    return config


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config_of(kind), dtype=torch.float64)
    return model


def saved(kind: str, folder: Path) -> Path:
    """Save a whole tiny model in float32, with a tokenizer."""
    make_model(folder)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / file).unlink(missing_ok=True)
    made(kind).float().save_pretrained(folder)
    return folder


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probs of a text by the model's own forward; of Llama 4's by its text model, as its own fails."""
    logits = text_lm(model)(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_of_packed_text_are_those_of_the_whole_model(kind: str) -> None:
    plain, model = made(kind).eval(), made(kind)
    expected = [logprobs(plain, torch.from_numpy(ids)) for ids in TOKENS]
    torch.cat(expected).sum().backward()
    policy = Policy.of(model)
    check_sampler(model)
    (batches,) = pack(TOKENS, [np.arange(len(ids)) > 0 for ids in TOKENS], [1.0] * 3, [1.0] * 3, cap=64)
    found = policy.forward_backward_custom(batches, lambda _, values, __: (torch.cat(values).sum(), {}))
    gap = torch.cat(found.logprobs).double().sort().values - torch.cat(expected).sort().values
    assert gap.abs().max() < 1e-5  # the head's log-probs are in float32
    of_text = {id(param) for param in (*text_part(model).parameters(), *model.get_output_embeddings().parameters())}
    wanted = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        assert param.requires_grad == (id(param) in of_text), name
        if param.requires_grad and wanted[name].grad is not None:
            torch.testing.assert_close(param.grad, wanted[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_a_text_in_three_axes_are_plain_positions(kind: str) -> None:
    model, ids = made(kind).eval(), torch.from_numpy(TOKENS[0])[None]
    plain = torch.arange(ids.shape[1])[None]
    own = model(input_ids=ids, use_cache=False).logits
    flat = model.lm_head(text_part(model)(input_ids=ids, position_ids=plain, use_cache=False).last_hidden_state)
    assert torch.equal(own, flat)
    shifted = text_part(model)(input_ids=ids, position_ids=plain * 2, use_cache=False).last_hidden_state
    assert not torch.allclose(own, model.lm_head(shifted))  # positions are asked


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_is_loaded_whole_trained_and_published_under_its_names(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "model")
    policy = Policy.of(folder, compute=CPU, lr=0.1, weight_decay=0.5, max_context=64)
    assert policy.sampler().model is policy.model
    before = {name: param.clone() for name, param in policy.model.named_parameters()}
    policy.keep_reference()
    assert policy.reference is not None
    (batches,) = pack(TOKENS, [np.arange(len(ids)) > 0 for ids in TOKENS], [1.0] * 3, [1.0] * 3, cap=64)
    policy.forward_backward_custom(batches, lambda _, values, __: (torch.cat(values).sum(), {}))
    policy.optim_step()
    policy.save_state(tmp_path / "state")
    published = load_file(tmp_path / policy.publish(str(tmp_path)).file)
    seen = {name for name, param in policy.model.named_parameters() if not param.requires_grad}
    assert seen and len(seen) < len(before)
    assert {name for name, value in published.items() if torch.equal(value, before[name])} == seen
    with torch.device("meta"):  # what a server of this config expects (worker_extension.expected)
        whole = auto_class(AutoConfig.from_pretrained(folder)).from_config(AutoConfig.from_pretrained(folder))
    assert manifest_of(dict(whole.named_parameters()), torch.float32) == manifest_of(published)
    other = Policy.of(folder, compute=CPU, max_context=64)
    other.load_state(tmp_path / "state")
    assert {name: True for name in before} == {
        name: torch.equal(param, published[name]) for name, param in other.model.named_parameters()
    }


def test_the_copy_that_is_checked_keeps_the_head_size_and_one_layer_of_each_tower() -> None:
    eye = QWEN_EYE | {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
    mrope = MROPE | {"mrope_section": [16, 24, 24]}  # of the heads of 128 that the config derives
    sizes = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=sizes | {"rope_parameters": mrope}, vision_config=eye)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        copy = small_copy(model)
    assert copy is not None and copy.num_parameters() < 5_000_000
    assert len(copy.model.visual.blocks) == 1 and text_part(copy).layers[0].self_attn.head_dim == 128


def test_a_composite_config_is_read_for_its_text_model(tmp_path: Path) -> None:
    folder = saved("gemma3", tmp_path / "model")
    agent = AgentConfig(model=str(folder), max_context=256)
    assert read_model_config("main", agent)["vocab_size"] == 257
    assert load_tokenizer("main", agent).eos_token_id == 0
    with pytest.raises(ValueError, match="max_context: 257 given: expected at most the model's 256"):
        read_model_config("main", AgentConfig(model=str(folder), max_context=257))


def test_a_checkpoint_without_its_vision_tower_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved("gemma3", tmp_path / "model")
    text = shutil.copytree(folder, tmp_path / "text")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "vision" not in name}
    model.save_pretrained(text, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks the weights .*vision_tower"):
        load_model("main", AgentConfig(model=str(text), max_context=64), CPU)


def test_a_callers_model_still_sees() -> None:
    model = made("gemma3").float().eval()
    ids = torch.tensor([[5, 250, 250, 250, 250, 6, 7]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    asked = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 250).long(), "use_cache": False}
    before = model(**asked).logits
    Policy.of(model)
    torch.testing.assert_close(model(**asked).logits, before)
