"""Policy.of accepts a model that caps its logits (final_logit_softcapping) if it is not trained yet.

The check at loading compares logits to 1e-2, and the cap of small logits stays below that. The log-probs are another
model's as soon as its logits grow.
"""

import copy

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from mgrpo.engine import Policy
from reproduction import cannot, fault, held
from reproduction.models import SIZES, TOLERANCE, llama, true_logprobs


def difference(model) -> float:
    """Return the largest difference of log-probs after the logits have grown. Raises ValueError if it is refused."""
    plain = copy.deepcopy(model)
    policy = Policy.of(model)
    with torch.no_grad():  # as after some training
        for each in (model, plain):
            each.get_input_embeddings().weight.mul_(60)
    ids = torch.randint(1, 97, (20,))
    return float((torch.tensor(policy.logprobs(ids.tolist())) - true_logprobs(plain, ids)).abs().max())


healthy = difference(llama())
if healthy > TOLERANCE:
    cannot(f"a plain Llama: difference {healthy}")
torch.manual_seed(0)
config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=3.0)
try:
    found = difference(Gemma2ForCausalLM(config).eval())
except ValueError as error:
    held(f"refused: {error}")
if found > TOLERANCE:
    fault(f"accepted; with grown logits the largest difference is {found:.3g} nats")
held(f"largest difference {found:.3g} nats")
