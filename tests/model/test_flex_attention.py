"""Capped scores and sinks by FlexAttention, run as plain torch in float64, are those of the CPU's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mgrpo.engine.model import attention, gpu_attention
from mgrpo.engine.model.attention import Local, Packed, Rule
from mgrpo.engine.model.gpu_attention import BLOCK, block_mask

HEADS, GROUPS, SIZE, OWN = 4, 2, 16, 24
LENGTHS = (300, 5, 1, 130, 128, 2)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let FlexAttention run on a CPU, where torch has no kernel for its backward: as what defines it.

    Some versions of torch leave a mode on when a score fails, which would break all later tests.
    """
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(gpu_attention, "_flex", flex.flex_attention)
    yield
    assert not _get_current_function_mode_stack() and not _get_current_dispatch_mode_stack()


def bounds_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def drawn(tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((HEADS, tokens, SIZE), (GROUPS, tokens, SIZE), (GROUPS, tokens, OWN), (HEADS,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(layout: Packed, rule: Rule, given: list[Tensor]) -> list[Tensor]:
    q, k, v, _ = given
    out = layout.attend(0, q, k, v, rule)
    slopes = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [q, k, v] if rule.sinks_A is None else given
    return [out, *torch.autograd.grad((out * slopes).sum(), wanted)]


@pytest.mark.parametrize("local", [Local(), Local(window=1), Local(window=150), Local(chunk=70)], ids=str)
@pytest.mark.parametrize(("softcap", "sunk"), [(2.0, False), (None, True), (2.0, True)])
def test_outputs_and_gradients_are_those_of_a_cpu(
    softcap: float | None, sunk: bool, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn(sum(LENGTHS))
    rule = Rule(0.7, local, softcap, given[3] if sunk else None)
    truth = with_gradients(Packed(bounds_of(LENGTHS), max(LENGTHS)), rule, given)
    monkeypatch.setattr(attention, "takes", lambda _: True)
    found = with_gradients(Packed(bounds_of(LENGTHS), max(LENGTHS)), rule, given)
    assert found[0].is_contiguous()
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("lengths", [(1,), (BLOCK,), (BLOCK, BLOCK), (3 * BLOCK + 5, 7), (40, 500, 3), LENGTHS])
@pytest.mark.parametrize("window", [None, 1, 2, 129, 1000])
def test_the_block_mask_is_the_one_that_torch_makes_of_the_whole_mask(lengths: Any, window: int | None) -> None:
    tokens, bounds = sum(lengths), bounds_of(lengths)
    numbers = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(bounds.tolist()))])

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = True if window is None else query - key < window
        return (numbers[query] == numbers[key]) & (key <= query) & near

    truth = create_block_mask(sees, None, None, tokens, tokens, device="cpu")
    found = block_mask(bounds, tokens, window)
    partial, full, true_full = _named(found, "kv"), _named(found, "full_kv"), _named(truth, "full_kv")
    assert torch.equal(partial | full, _named(truth, "kv") | true_full) and not (partial & full).any()
    assert not (full & ~true_full).any()  # a block taken as whole is whole
    places = torch.arange(tokens)
    assert found.mask_mod(0, 0, places[:, None], places).equal(sees(0, 0, places[:, None], places))


def _named(mask: Any, which: str) -> Tensor:
    """Return (N, N) bool: which blocks of keys a mask lists for each block of queries."""
    counts, listed = getattr(mask, f"{which}_num_blocks")[0, 0], getattr(mask, f"{which}_indices")[0, 0]
    dense = torch.zeros(listed.shape, dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts.tolist(), listed.tolist(), strict=True)):
        dense[row, columns[:count]] = True
    return dense


def test_plain_attention_is_left_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(attention, "takes", lambda _: True)
    monkeypatch.setattr(attention, "flash_attention", lambda *given, **_: called.append(given))
    q, k, v, _ = drawn(8)
    Packed(bounds_of((8,)), 8).attend(0, q, k, v, Rule(1.0))
    assert called
