"""Compare log-prob and entropy, from logits and from the head's input, with plain torch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.kernels import linear_head, linear_logprob, token_logprob
from mgrpo.kernels.reference import token_logprob_ref
from numerics import close, double, gradients, within_rule

SIZES = st.tuples(st.integers(0, 2**20), st.integers(0, 9), st.integers(1, 70))


def mixed(logprobs, entropy):
    """Return a scalar in which every row's log-prob and entropy has its own weight."""
    at = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype)
    return (logprobs * at.cos()).sum() + (entropy * at.sin()).sum()


@given(SIZES, st.booleans(), st.sampled_from([1.0, 1e2, 1e4]))
@settings(max_examples=60)
def test_token_logprob_equals_plain(sizes, row_temperature, spread):
    seed, count, vocabulary = sizes
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(count, vocabulary, generator=g).double()).requires_grad_()
    targets = torch.randint(vocabulary, (count,), generator=g)
    temperature = torch.rand(count, generator=g).double() + 0.3 if row_temperature else 0.7
    got, truth = (
        token_logprob(logits, targets, temperature=temperature),
        token_logprob_ref(logits, targets, temperature),
    )
    assert close(got[0], truth[0]) and close(got[1], truth[1])
    for a, b in zip(gradients(lambda: mixed(*got), [logits]), gradients(lambda: mixed(*truth), [logits]), strict=True):
        assert close(a, b)


@given(SIZES, st.booleans(), st.booleans(), st.integers(1, 10))
@settings(max_examples=60)
def test_linear_logprob_equals_plain(sizes, with_bias, row_temperature, chunk_rows):
    seed, count, vocabulary = sizes
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g).double().requires_grad_()
        for shape in ((count, 5), (vocabulary, 5), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (count,), generator=g)
    temperature = torch.rand(count, generator=g).double() + 0.3 if row_temperature else torch.tensor(1.3)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    got = linear_logprob(
        hidden, weight, targets, bias_V=bias if with_bias else None, temperature=temperature, chunk_rows=chunk_rows
    )
    logits = hidden @ weight.T + (bias if with_bias else 0)
    truth = token_logprob_ref(logits, targets, temperature if row_temperature else 1.3)
    assert close(got[0], truth[0], 1e-6 if not row_temperature else 1e-10)  # 1.3 is not exact in float32
    pairs = zip(gradients(lambda: mixed(*got), leaves), gradients(lambda: mixed(*truth), leaves), strict=True)
    assert all(close(a, b, 1e-6 if not row_temperature else 1e-10) for a, b in pairs)


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 1000, 32_003, 49_152, 129_920, 151_936])
def test_no_phantom_columns(vocabulary):
    """Use logits far below 0 and any vocabulary size: padding columns of 0 would dominate the softmax."""
    got, entropy = token_logprob(
        torch.full((3, vocabulary), -500.0), torch.tensor([0, vocabulary // 2, vocabulary - 1])
    )
    expected = torch.full((3,), -float(torch.tensor(vocabulary).double().log()))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("height", [1e4, -1e4])
def test_extreme_logits(dtype, height):
    logits = torch.randn(6, 65, generator=torch.Generator().manual_seed(0))
    logits[0] = height
    logits[1, 7] = 1e4  # one dominates
    logits[2] = torch.linspace(-1e4, 1e4, 65)
    logits[3, 7:] = -torch.inf  # a masked vocabulary
    logits[4] += height
    logits = logits.to(dtype).requires_grad_()
    targets = torch.tensor([3, 8, 0, 2, 5, 6])
    got = token_logprob(logits, targets)
    truth = double(token_logprob_ref(double(logits).clamp(min=-1e30), targets))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    (grad,) = gradients(lambda: mixed(*got), [logits])
    assert torch.isfinite(grad).all() and not grad[3, 7:].any() and grad[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_plain_in_the_same_dtype(dtype):
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((70, 32), (517, 32), (517,))]
    targets = torch.randint(517, (70,), generator=g)

    def fused(hidden, weight, bias):
        return linear_logprob(hidden, weight, targets, bias_V=bias, chunk_rows=16)

    def plain(hidden, weight, bias):
        return token_logprob_ref(torch.nn.functional.linear(hidden, weight, bias), targets)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    values = [f(*x) for f, x in ((fused, leaves), (plain, leaves), (plain, wide))]
    assert values[0][0].dtype == torch.float32
    for got, same, truth in zip(*values, strict=True):
        assert within_rule(got, same, truth)
    grads = [gradients(lambda v=v: mixed(*v), x) for v, x in zip(values, (leaves, leaves, wide), strict=True)]
    for got, same, truth in zip(*grads, strict=True):
        assert got.dtype == dtype and within_rule(got, same, truth)


def test_offset_and_strided_inputs():
    g = torch.Generator().manual_seed(2)
    big_logits, big_targets = torch.randn(40, 22, generator=g).double(), torch.randint(11, (21, 2), generator=g)
    logits, targets = big_logits[::2, 1::2], big_targets[1:, 1]
    assert not logits.is_contiguous() and not targets.is_contiguous() and targets.storage_offset()
    got = token_logprob(logits.requires_grad_(), targets)
    truth = token_logprob_ref(logits, targets)
    assert close(got[0], truth[0]) and close(got[1], truth[1])
    assert close(*(gradients(lambda v=v: mixed(*v), [logits])[0] for v in (got, truth)))
    hidden, weight = big_logits[:20].T, big_logits[:11, :20:1]
    got = linear_logprob(hidden[:20], weight, targets, chunk_rows=3)
    truth = token_logprob_ref(hidden[:20] @ weight.T, targets)
    assert close(got[0], truth[0])


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch):
    """Check that the bits are the same, also if blocks of rows end elsewhere."""
    logits = torch.randn(12, 4099, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(12)
    together = token_logprob(logits, targets)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 12)):
        apart = token_logprob(logits[rows], targets[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(apart, together, strict=True))
    monkeypatch.setitem(linear_head.BLOCK_BYTES, "cpu", 5 * 4099 * 4)
    for a, b in zip(token_logprob(logits, targets), together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_log_probs_by_the_matmuls_rounding_at_most(dtype, record_property):
    g = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 192, generator=g).to(dtype) for n in (65, 4099))
    hidden, targets = hidden / 8, torch.randint(4099, (65,), generator=g)
    whole = linear_logprob(hidden, weight, targets)[0]
    off = {c: float((linear_logprob(hidden, weight, targets, chunk_rows=c)[0] - whole).abs().max()) for c in (1, 7, 64)}
    record_property("measured", f"log-probs by chunk_rows against one chunk, {dtype}, largest difference: {off}")
    assert max(off.values()) <= (1e-5 if dtype == torch.float32 else 0.1)


def test_more_rows_than_a_grid_has_in_y():
    count, g = 70_000, torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(count, 2, generator=g).double(), torch.randn(5, 2, generator=g).double()
    targets = torch.randint(5, (count,), generator=g)
    for got in (linear_logprob(hidden, weight, targets), token_logprob(hidden @ weight.T, targets)):
        for a, b in zip(got, token_logprob_ref(hidden @ weight.T, targets), strict=True):
            assert close(a, b)


def test_only_one_of_the_two_results_used():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(4)
    for part in (0, 1):
        got = token_logprob(logits, targets)[part].square().sum()
        truth = token_logprob_ref(logits, targets)[part].square().sum()
        assert close(*(torch.autograd.grad(value, logits)[0] for value in (got, truth)))


def test_without_grad_nothing_is_tracked():
    hidden = torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        logprobs, entropy = linear_logprob(hidden, torch.randn(7, 4), torch.arange(5))
    assert not logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_N": torch.tensor([0, 7])}, r"targets_N: got 7 at row 1, expected in \[0, 7\)"),
        ({"targets_N": torch.tensor([-1, 0])}, "targets_N: got -1 at row 0"),
        ({"targets_N": torch.tensor([0, 1], dtype=torch.int32)}, "targets_N.*int32.*int64"),
        ({"targets_N": torch.tensor([0])}, "targets_N"),
        ({"weight_VH": torch.ones(7, 3)}, "weight_VH"),
        ({"weight_VH": torch.ones(0, 4)}, "weight_VH"),
        ({"weight_VH": torch.ones(7, 4).bfloat16()}, "weight_VH"),
        ({"hidden_NH": torch.ones(2, 2, 2)}, "hidden_NH"),
        ({"hidden_NH": torch.ones(2, 4).half(), "weight_VH": torch.ones(7, 4).half()}, "float16"),
        ({"bias_V": torch.ones(6)}, "bias_V"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature.*row 1"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_mistakes_are_refused(change, message):
    good = {"hidden_NH": torch.ones(2, 4), "weight_VH": torch.ones(7, 4), "targets_N": torch.tensor([0, 6])}
    linear_logprob(**good)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change))


def test_logits_are_checked():
    with pytest.raises(ValueError, match="logits_NV"):
        token_logprob(torch.ones(3), torch.tensor([0]))
    with pytest.raises(ValueError, match="logits_NV"):
        token_logprob(torch.ones(1, 3, dtype=torch.int64), torch.tensor([0]))
