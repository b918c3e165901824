"""The Trainer of transformers with and without the adapter: the same losses and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

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


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a Llama, a Mistral whose window is shorter than the rows, a Gemma 2, and a Mixtral with a balance loss."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    caps = {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}
    models = {
        "mistral": MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**sizes, **caps)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**sizes, **experts)),
    }
    found = {"llama": folder}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


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


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "all kept": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "mixtral"])
def test_training_is_the_trainers_under_its_options(
    folders: dict[str, Path], tmp_path: Path, kind: str, checkpointing: str, accumulation: int
) -> None:
    found = []
    for trainer_kind in (OurTrainer, Trainer):
        options = CHECKPOINTING[checkpointing] | {"gradient_accumulation_steps": accumulation, "max_steps": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer, callback = make(trainer_kind, folders[kind], tmp_path, **options, optim="sgd")
            trainer.train()
        found.append(([row["loss"] for row in trainer.state.log_history if "loss" in row], callback.seen))
    (our_losses, ours), (losses, theirs) = found
    assert our_losses == pytest.approx(losses, abs=TOLERANCE) and len(losses) == 2
    assert all(gap(one, other) < TOLERANCE for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_training_in_bfloat16_is_as_near_to_float32_as_the_trainers(
    folders: dict[str, Path], tmp_path: Path, kind: str, checkpointing: str
) -> None:
    found = []
    for trainer_kind, bf16 in ((OurTrainer, True), (Trainer, True), (Trainer, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = CHECKPOINTING[checkpointing] | {"bf16": bf16, "max_steps": 1}
            trainer, callback = make(trainer_kind, folders[kind], tmp_path, **options)
            trainer.train()
        found.append((trainer.state.log_history[0]["loss"], callback.seen[0]))
    (our_loss, ours), (loss, theirs), (exact, truth) = found
    assert our_loss == pytest.approx(loss, rel=5e-3) and loss == pytest.approx(exact, rel=5e-3)
    assert 1e-3 < gap(theirs, truth) < 0.1  # bfloat16 did round
    assert gap(ours, truth) < 2 * gap(theirs, truth) and gap(ours, theirs) < 2 * gap(theirs, truth)


def gap(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the distance of two gradients, as a share of the second."""
    first, second = (torch.cat([each[name].flatten() for name in truth]) for each in (found, truth))
    return float((first - second).norm() / second.norm())


def test_dropout_in_attention_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has a dropout of 0.1 in its attention"):
        OurTrainer(model=model, args=args, train_dataset=rows())


def test_labels_that_padding_predicts_give_the_trainers_loss(folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(OurTrainer, folder, tmp_path)
    inputs = {name: torch.tensor([row[name] for row in rows(4)]) for name in rows(1)[0]}
    inputs["labels"] = inputs["input_ids"]  # also where the padding is
    plain = trainer.compute_loss(trainer.model, inputs, return_outputs=True)[0]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), plain, rtol=1e-5, atol=1e-5)


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
