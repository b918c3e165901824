"""Run one case of `mgrpo bench step`: every way once for its gradient and memory, then all in turns for their time."""

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
from mgrpo.engine.system.device import matmul_ceiling
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import Trajectory

TRL = "TRL"
SAME = "nothing to leave out here: same as the row above"
MEANING = """\
Useful tokens: the tokens of the trajectories that have a gradient, each counted once. MFU: the flop that these need
(layers, causal attention, the head for the agent's own tokens, forward and backward) over the time and the rate of a
large matmul. Extra memory: the peak during a step above what was held before it. Difference: that of the gradient,
before clipping, from the usual way's; the largest over all weights, relative, in the 2-norm."""

Gradient = Mapping[str, Tensor]
PIECE = 1 << 20
LEAST = Way(copies=False, merged=True, dropped=True)


@dataclass(frozen=True)
class Row:
    """Hold the figures of one way. timing None: not measured, for the reason `why`; otherwise `why` is a remark."""

    name: str
    timing: Timing | None = None
    extra: int | None = None
    difference: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Measured:
    """Hold a case and its rows by name. tokens, flop: the useful ones of a step; ceiling: flop/s of a large matmul."""

    case: Case
    rows: Mapping[str, Row]
    tokens: int
    flop: float
    ceiling: float


class Comparison:
    """Keep the first gradient that it is shown, and compute the difference of the last one from it."""

    def __init__(self, weights: Gradient):
        # Allocated here, before memory is measured.
        self.truth = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.shown, self.difference = 0, 0.0

    def __call__(self, gradient: Gradient) -> None:
        if not self.shown:
            for name, kept in self.truth.items():
                kept.copy_(gradient[name])
        self.shown += 1
        self.difference = distance(gradient, self.truth)


def distance(gradient: Gradient, truth: Gradient) -> float:
    """Return the largest relative distance over all weights, in the 2-norm."""
    assert gradient.keys() == truth.keys()
    return max(_distance(gradient[name], true) for name, true in truth.items())


def _distance(got: Tensor, true: Tensor) -> float:
    """Return a relative distance, computed in pieces: a whole embedding's difference would raise the peak memory."""
    pieces = zip(got.flatten().split(PIECE), true.flatten().split(PIECE), strict=True)
    squared = sum(float((a.double() - b.double()).square().sum()) for a, b in pieces)
    return math.sqrt(squared) / max(float(true.norm()), 1e-30)


class Watched(Policy):
    """Call `look`, if it is set, with the gradient of each step before clipping."""

    look: Callable[[Gradient], None] | None = None

    def optim_step(self, lr: float | None = None) -> float:
        """Show the gradient, then take the step."""
        if self.look is not None:
            weights = self.masters.weights.items()
            self.look({name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights})
        return super().optim_step(lr)


def require_useful(case: Case) -> None:
    """Raise ValueError if no trajectory has a gradient."""
    if not samples_of(LEAST, case):
        raise ValueError(f"{case.name}: expected rollouts of different rewards, got none: there is nothing to train on")


def useful(case: Case, model: PreTrainedModel) -> tuple[int, float]:
    """Return the tokens and flop that a step cannot avoid."""
    samples = samples_of(LEAST, case)
    trajectories = [s.trajectory for s in samples if isinstance(s.trajectory, Trajectory)]
    lengths = [t.rows for t in trajectories]
    return sum(lengths), flop(model, lengths, sum(int(t.sampled.sum()) for t in trajectories))


def distinct(case: Case) -> dict[str, bool]:
    """Return for each way whether it differs from the one before; two may train on the same trajectories."""
    found, before = {}, -1
    for name, way in WAYS.items():
        count = len(samples_of(way, case)) if way.old_pass else -1
        found[name] = count < 0 or count != before
        before = count
    return found


def measure(case: Case, folder: Path, rounds: int) -> Measured:
    """Measure all ways, and TRL."""
    policy = Watched(case.agent, case.config.agents[case.agent], case.config.compute)
    trainer = AgentTrainer(case.config, policy, case.trajectories)
    device, differs = policy.model.device, distinct(case)
    runs: dict[str, Candidate] = {
        name: partial(step, way, case, policy, trainer) for name, way in WAYS.items() if differs[name]
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
    """Take one step of each, which measures its gradient and its memory."""
    for name in {OURS, TRL} & runs.keys():
        runs[name]()  # so that the optimizers' moments exist
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
    """Yield TRL's trainer on the case, or the reason why there is none."""
    try:
        trl = Trl(case, folder / "trl")
    except Unavailable as error:
        yield str(error)
        return
    with closing(trl):
        yield trl


def trial(name: str, run: Candidate, look: Comparison, policy: Policy) -> Row:
    """Take one step; return its memory and its gradient's difference, or why it failed."""
    device = policy.model.device
    try:
        extra = extra_bytes(run, device)
        return Row(name, extra=extra, difference=look.difference)
    except torch.OutOfMemoryError as error:
        why = f"out of memory: {error}".splitlines()[0]
    policy.optimizer.zero_grad(set_to_none=True)  # those of the unfinished step
    release(device)  # only here, after the exception and the tensors that its traceback holds are gone
    return Row(name, why=why)


def release(device: torch.device) -> None:
    """Free memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _filled(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Put the rows in order; a way that equals the one before it gets the same figures."""
    found: dict[str, Row] = {}
    for name in (*WAYS, TRL):
        if name not in rows:
            rows = {**rows, name: replace(list(found.values())[-1], name=name, why=SAME)}
        found[name] = rows[name]
    return found


# ---- results


def results_of(found: Measured) -> list[Result]:
    """Return all figures of all rows."""
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
    """Print the rows as a table."""
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
