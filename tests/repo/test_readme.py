"""The README is short, its code runs, and it shows files of the repository as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from toy import make_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LINES = README.splitlines()


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def line_of(text: str) -> int:
    """Return the number of the first line that begins with a text."""
    return next(number for number, line in enumerate(LINES, 1) if line.startswith(text))


def test_it_is_short_and_begins_with_a_command_and_code() -> None:
    assert len(LINES) <= 150
    assert line_of("make train") < 20
    assert line_of("from mgrpo import") < 40


def test_few_of_its_words_have_a_digit() -> None:
    words = re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()
    with_digit = [word for word in words if re.search(r"\d", word)]
    assert len(words) > 400 and len(with_digit) <= 0.06 * len(words), with_digit


def test_it_has_one_figure_and_one_table_of_at_most_six_results() -> None:
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1
    part = README[README.index("## Results") : README.index("## Where to look")]
    assert len(re.findall(r"^\|", part, re.MULTILINE)) - 2 <= 6


def test_the_files_that_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 8
    for link in links:
        assert (ROOT / link).is_file(), link


def test_the_environment_shown_is_the_one_in_examples() -> None:
    assert blocks("python")[0] == (ROOT / "examples/sums/environment.py").read_text()


def test_the_house_names_every_room() -> None:
    named = re.findall(r"^\* `(\w+)`: ", README[README.index("## The code") :], re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in (ROOT / "engine").glob("*/__init__.py"))


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
    exec(blocks("python")[1], given)
    assert given["policy"].version == 1 and (tmp_path / "checkpoint" / "policy.json").exists()
    assert given["norm"] > 0 and not torch.equal(model.lm_head.weight, before)
