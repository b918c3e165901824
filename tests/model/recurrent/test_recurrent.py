"""Test recurrent layers of hybrids in packed rows: each sequence as if it were alone, gradients too; their kernels."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hybrids import CONFIGS, hybrid
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from mgrpo.engine.model import recurrent
from mgrpo.engine.model.attention import Mixer, Packed, hidden_states
from mgrpo.engine.model.causal_lm import lay_out
from mgrpo.engine.model.probe import check_exact

LENGTHS = (1, 40, 3, 0, 17, 70, 1, 29)  # longer than a chunk of each recurrence; one sequence is empty
LIMIT = 1e-4  # of values near 1; the recurrences of transformers compute in float32


def packed(lengths: tuple[int, ...]) -> Packed:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Packed(bounds, max(lengths))


def row(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 257, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return ids, torch.cat([torch.arange(n) for n in lengths])


def run(model: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return hidden states of the packed row, and the gradients of their sum under random slopes."""
    hidden_TH = hidden_states(model, *row(lengths), packed(lengths))
    return hidden_TH.detach(), slopes(model, hidden_TH)


def slopes(model: Any, hidden_TH: torch.Tensor) -> dict[str, torch.Tensor]:
    weight_TH = torch.randn(hidden_TH.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad()
    (hidden_TH * weight_TH).sum().backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def assert_same(found: Any, truth: Any) -> None:
    assert found[0].sub(truth[0]).abs().max() <= LIMIT
    assert found[1].keys() == truth[1].keys()
    for name, grad in truth[1].items():
        assert found[1][name].sub(grad).abs().max() <= LIMIT * max(1.0, float(grad.abs().max())), name


def laid_out(name: str) -> Any:
    model = hybrid(name)
    lay_out(model)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_in_a_row_are_what_each_is_alone(name: str) -> None:
    model, plain = laid_out(name), hybrid(name)
    parts = [ids[None] for ids in row(LENGTHS)[0].split(LENGTHS) if len(ids)]
    alone_TH = torch.cat([plain.model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in parts])
    assert_same(run(model), (alone_TH.detach(), slopes(plain, alone_TH)))


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_of_activations_compute_the_same(name: str) -> None:
    model = laid_out(name)
    truth = run(model)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(run(model), truth)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_follows_its_own_weights(name: str) -> None:
    model = laid_out(name)
    kept, before = copy.deepcopy(model), run(model)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    assert_same(run(kept), before)
    assert run(model)[0].sub(before[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_without_a_layout_is_the_models_own(name: str) -> None:
    model, plain = laid_out(name), hybrid(name)
    plain.set_attn_implementation("sdpa")
    ids = row((37,))[0][None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    prompt = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(model.generate(ids, **prompt), plain.generate(ids, **prompt))


def test_a_row_that_is_not_kept_apart_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("falcon_h1")
    model.set_attn_implementation("mgrpo")
    monkeypatch.setattr(Packed, "mix", lambda self, mixer, hidden_1TH: mixer.run(hidden_1TH))
    with pytest.raises(ValueError, match="carries state from one packed sequence into the next"):
        check_exact("model", model)


# ---- on a GPU, as far as a CPU can tell


def test_kernels_get_the_bounds_of_the_sequences() -> None:
    given: dict[str, torch.Tensor] = {}
    layout = packed((2, 0, 3))
    on_a_gpu: Any = SimpleNamespace(is_cuda=True)
    layout.mix(Mixer(0, lambda hidden, **kwargs: given.update(kwargs) or hidden, bounded=True), on_a_gpu)
    assert given["cu_seq_lens_q"].tolist() == [0, 2, 2, 5] and given["cu_seq_lens_q"].dtype == torch.int32
    assert given["seq_idx"].tolist() == [[0, 0, 2, 2, 2]] and given["seq_idx"].dtype == torch.int32


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bounds_reach_the_functions_of_transformers_that_have_kernels(name: str, monkeypatch) -> None:
    model = laid_out(name)
    kinds = recurrent.mixer_kinds(model)
    asked: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        space = inspect.unwrap(kind.forward).__globals__
        for function in recurrent.functions(kind):
            watch = watched(function, inspect.unwrap(space[function]), asked)
            monkeypatch.setitem(space, function, watch)
    layout = packed((9, 5))
    bounds = {"cu_seq_lens_q": layout.cu_seqlens, "seq_idx": layout._sequence_1T}
    monkeypatch.setattr(Packed, "mix", lambda self, mixer, hidden_1TH: mixer.run(hidden_1TH, **bounds))
    hidden_states(model, *row((9, 5)), layout)
    assert asked["causal_conv1d_fn"]["seq_idx"] is layout._sequence_1T
    if "torch_chunk_gated_delta_rule" in asked:
        assert asked["torch_chunk_gated_delta_rule"]["cu_seqlens"] is layout.cu_seqlens
    if "mamba2_chunk_scan" in asked:
        assert asked["mamba2_chunk_scan"]["seq_idx"] is layout._sequence_1T


def watched(name: str, plain: Any, asked: dict[str, dict[str, Any]]) -> Any:
    """Return a function that notes its keywords, as a kernel would take them, and computes as torch does."""
    names = inspect.signature(plain).parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        asked[name] = kwargs
        return plain(*args, **{key: value for key, value in kwargs.items() if key in names})

    call.__wrapped__ = plain  # type: ignore[attr-defined]
    return call


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recurrent.missing_packages(hybrid("qwen3_next")) == ["causal-conv1d", "flash-linear-attention"]
    assert recurrent.missing_packages(hybrid("falcon_h1")) == ["causal-conv1d", "mamba-ssm"]
    assert recurrent.missing_packages(hybrid("lfm2")) == ["causal-conv1d"]
    model = hybrid("qwen3_next")
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(ValueError, match="kernels of causal-conv1d and flash-linear-attention"):
        check_exact("model", model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert recurrent.missing_packages(model) == []


def test_a_recurrence_without_bounds_is_run_by_sequences_on_a_gpu_too() -> None:
    assert not recurrent.functions(JambaMambaMixer) <= recurrent.BOUNDED.keys()
    assert recurrent.functions(Qwen3NextGatedDeltaNet) <= recurrent.BOUNDED.keys()


def test_kernels_of_a_gpu_are_left_alone_on_a_cpu() -> None:
    def plain(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale

    def kernel(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("no tensor of a CPU may come here")

    kernel.__wrapped__ = plain  # type: ignore[attr-defined]
    call = recurrent._by_device(kernel)
    assert call(torch.ones(2), scale=3.0, seq_idx=None).tolist() == [3.0, 3.0]
    with pytest.raises(AssertionError, match="no tensor of a CPU"):
        call(torch.ones(2, device="meta"), scale=3.0)
