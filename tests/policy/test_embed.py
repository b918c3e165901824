"""A policy inside another trainer: the caller's model, plain arrays, the caller's own losses, other launchers."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mgrpo.engine import Batch, ComputeConfig, Objective, Policy, advantages, align, pack
from mgrpo.engine.inference.sampler import Session
from mgrpo.engine.run.weights import load_weights
from mgrpo.engine.system import distributed
from ranks import free_port
from toy import make_model

LENGTHS = (9, 14, 5, 11, 7)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), hidden_size=16, intermediate_size=24, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace transformers' norms, which round to float32: that is too coarse for these tests."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)


def wide_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def load(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    nn.Module.to(model, dtype)  # buffers too
    return model


def policy_of(folder: Path, **settings: Any) -> Policy:
    return Policy.of(load(folder), **{"temperature": TEMPERATURE, "lr": 1e-2} | settings)


def trajectories(seed: int = 0) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, 257, n).astype(np.int32) for n in LENGTHS]
    sampled = [np.arange(n) >= 3 for n in LENGTHS]
    noise = [rng.normal(-5, 0.5, n).astype(np.float32) for n in LENGTHS]
    return {"tokens": tokens, "sampled": sampled, "old_logprobs": noise, "ref_logprobs": [x + 0.1 for x in noise]}


ADVANTAGES = np.array([1.0, -2.0, 0.5, -0.25, 3.0])


def packed(cap: int = 16, with_old: bool = False, **options: Any) -> list[dict[str, Any]]:
    given = trajectories()
    logprobs = {name: given.pop(name) for name in ("old_logprobs", "ref_logprobs")}
    options |= logprobs if with_old else {}
    (batches,) = pack(**given, advantages=ADVANTAGES, weights=np.full(5, 0.25), cap=cap, **options)
    return batches


def plain_logprobs(model: nn.Module, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of every token except the first, from the whole logits of one sequence."""
    ids = torch.from_numpy(tokens).long()
    logp = (model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    return logp.gather(1, ids[1:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in policy.masters.weights.items()}
    policy.optimizer.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], model: nn.Module) -> None:
    expected = {name: param.grad for name, param in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)
    model.zero_grad()


# ---- a caller's model, plain arrays


@pytest.mark.parametrize("cap", [16, 999])
def test_the_gradient_is_plain_torchs(folder: Path, cap: int) -> None:
    policy, plain = policy_of(folder), load(folder)
    given = trajectories()
    found = policy.forward_backward(packed(cap), Objective(sampler_cap=None))
    expected = sum(
        -0.25 * float(a) * plain_logprobs(plain, t)[0][2:].sum()
        for a, t in zip(ADVANTAGES, given["tokens"], strict=True)
    )
    expected.backward()
    assert_same(gradients(policy), plain)
    assert found.metrics["rows"] == sum(n - 3 for n in LENGTHS)


def test_old_and_reference_log_probs_come_with_the_batch(folder: Path) -> None:
    policy, plain, given = policy_of(folder), load(folder), trajectories()
    policy.forward_backward(
        packed(with_old=True), Objective(sampler_cap=None, clip_low=1.0, clip_high=9e9, kl_coef=0.3, kl="k2")
    )
    total = torch.zeros(())
    for a, tokens, old, ref in zip(
        ADVANTAGES, given["tokens"], given["old_logprobs"], given["ref_logprobs"], strict=True
    ):
        logp = plain_logprobs(plain, tokens)[0][2:]
        old, ref = (torch.from_numpy(x[3:]).double() for x in (old, ref))
        total = total + 0.25 * (-a * (logp - old).exp() + 0.3 * (logp - ref) ** 2 / 2).sum()
    total.backward()
    assert_same(gradients(policy), plain)


def test_without_any_reference_a_kl_term_is_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"kl_coef > 0 given: expected keep_reference\(\) before, or packed ref_logprobs"
    ):
        policy_of(folder).forward_backward(packed(), Objective(kl_coef=0.1))


def test_old_log_probs_of_an_earlier_pass_are_one_for_each_micro_batch(folder: Path) -> None:
    policy = policy_of(folder)
    old = [logprobs_P - 0.05 for logprobs_P in policy.forward(packed())]
    found = policy.forward_backward(packed(), Objective(sampler_cap=None), old)
    assert found.metrics["ratio_mean"] == pytest.approx(np.exp(0.05))
    with pytest.raises(ValueError, match="shorter"):
        policy.forward_backward(packed(), Objective(sampler_cap=None), old[:-1])


def test_forward_is_the_log_probs_of_what_was_chosen(folder: Path) -> None:
    policy, plain, given = policy_of(folder), load(folder), trajectories()
    truth = {tuple(t[1:].tolist()): plain_logprobs(plain, t)[0].detach() for t in given["tokens"]}
    seen = 0
    for batch, logprobs_P in zip(packed(), policy.forward(packed()), strict=True):
        bounds = batch["cu_seqlens"].tolist()
        for a, b in pairwise(bounds):
            expected = truth[tuple(batch["targets"][a:b].tolist())].clone()
            expected[:2] = 0
            torch.testing.assert_close(logprobs_P[a:b], expected, rtol=1e-9, atol=1e-11)
            seen += 1
    assert seen == 5 and not any(param.grad is not None for param in policy.model.parameters())


def test_steps_move_the_callers_own_model_which_still_does_what_it_did(folder: Path) -> None:
    model, plain = load(folder, torch.float32), load(folder, torch.float32)
    ids, mask = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    before = plain.generate(**given)
    policy = Policy.of(model, lr=1e-2)
    assert torch.equal(model.generate(**given), before)
    before = policy.forward(packed())
    policy.forward_backward(packed(), Objective())
    norm = policy.optim_step()
    assert norm > 0 and policy.version == 1 and policy.model is model
    gained = [
        (b["advantages"] * (after - old).numpy()).sum()
        for b, old, after in zip(packed(), before, policy.forward(packed()), strict=True)
    ]
    assert sum(gained) > 0
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.generate(**given), plain.generate(**given))


def test_parameters_that_are_not_trained_stay(folder: Path) -> None:
    model = load(folder, torch.bfloat16)
    frozen = model.model.layers[0].requires_grad_(False)
    before = {name: param.clone() for name, param in model.named_parameters()}
    policy = Policy.of(model, lr=1e-1, weight_decay=0.5)
    policy.step(packed(), Objective())
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    still = {f"model.layers.0.{name}" for name, _ in frozen.named_parameters()}
    assert moved == before.keys() - still
    assert all(policy.masters.weights[name] is param for name, param in model.named_parameters() if name in still)


def softcapped(folder: Path) -> nn.Module:
    model = load(folder)
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    model.forward = capped
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: nn.Sequential(load(folder)),
            "model: Sequential given: expected a PreTrainedModel of transformers",
        ),
        (
            lambda folder: load(folder, torch.float16),
            r"model: a model in torch.float16 given: expected one of \(torch.bfloat16",
        ),
        (softcapped, "model: LlamaForCausalLM changes its logits after the head"),
        (lambda folder: load(folder).model, "model: LlamaModel given: expected a causal LM, with a head over its"),
        (
            lambda folder: AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="sdpa"),
            "model: LlamaForTokenClassification given: expected a causal LM, with a head",
        ),
    ],
)
def test_models_that_cannot_be_trained_are_refused_as_they_were(folder: Path, make: Any, message: str) -> None:
    model = make(folder)
    with pytest.raises(ValueError, match=message):
        Policy.of(model)
    inner = model[0] if isinstance(model, nn.Sequential) else model
    assert inner.config._attn_implementation == "sdpa"


def test_a_setting_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"agents\.policy\.rate: .*no such key, expected one of model, revision"):
        Policy.of(load(folder), rate=1.0)
    with pytest.raises(ValueError, match=r"^mine\.top_p: 0\.5 given: expected 1 for an agent that is trained"):
        Policy.of(load(folder), name="mine", top_p=0.5)
    assert Policy.of(load(folder), top_p=0.5, train=False).agent.top_p == 0.5


def test_a_prefix_tree_is_refused(folder: Path) -> None:
    tokens = (np.arange(1, 9), np.array([0, 4, 8]))
    sampled = (np.ones(8, bool), tokens[1])
    (trees,) = pack(tokens, sampled, [1.0, 1.0], [1.0, 1.0], 99, tree=True)
    with pytest.raises(
        ValueError, match=r"batch: columns \[.*\] given: expected a micro-batch of pack, with tree=False"
    ):
        policy_of(folder).forward(trees)


# ---- losses of the caller's own


def pairs(batches: list[Batch], logprobs: list[Tensor], entropies: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Return a loss that depends on all sequences together, wherever they were packed, and on the entropies."""
    sums: dict[int, Tensor] = {}
    for batch, logprobs_P in zip(batches, logprobs, strict=True):
        bounds = batch.cu_seqlens_B1.tolist()
        for a, b in pairwise(bounds):
            sums[int(batch.targets_P[a])] = logprobs_P[a:b].sum()
    total = torch.stack([sums[key] for key in sorted(sums)])
    loss = -F.logsigmoid(total[0] - total[1:].mean()) + total.exp().sum()
    return loss + 0.1 * sum(e_P.square().sum() for e_P in entropies), {"sequences": float(len(sums))}


@pytest.mark.parametrize("cap", [16, 999])
def test_a_loss_of_the_callers_own_over_all_micro_batches(folder: Path, cap: int) -> None:
    policy, plain, given = policy_of(folder), load(folder), trajectories()
    found = policy.forward_backward_custom(packed(cap), pairs)
    assert (len(packed(cap)) > 1) == (cap == 16)
    rows = {int(t[1]): [x[2:] for x in plain_logprobs(plain, t)] for t in given["tokens"]}
    total = torch.stack([rows[key][0].sum() for key in sorted(rows)])
    loss = -F.logsigmoid(total[0] - total[1:].mean()) + total.exp().sum()
    loss = loss + 0.1 * sum(entropies.square().sum() for _, entropies in rows.values())
    loss.backward()
    assert_same(gradients(policy), plain)
    assert found.metrics == {"sequences": 5.0, "loss": pytest.approx(float(loss.detach()), rel=1e-12)}


@pytest.mark.parametrize("returned", [1.0, torch.ones(2, requires_grad=True), torch.ones(())])
def test_a_loss_that_is_no_number_of_the_log_probs_is_refused(folder: Path, returned: Any) -> None:
    with pytest.raises(ValueError, match=r"fn: a loss of .* returned: expected a 0-dim tensor that depends on"):
        policy_of(folder).forward_backward_custom(packed(), lambda *_: (returned, {}))


def test_an_objective_of_the_callers_own_is_the_same_loss_by_rows(folder: Path) -> None:
    one, other = policy_of(folder), policy_of(folder)
    one.forward_backward(
        packed(), Objective(rule=lambda rows, _: -rows.advantages * rows.logprobs - 0.2 * rows.entropies)
    )

    def same(batches: list[Batch], logprobs: list[Tensor], entropies: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        parts = zip(batches, logprobs, entropies, strict=True)
        return sum((b.weights_P * (-b.advantages_P * x - 0.2 * e)).sum() for b, x, e in parts), {}

    other.forward_backward_custom(packed(), same)
    expected = gradients(other)
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


# ---- saved, published, sampled


def test_a_state_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    policy = policy_of(folder)
    policy.step(packed(), Objective())
    policy.save_state(tmp_path / "state")
    other = policy_of(folder)
    other.load_state(str(tmp_path / "state"))
    assert other.version == 1 and all(
        torch.equal(a, b) for a, b in zip(other.model.parameters(), policy.model.parameters(), strict=True)
    )
    (tmp_path / "state" / "policy.json").unlink()
    with pytest.raises(ValueError, match=r"state: expected a policy's state with a valid policy\.json"):
        other.load_state(tmp_path / "state")


def test_what_is_published_is_the_weights(folder: Path, tmp_path: Path) -> None:
    policy = Policy.of(load(folder, torch.bfloat16), name="mine", lr=1e-2)
    policy.step(packed(), Objective())
    found = policy.publish(str(tmp_path))
    assert found.file.startswith("mine/v1-")
    tensors = load_weights(str(tmp_path), *found)
    assert all(torch.equal(tensors[name], param) for name, param in policy.model.named_parameters())


def test_sampling_needs_a_tokenizer_and_reads_the_trained_weights(folder: Path) -> None:
    with pytest.raises(ValueError, match="sampler: a policy with no tokenizer given"):
        policy_of(folder).sampler()
    policy = Policy.of(load(folder, torch.float32), AutoTokenizer.from_pretrained(folder), lr=0.1, max_new_tokens=6)
    sampler = policy.sampler()
    tokens = [5, 9, 1, 30]
    assert sampler.logprobs(tokens) == pytest.approx(policy.logprobs(tokens), abs=1e-5)
    before = policy.logprobs(tokens)
    policy.step(packed(), Objective())
    assert sampler.logprobs(tokens) == pytest.approx(policy.logprobs(tokens), abs=1e-5)
    assert policy.logprobs(tokens) != pytest.approx(before, abs=1e-2)
    session = Session(seed=(1,), tokens=[3, 4], sampled=[False] * 2, logprobs=[0.0] * 2)

    async def play() -> None:
        turn = asyncio.ensure_future(sampler.act(session))
        await asyncio.sleep(0)
        while not turn.done():
            sampler.step()
            await asyncio.sleep(0)

    asyncio.run(play())
    assert session.logprobs[2:] == pytest.approx(policy.logprobs(session.tokens)[1:], abs=1e-5) and session.sampled[2:]


def test_a_directory_brings_model_and_tokenizer(folder: Path) -> None:
    policy = Policy.of(folder, max_context=64, compute=ComputeConfig(dtype="float32", device="cpu"))
    tokens = [5, 9, 1, 30]
    assert policy.sampler().logprobs(tokens) == pytest.approx(policy.logprobs(tokens), abs=1e-5)
    assert policy.name == "policy" and policy.dtype == torch.float32


# ---- groups


@pytest.mark.parametrize("mode", ["sampled", "expected"])
def test_every_rollout_counts_as_often_as_any_other(mode: Any) -> None:
    multiplicities = align([2, 0, 5, 3], 3, mode, seed=7)
    assert multiplicities.dtype == np.float64
    assert [part.sum() for part in np.split(multiplicities, [2, 2, 7])] == pytest.approx([3, 0, 3, 3])


def test_without_alignment_a_rollout_counts_as_often_as_it_called() -> None:
    assert align([2, 0, 5, 3], 3, "none").tolist() == [1.0] * 10
    with pytest.raises(ValueError, match="target"):
        align([2], 0, "none")


def test_advantages_of_lists() -> None:
    found = advantages([1, 0, 1, 0, 5, 5], [0, 4, 6])
    assert found.values.tolist() == [1, -1, 1, -1, 0, 0] and found.zero_std.tolist() == [False, True]
    assert found.mean.tolist() == [0.5, 5] and found.std.tolist() == [0.5, 0]
    weighted = advantages([1, 0], [0, 2], weights=[3, 1], scale="none")
    assert weighted.values.tolist() == [0.25, -0.75]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align([1.5], 2), r"counts: float64 of shape \(1,\) given: expected integers"),
        (lambda: align([[1]], 2), r"counts: int64 of shape \(1, 1\) given"),
        (lambda: align([1, 2], 2, keys=[1]), r"keys: an array of shape \(1,\) given: expected \(2,\)"),
        (lambda: align([1], 0), "target"),
        (lambda: advantages([1.0], [0.0, 1.0]), r"offsets: float64 of shape \(2,\) given: expected integers"),
        (lambda: advantages([1.0, 2.0], [0, 1]), r"offsets_G1: got first and last \(0, 1\), expected \(0, 2\)"),
        (lambda: advantages([1.0], [0, 1], [1, 2]), r"weights: an array of shape \(2,\) given: expected \(1,\)"),
        (lambda: advantages([np.nan], [0, 1]), "rewards_R: got nan at row 0"),
    ],
)
def test_a_mistake_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- another launcher's processes


def run_foreign(work: Any, ranks: int, *args: Any) -> None:
    spawn(_foreign, (work, ranks, free_port(), args), nprocs=ranks)


def _foreign(rank: int, work: Any, ranks: int, port: str, args: tuple[Any, ...]) -> None:
    """Run as under a foreign launcher: with a process group and without an environment."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    LlamaRMSNorm.forward = wide_norm  # type: ignore[method-assign]
    work(rank, *args)
    dist.destroy_process_group()


def whole(policy: Policy) -> list[Tensor]:
    return [w.full_tensor() if hasattr(w, "full_tensor") else w.detach() for w in policy.masters.weights.values()]


def train_two_and_one(rank: int, folder: Path, truth: list[list[Tensor]], out: Path) -> None:
    """Let ranks 0 and 1 share a policy while rank 2 trains another one with another loss."""
    halves = [dist.new_group([0, 1]), dist.new_group([2])]
    group = halves[rank // 2]
    policy = policy_of(folder, group=group, name=f"half{rank // 2}")
    assert (policy.rank, policy.ranks) == ((rank, 2) if rank < 2 else (0, 1))
    batches = packed(ranks=policy.ranks, rank=policy.rank)
    if rank < 2:
        policy.step(batches, Objective(sampler_cap=None), epochs=2)
    policy.forward_backward_custom(batches, squares)
    policy.forward_backward_custom(packed(999, ranks=policy.ranks, rank=policy.rank), squares)
    policy.optim_step()
    for weight, expected in zip(whole(policy), truth[rank // 2], strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-9)
    policy.save_state(out / f"half{rank // 2}" if policy.rank == 0 else None)
    published = Policy.of(load(folder, torch.float32), group=group, name=f"half{rank // 2}").publish(str(out))
    tensors = load_weights(str(out), *published)
    assert all(torch.equal(tensors[name], param) for name, param in load(folder, torch.float32).named_parameters())
    if rank < 2:
        with pytest.raises(ValueError, match="sampler: a policy with 2 ranks given"):
            policy.sampler()
    refuse_a_sharded_model(folder)
    messages_without_a_cpu_backend(rank)


def squares(batches: list[Batch], logprobs: list[Tensor], _: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return sum(0.01 * (logprobs_P**2).sum() for logprobs_P in logprobs), {}


def test_two_policies_under_a_foreign_process_group(folder: Path, tmp_path: Path) -> None:
    truth = []
    for shared in (True, False):
        policy = policy_of(folder)
        if shared:
            policy.step(packed(), Objective(sampler_cap=None), epochs=2)
        for _ in range(2):
            policy.forward_backward_custom(packed(), squares)
        policy.optim_step()
        truth.append(whole(policy))
    run_foreign(train_two_and_one, 3, folder, truth, tmp_path)
    alone = policy_of(folder)
    for number in (0, 1):
        alone.load_state(tmp_path / f"half{number}")
        for weight, expected in zip(whole(alone), truth[number], strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-9)


def messages_without_a_cpu_backend(rank: int) -> None:
    """Send messages as under a launcher whose group has collectives for GPUs only: ours then use another group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        distributed._beside.cache_clear()
        assert distributed._channel(dist.group.WORLD) is not dist.group.WORLD
        assert distributed.broadcast({"from": rank}) == {"from": 0}
        assert distributed.gather(rank) == [0, 1, 2]


def refuse_a_sharded_model(folder: Path) -> None:
    model = load(folder)
    fully_shard(model)
    with pytest.raises(ValueError, match="model: a sharded model given: expected a whole one on every rank"):
        Policy.of(model)
