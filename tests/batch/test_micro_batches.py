"""Micro-batches as tensors: every live token is in exactly one row, and a copy to a GPU never outruns its source."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.weighed import Weighed, naive_drop, naive_merge, packed, plain, weighed_of, weights
from mgrpo import _packing
from mgrpo.engine.batch import micro_batches
from mgrpo.engine.batch.micro_batches import Batch, make_arena, prefetch, to_device
from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.kernels import Objective
from toy import make_model, toy_config

# ---- pack


def sequences(batches: list[Batch]) -> list[dict[str, list[Any]]]:
    """Return the columns of each sequence of each micro-batch."""
    found = []
    for batch in batches:
        columns = {name: value for name, value in vars(batch).items() if name.endswith("_P") and value is not None}
        for start, stop in itertools.pairwise(batch.cu_seqlens_B1.tolist()):
            found.append({name: value[start:stop].tolist() for name, value in columns.items()})
    return found


def expected_sequence(w: Weighed) -> dict[str, list[Any]]:
    t = w.trajectory
    rows = int(np.flatnonzero(t.sampled)[-1])  # the tokens after the last action predict nothing
    acts = t.sampled[1 : rows + 1]
    return {
        "input_ids_P": t.tokens[:rows].tolist(),
        "positions_P": list(range(rows)),
        "targets_P": t.tokens[1 : rows + 1].tolist(),
        "advantages_P": [w.advantage] * rows,
        "weights_P": np.where(acts, w.weight, 0.0).tolist(),
        "sampler_logprobs_P": np.where(acts, t.logprobs[1 : rows + 1], 0.0).tolist(),
    }


@given(weighed_of(weights), st.integers(4, 20))
@settings(max_examples=200)
def test_every_live_token_is_in_exactly_one_row_with_all_that_belongs_to_it(weighed, max_tokens):
    live = naive_drop(weighed, keep_zero_advantage=True)
    batches = packed(live, max_tokens)
    got, expected = sequences(batches), [expected_sequence(w) for w in live]
    assert Counter(map(repr, got)) == Counter(map(repr, expected))
    for batch in batches:
        lengths = batch.cu_seqlens_B1.diff()
        assert 0 < len(batch) <= max_tokens and lengths.min() > 0
        assert batch.cu_seqlens_B1[0] == 0 and batch.cu_seqlens_B1[-1] == len(batch)
        assert batch.max_seqlen == lengths.max()


@given(weighed_of(weights), st.booleans(), st.booleans(), st.integers(4, 20))
@settings(max_examples=100)
def test_from_end_to_end_no_weight_and_no_gain_is_lost(weighed, keep, by_sampler, max_tokens):
    live = naive_drop(weighed, keep_zero_advantage=keep)
    batches = packed(naive_merge(live, by_sampler_logprobs=by_sampler), max_tokens)
    whole = [(w, w.weight * sum(map(int, w.trajectory.sampled[1:]))) for w in weighed if keep or w.advantage]
    weight = sum(float(b.weights_P.double().sum()) for b in batches)
    assert weight == pytest.approx(sum(weight for _, weight in whole), rel=1e-6)
    gain = sum(float((b.weights_P.double() * b.advantages_P).sum()) for b in batches)
    assert gain == pytest.approx(sum(weight * w.advantage for w, weight in whole), rel=1e-5, abs=1e-4)


def test_the_buffers_are_of_the_documented_types():
    (batch,) = packed([Weighed(plain(5, 6, 7), -1.5, 0.1)], 8)
    types = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    long, single = dict.fromkeys(("input_ids_P", "positions_P", "targets_P"), torch.int64), torch.float32
    rest = dict.fromkeys(("advantages_P", "weights_P", "sampler_logprobs_P"), single)
    assert types == {**long, **rest, "cu_seqlens_B1": torch.int32}
    assert batch.weights_P.tolist() == pytest.approx([0.1] * 2)


def test_a_trajectory_exactly_as_long_as_a_micro_batch_fits_and_one_longer_is_refused():
    """The last token is only predicted, so a trajectory of max_tokens + 1 tokens has max_tokens rows."""
    assert len(packed([Weighed(plain(*range(9)), 1.0, 1.0)], 8)[0]) == 8
    assert len(packed([Weighed(plain(*range(12), sampled="." + "x" * 8 + "..."), 1.0, 1.0)], 8)[0]) == 8
    with pytest.raises(ValueError, match=r"compute\.max_tokens: 8 given: expected at least 9, the longest trajectory"):
        packed([Weighed(plain(*range(3)), 1.0, 1.0), Weighed(plain(*range(10)), 1.0, 1.0)], 8)


def test_nothing_packs_to_no_micro_batch():
    assert packed([], 8) == []


def test_read_only_columns_as_they_come_from_a_mapped_file_are_taken():
    t = plain(1, 2, 3)
    for column in (t.tokens, t.sampled, t.logprobs):
        column.flags.writeable = False
    assert sequences(packed([Weighed(t, 1.0, 1.0)], 8)) == [expected_sequence(Weighed(t, 1.0, 1.0))]


def test_to_device_moves_every_tensor_and_changes_nothing_else():
    (batch,) = packed([Weighed(plain(5, 6, 7), -1.5, 0.1)], 8)
    moved = to_device(batch, torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(value.is_meta for value in tensors)
    assert moved.max_seqlen == batch.max_seqlen and not batch.weights_P.is_meta


# ---- memory that is used again


@given(st.lists(weighed_of(weights), min_size=2, max_size=5), st.integers(4, 20), st.data())
def test_batches_of_an_earlier_step_stay_as_they_are_while_they_are_held(steps, max_tokens, data):
    arena, held = _packing.Arena(), []
    for weighed in steps:
        made = packed(naive_drop(weighed, keep_zero_advantage=True), max_tokens, arena=arena)
        held.append((made, sequences(made)))
        if data.draw(st.booleans()):
            held.pop(data.draw(st.integers(0, len(held) - 1)))
        assert all(sequences(batches) == before for batches, before in held)


def test_memory_of_a_step_that_is_let_go_is_used_by_the_next():
    arena = make_arena(torch.device("cpu"))
    address = packed([Weighed(plain(*range(9)), 1.0, 1.0)], 8, arena=arena)[0].input_ids_P.data_ptr()
    again = packed([Weighed(plain(*range(5)), 1.0, 1.0)], 8, arena=arena)
    assert again[0].input_ids_P.data_ptr() == address and again[0].input_ids_P.tolist() == [0, 1, 2, 3]


# ---- many ranks


@given(weighed_of(weights), st.integers(2, 5), st.integers(4, 20))
def test_ranks_share_the_live_tokens_and_run_as_many_micro_batches(weighed, ranks, max_tokens):
    live = naive_drop(weighed, keep_zero_advantage=True)
    shares = [packed(live, max_tokens, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert len(set(map(len, shares))) == 1
    real = [batch for share in shares for batch in share if batch.weights_P.any()]
    assert Counter(map(repr, sequences(real))) == Counter(map(repr, map(expected_sequence, live)))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Return a policy in float64, in which the order of sums hardly matters."""
    folder = make_model(tmp_path_factory.mktemp("model"), hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    made = Policy("main", AgentConfig(model=str(folder), max_context=64), toy_config(folder).compute)
    made.model.double()
    made.keep_reference()
    return made


OBJECTIVES = [
    Objective(),
    Objective(importance="sequence"),
    Objective(importance="trajectory", sampler_cap=None),
    Objective(kl_coef=0.1, entropy_coef=0.1),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ranks_together_have_the_gradient_of_one_and_dummies_none(policy, objective):
    """Three trajectories on four ranks: the last runs a dummy, forward and backward."""
    weighed = [Weighed(plain(*range(1, n)), (-1) ** n * 1.5, 0.5) for n in (5, 9, 7)]
    parameters = list(policy.masters.params.values())

    def run(batches: list[Batch]) -> tuple[torch.Tensor, dict[str, float]]:
        found = policy.forward_backward(batches, objective)
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        policy.optimizer.zero_grad()
        return gradient, found.metrics

    whole, metrics = run(packed(weighed, 16))
    parts = [run(packed(weighed, 16, ranks=4, rank=rank)) for rank in range(4)]
    torch.testing.assert_close(sum(gradient for gradient, _ in parts), whole, rtol=1e-9, atol=1e-12)
    assert [metrics["rows"] for _, metrics in parts] == [7, 5, 3, 0] and metrics["rows"] == 15
    assert whole.abs().max() > 0 and (parts[3][0] == 0).all()


# ---- ahead of use


def numbered(count: int) -> list[Batch]:
    return [packed([Weighed(plain(n, n, n), 1.0, 1.0)], 8)[0] for n in range(count)]


def test_prefetch_on_a_cpu_is_the_batches_in_order_and_reads_no_further_than_asked():
    read = []

    def source() -> Iterator[Batch]:
        for batch in numbered(4):
            read.append(batch)
            yield batch

    ahead = prefetch(source(), torch.device("cpu"))
    assert next(ahead).input_ids_P.tolist() == [0, 0] and len(read) == 1
    assert [batch.input_ids_P[0].item() for batch in ahead] == [1, 2, 3]
    assert list(prefetch([], torch.device("cpu"))) == []


class Streams:
    """Simulate a GPU's streams as far as `prefetch` uses them: a copy happens only when somebody waits for it.

    The source of a copy is only held weakly, because a GPU does not keep it alive.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.queue: list[Callable[[], None]] = []
        self.done, self.waited, self.recorded = 0, 0, 0
        for name in ("Stream", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext(self) if _ == (self,) else self)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: self.record())
        monkeypatch.setattr(micro_batches, "to_device", self.copy)

    def copy(self, batch: Batch, device: torch.device, *, non_blocking: bool) -> Batch:
        moved = replace(batch, input_ids_P=torch.full_like(batch.input_ids_P, -1))
        source = weakref.ref(batch)

        def arrive() -> None:
            given = source()
            assert given is not None, "the host's memory is gone before it was copied"
            moved.input_ids_P.copy_(given.input_ids_P)

        self.queue.append(arrive)
        return moved

    def record(self) -> None:
        self.recorded += 1

    def record_event(self) -> Event:
        return Event(self, len(self.queue))

    def wait_event(self, event: Event) -> None:
        self.waited = event.place

    def read(self, moved: Batch) -> list[int]:
        """Read a batch as a kernel on the consumer's stream does."""
        Event(self, self.waited).synchronize()
        return moved.input_ids_P.tolist()

    def synchronize(self) -> None:
        Event(self, len(self.queue)).synchronize()


@dataclass
class Event:
    streams: Streams
    place: int

    def synchronize(self) -> None:
        while self.streams.done < self.place:
            self.streams.queue[self.streams.done]()
            self.streams.done += 1


@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2, 4])
def test_prefetch_to_a_gpu_waits_for_each_copy_and_holds_its_source_until_then(taken, lags, monkeypatch):
    """The consumer stops after `taken` of 4 batches and may read them much later. The source frees them at once."""
    batches = numbered(4)
    streams, got = Streams(monkeypatch), []
    ahead = prefetch((batches.pop(0) for _ in range(4)), torch.device("cuda"))
    for n in range(taken):
        got.append(next(ahead))
        assert lags or streams.read(got[n]) == [n, n]
        assert streams.recorded == 7 * (n + 1)  # every tensor's memory
        assert len(streams.queue) == min(n + 2, 4)  # the next is under way, and no more
    ahead.close()
    assert streams.done == len(streams.queue)
    assert list(map(streams.read, got)) == [[n, n] for n in range(taken)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefetch_to_a_gpu_from_pinned_memory_that_is_used_again():
    device = torch.device("cuda")
    arena = make_arena(device)

    def source() -> Iterator[Batch]:
        for n in range(20):
            (batch,) = packed([Weighed(plain(*[n] * 100_000), 1.0, 1.0)], 100_000, arena=arena)
            assert batch.input_ids_P.is_pinned()
            yield batch

    for n, batch in enumerate(prefetch(source(), device)):
        torch.cuda._sleep(1_000_000)
        assert batch.input_ids_P.is_cuda and bool((batch.input_ids_P == n).all())
    assert n == 19
