"""Compare a policy with the plain model that it was made from, for reproductions of models that are taken wrongly."""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.engine import Policy, pack
from reproduction import cannot, fault, held

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
EAGER = {"attn_implementation": "eager"}
TOLERANCE = 1e-3  # nats: far above rounding, far below what a wrong mask or position makes


def llama(**changes: Any) -> LlamaForCausalLM:
    """Return a small random Llama, the healthy model of these scripts."""
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES | {"initializer_range": 0.2} | changes), **EAGER).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words t0, t1, …, of which t0 ends a text."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0")


def gap(model: Any, lengths: Sequence[int] = (40, 3, 17, 29), cap: int = 64, temperature: float = 0.7) -> float | None:
    """Return the largest difference (nats) between the policy's log-probs of packed sequences and the plain model's.

    The plain model sees each sequence alone, in float64. None if the policy refuses the model by a ValueError.
    """
    fill(model)
    model = model.double().eval()
    plain = copy.deepcopy(model)
    rng = np.random.default_rng(0)
    try:
        policy = Policy.of(model, temperature=temperature)
        tokens = [rng.integers(2, model.config.get_text_config().vocab_size, n) for n in lengths]
        ones = [1.0] * len(lengths)
        (batches,) = pack(tokens, [np.arange(n) > 0 for n in lengths], ones, ones, cap=cap)
        found = policy.forward(batches)
    except ValueError as error:
        print(f"{type(model).__name__}: refused: {error}")
        return None
    worst = 0.0
    for batch, logprobs in zip(batches, found, strict=True):
        for a, b in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:], strict=True):
            ids = torch.tensor([batch["input_ids"][a], *batch["targets"][a:b]])
            true = true_logprobs(plain, ids, temperature)
            worst = max(worst, float((true - logprobs[a:b]).abs().max()))
    print(f"{type(model).__name__}: accepted, largest difference {worst:.3g} nats")
    return worst


def fill(model: torch.nn.Module) -> None:
    """Draw weights large enough for every part of the model to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.25 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))


@torch.no_grad()
def true_logprobs(plain: Any, ids_L: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return the plain model's log-probs of all tokens but the first, (L - 1,)."""
    logits = plain(input_ids=ids_L[None], use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, ids_L[1:, None])[:, 0]


def judge(models: Iterable[Any]) -> NoReturn:
    """End with a fault if a policy's log-probs differ from its model's own, after showing that a Llama's do not."""
    healthy = gap(llama())
    if healthy is None or healthy > TOLERANCE:
        cannot(f"a plain Llama: difference {healthy}, expected at most {TOLERANCE}")
    found = {type(model).__name__: gap(model) for model in models}
    wrong = {name: worst for name, worst in found.items() if worst is not None and worst > TOLERANCE}
    if wrong:
        fault(f"accepted, with log-probs that are not the model's own: {wrong}")
    held(f"right or refused: {list(found)}")


def sample(sampler: Any, sessions: Sequence[Any]) -> None:
    """Sample one turn of each session by an in-process sampler."""

    async def turns() -> None:
        acting = [asyncio.create_task(sampler.act(session)) for session in sessions]
        await asyncio.sleep(0)
        while sampler.pending:
            sampler.step()
            await asyncio.sleep(0)
        await asyncio.gather(*acting)

    asyncio.run(turns())
