"""One agent trained by 1, 2 or 3 ranks does the same: gradients, weights, metrics, log-probs, checkpoints.

Every case runs in this process alone, then in the ranks of one group, which hand back what they got as files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mgrpo.engine import distributed
from mgrpo.engine.batch import Batch, Weighed, pack
from mgrpo.engine.config import AgentConfig
from mgrpo.engine.policy import Policy
from mgrpo.engine.types import Trajectory
from mgrpo.kernels import Objective
from ranks import run_ranks
from toy import make_model, toy_config

PLAIN = Objective(sampler_cap=None)
KL = Objective(kl_coef=0.5, sampler_cap=2.0, entropy_coef=0.01)
# name -> (tied, objective, epochs, activation checkpointing)
CASES = {
    "tied": (True, PLAIN, 1, False),
    "untied": (False, PLAIN, 1, True),
    "tied-kl-epochs": (True, KL, 2, False),
    "untied-kl-epochs": (False, KL, 2, False),
}
DTYPES = ("float32", "bfloat16")
LR = 1e-3
PROMPT = [1, 9, 200, 31, 4, 4, 77]
Found = dict[str, Tensor]


def make(folder: Path, tied: bool, dtype: str, checkpointing: bool = False, **agent: Any) -> Policy:
    compute = msgspec.structs.replace(toy_config(folder).compute, dtype=dtype, activation_checkpointing=checkpointing)
    path = str(folder / ("tied" if tied else "untied"))
    return Policy("main", AgentConfig(model=path, **{"max_context": 64, "lr": LR, **agent}), compute)


def batches(seed: int, count: int = 7, max_tokens: int = 40) -> list[Batch]:
    """All ranks' micro-batches: trajectories of 2 to 33 tokens."""
    rng = np.random.default_rng(seed)
    weighed = []
    for number in range(count):
        length = int(rng.integers(2, 34))
        sampled = rng.random(length) < 0.6
        sampled[1] = True
        tokens = rng.integers(1, 257, length).astype(np.int32)
        trajectory = Trajectory(tokens, sampled, np.full(length, -5, np.float32), 0)
        weighed.append(Weighed(trajectory, float(rng.normal()), 0.05))
    return pack(weighed, max_tokens)


def mine(all_batches: list[Batch]) -> list[Batch]:
    """This rank's, dealt in turn and made up to the same number by dummies."""
    ranks = distributed.ranks()
    rest = -len(all_batches) % ranks
    dummy = replace(all_batches[0], weights_P=torch.zeros_like(all_batches[0].weights_P))
    return [*all_batches, *([dummy] * rest)][distributed.rank() :: ranks]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def weights(policy: Policy) -> Found:
    return {name: whole(weight.detach()) for name, weight in policy.masters.weights.items()}


def gradients(policy: Policy, given: list[Batch], objective: Objective) -> Found:
    for i, batch in enumerate(given):
        policy._exchange_gradients(i == len(given) - 1)
        policy.forward_backward(batch, objective)
    found = {name: whole(weight.grad) for name, weight in policy.masters.weights.items()}
    policy.optimizer.zero_grad()
    return found


def keyed(kind: str, tensors: Found) -> Found:
    return {f"{kind}/{name}": tensor.contiguous() for name, tensor in tensors.items()}


def run_case(folder: Path, case: str, dtype: str) -> tuple[Found, list[dict[str, float]]]:
    """Gradients at the start, then two steps: weights, moments, what is published, log-probs, and metrics."""
    tied, objective, epochs, checkpointing = CASES[case]
    policy = make(folder, tied, dtype, checkpointing, weight_decay=0.1, grad_clip=0.5, temperature=0.8)
    if objective.kl_coef:
        policy.keep_reference()
    first = policy.logprobs(PROMPT)
    found = keyed("gradient", gradients(policy, mine(batches(0)), objective))
    rows = [policy.step(mine(batches(seed)), objective, LR, epochs) for seed in (0, 1)]
    found |= keyed("weight", weights(policy))
    found |= keyed("moment", {name: whole(moment) for name, moment in policy._moments().items()})
    found |= keyed("published", dict(policy.full_weights()))
    found["logprobs"] = torch.tensor([first, policy.logprobs(PROMPT)])
    return found, rows


def run_all(folder: Path, out: Path) -> None:
    for case in CASES:
        for dtype in DTYPES:
            found, rows = run_case(folder, case, dtype)
            if distributed.rank() == 0:
                save_file(found, out / f"{case}-{dtype}.safetensors")
                (out / f"{case}-{dtype}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models whose weights bfloat16 can hold, of widths that 2 and 3 do not divide, and what one rank makes of them."""
    root = tmp_path_factory.mktemp("ranks")
    for name, tied in (("tied", True), ("untied", False)):
        path = make_model(root / name, tied, hidden_size=20, intermediate_size=25, num_attention_heads=2)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.float().save_pretrained(path)
    (root / "1").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_all(root, root / "1")
    yield root
    torch.set_num_threads(threads)


def far(got: Found, truth: Found, kind: str) -> float:
    """Largest error of a tensor of a kind, relative to its norm."""
    names = [name for name in truth if name.startswith(kind) and truth[name].ndim]
    assert names
    return max(float((got[name].float() - truth[name].float()).norm() / truth[name].float().norm()) for name in names)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_what_one_does(folder: Path, ranks: int) -> None:
    out = folder / str(ranks)
    out.mkdir()
    run_ranks(run_all, ranks, folder, out)
    for case in CASES:
        truth, plain, many, narrow = (
            load_file(folder / n / f"{case}-{dtype}.safetensors")
            for n, dtype in (("1", "float32"), ("1", "bfloat16"), (str(ranks), "float32"), (str(ranks), "bfloat16"))
        )
        assert many.keys() == truth.keys() and narrow.keys() == plain.keys()
        for kind in ("gradient", "weight", "moment", "published", "logprobs"):
            print(case, ranks, kind, far(many, truth, kind), far(narrow, truth, kind), far(plain, truth, kind))
