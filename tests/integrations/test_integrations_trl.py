"""TRL's own trainer with and without the adapter: same data, same seeds, the same losses and gradients."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
)

from ranks import free_port, set_environment
from toy import make_model

trl = pytest.importorskip("trl", reason="needs trl: pip install 'mgrpo[dev]'")
datasets = pytest.importorskip("datasets", reason="needs datasets, which trl brings")

from mgrpo.bench import trl as trl_step  # noqa: E402
from mgrpo.engine.integrations import trl as adapter  # noqa: E402
from mgrpo.engine.integrations.flat import flatten  # noqa: E402
from mgrpo.engine.integrations.trl import FusedGRPO  # noqa: E402

PROMPTS = ["abc", "hello world", "q", "zzzz zz"]
TOLERANCE = 1e-5
VOCABULARY = 257


class OurTrainer(FusedGRPO, trl.GRPOTrainer):
    """Combine the two as a user does."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model that often ends a text, so that completions have different lengths."""
    path = make_model(tmp_path_factory.mktemp("model"), tie=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0] = 2.5 * model.lm_head.weight[0]
    model.save_pretrained(path)
    return path


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(token % 7 for token in ids) % 5) for ids in completion_ids]


class Gradients(TrainerCallback):
    """Record the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append({name: param.grad.clone() for name, param in model.named_parameters()})


def make(kind: type, folder: Path, out: Path, callback: Gradients | None = None, **options: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "num_iterations": 2,  # the second is off-policy
        "max_completion_length": 10,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,  # not clipped
        "temperature": 0.9,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=options.pop("dtype", torch.float32)),
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings | options),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=tokenizer,
        callbacks=[callback] if callback else None,
    )
    trainer.losses = []
    compute = trainer._compute_loss

    def recorded(model: Any, inputs: Any) -> Tensor:
        loss = compute(model, inputs)
        trainer.losses.append(float(loss))
        return loss

    trainer._compute_loss = recorded
    return trainer


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=TOLERANCE * max(1.0, largest), msg=name)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
KLS = {"no-kl": {"beta": 0.0}, "kl": {"beta": 0.1, "use_bias_correction_kl": False}, "corrected-kl": {"beta": 0.1}}


@pytest.mark.parametrize(("loss_type", "level", "kl"), list(itertools.product(LOSSES, ("token", "sequence"), KLS)))
def test_training_is_trls(folder: Path, tmp_path: Path, loss_type: str, level: str, kl: str) -> None:
    """Four steps of two micro-batches each: on-policy and off-policy, at weights that have moved."""
    found = {}
    for kind in (trl.GRPOTrainer, OurTrainer):
        callback = Gradients()
        options = {"loss_type": loss_type, "importance_sampling_level": level} | KLS[kl]
        trainer = make(kind, folder, tmp_path, callback, **options)
        trainer.train()
        found[kind] = (trainer.losses, callback.seen, trainer.state.log_history)
    theirs, ours = found[trl.GRPOTrainer], found[OurTrainer]
    assert len(theirs[0]) == 8 and any(abs(loss) > 1e-3 for loss in theirs[0])
    assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in other.values())
        assert_alike(one, other)
    lengths = [row["completions/mean_length"] for row in theirs[2] if "completions/mean_length" in row]
    assert lengths == [row["completions/mean_length"] for row in ours[2] if "completions/mean_length" in row]
    if kl != "no-kl":  # every row was computed, so the means are TRL's except for the averaging of a step's sequences
        for row, other in zip(ours[2][:-1], theirs[2][:-1], strict=True):
            assert row["entropy"] == pytest.approx(other["entropy"], rel=0.05)
            assert row["clip_ratio/high_mean"] == pytest.approx(other["clip_ratio/high_mean"], abs=0.05)


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "all kept": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
ONE_STEP = {"max_steps": 1, "num_iterations": 1}


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the model's folder, one of a Mistral whose window is shorter than its texts, and one of a Gemma 2."""
    path, capped = (make_model(tmp_path_factory.mktemp(name)) for name in ("mistral", "gemma2"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4, initializer_range=0.3)).save_pretrained(path)
    caps: dict[str, Any] = {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **caps, initializer_range=0.3)).save_pretrained(capped)
    return {"llama": folder, "mistral": path, "gemma2": capped}


def first_step(kind: type, folder: Path, out: Path, **options: Any) -> tuple[list[float], Tensor]:
    """Return the losses of a step's micro-batches and its gradient as one vector."""
    callback = Gradients()
    trainer = make(kind, folder, out, callback, **ONE_STEP | options)
    trainer.train()
    return trainer.losses, torch.cat([gradient.flatten() for gradient in callback.seen[0].values()])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("model", ["llama", "mistral", "gemma2"])
def test_a_step_is_trls_under_its_options(
    folders: dict[str, Path], tmp_path: Path, model: str, checkpointing: str, accumulation: int
) -> None:
    """Compare in float32 exactly, and in bfloat16, in which TRL's own gradient is some 2 % from that in float32."""
    options = CHECKPOINTING[checkpointing] | {"gradient_accumulation_steps": accumulation, "beta": 0.1}
    options |= {"use_bias_correction_kl": False}
    for bf16, near, close in ((False, TOLERANCE, TOLERANCE), (True, 5e-3, 0.05)):
        losses, theirs = first_step(trl.GRPOTrainer, folders[model], tmp_path, **options, bf16=bf16)
        our_losses, ours = first_step(OurTrainer, folders[model], tmp_path, **options, bf16=bf16)
        assert our_losses == pytest.approx(losses, abs=near) and len(losses) == accumulation
        assert (ours - theirs).norm() < close * theirs.norm() and theirs.abs().max() > 1e-2


def test_a_float32_head_on_a_bfloat16_model_is_trls(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autocast = []
    sweep = adapter.linear_grpo_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return sweep(*args, **kwargs)

    monkeypatch.setattr(adapter, "linear_grpo_loss", watched)
    options = {"cast_lm_head_to_fp32": True, "bf16": True, "beta": 0.1, "dtype": torch.bfloat16}
    losses, theirs = first_step(trl.GRPOTrainer, folder, tmp_path, **options)
    our_losses, ours = first_step(OurTrainer, folder, tmp_path, **options)
    assert our_losses == pytest.approx(losses, abs=5e-3) and (ours - theirs).norm() < 0.05 * theirs.norm()
    assert autocast == [False, False]


def train_both(rank: int, port: str, folder: Path, out: Path) -> None:
    set_environment(rank, 2, port)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    found = []
    for kind in (OurTrainer, trl.GRPOTrainer):
        callback = Gradients()
        trainer = make(kind, folder, out, callback, beta=0.1, per_device_train_batch_size=2, max_steps=2)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        found.append((trainer.losses, callback.seen))
    (our_losses, ours), (losses, theirs) = found
    assert our_losses == pytest.approx(losses, abs=TOLERANCE) and any(abs(loss) > 1e-3 for loss in losses)
    for one, other in zip(ours, theirs, strict=True):
        assert_alike(one, other)


def test_two_processes_train_as_trls_do(folder: Path, tmp_path: Path) -> None:
    """Run under DistributedDataParallel, which wraps the model's forward."""
    spawn(train_both, (free_port(), folder, tmp_path), nprocs=2)


def inputs_of(seed: int, wide: bool = False) -> dict[str, Tensor]:
    """Return a micro-batch as TRL makes it: prompts padded left, completions right, one of them without a token."""
    g = torch.Generator().manual_seed(seed)
    batch, prompt, completion = 5, 7, 9
    lengths = torch.tensor([9, 1, 0, 6, 4])
    prompts = torch.tensor([7, 1, 3, 5, 2])
    mask = (torch.arange(completion) < lengths[:, None]).long()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    advantages = normal(batch, completion) if wide else normal(batch)
    advantages[3] = 0
    return {
        "prompt_ids": torch.randint(1, VOCABULARY, (batch, prompt), generator=g),
        "prompt_mask": (torch.arange(prompt) >= prompt - prompts[:, None]).long(),
        "completion_ids": torch.randint(1, VOCABULARY, (batch, completion), generator=g),
        "completion_mask": mask,
        "tool_mask": torch.randint(2, (batch, completion), generator=g) | (torch.arange(completion) == 0).long(),
        "advantages": advantages,
        "old_per_token_logps": -5 + normal(batch, completion),
        "ref_per_token_logps": -5 + normal(batch, completion),
        "importance_sampling_ratio": normal(batch, completion).exp(),
        "num_items_in_batch": torch.tensor(40.0),
    }


def loss_and_gradients(trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss), {name: param.grad.clone() for name, param in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return both trainers; the cases change their options in place."""
    out = tmp_path_factory.mktemp("out")
    made = [make(kind, folder, out, beta=0.1) for kind in (OurTrainer, trl.GRPOTrainer)]
    for trainer in made:
        trainer.current_gradient_accumulation_steps = 3  # of steps of which a generation has two
    return SimpleNamespace(ours=made[0], theirs=made[1])


PLAIN_KL = {"args.use_bias_correction_kl": False}
SEQUENCE = {"importance_sampling_level": "sequence"}
FUSED: list[dict[str, Any]] = [  # what is changed of the trainer
    {},
    PLAIN_KL,
    PLAIN_KL | SEQUENCE | {"loss_type": "grpo"},
    PLAIN_KL | {"args.delta": 1.5},
    PLAIN_KL | {"use_vllm": True, "vllm_importance_sampling_correction": True},
    {"loss_type": "bnpo", "beta": 0.0},
    {"loss_type": "dr_grpo"} | SEQUENCE,
    {"loss_type": "dapo", "beta": 0.0} | SEQUENCE,
    {"loss_type": "luspo"} | SEQUENCE,
    {"use_vllm": True, "vllm_importance_sampling_correction": True},
    {"args.delta": 1.5},
    {"loss_type": "cispo", "epsilon_high": 1.5},
    {"loss_type": "sapo", "beta": 0.0},
    {"loss_type": "sapo"} | SEQUENCE,
]
THEIRS: list[dict[str, Any]] = [  # TRL's own arithmetic, from our log-probs
    {"args.delta": 1.1},
    {"loss_type": "vespo"},
    {"top_entropy_quantile": 0.5},
    {"off_policy_mask_threshold": 0.5},
    {"_entropy_bonus_enabled": True, "entropy_coef": 0.1, "use_adaptive_entropy": False},
]


@pytest.mark.parametrize("wide", [False, True], ids=["a sequence's", "a token's"])
@pytest.mark.parametrize("options", [*FUSED, *THEIRS], ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_every_option_of_the_loss(pair: SimpleNamespace, options: dict[str, Any], wide: bool) -> None:
    """Draw advantages of sequences or tokens, tool results among the completions, and a sequence without advantage."""
    with pytest.MonkeyPatch.context() as patch:
        for trainer in (pair.ours, pair.theirs):
            for name, value in options.items():
                owner, _, attribute = name.rpartition(".")
                patch.setattr(trainer.args if owner else trainer, attribute, value)
        inputs = inputs_of(11, wide)
        assert pair.ours._is_ours(inputs) == (options in FUSED)
        loss, gradients = loss_and_gradients(pair.ours, dict(inputs))
        expected, theirs = loss_and_gradients(pair.theirs, dict(inputs))
    assert loss == pytest.approx(expected, abs=TOLERANCE * max(1, abs(expected)))
    assert_alike(gradients, theirs)


ZEROS = {  # columns of a sequence that count nothing
    "the last": slice(4, None),
    "the first": slice(None, 3),
    "every other": slice(None, None, 2),
}


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("which", ["advantages", "importance_sampling_ratio"])
@pytest.mark.parametrize("loss_type", [*LOSSES, "luspo"])
def test_tokens_without_weight_share_the_ratio_of_their_sequence(
    pair: SimpleNamespace, loss_type: str, which: str, zeros: str
) -> None:
    """Give some tokens of every sequence no advantage, or no weight against the sampler's rounding."""
    inputs = inputs_of(5, which == "advantages")
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    found = pair.theirs._get_per_token_logps_and_entropies(pair.theirs.model, ids, mask, 9)[0].detach()
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    inputs["old_per_token_logps"] = found + 0.3 * noise
    inputs[which][:, ZEROS[zeros]] = 0
    corrected = which != "advantages"
    options = {"loss_type": loss_type, "importance_sampling_level": "sequence", "beta": 0.0}
    options |= {"use_vllm": corrected, "vllm_importance_sampling_correction": corrected}
    with pytest.MonkeyPatch.context() as patch:
        for trainer in (pair.ours, pair.theirs):
            for name, value in options.items():
                patch.setattr(trainer, name, value)
        loss, gradients = loss_and_gradients(pair.ours, dict(inputs))
        expected, theirs = loss_and_gradients(pair.theirs, dict(inputs))
    assert loss == pytest.approx(expected, abs=TOLERANCE) and abs(expected) > 1e-3
    assert_alike(gradients, theirs)


def test_nothing_to_learn_is_a_zero_gradient_of_every_weight(pair: SimpleNamespace) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.ours, "beta", 0.0)
        loss, gradients = loss_and_gradients(pair.ours, inputs_of(1) | {"advantages": torch.zeros(5)})
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_log_probs_for_the_ratio_are_trls_in_any_chunks(pair: SimpleNamespace) -> None:
    inputs = inputs_of(2)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    for size in (None, 2):
        found = [
            t._get_per_token_logps_and_entropies(t.model, ids, mask, 9, batch_size=size, compute_entropy=True)
            for t in (pair.ours, pair.theirs)
        ]
        for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_only_what_an_action_follows_is_run() -> None:
    ids = torch.arange(14).reshape(2, 7)
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]).bool()
    action = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]]).bool()
    flat = flatten(ids, valid, action)
    assert flat.input_ids.tolist() == [1, 2, 3, 7, 8] and flat.targets.tolist() == [2, 3, 4, 8, 9]
    assert flat.positions.tolist() == [0, 1, 2, 0, 1] and flat.layout.cu_seqlens.tolist() == [0, 3, 5]
    assert flat.columns.tolist() == [1, 2, 3, 0, 1]
    assert flat.layout.max_seqlen == 3 and flat.take(ids).tolist() == flat.targets.tolist()
    assert flat.put(torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0]), 4).tolist() == [[6, 7, 0, 0], [0, 0, 0, 0]]
    nothing = flatten(ids, valid, torch.zeros_like(action))
    assert nothing.input_ids.tolist() == [1] and nothing.layout.cu_seqlens.tolist() == [0, 1]


def test_the_model_still_generates_as_it_did(pair: SimpleNamespace) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    ours, theirs = (trainer.model.generate(**given) for trainer in (pair.ours, pair.theirs))
    assert torch.equal(ours, theirs) and ours.shape[1] > 4


def test_the_benchmark_ends_in_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    trl_step.main(quick=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == "trl_step" and len(found["results"]) == 6
    assert all(result["value"] > 0 for result in found["results"] if "memory" not in result["name"])
