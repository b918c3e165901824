"""Sample many calls together inside this process.

Each step advances all waiting calls by one token, over a flat row that holds only the new tokens: prompts, observations
and single tokens stand side by side, and no padding enters a matmul. Keys and values stay in the cache across the turns
of a call. A prompt that a live call already holds is copied instead of computed, so the K rollouts of a query cost one
prefill. New weights are loaded between turns; the keys and values that old weights computed are then computed again.

Legend: T new tokens of a step, R calls in it, V vocabulary, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.inference.check import check_sampler
from mgrpo.engine.inference.kv_cache import CachedLayout, KVCache
from mgrpo.engine.inference.manifest import manifest_of, misfit
from mgrpo.engine.inference.sampler import Completion, Ending, Session
from mgrpo.engine.model.attention import hidden_states, output_head
from mgrpo.engine.model.logits import logit_map
from mgrpo.engine.model.pieces import end_tokens
from mgrpo.engine.system.device import send
from mgrpo.engine.types import INITIAL_WEIGHTS, WeightsVersion
from mgrpo.kernels import running_sum

NO_PROMPT = b""  # marks a slot whose prompt must not be copied; a real prompt has at least one token
UNIFORM_MAX = 1 - 2.0**-22  # keeps uniform * total below total in float32


@dataclass
class _Row:
    """Describe a session that waits for the next token of its turn."""

    session: Session
    result: asyncio.Future[Completion]
    begin: int  # the turn's first position in session.tokens
    allowed: int  # the most tokens that the turn may sample


class InProcessSampler:
    """Sample from a transformers model that lives in this process, and may be in training here.

    concurrency: calls that are sampled at the same time. version: of the model's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        agent: AgentConfig,
        concurrency: int,
        version: WeightsVersion = INITIAL_WEIGHTS,
    ):
        self.model, self.tokenizer, self.agent, self.concurrency = model, tokenizer, agent, concurrency
        self.version = version
        self.held = False  # new weights wait until the running turns end, and no new turn begins
        self.waiting: deque[_Row] = deque()
        self.active: list[_Row] = []
        self.slots: dict[int, int] = {}  # slot of each session, by the session's id
        self.cached: dict[int, int] = {}  # number of tokens that each used slot holds
        self.prompts: dict[int, bytes] = {}  # prompt at the start of each used slot
        self.ending = Ending(tokenizer, agent.stop, end_tokens(tokenizer, model.generation_config))
        check_sampler(model, agent.max_context)
        self.cache = KVCache(concurrency, agent.max_context)

    @property
    def pending(self) -> int:
        """The number of calls that `step` would advance: those with a slot, and new ones as far as slots are free."""
        if self.held:
            return len(self.active)
        fresh = sum(id(row.session) not in self.slots for row in self.waiting)
        free = self.concurrency - len(self.slots)
        return len(self.active) + len(self.waiting) - fresh + min(fresh, free)

    async def act(self, session: Session) -> Completion:
        """Sample until a stop string, an end-of-sequence token or a limit, and append the tokens to the session."""
        begin = len(session.tokens)
        allowed = min(self.agent.max_new_tokens, self.agent.max_context - begin)
        if allowed < 1:
            return Completion("", 0, truncated=True)
        row = _Row(session, asyncio.get_running_loop().create_future(), begin, allowed)
        self.waiting.append(row)
        return await row.result

    def close(self, session: Session) -> None:
        """End a session, perhaps in the middle of a turn, and free its slot."""
        self.active = [row for row in self.active if row.session is not session]
        self.waiting = deque(row for row in self.waiting if row.session is not session)
        slot = self.slots.pop(id(session), None)
        if slot is not None:
            del self.cached[slot]
            del self.prompts[slot]
            self.cache.forget(slot)

    def release_cache(self) -> None:
        """Free the cache's memory between rollouts, since the weights that computed its content will change."""
        assert not self.pending and not self.slots
        self.cache = KVCache(self.concurrency, self.agent.max_context)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], version: WeightsVersion) -> bool:
        """Copy new weights into the model if no turn is running. Return False if one is; no new turn begins then.

        tensors: one for each of the model's parameters, of the same shape and dtype; a tied head is not among them.
        Calls that are between turns continue with the new weights: their keys and values are computed again from their
        tokens. Raises ValueError naming the first tensor that does not fit; the model then keeps its weights.
        """
        parameters = dict(self.model.named_parameters())
        if error := misfit(manifest_of(parameters), manifest_of(tensors)):
            raise ValueError(error)
        self.held = bool(self.active)
        if self.held:
            return False
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        self.version = version
        self.cached = dict.fromkeys(self.cached, 0)
        self.prompts = dict.fromkeys(self.prompts, NO_PROMPT)
        return True

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return log p of each token but the first, given those before it, at the agent's temperature without top_p."""
        cache = KVCache(1, len(tokens))
        cache.reserve(len(tokens))
        layout = CachedLayout(cache, [0], [0], [len(tokens)], self.model.device)
        ids_T = torch.tensor(tokens, device=self.model.device)
        logits_TV = self._logits(hidden_states(self.model, ids_T, layout.positions_T, layout)[:-1])
        logps_TV = (logits_TV / self.agent.temperature).log_softmax(-1)
        return logps_TV.gather(-1, ids_T[1:, None])[:, 0].tolist()

    @torch.no_grad()
    def step(self) -> None:
        """Sample one token for every call that can be advanced."""
        self._admit()
        rows = self.active
        assert rows, "step without pending calls"
        slots = [self.slots[id(row.session)] for row in rows]
        starts = [self.cached[slot] for slot in slots]
        new = [row.session.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        self.cache.reserve(max(len(row.session.tokens) for row in rows))
        layout = CachedLayout(self.cache, slots, starts, [len(ids) for ids in new], self.model.device)
        (ids_T,) = send([np.concatenate([np.array(ids, np.int64) for ids in new])], self.model.device)
        hidden_TH = hidden_states(self.model, ids_T, layout.positions_T, layout)
        logits_RV = self._logits(hidden_TH[layout.last_R])
        for slot, row in zip(slots, rows, strict=True):
            self.cached[slot] = len(row.session.tokens)
        uniforms_R = [0.0 if row.session.greedy else row.session.random.random() for row in rows]
        tokens, logprobs = draw(
            logits_RV, self._temperature(rows), self.agent.top_p, uniforms_R, [row.session.greedy for row in rows]
        )
        self.active = [
            row for row, token, logp in zip(rows, tokens, logprobs, strict=True) if not self._take(row, token, logp)
        ]

    def _temperature(self, rows: Sequence[_Row]) -> float | Tensor:
        """Return what the rows' logits are divided by: a number or, if their sessions differ, (R, 1)."""
        own = self.agent.temperature
        given = [own if row.session.temperature is None else row.session.temperature for row in rows]
        return given[0] if len(set(given)) == 1 else torch.tensor(given, device=self.model.device)[:, None]

    def _logits(self, hidden_RH: Tensor) -> Tensor:
        head = output_head(self.model)
        return logit_map(self.model)(F.linear(hidden_RH, head.weight, head.bias).float())

    def _admit(self) -> None:
        """Give waiting calls a slot. A call whose prompt is computed in this step waits for the next, to copy it."""
        if self.held:
            return
        computing: set[bytes] = set()
        kept: deque[_Row] = deque()
        while self.waiting:
            row = self.waiting.popleft()
            fresh = id(row.session) not in self.slots
            if fresh and not self._place(row.session, computing):
                kept.append(row)
            else:
                row.session.begin_turn(self.version)
                self.active.append(row)
        self.waiting = kept

    def _place(self, session: Session, computing: set[bytes]) -> bool:
        """Give a new session a slot, if one is free and its prompt is not being computed. Return whether it has one."""
        if len(self.slots) >= self.concurrency:
            return False
        prompt = np.array(session.tokens, np.int32).tobytes()
        if prompt in computing:
            return False
        slot = next(slot for slot in range(self.concurrency) if slot not in self.cached)
        holder = next((held for held, begins in self.prompts.items() if begins == prompt), None)
        self.prompts[slot] = prompt
        if holder is None:
            computing.add(prompt)
            self.cached[slot] = 0
        else:  # the last token is computed, because its logits are needed
            self.cache.reserve(len(session.tokens))
            self.cache.copy(holder, slot, len(session.tokens) - 1)
            self.cached[slot] = len(session.tokens) - 1
        self.slots[id(session)] = slot
        return True

    def _take(self, row: _Row, token: int, logprob: float) -> bool:
        """Append a sampled token. Return whether the turn ended with it."""
        session = row.session
        session.append([token], [logprob])
        turn = session.tokens[row.begin :]
        stopped = self.ending.reached(turn)
        if not stopped and len(turn) < row.allowed:
            return False
        if not row.result.done():  # else its episode was given up since the loop last turned
            row.result.set_result(Completion(self.ending.text(turn), len(turn), truncated=not stopped))
        return True


def draw(
    logits_RV: Tensor, temperature: float | Tensor, top_p: float, uniforms_R: list[float], greedy_R: list[bool]
) -> tuple[list[int], list[float]]:
    """Draw one token per row by inverting the cumulative probabilities of softmax(logits / temperature) cut to top_p.

    logits: (R, V) float32; uniforms: R numbers in [0, 1). Returns the tokens and their log-probs under the distribution
    they were drawn from, that is, after temperature and top_p. Greedy rows take the likeliest token, with log-prob 0.
    The host reads once, at the end.
    """
    uniforms, greedy = send([np.array(uniforms_R), np.array(greedy_R, np.float64)], logits_RV.device)
    best_R = logits_RV.argmax(-1)
    logps_RV = (logits_RV / temperature).log_softmax(-1)
    if top_p < 1:
        logps_RV = _cut(logps_RV, top_p)
    cumulative_RV = running_sum(logps_RV.exp())
    threshold_R1 = uniforms.to(cumulative_RV.dtype).clamp(max=UNIFORM_MAX)[:, None] * cumulative_RV[:, -1:]
    tokens_R = torch.where(greedy.bool(), best_R, torch.searchsorted(cumulative_RV, threshold_R1, right=True)[:, 0])
    logps_R = logps_RV.gather(-1, tokens_R[:, None])[:, 0].masked_fill(greedy.bool(), 0.0)
    tokens, logprobs = torch.stack([tokens_R.double(), logps_R.double()]).tolist()  # float64 holds both exactly
    return list(map(int, tokens)), logprobs


def _cut(logps_RV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches top_p, and renormalise."""
    ordered_RV, order_RV = logps_RV.sort(-1, descending=True)
    before_RV = running_sum(ordered_RV.exp()) - ordered_RV.exp()
    kept_RV = ordered_RV.masked_fill(before_RV >= top_p, float("-inf")).log_softmax(-1)
    return torch.empty_like(logps_RV).scatter_(-1, order_RV, kept_RV)
