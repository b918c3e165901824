"""Hold 20 questions that a new developer asks, each with the one room in which its answer is.

They were chosen to be answered from the rooms' one-sentence docstrings alone (README, "The code"; kernels/, bench/,
csrc/ and bindings/ beside them). The test keeps the list true: each room is there, and so is each definition.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
OTHERS = ("kernels", "kernels/triton", "bench", "csrc", "bindings")  # rooms beside those of the engine


class Question(NamedTuple):
    """A question, the room that answers it, and the definition in it: a file and the name in that file."""

    asked: str
    room: str
    file: str
    name: str


QUESTIONS = [
    Question("Where is a worker's lease on a query renewed?", "store", "queries.py", "Queries.extend"),
    Question("Where is a trainer refused that has lost its role?", "store", "roles.py", "Roles.fence"),
    Question("Where is a clip bound applied to the ratio?", "kernels", "objective.py", "policy_gain"),
    Question("Where is the commit of a model on a hub fixed for a run?", "hub", "settle.py", "settle"),
    Question("Where is the Triton kernel that goes over a row of logits?", "kernels/triton", "rows.py", "row_kernel"),
    Question("Where is a stop string found in what was sampled?", "inference", "sampler.py", "Ending.reached"),
    Question(
        "Where does a vLLM server get its trainer's new weights?",
        "inference",
        "vllm/weight_transfer.py",
        "Transfer.update",
    ),
    Question("Where is it decided which task a query asks?", "rollout", "curriculum.py", "pick"),
    Question("Where is the learning rate of an optimizer step computed?", "policy", "optimizer.py", "learning_rate"),
    Question("Where are trajectories planned into micro-batches?", "batch", "packing.py", "plan_batches"),
    Question("Where is an override such as --set lr=1e-5 read?", "config", "reader.py", "apply_override"),
    Question(
        "Where is the user's score function called, with its timeout?", "environment", "calls.py", "UserCode.ask_score"
    ),
    Question("Where is a model refused that cannot run on packed batches?", "model", "probe.py", "check_exact"),
    Question(
        "Where is a checkpoint written whole or not at all?", "run", "directory.py", "RunDirectory.save_checkpoint"
    ),
    Question("Where is a process that died started again?", "system", "supervisor.py", "Supervisor"),
    Question(
        "Where does one agent, in a process of its own, take its rl step?",
        "training",
        "decoupled.py",
        "AgentProcess.rl_step",
    ),
    Question("Where are whole episodes printed for a person to read?", "report", "transcript.py", "Transcripts.show"),
    Question(
        "Where is the best split of GPUs between workers and trainers found?", "simulate", "simulate.py", "best_plan"
    ),
    Question("Where is TRL's GRPOTrainer given our loss?", "integrations", "trl.py", "FusedGRPO"),
    Question("Where does the packer in C++ place lengths into bins?", "csrc", "best_fit.hpp", "best_fit"),
]


def folder_of(room: str) -> Path:
    return ROOT / (room if room in OTHERS else f"engine/{room}")


def defined_in(path: Path) -> set[str]:
    """Return the functions and classes of a file, methods as Class.method; of C++ every name that is followed by (."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"(\w+)\(", text))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def test_there_are_twenty_questions_about_every_room_of_a_run() -> None:
    assert len(QUESTIONS) == len({question.asked for question in QUESTIONS}) == 20
    rooms = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    asked = {question.room for question in QUESTIONS}
    assert asked <= rooms | {*OTHERS}
    assert rooms - asked <= {"cli"}, "a room that no question leads to"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_the_answer_is_in_the_room(question: Question) -> None:
    file = folder_of(question.room) / question.file
    assert file.is_file(), file
    assert question.name in defined_in(file), f"{question.asked} {question.name} is not in {file.relative_to(ROOT)}"


def test_a_name_that_moved_would_be_noticed() -> None:
    assert "Ending.reached" not in defined_in(ROOT / "engine/store/queries.py")
    assert "folder_of" in defined_in(Path(__file__)) and "ROOT" not in defined_in(Path(__file__))
