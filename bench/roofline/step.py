"""Predict a whole step of one policy on one GPU: layers, attention, head, optimizer, and what the host needs for it.

Legend: T tokens, A query heads, G key-value heads, D head size, I intermediate size, H hidden size, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgrpo.bench.roofline.chips import HOST, KERNEL, Chip
from mgrpo.bench.roofline.head import BF16, F32, SMALL, HeadCase, Parts, head
from mgrpo.bench.roofline.layers import Passes, eager_layer, fused_layer
from mgrpo.bench.step.models import QWEN3_06B, Sizes

_WIDE = {**QWEN3_06B, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_4B: Sizes = {**_WIDE, "hidden_size": 2560, "intermediate_size": 9728}
QWEN3_8B: Sizes = {**_WIDE, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
MODELS = {"Qwen3-0.6B": QWEN3_06B, "Qwen3-4B": QWEN3_4B, "Qwen3-8B": QWEN3_8B}

# Bytes that a parameter moves once a step: AdamW reads weight, gradient and both moments and writes three of them;
# clipping reads the gradient for its norm, then scales it; publishing reads a master and writes bf16.
OPTIMIZER = 7 * F32 + 3 * F32 + F32 + BF16
# And in each micro-batch: the bf16 gradient is read and added to the master's.
ACCUMULATE = BF16 + 2 * F32
PER_WEIGHT = 5  # launches of a step for one weight, apart from the optimizer's own few: clipping, publishing, adding


@dataclass(frozen=True)
class StepCase:
    """Describe a step: tokens of a micro-batch, length of its sequences, the share that the agent chose, how many."""

    sizes: Sizes
    tokens: int
    length: int
    live: float = 0.5
    batches: int = 8
    fused: bool = False


def step(chip: Chip, case: StepCase) -> Parts:
    """Return the seconds of each part of a step; "host" is what the host needs beyond what the GPU does meanwhile."""
    sizes, layers = case.sizes, case.sizes["num_hidden_layers"]
    passes = (fused_layer if case.fused else eager_layer)(sizes, case.tokens).times(layers)
    matmuls = zip((2, 5), chip.attention, strict=True)  # of forward and backward: the backward makes the scores again
    attention = sum(count * _attention_flop(case) / rate for count, rate in matmuls)
    rows = HeadCase(case.tokens, sizes["hidden_size"], sizes["vocab_size"], case.live, master=True)
    batch = {
        "matmuls": layers * sum(_three(chip, case.tokens, *shape) for shape in _linears(sizes)),
        "attention": attention + 4 * layers * KERNEL,
        "norms, RoPE, SwiGLU, sums": passes.launches * KERNEL + _moving(chip, passes),
        "embedding": chip.stream(3 * BF16 * case.tokens * sizes["hidden_size"] + 2 * BF16 * _embedding(sizes)),
        "head": sum(head(chip, rows).values()),
        "gradients to masters": chip.stream(ACCUMULATE * (parameters(sizes) - _embedding(sizes))),
    }
    found = {part: case.batches * seconds for part, seconds in batch.items()}
    found["optimizer"] = chip.stream(OPTIMIZER * parameters(sizes))
    launched = case.batches * (passes.launches + layers * (3 * len(_linears(sizes)) + 8) + SMALL)
    host = HOST * (launched + PER_WEIGHT * (layers * 11 + 3))
    return found | {"host": max(0.0, host - sum(found.values()))}


def _moving(chip: Chip, passes: Passes) -> float:
    return chip.stream(passes.moved) - KERNEL


def _three(chip: Chip, tokens: int, inputs: int, outputs: int) -> float:
    """Return the seconds of a linear layer's matmuls: forward, and the gradients of its input and its weight."""
    forward, dinput = chip.matmul(tokens, outputs, inputs), chip.matmul(tokens, inputs, outputs)
    return forward + dinput + chip.matmul(outputs, inputs, tokens)


def _linears(sizes: Sizes) -> list[tuple[int, int]]:
    """Return the (inputs, outputs) of a Qwen3 layer's linear layers."""
    hidden, inner, size = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = size * sizes["num_attention_heads"], size * sizes["num_key_value_heads"]
    gates = [(hidden, inner)] * 2
    return [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), *gates, (inner, hidden)]


def _attention_flop(case: StepCase) -> float:
    """Return the flop of one causal matmul of every layer's attention over the micro-batch."""
    width = case.sizes["num_attention_heads"] * case.sizes["head_dim"]
    return float(case.sizes["num_hidden_layers"] * width * case.tokens * case.length)


def _embedding(sizes: Sizes) -> int:
    return int(sizes["vocab_size"] * sizes["hidden_size"])


def parameters(sizes: Sizes) -> int:
    """Return the number of weights, without those of the norms."""
    layer = sum(inputs * outputs for inputs, outputs in _linears(sizes))
    return int(sizes["num_hidden_layers"] * layer + _embedding(sizes) * (1 if sizes["tie_word_embeddings"] else 2))


def useful_flop(case: StepCase) -> float:
    """Return the flop of a step without needless work, as `bench.step.models.flop` counts them."""
    layer = sum(inputs * outputs for inputs, outputs in _linears(case.sizes))
    rows = case.sizes["num_hidden_layers"] * layer + case.live * _embedding(case.sizes)
    return case.batches * (6.0 * rows * case.tokens + 6.0 * _attention_flop(case))


def tokens_per_second(case: StepCase, parts: Parts) -> float:
    """Return the tokens that the step trains, over its time."""
    return case.batches * case.tokens / sum(parts.values())
