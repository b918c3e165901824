"""Bound what the kernels cost beside their arithmetic: waits of the host for the device, and memory."""

import pytest
import torch

from mgrpo.kernels import Objective, grpo_loss, inplace, linear_grpo_loss, linear_head, linear_logprob, token_logprob
from mgrpo.kernels.inplace import scale_in_place
from numerics import HostReads, loss_case, peak_bytes

FULL = {"kl_coef": 0.1, "entropy_coef": 0.1}
OBJECTIVES = [Objective(), *(Objective(importance=i, **FULL) for i in ("token", "sequence", "trajectory"))]


def case_with_leaves(*sizes, **settings):
    heads, others, keywords = loss_case(
        *sizes, **({"bias": True, "row_temperature": True, "off_policy": True} | settings)
    )
    for leaf in (*heads, keywords["bias_V"]):
        if leaf is not None:
            leaf.requires_grad_()
    return heads, others, keywords


def test_waits_are_counted():
    """Check that the measure can fail."""
    x, mask = torch.arange(3.0), torch.tensor([True, False, True])
    with HostReads() as reads:
        _ = float(x[0]), bool(mask.any()), mask.nonzero(), x[mask], x.tolist()
        torch.repeat_interleave(torch.tensor([1, 2]))
        torch.bincount(torch.tensor([1, 2]))
    assert len(reads.names) == 7


@pytest.mark.parametrize("objective", [*OBJECTIVES, Objective(importance="sequence")])
def test_the_host_waits_once_in_a_loss_and_not_in_its_backward(objective):
    (hidden, weight), others, keywords = case_with_leaves(3, 24, 19)
    with HostReads() as reads:
        got = linear_grpo_loss(hidden, weight, *others, objective, **keywords, chunk_rows=5)
        got.loss.backward()
    assert 0 < got.metrics["rows"] < 24 and reads.names == ["tolist"]
    logits = (hidden @ weight.T).detach().requires_grad_()
    del keywords["bias_V"]
    with HostReads() as reads:
        grpo_loss(logits, *others, objective, **keywords).loss.backward()
    assert reads.names == ["tolist"]


def test_the_host_waits_once_for_log_probs():
    (hidden, weight), (targets, *_), keywords = case_with_leaves(3, 24, 19)
    with HostReads() as reads:
        linear_logprob(hidden, weight, targets, temperature=keywords["temperature"])[0].sum().backward()
    assert reads.names == ["tolist"]
    with HostReads() as reads:
        token_logprob((hidden @ weight.T).detach(), targets)
    assert reads.names == ["tolist"]


@pytest.mark.parametrize(
    "name", ["targets_N", "advantages_N", "old_logprobs_N", "cu_seqlens", "temperature", "weight_VH"]
)
def test_a_tensor_on_another_device_is_named(name):
    (hidden, weight), (targets, advantages, weights), keywords = case_with_leaves(3, 24, 19)
    inputs = {"weight_VH": weight, "targets_N": targets, "advantages_N": advantages, **keywords}
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: got a tensor on meta, expected one on cpu"):
        linear_grpo_loss(hidden, loss_weights_N=weights, objective=Objective(importance="sequence"), **inputs)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_gradient_is_scaled_and_rounded_where_it_lies(count, source, dtype, monkeypatch):
    monkeypatch.setattr(inplace, "AT_ONCE", 8)
    gradient = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).to(source)
    scale = torch.tensor(1 / 3, dtype=torch.promote_types(source, torch.float32))
    expected = (gradient.to(scale.dtype) * scale).to(dtype)
    got = scale_in_place(gradient, scale, dtype)
    assert torch.equal(got, expected) and got.is_contiguous()
    assert got.data_ptr() == gradient.data_ptr()


@pytest.mark.parametrize("function", ["loss", "log-prob"])
def test_the_weights_gradient_is_the_accumulator_itself(function):
    (hidden, weight), (targets, *others), keywords = case_with_leaves(3, 24, 19, bias=False)
    weight = weight.detach().bfloat16().requires_grad_()
    hidden = hidden.detach().bfloat16().requires_grad_()
    if function == "loss":
        loss = linear_grpo_loss(hidden, weight, targets, *others, Objective(), **keywords).loss
    else:
        loss = linear_logprob(hidden, weight, targets)[0].sum()
    loss.backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.untyped_storage().nbytes() == 4 * weight.numel()


def test_a_bf16_head_costs_one_float32_gradient_and_no_copy_of_it(monkeypatch):
    count, vocabulary, width, chunk = 64, 4001, 128, 8
    monkeypatch.setattr(inplace, "AT_ONCE", 1 << 12)
    monkeypatch.setattr(linear_head, "DWEIGHT_ROWS", 256)
    (hidden, weight), others, keywords = case_with_leaves(1, count, vocabulary, width, bias=False)
    leaves = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    others[2] = others[2] + 1.0  # all rows live
    kept = []

    def forward():
        kept.append(linear_grpo_loss(*leaves, *others, Objective(), **keywords, chunk_rows=chunk).loss)

    logits, softmax, accumulator = 2 * chunk * vocabulary, 2 * 4 * chunk * vocabulary, 4 * vocabulary * width
    assert accumulator < peak_bytes(forward) < accumulator + logits + softmax + 300_000 < 1.5 * accumulator
    assert peak_bytes(lambda: kept[0].backward()) < accumulator / 10
