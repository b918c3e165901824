"""Test `mgrpo bench step`: every way has the gradient of the usual way, and the usual way has the paper's.

The groups are those of `test_exactness`, random and ragged, with its independent naive path as the truth in float64.
No test measures a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cases.exactness import LONGEST, Actors, actors, make_case, naive_loss, wide_pack
from cases.launcher import Recording
from mgrpo.bench.step import case as step_case
from mgrpo.bench.step import measure as step_measure
from mgrpo.bench.step import run as bench
from mgrpo.bench.step import targets as step_targets
from mgrpo.bench.step import trl as step_trl
from mgrpo.bench.step.case import ALIGNED, LENGTHS, Case, calls_made, mix
from mgrpo.bench.step.measure import SAME, TRL, Watched, distance, distinct, measure
from mgrpo.bench.step.models import TINY, flop, make_model
from mgrpo.bench.step.usual import OURS, USUAL, WAYS, Way, samples_of, step
from mgrpo.engine.model.attention import Packed
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.store import CallRecord
from mgrpo.engine.training import colocated
from mgrpo.engine.training import trainer as trainer_module
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import MAIN
from numerics import within_rule
from toy import make_model as make_toy
from toy import toy_config

__all__ = ["actors"]  # a fixture
CPU = torch.device("cpu")
SMALL = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
EXAMPLES = Path(__file__).parents[2] / "examples" / "geography"


# ---- the gradients


@pytest.fixture
def one_thread():
    """Use one thread: the work is too small to share, and on busy cores the threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def widen(patch: pytest.MonkeyPatch) -> None:
    """Keep everything in float64: the norms of transformers round to float32, and so does `pack`."""
    patch.setattr(LlamaRMSNorm, "forward", lambda n, x: F.rms_norm(x, n.weight.shape, n.weight, n.variance_epsilon))
    patch.setattr(trainer_module, "pack_calls", wide_pack)
    patch.setattr(trainer_module, "matmul_ceiling", lambda *_: 1.0)  # measuring it takes seconds


def ragged_case(seed: int, folder: Path, model: Path) -> tuple[Case, Any]:
    """Return one of `test_exactness`'s cases that the usual way supports, and its files."""
    plain = make_case(seed, ("trajectory", "constant")[seed % 2], "token")
    changes = {"alignment": "sampled", "dual_clip": None, "kl_coef": 0.0, "entropy_coef": 0.0, "sampler_cap": None}
    plain = SimpleNamespace(**vars(plain) | {"algorithm": msgspec.structs.replace(plain.algorithm, **changes)})
    writer = TrajectoryWriter(str(folder), "clerk")
    positions = writer.append(plain.trajectories)
    writer.close()
    config = config_of(model, folder, plain.algorithm)

    def placed(call: CallRecord) -> CallRecord:
        trajectory = plain.trajectories[call.position.row]
        facts = {name: getattr(trajectory, name) for name in ("rows", "digest", "sampler_digest")}
        return replace(call, position=positions[call.position.row], **facts)

    groups = [replace(group, calls=[placed(call) for call in group.calls]) for group in plain.groups]
    return Case("ragged", plain.agent, config, groups, str(folder)), plain


def config_of(model: Path, folder: Path, algorithm: Any) -> Any:
    agent = {"model": str(model), "lr": step_case.LR, "temperature": 0.8, "max_context": 64}
    raw = {
        "run_dir": str(folder),
        "environment": {"use": "none:None"},
        "agents": {MAIN: agent, "clerk": agent},
        "algorithm": msgspec.to_builtins(algorithm),
        "compute": {"device": "cpu", "dtype": "float32", "max_tokens": LONGEST + 7},
        "seed": 5,
    }
    return step_case.parse_config(raw)


def gradients(case: Case, policy: Watched) -> dict[str, dict[str, torch.Tensor]]:
    """Return the gradient of every way, by the weights' names."""
    found: list[dict[str, torch.Tensor]] = []
    policy.look = lambda gradient: found.append({name: g.clone() for name, g in gradient.items()})
    trainer = AgentTrainer(case.config, policy, case.trajectories)
    for way in WAYS.values():
        step(way, case, policy, trainer)
    return dict(zip(WAYS, found, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_every_way_has_the_papers_gradient(actors: Actors, seed, tmp_path, monkeypatch, one_thread):
    widen(monkeypatch)
    case, plain = ragged_case(seed, tmp_path, actors.folder)
    actors.first.zero_grad()
    naive_loss(plain, actors.first, None, actors.reference, padded=True).backward()
    truth = {name: w.grad for name, w in actors.first.named_parameters()}
    policy = Watched(case.agent, case.config.agents[case.agent], case.config.compute)
    policy.model.double()
    for name, gradient in gradients(case, policy).items():
        assert gradient.keys() == truth.keys()
        for weight, true in truth.items():
            off = (gradient[weight] - true).abs().max()
            assert off <= 1e-9 * true.abs().max() + 1e-15, (name, weight, off)


def test_in_bf16_every_way_is_within_twice_the_usual_ones_error(tmp_path, monkeypatch, one_thread):
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix("sub", model, tmp_path, 64, 3, 4, device="cpu", dtype="bfloat16", max_tokens=128)
    found = gradients(case, Watched(case.agent, case.config.agents[case.agent], case.config.compute))
    compute = msgspec.structs.replace(case.config.compute, dtype="float32")
    exact = Watched(case.agent, case.config.agents[case.agent], compute)
    exact.model.double()
    widen(monkeypatch)
    truth = gradients(case, exact)[USUAL]
    for name in set(WAYS) - {USUAL}:
        for weight, true in truth.items():
            assert within_rule(found[name][weight].bfloat16(), found[USUAL][weight].bfloat16(), true), (name, weight)


def test_the_gradient_depends_on_what_the_ways_are_given(tmp_path):
    """Check that the ways differ; otherwise the tests above would hold for anything."""
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix("sub", model, tmp_path, 64, 2, 4, device="cpu", dtype="float32", max_tokens=128)
    policy = Watched(case.agent, case.config.agents[case.agent], case.config.compute)
    truth = gradients(case, policy)[USUAL]
    fewer = replace(case, groups=case.groups[:1])
    assert distance(gradients(fewer, policy)[USUAL], truth) > 0.1
    assert all(float(w.norm()) > 0 for w in truth.values())


# ---- what is trained on


@pytest.mark.parametrize("rollouts", [12, 18, 64, 1000])
def test_the_mix_is_as_it_says(rollouts):
    counts_N = calls_made(rollouts, np.random.default_rng(0))
    assert abs(counts_N.mean() - 3) <= 0.1
    assert counts_N.max() >= 3 * np.median(counts_N) and counts_N.min() <= 1


@pytest.mark.parametrize("agent", [MAIN, "sub"])
def test_a_mix_has_lengths_in_bounds_and_the_agents_word_last(agent, tmp_path):
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix(agent, model, tmp_path, 32, 3, 8, device="cpu", dtype="float32")
    least, most = (bound / 32 for bound in LENGTHS[agent])
    trajectories = [s.trajectory for s in samples_of(Way(), case)]
    assert all(max(4, least) - 1 <= len(t) <= most + 1 for t in trajectories)
    assert max(len(t) for t in trajectories) > 0.8 * most
    assert all(t.sampled[-1] and not t.sampled[0] for t in trajectories)
    assert 0.1 < np.mean([t.sampled.mean() for t in trajectories]) < 0.4
    assert len(case.groups) == 3 and all(len(group.rollouts) == 8 for group in case.groups)
    assert len(trajectories) == (24 if agent == MAIN else ALIGNED * sum(has_calls(case)))


def has_calls(case: Case) -> list[bool]:
    return [any(c.rollout == r.rollout for c in group.calls) for group in case.groups for r in group.rollouts]


def test_a_way_that_leaves_nothing_out_is_not_run(tmp_path):
    model = make_model(tmp_path / "model", TINY | SMALL)
    main, sub = (mix(agent, model, tmp_path, 64, 2, 4, device="cpu") for agent in (MAIN, "sub"))
    copies, merged = list(WAYS)[1:3]
    assert [distinct(main)[name] for name in (USUAL, copies, merged, OURS)] == [True, False, False, True]
    assert [distinct(sub)[name] for name in (USUAL, copies, merged, OURS)] == [True, True, False, True]


def test_geography_is_played_from_its_scripts_and_its_rollouts_differ(tmp_path, monkeypatch):
    made = [sys.executable, str(EXAMPLES / "prepare.py"), "--out", str(tmp_path / "data"), "--only", "tiny"]
    subprocess.run(made, check=True, capture_output=True)
    monkeypatch.setattr(step_case, "GEOGRAPHY", EXAMPLES / "train.toml")
    monkeypatch.chdir(EXAMPLES.parents[1])
    places = [f"environment.options.data={tmp_path / 'data'}"]
    places += [f"agents.{agent}.model={tmp_path / 'data/tiny'}" for agent in (MAIN, "sub")]
    cases = step_case.geography(tmp_path, 6, places)
    assert [case.agent for case in cases] == [MAIN, "sub"]
    for case in cases:
        assert len(case.groups) == 6 and all(len(group.rollouts) == 6 for group in case.groups)
        usual, ours = (samples_of(way, case) for way in (Way(), Way(copies=False, merged=True, dropped=True)))
        assert 0 < len(ours) < 0.7 * len(usual)
    again = step_case.geography(tmp_path / "again", 6, places)
    assert [[c.digest for c in g.calls] for case in cases for g in case.groups] == [
        [c.digest for c in g.calls] for case in again for g in case.groups
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    make_toy(folder / "model")
    config = toy_config(folder, eval={"questions": 1})
    colocated.train(config, False, Recording())
    return Path(config.run_dir)


def test_a_recorded_run_is_trained_on_as_it_was(run):
    main, clerk = step_case.recorded(run, 2)
    for case in (main, clerk):
        assert [group.query for group in case.groups] == [3, 4]  # those of the second of three steps of three queries
        trajectories = [s.trajectory for s in samples_of(Way(copies=False), case)]
        assert [t.digest for t in trajectories] == [c.digest for group in case.groups for c in group.calls]
    assert sum(len(group.calls) for group in main.groups) == 8
    policy = Watched("main", main.config.agents["main"], main.config.compute)
    found = gradients(main, policy)
    assert all(distance(gradient, found[USUAL]) < 1e-4 for gradient in found.values())


def test_what_has_no_advantage_is_refused(run):
    (case, _) = step_case.recorded(run, 1)
    alike = [replace(r, correct=1.0, format=True) for r in case.groups[0].rollouts]
    with pytest.raises(ValueError, match="geography recorded, main: expected rollouts of different rewards"):
        step_measure.require_useful(replace(case, groups=[replace(case.groups[0], rollouts=alike)]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_flop_are_those_that_torch_counts(tied, tmp_path):
    folder = make_model(tmp_path, TINY | SMALL | {"tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    length, heads = 48, 4 * 8
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None]).logits.sum().backward()
    above_the_diagonal = 6 * length**2 * heads * 2  # a causal kernel need not compute it
    assert flop(model, [length], length) == counter.get_total_flops() - above_the_diagonal
    assert flop(model, [length, length], 0) < 2 * flop(model, [length], length)


# ---- the harness

TINY_PLAN = step_targets.Plan("tiny", TINY | SMALL, 128, 2, 4, {"max_tokens": 256, "dtype": "float32"}, 1, 2)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "plan_for", lambda device, quick: TINY_PLAN)
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(bench, "keep_memory", lambda: None)  # it would change this whole process
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step_measure, "matmul_ceiling", lambda *_: 1e9)
    monkeypatch.setattr(trainer_module, "matmul_ceiling", lambda *_: 1e9)
    monkeypatch.setattr(step_case, "GEOGRAPHY", tmp_path / "nowhere.toml")


def test_a_run_ends_in_one_line_with_every_row_and_target(tiny, capsys, tmp_path):
    bench.main(quick=False)
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last)
    assert found["bench"] == "step"
    results = {r["name"]: r for r in found["results"]}
    for name in WAYS:
        assert results[f"mix/128, sub, {name}: time"]["value"] > 0
        assert results[f"mix/128, sub, {name}: gradient's difference"]["value"] < 1e-4  # float32
    same = [name for name in WAYS if results[f"mix/128, sub, {name}: time"]["why"] == SAME]
    assert same == ["identical trajectories once", "none without advantage"]
    targets = {name: (r["target"], r["met"] is None, r["why"]) for name, r in results.items() if r["target"]}
    assert targets["mix/128, both agents: times as fast as the usual way"] == (">= 5", False, None)
    assert targets["mix/128, both agents: extra memory over the usual way's"] == ("<= 0.5", False, None)
    assert targets["Qwen3-0.6B, 16k tokens: tokens/s over prime-rl's"] == (">= 2", True, "no GPU")
    assert targets["Qwen3-0.6B, 64k tokens: MFU"] == (">= 40", True, "no GPU")
    assert targets["geography, main: TRL's time over ours"][:2] == (">= 2", True)
    assert "nowhere.toml" in targets["geography, main: TRL's time over ours"][2]
    assert len(targets) == 6
    assert (tmp_path / "results" / "step.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results" / "cpu-step.json").read_text()) == found


def test_the_rollouts_are_right_as_often_as_it_says():
    rights = [step_case.right_of(query, 3, 6) for query in range(3)]
    assert rights == [0, 2, 5]  # one group in three has no advantage
    assert 0 < step_case.right_of(0, 1, 4) < 4  # long rollouts have an advantage


def test_a_comparison_is_with_the_first_gradient():
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(3, 2)}
    look = step_measure.Comparison(truth)
    look(truth)
    assert look.difference == 0
    look({"a": torch.tensor([3.0, 4.5]), "b": torch.ones(3, 2)})
    assert look.difference == pytest.approx(0.1)
    look(truth)
    assert look.difference == 0


def test_a_way_that_runs_out_of_memory_is_told_and_leaves_nothing_behind(tmp_path):
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix(MAIN, model, tmp_path, 128, 2, 4, device="cpu", dtype="float32", max_tokens=256)
    policy = Watched(case.agent, case.config.agents[case.agent], case.config.compute)
    truth = gradients(case, policy)[USUAL]
    policy.look = look = step_measure.Comparison(truth)
    look(truth)

    def fail() -> None:
        policy.model(input_ids=torch.ones(1, 3, dtype=torch.int64), layout=one_sequence(3)).logits.sum().backward()
        raise torch.OutOfMemoryError("no room\nfor more")

    assert step_measure.trial("big", fail, look, policy).why == "out of memory: no room"
    trainer = AgentTrainer(case.config, policy, case.trajectories)
    row = step_measure.trial("ours", lambda: step(WAYS[OURS], case, policy, trainer), look, policy)
    assert row.why is None and row.difference < 1e-4


def one_sequence(length: int) -> Packed:
    return Packed(torch.tensor([0, length], dtype=torch.int32), length)


def test_without_trl_its_rows_say_so(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix(MAIN, model, tmp_path, 128, 2, 4, device="cpu", dtype="float32", max_tokens=256)
    row = measure(case, tmp_path, 1).rows[TRL]
    assert row.timing is None and row.why and row.why.startswith("trl: ")


def test_a_sub_agent_is_nothing_for_trl(tmp_path):
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix("sub", model, tmp_path, 128, 2, 4, device="cpu")
    with pytest.raises(step_trl.Unavailable, match="no sub-agents"):
        step_trl.Trl(case, tmp_path / "trl")


@pytest.mark.parametrize("norm", ["trajectory", "constant"])
def test_trl_has_the_same_gradient(norm, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    model = make_model(tmp_path / "model", TINY | SMALL)
    case = mix(MAIN, model, tmp_path, 128, 3, 4, device="cpu", dtype="float32", max_tokens=512)
    algorithm = msgspec.structs.replace(case.config.algorithm, length_norm=norm)
    case = replace(case, config=msgspec.structs.replace(case.config, algorithm=algorithm))
    policy = Watched(case.agent, case.config.agents[case.agent], case.config.compute)
    trl = step_trl.Trl(case, tmp_path / "trl")
    usual, found = gradients(case, policy)[USUAL], []
    trl.look = lambda gradient: found.append(distance(gradient, usual))
    try:
        trl(), trl()  # a second step works like the first
        assert len(found) == 2 and max(found) < 1e-4
    finally:
        trl.close()
    assert not trl.thread.is_alive()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_machine_has_a_plan(device, quick):
    plan = step_targets.plan_for(torch.device(device), quick)
    longest = max(bounds[1] for bounds in LENGTHS.values()) / plan.factor
    assert plan.rounds >= 2 and longest <= plan.compute["max_tokens"]


def test_long_rollouts_stand_beside_what_is_published():
    (long,) = (one for one in step_targets.LONG if (one.model, one.length) == ("Qwen3-0.6B", 1 << 14))
    results = {r.name: r for r in step_targets.long_results(long, 23_800.0, 30.0)}
    assert results[f"{long.name}: tokens/s over prime-rl's"].met is True
    assert results[f"{long.name}: prime-rl, published: tokens/s"].value == 11_900
    assert results[f"{long.name}: MFU"].target is None
