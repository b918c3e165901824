"""Compare the loss of given log-probs with the definition in float64, and with the loss from logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.kernels import Objective, grpo_loss, logprob_loss
from mgrpo.kernels.reference import row_losses_ref, token_logprob_ref
from numerics import OBJECTIVES, close, gradients, loss_case

CASES = st.builds(
    loss_case,
    st.integers(0, 2**20),
    st.integers(0, 17),
    st.integers(2, 40),
    off_policy=st.booleans(),
    bias=st.just(False),
    row_temperature=st.booleans(),
)


def inputs(case):
    """Return log-probs and entropies as leaves, and the loss's other inputs."""
    (hidden, weight), (targets, advantages, weights), keywords = case
    rows = token_logprob_ref(hidden @ weight.T, targets, keywords["temperature"])
    given_ = {name: value for name, value in keywords.items() if name not in ("bias_V", "temperature")}
    return [row.detach().requires_grad_() for row in rows], (advantages, weights), given_


@given(CASES, OBJECTIVES)
@settings(max_examples=150)
def test_it_is_the_definition(case, objective):
    (logprobs, entropies), (advantages, weights), keywords = inputs(case)
    got = logprob_loss(logprobs, advantages, weights, objective, entropies_N=entropies, **keywords)
    names = ("old_logprobs_N", "sampler_logprobs_N", "ref_logprobs_N", "cu_seqlens")
    losses = row_losses_ref(logprobs, entropies, advantages, weights, objective, *(keywords[name] for name in names))
    truth = (weights * losses).sum()
    assert close(got.loss, truth)
    leaves = [logprobs, entropies]
    for a, b in zip(gradients(lambda: got.loss, leaves), gradients(lambda: truth, leaves), strict=True):
        assert close(a, b)


@given(CASES, OBJECTIVES)
@settings(max_examples=50)
def test_it_reports_what_the_loss_from_logits_reports(case, objective):
    (hidden, weight), others, keywords = case
    keywords.pop("bias_V")
    expected = grpo_loss(hidden @ weight.T, *others, objective, **keywords)
    (logprobs, entropies), (advantages, weights), rest = inputs(case)
    got = logprob_loss(logprobs, advantages, weights, objective, entropies_N=entropies, **rest)
    assert got.metrics.keys() == expected.metrics.keys()
    for name, value in got.metrics.items():
        assert close(value, expected.metrics[name]), name
    assert close(got.logprobs_N, expected.logprobs_N) and close(got.entropy_N, expected.entropy_N)
    assert not got.logprobs_N.requires_grad


def test_a_rule_takes_its_place():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    rule = Objective(rule=lambda rows, _: -rows.advantages * rows.logprobs**2)
    logprob_loss(logprobs, torch.tensor([1.0, float("nan"), 3.0]).double(), weights, rule).loss.backward()
    assert logprobs.grad.tolist() == [1.0, 0.0, 36.0]


def test_a_rule_that_changes_its_rows_in_place_changes_nothing_else():
    """In particular the weights, by which its terms are multiplied, and the batch, which is used again."""
    given = [torch.full((3,), value, dtype=torch.float64) for value in (-1.0, 2.0, 0.5, -1.5)]

    def rule(rows, _):
        terms = -rows.advantages * rows.logprobs
        for values in (rows.advantages, rows.weights, rows.old):
            values.zero_()
        return terms

    logprobs, advantages, weights, old = (values.clone() for values in given)
    logprobs.requires_grad_()
    logprob_loss(logprobs, advantages, weights, Objective(rule=rule), old_logprobs_N=old).loss.backward()
    assert logprobs.grad.tolist() == [-1.0] * 3
    for values, before in zip((advantages, weights, old), given[1:], strict=True):
        assert torch.equal(values, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs_N": torch.zeros(3, dtype=torch.bfloat16)}, "logprobs_N: got torch.bfloat16"),
        ({"logprobs_N": torch.tensor([0.0, 0.0, float("nan")])}, "logprobs_N: got nan at row 2"),
        ({"logprobs_N": torch.zeros(3, 1)}, r"logprobs_N: got \(3, 1\)"),
        ({"advantages_N": torch.zeros(2)}, r"advantages_N: got \(2,\)"),
        ({"entropies_N": torch.zeros(2)}, r"entropies_N: got \(2,\)"),
        ({"objective": Objective(entropy_coef=0.1)}, "entropies_N: got None"),
        ({"objective": Objective(importance="sequence")}, "cu_seqlens: got None"),
    ],
)
def test_mistakes_are_named(changes, message):
    sound = {"logprobs_N": torch.zeros(3), "advantages_N": torch.ones(3), "loss_weights_N": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        logprob_loss(**sound | {"objective": Objective()} | changes)
