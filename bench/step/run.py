"""`mgrpo bench step`: times one whole optimisation step of one agent, from sealed groups to new weights.

It measures the usual way, then a series of ways that each leave out one more piece of needless work, up to the engine's
own step, and TRL's step beside them. All run on the same groups, in turns, in one run. A full run also draws the times,
and writes its line of JSON beside those of the other benchmarks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mgrpo.bench.harness import Result, Timing, figure, interleave, json_line, keep, report, summed
from mgrpo.bench.step.case import RECORDED, SUB, WORDS, Case, geography, long, mix, recorded
from mgrpo.bench.step.figure import draw
from mgrpo.bench.step.measure import (
    MEANING,
    TRL,
    Measured,
    measure,
    release,
    require_useful,
    results_of,
    show_case,
    useful,
)
from mgrpo.bench.step.models import make_model
from mgrpo.bench.step.targets import FASTER, LONG, SMALLER, TRL_FASTER, Long, Plan, long_results, plan_for
from mgrpo.bench.step.usual import OURS, USUAL
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system.device import matmul_ceiling
from mgrpo.engine.system.process import keep_memory
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import MAIN

FOLDER = Path(__file__).parents[1] / "results"


def main(quick: bool, file: Path | None = None) -> None:
    """Measure what this machine can measure, and print it. file: where the JSON is written after every case."""
    keep_memory()  # as a run does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_for(device, quick)
    print(f"{WORDS}\n{MEANING}\nModel: {plan.model}'s architecture, random weights; {plan.compute}.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(plan, device, Path(folder), file)
        session.mix()
        session.geography()
        session.long(quick)
    if not quick:
        kind = "gpu" if device.type == "cuda" else "cpu"
        draw(session.measured, FOLDER / ("step.png" if kind == "cpu" else "gpu-step.png"))
        (FOLDER / f"{kind}-step.json").write_text(json_line("step", session.results, device) + "\n")
    report("step", session.results, device, targets_only=True)


@dataclass
class Session:
    """Hold one run and what it has measured so far."""

    plan: Plan
    device: torch.device
    folder: Path
    file: Path | None = None
    measured: list[Measured] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.model = make_model(self.folder / "model", self.plan.sizes)

    @property
    def compute(self) -> dict[str, object]:
        """Keys of the config's compute section."""
        return {"device": str(self.device), **self.plan.compute}

    def mix(self) -> None:
        """Measure both agents of the agent mix, each and the two together."""
        plan = self.plan
        found = [
            self._measure(mix(agent, self.model, self.folder, plan.factor, plan.queries, plan.rollouts, **self.compute))
            for agent in (MAIN, SUB)
        ]
        self.results += both(f"mix/{plan.factor}, both agents", found)
        self.results.append(beside_trl(found[0]))

    def geography(self) -> None:
        """Measure both agents of the geography example."""
        count, tiny = self.plan.geography, self.plan.overrides
        try:
            if (RECORDED / "config.json").is_file() and not tiny:  # the tiny model did not record it
                cases = recorded(RECORDED, count)
            else:
                cases = geography(self.folder, count, (f"compute.device={self.device}", *tiny))
            for case in cases:
                require_useful(case)
        except ValueError as missing:
            name = "geography, main: TRL's time over ours"
            self.results.append(figure(name, None, "x", at_least=TRL_FASTER, why=str(missing)))
            return
        found = [self._measure(case) for case in cases]
        self.results.append(beside_trl(found[0]))

    def _measure(self, case: Case) -> Measured:
        found = measure(case, self.folder, self.plan.rounds)
        show_case(found)
        self.measured.append(found)
        self.results += results_of(found)
        keep(self.file, "step", self.results, self.device)
        return found

    def long(self, quick: bool) -> None:
        """Measure the long rollouts, which need a GPU."""
        for one in LONG:
            why = None
            if self.device.type != "cuda":
                why = "no GPU"
            elif quick:
                why = "--quick leaves this out"
            elif time.monotonic() - self.started > self.plan.seconds:
                why = f"not begun: the time limit of {self.plan.seconds:g} s was reached"
            self.results += long_results(one, None, None, why) if why else self._measure_long(one)
            keep(self.file, "step", self.results, self.device)

    def _measure_long(self, one: Long) -> list[Result]:
        """Measure the engine's step alone."""
        folder = self.folder / one.name
        model = make_model(folder, one.sizes)
        case = long(
            model, folder, one.length, one.rollouts, device=str(self.device), max_tokens=one.length, **one.compute
        )
        try:
            timing, tokens, flop, ceiling = _engine_alone(case, self.plan.rounds, self.device)
        except torch.OutOfMemoryError as error:
            return long_results(one, None, None, str(error).splitlines()[0])
        finally:
            release(self.device)
        return long_results(one, tokens / timing.seconds, 100 * flop / timing.seconds / ceiling)


def _engine_alone(case: Case, rounds: int, device: torch.device) -> tuple[Timing, int, float, float]:
    """Return the timing, the useful tokens and flop of a step, and the flop/s of a large matmul."""
    policy = Policy(case.agent, case.config.agents[case.agent], case.config.compute)
    trainer = AgentTrainer(case.config, policy, case.trajectories)
    run: Callable[[], object] = lambda: trainer.train(0, case.groups)  # noqa: E731
    timing = interleave({"ours": run}, rounds=rounds, device=device)["ours"]
    return timing, *useful(case, policy.model), matmul_ceiling(device, policy.dtype)


def both(name: str, found: list[Measured]) -> list[Result]:
    """Return the results for one step of each of the agents, one after the other."""
    rows = [(agent.rows[OURS], agent.rows[USUAL]) for agent in found]
    ours, usual = zip(*rows, strict=True)
    if why := next((row.why for row in (*ours, *usual) if row.timing is None), None):
        faster = smaller = None
    else:
        faster = summed(r.timing for r in ours if r.timing).times_faster_than(
            summed(r.timing for r in usual if r.timing)
        )
        smaller = max(r.extra or 0 for r in ours) / max(r.extra or 0 for r in usual)
    return [
        figure(f"{name}: times as fast as the usual way", faster, "x", at_least=FASTER, why=why),
        figure(f"{name}: extra memory over the usual way's", smaller, "x", at_most=SMALLER, why=why),
    ]


def beside_trl(found: Measured) -> Result:
    """Return TRL's time over ours."""
    ours, trl = found.rows[OURS], found.rows[TRL]
    over = trl.timing.over(ours.timing) if trl.timing and ours.timing else None
    why = None if over is not None else trl.why or ours.why
    return figure(f"{found.case.name}: TRL's time over ours", over, "x", at_least=TRL_FASTER, why=why)
