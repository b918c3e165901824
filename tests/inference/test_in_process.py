"""Test the in-process sampler: the plain model's distribution, independent of other calls; one prefill; exact ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GraniteConfig

from cases.ragged_tokenizer import FRAGMENTS, RAGGED
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.inference import in_process
from mgrpo.engine.inference.in_process import InProcessSampler, draw
from mgrpo.engine.inference.kv_cache import KVCache
from mgrpo.engine.inference.sampler import Completion, Session
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.types import WeightsVersion
from mgrpo.kernels import advantages
from toy import make_model

LAST = 1 - 2.0**-53  # the largest number that numpy's generator returns


GRANITE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}

GPT2 = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}


class Kit:
    """Hold a tiny model with our attention, and the same model plain."""

    def __init__(self, folder: Path, dtype: str = "float32"):
        agent = AgentConfig(model=str(folder), max_context=256)
        self.model = load_model("main", agent, ComputeConfig(dtype=dtype, device="cpu"))
        self.tokenizer = load_tokenizer("main", agent)
        self.plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    def sampler(self, concurrency: int = 8, tokenizer=None, **agent) -> InProcessSampler:
        options = {"max_new_tokens": 12, "max_context": 256, **agent}
        return InProcessSampler(
            self.model, tokenizer or self.tokenizer, AgentConfig(model="", **options), concurrency, WeightsVersion(3, 0)
        )

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the plain model's logits at every position, (L, V) float64."""
        return self.plain(input_ids=torch.tensor(tokens)[None]).logits[0].double()


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Kit:
    return Kit(make_model(tmp_path_factory.mktemp("model")))


def prompt(seed: int, length: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(1, 257, length).tolist()


def new_session(seed: int, tokens: list[int], greedy: bool = False) -> Session:
    session = Session((seed,), greedy)
    session.append(tokens)
    return session


async def drive(sampler: InProcessSampler, coroutines: list) -> list:
    running = [asyncio.create_task(coroutine) for coroutine in coroutines]
    while not all(task.done() for task in running):
        for _ in range(3):
            await asyncio.sleep(0)
        if sampler.pending:
            sampler.step()
    return [task.result() for task in running]


async def talk(sampler: InProcessSampler, session: Session, observations: Sequence[list[int]] = ()) -> list[Completion]:
    """Play a call: turns with observations between them. Close it at the end."""
    turns = [await sampler.act(session)]
    for tokens in observations:
        session.append(tokens)
        turns.append(await sampler.act(session))
    sampler.close(session)
    return turns


def run(sampler: InProcessSampler, sessions: list[Session], observations: Sequence[list[int]] = ()) -> list:
    return asyncio.run(drive(sampler, [talk(sampler, session, observations) for session in sessions]))


def one(sampler: InProcessSampler, session: Session) -> Completion:
    return run(sampler, [session])[0][0]


def true_logps(logits_LV: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return log-probs in float64, cut row by row to the fewest likeliest tokens that reach top_p, renormalised."""
    probs_LV = (logits_LV.double() / temperature).softmax(-1)
    for probs_V in probs_LV:
        order = probs_V.argsort(descending=True, stable=True).tolist()
        kept, total = 0, 0.0
        while total < top_p and kept < len(order):
            total += float(probs_V[order[kept]])
            kept += 1
        probs_V[order[kept:]] = 0
    return (probs_LV / probs_LV.sum(-1, keepdim=True)).log()


def gap(kit: Kit, session: Session, temperature: float = 1.0, top_p: float = 1.0) -> float:
    """Return the largest difference between the session's log-probs and the plain model's."""
    at = np.flatnonzero(session.sampled)
    logps_LV = true_logps(kit.logits(session.tokens)[at - 1], temperature, top_p)
    truth = logps_LV[torch.arange(len(at)), torch.tensor(session.tokens)[at]]
    return float((truth - torch.tensor(session.logprobs).double()[at]).abs().max())


# ---- what is sampled, and with which log-probs


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.9), (0.8, 0.5), (1.0, 1e-6)])
def test_recorded_logprobs_are_those_of_the_plain_models_full_forward(kit, temperature, top_p):
    sampler = kit.sampler(temperature=temperature, top_p=top_p)
    sessions = [new_session(i, prompt(i, 1 + 7 * i)) for i in range(6)]
    run(sampler, sessions, [prompt(90, 1), prompt(91, 5), []])
    for i, session in enumerate(sessions):
        assert gap(kit, session, temperature, top_p) <= 1e-4  # infinite for a token outside the nucleus
        assert sum(session.sampled) >= 4 and not any(session.sampled[: 1 + 7 * i])
        assert not np.array(session.logprobs)[~np.array(session.sampled)].any()
        trajectory = session.trajectory()
        assert trajectory.tokens.tolist() == session.tokens and trajectory.sampled.tolist() == session.sampled


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_kind_of_head_gives_the_plain_models_logprobs(tmp_path, tie, groups):
    kit = Kit(make_model(tmp_path, tie=tie, num_key_value_heads=groups))
    sessions = [new_session(i, prompt(i, 3 + i)) for i in range(4)]
    run(kit.sampler(), sessions, [prompt(8, 3)])
    assert max(gap(kit, session) for session in sessions) <= 1e-4


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(**GRANITE, attention_multiplier=0.9), GPT2Config(**GPT2)],
    ids=["a separate attention scale", "learned positions, no key-value groups"],
)
def test_other_architectures_give_the_plain_models_logprobs(tmp_path, config):
    make_model(tmp_path)  # for the tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    kit = Kit(tmp_path)
    sessions = [new_session(i, prompt(i, 3 + i)) for i in range(4)]
    run(kit.sampler(), sessions, [prompt(8, 3)])
    assert max(gap(kit, session) for session in sessions) <= 1e-4


def test_bfloat16_is_no_further_from_the_truth_than_twice_the_plain_bfloat16_model(tmp_path):
    folder = make_model(tmp_path)
    low, high = Kit(folder, "bfloat16"), Kit(folder)
    high.plain.load_state_dict({k: v.float() for k, v in low.plain.state_dict().items()})
    sessions = [new_session(i, prompt(i)) for i in range(8)]
    run(low.sampler(), sessions, [prompt(8, 3)])
    plain = []
    for session in sessions:
        at = np.flatnonzero(session.sampled)
        rows, ids = torch.arange(len(at)), torch.tensor(session.tokens)[at]
        truth, rounded = (k.logits(session.tokens)[at - 1].log_softmax(-1)[rows, ids] for k in (high, low))
        plain.append(float((truth - rounded).abs().max()))
    assert max(gap(high, session) for session in sessions) <= 2 * max(plain) + 1e-3


def test_greedy_takes_the_plain_models_argmax_token_for_token(kit):
    sessions = [new_session(i, prompt(i), greedy=True) for i in range(4)]
    run(kit.sampler(temperature=0.7, top_p=0.4), sessions, [prompt(50, 4)])
    for session in sessions:
        best = kit.logits(session.tokens).argmax(-1).tolist()
        at = np.flatnonzero(session.sampled)
        assert len(at) >= 2 and all(session.tokens[i] == best[i - 1] for i in at)
        assert not any(session.logprobs)  # a greedy choice has log-prob 0


def test_equal_seeds_sample_the_same_tokens_and_others_do_not(kit):
    sessions = [new_session(seed, prompt(1)) for seed in (5, 5, 6)]
    run(kit.sampler(), sessions)
    assert sessions[0].tokens == sessions[1].tokens != sessions[2].tokens


@settings(max_examples=12)
@given(st.integers(1, 9), st.permutations(range(7)), st.integers(0, 3))
def test_a_session_does_not_depend_on_other_sessions_slots_or_order(kit, concurrency, order, prompts):
    shared = [prompt(i % (prompts + 1), 6 + i % (prompts + 1)) for i in range(7)]
    alone = [new_session(i, shared[i]) for i in range(7)]
    for session in alone:
        run(kit.sampler(concurrency=1), [session], [prompt(9, 2)])
    beside = [new_session(i, shared[i]) for i in range(7)]
    run(kit.sampler(concurrency=concurrency), [beside[i] for i in order], [prompt(9, 2)])
    assert [s.tokens for s in beside] == [s.tokens for s in alone]
    np.testing.assert_allclose(
        np.concatenate([s.logprobs for s in beside]), np.concatenate([s.logprobs for s in alone]), atol=2e-5
    )


# ---- what goes through the model


@pytest.fixture
def through(monkeypatch) -> list[int]:
    """Record the number of tokens of every forward."""
    counts: list[int] = []
    real = in_process.hidden_states

    def counted(model, input_ids_T, *args):
        counts.append(len(input_ids_T))
        return real(model, input_ids_T, *args)

    monkeypatch.setattr(in_process, "hidden_states", counted)
    return counts


def total_if_each_token_once(sessions: list[Session], prompt_length: int) -> int:
    """Return the tokens to compute if each is computed once.

    That is the prompt once, and for each session its last prompt token and all sampled tokens but the last.
    """
    return prompt_length - 1 + sum(len(s.tokens) - prompt_length for s in sessions)


@pytest.mark.parametrize("concurrency", [8, 3], ids=["all at once", "few slots"])
def test_sessions_of_one_prompt_share_one_prefill(kit, through, concurrency):
    sessions = [new_session(i, prompt(0, 40)) for i in range(8)]
    run(kit.sampler(concurrency=concurrency), sessions)
    assert sum(through) == total_if_each_token_once(sessions, 40)  # there is always a live session to copy from
    assert max(gap(kit, session) for session in sessions) <= 1e-4


def test_a_prompt_is_copied_from_any_live_session_that_holds_it(kit, through):
    sampler = kit.sampler()
    first, second, late = (new_session(i, prompt(0, 40)) for i in range(3))

    async def play() -> None:
        await drive(sampler, [sampler.act(first), sampler.act(second)])
        sampler.close(first)  # the session that computed the prompt
        through.clear()
        await drive(sampler, [talk(sampler, late)])

    asyncio.run(play())
    assert through[0] == 1 and sum(through) == sum(late.sampled)
    assert gap(kit, late) <= 1e-4


def test_later_turns_compute_only_their_new_tokens(kit, through):
    session = new_session(0, prompt(0, 30))
    run(kit.sampler(), [session], [prompt(1, 7), [], prompt(2, 1)])
    assert sum(through) == len(session.tokens) - 1
    assert gap(kit, session) <= 1e-4


def test_a_released_cache_keeps_nothing_of_old_weights(tmp_path, through):
    kit = Kit(make_model(tmp_path))
    sampler = kit.sampler()
    run(sampler, [new_session(0, prompt(0, 40))])
    sampler.release_cache()
    assert not sampler.cache.layers
    for model in (kit.model, kit.plain):
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    through.clear()
    session = new_session(1, prompt(0, 40))
    run(sampler, [session])
    assert through[0] == 40 and gap(kit, session) <= 1e-4


def test_the_cache_is_not_released_under_a_live_session(kit):
    sampler = kit.sampler()
    asyncio.run(drive(sampler, [sampler.act(new_session(0, prompt(0)))]))
    with pytest.raises(AssertionError):
        sampler.release_cache()


def test_closing_in_the_middle_of_a_turn_frees_the_slot_for_the_next(kit):
    sampler = kit.sampler(concurrency=1, max_new_tokens=6)
    first, second = new_session(0, prompt(0)), new_session(1, prompt(1))

    async def play() -> None:
        turns = [asyncio.create_task(sampler.act(session)) for session in (first, second)]
        await asyncio.sleep(0)
        assert sampler.pending == 1  # the other call has no slot
        sampler.step()
        sampler.step()
        turns[0].cancel()
        sampler.close(first)
        await drive(sampler, [asyncio.wait_for(turns[1], 5)])
        sampler.close(second)

    asyncio.run(play())
    assert sum(first.sampled) == 2 and sum(second.sampled) == 6 and gap(kit, second) <= 1e-4
    assert sampler.pending == 0
    sampler.release_cache()


# ---- new weights


def moved(kit: Kit, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    named = kit.model.named_parameters()
    return {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in named}


def put(kit: Kit, tensors: dict[str, torch.Tensor]) -> None:
    """Copy weights into the plain model."""
    parameters = dict(kit.plain.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_turns_before_an_update_use_the_old_weights_and_later_turns_the_new(tmp_path, tie):
    kit = Kit(make_model(tmp_path, tie=tie))
    sampler = kit.sampler(max_new_tokens=6)
    old = {name: p.detach().clone() for name, p in kit.model.named_parameters()}
    new = moved(kit, 1)
    running, fresh, over = (
        new_session(seed, prompt(0, 20)) for seed in range(3)
    )  # they share one prompt, which is cached
    switch: list[int] = []

    async def play() -> None:
        await drive(sampler, [sampler.act(running), talk(sampler, over)])
        assert sampler.update(new, WeightsVersion(5, 2))
        switch.append(len(running.tokens))
        running.append(prompt(7, 3))
        await drive(sampler, [talk(sampler, running), talk(sampler, fresh)])

    asyncio.run(play())
    (at,) = switch
    first = Session((0,), tokens=running.tokens[:at], sampled=running.sampled[:at], logprobs=running.logprobs[:at])
    masked = [False] * at + running.sampled[at:]
    last = Session((0,), tokens=running.tokens, sampled=masked, logprobs=running.logprobs)
    for weights, right, wrong in ((old, [over, first], [fresh, last]), (new, [fresh, last], [over, first])):
        put(kit, weights)
        assert max(gap(kit, session) for session in right) <= 1e-4
        assert min(gap(kit, session) for session in wrong) > 0.01
    named = [(t.version, t.version_last, t.step) for t in (s.trajectory() for s in (running, fresh, over))]
    assert named == [(3, 5, 0), (5, 5, 2), (3, 3, 0)]


def test_new_weights_wait_for_running_turns_and_new_turns_wait_for_the_weights(tmp_path):
    kit = Kit(make_model(tmp_path))
    sampler = kit.sampler(max_new_tokens=6)
    before = {name: p.detach().clone() for name, p in kit.model.named_parameters()}
    new = moved(kit, 1)
    first, second = new_session(0, prompt(0)), new_session(1, prompt(1))

    async def play() -> None:
        turns = [asyncio.create_task(sampler.act(first))]
        await asyncio.sleep(0)
        sampler.step()
        assert not sampler.update(new, WeightsVersion(5, 2))
        turns.append(asyncio.create_task(sampler.act(second)))
        await asyncio.sleep(0)
        while sampler.active:
            assert sampler.pending == 1 and not sampler.update(new, WeightsVersion(5, 2))
            sampler.step()
        assert sampler.pending == 0, "the second turn must wait for the weights"
        assert all(torch.equal(p, before[name]) for name, p in kit.model.named_parameters())
        assert sampler.update(new, WeightsVersion(5, 2))
        await drive(sampler, [asyncio.wait_for(turn, 20) for turn in turns])

    asyncio.run(play())
    assert gap(kit, first) <= 1e-4 and first.oldest == WeightsVersion(3, 0)
    put(kit, new)
    assert gap(kit, second) <= 1e-4 and second.oldest == second.newest == WeightsVersion(5, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"'model\.norm\.weight' is missing: expected float32 \[32\]"),
        (
            {"model.norm.weight": torch.ones(31)},
            r"'model\.norm\.weight' is float32 \[31\]: expected float32 \[32\], as in the model",
        ),
        (
            {"model.norm.weight": torch.ones(32).double()},
            r"'model\.norm\.weight' is float64 \[32\]: expected float32 \[32\]",
        ),
        (
            {"lm_head.weight": torch.ones(257, 32)},
            r"'lm_head\.weight' is float32 \[257, 32\]: expected no such weight, as in the model",
        ),
    ],
    ids=["missing", "shape", "dtype", "too many"],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_remain(kit, change, message):
    sampler = kit.sampler()
    before = {name: p.detach().clone() for name, p in kit.model.named_parameters()}
    tensors = {name: t for name, t in (moved(kit, 1) | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        sampler.update(tensors, WeightsVersion(5, 2))
    assert all(torch.equal(p, before[name]) for name, p in kit.model.named_parameters())
    assert sampler.version == WeightsVersion(3, 0) and not sampler.held


def test_a_session_names_its_oldest_and_newest_weights_even_after_a_rewind():
    session = new_session(0, prompt(0))
    seen = []
    for version in map(WeightsVersion.parse, ("4/2", "6/3", "2/1", "5/3")):  # nothing is sampled with the first
        session.begin_turn(version)
        seen.append((str(session.oldest), str(session.newest)))
        if len(seen) > 1:
            session.append([1], [-1.0])
    assert seen == [("4/2", "4/2"), ("6/3", "6/3"), ("2/1", "6/3"), ("2/1", "6/3")]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_given_tokens_are_the_plain_models_and_disturb_no_turn(kit, temperature):
    sampler = kit.sampler(temperature=temperature, top_p=0.5)
    tokens, beside = prompt(3, 30), new_session(0, prompt(0))

    async def play() -> list[float]:
        turn = asyncio.create_task(sampler.act(beside))
        await asyncio.sleep(0)
        sampler.step()
        given = sampler.logprobs(tokens)
        await drive(sampler, [asyncio.wait_for(turn, 20)])
        sampler.close(beside)
        return given

    given = asyncio.run(play())
    truth = (kit.logits(tokens)[:-1] / temperature).log_softmax(-1)[torch.arange(29), torch.tensor(tokens[1:])]
    np.testing.assert_allclose(given, truth.numpy(), atol=1e-4)
    assert gap(kit, beside, temperature, 0.5) <= 1e-4


# ---- where a turn ends, with a tokenizer whose tokens hold newlines, several characters and parts of characters


class Scripted:
    """Replace `draw` by the tokens of a turn, in order."""

    def __init__(self, tokens: list[int]):
        self.tokens = iter(tokens)

    def __call__(self, logits_RV, *_):
        return [next(self.tokens)], [-1.0]


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map(lambda parts: [i for part in parts for i in part]),
    st.lists(st.sampled_from(["\n", "\n\n", "é", "€", "🙂", "€\n", "</s>", "bé", "ab\na", "a€"]), max_size=3),
    st.integers(1, 12),
    st.integers(2, 14),
)
@example([2, 4, 5, 3], ["é"], 9, 14)
@example([2, 6, 17, 3], ["€"], 9, 14)
@example([2, 15, 16, 3], ["</s>"], 9, 14)
@example([2, 3], [], 9, 2)
def test_a_turn_ends_at_its_first_stop_string_end_of_sequence_or_limit(kit, tokens, stop, max_new, max_context):
    begin, max_new = 2, min(max_new, len(tokens))
    limit = min(max_new, max_context - begin)
    sampler = kit.sampler(tokenizer=RAGGED, stop=stop, max_new_tokens=max_new, max_context=max_context)
    session = new_session(0, prompt(0, begin))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "draw", Scripted(tokens))
        turn = one(sampler, session)
    ends = [n for n in range(1, limit + 1) if any(s in RAGGED.decode(tokens[:n]) for s in stop) or tokens[n - 1] == 0]
    length = ends[0] if ends else limit
    assert session.tokens[begin:] == tokens[:length] and turn.tokens == length
    assert turn.truncated == (not ends)
    assert turn.text == RAGGED.decode([token for token in tokens[:length] if token])  # the end token is not text


def test_a_context_without_room_adds_nothing_and_is_truncated(kit):
    session = new_session(0, prompt(0, 20))
    assert one(kit.sampler(max_context=20), session) == Completion("", 0, truncated=True)
    assert len(session.tokens) == 20


# ---- draw

finite = st.floats(-60, 60, width=32)
logit = st.one_of(finite, st.sampled_from([0.0, -1e4, 80.0, float("-inf")]))
uniform = st.one_of(st.floats(0, LAST), st.sampled_from([0.0, 2.0**-53, 0.5, LAST]))


def test_each_end_of_sequence_token_of_the_generation_config_ends_a_turn(kit, monkeypatch):
    def turn() -> list[int]:
        session = new_session(1, prompt(1))
        one(kit.sampler(max_new_tokens=12), session)
        return session.tokens[9:]

    free = turn()
    monkeypatch.setattr(kit.model, "generation_config", GenerationConfig(eos_token_id=[0, free[3]]))
    assert turn() == free[: free.index(free[3]) + 1] != free


def draw_one(logits: Sequence[float], uniforms: Sequence[float], temperature: float = 1.0, top_p: float = 1.0):
    logits_RV = torch.tensor([list(logits)] * len(uniforms), dtype=torch.float32)
    return draw(logits_RV, temperature, top_p, list(uniforms), [False] * len(uniforms))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_draws_follow_the_exact_probabilities(temperature, top_p):
    logits = [1.0, -0.5, float("-inf"), 2.0, 0.0, 2.0, -1.5]
    probs = true_logps(torch.tensor([logits]), temperature, top_p)[0].exp().numpy()
    count = 20000
    tokens, logps = draw_one(logits, np.random.default_rng(0).random(count), temperature, top_p)
    seen = np.bincount(tokens, minlength=len(logits))
    assert not seen[probs == 0].any()
    possible = probs > 0
    chi_square = ((seen - count * probs)[possible] ** 2 / (count * probs[possible])).sum()
    assert chi_square < 30  # the 99.99 % quantile of chi-square with 6 degrees of freedom is 28
    np.testing.assert_allclose(logps, np.log(probs[tokens]), atol=1e-6)


@settings(max_examples=300)
@given(
    st.lists(logit, min_size=1, max_size=40).filter(lambda row: max(row) > float("-inf")),
    st.lists(uniform, min_size=1, max_size=5),
    st.sampled_from([1e-3, 0.3, 1.0, 5.0, 1e3]),
    st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
)
def test_a_draw_inverts_the_cumulative_probabilities_for_any_logits(logits, uniforms, temperature, top_p):
    tokens, logps = draw_one(logits, uniforms, temperature, top_p)
    true_V = (torch.tensor(logits) / temperature).double().log_softmax(-1)
    for token, logp, u in zip(tokens, logps, uniforms, strict=True):
        assert logits[token] > float("-inf") and np.isfinite(logp) and logp <= 1e-6
        assert logp >= float(true_V[token]) - 1e-3  # the cut raises the kept probabilities
        if top_p == 1:
            below, p = float(true_V[:token].exp().sum()), float(true_V[token].exp())
            assert below - 1e-5 <= u <= below + p + 1e-5
            assert logp == pytest.approx(float(true_V[token]), rel=1e-5, abs=1e-4)
        else:
            likelier = float(true_V[true_V > true_V[token] + 1e-5].exp().sum())
            assert likelier < top_p + 1e-5


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("width", [2, 257, 151_936])
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_token(width, on_a_gpu, monkeypatch):
    if on_a_gpu:
        monkeypatch.setattr(in_process, "running_sum", advantages._whole_running_sum)
    logits_RV = torch.zeros(3, width)
    logits_RV[1, 0] = logits_RV[1, -1] = float("-inf")
    logits_RV[1, width // 2 :] = torch.where(torch.arange(width)[width // 2 :] == width // 2, 0.0, float("-inf"))
    logits_RV[2, width // 2] = 1000.0  # everything else underflows
    first, _ = draw(logits_RV, 1.0, 1.0, [0.0] * 3, [False] * 3)
    last, _ = draw(logits_RV, 1.0, 1.0, [LAST] * 3, [False] * 3)
    if width > 2:
        assert first == [0, 1, width // 2] and last[1:] == [width // 2, width // 2]
    assert last[0] >= width * (1 - 1e-4) - 1 and last[0] < width


def test_draws_with_the_running_sum_of_a_gpu_are_those_of_a_cpu(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(64, 501, generator=generator) * 3
    uniforms = torch.rand(64, generator=generator).tolist()
    for top_p in (1.0, 0.7):
        on_cpu = draw(logits_RV, 0.8, top_p, uniforms, [False] * 64)
        with monkeypatch.context() as patch:
            patch.setattr(in_process, "running_sum", advantages._whole_running_sum)
            assert draw(logits_RV, 0.8, top_p, uniforms, [False] * 64) == on_cpu


def test_greedy_and_sampled_rows_may_be_mixed():
    logits_RV = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    tokens, logps = draw(logits_RV, 5.0, 0.99, [0.0, 0.0], [True, False])
    assert tokens == [1, 0] and logps[0] == 0.0
    assert logps[1] == pytest.approx(float((logits_RV[0] / 5).log_softmax(-1)[0]), abs=1e-6)


def test_a_growing_cache_keeps_its_content_and_stays_within_the_context():
    cache = KVCache(slots=3, most_tokens=300)
    cache.reserve(5)
    shapes = {0: ((2, 7, 8), (2, 7, 8)), 1: ((1, 7, 12), (1, 7, 4))}  # layers may differ in heads and sizes
    held = {layer: cache.layer(layer, *map(torch.randn, sizes)) for layer, sizes in shapes.items()}
    for tensors in held.values():
        for x in tensors:
            x.normal_()
    before = {layer: [x.clone() for x in tensors] for layer, tensors in held.items()}
    cache.reserve(129)
    for layer, (k, v) in before.items():
        for old, grown in zip((k, v), cache.layer(layer, k[0], v[0]), strict=True):
            assert grown.shape[:2] == old.shape[:2] and 129 <= grown.shape[2] <= 300 and grown.shape[3] == old.shape[3]
            assert torch.equal(grown[:, :, : old.shape[2]], old) and not grown[:, :, old.shape[2] :].any()
    cache.reserve(300)


class Reads(TorchDispatchMode):
    """Collect the operations for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name.startswith("index") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero") or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing_in_the_middle_of_a_step(kit: Kit) -> None:
    sampler = kit.sampler()
    step = sampler.step

    def watched() -> None:
        with Reads() as reads:
            step()
        assert not reads.found

    sampler.step = watched  # type: ignore[method-assign]
    sessions = [new_session(n, prompt(n % 2, 3 + n % 2)) for n in range(4)]
    assert all(len(turns) == 2 for turns in run(sampler, sessions, [[5, 6]]))
