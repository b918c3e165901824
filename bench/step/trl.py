"""Take the step of `mgrpo bench step` with TRL's own `GRPOTrainer`, which waits at each step until it is called.

(`bench/trl.py` measures something else: TRL's trainer with our loss inside it.)

This works for single-agent data only: TRL has no sub-agents, and needs equally many rollouts of every query. Its
`rollout_func` returns the recorded tokens, so nothing is sampled. Its rewards are our advantages, which it centres
again (no change) and does not scale. There is no reference model and no second forward, and activations are kept where
ours are; everything else is TRL's default: fp32 weights, bf16 by autocast.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from mgrpo.bench.step.case import LR, Case
from mgrpo.bench.step.usual import Way, samples_of
from mgrpo.engine.types import MAIN, Trajectory

STEPS = 1_000_000  # never reached: the trainer is stopped before


class Unavailable(Exception):
    """Report that TRL cannot run here, or not on this case; the message says why."""


class _Stopped(Exception):
    """End the trainer's loop: no further step is needed."""


class _Gate(TrainerCallback):
    """Let the trainer's loop, which runs in its own thread, take one step at a time."""

    def __init__(self) -> None:
        self.go: SimpleQueue[bool] = SimpleQueue()
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()
        self.look: Callable[[dict[str, Tensor]], None] | None = None  # called with the gradients

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.go.get():
            raise _Stopped

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        if self.look is not None:
            self.look({name: p.grad for name, p in given["model"].named_parameters()})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done.put(None)


class Trl:
    """Run a GRPOTrainer on the data of a case; each call takes one step. Raises Unavailable if TRL cannot run here."""

    def __init__(self, case: Case, folder: Path):
        self.gate = _Gate()
        self.trainer = _trainer(case, folder, self.gate)
        threads = torch.get_num_threads()

        def run() -> None:
            try:
                torch.set_num_threads(threads)  # torch keeps this setting per thread
                self.trainer.train()
            except BaseException as fault:  # passed to the caller, who waits for this thread
                self.gate.done.put(fault)

        self.thread = threading.Thread(target=run, daemon=True, name="trl")
        self.thread.start()

    def __call__(self) -> None:
        """Take one step."""
        self.gate.go.put(True)
        if (fault := self.gate.done.get()) is not None:
            raise fault

    @property
    def look(self) -> Callable[[dict[str, Tensor]], None] | None:
        """The function that is called with the gradient of each step, by the weights' names."""
        return self.gate.look

    @look.setter
    def look(self, look: Callable[[dict[str, Tensor]], None] | None) -> None:
        self.gate.look = look

    def close(self) -> None:
        """Stop the trainer."""
        self.gate.go.put(False)
        self.thread.join()


def _trainer(case: Case, folder: Path, gate: _Gate) -> Any:
    recorded = _recorded(case)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a part of TRL cannot be imported
        raise Unavailable(f"trl: {str(error).splitlines()[0]}") from error
    rollouts = max(len(made) for made in recorded.values())
    if any(len(made) != rollouts for made in recorded.values()):
        raise Unavailable("TRL needs equally many rollouts of every query")
    algorithm, agent, compute = case.config.algorithm, case.config.agents[case.agent], case.config.compute
    size = _micro_batch(recorded, compute.max_tokens)
    cpu = not torch.cuda.is_available()
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=cpu,
        bf16=compute.dtype == "bfloat16",
        gradient_checkpointing=compute.activation_checkpointing,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(recorded) * rollouts // size,
        num_generations=rollouts,
        max_completion_length=round(algorithm.length_constant),  # dr_grpo divides by this; nothing is truncated
        temperature=agent.temperature,
        loss_type={"trajectory": "grpo", "constant": "dr_grpo"}[algorithm.length_norm],
        scale_rewards="none",
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=agent.weight_decay,
        max_grad_norm=1e9,  # the norm is measured but never clipped, as the gradient is shown afterwards
        shuffle_dataset=False,
        max_steps=STEPS,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
    )
    tokenizer = AutoTokenizer.from_pretrained(agent.model)
    tokenizer.pad_token = tokenizer.eos_token
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(agent.model, dtype=torch.float32),
        reward_funcs=lambda reward, **_: reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": query} for query in recorded]),
        processing_class=tokenizer,
        callbacks=[gate],
        rollout_func=lambda prompts, _: _rollouts(prompts, recorded),
    )


Recorded = dict[str, list[tuple[Trajectory, float]]]  # by query: the trajectories and advantages of its rollouts


def _recorded(case: Case) -> Recorded:
    if case.agent != MAIN:
        raise Unavailable("TRL has no sub-agents, whose calls differ in number between rollouts")
    found: Recorded = defaultdict(list)
    samples = iter(samples_of(Way(copies=False), case))
    for group in case.groups:
        for _ in group.calls:
            sample = next(samples)
            assert isinstance(sample.trajectory, Trajectory)
            found[str(group.query)].append((sample.trajectory, sample.advantage))
    return found


def _micro_batch(recorded: Recorded, max_tokens: int) -> int:
    """Return its sequences: the largest divisor of their number that fits if all are as long as the longest."""
    lengths = [len(t) for made in recorded.values() for t, _ in made]
    fitting = max(1, max_tokens // max(lengths))
    return max(size for size in range(1, fitting + 1) if len(lengths) % size == 0)


def _rollouts(prompts: list[str], recorded: Recorded) -> dict[str, Any]:
    """Return the recorded tokens and reward of each prompt's next rollout."""
    rest = {query: iter(made) for query, made in recorded.items()}
    out: dict[str, Any] = defaultdict(list)
    for prompt in prompts:
        trajectory, advantage = next(rest[prompt])
        tokens, flags = trajectory.tokens.tolist(), trajectory.sampled.tolist()
        first = flags.index(True)
        out["prompt_ids"].append(tokens[:first])
        out["completion_ids"].append(tokens[first:])
        out["logprobs"].append(trajectory.logprobs.tolist()[first:])
        out["env_mask"].append([int(flag) for flag in flags[first:]])
        out["reward"].append(advantage)
    return dict(out)
