"""Test the gradient that the row kernel writes over the logits: the plain path's tests, on the kernel's device."""

import pytest
import torch
from triton_cases import DEVICE, INTERPRETED, kernels_take_the_tensors, skip_unless_kernels_run

from cases import inplace
from cases.inplace import (
    test_another_operation_that_kept_the_logits_does_not_read_their_gradient,
    test_every_backward_gives_the_gradient_unless_it_is_over_the_logits,
    test_in_place_gives_the_same_bits,
    test_log_probs_in_place,
    test_logits_that_changed_are_not_read_by_a_second_backward,
    test_misuse_is_refused,
    test_small_gradients_of_float16_logits_do_not_vanish,
    test_the_gradient_is_there_before_the_backward_which_scales_it,
    test_without_a_gradient_there_is_no_buffer_and_nothing_is_overwritten,
    test_without_grad_nothing_is_overwritten,
)
from mgrpo.kernels.inplace import scale_in_place

skip_unless_kernels_run()
__all__ = [
    "kernels_take_the_tensors",
    "test_another_operation_that_kept_the_logits_does_not_read_their_gradient",
    "test_in_place_gives_the_same_bits",
    "test_log_probs_in_place",
    "test_misuse_is_refused",
    "test_without_grad_nothing_is_overwritten",
    "test_every_backward_gives_the_gradient_unless_it_is_over_the_logits",
    "test_logits_that_changed_are_not_read_by_a_second_backward",
    "test_small_gradients_of_float16_logits_do_not_vanish",
    "test_the_gradient_is_there_before_the_backward_which_scales_it",
    "test_without_a_gradient_there_is_no_buffer_and_nothing_is_overwritten",
]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered")]


@pytest.fixture(scope="module", autouse=True)
def on_the_kernels_device():
    inplace.DEVICE = DEVICE
    yield
    inplace.DEVICE = "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2047, 2049, 65_537, 140_000])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, float("nan")])
def test_a_gradient_that_keeps_its_dtype_is_scaled_in_one_launch(dtype, count, factor):
    gradient = torch.randn(count, device=DEVICE).to(dtype)
    before = gradient.clone()
    got = scale_in_place(gradient, torch.tensor(factor, device=DEVICE), dtype)
    assert got.dtype == dtype and got.data_ptr() == gradient.data_ptr()
    wanted = (before.float() * torch.tensor(factor)).to(dtype)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
