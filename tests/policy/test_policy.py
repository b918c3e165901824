"""The policy: schedules, fp32 masters under bf16, accumulation, saving to the bit, the KL's reference, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases.weighed import batches
from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.model.attention import Packed
from mgrpo.engine.model.causal_lm import compile_layers
from mgrpo.engine.policy.checkpoint import moments
from mgrpo.engine.policy.optimizer import learning_rate
from mgrpo.engine.policy.policy import Policy
from mgrpo.kernels import Objective
from toy import make_model, toy_config

PLAIN, KL = Objective(sampler_cap=None), Objective(sampler_cap=None, kl_coef=0.5)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), **SIZES)


def make(folder: Path, dtype: str = "float32", checkpointing: bool = False, **agent: Any) -> Policy:
    compute = msgspec.structs.replace(toy_config(folder).compute, dtype=dtype, activation_checkpointing=checkpointing)
    return Policy("main", AgentConfig(model=str(folder), **{"max_context": 64, "lr": 1e-3, **agent}), compute)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.masters.weights.items()}


def gradients(policy: Policy, given: list[Batch], objective: Objective = PLAIN) -> dict[str, Tensor]:
    """Return the gradients of all micro-batches together, in fp32 as the masters hold them."""
    policy.forward_backward(given, objective)
    found = {name: weight.grad for name, weight in policy.masters.weights.items()}
    policy.optimizer.zero_grad()
    return found


def moments_of(policy: Policy) -> dict[str, Tensor]:
    return moments(policy.optimizer, policy.masters.weights)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Assert that all tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- learning rate


def rates(steps: int, **agent: Any) -> list[float]:
    config = AgentConfig(model="m", lr=2.0, **agent)
    return [learning_rate(config, step, steps) for step in range(steps + 1)]


def test_constant_rate():
    assert rates(4) == [2.0] * 5


def test_linear_rate_falls_to_zero_at_the_end():
    assert rates(4, lr_schedule="linear") == pytest.approx([2, 1.5, 1, 0.5, 0])


def test_cosine_rate_falls_to_zero_at_the_end():
    assert rates(4, lr_schedule="cosine") == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rise_is_linear_and_never_zero_then_the_schedule_begins_at_the_full_rate(schedule):
    got = rates(10, lr_schedule=schedule, lr_warmup_steps=3)
    assert got[:4] == pytest.approx([0.5, 1, 1.5, 2])
    assert got[3:] == sorted(got[3:], reverse=True) and min(got[:-1]) > 0


def test_a_rise_longer_than_the_run_is_not_cut_short():
    assert rates(2, lr_warmup_steps=3, lr_schedule="linear") == pytest.approx([0.5, 1, 1.5])
    assert learning_rate(AgentConfig(model="m", lr=2.0, lr_warmup_steps=3, lr_schedule="cosine"), 3, 3) == 2.0


# ---- steps


def test_the_rate_given_is_the_rate_used(folder):
    """Adam's first step moves every weight that has a gradient by about the rate."""
    policy = make(folder, lr=123.0, grad_clip=1e9)
    before = weights(policy)
    row = policy.step(batches(), PLAIN, lr=1e-3)
    moved = max((weight - before[name]).abs().max().item() for name, weight in weights(policy).items())
    assert moved == pytest.approx(1e-3, rel=1e-3) and row["lr"] == 1e-3


def test_a_step_makes_what_gained_likelier_and_what_lost_unlikelier(folder):
    policy, given = make(folder), batches()
    before = policy.forward(given)
    policy.step(given, PLAIN, lr=1e-3)
    after = policy.forward(given)
    changes = zip(given, before, after, strict=True)
    assert sum(float((b.advantages_P * (new - old)).sum()) for b, old, new in changes) > 0


def test_version_counts_optimizer_steps(folder):
    policy = make(folder)
    policy.step(batches(), PLAIN, 1e-3, epochs=3)
    policy.step([], PLAIN, 1e-3)
    assert policy.version == 4


def test_micro_batches_add_up_to_one_batch(folder):
    policy = make(folder)
    one, many = gradients(policy, batches(max_tokens=999)), gradients(policy, batches(max_tokens=12))
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=1e-5 * one[name].abs().max().item())


def test_bf16_gradients_are_summed_in_fp32(folder):
    """In bf16 a sum stops growing when it is 256 times the summand."""
    policy, (batch,) = make(folder, "bfloat16"), batches(1)
    one = gradients(policy, [batch])
    many = gradients(policy, [batch] * 400)
    assert {gradient.dtype for gradient in many.values()} == {torch.float32}
    for name in one:
        torch.testing.assert_close(many[name], one[name] * 400, rtol=1e-4, atol=0)
    assert all(param.grad is None for param in policy.model.parameters())  # freed as soon as it is added


def test_many_updates_too_small_for_bf16_add_up_in_the_masters(folder):
    policy, given, lr = make(folder, "bfloat16"), batches(), 1e-5
    before = {name: param.detach().clone() for name, param in policy.model.named_parameters()}
    policy.step(given, PLAIN, lr)
    moved = [~torch.isclose(p, before[n], rtol=0, atol=0) for n, p in policy.model.named_parameters()]
    assert sum(int(m.sum()) for m in moved) < 0.02 * policy.parameters  # nearly every weight loses a single update
    for _ in range(99):
        policy.step(given, PLAIN, lr)
    name = "model.layers.0.mlp.up_proj.weight"
    shift = policy.model.get_parameter(name).float() - before[name].float()
    assert shift.abs().max() > 50 * lr
    for name, param in policy.model.named_parameters():
        assert torch.equal(param, policy.masters.weights[name].bfloat16())  # rounded, and only rounded


def test_a_model_in_fp32_is_its_own_master(folder):
    policy = make(folder)
    assert all(policy.masters.weights[name] is param for name, param in policy.model.named_parameters())


def test_a_step_without_micro_batches_decays_the_moments_as_a_zero_gradient_does(folder):
    policy, zero = make(folder), make(folder)
    for p in (policy, zero):
        p.step(batches(), PLAIN, 1e-3)
    row = policy.step([], PLAIN, 1e-3)
    nothing = [replace(b, advantages_P=torch.zeros_like(b.advantages_P)) for b in batches()]
    zero.step(nothing, PLAIN, 1e-3)
    assert row == {"loss": 0, "grad_norm": 0.0, "lr": 1e-3}
    assert same(weights(policy), weights(zero)) and same(moments_of(policy), moments_of(zero))
    fresh = make(folder)
    fresh.step(batches(), PLAIN, 1e-3)
    name = "exp_avg/model.norm.weight"
    torch.testing.assert_close(moments_of(policy)[name], 0.9 * moments_of(fresh)[name])
    assert not same(weights(policy), weights(fresh))  # the momentum continues


def test_the_gradient_is_clipped_to_its_largest_norm_and_reported_as_it_was(folder):
    norms = {}
    for clip in (1e9, 0.01):
        policy = make(folder, grad_clip=clip)
        norms[clip] = policy.step(batches(), PLAIN, 1e-3)["grad_norm"]
        first = [v for key, v in moments_of(policy).items() if key.startswith("exp_avg/")]
        used = torch.cat([v.flatten() for v in first]).norm().item() / 0.1  # 1 - beta_1
        assert used == pytest.approx(min(clip, norms[clip]), rel=1e-3)
    assert norms[1e9] == pytest.approx(norms[0.01]) and norms[1e9] > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(folder, dtype):
    policy = make(folder, dtype)
    before = weights(policy)
    with pytest.raises(RuntimeError, match="non-finite"):
        policy.step(batches(scale=3e37), PLAIN, 1e-3)
    assert same(weights(policy), before) and policy.version == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_gradient(folder, dtype, monkeypatch):
    calls = []
    attend = Packed.attend
    monkeypatch.setattr(Packed, "attend", lambda self, *a: calls.append(a[0]) or attend(self, *a))
    plain, checkpointed = (make(folder, dtype, checkpointing=c) for c in (False, True))
    calls.clear()
    one, forwards = gradients(plain, batches(2, max_tokens=999)), len(calls)
    assert same(gradients(checkpointed, batches(2, max_tokens=999)), one)
    assert len(calls) - forwards == 2 * forwards  # each layer does run again


# ---- save and load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_after_load_is_the_step_without_it_to_the_bit(folder, tmp_path, dtype):
    policy, other = make(folder, dtype), make(folder, dtype)
    policy.keep_reference()
    for seed in range(2):
        policy.step(batches(seed=seed), KL, 1e-3)
    assert policy.save_state(tmp_path / "policy") == {"version": 2}
    other.step(batches(seed=7), PLAIN, 1e-2)  # whatever it was before
    other.load_state(tmp_path / "policy")
    assert other.version == policy.version == 2
    assert same(weights(policy), weights(other)) and same(moments_of(policy), moments_of(other))
    assert same(policy.model.state_dict(), other.model.state_dict())
    rows = [p.step(batches(seed=3), KL, 1e-3, epochs=2) for p in (policy, other)]
    assert rows[0] == rows[1] and rows[0]["kl_mean"] > 0
    assert same(weights(policy), weights(other)) and same(moments_of(policy), moments_of(other))
    assert same(policy.model.state_dict(), other.model.state_dict())


def test_a_policy_before_its_first_step_can_be_saved_and_loaded(folder, tmp_path):
    policy, other = make(folder), make(folder)
    other.step(batches(), PLAIN, 1e-3)
    policy.save_state(tmp_path / "p")
    other.load_state(tmp_path / "p")
    assert other.version == 0 and other.reference is None and not moments_of(other)
    assert same(weights(policy), weights(other))


DAMAGE = {  # what is done to the moments' tensors; None: the file is removed
    "all lost": (None, r"moments\.safetensors is missing: expected the moments that were saved"),
    "half lost": (lambda tensors: [tensors.pop(key) for key in list(tensors)[::2]], r"moment '.*' has shape None, exp"),
    "emptied": (dict.clear, r"moment '.*' has shape None, expected \("),
    "unknown": (
        lambda tensors: tensors.update({"exp_avg/x": torch.zeros(3)}),
        r"'exp_avg/x' has shape \(3,\), expected N",
    ),
    "reshaped": (
        lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3)}),
        r"has shape \(3,\), expected \(",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_state_without_all_of_its_moments_is_refused(folder, tmp_path, damage, message):
    policy = make(folder)
    policy.step(batches(), PLAIN, 1e-3)
    policy.save_state(tmp_path / "p")
    file = tmp_path / "p/moments.safetensors"
    tensors = load_file(file)
    file.unlink()
    (tmp_path / "p/moments.safetensors.sha256").unlink()  # as in a state of version 0.1.0
    if damage is not None:
        damage(tensors)
        save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        make(folder).load_state(tmp_path / "p")


def test_a_file_that_is_cut_off_is_named(folder, tmp_path):
    make(folder).save_state(tmp_path / "p")
    os.truncate(tmp_path / "p/weights.safetensors", 5000)
    for verified, expected in ((False, "SHA-256 [0-9a-f]{64}, it has "), (True, "a whole safetensors file")):
        with pytest.raises(ValueError, match=rf"p/weights\.safetensors is damaged: expected {expected}"):
            make(folder).load_state(tmp_path / "p", verified=verified)


@pytest.mark.parametrize("stem", ["weights", "moments"])
def test_a_bit_that_changed_is_found_and_nothing_is_changed(folder, tmp_path, stem):
    policy = make(folder)
    policy.step(batches(), PLAIN, 1e-3)
    policy.save_state(tmp_path / "p")
    policy.load_state(tmp_path / "p")
    before = weights(policy)
    file = tmp_path / f"p/{stem}.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"p/{stem}\.safetensors is damaged: expected SHA-256 "):
        policy.load_state(tmp_path / "p")
    assert same(weights(policy), before)


def test_a_state_of_version_0_1_0_does_not_say_whether_it_has_moments(folder, tmp_path):
    policy, other = make(folder), make(folder)
    policy.step(batches(), PLAIN, 1e-3)
    policy.save_state(tmp_path / "p")
    (tmp_path / "p/policy.json").write_text('{"version":1,"reference":false}')
    other.load_state(tmp_path / "p")
    assert same(moments_of(policy), moments_of(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 32}, r"down_proj.weight' has shape \(16, 32\), expected \(16, 24\): made by another"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* has shape None, expected \("),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* has shape \(.*\), expected None"),
        ({"tie": False}, r"lm_head\.weight' has shape \(257, 16\), expected None"),
    ],
)
def test_another_models_file_is_refused_before_anything_is_changed(folder, tmp_path, changes, message):
    policy, other = make(folder), make(make_model(tmp_path / "other", **SIZES | changes))
    before = weights(policy)
    other.save_state(tmp_path / "p")
    with pytest.raises(ValueError, match=message) as raised:
        policy.load_state(tmp_path / "p")
    assert str(tmp_path / "p") in str(raised.value)
    assert same(weights(policy), before)


# ---- the KL's reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_stays_where_it_was_kept(folder, tmp_path, dtype):
    policy = make(folder, dtype)
    policy.step(batches(), PLAIN, 1e-2)
    policy.keep_reference()
    assert policy.reference is not None
    kept = {name: value.clone() for name, value in policy.model.state_dict().items()}
    kl = [policy.step(batches(), KL, 1e-2)["kl_mean"] for _ in range(2)]
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-3
    assert same(policy.reference.state_dict(), kept) and not same(policy.model.state_dict(), kept)
    assert not any(param.requires_grad or param.grad is not None for param in policy.reference.parameters())
    other = make(folder, dtype)
    policy.save_state(tmp_path / "p")
    other.load_state(tmp_path / "p")
    assert other.reference is not None and same(other.reference.state_dict(), kept)


def test_the_kl_term_pulls_back_to_the_reference(folder):
    free, held = make(folder), make(folder)
    for policy, objective in ((free, PLAIN), (held, replace(KL, kl_coef=100.0))):
        policy.keep_reference()
        for _ in range(20):
            policy.step(batches(), objective, 1e-3)
    ends = [policy.step(batches(), KL, 1e-9)["kl_mean"] for policy in (free, held)]
    assert ends[1] < 0.1 * ends[0]


# ---- what is published, and how it is checked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_are_the_models_in_the_compute_dtype(folder, dtype):
    policy = make(folder, dtype)
    policy.step(batches(), PLAIN, 1e-2)
    assert same(dict(policy.full_weights()), dict(policy.model.named_parameters()))
    assert {weight.dtype for _, weight in policy.full_weights()} == {policy.dtype} == {getattr(torch, dtype)}


def test_logprobs_are_those_of_the_models_logits(folder):
    policy, tokens = make(folder, temperature=0.5), [5, 0, 256, 3, 3, 77]
    logits_TV = policy.model(torch.tensor([tokens]), layout=Packed(torch.tensor([0, 6], dtype=torch.int32), 6)).logits[
        0
    ]
    expected = (logits_TV / 0.5).log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert policy.logprobs(tokens) == pytest.approx(expected.tolist(), abs=1e-5)
    policy.step(batches(), PLAIN, 1e-2)
    assert policy.logprobs(tokens) != pytest.approx(expected.tolist(), abs=1e-2)


# ---- compiled layers


@pytest.mark.parametrize(
    ("device", "checkpointing", "message"),
    [
        ("cpu", False, "compute.compile: true given: expected false on 'cpu', compiling is for GPUs"),
        ("cuda", True, "compute.compile: true given: expected false with activation_checkpointing = true"),
    ],
)
def test_compiling_is_refused_where_it_would_do_nothing(folder, monkeypatch, device, checkpointing, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compute = replace_compute(folder, compile=True, device=device, activation_checkpointing=checkpointing)
    with pytest.raises(ValueError, match=message):
        Policy("main", AgentConfig(model=str(folder), max_context=64), compute)


def replace_compute(folder: Path, **changes: Any) -> ComputeConfig:
    return msgspec.structs.replace(toy_config(folder).compute, **changes)


@pytest.mark.filterwarnings("default:The .grad attribute:UserWarning")  # torch.compile looks at tensors' .grad
def test_compiled_layers_change_no_gradient_and_a_kept_reference_stays(folder, monkeypatch):
    """The graph is captured but not lowered, which takes a GPU or a minute."""
    graphs: list[Any] = []
    capture = partialmethod(nn.Module.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(nn.Module, "compile", capture)
    plain, compiled = make(folder), make(folder)
    compile_layers(compiled.model)
    expected, found = (gradients(p, batches(2)) for p in (plain, compiled))
    assert len(graphs) >= 2  # before and after attention
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    compiled.keep_reference()
    kl = [compiled.step(batches(), KL, 1e-2)["kl_mean"] for _ in range(2)]
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-3
