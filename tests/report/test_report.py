"""Test the report: right numbers in words and in a figure, episodes as the trainer saw them, nothing disturbed."""

from __future__ import annotations

import io
import json
import math
import shutil
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.engine.config.schema import Config, dump_config, parse_config
from mgrpo.engine.report import curves
from mgrpo.engine.report.curves import WINDOW, draw_curves, running_mean
from mgrpo.engine.report.summary import compare, draw, read_config, show_episodes, summary
from mgrpo.engine.report.transcript import runs, spread, visible, weights_of
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.store import CallRecord, RolloutRecord, Store
from mgrpo.engine.store.open import begin as begin_run
from mgrpo.engine.store.open import open_copy, open_store, sqlite_url
from mgrpo.engine.types import Trajectory
from postgres import PASSWORD

PROMPT, ANSWER, REQUEST = "Question: é?\n", "answer: Kenya\n", "Find [bold]it\n"
HOSTILE = "\x1b[2Jgone \u202e日本\n"


def config_of(models: Path, **keys: Any) -> Config:
    agents = {name: {"model": str(models / name)} for name in ("main", "search")}
    agents["search"] |= {"train": False}
    rest = {
        "steps": 20,
        "queries_per_step": 2,
        "warmup": {"steps": 3},
        "algorithm": {"rollouts": 3, "aligned_calls": 2},
    }
    use = {"use": "somewhere:Environment"}
    return parse_config({"run_dir": "unused", "environment": use, "agents": agents, **rest, **keys})


def begin(run: Path, rows: list[dict[str, Any]], **keys: Any) -> Path:
    """Make a run directory with a configuration and rows of metrics."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(dump_config(config_of(run / "models", **keys)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def evaluation(step: int, correct: float, questions: int = 200, **more: Any) -> dict[str, Any]:
    row = {"stage": "rl", "step": step, "eval/held_out_accuracy": correct / questions, "eval/questions": questions}
    return row | {"eval/low": 0.1, "eval/high": 0.9, "eval/failed": 0, "time/eval": 1.0} | more


def training(step: int, **metrics: Any) -> dict[str, Any]:
    row = {"stage": "rl", "step": step, "time/step": 10.0, "time/rollout": 6.0, "main/time/train": 2.5}
    return row | {"rollouts/scored": 6, "rollouts/unscored": 0, "rollouts/failed": 0} | metrics


# ---- the summary


def test_a_rise_a_fall_and_noise_are_told_apart():
    rose = compare(evaluation(0, 82), evaluation(20, 115))
    assert rose == "rose from 41.0 % to 57.5 % (+16.5 points, 95 % interval +6.7 to +25.9)"
    fell = compare(evaluation(0, 115), evaluation(20, 82))
    assert fell == "fell from 57.5 % to 41.0 % (-16.5 points, 95 % interval -25.9 to -6.7)"
    same = compare(evaluation(0, 82), evaluation(20, 86))
    assert same == "no change beyond noise: from 41.0 % to 43.0 % (+2.0 points, 95 % interval -7.6 to +11.6)"
    assert compare(evaluation(0, 4, 2), evaluation(1, 1, 2)) == (
        "from 2.000 to 0.500: scores outside of 0 to 1 have no interval"
    )


@given(st.integers(50, 2000), st.data())
def test_the_verdict_is_that_of_a_two_proportion_test(n, data):
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    pooled = (a + b) / (2 * n)
    assume(0 < pooled < 1)
    z = (b - a) / n / math.sqrt(pooled * (1 - pooled) * 2 / n)
    assume(abs(abs(z) - 1.96) > 0.25)  # near that, the two methods may differ
    expected = "no change" if abs(z) < 1.96 else "rose" if z > 0 else "fell"
    assert compare(evaluation(0, a, n), evaluation(1, b, n)).startswith(expected)


def test_a_run_summed_up(tmp_path):
    rows: list[dict[str, Any]] = [{"stage": "warmup", "step": s, "time/step": 1.0} for s in range(3)]
    rows += [evaluation(0, 82, **{"eval/low": 0.344, "eval/high": 0.479, "eval/failed": 3})]
    for step in range(4):
        metrics = {"main/reward_mean": 0.1 * step, "main/zero_std": 0.5 * (step % 2), "search/reward_mean": None}
        rows += [training(step, **metrics, **{"search/calls_mean": 2.0 + step, "main/perf/tokens_per_second": 1000.0})]
    rows[-1] |= {"rollouts/scored": 3, "rollouts/unscored": 2, "rollouts/failed": 1, "time/step": 14.0}
    rows += [evaluation(4, 115, **{"eval/low": 0.506, "eval/high": 0.641})]
    run = begin(tmp_path / "run", rows)
    assert summary(run) == "\n".join(
        [
            f"{run}: 3 of 3 warm-up steps, 4 of 20 rl steps of 2 queries x 3 rollouts",
            "held-out accuracy after 0 rl steps: 41.0 % (95 % interval 34.4 % to 47.9 %, 200 questions, "
            "3 failed and count as wrong)",
            "held-out accuracy after 4 rl steps: 57.5 % (95 % interval 50.6 % to 64.1 %, 200 questions)",
            "held-out accuracy: rose from 41.0 % to 57.5 % (+16.5 points, 95 % interval +6.7 to +25.9)",
            "",
            "mean of the first and of the last 2 rl steps:",
            "agent   reward          calls         entropy  zero-std groups  tokens/s",
            "main    0.050 -> 0.250  -             -        25%              1,000",
            "search  -               2.50 -> 4.50  -        -                -         frozen",
            "",
            "rollouts: 21 scored, 2 unscored, 1 failed",
            "time: 11.0 s per rl step on average: 6.0 s rollouts, 2.5 s training main, 0.0 s training search, "
            "2.5 s the rest",
        ]
    )


def test_a_run_whose_last_steps_had_no_gradient_says_so(tmp_path):
    rows = [training(step, **{"main/grad_norm": 0.5 if step == 1 else 0.0}) for step in range(5)]
    note = "no gradient in the last 3 steps: all rewards of a group are equal, so that nothing is learnt"
    assert note in summary(begin(tmp_path / "run", rows)).splitlines()
    assert "no gradient" not in summary(begin(tmp_path / "other", rows[:4]))


def test_a_run_that_has_only_begun(tmp_path):
    run = begin(tmp_path / "run", [])
    assert summary(run).splitlines()[1:] == ["held-out accuracy: not evaluated yet", "no rl steps yet"]
    (run / "metrics.jsonl").unlink()
    assert "0 of 20 rl steps" in summary(run)
    begin(run, [evaluation(0, 82, **{"eval/low": None, "eval/high": None})])
    assert "after 0 rl steps: 41.0 % (95 % interval - to -, 200 questions)\nno rl steps yet" in summary(run)


def test_a_path_that_is_no_run_directory_is_named(tmp_path):
    for report in (draw, summary, lambda run: show_episodes(run, rich.console.Console())):
        with pytest.raises(ValueError, match=rf"RUN: {tmp_path}/nowhere given: expected a run directory"):
            report(tmp_path / "nowhere")
    for text in ("{", '{"run_dir": 3}', "\udcff"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"RUN: .*config.json is not the configuration of a run: "):
            read_config(tmp_path)


# ---- the figure


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Collect the figures that are drawn, without writing them."""
    drawn: list[Figure] = []
    monkeypatch.setattr(curves, "_save", lambda path, figure: drawn.append(figure))
    return drawn


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_the_panels_show_the_rows(figures, tmp_path):
    values = [0.1 * step for step in range(15)]
    rows = [training(s, **{"main/reward_mean": v, "search/calls_mean": 2.0}) for s, v in enumerate(values)]
    rows[3]["main/reward_mean"] = None  # it was not finite
    rows[4]["main/entropy_mean"] = 0.5
    rows += [evaluation(15, 115, **{"eval/low": 0.506, "eval/high": 0.641}), evaluation(20, 3, 2, **{"eval/low": None})]
    draw_curves(tmp_path / "name" / "curves.png", config_of(tmp_path), rows)
    (figure,) = figures
    reward, accuracy, calls, entropy = figure.axes
    kept = [v for s, v in enumerate(values) if s != 3]
    raw, mean = reward.lines[:2]
    assert list(raw.get_xdata()) == [s for s in range(15) if s != 3] and list(raw.get_ydata()) == kept
    assert list(mean.get_ydata()) == pytest.approx([np.mean(kept[max(0, i - 9) : i + 1]) for i in range(14)])
    assert list(accuracy.lines[0].get_ydata()) == [0.575, 1.5]
    bars = [segment[:, 1].tolist() for segment in accuracy.collections[0].get_segments()]
    assert bars == [pytest.approx([0.506, 0.641]), pytest.approx([1.5, 1.5])]
    assert [line.get_label() for line in calls.get_legend().get_lines()] == ["search"]
    assert list(entropy.lines[0].get_ydata()) == [0.5] and entropy.lines[0].get_marker() == "."
    assert texts(figure) == ["57.5%", "150.0%"]
    assert figure.get_suptitle() == "name: 15 of 20 rl steps"


def test_panels_without_numbers_say_so(figures, tmp_path):
    alone = parse_config({"run_dir": "", "environment": {"use": "a:b"}, "agents": {"main": {"model": "m"}}})
    draw_curves(tmp_path / "curves.png", alone, [])
    draw_curves(tmp_path / "curves.png", config_of(tmp_path), [evaluation(0, 1)])
    assert texts(figures[0]) == ["no rl steps yet", "not evaluated yet", "no sub-agents", "no rl steps yet"]
    assert texts(figures[1]) == ["no rl steps yet", "0.5%", "no rl steps yet", "no rl steps yet"]


def test_the_figure_is_replaced_as_a_whole(tmp_path, monkeypatch):
    run = begin(tmp_path / "run", [evaluation(0, 82), training(0, **{"main/reward_mean": 0.5}), training(1)])
    assert draw(run) == run / "curves.png"
    before = (run / "curves.png").read_bytes()
    assert before.startswith(b"\x89PNG") and before.endswith(b"IEND\xaeB`\x82")

    def full(self: Figure, path: Path) -> None:
        path.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw(run)
    assert (run / "curves.png").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "curves.png", "metrics.jsonl"]


@given(st.lists(st.floats(-1e3, 1e3), max_size=40), st.integers(1, 50))
def test_running_mean(values, window):
    naive = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    assert running_mean(np.array(values), window) == pytest.approx(naive, abs=1e-9)
    assert WINDOW > 1


# ---- episodes


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer of one token per byte, and <end>."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(fast)}))
    return fast


def trajectory(tokenizer: PreTrainedTokenizerFast, *parts: str) -> Trajectory:
    """Make a trajectory of texts that are in turn shown to the agent and sampled by it."""
    ids = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
    tokens = np.array([i for part in ids for i in part], np.int32)
    sampled = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in ids])
    return Trajectory(tokens, sampled, np.zeros(len(tokens), np.float32), 7)


CORRECT = {0: 0.0, 1: 1.0, 2: 0.5}  # by rollout of query 3; those of query 2 are all equal
CALLS = {0: 1, 1: 2, 2: 0}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Any:
    """Make a run in its second rl step, still locked by its training, with queries 2 and 3 of step 1."""
    run = RunDirectory(tmp_path_factory.mktemp("run") / "run 1%20", resume=False)
    config = config_of(run.path / "models")
    (run.path / "config.json").write_text(dump_config(config))
    tokenizers = {name: save_tokenizer(run.path / "models" / name) for name in config.agents}
    store = Store(sqlite_url(run.store), "colocated")
    store.queries.open([(2, "b"), (3, "c")], list(config.agents), 3, step=1)
    writers = {name: TrajectoryWriter(str(run.trajectories), name) for name in config.agents}

    def call(agent: str, query: int, rollout: int, number: int, *parts: str) -> CallRecord:
        written = trajectory(tokenizers[agent], *parts)
        (position,) = writers[agent].append([written])
        expert = None if agent == "main" else 0.25 * (1 + number)
        sizes = (len(written), int(written.sampled.sum()), len(parts) // 2)
        return CallRecord(agent, query, rollout, number, True, expert, 7, *sizes, False, "answer", position)

    for query in (2, 3):
        for rollout in range(3):
            correct = CORRECT[rollout] if query == 3 else 1.0
            subs = range(CALLS[rollout] if query == 3 else 1)
            calls = [call("main", query, rollout, 0, PROMPT, f"ask {rollout}\n", HOSTILE, ANSWER + "<end>")]
            calls += [call("search", query, rollout, n, REQUEST, f"report {rollout}.{n}\n") for n in subs]
            store.queries.record([RolloutRecord(query, rollout, "scored", True, correct, 1.5)], calls)
    run.log_metrics(evaluation(0, 82))
    for step in range(2):
        run.log_metrics(training(step))
    yield run.path, config, store
    store.close()
    run.close()


def shown(run: Path, *args: Any, color: bool = False, width: int = 160) -> str:
    out = io.StringIO()
    console = rich.console.Console(
        file=out, width=width, force_terminal=color, color_system="truecolor" if color else None
    )
    show_episodes(run, console, *args)
    return out.getvalue()


def columns(text: str, width: int) -> list[str]:
    """Return the episodes that are printed side by side, each as one text."""
    return ["\n".join(line[i * width : (i + 1) * width] for line in text.splitlines()) for i in range(2)]


def test_the_best_and_the_worst_episode_side_by_side(recorded):
    text = shown(recorded[0])
    assert text.startswith("query 3 of rl step 1: 2 of 3 rollouts\n"), "not 2, whose rewards are all alike"
    best, worst = columns(text, 80)
    assert "rollout 1: correct 1, 1.5 s" in best and "rollout 0: correct 0, 1.5 s" in worst
    assert best.index("─ main ─") < best.index("─ main -> search, call 1 ─") < best.index("─ main -> search, call 2 ─")
    assert "report 1.0" in best and "report 1.1" in best and "report 0.0" in worst and "call 2" not in worst
    assert "Question: é?" in best and "Find [bold]it" in best and "6 tokens" not in worst
    assert "2 turns, ended by answer, weights 7" in best


def test_text_that_the_agent_sampled_is_marked(recorded):
    plain = [line.strip(" │") for line in columns(shown(recorded[0]), 80)[0].splitlines()]
    assert plain[plain.index("Question: é?") : plain.index(">>") + 1][:2] == ["Question: é?", "<<ask 1"]
    joined = "\n".join(plain)
    assert "<<answer: Kenya\n<end>>>" in joined and "<<report 1.1\n>>" in joined and "<<Question" not in joined
    colored = shown(recorded[0], color=True)
    assert "\x1b[1;32mask 1" in colored and "\x1b[2mQuestion: é?" in colored and "<<" not in colored


def test_a_model_cannot_steer_the_terminal(recorded):
    text = shown(recorded[0])
    assert "\x1b" not in text and r"\x1b[2Jgone \u202e日本" in text


def test_rewards_and_advantages_are_the_trainers(recorded):
    run, config, store = recorded
    rollouts, calls = store.groups.rollouts_of(3), store.groups.calls_of(3)
    found = weights_of(config, 3, rollouts, calls)
    rewards = np.array([0.1 + 0.9 * CORRECT[k] for k in range(3)])
    expected = (rewards - rewards.mean()) / rewards.std()
    assert [found["main", k, 0] for k in range(3)] == [pytest.approx((rewards[k], expected[k], 1.0)) for k in range(3)]
    subs = {key: weight for key, weight in found.items() if key[0] == "search"}
    aligned = np.array([subs["search", k, n] for k, n in ((0, 0), (1, 0), (1, 1))])
    assert aligned[:, 0] == pytest.approx([0.1 + 0.125, 0.1 + 0.4 + 0.125, 0.1 + 0.4 + 0.25])
    assert aligned[0, 2] == 2 and aligned[1:, 2].sum() == 2, "aligned to D = 2"
    mean = np.average(aligned[:, 0], weights=aligned[:, 2])
    std = math.sqrt(np.average((aligned[:, 0] - mean) ** 2, weights=aligned[:, 2]))
    assert aligned[:, 1] == pytest.approx((aligned[:, 0] - mean) / std)
    best, worst = columns(shown(run), 80)
    assert f"reward 1.00, advantage {expected[1]:+.2f} " in best
    assert f"expert 0.25, reward {aligned[0, 0]:.2f}, advantage {aligned[0, 1]:+.2f}, counts 2x" in worst


def test_a_query_a_count_and_a_narrow_console(recorded):
    run, _, _ = recorded
    text = shown(run, 9, 2, width=60)
    assert text.startswith("query 2 of rl step 1: 3 of 3 rollouts\n")
    starts = [line for line in text.splitlines() if line.startswith("rollout")]
    assert len(starts) == 3 and "advantage +0.00" in text, "one below the other; all alike, so nothing to learn"
    assert "rollout 1: " in shown(run, 1) and "rollout 0: " not in shown(run, 1)


def test_an_episode_that_cannot_be_shown_is_named(recorded, tmp_path):
    run, config, _ = recorded
    with pytest.raises(
        ValueError, match=r"query: 9 given, expected one that was sampled \(step s asks 2 from 2 s on\)"
    ):
        shown(run, 2, 9)
    with pytest.raises(ValueError, match="episodes: 0 given, expected at least 1"):
        shown(run, 0)
    begun = begin(tmp_path / "begun", [evaluation(0, 82)])
    assert shown(begun) == "no rl steps yet: no episodes to show\n"
    (begun / "config.json").write_text(dump_config(config))
    with pytest.raises(ValueError, match=r"RUN: .*begun given: expected a run directory with a store.db"):
        shown(begun, 2, 0)


def test_an_unscored_or_failed_rollout_is_shown_with_its_error_and_untrained(recorded):
    run, config, store = recorded
    store.queries.open([(40, "t")], list(config.agents), 3, step=20)
    (main,) = [call for call in store.groups.calls_of(3) if call.agent == "main" and call.rollout == 0]
    call = CallRecord(**{**vars(main), "query": 40, "format": False, "ended": ""})
    store.queries.record([RolloutRecord(40, 0, "unscored", False, 0.0, 2.0, "judge\x1b: timeout")], [call])
    store.queries.record([RolloutRecord(40, 1, "failed", False, 0.0, 2.0, "KeyError")], [])
    text = shown(run, 2, 40)
    assert r"rollout 0: unscored: judge\x1b: timeout" in text and "not trained on" in text
    assert "ended by an error" in text and "rollout 1: failed: KeyError" in text


def test_a_running_training_is_not_disturbed(recorded):
    """A lock is held and a write is in progress throughout: a report neither waits for it nor sees half of it."""
    run, _, _ = recorded
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.name.endswith("-shm")}
    writer = sqlite3.connect(run / "store.db", isolation_level=None, timeout=0)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE rollouts SET correct = 0.125")
        text = shown(run, 3)
        assert "correct 0.125" not in text and "correct 0.5" in text
        writer.execute("ROLLBACK")
    finally:
        writer.close()
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.name.endswith("-shm")}
    assert after == before


def test_a_finished_runs_store_is_read_too(recorded, tmp_path):
    """Its write-ahead log is gone by then."""
    _, config, _ = recorded
    store = Store(f"sqlite:///{tmp_path}/store.db", "colocated")
    store.queries.open([(0, "t")], list(config.agents), 3, step=0)
    store.queries.record([RolloutRecord(0, 0, "failed", False, 0.0, 1.0, "gone")], [])
    store.close()
    assert not (tmp_path / "store.db-wal").exists()
    begin(tmp_path, [])
    (tmp_path / "config.json").write_text(dump_config(config))
    assert "rollout 0: failed: gone" in shown(tmp_path, 1, 0)


@pytest.mark.parametrize("kind", ["its own", "sqlite", "postgresql"])
def test_a_decoupled_runs_store_is_found_wherever_it_is(tmp_path, kind, request, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    url = {"its own": "", "sqlite": f"sqlite:///{tmp_path}/elsewhere.db"}.get(kind)
    if url is None:
        url = request.getfixturevalue("server").create()
        monkeypatch.setenv("MGRPO_STORE_PASSWORD", PASSWORD)
    config = config_of(tmp_path, topology="local", run_dir=str(run), store={"url": url})
    with closing(open_store(config)) as store:
        begin_run(store, config)
        store.queries.open([(5, "t")], list(config.agents), 3, step=0)
        store.queries.record([RolloutRecord(5, 0, "scored", True, 0.5, 1.0, "")], [])
        with open_copy(config, run) as found:
            assert found.groups.rollouts_of(5) == store.groups.rollouts_of(5) != []


def test_a_killed_runs_store_is_left_as_it_is(recorded, tmp_path):
    """The rows are still in the write-ahead log, which is needed to resume the run."""
    run, _, _ = recorded
    dead = tmp_path / "dead"
    shutil.copytree(run, dead, ignore=shutil.ignore_patterns("*-shm"))
    before = (dead / "store.db").read_bytes(), (dead / "store.db-wal").read_bytes()
    assert len(before[1]) > 0
    assert shown(dead) == shown(run)
    assert ((dead / "store.db").read_bytes(), (dead / "store.db-wal").read_bytes()) == before


@given(st.lists(st.integers(0, 8).map(lambda n: n / 8), max_size=12), st.integers(0, 3), st.integers(1, 20))
def test_spread_goes_from_the_best_to_the_worst(correct, failed, count):
    rollouts = [RolloutRecord(0, k, "scored", True, c, 1.0) for k, c in enumerate(correct)]
    rollouts += [RolloutRecord(0, len(correct) + k, "failed", False, 0.0, 1.0) for k in range(failed)]
    chosen = spread(rollouts, config_of(Path()), count)
    assert len({r.rollout for r in chosen}) == len(chosen) == min(count, len(rollouts))
    scored = [r.correct for r in chosen if r.status == "scored"]
    assert scored == sorted(scored, reverse=True)
    if correct and count > 1:
        assert scored[0] == max(correct) and scored[-1] == min(correct)


@given(st.lists(st.booleans()))
def test_runs_are_whole_and_alternate(flags):
    flags_L = np.array(flags, bool)
    found = runs(flags_L)
    assert [i for first, last in found for i in range(first, last)] == list(range(len(flags)))
    assert all(len(set(flags[first:last])) == 1 for first, last in found)
    assert all(flags[a[0]] != flags[b[0]] for a, b in pairwise(found))


@given(st.text())
def test_only_printable_characters_are_printed(text):
    assert all(c.isprintable() or c in "\n\t" for c in visible(text))
    assert visible("".join(c for c in text if c.isprintable())) == "".join(c for c in text if c.isprintable())
