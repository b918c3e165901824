"""One case of `mgrpo bench step`: every way once for its gradient and its memory, then all in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.bench.harness import Candidate, Result, Timing, extra_bytes, interleave, show
from mgrpo.bench.step.case import Case
from mgrpo.bench.step.models import flop
from mgrpo.bench.step.trl import Trl, Unavailable
from mgrpo.bench.step.usual import OURS, USUAL, WAYS, Way, samples_of, step
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system.process import matmul_ceiling
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import Trajectory

TRL = "TRL"
SAME = "nothing of that kind here: the row above"
MEANING = """\
Useful tokens: those of the trajectories that have a gradient, each once. MFU: the flop that these need (layers, causal
attention, the head for the agent's own tokens, forward and backward) over the time and the rate of a large matmul.
Extra memory: the peak during a step above what was held before it. Difference: of the gradient, before clipping, from
the usual way's: of all weights the largest relative one in the 2-norm."""

Gradient = Mapping[str, Tensor]
PIECE = 1 << 20
LEAST = Way(copies=False, merged=True, dropped=True)


@dataclass(frozen=True)
class Row:
    """One way to take the step. timing None: not measured, and why; else why: what to know about it."""

    name: str
    timing: Timing | None = None
    extra: int | None = None
    difference: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Measured:
    """A case with its rows by name. tokens, flop: useful ones of a step; ceiling: flop/s of a large matmul."""

    case: Case
    rows: Mapping[str, Row]
    tokens: int
    flop: float
    ceiling: float


class Comparison:
    """Keeps the first gradient that it is shown, and tells how far the last one was from it."""

    def __init__(self, weights: Gradient):
        self.truth = {name: torch.zeros_like(w) for name, w in weights.items()}  # here, not while memory is measured
        self.shown, self.difference = 0, 0.0

    def __call__(self, gradient: Gradient) -> None:
        if not self.shown:
            for name, kept in self.truth.items():
                kept.copy_(gradient[name])
        self.shown += 1
        self.difference = distance(gradient, self.truth)


def distance(gradient: Gradient, truth: Gradient) -> float:
    """Of all weights the largest relative distance in the 2-norm."""
    assert gradient.keys() == truth.keys()
    return max(_distance(gradient[name], true) for name, true in truth.items())


def _distance(got: Tensor, true: Tensor) -> float:
    """In pieces: a difference as large as an embedding would show in the peak memory."""
    pieces = zip(got.flatten().split(PIECE), true.flatten().split(PIECE), strict=True)
    squared = sum(float((a.double() - b.double()).square().sum()) for a, b in pieces)
    return math.sqrt(squared) / max(float(true.norm()), 1e-30)


class Watched(Policy):
    """Shows the gradient of a step, before it is clipped, to whoever looks."""

    look: Callable[[Gradient], None] | None = None

    def optim_step(self, lr: float | None = None) -> float:
        if self.look is not None:
            weights = self.masters.weights.items()
            self.look({name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights})
        return super().optim_step(lr)


def require_useful(case: Case) -> None:
    """Raises ValueError if no trajectory has a gradient."""
    if not samples_of(LEAST, case):
        raise ValueError(f"{case.name}: expected rollouts of different rewards, there is nothing to train on")


def useful(case: Case, model: PreTrainedModel) -> tuple[int, float]:
    """Tokens and flop that a step cannot do without."""
    samples = samples_of(LEAST, case)
    trajectories = [s.trajectory for s in samples if isinstance(s.trajectory, Trajectory)]
    lengths = [t.rows for t in trajectories]
    return sum(lengths), flop(model, lengths, sum(int(t.sampled.sum()) for t in trajectories))


def distinct(case: Case) -> dict[str, bool]:
    """Of each way whether it is another than the one before it. Which trajectories there are may be the same."""
    found, before = {}, -1
    for name, way in WAYS.items():
        count = len(samples_of(way, case)) if way.old_pass else -1
        found[name] = count < 0 or count != before
        before = count
    return found


def measure(case: Case, folder: Path, rounds: int) -> Measured:
    """All ways, and TRL."""
    policy = Watched(case.agent, case.config.agents[case.agent], case.config.compute)
    trainer = AgentTrainer(case.config, policy, case.trajectories)
    device, other = policy.model.device, distinct(case)
    runs: dict[str, Candidate] = {
        name: partial(step, way, case, policy, trainer) for name, way in WAYS.items() if other[name]
    }
    work, ceiling = useful(case, policy.model), matmul_ceiling(device, policy.dtype)
    with trl_beside(case, folder) as trl:
        if isinstance(trl, Trl):
            runs[TRL] = trl
        rows = try_all(runs, policy, trl)
        tried = {name: run for name, run in runs.items() if not rows[name].why}
        timings = interleave(tried, rounds=rounds, device=device, warmup=0)
    rows = {name: replace(row, timing=timings.get(name)) for name, row in rows.items()}
    del policy, trainer, runs, tried, trl
    release(device)
    return Measured(case, _filled(rows), *work, ceiling)


def try_all(runs: Mapping[str, Candidate], policy: Watched, trl: Trl | str) -> dict[str, Row]:
    """One step of each, in which its gradient and its memory are looked at."""
    for name in {OURS, TRL} & runs.keys():
        runs[name]()  # now the optimizers have their moments
    policy.look = look = Comparison(policy.masters.weights)
    if isinstance(trl, Trl):
        trl.look = look
    rows = {name: trial(name, run, look, policy) for name, run in runs.items()}
    policy.look = None
    if isinstance(trl, Trl):
        trl.look = None
        return rows
    return rows | {TRL: Row(TRL, why=trl)}


@contextmanager
def trl_beside(case: Case, folder: Path) -> Iterator[Trl | str]:
    """TRL's trainer on the case, or why there is none."""
    try:
        trl = Trl(case, folder / "trl")
    except Unavailable as error:
        yield str(error)
        return
    with closing(trl):
        yield trl


def trial(name: str, run: Candidate, look: Comparison, policy: Policy) -> Row:
    device = policy.model.device
    try:
        extra = extra_bytes(run, device)
        return Row(name, extra=extra, difference=look.difference)
    except torch.OutOfMemoryError as error:
        why = f"out of memory: {error}".splitlines()[0]
    policy.optimizer.zero_grad(set_to_none=True)  # of half a step
    release(device)  # here, where the fault and the tensors its traceback holds are gone
    return Row(name, why=why)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _filled(rows: Mapping[str, Row]) -> dict[str, Row]:
    """In order, and a way that is the same as the one before it has its figures."""
    found: dict[str, Row] = {}
    for name in (*WAYS, TRL):
        if name not in rows:
            rows = {**rows, name: replace(list(found.values())[-1], name=name, why=SAME)}
        found[name] = rows[name]
    return found


# ---- what to say of it


def results_of(found: Measured) -> list[Result]:
    """All figures of all rows."""
    results, usual = [], found.rows[USUAL]
    for row in found.rows.values():
        name = f"{found.case.name}, {row.name}"
        if row.timing is None or row.extra is None:
            results.append(Result(f"{name}: time", None, "s", why=row.why))
            continue
        seconds = row.timing.seconds
        results += [
            Result(f"{name}: time", seconds, "s", why=row.why),
            Result(f"{name}: useful tokens/s", found.tokens / seconds, "tokens/s"),
            Result(f"{name}: MFU", 100 * found.flop / seconds / found.ceiling, "%"),
            Result(f"{name}: extra memory", row.extra / 1e9, "GB"),
        ]
        if usual.timing is not None:
            results.append(Result(f"{name}: times as fast as the usual way", usual.timing.over(row.timing), "x"))
        if row.difference is not None:
            results.append(Result(f"{name}: gradient's difference", row.difference, "relative"))
    return results


def show_case(found: Measured) -> None:
    """The same as a table, one line a row."""
    rate = found.ceiling / 1e12
    title = (
        f"\n{found.case.name}: {found.tokens} useful tokens, {found.flop / 1e12:.4g} Tflop; a matmul {rate:.4g} Tflop/s"
    )
    columns = ("", "s", "tokens/s", "MFU %", "extra GB", "x the usual", "differs by", "")
    show(title, columns, [_cells(row, found) for row in found.rows.values()])


def _cells(row: Row, found: Measured) -> tuple[str, ...]:
    if row.timing is None or row.extra is None:
        return (row.name, *["-"] * 6, row.why or "")
    seconds, usual = row.timing.seconds, found.rows[USUAL].timing
    return (
        row.name,
        f"{seconds:.4g}",
        f"{found.tokens / seconds:.4g}",
        f"{100 * found.flop / seconds / found.ceiling:.1f}",
        f"{row.extra / 1e9:.3f}",
        "-" if usual is None else f"{usual.over(row.timing):.2f}",
        "" if row.difference is None else f"{row.difference:.1e}",
        row.why or "",
    )
