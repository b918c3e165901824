"""drop, merge and pack: no gradient is lost, nothing is counted twice, every row says what it should."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo import _packing
from mgrpo.engine.batch import micro_batches as batch_module
from mgrpo.engine.batch.micro_batches import Batch, Weighed, drop, make_arena, merge, pack, prefetch, to_device
from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.types import Trajectory
from mgrpo.kernels import Objective
from toy import make_model, toy_config

# few values, so that trajectories repeat; all sums of the numbers are exact in float64, and the numbers in float32
tokens = st.integers(0, 1)
logprobs = st.sampled_from([-0.5, -2.0])
weights = st.sampled_from([0.25, 0.5, 1.0, 3.0])
advantages = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0])


def trajectory(rows: Iterable[tuple[int, bool, float]], version: int = 0) -> Trajectory:
    """From (token, sampled, logprob) of each token; the log-prob of what was not sampled is 0."""
    rows = list(rows)
    sampled = np.array([s for _, s, _ in rows], np.bool_)
    logprobs_L = np.where(sampled, [p for _, _, p in rows], 0).astype(np.float32)
    return Trajectory(np.array([t for t, _, _ in rows], np.int32), sampled, logprobs_L, version)


trajectories = st.lists(st.tuples(tokens, st.booleans(), logprobs), min_size=1, max_size=5).map(trajectory)


def weighed_of(weight: st.SearchStrategy[float]) -> st.SearchStrategy[list[Weighed]]:
    return st.lists(st.builds(Weighed, trajectories, advantages, weight), max_size=30)


def plain(*tokens: int, sampled: str | None = None, logprob: float = -1.0) -> Trajectory:
    """Of these tokens, sampled where the string has an x: all but the first unless it is given."""
    flags = sampled or "." + "x" * (len(tokens) - 1)
    return trajectory((t, flag == "x", logprob) for t, flag in zip(tokens, flags, strict=True))


# ---- drop


@given(weighed_of(st.sampled_from([0.0, 0.5, 1.0])), st.booleans())
def test_drop_leaves_out_exactly_what_has_no_gradient_and_keeps_the_order(weighed, keep):
    def counts(w: Weighed) -> bool:
        acts = any(flag for i, flag in enumerate(w.trajectory.sampled) if i > 0)  # the first token is never predicted
        return acts and w.weight != 0 and (keep or w.advantage != 0)

    kept = drop(weighed, keep_zero_advantage=keep)
    assert [id(w) for w in kept] == [id(w) for w in weighed if counts(w)]


# ---- merge


def identity(w: Weighed, by_sampler: bool) -> Any:
    t = w.trajectory
    same = tuple(t.tokens), tuple(t.sampled), (w.advantage > 0) - (w.advantage < 0)
    return (*same, tuple(t.logprobs)) if by_sampler else same


def sums(weighed: list[Weighed], by_sampler: bool) -> dict[Any, tuple[float, float]]:
    """Of each distinct trajectory: its weight, and its weight times advantage."""
    found: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for w in weighed:
        found[identity(w, by_sampler)][0] += w.weight
        found[identity(w, by_sampler)][1] += w.weight * w.advantage
    return {key: (weight, pytest.approx(product, rel=1e-12, abs=0)) for key, (weight, product) in found.items()}


@given(weighed_of(weights), st.booleans())
@settings(max_examples=200)
def test_merge_leaves_one_of_each_with_all_of_their_weight_and_gain(weighed, by_sampler):
    merged = merge(weighed, by_sampler_logprobs=by_sampler)
    keys = [identity(w, by_sampler) for w in merged]
    assert len(set(keys)) == len(keys) and sums(merged, by_sampler) == sums(weighed, by_sampler)
    assert list(dict.fromkeys(identity(w, by_sampler) for w in weighed)) == keys  # in the order they first came


@given(weighed_of(weights), st.booleans())
def test_merging_again_changes_nothing(weighed, by_sampler):
    merged = merge(weighed, by_sampler_logprobs=by_sampler)
    assert merge(merged, by_sampler_logprobs=by_sampler) == merged


def test_what_gains_and_what_loses_stay_apart():
    """Clipping treats the signs differently: +1 and -1 at weight 1 each are not 0 at weight 2."""
    t = plain(1, 2, 3)
    got = merge([Weighed(t, a, 1.0) for a in (1.0, -1.0, 0.0, 3.0, -3.0)], by_sampler_logprobs=False)
    assert [(w.advantage, w.weight) for w in got] == [(2.0, 2.0), (-2.0, 2.0), (0.0, 1.0)]


def test_the_samplers_logprobs_tell_apart_only_if_they_weigh():
    weighed = [Weighed(plain(1, 2, logprob=p), 1.0, 1.0) for p in (-1.0, -1.5, -1.0)]
    assert [w.weight for w in merge(weighed, by_sampler_logprobs=True)] == [2.0, 1.0]
    assert [w.weight for w in merge(weighed, by_sampler_logprobs=False)] == [3.0]


@pytest.mark.parametrize(
    "other", [plain(1, 2, 4), plain(1, 2), plain(1, 2, 3, sampled=".x."), plain(1, 2, 3, 3), plain(9, 2, 3)]
)
def test_what_differs_in_tokens_or_in_what_was_sampled_is_not_merged(other):
    weighed = [Weighed(plain(1, 2, 3), 1.0, 1.0), Weighed(other, 1.0, 1.0)]
    assert merge(weighed, by_sampler_logprobs=False) == weighed


def test_versions_do_not_tell_identical_trajectories_apart():
    rows = [(1, False, 0.0), (2, True, -1.0)]
    weighed = [Weighed(trajectory(rows, version), 1.0, 1.0) for version in (3, 4)]
    assert len(merge(weighed, by_sampler_logprobs=True)) == 1


# ---- pack


def sequences(batches: list[Batch]) -> list[dict[str, list[Any]]]:
    """The columns of each sequence of each micro-batch."""
    found = []
    for batch in batches:
        columns = {name: value for name, value in vars(batch).items() if name.endswith("_P") and value is not None}
        for start, stop in itertools.pairwise(batch.cu_seqlens_B1.tolist()):
            found.append({name: value[start:stop].tolist() for name, value in columns.items()})
    return found


def expected_sequence(w: Weighed) -> dict[str, list[Any]]:
    t = w.trajectory
    rows = int(np.flatnonzero(t.sampled)[-1])  # what follows the last action predicts nothing
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
    live = drop(weighed, keep_zero_advantage=True)
    batches = pack(live, max_tokens)
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
    batches = pack(merge(drop(weighed, keep_zero_advantage=keep), by_sampler_logprobs=by_sampler), max_tokens)
    live = [(w, w.weight * sum(map(int, w.trajectory.sampled[1:]))) for w in weighed if keep or w.advantage]
    weight = sum(float(b.weights_P.double().sum()) for b in batches)
    assert weight == pytest.approx(sum(weight for _, weight in live), rel=1e-6)
    gain = sum(float((b.weights_P.double() * b.advantages_P).sum()) for b in batches)
    assert gain == pytest.approx(sum(weight * w.advantage for w, weight in live), rel=1e-5, abs=1e-4)


def test_the_buffers_are_of_the_documented_types():
    (batch,) = pack([Weighed(plain(5, 6, 7), -1.5, 0.1)], 8)
    types = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    long, single = dict.fromkeys(("input_ids_P", "positions_P", "targets_P"), torch.int64), torch.float32
    rest = dict.fromkeys(("advantages_P", "weights_P", "sampler_logprobs_P"), single)
    assert types == {**long, **rest, "cu_seqlens_B1": torch.int32}
    assert batch.weights_P.tolist() == pytest.approx([0.1] * 2)


def test_a_trajectory_exactly_as_long_as_a_micro_batch_fits_and_one_longer_is_refused():
    """Its last token is predicted only, so a trajectory of max_tokens + 1 has max_tokens rows."""
    assert len(pack([Weighed(plain(*range(9)), 1.0, 1.0)], 8)[0]) == 8
    assert len(pack([Weighed(plain(*range(12), sampled="." + "x" * 8 + "..."), 1.0, 1.0)], 8)[0]) == 8
    with pytest.raises(ValueError, match=r"compute\.max_tokens: 8 given: expected at least 9, the longest trajectory"):
        pack([Weighed(plain(*range(3)), 1.0, 1.0), Weighed(plain(*range(10)), 1.0, 1.0)], 8)


def test_nothing_packs_to_no_micro_batch():
    assert pack([], 8) == [] and drop([], keep_zero_advantage=True) == [] and merge([], by_sampler_logprobs=True) == []


def test_read_only_columns_as_they_come_from_a_mapped_file_are_taken():
    t = plain(1, 2, 3)
    for column in (t.tokens, t.sampled, t.logprobs):
        column.flags.writeable = False
    assert sequences(pack([Weighed(t, 1.0, 1.0)], 8)) == [expected_sequence(Weighed(t, 1.0, 1.0))]


def test_to_device_moves_every_tensor_and_changes_nothing_else():
    (batch,) = pack([Weighed(plain(5, 6, 7), -1.5, 0.1)], 8)
    moved = to_device(batch, torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(value.is_meta for value in tensors)
    assert moved.max_seqlen == batch.max_seqlen and not batch.weights_P.is_meta


# ---- memory that is used again


@given(st.lists(weighed_of(weights), min_size=2, max_size=5), st.integers(4, 20), st.data())
def test_batches_of_an_earlier_step_stay_as_they_are_while_they_are_held(steps, max_tokens, data):
    arena, held = _packing.Arena(), []
    for weighed in steps:
        made = pack(drop(weighed, keep_zero_advantage=True), max_tokens, arena=arena)
        held.append((made, sequences(made)))
        if data.draw(st.booleans()):
            held.pop(data.draw(st.integers(0, len(held) - 1)))
        assert all(sequences(batches) == before for batches, before in held)


def test_memory_of_a_step_that_is_let_go_is_used_by_the_next():
    arena = make_arena(torch.device("cpu"))
    address = pack([Weighed(plain(*range(9)), 1.0, 1.0)], 8, arena=arena)[0].input_ids_P.data_ptr()
    again = pack([Weighed(plain(*range(5)), 1.0, 1.0)], 8, arena=arena)
    assert again[0].input_ids_P.data_ptr() == address and again[0].input_ids_P.tolist() == [0, 1, 2, 3]


# ---- many ranks


@given(weighed_of(weights), st.integers(2, 5), st.integers(4, 20))
def test_ranks_share_the_live_tokens_and_run_as_many_micro_batches(weighed, ranks, max_tokens):
    live = drop(weighed, keep_zero_advantage=True)
    shares = [pack(live, max_tokens, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert len(set(map(len, shares))) == 1
    real = [batch for share in shares for batch in share if batch.weights_P.any()]
    assert Counter(map(repr, sequences(real))) == Counter(map(repr, map(expected_sequence, live)))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """In float64: gradients add up in any order, nearly."""
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

    whole, metrics = run(pack(weighed, 16))
    parts = [run(pack(weighed, 16, ranks=4, rank=rank)) for rank in range(4)]
    torch.testing.assert_close(sum(gradient for gradient, _ in parts), whole, rtol=1e-9, atol=1e-12)
    assert [metrics["rows"] for _, metrics in parts] == [7, 5, 3, 0] and metrics["rows"] == 15
    assert whole.abs().max() > 0 and (parts[3][0] == 0).all()


# ---- ahead of use


def numbered(count: int) -> list[Batch]:
    return [pack([Weighed(plain(n, n, n), 1.0, 1.0)], 8)[0] for n in range(count)]


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
    """A GPU's streams as far as `prefetch` uses them: a copy happens no sooner than somebody waits for it.

    The source of a copy is held weakly, as a GPU holds it: not at all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.queue: list[Callable[[], None]] = []
        self.done, self.waited, self.recorded = 0, 0, 0
        for name in ("Stream", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext(self) if _ == (self,) else self)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: self.record())
        monkeypatch.setattr(batch_module, "to_device", self.copy)

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
        """By a kernel on the consumer's stream."""
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
    """The consumer stops after `taken` of 4, and may read what it got long after. The source lets go at once."""
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
            (batch,) = pack([Weighed(plain(*[n] * 100_000), 1.0, 1.0)], 100_000, arena=arena)
            assert batch.input_ids_P.is_pinned()
            yield batch

    for n, batch in enumerate(prefetch(source(), device)):
        torch.cuda._sleep(1_000_000)
        assert batch.input_ids_P.is_cuda and bool((batch.input_ids_P == n).all())
    assert n == 19
