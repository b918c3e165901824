"""One case of `mgrpo bench kernels`: try every candidate, compare its answer with ours, then time all in turns.

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

# A relative distance of the gradients beyond which a peer computes something else and is not timed.
DIFFERENT = 0.05
# What a peer raises that is not installed, is of another version than its caller expects, or cannot run here. Out of
# memory, Dynamo's and Inductor's errors are RuntimeErrors.
FAULTS = (ImportError, AttributeError, RuntimeError, TritonError)


@dataclass(frozen=True)
class Entry:
    """One candidate under one fraction of live rows.  why: why it was not timed."""

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
    """Runs a candidate twice: for its answer, and what it compiles; and for its memory."""
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
    release(device)  # here, where the fault and the tensors its traceback holds are gone
    return replace(entry, why=why)


def distance(answer: Answer, truth: Answer) -> float:
    """The largest relative distance of any of the tensors, in the 2-norm; NaN, which max() passes over, if any is."""
    pairs = zip(answer, truth, strict=True)
    return float(torch.stack([(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs]).max())


def release(device: torch.device) -> None:
    """Give back what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def try_all(
    functions: Mapping[str, Callable[[Any], Answer]], inputs: Inputs, live: float, skipped: Mapping[str, str]
) -> list[Entry]:
    """A trial of every candidate, ours first: the others are compared with it.  skipped: whom not to try, and why."""
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
    """The entries with their timings, and the timings of the others; all in turns, after one round that is not kept."""
    runnable = {entry.key: entry.run for entry in entries if not entry.why}
    timings = interleave({**others, **runnable}, rounds=rounds, device=device)
    return [replace(entry, timing=timings.get(entry.key)) for entry in entries], {n: timings[n] for n in others}


def ours_of(entries: list[Entry], live: float) -> Entry:
    """Our own entry, which has a timing."""
    return next(entry for entry in entries if entry.name == OURS and entry.live == live)


@dataclass(frozen=True)
class Work:
    """What the inputs ask for at least: how much of `unit` per second is useful, and the floor in seconds."""

    amount: float
    unit: str
    floor: float


def results_of(case: str, entries: list[Entry], work: Mapping[float, Work]) -> list[Result]:
    """Time and memory of every entry; ours also against the floor, the others against ours."""
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
    return results


def _results_of_ours(name: str, seconds: float, work: Work) -> list[Result]:
    rate = Result(f"{name}: useful rate", work.amount / seconds, work.unit)
    return [rate, Result(f"{name}: share of the floor", 100 * work.floor / seconds, "%")]


def show_case(title: str, entries: list[Entry], work: Mapping[float, Work]) -> None:
    """The same as a table, one line an entry."""
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
