"""verl's losses, aggregation and fused forward against ours in their place: the same values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from toy import make_model

verl = pytest.importorskip("verl", reason="needs verl, which `make test` installs without what it brings for GPUs")

from tensordict import NonTensorData, TensorDict  # noqa: E402
from verl.models.transformers.dense_common import forward_with_torch_backend  # noqa: E402
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn  # noqa: E402
from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from mgrpo.engine.integrations import verl as adapter  # noqa: E402

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}  # verl adds 1e-8 to some denominators


def config_of(**changes: Any) -> Any:
    return ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, **changes)


def micro_batch(seed: int, dtype: torch.dtype, level: str) -> dict[str, Any]:
    """Draw ragged responses, perhaps an empty one, ratios far from 1, advantages and weights of tokens or sequences."""
    g = torch.Generator().manual_seed(seed)
    batch, columns = (int(torch.randint(1, 7, (), generator=g)) for _ in range(2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=g)

    mask = torch.rand(batch, columns, generator=g) > 0.3
    mask[0, 0] = True
    shape = (batch, columns) if level == "token" else (batch, 1)
    advantages = normal(*shape) * (torch.rand(*shape, generator=g) > 0.3)
    old = -3 + normal(batch, columns)
    return {
        "old_log_prob": old,
        "log_prob": old + 0.5 * normal(batch, columns),
        "advantages": advantages.expand(batch, columns),
        "response_mask": mask,
        "rollout_is_weights": normal(*shape).exp().expand(batch, columns) if seed % 2 else None,
    }


def loss_and_slope(name: str, given_: dict[str, Any], mode: str, config: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    log_prob = given_["log_prob"].clone().requires_grad_()
    found, metrics = get_policy_loss_fn(name)(**given_ | {"log_prob": log_prob}, loss_agg_mode=mode, config=config)
    return found.detach(), torch.autograd.grad(found, log_prob)[0], metrics


CLIPS = st.fixed_dictionaries(
    {
        "clip_ratio_low": st.sampled_from([0.1, 0.2, None]),
        "clip_ratio_high": st.sampled_from([0.2, 0.28, None]),
        "clip_ratio": st.sampled_from([0.15, 0.3]),
        "clip_ratio_c": st.sampled_from([1.2, 3.0]),
    }
)
GLOBAL = st.fixed_dictionaries(  # as verl's ppo_loss sets them, or not at all
    {
        "dp_size": st.sampled_from([1, 4]),
        "batch_num_tokens": st.just(37),
        "global_batch_size": st.just(11),
        "loss_scale_factor": st.sampled_from([None, 50]),
    }
)


@pytest.mark.parametrize(
    ("theirs", "ours", "level"), [("vanilla", "mgrpo", "token"), ("gspo", "mgrpo_sequence", "seq")]
)
@pytest.mark.parametrize("mode", MODES)
@given(st.integers(0, 2**20), CLIPS, st.one_of(st.just({}), GLOBAL), st.sampled_from([torch.float64, torch.float32]))
@settings(max_examples=40)
def test_loss_and_gradient_are_verls(
    theirs: str, ours: str, level: str, mode: str, seed: int, clips: Any, whole: Any, dtype: torch.dtype
) -> None:
    config = config_of(**clips, global_batch_info=whole)
    batch = micro_batch(seed, dtype, level)
    expected, slope, metrics = loss_and_slope(theirs, batch, mode, config)
    found, our_slope, our_metrics = loss_and_slope(ours, batch, mode, config)
    assert found.dtype == dtype
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(our_slope, slope, **near)
    for name, value in our_metrics.items():
        assert value == pytest.approx(metrics[name], abs=1e-5), name


@given(st.integers(0, 2**20))
@settings(max_examples=30)
def test_a_trajectorys_ratio_is_the_product(seed: int) -> None:
    batch = micro_batch(seed, torch.float64, "seq")
    config = config_of(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0)
    found, slope, _ = loss_and_slope("mgrpo_trajectory", batch, "token-mean", config)
    log_prob = batch["log_prob"].clone().requires_grad_()
    mask, advantages = batch["response_mask"], batch["advantages"]
    ratio = ((log_prob - batch["old_log_prob"]) * mask).sum(1, keepdim=True).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    gain = torch.where(advantages < 0, torch.maximum(gain, 3 * advantages), gain)
    weights = 1 if batch["rollout_is_weights"] is None else batch["rollout_is_weights"]
    truth = -(gain * weights * mask).sum() / mask.sum()
    torch.testing.assert_close(found, truth.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, torch.autograd.grad(truth, log_prob)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_sampled_is_a_zero_gradient(mode: str) -> None:
    batch = micro_batch(3, torch.float32, "token")
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    loss, slope, _ = loss_and_slope("mgrpo", batch, mode, config_of())
    assert loss == 0 and not slope.any()


# ---- under verl's own step, with log-probs from verl's own fused forward


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = make_model(tmp_path_factory.mktemp("model"), tie=False)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


PROMPTS, RESPONSES = (3, 1, 4), (5, 2, 6)


def step_data(seed: int) -> tuple[list[Tensor], TensorDict]:
    """Return three sequences as verl's engines pass them to the loss, without padding."""
    g = torch.Generator().manual_seed(seed)

    def rows(make: Any) -> Tensor:
        return jagged([make(n) for n in RESPONSES])

    ids = [torch.randint(1, 257, (p + r,), generator=g) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    fields = {
        "prompts": jagged([row[:p] for row, p in zip(ids, PROMPTS, strict=True)]),
        "responses": jagged([row[p:] for row, p in zip(ids, PROMPTS, strict=True)]),
        "response_mask": rows(lambda n: (torch.arange(n) != 1).long()),  # the second token was read
        "old_log_probs": rows(lambda n: -5.5 + 0.3 * torch.randn(n, generator=g)),
        "ref_log_prob": rows(lambda n: -5.5 + 0.3 * torch.randn(n, generator=g)),
        "advantages": rows(lambda n: torch.randn(1, generator=g).expand(n).clone()),
        "rollout_is_weights": rows(lambda n: torch.rand(n, generator=g) + 0.5),
    }
    whole = {"dp_size": 1, "batch_num_tokens": 20, "global_batch_size": 6}
    return ids, TensorDict(fields | {name: NonTensorData(value) for name, value in whole.items()}, batch_size=[3])


def step(model: Any, loss_mode: str, agg_mode: str) -> tuple[float, dict[str, Any], dict[str, Tensor]]:
    """Return loss, metrics and gradients of verl's ppo_loss of the model's log-probs, with its entropy and KL terms."""
    ids, data = step_data(5)
    config = config_of(
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        loss_agg_mode=agg_mode,
        entropy_coeff=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.1,
    )
    packed = torch.cat(ids)[None]
    positions = torch.cat([torch.arange(len(row)) for row in ids])[None]
    labels = packed.roll(-1, 1)
    model.zero_grad()
    out = MethodType(forward_with_torch_backend, model)(
        input_ids=packed, position_ids=positions, temperature=0.9, return_dict=True, shift_labels=labels
    )
    rows = {name: out[key][0].split([len(r) for r in ids]) for name, key in (("log_probs",) * 2, ("entropy",) * 2)}
    loss, metrics = ppo_loss(config, {name: jagged(list(parts)) for name, parts in rows.items()}, data)
    loss.backward()
    return float(loss.detach()), metrics, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("agg_mode", MODES)
def test_a_step_of_verls_is_the_same_with_our_loss_and_log_probs(
    model: Any, agg_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, metrics, ours = step(model, "mgrpo", agg_mode)
    monkeypatch.setattr(FusedLinearForPPO, "forward", adapter.VERL_FORWARD)
    expected, their_metrics, theirs = step(model, "vanilla", agg_mode)
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-3
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(1.0, largest), msg=name)
    for name in ("actor/pg_loss", "actor/entropy_loss", "kl_loss", "actor/pg_clipfrac", "actor/ppo_kl"):
        assert metrics[name].aggregate() == pytest.approx(their_metrics[name].aggregate(), rel=1e-4, abs=1e-6), name


def test_the_fused_log_probs_are_verls_in_either_shape() -> None:
    g = torch.Generator().manual_seed(1)
    head = torch.randn(41, 8, generator=g, requires_grad=True)
    for shape in ((2, 7), (9,)):
        hidden = torch.randn(*shape, 8, generator=g, requires_grad=True)
        targets = torch.randint(41, shape, generator=g)
        found = []
        for forward in (FusedLinearForPPO.forward, adapter.VERL_FORWARD):
            logprobs, entropy = forward(FusedLinearForPPO(), hidden, head, targets, 0.7)
            gradients = torch.autograd.grad((logprobs * 1.5 + entropy).sin().sum(), (hidden, head))
            found.append((logprobs, entropy, *gradients))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_backend_that_was_asked_for_by_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "VERL_FORWARD", lambda *given_: ("theirs", given_[-1]))
    assert FusedLinearForPPO(impl_backend="liger")(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1), 0.5) == (
        "theirs",
        0.5,
    )


# ---- advantages


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_are_of_each_query(by_std: bool) -> None:
    rng = np.random.default_rng(0)
    queries = np.array(["b", "a", "b", "c", "a", "a", "b", "d", "d"], dtype=object)
    rewards = rng.normal(size=(9, 4))
    rewards[-2:] = 0.25
    mask = torch.from_numpy(rng.random((9, 4)) > 0.3)
    estimate = get_adv_estimator_fn("mgrpo")
    config = {"norm_adv_by_std_in_grpo": by_std}
    found, returns = estimate(
        token_level_rewards=torch.from_numpy(rewards), response_mask=mask, index=queries, config=config
    )
    totals = rewards.sum(1)
    for row, query in enumerate(queries):
        own = totals[queries == query]
        expected = (totals[row] - own.mean()) / ((own.std() or 1) if by_std else 1)
        np.testing.assert_allclose(found[row], expected * mask[row].numpy(), atol=1e-12)
    assert torch.equal(found, returns) and not found[3].any() and not found[-2:].any()


def test_verl_loads_it_by_its_environment_variable() -> None:
    """Run a process that never names us, as verl's workers do."""
    code = "import verl.trainer.ppo.core_algos as c; print('mgrpo_trajectory' in c.POLICY_LOSS_REGISTRY)"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "mgrpo.engine.integrations.verl"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path("/"))
    assert done.stdout.split()[-1:] == ["True"], done.stderr
