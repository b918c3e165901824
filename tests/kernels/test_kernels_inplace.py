"""Test the gradient written over the logits: what it saves, and that nothing reads the logits afterwards."""

import torch

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
from mgrpo.kernels import token_logprob
from numerics import peak_bytes

__all__ = [
    "test_another_operation_that_kept_the_logits_does_not_read_their_gradient",
    "test_in_place_gives_the_same_bits",
    "test_in_place_saves_memory_of_the_logits_size",
    "test_log_probs_in_place",
    "test_misuse_is_refused",
    "test_without_grad_nothing_is_overwritten",
    "test_every_backward_gives_the_gradient_unless_it_is_over_the_logits",
    "test_logits_that_changed_are_not_read_by_a_second_backward",
    "test_small_gradients_of_float16_logits_do_not_vanish",
    "test_the_gradient_is_there_before_the_backward_which_scales_it",
    "test_without_a_gradient_there_is_no_buffer_and_nothing_is_overwritten",
]


def test_in_place_saves_memory_of_the_logits_size():
    leaf = torch.randn(1500, 2001, requires_grad=True)
    targets = torch.arange(1500)
    peaks = []
    for inplace in (False, True):
        logits = leaf * 1
        logprobs, _ = token_logprob(logits, targets, inplace=inplace)
        peaks.append(peak_bytes(lambda x=logprobs, y=logits: torch.autograd.grad(x.sum(), y)))
    assert abs(peaks[0] - peaks[1] - 4 * leaf.numel()) < 100_000
