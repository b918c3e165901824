"""Models over packed tokens equal the plain model on each sequence; unreadable or unsupported ones are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.integrations.flat import run_flat
from mgrpo.engine.model.attention import Packed, hidden_states
from mgrpo.engine.model.causal_lm import lay_out, load_model, load_tokenizer, pick_device, take_over
from mgrpo.engine.model.logits import LogitMap, logit_map
from toy import make_model

CPU = ComputeConfig(dtype="float32", device="cpu")
SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
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

GPT2_SIZES = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2 = GPT2Config(**GPT2_SIZES, embd_pdrop=0.5, resid_pdrop=0.5)


def agent(folder: Path, max_context: int = 64) -> AgentConfig:
    return AgentConfig(model=str(folder), max_context=max_context)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def packed(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([len(ids) for ids in sequences])
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    positions_T = torch.cat([torch.arange(len(ids)) for ids in sequences])
    return hidden_states(model, torch.cat(sequences), positions_T, Packed(cu_seqlens, int(lengths.max())))


def alone(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model.base_model(input_ids=ids[None]).last_hidden_state[0] for ids in sequences])


def random_sequences(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 257, (length,), generator=generator) for length in lengths]


def saved(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def both(folder) -> tuple[PreTrainedModel, PreTrainedModel]:
    return load_model("main", agent(folder), CPU), plain(folder)


# ---- the forward over packed tokens


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(0, 2**31))
def test_packed_sequences_have_the_plain_models_hidden_states_and_gradients(both, lengths, seed):
    ours, theirs = both
    sequences = random_sequences(lengths, seed)
    out_TH, true_TH = packed(ours, sequences), alone(theirs, sequences)
    torch.testing.assert_close(out_TH, true_TH, rtol=1e-5, atol=1e-5)
    pull_TH = torch.randn(true_TH.shape, generator=torch.Generator().manual_seed(seed))
    parameters = [list(model.base_model.parameters()) for model in both]
    for grad, truth in zip(
        torch.autograd.grad(out_TH, parameters[0], pull_TH),
        torch.autograd.grad(true_TH, parameters[1], pull_TH),
        strict=True,
    ):
        assert (grad - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max())


@pytest.mark.parametrize("heads", [1, 4], ids=["multi-query", "multi-head"])
def test_any_number_of_key_value_heads(tmp_path, heads):
    folder = make_model(tmp_path, num_key_value_heads=heads)
    sequences = random_sequences([1, 9, 4])
    truth_TH = alone(plain(folder), sequences)
    torch.testing.assert_close(
        packed(load_model("main", agent(folder), CPU), sequences), truth_TH, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES, attention_dropout=0.5), GPT2], ids=lambda c: c.model_type)
def test_activation_checkpointing_changes_no_gradient_and_dropout_is_off(tmp_path, config):
    folder = saved(tmp_path, config)
    grads = []
    for checkpointing in (False, True):
        compute = ComputeConfig(dtype="float32", device="cpu", activation_checkpointing=checkpointing)
        model = load_model("main", agent(folder), compute)
        packed(model, random_sequences([5, 1, 8])).square().sum().backward()
        grads.append([p.grad for p in model.base_model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_loaded_in_the_compute_dtype_without_change(folder, dtype):
    model = load_model("main", agent(folder), ComputeConfig(dtype=dtype, device="cpu"))
    wanted = getattr(torch, dtype)
    stored = load_file(folder / "model.safetensors")
    named = dict(model.named_parameters())
    assert set(stored) == set(named) and all(torch.equal(named[n], stored[n].to(wanted)) for n in stored)


# ---- other architectures: right, or refused


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**SIZES, head_dim=16), GraniteConfig(**SIZES, logits_scaling=1.0, attention_multiplier=0.9), GPT2],
    ids=["normalised queries, wide heads", "a custom scale", "learned positions, no key-value groups"],
)
def test_other_architectures_are_right(tmp_path, config):
    folder = saved(tmp_path, config)
    sequences = random_sequences([3, 17])
    truth_TH = alone(plain(folder), sequences)
    torch.testing.assert_close(
        packed(load_model("main", agent(folder), CPU), sequences), truth_TH, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "scale"),
    [(GraniteConfig(**SIZES, logits_scaling=8.0), 1 / 8), (CohereConfig(**SIZES, logit_scale=0.25), 0.25)],
)
def test_a_model_that_scales_its_logits_has_that_scale(tmp_path, config, scale):
    found = logit_map(load_model("main", agent(saved(tmp_path, config)), CPU))
    assert found.scale == pytest.approx(scale, rel=1e-5) and found.softcap is None


@pytest.mark.parametrize("cap", [0.1, 30.0])
def test_the_cap_of_a_models_logits_is_found_however_small_they_are(tmp_path, cap):
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=cap, attn_logit_softcapping=None)
    assert logit_map(load_model("main", agent(saved(tmp_path, config)), CPU)) == LogitMap(1.0, cap)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=8, sliding_window=8, final_logit_softcapping=None, attn_logit_softcapping=1.0),
        GptOssConfig(**SIZES, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=["capped attention and windows", "attention sinks and windows"],
)
def test_capped_attention_sinks_and_windows_are_right(tmp_path, config):
    folder = saved(tmp_path, config)
    sequences = random_sequences([3, 40, 17])
    truth_TH = alone(plain(folder), sequences)
    model = load_model("main", agent(folder), CPU)
    torch.testing.assert_close(packed(model, sequences), truth_TH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [GptOssConfig, Gemma2Config], ids=lambda config: config.model_type)
def test_a_caller_may_still_use_a_model_whose_scores_sdpa_does_not_have(config):
    kinds = {GptOssConfig: {"num_local_experts": 4, "num_experts_per_tok": 2}, Gemma2Config: {}}
    given = config(**SIZES, head_dim=8, sliding_window=8, **kinds[config])
    if config is Gemma2Config:
        given.final_logit_softcapping, given.attn_logit_softcapping = None, 1.0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(given, attn_implementation="eager").eval()
    ids = torch.cat(random_sequences([20]))[None]
    before = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=9, do_sample=False)
    lay_out(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), before[1])


def test_a_model_whose_recurrent_layers_cannot_be_told_of_bounds_is_refused(tmp_path):
    config = MambaConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=0, pad_token_id=1
    )
    with pytest.raises(ValueError, match=r"agents\.main\.model: MambaForCausalLM has recurrent layers \(MambaMixer\)"):
        load_model("main", agent(saved(tmp_path, config)), CPU)


def test_a_model_without_a_head_is_refused_wherever_one_is_needed(folder):
    model = plain(folder).model
    with pytest.raises(ValueError, match="model: LlamaModel given: expected a causal LM, with a head over its vocab"):
        lay_out(model)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="model: LlamaModel given: expected a causal LM"):
        take_over(model, CPU, None)
    with pytest.raises(ValueError, match="model: LlamaModel given: expected a causal LM"):
        run_flat(model)


# ---- what cannot be loaded


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write(name: str, text: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_text(text)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def case(name: str, edit: Callable[[Path], Any], message: str) -> Any:
    return pytest.param(edit, message, id=name)


def pickle_weights(folder: Path) -> None:
    """Leave weights that `torch.load` reads, as older models have them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WEIGHTS = [
    case("no weights file", lambda folder: (folder / "model.safetensors").unlink(), "no readable weights"),
    case("truncated", truncate, "no readable weights"),
    case("not safetensors", write("model.safetensors", "hello"), "no readable weights"),
    case("empty", write("model.safetensors", ""), "no readable weights"),
    case("wrong shape", edit_weights(lambda w: w.update({"model.norm.weight": torch.ones(7)})), "no readable weights"),
    case("a tensor is missing", edit_weights(lambda w: w.pop("model.layers.1.self_attn.q_proj.weight")), r"q_proj"),
    case(
        "a NaN", edit_weights(lambda w: w["model.norm.weight"].mul_(math.nan)), "model.norm.weight has a NaN or an inf"
    ),
    case(
        "an infinity", edit_weights(lambda w: w["model.norm.weight"][:1].fill_(math.inf)), "norm.weight has a NaN or an"
    ),
    case("pickled", pickle_weights, "no readable weights"),
    case("no attention heads", edit_config(num_attention_heads=0), ""),
    case("unknown architecture", edit_config(model_type="nonesuch"), "nonesuch"),
]
CONFIGS = [
    case("no directory", shutil.rmtree, "given: expected a directory with a config.json in it"),
    case("broken JSON", write("config.json", "{"), "config.json is not valid JSON"),
    case("nested too deep", write("config.json", "[" * 100_000), "config.json is not valid JSON"),
    case("a list", write("config.json", "[]"), "config.json has no vocab_size"),
    case("a number", write("config.json", "3"), "config.json"),
    case(
        "no vocabulary", write("config.json", "{}"), "config.json has no vocab_size: expected the config of a causal LM"
    ),
    case("vocabulary is a word", edit_config(vocab_size="many"), "vocab_size"),
]
TOKENIZERS = [
    case("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), "has no readable tokenizer"),
    case("broken JSON", write("tokenizer.json", "{"), "has no readable tokenizer"),
    case("no tokenizer's JSON", write("tokenizer.json", "[]"), "has no readable tokenizer"),
    case(
        "larger than the vocabulary",
        edit_config(vocab_size=256),
        "has 257 tokens, its model a vocabulary of 256: expected a tokenizer that fits the model",
    ),
    case("no end of sequence", write("tokenizer_config.json", "{}"), "has no end-of-sequence token"),
]


@pytest.mark.parametrize(("edit", "message"), WEIGHTS + CONFIGS)
def test_a_model_that_cannot_be_read_is_a_value_error(folder, tmp_path, edit, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    edit(broken)
    with pytest.raises(ValueError, match=rf"(?s)^agents\.main\.model: .*{message}"):
        load_model("main", agent(broken), CPU)


@pytest.mark.parametrize(("edit", "message"), TOKENIZERS + CONFIGS)
def test_a_tokenizer_that_cannot_be_read_or_does_not_fit_is_a_value_error(folder, tmp_path, edit, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    edit(broken)
    with pytest.raises(ValueError, match=rf"(?s)^agents\.main\.model: .*{message}"):
        load_tokenizer("main", agent(broken))


AUTO_MAP = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M", "AutoTokenizer": ["theirs.T", None]}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_python_in_a_models_directory_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch, name):
    broken = shutil.copytree(folder, tmp_path / "broken")
    settings = json.loads((broken / name).read_text())
    theirs = {"model_type": "theirs"} if name == "config.json" else {"tokenizer_class": "T"}
    (broken / name).write_text(json.dumps(settings | theirs | {"auto_map": AUTO_MAP}))
    (broken / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\nclass T: ...\n"
    )
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with pytest.raises(ValueError, match=r"^agents\.main\.model: .* needs Python code from that directory, which is n"):
        load_tokenizer("main", agent(broken))
        load_model("main", agent(broken), CPU)
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [lambda a: load_model("main", a, CPU), lambda a: load_tokenizer("main", a)])
def test_a_context_beyond_the_models_is_refused(folder, load):
    assert load(agent(folder, max_context=256))
    with pytest.raises(ValueError, match=r"agents\.main\.max_context: 257 given: expected at most the model's 256"):
        load(agent(folder, max_context=257))


def test_a_context_beyond_the_learned_positions_is_refused(tmp_path):
    folder = saved(tmp_path, GPT2)
    with pytest.raises(ValueError, match=r"agents\.main\.max_context: 65 given: expected at most the model's 64"):
        load_model("main", agent(folder, max_context=65), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_a_value_error():
    assert pick_device(ComputeConfig()) == pick_device(ComputeConfig(device="cpu")) == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ValueError, match=rf"compute\.device: '{name}' given: expected a device"):
            pick_device(ComputeConfig(device=name))
