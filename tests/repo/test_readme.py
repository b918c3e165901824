"""The README says what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mgrpo.kernels import Objective, RuleRows
from toy import make_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_environment_shown_is_the_one_in_examples() -> None:
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown and shown[1] == (ROOT / "examples/sums/environment.py").read_text()


def test_the_house_names_every_room_with_its_own_sentence() -> None:
    shown = dict(re.findall(r"^\* `(\w+)`: (.*)$", README[README.index("## The house") :], re.MULTILINE))
    rooms = {path.parent.name: path for path in (ROOT / "engine").glob("*/__init__.py")}
    assert shown == {name: ast.get_docstring(ast.parse(path.read_text())) for name, path in rooms.items()}


def blocks() -> list[str]:
    """The Python of the section on embedding."""
    section = README[README.index("## In your own trainer") : README.index("## The house")]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_policy_shown_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"), dtype=torch.float32)
    before = model.lm_head.weight.clone()
    lengths = range(5, 13)
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "model": model,
        "rewards": [1, 0, 0, 1, 0, 0, 0, 1],
        "actions": [n - 2 for n in lengths],
        "tokens": [rng.integers(1, 257, n) for n in lengths],
        "sampled": [np.arange(n) >= 2 for n in lengths],
    }
    monkeypatch.chdir(tmp_path)
    exec(blocks()[0], given)
    assert given["policy"].version == 1 and (tmp_path / "checkpoint" / "policy.json").exists()
    assert given["norm"] > 0 and not torch.equal(model.lm_head.weight, before)


def test_the_objective_shown_is_cispo() -> None:
    given: dict[str, Any] = {}
    exec(blocks()[1], given)
    logprobs, old = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-2.0, -1.0])
    advantages, ones = torch.tensor([3.0, 5.0]), torch.ones(2)
    rows = RuleRows(logprobs, ones, advantages, ones, old, None, None, None, 0)
    given["cispo"](rows, Objective(clip_high=0.5)).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.5 * 3, -5 * float(np.exp(-1))]))


def test_the_adapter_shown_is_a_trainer() -> None:
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'mgrpo[dev]'")
    given: dict[str, Any] = {}
    exec(blocks()[2], given)
    assert issubclass(given["Trainer"], trl.GRPOTrainer) and given["Trainer"].__mro__[1].__name__ == "FusedGRPO"
