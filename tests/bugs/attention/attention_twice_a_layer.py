"""The in-process sampler samples from another model if attention runs more than once per layer index.

Training is right for such models (DiffLlama, HRM). But the sampler keeps one key-value pair per layer index, so that
the second attention overwrites the first: its tokens and their recorded log-probs are another model's.
"""

import copy

import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from mgrpo.engine import Policy
from mgrpo.engine.inference.sampler import Session
from reproduction import cannot, fault, held
from reproduction.models import EAGER, SIZES, TOLERANCE, llama, sample, tokenizer, true_logprobs


def difference(model) -> float | None:
    """Return the largest difference of sampled tokens' log-probs from the model's own; None if it is refused."""
    plain = copy.deepcopy(model)
    try:
        sampler = Policy.of(model, tokenizer(), max_context=64, max_new_tokens=20).sampler()
    except ValueError as error:
        print("refused:", error)
        return None
    sessions = [Session((number,)) for number in range(5)]
    for session in sessions:
        session.append([5, 6, 7, 8])
    sample(sampler, sessions)
    worst = 0.0
    for session in sessions:
        true = true_logprobs(plain, torch.tensor(session.tokens))
        gaps = [abs(float(true[i - 1]) - session.logprobs[i]) for i, own in enumerate(session.sampled) if own]
        worst = max(worst, *gaps)
    return worst


healthy = difference(llama())
if healthy is None or healthy > TOLERANCE:
    cannot(f"a plain Llama: difference {healthy}")
torch.manual_seed(0)
config = DiffLlamaConfig(**SIZES, head_dim=8, initializer_range=0.3)
found = difference(DiffLlamaForCausalLM._from_config(config, **EAGER).eval())
if found is not None and found > TOLERANCE:
    fault(f"largest difference {found:.3g} nats")
held(f"largest difference {found} nats (None: refused)")
