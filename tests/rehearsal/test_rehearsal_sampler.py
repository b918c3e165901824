"""The in-process sampler's whole step as it runs on a GPU: what the host sends, and where it waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsal import GPU, Rehearsal, rehearse, skip_unless_rehearsed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.inference import in_process
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import Session
from mgrpo.engine.model.logits import LogitMap, keep_logit_map
from toy import make_model

skip_unless_rehearsed()

PROMPTS, TURN = ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [7, 8, 9]), 4
LIKELIEST = 65  # what the rehearsal says was drawn: a letter, with log-prob -1
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 3},
    "gemma2": {"head_dim": 16, "sliding_window": 3},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}
SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def drawn(read: Tensor) -> Any:
    """Answer the one read of a step: (2, R) tokens and log-probs."""
    assert read.shape[0] == 2 and read.dtype == torch.float64
    return [[float(LIKELIEST)] * read.shape[1], [-1.0] * read.shape[1]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(make_model(tmp_path))


def sampler_of(kind: str, tokenizer: Any) -> InProcessSampler:
    config = AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    with torch.device(GPU):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="mgrpo").eval()
    keep_logit_map(model, LogitMap())
    agent = AgentConfig(model="", max_context=64, max_new_tokens=TURN, top_p=0.9)
    return InProcessSampler(model, tokenizer, agent, concurrency=4)


async def talk(sampler: InProcessSampler, session: Session) -> None:
    """Play two turns with an observation between them."""
    await sampler.act(session)
    session.append([11, 12])
    await sampler.act(session)
    sampler.close(session)


async def drive(sampler: InProcessSampler, sessions: list[Session], done: Rehearsal) -> list[tuple[int, list[str]]]:
    """Play all sessions; return the reads and the other waits of each step."""
    found = []
    running = [asyncio.create_task(talk(sampler, session)) for session in sessions]
    while not all(task.done() for task in running):
        for _ in range(3):
            await asyncio.sleep(0)
        if sampler.pending:
            done.reads.clear()
            done.waits.clear()
            sampler.step()
            found.append((len(done.reads), list(done.waits)))
    for task in running:
        task.result()
    return found


def test_a_copy_that_the_host_awaits_is_counted() -> None:
    with rehearse() as done:
        torch.tensor([1, 2], device=GPU)
        assert done.waits == ["a copy to cuda"]
        torch.empty(2).to(GPU, non_blocking=True)  # from pageable memory
        torch.empty(2).pin_memory().to(GPU)
        torch.empty(2, device=GPU).cpu()
        assert done.waits == ["a copy to cuda"] * 3 + ["a copy to cpu"]
        torch.empty(2).pin_memory().to(GPU, non_blocking=True)
        torch.empty(2, device=GPU).copy_(torch.empty(2).pin_memory(), non_blocking=True)
        assert len(done.waits) == 4 and not done.reads


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_gpu_once(kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "check_sampler", lambda *_: None)  # which is all about numbers
    with rehearse(drawn) as done:
        sampler = sampler_of(kind, tokenizer)
        sessions = [Session((n,), greedy=n == 2) for n in range(len(PROMPTS))]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            session.append(list(prompt))
        steps = asyncio.run(drive(sampler, sessions, done))
    assert len(steps) > 2 * TURN and steps == [(1, [])] * len(steps)
    for session, prompt in zip(sessions, PROMPTS, strict=True):
        assert session.tokens == [*prompt, *[LIKELIEST] * TURN, 11, 12, *[LIKELIEST] * TURN]
        assert session.logprobs[-1] == -1.0
