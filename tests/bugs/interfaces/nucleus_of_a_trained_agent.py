"""With top_p < 1, the sampler's log-probs of a trained agent are of another distribution than the trainer's.

The sampler's are those of the cut distribution, the trainer's those of the whole one, and nothing says so. With the
very same weights gap_mean is |log of the mass kept|, and with sampler_cap every token's weight is that mass: 0.5 halves
the gradient. (A mend may also be to say so in the documentation; then remove this script.)
"""

import torch

from mgrpo.engine import Objective, Policy, pack
from mgrpo.engine.inference.sampler import Session
from reproduction import cannot, fault, held
from reproduction.models import llama, sample, tokenizer


def gap_mean(top_p: float) -> float:
    """Return a policy's mean difference from its own sampler, in nats. Raises ValueError if top_p is refused."""
    torch.manual_seed(0)
    model = llama(initializer_range=0.1)
    policy = Policy.of(model, tokenizer(), max_context=64, max_new_tokens=30, top_p=top_p)
    sessions = [Session((number,)) for number in range(8)]
    for session in sessions:
        session.append([5, 6, 7])
    sample(policy.sampler(), sessions)
    found = [session.trajectory() for session in sessions]
    tokens, sampled, logprobs = ([getattr(t, name) for t in found] for name in ("tokens", "sampled", "logprobs"))
    (batches,) = pack(tokens, sampled, [1.0] * 8, [0.01] * 8, cap=512, sampler_logprobs=logprobs)
    metrics = policy.forward_backward(batches, Objective(sampler_cap=2.0)).metrics
    print(top_p, {name: round(metrics[name], 3) for name in ("gap_mean", "gap_max", "sampler_weight_mean")})
    return metrics["gap_mean"]


if (healthy := gap_mean(1.0)) > 0.01:
    cannot(f"gap_mean is {healthy} with top_p = 1")
try:
    found = gap_mean(0.5)
except ValueError as error:
    held(f"refused: {error}")
if found > 0.01:
    fault(f"gap_mean is {found:.3g} nats with the very same weights")
held(f"gap_mean is {found:.3g}")
