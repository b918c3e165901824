"""Compare the row kernel, through the public functions, with the definition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, INTERPRETED, as_good, kernels_take_the_tensors, placed, skip_unless_kernels_run

from mgrpo.kernels import linear_logprob, token_logprob
from mgrpo.kernels.reference import token_logprob_ref
from numerics import double, gradients

skip_unless_kernels_run()
__all__ = ["kernels_take_the_tensors"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered")]
gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too large for the interpreter")
HALF_AND_SINGLE = [torch.float32, torch.bfloat16]


def random_rows(seed, count, vocabulary, dtype=torch.float32, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(count, vocabulary, generator=g)).to(DEVICE, dtype)
    return logits, torch.randint(vocabulary, (count,), generator=g).to(DEVICE)


def mixed(logprobs, entropy):
    """Return a scalar in which every row's log-prob and entropy has its own weight."""
    at = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype, device=logprobs.device)
    return (logprobs * at.cos()).sum() + (entropy * at.sin()).sum()


def assert_as_good_as_plain(kernel, plain, leaves):
    """Return values and gradients of two functions of the leaves; the truth is the second one in float64."""
    runs = []
    for function, args in ((kernel, leaves), (plain, leaves), (plain, double(leaves))):
        args = [arg.detach().requires_grad_() for arg in args]
        values = function(*args)
        runs.append([*(v.detach() for v in values), *gradients(lambda v=values: mixed(*v), args)])
    for got, same, truth in zip(*runs, strict=True):
        assert torch.isfinite(got).all()
        assert as_good(got, same, truth)


@given(
    st.integers(0, 2**20),
    st.integers(0, 4),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.sampled_from(HALF_AND_SINGLE),
)
@settings(max_examples=60, derandomize=True)
def test_token_logprob_is_as_good_as_plain(seed, count, vocabulary, row_temperature, spread, dtype):
    logits, targets = random_rows(seed, count, vocabulary, dtype, spread)
    temperature = torch.rand(count, device=DEVICE) + 0.3 if row_temperature else 0.7

    def kernel(x):
        return token_logprob(x, targets, temperature=temperature)

    assert_as_good_as_plain(kernel, lambda x: token_logprob_ref(x, targets, temperature), [logits])


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 65, 4095, 4096, 4097, 50_021, 49_152, 129_920, 151_936])
def test_any_vocabulary(vocabulary, dtype):
    logits, targets = random_rows(vocabulary, 2, vocabulary, dtype, 3.0)
    targets[1] = vocabulary - 1
    assert_as_good_as_plain(lambda x: token_logprob(x, targets), lambda x: token_logprob_ref(x, targets), [logits])


@pytest.mark.parametrize("vocabulary", [1, 65, 4097, 50_021])
def test_no_phantom_columns(vocabulary):
    """Use logits far below 0: padding columns of 0, or a running maximum that starts at 0, would dominate."""
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=DEVICE)
    got, entropy = token_logprob(torch.full((3, vocabulary), -500.0, device=DEVICE), targets)
    expected = torch.full_like(got, -math.log(vocabulary))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("height", [1e4, -1e4])
def test_extreme_logits(dtype, height):
    logits = torch.randn(7, 65, generator=torch.Generator().manual_seed(0))
    logits[0] = height
    logits[1, 7] = 1e4  # one dominates
    logits[2] = torch.linspace(-1e4, 1e4, 65)
    logits[3, 7:] = -torch.inf  # a masked vocabulary
    logits[4] += height
    logits[6, 1:] = torch.finfo(dtype).min  # masked another way
    logits = logits.to(DEVICE, dtype).requires_grad_()
    targets = torch.tensor([3, 8, 0, 2, 5, 6, 0], device=DEVICE)
    got = token_logprob(logits, targets)
    truth = double(token_logprob_ref(double(logits).clamp(min=-1e30), targets))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    (grad,) = gradients(lambda: mixed(*got), [logits])
    assert torch.isfinite(grad).all() and not grad[3, 7:].any() and grad[4].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_logit_is_not_hidden(bad):
    logits, targets = random_rows(0, 3, 70)
    logits[1, 40] = bad
    logprobs, entropy = token_logprob(logits, targets)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_a_row_does_not_depend_on_its_neighbours_or_its_place():
    logits, targets = random_rows(1, 6, 4099, spread=4.0)
    together = token_logprob(logits, targets)
    for row in range(6):
        alone = token_logprob(logits[row : row + 1].clone(), targets[row : row + 1])
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


def test_strided_and_offset_inputs():
    big, targets = random_rows(2, 40, 22)
    logits, targets = big[::2, 1::2], torch.stack([targets[:20] % 11] * 2, 1)[:, 1]
    assert not logits.is_contiguous() and not targets.is_contiguous()
    assert_as_good_as_plain(lambda x: token_logprob(x, targets), lambda x: token_logprob_ref(x, targets), [logits])
    leaf = logits.t().contiguous().t().detach().requires_grad_()
    got = token_logprob(leaf, targets)
    truth = double(logits).requires_grad_()
    (expected,) = gradients(lambda: mixed(*token_logprob_ref(truth, targets)), [truth])
    torch.testing.assert_close(gradients(lambda: mixed(*got), [leaf])[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_only_one_of_the_two_results_used():
    logits, targets = random_rows(3, 4, 9)
    for part in (0, 1):
        leaf, truth = logits.clone().requires_grad_(), double(logits).requires_grad_()
        (got,) = gradients(lambda x=leaf, p=part: token_logprob(x, targets)[p].square().sum(), [leaf])
        (want,) = gradients(lambda x=truth, p=part: token_logprob_ref(x, targets)[p].square().sum(), [truth])
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_offsets_past_two_to_the_31():
    """Use three rows 2^30 elements apart: a 32-bit product of row and stride would wrap at the third."""
    stride, vocabulary = 2**30, 70
    # Not filled: on a CPU only the pages that are touched exist.
    storage = torch.empty(2 * stride + vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits, (values, targets) = storage.as_strided((3, vocabulary), (stride, 1)), random_rows(4, 3, vocabulary)
    logits.copy_(values)
    for got, want in zip(token_logprob(logits, targets), token_logprob_ref(logits, targets), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_logprob_is_as_good_as_plain(dtype, with_bias):
    g = torch.Generator().manual_seed(5)
    shapes = ((18, 16), (517, 16), (517,))[: 2 + with_bias]
    leaves = placed([0.5 * torch.randn(*shape, generator=g) for shape in shapes], dtype)
    targets = torch.randint(517, (18,), generator=g).to(DEVICE)
    temperature = torch.rand(18, generator=g).to(DEVICE) + 0.5

    def kernel(hidden, weight, bias=None):
        return linear_logprob(hidden, weight, targets, bias_V=bias, temperature=temperature, chunk_rows=7)

    def plain(hidden, weight, bias=None):
        return token_logprob_ref(torch.nn.functional.linear(hidden, weight, bias), targets, temperature)

    assert_as_good_as_plain(kernel, plain, leaves)


def test_logits_stay_in_float32_between_matmul_and_softmax():
    """Check that log-probs from bf16 inputs are far more exact than bf16 logits allow.

    Such logits are the main source of mismatch between trainer and sampler.
    """
    g = torch.Generator().manual_seed(6)
    hidden, weight = placed([torch.randn(12, 64, generator=g), torch.randn(300, 64, generator=g)], torch.bfloat16)
    targets = torch.randint(300, (12,), generator=g).to(DEVICE)
    truth = token_logprob_ref(double(hidden) @ double(weight).T, targets)[0]
    rounded = token_logprob_ref(hidden @ weight.T, targets)[0]
    got = linear_logprob(hidden, weight, targets)[0]
    assert (got - truth).abs().max() < 1e-4 < 1e-2 < (rounded - truth).abs().max()


@gpu_only
def test_more_rows_than_a_grid_has_in_y():
    logits, targets = random_rows(7, 70_000, 33)
    for got, want in zip(token_logprob(logits, targets), token_logprob_ref(logits, targets), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@gpu_only
def test_more_logits_than_two_to_the_31():
    """Write the gradient over the logits: a third buffer of 4 GiB would add nothing."""
    leaf = torch.randn(2**31 // 151_936 + 3, 151_936, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    targets = torch.randint(151_936, (len(leaf),), device=DEVICE)
    logits = leaf * 1
    got = token_logprob(logits, targets, inplace=True)
    last = leaf.detach()[-9:].requires_grad_()
    truth = token_logprob_ref(last, targets[-9:])
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a[-9:], b, rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad(got[0].sum() + got[1].sum(), logits)
    (expected,) = torch.autograd.grad(truth[0].sum() + truth[1].sum(), last)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(grad[-9:], expected, rtol=2**-7, atol=1e-5)


@gpu_only
def test_lengths_and_temperatures_compile_nothing_new():
    from mgrpo.kernels.triton.rows import row_kernel

    targets = torch.zeros(33, dtype=torch.int64, device=DEVICE)

    def compiled():
        return sum(len(cache[0]) for cache in row_kernel.device_caches.values())

    counts = []
    for count, temperature in ((16, 1.0), (17, 0.7), (1, 1.3), (33, 1.0)):
        hidden, weight = torch.randn(count, 64, device=DEVICE), torch.randn(96, 64, device=DEVICE)
        linear_logprob(hidden, weight, targets[:count], temperature=temperature, chunk_rows=5)
        counts.append(compiled())
    assert counts[0] > 0 and len(set(counts)) == 1
