"""Compare the losses with the row kernel with the definition in float64, and with the plain path."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, INTERPRETED, as_good, kernels_take_the_tensors, placed, skip_unless_kernels_run

from mgrpo.kernels import Objective, dispatch, grpo_loss, linear_grpo_loss
from mgrpo.kernels.reference import grpo_loss_ref, linear_grpo_loss_ref, row_losses_ref
from numerics import OBJECTIVES, double, error, gradients, loss_case, peak_bytes

skip_unless_kernels_run()
__all__ = ["kernels_take_the_tensors"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered")]
TOKEN = Objective()
FULL = {"kl_coef": 0.1, "entropy_coef": 0.1, "dual_clip": 3.0}


def case_of(*sizes, dtype=torch.float32, **settings):
    """Return differentiable leaves, the other positional inputs and the keywords, on the device."""
    settings = {"off_policy": True, "bias": False, "row_temperature": False} | settings
    heads, others, keywords = loss_case(*sizes, **settings)
    return placed(heads, dtype), placed(others, torch.float32), placed(keywords, torch.float32)


def assert_as_good_as_plain(function, plain, case, objective, *, scale=1.0, **more):
    """Return loss and gradients of the kernels, of plain torch in the same dtype, and of plain torch in float64."""
    heads, others, keywords = case
    bias = keywords.pop("bias_V", None)
    runs = []
    for method, extra, wide in ((function, more, False), (plain, {}, False), (plain, {}, True)):
        leaves = [*heads, *([bias.to(heads[0].dtype)] if bias is not None else [])]
        leaves = [leaf.requires_grad_() for leaf in (double(leaves) if wide else [x.detach() for x in leaves])]
        inputs, named = (double(others), double(keywords)) if wide else (others, dict(keywords))
        if bias is not None:
            named["bias_V"] = leaves[-1]
        result = method(*leaves[: len(heads)], *inputs, objective, **named, **extra)
        runs.append([result[0].detach(), *gradients(lambda r=result: r[0] * scale, leaves)])
    for got, same, truth in zip(*runs, strict=True):
        assert got.dtype in (heads[0].dtype, torch.float32) and torch.isfinite(got).all()
        assert as_good(got, same, truth, size=scale * float(others[2].max()) if others[2].numel() else 0)


@given(
    st.builds(
        case_of,
        st.integers(0, 2**20),
        st.integers(0, 9),
        st.integers(2, 40),
        off_policy=st.booleans(),
        bias=st.booleans(),
        row_temperature=st.booleans(),
    ),
    OBJECTIVES,
    st.integers(1, 10),
)
@settings(max_examples=60, derandomize=True)
def test_fused_loss_is_as_good_as_plain(case, objective, chunk_rows):
    assert_as_good_as_plain(linear_grpo_loss, linear_grpo_loss_ref, case, objective, chunk_rows=chunk_rows)


def by_rule(loss):
    """Compute a loss whose token objective is the definition, written as a caller's rule."""

    def rule(rows, objective):
        now, weighed = (rows.logprobs, rows.entropies), (rows.advantages, rows.weights)
        return row_losses_ref(*now, *weighed, objective, rows.old, rows.sampler, rows.ref, None)

    def ruled(*inputs, **keywords):
        return loss(*inputs[:-1], replace(inputs[-1], rule=rule), **keywords)

    return ruled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [TOKEN, Objective(**FULL)])
@pytest.mark.parametrize("seed", range(3))
def test_a_fused_rule_is_as_good_as_plain(seed, objective, dtype):
    case = case_of(seed, 9, 33, dtype=dtype, bias=bool(seed % 2))
    assert_as_good_as_plain(by_rule(linear_grpo_loss), linear_grpo_loss_ref, case, objective, chunk_rows=4)
    logits = (case[0][0] @ case[0][1].T).detach()
    keywords = {name: value for name, value in case[2].items() if name != "bias_V"}
    assert_as_good_as_plain(by_rule(grpo_loss), grpo_loss_ref, ([logits], case[1], keywords), objective)


@given(
    st.builds(
        case_of,
        st.integers(0, 2**20),
        st.integers(0, 9),
        st.integers(2, 40),
        off_policy=st.booleans(),
        row_temperature=st.booleans(),
    ),
    OBJECTIVES,
)
@settings(max_examples=40, derandomize=True)
def test_logits_loss_is_as_good_as_plain(case, objective):
    (hidden, weight), others, keywords = case
    del keywords["bias_V"]
    assert_as_good_as_plain(grpo_loss, grpo_loss_ref, ([hidden @ weight.T], others, keywords), objective)


@pytest.mark.parametrize("importance", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_a_longer_vocabulary(dtype, importance):
    case = case_of(7, 40, 5003, 32, dtype=dtype, bias=True, row_temperature=True, scale=0.3)
    objective = Objective(importance=importance, **FULL)
    assert_as_good_as_plain(linear_grpo_loss, linear_grpo_loss_ref, case, objective, scale=1 / 3, chunk_rows=11)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("vocabulary", [49_152, 50_021, 129_920, 151_936])
def test_chunks_of_real_vocabularies(vocabulary):
    """Use default chunks: several blocks of logits per chunk, and several chunks."""
    case = case_of(5, 2000, vocabulary, 128, dtype=torch.bfloat16, row_temperature=True, scale=0.1)
    assert_as_good_as_plain(linear_grpo_loss, linear_grpo_loss_ref, case, Objective(**FULL), scale=1 / 3)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too large for the interpreter")
def test_more_rows_than_a_grid_has_in_y():
    case = case_of(6, 70_000, 33, 8)
    assert_as_good_as_plain(linear_grpo_loss, linear_grpo_loss_ref, case, Objective(importance="sequence", **FULL))


@pytest.mark.parametrize("objective", [TOKEN, Objective(importance="trajectory", **FULL)])
def test_everything_reported_equals_the_plain_path(objective):
    heads, others, keywords = case_of(9, 30, 97, bias=True, row_temperature=True)
    got = linear_grpo_loss(*heads, *others, objective, **keywords, chunk_rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", False)
        patch.setattr(dispatch, "_has_triton", lambda: False)
        plain = linear_grpo_loss(*heads, *others, objective, **keywords, chunk_rows=8)
    assert got.metrics.keys() == plain.metrics.keys()
    for name, value in plain.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.entropy_N == 0, plain.entropy_N == 0) and (got.entropy_N == 0).any()
    torch.testing.assert_close(got.logprobs_N, plain.logprobs_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy_N, plain.entropy_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [TOKEN, Objective(importance="sequence", **FULL)])
def test_masked_rows_are_never_read(objective):
    heads, (targets, advantages, weights), keywords = case_of(3, 12, 19, row_temperature=True)
    masked = weights == 0
    hidden = heads[0].masked_fill(masked[:, None], torch.nan).requires_grad_()
    dirty = {
        name: value.masked_fill(masked, torch.nan) if torch.is_tensor(value) and name != "cu_seqlens" else value
        for name, value in keywords.items()
    }
    rest = (targets.masked_fill(masked, -100), advantages.masked_fill(masked, torch.nan), weights, objective)
    del keywords["bias_V"], dirty["bias_V"]
    clean = linear_grpo_loss(*heads, targets, advantages, weights, objective, **keywords)
    got = linear_grpo_loss(hidden, heads[1], *rest, **dirty)
    assert masked.any() and torch.equal(clean.loss, got.loss) and torch.equal(clean.logprobs_N, got.logprobs_N)
    (grad,) = gradients(lambda: got.loss, [hidden])
    assert torch.isfinite(grad).all() and not grad[masked].any() and grad[~masked].any()
    logits = (hidden @ heads[1].T).detach().requires_grad_()
    (grad,) = gradients(lambda: grpo_loss(logits, *rest, **dirty).loss, [logits])
    assert torch.isfinite(grad).all() and not grad[masked].any() and grad[~masked].any()


@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_nothing_to_learn_gives_a_zero_gradient_that_flows(count, importance):
    leaves = placed([torch.randn(count, 4), torch.randn(9, 4), torch.randn(9)])
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    others = placed([torch.full((count,), -100), torch.randn(count), torch.zeros(count)])
    bounds = placed(torch.tensor([0, count]))
    objective = Objective(importance=importance)
    linear_grpo_loss(hidden, weight, *others, objective, cu_seqlens=bounds, bias_V=bias).loss.backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and not leaf.grad.any()
    logits = torch.randn(count, 9, device=DEVICE, requires_grad=True)
    grpo_loss(logits, *others, objective, cu_seqlens=bounds).loss.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_far_off_policy_rows_overflow_nothing():
    """Use ratios of e^800 and e^-800 with either sign of the advantage, and a sampler as far off."""
    logits = torch.zeros(6, 5, device=DEVICE).requires_grad_()
    advantages, old = placed([torch.tensor([1.0, -1, 0, 1, -1, 1]), torch.tensor([-800.0, -800, -800, 800, 800, -1])])
    inputs = (placed(torch.zeros(6, dtype=torch.int64)), advantages, torch.ones(6, device=DEVICE))
    objective = Objective(dual_clip=3.0, entropy_coef=0.1, sampler_cap=2.0)
    got = grpo_loss(logits, *inputs, objective, old_logprobs_N=old, sampler_logprobs_N=old - 900)
    (grad,) = gradients(lambda: got.loss, [logits])
    assert torch.isfinite(grad).all()
    assert (grad[:, 0] != 0).tolist() == [False] * 5 + [True]


def test_bf16_weight_gradients_do_not_stall_over_many_chunks():
    """Add 300 equal terms: a bf16 sum stops growing after 256 of them, and loses a seventh."""
    count = 300
    hidden, weight = placed([torch.ones(count, 2), torch.zeros(3, 2)], torch.bfloat16)
    args = placed([torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.full((count,), 1 / count)])
    linear_grpo_loss(hidden, weight.requires_grad_(), *args, Objective(clip_low=0.0), chunk_rows=1).loss.backward()
    truth = -torch.tensor([[2 / 3] * 2, [-1 / 3] * 2, [-1 / 3] * 2], device=DEVICE).double()
    assert error(weight.grad, truth) < 1e-2


def test_frozen_parts_get_no_gradient():
    for frozen in (0, 1):
        heads, others, keywords = case_of(3, 12, 19)
        heads[1 - frozen].requires_grad_()
        linear_grpo_loss(*heads, *others, TOKEN, **keywords).loss.backward()
        assert heads[frozen].grad is None and heads[1 - frozen].grad.any()


def test_autocast_and_accumulation_into_a_float32_gradient():
    case = case_of(11, 24, 130, 16, scale=0.5)
    (hidden, weight), others, keywords = case
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    weight.grad, held = torch.ones_like(weight), weight.grad
    with torch.autocast(DEVICE, torch.bfloat16):
        linear_grpo_loss(*leaves, *others, TOKEN, **keywords).loss.backward()
        plain = linear_grpo_loss_ref(*leaves, *others, TOKEN, **keywords)[0]
    assert held is None and hidden.grad.dtype == weight.grad.dtype == torch.float32
    same = gradients(lambda: plain, leaves)
    wide = [x.requires_grad_() for x in double(leaves)]
    truth = gradients(lambda: linear_grpo_loss_ref(*wide, *double(others), TOKEN, **double(keywords))[0], wide)
    for got, rough, exact in zip((hidden.grad, weight.grad - 1), same, truth, strict=True):
        assert error(got, exact) <= 2 * error(rough, exact) + 1e-2


@pytest.mark.skipif(not INTERPRETED, reason="counts the CPU's bytes")
def test_no_copy_of_the_logits_is_made():
    count, vocabulary = 96, 4001
    heads, others, keywords = case_of(1, count, vocabulary, 8)
    others[2] = others[2] + 1.0  # all rows live
    leaves = [head.requires_grad_() for head in heads]
    chunk = 16 * vocabulary * 4

    def work():
        return linear_grpo_loss(*leaves, *others, Objective(**FULL), **keywords, chunk_rows=16).loss.backward()

    assert peak_bytes(work) < 2 * chunk + 4 * vocabulary * 8 * 4 + 200_000  # logits, their gradient, and dW
