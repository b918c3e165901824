"""One agent trained by 1, 2 or 3 ranks does the same: gradients, weights, metrics, log-probs, checkpoints.

All cases run in this process alone, then in the ranks of one group after the other; each hands back files to compare,
and goes on from the checkpoint of the one before.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from cases.ranked_policy import LR, batches, dummy, make, mine
from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.model.sharding import local
from mgrpo.engine.policy import checkpoint as policy_state
from mgrpo.engine.policy.checkpoint import moments
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.system import distributed
from mgrpo.kernels import Objective
from ranks import run_ranks
from toy import make_model

PLAIN = Objective(sampler_cap=None)
KL = Objective(kl_coef=0.5, sampler_cap=2.0, entropy_coef=0.01)
# name -> (tied, dtype, objective, epochs, activation checkpointing)
CASES = {
    "tied": (True, "float32", PLAIN, 1, False),
    "tied-bf16": (True, "bfloat16", PLAIN, 1, False),
    "untied-checkpointed": (False, "float32", PLAIN, 1, True),
    "untied-kl-epochs": (False, "float32", KL, 2, False),
    "untied-kl-epochs-bf16": (False, "bfloat16", KL, 2, False),
}
CASES_OF_3 = ("tied", "untied-kl-epochs")
GROUPS = 3  # of parameters that are exchanged together: two layers and the rest
PROMPT = [1, 9, 200, 31, 4, 4, 77]
Found = dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def weights(policy: Policy) -> Found:
    return {name: whole(weight.detach()) for name, weight in policy.masters.weights.items()}


def gradients(policy: Policy, given: list[Batch], objective: Objective) -> Found:
    policy.forward_backward(given, objective)
    found = {name: whole(weight.grad) for name, weight in policy.masters.weights.items()}
    policy.optimizer.zero_grad()
    return found


def state(policy: Policy) -> Found:
    """Return all that a checkpoint holds."""
    assert policy.reference is not None
    kept = {name: whole(weight) for name, weight in policy.reference.named_parameters()}
    remembered = moments(policy.optimizer, policy.masters.weights)
    remembered = {name: whole(moment) for name, moment in remembered.items()}
    return keyed("weight", weights(policy)) | keyed("moment", remembered) | keyed("reference", kept)


def keyed(kind: str, tensors: Found) -> Found:
    return {f"{kind}/{name}": tensor.contiguous() for name, tensor in tensors.items()}


def keep(out: Path, name: str, found: Found) -> None:
    if distributed.rank() == 0:
        save_file(found, out / f"{name}.safetensors")


def run_case(folder: Path, case: str, out: Path) -> None:
    """Save gradients at the start and, after two steps, weights, moments, published weights, log-probs and metrics."""
    tied, dtype, objective, epochs, checkpointing = CASES[case]
    policy = make(folder, tied, dtype, checkpointing, weight_decay=0.1, grad_clip=0.5, temperature=0.8)
    policy.keep_reference()
    first = policy.logprobs(PROMPT)
    found = keyed("gradient", gradients(policy, mine(batches(2)), objective))
    rows = [policy.step(mine(batches(seed)), objective, LR, epochs) for seed in (2, 1)]
    assert policy.version == 2 * epochs
    published = dict(policy.full_weights())
    assert bool(published) == (distributed.rank() == 0)
    found |= state(policy) | keyed("published", published)
    found["logprobs"] = torch.tensor([first, policy.logprobs(PROMPT)])
    if distributed.rank() == 0:
        (out / f"{case}.json").write_text(json.dumps(rows))
    keep(out, case, found)


def checkpoints(folder: Path, out: Path, before: Path | None) -> None:
    """Continue from the checkpoint of another number of ranks, and write one."""
    policy = make(folder, True, "bfloat16", weight_decay=0.1)
    if before is not None:
        policy.load_state(before / "policy")
        keep(out, "loaded", state(policy))
    else:
        policy.keep_reference()
    version = policy.version
    policy.step(mine(batches(0)), KL, LR, epochs=2)
    saved = policy.save_state(out / "policy" if distributed.rank() == 0 else None)
    assert saved == {"version": version + 2}
    keep(out, "saved", state(policy))


def run_all(folder: Path, out: Path, before: Path | None) -> None:
    for case in CASES_OF_3 if distributed.ranks() == 3 else CASES:
        run_case(folder, case, out)
    checkpoints(folder, out, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make models with weights exact in bfloat16 and widths that 2 and 3 do not divide, and run 1, 2 and 3 ranks."""
    root = tmp_path_factory.mktemp("ranks")
    for name, tied in (("tied", True), ("untied", False)):
        path = make_model(root / name, tied, hidden_size=20, intermediate_size=25, num_attention_heads=2)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.float().save_pretrained(path)
    for ranks in (1, 2, 3):
        (root / str(ranks)).mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_all(root, root / "1", None)
    run_ranks(two_ranks, 2, root)
    run_ranks(run_all, 3, root, root / "3", root / "2")
    yield root
    torch.set_num_threads(threads)


def far(got: Found, truth: Found, kind: str) -> float:
    """Return the largest error of a tensor of a kind, relative to its norm."""
    names = [name for name in truth if name.startswith(kind) and truth[name].ndim]
    assert names and got.keys() == truth.keys()
    return max(float((got[name].float() - truth[name].float()).norm() / truth[name].float().norm()) for name in names)


# moments: squares of gradients that a step of other roundings has moved already
KINDS = {"gradient": 1e-6, "weight": 1e-6, "moment": 5e-6, "published": 1e-6, "logprobs": 1e-6}


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, case) for case in CASES if not case.endswith("bf16")] + [(3, case) for case in CASES_OF_3],
)
def test_ranks_do_what_one_does(folder: Path, ranks: int, case: str) -> None:
    truth, many = (load_file(folder / n / f"{case}.safetensors") for n in ("1", str(ranks)))
    for kind, tolerance in KINDS.items():
        assert far(many, truth, kind) <= tolerance, kind
    expected, found = (json.loads((folder / n / f"{case}.json").read_text()) for n in ("1", str(ranks)))
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", ["tied", "untied-kl-epochs"])
def test_in_bf16_ranks_err_no_more_than_twice_what_one_does(folder: Path, case: str) -> None:
    truth = load_file(folder / "1" / f"{case}.safetensors")
    one, many = (load_file(folder / n / f"{case}-bf16.safetensors") for n in ("1", "2"))
    for kind in KINDS:
        assert far(many, truth, kind) <= 2 * far(one, truth, kind), kind
    assert {many[name].dtype for name in many if name.startswith("published")} == {torch.bfloat16}


def same(one: Found, other: Found) -> bool:
    """Assert that all tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_checkpoint_loads_on_more_ranks(folder: Path, ranks: int) -> None:
    assert same(*(load_file(folder / n) for n in (f"{ranks - 1}/saved.safetensors", f"{ranks}/loaded.safetensors")))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_checkpoint_loads_on_one_rank(folder: Path, ranks: int) -> None:
    policy = make(folder, True, "bfloat16")
    policy.load_state(folder / str(ranks) / "policy")
    assert same(state(policy), load_file(folder / f"{ranks}/saved.safetensors")) and policy.version == 2 * ranks
    for name, param in policy.model.named_parameters():
        assert torch.equal(param, policy.masters.weights[name].bfloat16())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_only_the_rows_they_hold(folder: Path, ranks: int) -> None:
    names = ["weights", *(f"weights-{rank}" for rank in range(1, ranks))]
    files = [load_file(folder / str(ranks) / "policy" / f"{name}.safetensors") for name in names]
    name = "model.embed_tokens.weight"
    assert [len(file[name]) for file in files] == {2: [129, 128], 3: [86, 86, 85]}[ranks]
    assert torch.equal(
        torch.cat([file[name] for file in files]), load_file(folder / f"{ranks}/saved.safetensors")[f"weight/{name}"]
    )


# ---- what two ranks do besides


def two_ranks(folder: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle, "loads", refuse)
        patch.setattr(pickle, "load", refuse)
        patch.setattr(dist.distributed_c10d, "_tensor_to_object", refuse)
        run_all(folder, folder / "2", folder / "1")
    held_in_parts(folder)
    gradients_are_exchanged_once_a_step(folder)
    dummies_alone_move_nothing(folder)
    other_numbers_of_micro_batches_are_refused(folder)
    a_non_finite_gradient_of_one_rank_stops_all(folder)
    a_write_that_fails_on_one_rank_fails_on_all(folder)


def held_in_parts(folder: Path) -> None:
    policy = make(folder, True)
    held = sum(local(weight).numel() for weight in policy.masters.weights.values())
    assert held < 0.52 * policy.parameters == 0.52 * sum(w.numel() for w in weights(policy).values())


class Counted(TorchDispatchMode):
    """Count how often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def gradients_are_exchanged_once_a_step(folder: Path) -> None:
    policy, given = make(folder, True), mine(batches(0))
    with Counted() as counted:
        policy.step(given, PLAIN, LR, epochs=2)
    scatters = [number for name, number in counted.calls.items() if "reduce_scatter" in name]
    assert len(given) > 1 and scatters == [2 * GROUPS], counted.calls


def dummies_alone_move_nothing(folder: Path) -> None:
    """Only the moments of earlier steps move the weights, as in a step without micro-batches."""
    dummies, nothing, fresh = (make(folder, False) for _ in range(3))
    row = fresh.step([dummy(batches(0)[0])], PLAIN, LR)
    assert row["loss"] == row["grad_norm"] == row["rows"] == 0
    assert same(weights(fresh), weights(make(folder, False)))
    for policy in (dummies, nothing):
        policy.step(mine(batches(0)), PLAIN, LR)
    dummies.step([dummy(batches(1)[0])], PLAIN, LR)
    before = nothing.logprobs(PROMPT)
    assert nothing.step([], PLAIN, LR) == {"loss": 0, "grad_norm": 0.0, "lr": LR}
    assert same(weights(dummies), weights(nothing)) and nothing.version == 2
    assert nothing.logprobs(PROMPT) == dummies.logprobs(PROMPT) != before  # weights gathered before are not used again


def other_numbers_of_micro_batches_are_refused(folder: Path) -> None:
    policy = make(folder, True)
    given = mine(batches(0))
    with pytest.raises(ValueError, match=r"micro-batches: \[2, 1\] given by the ranks"):
        policy.step(given[: 2 - distributed.rank()], PLAIN, LR)


def a_non_finite_gradient_of_one_rank_stops_all(folder: Path) -> None:
    policy = make(folder, True)
    before, (batch, *_) = weights(policy), batches(0)
    given = replace(batch, advantages_P=batch.advantages_P * 3e37) if distributed.rank() else batch
    with pytest.raises(RuntimeError, match=r"agents\.main: the gradient of version 0 is non-finite"):
        policy.step([given], PLAIN, LR)
    assert same(weights(policy), before)


def a_write_that_fails_on_one_rank_fails_on_all(folder: Path) -> None:
    agent = make(folder, True)
    patch = pytest.MonkeyPatch()
    if distributed.rank() == 1:
        patch.setattr(policy_state, "write_shards", fail)
        with pytest.raises(OSError, match="No space left on device"):
            agent.save_state()
    else:
        run = RunDirectory(folder / "run")
        with pytest.raises(OSError, match=r"rl-00001 could not be written: .*rank 1 of 2 failed: .*No space"):
            run.save_checkpoint("rl-00001", lambda aside: agent.save_state(aside / "main") and None, keep=1)
        assert not list(run.checkpoints.iterdir())
        run.close()
    patch.undo()


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")
