"""Test a caller's rule: fused, it equals autograd through whole logits in float64; what it sees; what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mgrpo.kernels import Objective, RuleRows, grpo_loss, linear_grpo_loss, linear_head
from mgrpo.kernels.reference import token_logprob_ref
from numerics import close, gradients, loss_case, peak_bytes

CASES = st.builds(
    loss_case,
    st.integers(0, 2**20),
    st.integers(0, 17),
    st.integers(2, 40),
    off_policy=st.booleans(),
    bias=st.booleans(),
    row_temperature=st.booleans(),
)


def cispo(rows: RuleRows, objective: Objective) -> Tensor:
    ratio = (rows.logprobs - rows.old).exp().clamp(max=1 + objective.clip_high).detach()
    return -ratio * rows.advantages * rows.logprobs


def soft(rows: RuleRows, objective: Objective) -> Tensor:
    """Use a gate instead of the clip, a KL term, and less entropy where the sampler was surprised."""
    gate = torch.sigmoid(4 * (rows.logprobs - rows.old).expm1())
    kl = (rows.logprobs - rows.ref).square() / 2
    surprise = torch.zeros_like(gate) if rows.sampler is None else (rows.old - rows.sampler).abs()
    return -gate * rows.advantages + 0.1 * kl + surprise * rows.entropies


def by_sequence(rows: RuleRows, objective: Objective) -> Tensor:
    """Let each row's term depend on all rows of its sequence."""
    total = rows.logprobs.new_zeros(rows.sequences).index_add(0, rows.segments, rows.logprobs - rows.old)
    return -torch.tanh(total)[rows.segments] * rows.advantages


def indifferent(rows: RuleRows, objective: Objective) -> Tensor:
    return rows.advantages.square()


RULES = st.sampled_from([cispo, soft, by_sequence, indifferent])


def truth_of(rule, logits, targets, advantages, weights, keywords):
    """Apply the rule to the rows that count, from whole logits."""
    logprobs, entropies = token_logprob_ref(logits, targets, keywords["temperature"])
    live = weights != 0
    old = logprobs.detach() if keywords["old_logprobs_N"] is None else keywords["old_logprobs_N"]
    sampler, ref, bounds = (keywords[name] for name in ("sampler_logprobs_N", "ref_logprobs_N", "cu_seqlens"))
    segments = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    given = (logprobs, entropies, advantages, weights, old, sampler, ref, segments)
    if not live.any():
        return (0 * logprobs).sum()
    rows = RuleRows(*(x if x is None else x[live] for x in given), len(bounds) - 1)
    return (weights[live] * rule(rows, Objective(clip_high=0.1))).sum()


@given(CASES, RULES, st.integers(1, 18))
@settings(max_examples=150)
def test_a_fused_rule_is_autograd_through_whole_logits(case, rule, chunk_rows):
    heads, others, keywords = case
    bias = [keywords["bias_V"]] if keywords["bias_V"] is not None else []
    leaves = [tensor.requires_grad_() for tensor in (*heads, *bias)]
    objective = Objective(clip_high=0.1, rule=rule)
    got = linear_grpo_loss(*heads, *others, objective, **keywords, chunk_rows=chunk_rows)
    truth = truth_of(rule, torch.nn.functional.linear(*heads, *bias), *others, keywords)
    assert close(got.loss, truth.detach())
    for a, b in zip(gradients(lambda: got.loss, leaves), expected(truth, leaves), strict=True):
        assert close(a, b)


def expected(truth, leaves):
    if not truth.requires_grad:  # the rule used neither log-probs nor entropies
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(truth, leaves, materialize_grads=True))


@given(CASES, RULES)
@settings(max_examples=60)
def test_a_rule_from_logits_is_autograd_through_them(case, rule):
    (hidden, weight), others, keywords = case
    keywords.pop("bias_V")
    logits = (hidden @ weight.T).requires_grad_()
    got = grpo_loss(logits, *others, Objective(clip_high=0.1, rule=rule), **keywords)
    truth = truth_of(rule, logits, *others, keywords)
    assert close(got.loss, truth.detach())
    assert close(gradients(lambda: got.loss, [logits])[0], expected(truth, [logits])[0])


def plain_case():
    return loss_case(3, 12, 19, off_policy=True, bias=False, row_temperature=False)


def test_the_rule_sees_the_rows_that_count_those_of_advantage_zero_too():
    heads, (targets, advantages, weights), keywords = plain_case()
    assert ((weights != 0) & (advantages == 0)).any() and (weights == 0).any()
    seen: list[RuleRows] = []

    def look(rows: RuleRows, objective: Objective) -> Tensor:
        seen.append(rows)
        return rows.logprobs

    got = linear_grpo_loss(*heads, targets, advantages, weights, Objective(rule=look), **keywords)
    live = weights != 0
    for rows in seen:
        assert torch.equal(rows.advantages, advantages[live]) and torch.equal(rows.weights, weights[live])
        assert torch.equal(rows.old, keywords["old_logprobs_N"][live])
        assert torch.equal(rows.logprobs.detach(), got.logprobs_N[live])
        assert torch.equal(rows.entropies.detach(), got.entropy_N[live]) and rows.sequences == 5
    assert seen and got.metrics["rows"] == live.sum()


def test_on_policy_the_old_log_probs_are_the_current_ones_without_gradient():
    heads, others, keywords = plain_case()

    def ratio(rows: RuleRows, objective: Objective) -> Tensor:
        assert not rows.old.requires_grad and torch.equal(rows.old, rows.logprobs)
        return (rows.logprobs - rows.old).exp()

    got = linear_grpo_loss(*heads, *others, Objective(rule=ratio), **keywords | {"old_logprobs_N": None})
    assert close(got.loss, others[2].sum())


def test_no_rows_no_call():
    def never(rows: RuleRows, objective: Objective) -> Tensor:
        raise AssertionError("called without rows")

    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    zeros, targets = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    linear_grpo_loss(hidden, weight, targets, zeros, zeros, Objective(rule=never)).loss.backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda rows, objective: rows.logprobs.sum(), r"rule: got terms of \(\), expected a tensor of shape \(\d+,\)"),
        (lambda rows, objective: None, r"rule: got terms of None, expected a tensor of shape"),
    ],
)
def test_terms_that_are_not_one_of_each_row_are_refused(rule, message):
    heads, others, keywords = plain_case()
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(*heads, *others, Objective(rule=rule), **keywords)


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match=r"rule: got 'cispo', expected a function or None"):
        Objective(rule="cispo")


def test_no_logits_are_kept(monkeypatch):
    """Check that at most a chunk of rows exists at a time: less memory than all logits would take."""
    rows, width, vocabulary = 512, 16, 4096
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 1 << 20)
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets, ones = torch.randint(vocabulary, (rows,)), torch.ones(rows)

    def work() -> object:
        loss = linear_grpo_loss(hidden, weight, targets, ones, ones, Objective(rule=cispo))
        return torch.autograd.grad(loss.loss, [hidden, weight])

    work()
    assert peak_bytes(work) < rows * vocabulary * 4
