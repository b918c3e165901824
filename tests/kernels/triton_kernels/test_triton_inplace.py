"""Test the gradient that the row kernel writes over the logits: the plain path's tests, on the kernel's device."""

import pytest
from triton_cases import DEVICE, kernels_take_the_tensors, skip_unless_kernels_run

from cases import inplace
from cases.inplace import (
    test_another_operation_that_kept_the_logits_does_not_read_their_gradient,
    test_in_place_gives_the_same_bits,
    test_log_probs_in_place,
    test_misuse_is_refused,
    test_without_grad_nothing_is_overwritten,
)

skip_unless_kernels_run()
__all__ = [
    "kernels_take_the_tensors",
    "test_another_operation_that_kept_the_logits_does_not_read_their_gradient",
    "test_in_place_gives_the_same_bits",
    "test_log_probs_in_place",
    "test_misuse_is_refused",
    "test_without_grad_nothing_is_overwritten",
]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered")]


@pytest.fixture(scope="module", autouse=True)
def on_the_kernels_device():
    inplace.DEVICE = DEVICE
    yield
    inplace.DEVICE = "cpu"
