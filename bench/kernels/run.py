"""`mgrpo bench kernels`: compares the kernels with their floor and with their peers, in turns, in one run.

The ceilings are measured in the same process: the rate of a large copy, and that of the head's three bare matmuls.
Every figure is given as a share of what these allow. Targets for another kind of machine have no value.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mgrpo.bench.harness import Candidate, Result, Timing, interleave, keep, report, show, summed
from mgrpo.bench.kernels import targets
from mgrpo.bench.kernels.case import Entry, Work, ours_of, release, results_of, show_case, time_all, try_all
from mgrpo.bench.kernels.inputs import Linear, linear_inputs, logits_inputs
from mgrpo.bench.kernels.peers import LINEAR, LOGITS, TOKEN
from mgrpo.bench.kernels.targets import Plan, Shape, Target, TargetValue, plan_for, target_results
from mgrpo.kernels import group_advantages

# Rows of the bare matmuls: with more they would not be faster, and their logits might not fit.
GEMM_ROWS = 8192
GROUP = 8

FLOORS = """\
Floors. A copy reads and writes each byte once; its rate is measured here.
linear_grpo_loss, forward and backward: 6 L H V flop (three matmuls of the L live rows) at the rate of the bare matmuls
  in the same rounds (on a GPU X W^T and G^T X into float32, G W into bf16); or, if that takes longer, reading X and W
  and writing dX and dW once at the rate of the copy.
grpo_loss and token_logprob, forward and backward: reading bf16 logits once and writing their gradient once, 4 N V
  bytes, at the rate of the copy.
Extra memory: the peak during the call, results included, above what was held before."""


def main(quick: bool, file: Path | None = None) -> None:
    """Measure what this machine can measure, and print it. file: where the JSON is written after every case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(FLOORS)
    session = Session(plan_for(device, quick), device)
    started = time.monotonic()
    for shape in session.plan.shapes:
        if time.monotonic() - started < session.plan.seconds:
            session.linear(shape)
            release(device)
        else:
            why = f"not begun: the time limit of {session.plan.seconds:g} s was reached"
            session.results.append(Result(f"linear_grpo_loss bf16 {shape}", None, "ms", why=why))
        keep(file, "kernels", session.results, device)
    for rows, vocabulary in session.plan.logits:
        session.logits(rows, vocabulary)
        keep(file, "kernels", session.results, device)
        release(device)
    session.advantages()
    results = session.results + target_results(session.values, device, quick)
    keep(file, "kernels", results, device)
    report("kernels", results, device, targets_only=True)


@dataclass
class Session:
    """Hold one run: its results so far, and the values found for targets.  bandwidth: bytes per second of a copy."""

    plan: Plan
    device: torch.device
    results: list[Result] = field(default_factory=list)
    values: dict[Target, TargetValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bandwidth = copy_bandwidth(self.plan.copy_bytes, self.device)
        self.results.append(Result("copy", self.bandwidth / 1e9, "GB/s"))
        print(f"copy of {self.plan.copy_bytes} bytes: {self.bandwidth / 1e9:.4g} GB/s")

    def linear(self, shape: Shape) -> None:
        """Measure `linear_grpo_loss`, its peers and the bare matmuls in turns, at each fraction of live rows."""
        inputs = linear_inputs(shape.rows, shape.width, shape.vocabulary, self.device)
        bare = bare_gemms(inputs)
        tried = [e for live in shape.live for e in try_all(LINEAR, inputs.with_live(live), live, self.plan.skipped)]
        entries, gemms = time_all(tried, bare, self.plan.rounds, self.device)
        case, total, rows = f"linear_grpo_loss bf16 {shape}", summed(gemms.values()), min(shape.rows, GEMM_ROWS)
        flop = 2 * rows * shape.width * shape.vocabulary
        rates = {name: flop / timing.seconds / 1e12 for name, timing in gemms.items()}
        listed = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
        work = {live: linear_work(shape, live, total.seconds / rows, self.bandwidth) for live in shape.live}
        show_case(f"\n{case}: bare GEMMs of {rows} rows {total.seconds * 1e3:.4g} ms; TFLOP/s {listed}", entries, work)
        self.results += [Result(f"{case}, bare {name}: rate", rate, "TFLOP/s") for name, rate in rates.items()]
        self.results.append(Result(f"{case}, three bare GEMMs of {rows} rows: time", total.seconds * 1e3, "ms"))
        self.results += results_of(case, entries, work)
        self.values |= target_values(shape, entries, total)

    def logits(self, rows: int, vocabulary: int) -> None:
        """Measure `grpo_loss` and `token_logprob`, forward and backward, from existing logits, all rows live."""
        inputs = logits_inputs(rows, vocabulary, self.device)
        moved = 4 * rows * vocabulary
        work = {1.0: Work(moved / 1e9, "GB/s", moved / self.bandwidth)}
        for function, candidates in (("grpo_loss", LOGITS), ("token_logprob", TOKEN)):
            case = f"{function} bf16 N={rows} V={vocabulary}"
            tried = try_all(candidates, inputs, 1.0, self.plan.skipped)
            entries, _ = time_all(tried, {}, self.plan.rounds, self.device)
            show_case(f"\n{case}, forward and backward", entries, work)
            self.results += results_of(case, entries, work)
            if (function, rows, vocabulary) == ("grpo_loss", *targets.GPU_LOGITS):
                self.values[targets.BANDWIDTH] = 100 * work[1.0].floor / _timing(ours_of(entries, 1.0)).seconds

    def advantages(self) -> None:
        """Measure `group_advantages` on groups of equal size, which plain torch can do too."""
        count = self.plan.trajectories
        torch.manual_seed(0)
        rewards_R = torch.rand(count, device=self.device)
        offsets_G1 = torch.arange(0, count + 1, GROUP, device=self.device)
        torch.testing.assert_close(
            group_advantages(rewards_R, offsets_G1).values_R, torch_advantages(rewards_R), rtol=1e-3, atol=1e-3
        )
        runs: dict[str, Candidate] = {
            "ours": lambda: group_advantages(rewards_R, offsets_G1),
            "plain torch": lambda: torch_advantages(rewards_R),
        }
        timings = interleave(runs, rounds=10 * self.plan.rounds, device=self.device)
        microseconds = {name: timing.seconds * 1e6 for name, timing in timings.items()}
        case = f"group_advantages, {count} trajectories in groups of {GROUP}"
        show(f"\n{case}", ("", "us", ""), [(name, f"{value:.4g}", "") for name, value in microseconds.items()])
        self.results += [Result(f"{case}, {name}: time", value, "us") for name, value in microseconds.items()]
        self.values[targets.ADVANTAGES] = microseconds["ours"]


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Return the bytes read and written per second by the fastest of several large copies."""
    source, sink = (torch.ones(size // 4, device=device) for _ in range(2))
    timing = interleave({"copy": lambda: sink.copy_(source)}, rounds=10, device=device)["copy"]
    return 2 * size / min(timing.rounds)


def bare_gemms(inputs: Linear) -> dict[str, Candidate]:
    """Return the head's matmuls and nothing else, on at most GEMM_ROWS rows, into existing buffers."""
    x_NH, w_VH = inputs.hidden_NH.detach()[:GEMM_ROWS], inputs.weight_VH.detach()
    g_NV = torch.randn(len(x_NH), len(w_VH), device=x_NH.device, dtype=x_NH.dtype)
    wide = torch.float32 if x_NH.is_cuda else x_NH.dtype
    return {
        "X W^T": _matmul(x_NH, w_VH.t(), torch.empty_like(g_NV, dtype=wide)),
        "G W": _matmul(g_NV, w_VH, torch.empty_like(x_NH)),
        "G^T X": _matmul(g_NV.t(), x_NH, torch.empty_like(w_VH, dtype=wide)),
    }


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Candidate:
    if a.dtype == out.dtype:
        return lambda: torch.mm(a, b, out=out)
    return lambda: torch.mm(a, b, out_dtype=out.dtype, out=out)


def linear_work(shape: Shape, live: float, gemm_seconds_per_row: float, bandwidth: float) -> Work:
    """Return the least work of the live rows."""
    rows, size = shape.rows * live, shape.width * shape.vocabulary
    moved = 2 * 2 * (rows * shape.width + size)
    return Work(6 * rows * size / 1e12, "TFLOP/s", max(rows * gemm_seconds_per_row, moved / bandwidth))


def torch_advantages(rewards_R: Tensor) -> Tensor:
    """Compute the advantages of groups of GROUP rows each, whose rewards differ."""
    rewards_GK = rewards_R.view(-1, GROUP)
    deviation_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
    return (deviation_GK / rewards_GK.std(1, keepdim=True, correction=0)).flatten()


def target_values(shape: Shape, entries: list[Entry], bare: Timing) -> dict[Target, TargetValue]:
    """Return the values of the targets that are about this shape."""
    if shape == targets.GPU_SHAPE:
        full, quarter = ours_of(entries, 1.0), ours_of(entries, 0.25)
        assert full.extra is not None
        return {
            targets.GEMMS: _timing(full).over(bare),
            targets.MEMORY: full.extra / 1e9,
            targets.QUARTER: _timing(quarter).over(_timing(full)),
        }
    if shape == targets.CPU_SHAPE:
        ours, peers = ours_of(entries, 0.5), {entry.name: entry for entry in entries}
        return {
            targets.TORCH: _times_as_fast(ours, peers["plain torch"]),
            targets.TRL: _times_as_fast(ours, peers["TRL chunked log-prob"]),
            targets.TENTH: _extra_over(ours, peers["plain torch"]),
        }
    return {}


def _timing(entry: Entry) -> Timing:
    assert entry.timing is not None
    return entry.timing


def _times_as_fast(ours: Entry, peer: Entry) -> TargetValue:
    return f"{peer.name}: {peer.why}" if peer.timing is None else _timing(ours).times_faster_than(peer.timing)


def _extra_over(ours: Entry, peer: Entry) -> TargetValue:
    assert ours.extra is not None
    return ours.extra / peer.extra if peer.extra else f"{peer.name}: {peer.why}"
