"""With compute.activation_checkpointing = true, Phi-3.5-MoE's log-probs of the same tokens differ from call to call.

The model is put in training mode, in which its router draws among experts of nearly the same score. The four tokens of
the check at loading show that only now and then; ten models of different seeds are tried.
"""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PhimoeConfig, PhimoeForCausalLM

from mgrpo.engine import ComputeConfig, Policy
from reproduction import cannot, fault, held
from reproduction.models import SIZES, TOLERANCE, llama, tokenizer
from reproduction.runs import new_folder

COMPUTE = ComputeConfig(dtype="float32", device="cpu", activation_checkpointing=True)


def save(model) -> Path:
    folder = new_folder()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def difference(model: LlamaForCausalLM | PhimoeForCausalLM) -> float:
    """Return how far log-probs of the same tokens differ between two calls. Raises ValueError if it is refused."""
    policy = Policy.of(save(model), max_context=256, compute=COMPUTE)
    tokens = torch.randint(1, 97, (200,)).tolist()
    first, again = (torch.tensor(policy.logprobs(tokens)) for _ in range(2))
    return float((first - again).abs().max())


healthy = difference(llama())
if healthy > TOLERANCE:
    cannot(f"a plain Llama's log-probs differ by {healthy}")
config = PhimoeConfig(**SIZES, initializer_range=0.2, num_local_experts=4, num_experts_per_tok=2)
wrong = {}
for seed in range(10):
    torch.manual_seed(seed)
    try:
        found = difference(PhimoeForCausalLM(config))
    except ValueError as error:
        print(f"seed {seed}: refused: {error}")
        continue
    print(f"seed {seed}: the same tokens twice: {found:.3g} nats apart")
    if found > TOLERANCE:
        wrong[seed] = found
if wrong:
    fault(f"accepted, and not the same twice: {wrong}")
held("refused, or the same twice")
