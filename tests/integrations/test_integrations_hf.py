"""The Trainer of transformers with and without the adapter: the same losses and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mgrpo.engine.integrations.hf import Fused
from toy import make_model

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'mgrpo[dev]'")
TOLERANCE = 1e-5


class OurTrainer(Fused, Trainer):
    """Combine the two as a user does."""


class Gradients(TrainerCallback):
    """Record the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append({name: param.grad.clone() for name, param in model.named_parameters()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    """Return rows padded right, with labels after a prompt, a gap in them, and one row without labels."""
    g = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        length = 4 + number % 7
        ids = torch.randint(1, 257, (10,), generator=g)
        labels = ids.clone()
        labels[:2], labels[length:] = -100, -100
        labels[3 + number % 3] = -100
        if number == 5:
            labels[:] = -100
        mask = [1] * length + [0] * (10 - length)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": mask})
    return made


def make(kind: type, folder: Path, out: Path, **options: Any) -> tuple[Any, Gradients]:
    callback = Gradients()
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
    }
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(out), max_grad_norm=0.0, seed=1, **settings | quiet | options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return kind(model=model, args=args, train_dataset=rows(), callbacks=[callback]), callback


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}], ids=str)
def test_training_is_the_trainers(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for kind in (OurTrainer, Trainer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer, callback = make(kind, folder, tmp_path, **options)
            trainer.train()
        found.append(([row["loss"] for row in trainer.state.log_history if "loss" in row], callback.seen))
    (our_losses, ours), (losses, theirs) = found
    assert our_losses == pytest.approx(losses, abs=TOLERANCE) and len(losses) == 3 and min(losses) > 1
    for one, other in zip(ours, theirs, strict=True):
        assert max(float(gradient.abs().max()) for gradient in other.values()) > 1e-2
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=0, atol=TOLERANCE, msg=name)


def test_what_is_ours_is_the_plain_loss_alone(folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(OurTrainer, folder, tmp_path)
    inputs = {name: torch.tensor([row[name] for row in rows(4)]) for name in rows(1)[0]}
    assert trainer._is_ours(inputs, False) and not trainer._is_ours(inputs, True)
    assert not trainer._is_ours(inputs | {"position_ids": inputs["input_ids"]}, False)
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert outputs["logits"].shape == (4, 10, 257)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), loss, rtol=1e-5, atol=1e-5)


def test_labels_that_are_not_the_inputs_are_the_targets(folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(OurTrainer, folder, tmp_path)
    g = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": torch.randint(1, 257, (2, 8), generator=g),
        "labels": torch.randint(1, 257, (2, 8), generator=g),
    }
    plain = trainer.compute_loss(trainer.model, inputs, return_outputs=True)[0]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), plain, rtol=1e-5, atol=1e-5)
