"""Make a tiny untrained model with a byte-level tokenizer, and the config of a run of it, for tests of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.engine.config.schema import Config, parse_config

EOS = "<eos>"
SUMS = Path(__file__).parents[2] / "examples" / "sums" / "environment.py"


def make_model(folder: Path, tie: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Save a Llama of some 30,000 weights and its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([EOS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    return folder


def raw_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the config, as a dictionary, of a run of `examples/sums` with the model in `folder`/model."""
    agent = {"model": str(folder / "model"), "stop": ["\n"], "max_new_tokens": 12, "max_turns": 3, "max_context": 64}
    return {
        "run_dir": str(folder / "run"),
        "environment": {"use": f"{SUMS}:Sums"},
        "agents": {"main": {**agent, "lr": 3e-3}, "clerk": {**agent, "lr": 3e-3}},
        "deterministic": True,
        "steps": 3,
        "queries_per_step": 3,
        "algorithm": {"rollouts": 4, "aligned_calls": 2},
        "warmup": {"steps": 4, "episodes": 8, "lr": 1e-2},
        "eval": {"questions": 10},
        "checkpoint": {"every": 1},
        "compute": {"dtype": "float32", "max_tokens": 256, "device": "cpu"},
        "log": {"to": []},  # a process for each run would make the tests slower
    } | changes


def toy_config(folder: Path, **changes: Any) -> Config:
    """Return the config of such a run."""
    return parse_config(raw_config(folder, **changes))
