"""Try every kind of causal LM that transformers can build tiny: exact, or refused by name; never wrong, never a crash.

    python tests/model/model_sweep.py [--json FILE] [MODEL_TYPE …]

Of each kind a tiny model with random weights in float64 is taken over by a `Policy`. Log-probs over packed rows, their
gradient, and log-probs of the in-process sampler's cache are compared with the model's own forward on each sequence
alone, by code that shares nothing with the engine's own check. Ends with a table, and status 1 if any kind was wrong
or crashed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mgrpo.engine.batch.packing import pack
from mgrpo.engine.inference.in_process import InProcessSampler  # noqa: F401  (its check is what is tried)
from mgrpo.engine.model.composite import auto_class, text_lm
from mgrpo.engine.model.probe import cut_towers
from mgrpo.engine.policy.policy import Policy

COMMAND = "python tests/model/model_sweep.py --json tests/model/model_sweep.json"
LENGTHS, CAP, TEMPERATURE, NEAR = (40, 3, 17, 29), 64, 0.7, 8
LIMIT = 1e-3  # nats, and of a gradient's largest entry; norms of many kinds cast to float32
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
LARGEST = 60_000_000  # weights of what is called tiny
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": NEAR,
    "attention_chunk_size": NEAR,
    "final_logit_softcapping": 2.0,  # small enough for every logit to show it
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "rotary_dim": 4,
    "n_shared_experts": 1,
    "n_positions": 512,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
MAMBA |= {"num_hidden_layers": 2}
# Kinds whose config derives what single layers have when it is made, so that no key can be set afterwards.
MADE: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, **MAMBA},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "zamba2": {
        "num_key_value_heads": 4,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "num_hidden_layers": 2,
        "layers_block_type": ["hybrid", "hybrid"],
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 3,
    },
}
MADE_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("sliding_window", "final_logit_softcapping", *TOKENS),
)
# Ways to build a kind tiny, tried in turn: keys that are left as the kind has them, and "no token": it wants an id for
# each of TOKENS.
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("num_key_value_heads",),
    ("head_dim",),
    ("head_dim", "num_key_value_heads"),
    TOKENS,
    (*TOKENS, "head_dim", "num_key_value_heads"),
    ("layer_types", "num_hidden_layers"),
    ("layer_types", "num_hidden_layers", "head_dim", "num_key_value_heads", *TOKENS),
    ("no token",),
    ("no token", "head_dim", "num_key_value_heads"),
    ("no token", "layer_types", "num_hidden_layers", "head_dim", "num_key_value_heads"),
)


def tiny(model_type: str) -> Any:
    """Return a tiny model of the kind that runs; raises ValueError with the reasons if no variant does."""
    reasons = []
    for left in VARIANTS:
        try:
            model = build(model_type, left)
            with torch.no_grad():
                text_lm(model)(input_ids=torch.arange(2, 12)[None], use_cache=False)
        except Exception as error:  # of the library's code, for a config that it may not be made for
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])  # of each variant; the first is told
        else:
            return model
    raise ValueError(reasons[0])


def build(model_type: str, left: tuple[str, ...]) -> Any:
    if model_type in MADE:
        config = AutoConfig.for_model(model_type, **{key: SIZES[key] for key in MADE_SIZES} | MADE[model_type])
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    config = AutoConfig.for_model(model_type)
    text = config.get_text_config()
    text.allow_global_per_layer_attribute_access = True
    known = {key: value for key, value in SIZES.items() if hasattr(text, key) and key not in left}
    if "num_key_value_heads" in left and hasattr(text, "num_key_value_heads"):
        known["num_key_value_heads"] = SIZES["num_attention_heads"]
    if "no token" in left:
        known |= dict.fromkeys(TOKENS, 1)
    layers, kinds = getattr(text, "num_hidden_layers", 2), getattr(text, "layer_types", None)
    if kinds and "layer_types" not in left:
        count = max(2, len(set(kinds)))
        known |= {"layer_types": (list(dict.fromkeys(kinds)) * 2)[:count], "num_hidden_layers": count}
    count = known.get("num_hidden_layers", layers)
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers and key not in ("layer_types", *left):
            known[key] = value[:count]
    for key, value in known.items():
        with contextlib.suppress(AttributeError):  # a property that follows from others
            setattr(text, key, value)
    config._experts_implementation = text._experts_implementation = "eager"  # the grouped matmul has no float64
    cut_towers(config, text)
    with torch.device("meta"):
        size = sum(param.numel() for param in auto_class(config).from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f}M weights")
    torch.manual_seed(0)
    return auto_class(config).from_config(config, attn_implementation="eager")


class Unanswered(Exception):
    """Say that a model gives no log-probs of plain ids by itself, so that there is nothing to compare with."""


def truth(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = text_lm(model)(input_ids=ids[None], use_cache=False).logits[0, :-1].double() / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def judge(model: Any) -> tuple[str, str]:
    """Return "exact", "refused", "wrong" or "crash", and what is to be said of it."""
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.25 if param.ndim > 1 else param + 0.1 * torch.randn_like(param))
    model = model.double().eval()
    plain = copy.deepcopy(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    tokens = [rng.integers(2, vocabulary, n) for n in LENGTHS]
    expected, slopes = [], [rng.standard_normal(n - 1) for n in LENGTHS]
    for ids, slope in zip(tokens, slopes, strict=True):
        try:
            found = truth(plain, torch.from_numpy(ids))
        except Exception as error:
            raise Unanswered(f"does not run on plain ids by itself: {error}") from error
        (found * torch.from_numpy(slope)).sum().backward()
        expected.append(found.detach())
    try:
        policy = Policy.of(model, temperature=TEMPERATURE)
        (batches,) = pack(tokens, [np.arange(n) > 0 for n in LENGTHS], [1.0] * 4, [1.0] * 4, cap=CAP)
        where = {ids.tobytes(): i for i, ids in enumerate(tokens)}
        gaps = []

        def loss(given: Any, logprobs: Any, entropies: Any) -> Any:
            total = torch.zeros((), dtype=torch.float64)
            for batch, values in zip(given, logprobs, strict=True):
                bounds = batch.cu_seqlens_B1.tolist()
                for a, b in pairwise(bounds):
                    ids = np.array([int(batch.input_ids_P[a]), *batch.targets_P[a:b].tolist()])
                    i = where[ids.tobytes()]
                    gaps.append(float((values[a:b].detach().double() - expected[i]).abs().max()))
                    total = total + (values[a:b].double() * torch.from_numpy(slopes[i])).sum()
            return total, {}

        policy.forward_backward_custom(batches, loss)
    except ValueError as error:
        return "refused", str(error)
    grads = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        wanted = grads[name].grad
        if wanted is not None and param.grad is None:
            return "wrong", f"no gradient of {name}"
        if wanted is not None:
            gaps.append(float((param.grad - wanted).abs().max() / max(1.0, float(wanted.abs().max()))))
    if max(gaps) > LIMIT:
        return "wrong", f"differs by {max(gaps):.2g}"
    try:
        from mgrpo.engine.inference.check import check_sampler

        check_sampler(model)
    except ValueError as error:
        return "exact", f"training; sampler: {error}"
    return "exact", ""


def outcome_of(model_type: str) -> tuple[str, str]:
    """Return what became of a kind ("exact", "refused", "wrong", "crash", "not built") and what is to be said of it."""
    try:
        model = tiny(model_type)
    except ValueError as error:
        return "not built", str(error).splitlines()[0]
    try:
        return judge(model)
    except Unanswered as error:
        return "not built", str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"


def main(names: list[str], file: Path | None) -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    kinds: dict[str, list[str]] = {}
    for model_type in names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcome, said = outcome_of(model_type)
        kinds[model_type] = [outcome, " ".join(said.split())]
        print(f"| {model_type} | {outcome} | {kinds[model_type][1][:160]} |", flush=True)
    counts = Counter(outcome for outcome, _ in kinds.values())
    print(dict(counts))
    if file is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {"commit": commit.strip(), "command": COMMAND, "versions": versions, "kinds": kinds}
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 1 if counts["wrong"] or counts["crash"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--json", type=Path, help="file to write the results to, from which docs/models.md is made")
    given = parser.parse_args()
    sys.exit(main(given.names, given.json))
