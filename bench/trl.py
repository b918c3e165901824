"""`python -m mgrpo.bench.trl [--quick]`: compares TRL's GRPOTrainer with our loss inside it to TRL's own loss.

(`bench/step/trl.py` is another comparison: TRL's whole step against the engine's.)

It measures forward and backward of one micro-batch, as the trainer passes it to its loss, off-policy, with and without
a KL term: times in turns, and memory above the memory that was in use before. The model is small except for its
vocabulary, so that the head dominates; one sequence in four has advantage 0.
tests/integrations/test_integrations_trl.py holds losses and gradients equal.

Legend: B sequences, P columns of the prompts, T of the completions.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgrpo.bench.harness import Candidate, Result, extra_bytes, figure, interleave, report

SIZES: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
QUICK: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPE = (8, 64, 256)  # B, P, T
ROUNDS = 5


def trainers(sizes: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """Make TRL's trainer, and the same with our loss, from the same weights."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from mgrpo.engine.integrations.trl import FusedGRPO

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    quiet: dict[str, Any] = {"report_to": [], "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    made = {}
    for name, kind in (("ours", type("Ours", (FusedGRPO, GRPOTrainer), {})), ("trl", GRPOTrainer)):
        made[name] = kind(
            model=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(str(folder), **quiet | options),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * 8}),
            processing_class=tokenizer,
        )
        made[name].current_gradient_accumulation_steps = 1
        made[name].model.train()
    return made


def micro_batch(vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Make prompts padded on the left and completions padded on the right, of random lengths."""
    g = torch.Generator().manual_seed(0)
    batch, prompt, completion = SHAPE
    prompts, lengths = (torch.randint(n // 8, n + 1, (batch, 1), generator=g) for n in (prompt, completion))
    mask_BT = (torch.arange(completion) < lengths).long()
    made = {
        "prompt_ids": torch.randint(1, vocabulary, (batch, prompt), generator=g),
        "prompt_mask": (torch.arange(prompt) >= prompt - prompts).long(),
        "completion_ids": torch.randint(1, vocabulary, (batch, completion), generator=g),
        "completion_mask": mask_BT,
        "advantages": torch.randn(batch, generator=g) * (torch.arange(batch) % 4 > 0),
        "num_items_in_batch": mask_BT.sum().float(),
        "old_per_token_logps": torch.full((batch, completion), -10.8),
        "ref_per_token_logps": torch.full((batch, completion), -10.8),
    }
    return {name: value.to(device) for name, value in made.items()}


def step(trainer: Any, inputs: dict[str, Tensor]) -> None:
    """Run forward and backward."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, dict(inputs)).backward()


def results(sizes: dict[str, Any], rounds: int) -> list[Result]:
    """Return time and memory of both, with and without a KL term."""
    found = []
    for name, beta in (("no KL", 0.0), ("KL", 0.1)):
        with tempfile.TemporaryDirectory() as folder:
            made = trainers(sizes, Path(folder), beta=beta)
        device = made["trl"].accelerator.device
        inputs = micro_batch(sizes["vocab_size"], device)
        steps: dict[str, Candidate] = {whose: partial(step, trainer, inputs) for whose, trainer in made.items()}
        times = interleave(steps, rounds=rounds, device=device)
        memory = {whose: extra_bytes(run, device) for whose, run in steps.items()}
        ratio = times["ours"].times_faster_than(times["trl"])
        found += [
            figure(f"{name}: step", times["ours"].seconds, "s"),
            figure(f"{name}: step, times as fast as TRL's", ratio, "x", at_least=1),
            figure(f"{name}: memory, share of TRL's", memory["ours"] / max(1, memory["trl"]), "", at_most=1),
        ]
    return found


def main(quick: bool) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    report("trl_step", results(QUICK if quick else SIZES, 1 if quick else ROUNDS))


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
