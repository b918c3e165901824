"""Run one case of `mgrpo bench kernels`: try every candidate, compare its answer with ours, then time all in turns.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.errors import TritonError

from mgrpo.bench.harness import Candidate, Result, Timing, extra_bytes, interleave, show
from mgrpo.bench.kernels.inputs import Inputs
from mgrpo.bench.kernels.peers import OURS, Answer, Unavailable

# If a peer's gradients differ by more (relative), it computes something else and is not timed.
DIFFERENT = 0.05
# A peer raises these if it is not installed, has an unexpected version, or cannot run here. Out-of-memory errors and
# those of Dynamo and Inductor are RuntimeErrors.
FAULTS = (ImportError, AttributeError, RuntimeError, TritonError)


@dataclass(frozen=True)
class Entry:
    """Hold one candidate at one fraction of live rows.  why: the reason if it was not timed."""

    name: str
    live: float
    run: Candidate
    extra: int | None = None
    difference: float | None = None
    timing: Timing | None = None
    why: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}, {self.live:.0%} live"


def trial(name: str, live: float, function: Callable[[Any], Answer], inputs: Inputs, truth: Answer | None) -> Entry:
    """Run a candidate twice: first for its answer (and to let it compile), then for its memory."""
    entry = Entry(name, live, lambda: function(inputs))
    device = inputs.targets_N.device
    try:
        difference = None if truth is None else distance(function(inputs), truth)
        if difference is not None and not difference <= DIFFERENT:
            return replace(entry, difference=difference, why=f"its gradients differ from ours by {difference:.1%}")
        return replace(entry, difference=difference, extra=extra_bytes(entry.run, device))
    except Unavailable as fault:
        why = str(fault)
    except FAULTS as fault:
        why = f"{type(fault).__name__}: {str(fault).strip() or 'no message'}".splitlines()[0][:160]
    release(device)  # only here, after the exception and the tensors that its traceback holds are gone
    return replace(entry, why=why)


def distance(answer: Answer, truth: Answer) -> float:
    """Return the largest relative distance over the tensors, in the 2-norm; NaN if any of them is NaN."""
    pairs = zip(answer, truth, strict=True)
    return float(torch.stack([(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs]).max())


def release(device: torch.device) -> None:
    """Free memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def try_all(
    functions: Mapping[str, Callable[[Any], Answer]], inputs: Inputs, live: float, skipped: Mapping[str, str]
) -> list[Entry]:
    """Try every candidate, and compare the others with ours.  skipped: candidates not to try, with the reason."""
    truth = functions[OURS](inputs)
    entries = []
    for name, function in functions.items():
        if name in skipped:
            entries.append(Entry(name, live, lambda: None, why=skipped[name]))
        else:
            entries.append(trial(name, live, function, inputs, None if name == OURS else truth))
    return entries


def time_all(
    entries: list[Entry], others: Mapping[str, Candidate], rounds: int, device: torch.device
) -> tuple[list[Entry], dict[str, Timing]]:
    """Time the entries and the others, all in turns after a warm-up round; return entries and the others' timings."""
    runnable = {entry.key: entry.run for entry in entries if not entry.why}
    timings = interleave({**others, **runnable}, rounds=rounds, device=device)
    return [replace(entry, timing=timings.get(entry.key)) for entry in entries], {n: timings[n] for n in others}


def ours_of(entries: list[Entry], live: float) -> Entry:
    """Return our own entry, which always has a timing."""
    return next(entry for entry in entries if entry.name == OURS and entry.live == live)


@dataclass(frozen=True)
class Work:
    """Hold the least work that the inputs need: its amount in `unit` times seconds, and the floor in seconds."""

    amount: float
    unit: str
    floor: float


def results_of(case: str, entries: list[Entry], work: Mapping[float, Work]) -> list[Result]:
    """Return time and memory of every entry; ours also against the floor, the others also against ours."""
    results = []
    for entry in entries:
        name = f"{case}, {entry.live:.0%} live, {entry.name}"
        if entry.timing is None:
            results.append(Result(f"{name}: time", None, "ms", why=entry.why))
            continue
        assert entry.extra is not None
        results.append(Result(f"{name}: time", entry.timing.seconds * 1e3, "ms"))
        results.append(Result(f"{name}: extra memory", entry.extra / 1e9, "GB"))
        if entry.difference is None:
            results += _results_of_ours(name, entry.timing.seconds, work[entry.live])
        else:
            ours = ours_of(entries, entry.live).timing
            assert ours is not None
            results.append(Result(f"{name}: time over ours", entry.timing.over(ours), "x"))
            results.append(Result(f"{name}: difference from ours", entry.difference, "relative"))
    return results + _results_of_the_fastest(case, entries)


def _results_of_the_fastest(case: str, entries: list[Entry]) -> list[Result]:
    """Return at each fraction of live rows our time over that of the fastest peer, whose name is given."""
    results = []
    for live in dict.fromkeys(entry.live for entry in entries):
        ours = ours_of(entries, live).timing
        peers = {e.name: e.timing for e in entries if e.live == live and e.timing is not None and e.name != OURS}
        if ours is not None and peers:
            name, timing = min(peers.items(), key=lambda peer: peer[1].seconds)
            results.append(
                Result(f"{case}, {live:.0%} live, ours: time over the fastest peer, {name}", ours.over(timing), "x")
            )
    return results


def _results_of_ours(name: str, seconds: float, work: Work) -> list[Result]:
    rate = Result(f"{name}: useful rate", work.amount / seconds, work.unit)
    return [rate, Result(f"{name}: share of the floor", 100 * work.floor / seconds, "%")]


def show_case(title: str, entries: list[Entry], work: Mapping[float, Work]) -> None:
    """Print the results as a table, one line per entry."""
    unit = next(iter(work.values())).unit
    columns = ("", "live", "ms", unit, "% of floor", "extra GB", "time / ours", "differs by", "")
    show(title, columns, [_cells(entry, entries, work[entry.live]) for entry in entries])


def _cells(entry: Entry, entries: list[Entry], work: Work) -> tuple[str, ...]:
    head = (entry.name, f"{entry.live:.0%}")
    if entry.timing is None:
        return (*head, "-", "-", "-", "-", "-", "-", entry.why or "")
    seconds, ours = entry.timing.seconds, ours_of(entries, entry.live).timing
    assert ours is not None and entry.extra is not None
    return (
        *head,
        f"{seconds * 1e3:.4g}",
        f"{work.amount / seconds:.4g}",
        f"{100 * work.floor / seconds:.1f}",
        f"{entry.extra / 1e9:.3f}",
        f"{entry.timing.over(ours):.2f}",
        "" if entry.difference is None else f"{entry.difference:.1e}",
        "",
    )
