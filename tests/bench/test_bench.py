"""Test what the benchmarks share, their candidates, and the line of JSON that each ends in; never a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.bench import harness
from mgrpo.bench.harness import Result, Timing, extra_bytes, figure, interleave, report, summed
from mgrpo.bench.kernels import case as kernel_case
from mgrpo.bench.kernels import run as kernels
from mgrpo.bench.kernels import targets as kernel_targets
from mgrpo.bench.kernels.inputs import OBJECTIVE, linear_inputs, logits_inputs
from mgrpo.bench.kernels.peers import LINEAR, LOGITS, OURS, TOKEN, Unavailable
from mgrpo.bench.kernels.targets import TARGETS, Shape, target_results
from mgrpo.kernels import linear_logprob

CPU = torch.device("cpu")
MIB = 1 << 20
SLACK = 3 * MIB  # the kernel counts pages per thread, in batches


# ---- timing


class Clock:
    """Keep a clock that only candidates advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, ""
        monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def candidate(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def run() -> None:
            self.calls += name
            self.now += left.pop(0)

        return run


def test_candidates_take_turns_and_each_round_another_begins(monkeypatch):
    clock = Clock(monkeypatch)
    runs = {name: clock.candidate(name, *[number + 1.0] * 5) for number, name in enumerate("abc")}
    timings = interleave(runs, rounds=4)
    assert clock.calls == "abc" + "abc" + "bca" + "cab" + "abc"  # the first is the warm-up
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": (1,) * 4, "b": (2,) * 4, "c": (3,) * 4}


def test_a_ratio_is_the_median_of_the_rounds_ratios(monkeypatch):
    clock = Clock(monkeypatch)
    runs = {"a": clock.candidate("a", 1, 10, 2), "b": clock.candidate("b", 2, 40, 2)}
    timings = interleave(runs, rounds=3, warmup=0)
    assert timings["b"].over(timings["a"]) == 2  # the median of 2, 4, 1; the ratio of the medians would be 1
    assert timings["a"].times_faster_than(timings["b"]) == 2
    assert timings["a"].over(timings["b"]) == 0.5
    assert timings["a"].seconds == 2
    assert summed(timings.values()) == Timing((3, 50, 4))


def test_only_what_is_measured_in_the_same_rounds_is_compared():
    with pytest.raises(ValueError):
        Timing((1.0, 2.0)).over(Timing((1.0,)))


# ---- memory


def test_extra_memory_is_the_peak_above_what_was_held():
    held = torch.ones(64 * MIB // 4)

    def run() -> torch.Tensor:
        passing = torch.ones(48 * MIB // 4)
        del passing
        return torch.ones(40 * MIB // 4)

    assert 48 * MIB - SLACK <= extra_bytes(run, CPU) <= 48 * MIB + SLACK
    assert held.numel()


def test_extra_memory_counts_what_malloc_kept_from_before():
    """Check that small blocks, which stay resident when freed, still count for a candidate that gets them again."""
    for _ in range(2):
        blocks = [torch.ones(MIB // 4) for _ in range(100)]
        del blocks
        got = extra_bytes(lambda: [torch.ones(MIB // 4) for _ in range(50)], CPU)
        assert 50 * MIB - SLACK <= got <= 50 * MIB + SLACK
    assert extra_bytes(lambda: None, CPU) <= SLACK


# ---- results


@given(value=st.floats(allow_nan=False), bound=st.floats(allow_nan=False, allow_infinity=False))
def test_a_figure_is_held_to_its_target(value, bound):
    assert figure("x", value, "s", at_least=bound).met is (value >= bound)
    assert figure("x", value, "s", at_most=bound).met is (value <= bound)
    assert figure("x", value, "s", at_least=bound).target == f">= {bound:g}"
    assert figure("x", value, "s", at_most=bound).target == f"<= {bound:g}"
    assert (figure("x", value, "s").target, figure("x", value, "s").met) == (None, None)


def test_a_figure_without_a_value_says_why_and_meets_nothing():
    assert figure("x", None, "s", at_most=1, why="no GPU") == Result("x", None, "s", "<= 1", None, "no GPU")
    with pytest.raises(AssertionError, match="x: no value and no reason"):
        figure("x", None, "s", at_most=1)
    with pytest.raises(AssertionError, match="x: two targets"):
        figure("x", 1, "s", at_most=1, at_least=0)


@pytest.mark.parametrize("targets_only", [False, True])
def test_a_report_ends_in_one_line_of_json(capsys, targets_only):
    results = [figure("plain", 1.5, "ms"), figure("held", 3, "x", at_least=2), figure("gone", None, "s", why="no GPU")]
    report("some", results, targets_only=targets_only)
    *table, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert list(said) == ["bench", "commit", "machine", "results"]
    assert said["bench"] == "some"
    assert str(torch.__version__) in said["machine"]
    none = {"target": None, "met": None, "why": None}
    assert said["results"] == [
        none | {"name": "plain", "value": 1.5, "unit": "ms"},
        {"name": "held", "value": 3, "unit": "x", "target": ">= 2", "met": True, "why": None},
        none | {"name": "gone", "value": None, "unit": "s", "why": "no GPU"},
    ]
    shown = "\n".join(table)
    assert "held" in shown and "met" in shown
    assert ("plain" in shown) is not targets_only


def test_the_commit_of_no_checkout_is_told_or_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    monkeypatch.delenv("COMMIT", raising=False)
    assert harness.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc1234")
    assert harness.commit() == "abc1234"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_target_is_there_whether_it_could_be_measured_or_not(device):
    here = [target for target in TARGETS if target.on_gpu == (device == "cuda")]
    found = {here[0]: 1.0, here[1]: "peer: not installed"}
    results = {result.name: result for result in target_results(found, torch.device(device), quick=False)}
    assert list(results) == [target.name for target in TARGETS]
    assert {name for name, result in results.items() if result.value is not None} == {here[0].name}
    assert results[here[1].name].why == "peer: not installed"
    assert all(result.target for result in results.values())
    assert all((result.value is None) == bool(result.why) == (result.met is None) for result in results.values())


# ---- the kernels' candidates


@pytest.fixture(scope="module")
def linear():
    return linear_inputs(512, 32, 499, CPU).with_live(0.25)


@pytest.mark.parametrize("live", [0.25, 0.5, 1.0])
def test_the_live_rows_are_the_share_asked_for_and_some_are_clipped(live):
    inputs = linear_inputs(1024, 16, 97, CPU).with_live(live)
    assert int(inputs.live_N.sum()) == 1024 * live
    assert float(inputs.weights_N.sum()) == pytest.approx(1)
    log_ratio_N = linear_logprob(*inputs.source, inputs.targets_N)[0] - inputs.old_logprobs_N
    assert 0 < int((log_ratio_N > OBJECTIVE.log_high).sum()) < 1024
    assert 0 < int((log_ratio_N < OBJECTIVE.log_low).sum()) < 1024


@pytest.mark.parametrize("name", [name for name in LINEAR if name not in (OURS, "torch.compile")])
def test_a_linear_peer_that_runs_here_computes_what_we_do(name, linear):
    entry = kernel_case.trial(name, 0.25, LINEAR[name], linear, LINEAR[OURS](linear))
    if entry.why:
        assert entry.difference is None, entry.why
        pytest.skip(entry.why)
    assert entry.difference < (0.05 if name == "torch's linear cross-entropy" else 0.01)  # which rounds its log-probs


@pytest.mark.parametrize("candidates", [LOGITS, TOKEN])
def test_plain_torch_computes_what_we_do_from_logits(candidates):
    inputs = logits_inputs(37, 499, CPU)
    truth = candidates[OURS](inputs)
    assert len(truth) == 2 and truth[1].shape == (37, 499)
    assert kernel_case.distance(candidates["plain torch"](inputs), truth) < 0.01


def test_what_computes_something_else_is_not_timed(linear):
    truth = LINEAR[OURS](linear)

    def other(inputs):
        loss, hidden, weight = truth
        return loss, hidden, weight * 1.2

    def broken(inputs):
        return (*truth[:2], truth[2] * math.nan)

    assert "differ from ours by 20.0%" in kernel_case.trial("other", 1, other, linear, truth).why
    assert "differ from ours by nan" in kernel_case.trial("broken", 1, broken, linear, truth).why


def test_a_peer_that_does_not_run_is_shown_with_its_reason(linear):
    def raising(error):
        def run(inputs):
            raise error

        return run

    truth = LINEAR[OURS](linear)
    for error, why in [
        (ModuleNotFoundError("No module named 'peer'"), "ModuleNotFoundError: No module named 'peer'"),
        (torch.OutOfMemoryError("too much\nof it"), "OutOfMemoryError: too much"),
        (Unavailable("needs a GPU"), "needs a GPU"),
    ]:
        assert kernel_case.trial("peer", 1, raising(error), linear, truth).why == why
    with pytest.raises(ZeroDivisionError):
        kernel_case.trial("peer", 1, raising(ZeroDivisionError()), linear, truth)


def test_a_case_times_what_ran_and_names_what_did_not(linear):
    candidates = {OURS: LINEAR[OURS], "plain torch": LINEAR["plain torch"], "odd": LINEAR["cut-cross-entropy"]}
    tried = kernel_case.try_all(candidates | {"slow": LINEAR["plain torch"]}, linear, 0.25, {"slow": "too slow"})
    entries, others = kernel_case.time_all(tried, {"nothing": lambda: None}, 2, CPU)
    assert [entry.name for entry in entries if entry.timing] == [OURS, "plain torch"]
    assert [entry.why for entry in entries if not entry.timing] == ["its Triton kernels need a GPU", "too slow"]
    assert list(others) == ["nothing"]
    results = kernel_case.results_of("case", entries, {0.25: kernel_case.Work(1.0, "TFLOP/s", 0.5)})
    assert all(result.value is not None or result.why for result in results)
    named = {result.name for result in results}
    assert {f"case, 25% live, {name}: time" for name in (OURS, "plain torch", "odd", "slow")} <= named
    assert {"case, 25% live, plain torch: time over ours", "case, 25% live, ours: share of the floor"} <= named
    assert "case, 25% live, ours: time over the fastest peer, plain torch" in named


def test_the_floor_of_the_head_by_hand():
    shape = Shape(1000, 10, 300)
    by_matmuls = kernels.linear_work(shape, 0.5, gemm_seconds_per_row=0.01, bandwidth=1e12)
    assert by_matmuls.amount * 1e12 == pytest.approx(6 * 500 * 10 * 300)
    assert by_matmuls.floor == pytest.approx(500 * 0.01)
    by_bytes = kernels.linear_work(shape, 0.5, gemm_seconds_per_row=0, bandwidth=1e6)
    assert by_bytes.floor == pytest.approx((500 * 10 + 300 * 10) * 2 * 2 / 1e6)  # each is read and written, in bf16


def test_the_advantages_compared_with_are_the_same():
    rewards_R = torch.rand(64 * kernels.GROUP)
    offsets_G1 = torch.arange(0, len(rewards_R) + 1, kernels.GROUP)
    ours_R = kernels.group_advantages(rewards_R, offsets_G1).values_R
    torch.testing.assert_close(kernels.torch_advantages(rewards_R), ours_R, rtol=1e-3, atol=1e-3)


def test_targets_about_a_shape_are_found_there():
    def entry(name: str, live: float, extra: int, *rounds: float, why: str | None = None) -> kernel_case.Entry:
        return kernel_case.Entry(name, live, lambda: None, extra, None, Timing(rounds) if rounds else None, why)

    entries = [entry(OURS, 1.0, 2_000_000_000, 4.0, 6.0, 5.0), entry(OURS, 0.25, 1, 1.0, 1.2, 1.5)]
    found = kernels.target_values(kernel_targets.GPU_SHAPE, entries, Timing((4.0, 4.0, 4.0)))
    assert found == {
        kernel_targets.GEMMS: 1.25,
        kernel_targets.MEMORY: 2.0,
        kernel_targets.QUARTER: 0.25,
    }
    trl = entry("TRL chunked log-prob", 0.5, 0, why="not installed")
    entries = [entry(OURS, 0.5, 10, 2.0), entry("plain torch", 0.5, 40, 5.0), trl]
    assert kernels.target_values(kernel_targets.CPU_SHAPE, entries, Timing((1.0,))) == {
        kernel_targets.TORCH: 2.5,
        kernel_targets.TRL: "TRL chunked log-prob: not installed",
        kernel_targets.TENTH: 0.25,
    }


# ---- the command


def test_bench_kernels_quick_ends_in_json_that_names_every_target():
    command = [sys.executable, "-c", "from mgrpo.engine.cli.main import main; main()", "bench", "kernels", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["bench"] == "kernels"
    results = {result["name"]: result for result in said["results"]}
    assert len(results) == len(said["results"])
    assert {target.name for target in TARGETS} <= set(results)
    assert all(result["value"] is not None or result["why"] for result in results.values())
    assert any("plain torch: time over ours" in name for name in results)
    assert results["copy"]["value"] > 0


def test_a_reason_with_brackets_is_shown_whole(capsys):
    harness.show("", ("name", "why"), [("one", "pip install 'mgrpo[vllm]'")])
    assert "mgrpo[vllm]" in capsys.readouterr().out
