"""The fused Trainer of integrations.hf leaves out the balance loss of a mixture of experts, without a word.

A model with output_router_logits=True asks for that loss, and the plain Trainer's loss has it. The documentation
promises losses and gradients equal to the Trainer's.
"""

import copy
import tempfile

import numpy as np
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from mgrpo.engine.integrations import hf
from reproduction import cannot, fault, held
from reproduction.models import SIZES, llama

rng = np.random.default_rng(0)
rows = [rng.integers(1, 97, 12).tolist() for _ in range(4)]
data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in rows])


class FusedTrainer(hf.Fused, Trainer):
    pass


def first_loss(kind, model) -> float:
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = kind(model=copy.deepcopy(model), args=arguments, train_dataset=data)
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def difference(model) -> float:
    """Return how far the first losses of the two trainers differ. Raises ValueError if the model is refused."""
    return abs(first_loss(Trainer, model) - first_loss(FusedTrainer, model))


healthy = difference(llama())
if healthy > 1e-3:
    cannot(f"a plain Llama's first losses differ by {healthy}")
torch.manual_seed(0)
experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
model = MixtralForCausalLM(MixtralConfig(**SIZES, initializer_range=0.2, **experts)).eval()
try:
    found = difference(model)
except ValueError as error:
    held(f"refused: {error}")
if found > 1e-3:
    fault(f"the first losses differ by {found:.3g}")
held(f"the first losses differ by {found:.3g}")
