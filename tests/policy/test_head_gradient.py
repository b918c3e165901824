"""The head's gradient goes straight into its master where it may, and is what autograd would add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cases.weighed import batches
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.policy import forward
from mgrpo.engine.policy.policy import Policy
from mgrpo.kernels import Objective
from toy import make_model, toy_config

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
OBJECTIVE = Objective(sampler_cap=None)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), **SIZES, tie_word_embeddings=request.param)


def make(folder: Path, dtype: str, **compute: Any) -> Policy:
    settings = msgspec.structs.replace(toy_config(folder).compute, dtype=dtype, **compute)
    return Policy("main", AgentConfig(model=str(folder), max_context=64, lr=1e-3), settings)


def gradients(policy: Policy) -> dict[str, Tensor]:
    policy.forward_backward(batches(), OBJECTIVE)
    assert all(param.grad is None for name, param in policy.masters.params.items() if is_rounded(policy, name))
    return {name: weight.grad for name, weight in policy.masters.weights.items() if weight.grad is not None}


def is_rounded(policy: Policy, name: str) -> bool:
    return policy.masters.weights[name] is not policy.masters.params[name]


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_it_is_what_autograd_adds(folder: Path, dtype: str, limit: float) -> None:
    policies = [make(folder, dtype) for _ in range(2)]
    policies[1].masters.sums = True
    plain, summed = (gradients(policy) for policy in policies)
    assert plain.keys() == summed.keys()
    for name, gradient in plain.items():
        distance = (gradient - summed[name]).norm() / gradient.norm()
        assert float(distance) < limit and summed[name].dtype == torch.float32, name


def test_only_a_parameter_of_this_process_has_a_master_for_it(folder: Path) -> None:
    policy = make(folder, "bfloat16")
    head = policy.model.get_output_embeddings().weight
    assert policy.masters.summed(head) is None, "on a CPU"
    policy.masters.sums = True
    master = policy.masters.summed(head)
    assert master is not None and master.shape == head.shape and master.dtype == torch.float32
    assert policy.masters.summed(head * 1) is None
    head.requires_grad_(False)
    assert policy.masters.summed(head) is None


def test_the_cap_of_the_buffers_reaches_the_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []
    for name in ("linear_grpo_loss", "linear_logprob"):
        real = getattr(forward, name)

        def spy(*args: Any, real: Any = real, **keywords: Any) -> Any:
            given.append(keywords["buffer_bytes"])
            return real(*args, **keywords)

        monkeypatch.setattr(forward, name, spy)
    policy = make(folder, "float32", buffer_bytes=123)
    policy.keep_reference()
    policy.forward_backward(batches(count=1), Objective(sampler_cap=None, kl_coef=0.1))
    assert given == [123, 123] and ComputeConfig().buffer_bytes is None
