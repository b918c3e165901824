"""Compare the losses with the definition in float64, and bound what they read, cost and keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mgrpo.kernels import Objective, grpo_loss, linear_grpo_loss
from mgrpo.kernels.linear_head import HeadPlan
from mgrpo.kernels.reference import grpo_loss_ref, linear_grpo_loss_ref
from numerics import OBJECTIVES, close, double, error, gradients, loss_case, peak_bytes, within_rule

CASES = st.builds(
    loss_case,
    st.integers(0, 2**20),
    st.integers(0, 17),
    st.integers(1, 40),
    off_policy=st.booleans(),
    bias=st.booleans(),
    row_temperature=st.booleans(),
)
TOKEN = Objective()


def leaves_of(heads, keywords):
    tensors = [*heads, keywords["bias_V"]] if keywords["bias_V"] is not None else heads
    return [tensor.requires_grad_() for tensor in tensors]


def small_case(**changes):
    return loss_case(3, 12, 19, **({"off_policy": True, "bias": False, "row_temperature": False} | changes))


@given(CASES, OBJECTIVES, st.integers(1, 18))
@settings(max_examples=200)
def test_fused_loss_equals_the_definition(case, objective, chunk_rows):
    heads, others, keywords = case
    leaves = leaves_of(heads, keywords)
    got = linear_grpo_loss(*heads, *others, objective, **keywords, chunk_rows=chunk_rows)
    truth, logprobs, entropy = linear_grpo_loss_ref(*heads, *others, objective, **keywords)
    assert close(got.loss, truth)
    for a, b in zip(gradients(lambda: got.loss, leaves), gradients(lambda: truth, leaves), strict=True):
        assert close(a, b)
    live = got.entropy_N != 0 if heads[1].shape[0] > 1 else got.logprobs_N != 0
    assert close(got.logprobs_N[live], logprobs[live]) and close(got.entropy_N[live], entropy[live])
    assert heads[1].shape[0] == 1 or live.sum() == got.metrics["rows"]


@given(CASES, OBJECTIVES)
@settings(max_examples=100)
def test_logits_loss_equals_the_definition(case, objective):
    (hidden, weight), others, keywords = case
    keywords.pop("bias_V")
    logits = (hidden @ weight.T).requires_grad_()
    got = grpo_loss(logits, *others, objective, **keywords)
    truth = grpo_loss_ref(logits, *others, objective, **keywords)[0]
    assert close(got.loss, truth)
    assert close(*(gradients(lambda v=v: v, [logits])[0] for v in (got.loss, truth)))


@given(CASES, OBJECTIVES)
@settings(max_examples=40)
def test_both_losses_report_the_same(case, objective):
    heads, others, keywords = case
    fused = linear_grpo_loss(*heads, *others, objective, **keywords)
    bias = keywords.pop("bias_V")
    plain = grpo_loss(torch.nn.functional.linear(*heads, bias), *others, objective, **keywords)
    assert fused.metrics.keys() == plain.metrics.keys()
    for name, value in plain.metrics.items():
        assert close(fused.metrics[name], value), name
    assert close(fused.logprobs_N, plain.logprobs_N) and close(fused.entropy_N, plain.entropy_N)


def test_a_row_without_advantage_still_moves_the_ratio_its_sequence_shares():
    heads, (targets, advantages, weights), keywords = small_case()
    weights = torch.ones_like(weights)
    advantages = torch.zeros_like(advantages)
    advantages[5] = -1.0
    keywords["cu_seqlens"] = torch.tensor([0, 4, 9, 12])
    got = linear_grpo_loss(*heads, targets, advantages, weights, Objective(importance="sequence"), **keywords)
    assert (got.entropy_N != 0).tolist() == [4 <= i < 9 for i in range(12)] and got.metrics["rows"] == 5
    token = linear_grpo_loss(*heads, targets, advantages, weights, TOKEN, **keywords)
    assert (token.entropy_N != 0).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("objective", [TOKEN, Objective(importance="sequence", kl_coef=0.1, entropy_coef=0.1)])
def test_masked_rows_are_never_read(objective):
    heads, (targets, advantages, weights), keywords = small_case(row_temperature=True)
    clean = linear_grpo_loss(*heads, targets, advantages, weights, objective, **keywords)
    masked = weights == 0
    assert masked.any()
    with torch.no_grad():
        hidden = heads[0].masked_fill(masked[:, None], torch.nan).requires_grad_()
    dirty_keywords = {
        name: value.masked_fill(masked, torch.nan) if torch.is_tensor(value) and name != "cu_seqlens" else value
        for name, value in keywords.items()
    }
    dirty_targets, dirty_advantages = targets.masked_fill(masked, -100), advantages.masked_fill(masked, torch.nan)
    rest = (heads[1], dirty_targets, dirty_advantages, weights, objective)
    dirty = linear_grpo_loss(hidden, *rest, **dirty_keywords)
    assert torch.equal(clean.loss, dirty.loss) and torch.equal(clean.logprobs_N, dirty.logprobs_N)
    (grad,) = gradients(lambda: dirty.loss, [hidden])
    assert torch.isfinite(grad).all() and not grad[masked].any() and grad[~masked].any()


@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("importance", ["token", "sequence", "trajectory"])
def test_nothing_to_learn_gives_a_zero_gradient_that_flows(count, importance):
    hidden, weight = torch.randn(count, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    got = linear_grpo_loss(
        hidden,
        weight,
        torch.full((count,), -100),
        torch.randn(count),
        torch.zeros(count),
        Objective(importance=importance),
        cu_seqlens=torch.tensor([0, count]),
        bias_V=bias,
    )
    got.loss.backward()
    assert got.loss.item() == 0 and got.metrics["rows"] == 0 and got.metrics["ratio_max"] == 0
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()
    logits = torch.randn(count, 9, requires_grad=True)
    grpo_loss(logits, torch.full((count,), -100), torch.randn(count), torch.zeros(count), TOKEN).loss.backward()
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("importance", ["token", "sequence", "trajectory"])
def test_advantages_of_zero_leave_nothing_but_the_other_terms(importance):
    heads, (targets, advantages, weights), keywords = small_case()
    leaves = leaves_of(heads, keywords)
    zero = torch.zeros_like(advantages)
    got = linear_grpo_loss(*heads, targets, zero, weights, Objective(importance=importance), **keywords)
    assert got.loss.item() == 0 and got.metrics["rows"] == 0
    assert not any(grad.any() for grad in gradients(lambda: got.loss, leaves))
    objective = Objective(importance=importance, kl_coef=0.1, entropy_coef=0.1)
    got = linear_grpo_loss(*heads, targets, zero, weights, objective, **keywords)
    truth = linear_grpo_loss_ref(*heads, targets, zero, weights, objective, **keywords)[0]
    assert got.metrics["rows"] == (weights != 0).sum() and close(got.loss, truth)
    pairs = zip(gradients(lambda: got.loss, leaves), gradients(lambda: truth, leaves), strict=True)
    assert all(close(a, b) and b.any() for a, b in pairs)


@pytest.mark.parametrize("importance", ["token", "trajectory"])
def test_chunks_do_not_matter(importance):
    heads, others, keywords = loss_case(5, 50, 31, off_policy=True, bias=True, row_temperature=True)
    leaves = leaves_of(heads, keywords)
    objective = Objective(importance=importance, entropy_coef=0.1)
    losses = [linear_grpo_loss(*heads, *others, objective, **keywords, chunk_rows=c) for c in (None, 1, 7, 1000)]
    grads = [gradients(lambda v=v: v.loss, leaves) for v in losses]
    for got, grad in zip(losses[1:], grads[1:], strict=True):
        assert close(got.loss, losses[0].loss, 1e-12) and close(got.logprobs_N, losses[0].logprobs_N, 1e-12)
        assert all(close(a, b, 1e-12) for a, b in zip(grad, grads[0], strict=True))


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_plain_in_the_same_dtype(dtype, importance):
    heads, others, keywords = loss_case(7, 90, 517, 32, off_policy=True, bias=False, row_temperature=True, scale=0.3)
    heads = [head.to(dtype) for head in heads]
    objective = Objective(importance=importance, kl_coef=0.1, entropy_coef=0.1)
    runs = []
    for function, args in (
        (linear_grpo_loss, heads),
        (linear_grpo_loss_ref, heads),
        (linear_grpo_loss_ref, double(heads)),
    ):
        leaves = [arg.detach().requires_grad_() for arg in args]
        loss, logprobs, *_ = function(*leaves, *others, objective, **keywords)
        runs.append([loss.detach(), *gradients(lambda loss=loss: loss / 3, leaves)])
        del logprobs
    for got, plain, truth in zip(*runs, strict=True):
        assert got.dtype in (dtype, torch.float32) and within_rule(got, plain.to(got.dtype), truth)


def test_bf16_weight_gradients_do_not_stall_over_many_chunks():
    """Add 600 equal terms: a bf16 sum stops growing after 256 of them, and loses more than half."""
    count, objective = 600, Objective(clip_low=0.0)
    hidden, weight = torch.ones(count, 2).bfloat16(), torch.zeros(3, 2).bfloat16().requires_grad_()
    args = (torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.full((count,), 1 / count))
    linear_grpo_loss(hidden, weight, *args, objective, chunk_rows=1).loss.backward()
    truth = -torch.tensor([[2 / 3] * 2, [-1 / 3] * 2, [-1 / 3] * 2]).double()
    assert error(weight.grad, truth) < 1e-2


def test_frozen_parts_get_no_gradient_and_cost_none():
    for frozen in (0, 1):
        heads, others, keywords = small_case()
        heads[1 - frozen].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            got = linear_grpo_loss(*heads, *others, TOKEN, **keywords)
            got.loss.backward()
        assert heads[frozen].grad is None and heads[1 - frozen].grad.any()
        assert counter.get_total_flops() == 2 * 2 * int(got.metrics["rows"]) * 6 * 19


@pytest.mark.parametrize(
    ("objective", "off_policy", "matmuls"),
    [
        (TOKEN, True, 3),
        (TOKEN, False, 3),
        (Objective(importance="sequence"), True, 4),
        (Objective(importance="sequence", kl_coef=0.1), False, 3),  # on-policy: the slopes are known beforehand
    ],
)
def test_the_number_of_matmuls_is_exact(objective, off_policy, matmuls):
    heads, others, keywords = loss_case(4, 12, 19, off_policy=off_policy, bias=False, row_temperature=False)
    for head in heads:
        head.requires_grad_()
    for grad, expected in ((True, matmuls), (False, 1)):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            got = linear_grpo_loss(*heads, *others, objective, **keywords, chunk_rows=5)
            if grad:
                got.loss.backward()
        assert 0 < got.metrics["rows"] < 12
        assert counter.get_total_flops() == expected * 2 * int(got.metrics["rows"]) * 6 * 19


def test_memory_stays_far_below_one_copy_of_the_logits():
    count, vocabulary = 1024, 4001
    heads, others, keywords = loss_case(1, count, vocabulary, 8, off_policy=True, bias=False, row_temperature=False)
    others[2] = others[2] + 1.0  # all rows live
    heads = [head.float().requires_grad_() for head in heads]
    objective = Objective(importance="sequence", kl_coef=0.1, entropy_coef=0.1)

    def peak(function, **more):
        return peak_bytes(lambda: function(*heads, *others, objective, **keywords, **more)[0].backward())

    logits_bytes = count * vocabulary * 4
    assert peak(linear_grpo_loss_ref) > 2 * logits_bytes  # the measure can fail
    assert peak(linear_grpo_loss, chunk_rows=32) < logits_bytes / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [7, 49_152, 151_936, 10**9])
def test_default_chunks_bound_their_buffer_and_share_the_rows_out(dtype, vocabulary):
    chunks = list(HeadPlan(torch.zeros(4096), None, 1.0, dtype).chunks(vocabulary))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(4096))
    assert max(lengths) == 1 or max(lengths) * vocabulary * dtype.itemsize <= 2**26
    assert vocabulary > 7 or len(chunks) == 1
    assert max(lengths) - min(lengths) <= len(chunks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_upstream_gradients_scale_exactly(dtype):
    heads, others, keywords = small_case()
    leaves = [head.to(dtype).requires_grad_() for head in heads]

    def loss():
        return linear_grpo_loss(*leaves, *others, TOKEN, **keywords).loss

    once = torch.autograd.grad(loss(), leaves)
    third = torch.autograd.grad(loss(), leaves, torch.tensor(1 / 3, dtype=loss().dtype))
    for one, other in zip(once, third, strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(other.double(), one.double() / 3, rtol=torch.finfo(dtype).eps, atol=0)
    for _ in range(2):
        loss().backward()
    assert all(torch.equal(leaf.grad, one * 2) for leaf, one in zip(leaves, once, strict=True))


def test_a_second_backward_is_refused():
    heads, others, keywords = small_case()
    hidden, weight = (head.requires_grad_() for head in heads)
    loss = linear_grpo_loss(hidden, weight, *others, TOKEN, **keywords).loss
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    again = linear_grpo_loss(hidden, weight, *others, TOKEN, **keywords).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(again, hidden, create_graph=True)[0].sum().backward()


def test_tied_embeddings_checkpointed_backbone_and_autocast():
    """Check on a tiny tied model that the fused loss agrees with the plain one in every combination."""
    torch.manual_seed(0)
    table, mixer = torch.randn(23, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    tokens, targets = torch.randint(23, (2, 30))
    advantages, weights = torch.randn(30), torch.rand(30)

    def run(function, checkpointed, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            body = lambda x: torch.tanh(x @ mixer)  # noqa: E731
            embedded = table[tokens]
            hidden = checkpoint(body, embedded, use_reentrant=False) if checkpointed else body(embedded)
            loss = function(hidden, table, targets, advantages, weights, TOKEN)[0]
        return torch.autograd.grad(loss, [table, mixer])

    truth = run(linear_grpo_loss_ref, False, False)
    for checkpointed in (False, True):
        for got, expected in zip(run(linear_grpo_loss, checkpointed, False), truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        fast, plain = run(linear_grpo_loss, checkpointed, True), run(linear_grpo_loss_ref, checkpointed, True)
        for got, same, expected in zip(fast, plain, truth, strict=True):
            assert got.dtype == torch.float32
            assert error(got, expected.double()) <= 2 * error(same, expected.double()) + 4e-3


def test_autocast_runs_the_matmuls_in_its_dtype_but_leaves_float64():
    heads, others, keywords = small_case()
    keywords["old_logprobs_N"] = None
    with torch.autocast("cpu", torch.bfloat16):
        exact = linear_grpo_loss(*heads, *others, TOKEN, **keywords)
        rough = linear_grpo_loss(*(head.float() for head in heads), *others, TOKEN, **keywords)
    truth = linear_grpo_loss(*heads, *others, TOKEN, **keywords)
    assert torch.equal(exact.logprobs_N, truth.logprobs_N)
    assert 1e-4 < (rough.logprobs_N - truth.logprobs_N).abs().max() < 0.3


def test_a_loss_under_checkpoint_equals_one_without():
    heads, others, keywords = small_case()
    hidden, weight = (head.requires_grad_() for head in heads)

    def loss(h):
        return linear_grpo_loss(h, weight, *others, TOKEN, **keywords).loss

    for a, b in zip(
        gradients(lambda: checkpoint(loss, hidden * 1, use_reentrant=False), heads),
        gradients(lambda: loss(hidden), heads),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_strided_inputs():
    heads, others, keywords = small_case()
    truth = linear_grpo_loss(*heads, *others, TOKEN, **keywords)
    strided = [torch.stack([x, x], -1)[..., 1] for x in (*heads, *others)]
    strided[1] = strided[1].T.contiguous().T
    assert not any(x.is_contiguous() for x in strided)
    leaves = [x.requires_grad_() for x in strided[:2]]
    got = linear_grpo_loss(*strided, TOKEN, **keywords)
    assert close(got.loss, truth.loss, 1e-12)
    expected = gradients(lambda: linear_grpo_loss_ref(*strided, TOKEN, **keywords)[0], leaves)
    assert all(close(a, b) for a, b in zip(gradients(lambda: got.loss, leaves), expected, strict=True))


GOOD = {
    "hidden_NH": torch.ones(3, 4),
    "weight_VH": torch.ones(7, 4),
    "targets_N": torch.tensor([0, 6, 1]),
    "advantages_N": torch.ones(3),
    "loss_weights_N": torch.tensor([1.0, 1.0, 0.0]),
    "objective": TOKEN,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages_N": torch.tensor([0, torch.nan, 0])}, "advantages_N: got nan at row 1"),
        ({"advantages_N": torch.ones(2)}, r"advantages_N: got \(2,\), expected shape \(3,\)"),
        ({"advantages_N": torch.ones(3, dtype=torch.int64)}, "advantages_N.*int64"),
        ({"loss_weights_N": torch.tensor([0, 0, torch.inf])}, "loss_weights_N: got inf at row 2"),
        ({"targets_N": torch.tensor([0, 7, 0])}, "targets_N: got 7 at row 1"),
        ({"targets_N": torch.tensor([-100, 0, 0])}, "targets_N: got -100 at row 0"),
        ({"targets_N": torch.zeros(3)}, "targets_N.*int64"),
        ({"old_logprobs_N": torch.tensor([0, torch.nan, 0])}, "old_logprobs_N: got nan at row 1"),
        ({"sampler_logprobs_N": torch.ones(4)}, "sampler_logprobs_N"),
        ({"objective": Objective(kl_coef=0.1)}, "ref_logprobs_N"),
        ({"objective": Objective(importance="sequence")}, "cu_seqlens"),
        ({"objective": Objective(importance="trajectory")}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens"),
        ({"temperature": -1.0}, "temperature"),
        ({"chunk_rows": -1}, "chunk_rows"),
    ],
)
def test_mistakes_are_refused(change, message):
    linear_grpo_loss(**GOOD)
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**(GOOD | change))
