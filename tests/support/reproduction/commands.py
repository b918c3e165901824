"""Make a small project of one agent, for reproductions of what the `mgrpo` command does with it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from reproduction import cannot
from reproduction.runs import mgrpo, new_folder, write
from toy import make_model

ENVIRONMENT = """
import asyncio
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Answer, Score, Task, ToolCall


class Plain(Environment):
    def tasks(self, split):
        return [Task(f"t{i}", {"q": str(i)}) for i in range(6)]

    def prompt(self, call):
        return f"{call.task.data['q']}?"

    def parse(self, call, text):
        return Answer(text)

    def score(self, episode):
        return Score(True, float(len(episode.main.answer or "") % 2))

    def script(self, call):
        return "ab"
"""


def new_project(more: str = "") -> Path:
    """Return a new folder with run.toml, environment.py (followed by `more`), and the models llama and gpt2."""
    folder = new_folder()
    make_model(folder / "llama", max_position_embeddings=512)
    make_gpt2(folder)
    (folder / "environment.py").write_text(ENVIRONMENT + textwrap.dedent(more))
    agent = {"model": str(folder / "llama"), "max_new_tokens": 8, "max_turns": 3, "max_context": 64}
    config = {
        "run_dir": str(folder / "run"),
        "steps": 2,
        "queries_per_step": 2,
        "environment": {"use": f"{folder}/environment.py:Plain"},
        "agents": {"main": agent},
        "algorithm": {"rollouts": 3},
        "eval": {"questions": 2},
        "compute": {"dtype": "float32", "device": "cpu"},
    }
    write(folder, config)
    return folder


def make_gpt2(folder: Path) -> None:
    """Save a small GPT-2 of 64 learned positions, which has no key-value heads in its config."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    PreTrainedTokenizerFast.from_pretrained(folder / "llama").save_pretrained(folder / "gpt2")


def settings(**values: Any) -> list[str]:
    """Return `--set` options; a double underscore stands for the dot of a key."""
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def check_healthy_command(command: str, folder: Path) -> None:
    """Show that `mgrpo COMMAND` takes the project as it is; end the script with status 2 if it does not."""
    status, said = mgrpo(command, folder / "run.toml", *settings(run_dir=folder / "healthy"))
    if status != 0:
        cannot(f"a healthy `mgrpo {command}` ended with status {status}: {said[-800:]}")


def last_line(said: str) -> str:
    """Return the last line of a command's output."""
    return (said.strip().splitlines() or [""])[-1]
