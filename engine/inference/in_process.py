"""Batched sampling inside the process.

It advances all waiting calls together, one token a step, over a flat row of exactly the tokens that are new (prompts,
observations and single tokens side by side: no padding enters a matmul). Keys and values stay in the cache across the
turns of a call, and a prompt that a live call already holds is copied, not computed again: the K rollouts of a query
cost one prefill. New weights come in between turns; what the old ones cached is then computed anew.

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
from mgrpo.engine.inference.kv_cache import CachedLayout, KVCache
from mgrpo.engine.inference.sampler import Completion, Ending, Session
from mgrpo.engine.model.attention import hidden_states

NO_PROMPT = b""  # of a slot that no other call may copy: every prompt has a token
UNIFORM_MAX = 1 - 2.0**-22  # keeps uniform * total below total in float32


@dataclass
class _Row:
    """A session that waits for its next token, and where it stands in the cache."""

    session: Session
    result: asyncio.Future[Completion]
    begin: int  # where in session.tokens this turn began
    allowed: int  # tokens it may still sample


class InProcessSampler:
    """Samples from a transformers model that lives in this process (and is, perhaps, being trained in it)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        agent: AgentConfig,
        concurrency: int,
        version: int = 0,
        weights_step: int = 0,
    ):
        self.model, self.tokenizer, self.agent, self.concurrency = model, tokenizer, agent, concurrency
        self.version, self.weights_step = version, weights_step
        self.held = False  # new weights wait for the running turns to end; no new turn begins
        self.waiting: deque[_Row] = deque()
        self.active: list[_Row] = []
        self.slots: dict[int, int] = {}  # id of a session -> its slot
        self.cached: dict[int, int] = {}  # slot -> tokens it holds
        self.prompts: dict[int, bytes] = {}  # slot -> the prompt it begins with
        self.ending = Ending(tokenizer, agent.stop)
        self.cache = KVCache(model, concurrency, agent.max_context)

    @property
    def pending(self) -> int:
        """Calls that `step` would advance: those with a slot, and as many new ones as there are slots free."""
        if self.held:
            return len(self.active)
        fresh = sum(id(row.session) not in self.slots for row in self.waiting)
        free = self.concurrency - len(self.slots)
        return len(self.active) + len(self.waiting) - fresh + min(fresh, free)

    async def act(self, session: Session) -> Completion:
        """Sample until a stop string, the end-of-sequence token or a limit; the tokens are appended to the session."""
        begin = len(session.tokens)
        allowed = min(self.agent.max_new_tokens, self.agent.max_context - begin)
        if allowed < 1:
            return Completion("", 0, truncated=True)
        row = _Row(session, asyncio.get_running_loop().create_future(), begin, allowed)
        self.waiting.append(row)
        return await row.result

    def close(self, session: Session) -> None:
        """The session is over, perhaps in the middle of a turn: its slot is free."""
        self.active = [row for row in self.active if row.session is not session]
        self.waiting = deque(row for row in self.waiting if row.session is not session)
        slot = self.slots.pop(id(session), None)
        if slot is not None:
            del self.cached[slot]
            del self.prompts[slot]

    def release_cache(self) -> None:
        """Give the cache's memory back between rollouts, and forget what was computed with weights that will move."""
        assert not self.pending and not self.slots
        self.cache = KVCache(self.model, self.concurrency, self.agent.max_context)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], version: int, weights_step: int) -> bool:
        """Copy new weights into the model if no turn is running. False: not yet, and until then no new turn begins.

        tensors: of each of the model's parameters one, of its shape and dtype; a tied head has none of its own. Calls
        between turns go on with the new weights: their keys and values are computed anew, from their tokens. Raises
        ValueError that names a tensor which does not fit; the model then keeps the weights it has.
        """
        parameters = dict(self.model.named_parameters())
        check_fit(parameters, tensors)
        self.held = bool(self.active)
        if self.held:
            return False
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        self.version, self.weights_step = version, weights_step
        self.cached = dict.fromkeys(self.cached, 0)
        self.prompts = dict.fromkeys(self.prompts, NO_PROMPT)
        return True

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p of each token but the first given those before it, at the agent's temperature, not cut to top_p."""
        cache = KVCache(self.model, 1, len(tokens))
        cache.reserve(len(tokens))
        layout = CachedLayout(cache, [0], [0], [len(tokens)])
        ids_T = torch.tensor(tokens, device=self.model.device)
        logits_TV = self._logits(hidden_states(self.model, ids_T, layout.positions_T, layout)[:-1])
        logps_TV = (logits_TV / self.agent.temperature).log_softmax(-1)
        return logps_TV.gather(-1, ids_T[1:, None])[:, 0].tolist()

    @torch.no_grad()
    def step(self) -> None:
        """One token for every call that can be advanced."""
        self._admit()
        rows = self.active
        assert rows, "step without pending calls"
        slots = [self.slots[id(row.session)] for row in rows]
        starts = [self.cached[slot] for slot in slots]
        new = [row.session.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        self.cache.reserve(max(len(row.session.tokens) for row in rows))
        layout = CachedLayout(self.cache, slots, starts, [len(ids) for ids in new])
        ids_T = torch.tensor([token for ids in new for token in ids], device=self.model.device)
        hidden_TH = hidden_states(self.model, ids_T, layout.positions_T, layout)
        last_R = torch.tensor([len(ids) for ids in new], device=ids_T.device).cumsum(0) - 1
        logits_RV = self._logits(hidden_TH[last_R])
        for slot, row in zip(slots, rows, strict=True):
            self.cached[slot] = len(row.session.tokens)
        uniforms_R = [0.0 if row.session.greedy else row.session.random.random() for row in rows]
        tokens, logprobs = draw(
            logits_RV, self.agent.temperature, self.agent.top_p, uniforms_R, [row.session.greedy for row in rows]
        )
        self.active = [
            row for row, token, logp in zip(rows, tokens, logprobs, strict=True) if not self._take(row, token, logp)
        ]

    def _logits(self, hidden_RH: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return F.linear(hidden_RH, head.weight, head.bias).float()

    def _admit(self) -> None:
        """Give waiting calls a slot. One whose prompt is being computed in this very step waits for the next."""
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
                row.session.begin_turn(self.version, self.weights_step)
                self.active.append(row)
        self.waiting = kept

    def _place(self, session: Session, computing: set[bytes]) -> bool:
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
        else:  # all but the last token, whose logits are needed
            self.cache.reserve(len(session.tokens))
            self.cache.copy(holder, slot, len(session.tokens) - 1)
            self.cached[slot] = len(session.tokens) - 1
        self.slots[id(session)] = slot
        return True

    def _take(self, row: _Row, token: int, logprob: float) -> bool:
        """Append a sampled token; true if the turn ended with it."""
        session = row.session
        session.append([token], [logprob])
        turn = session.tokens[row.begin :]
        stopped = self.ending.reached(turn)
        if not stopped and len(turn) < row.allowed:
            return False
        row.result.set_result(Completion(self.ending.text(turn), len(turn), truncated=not stopped))
        return True


def check_fit(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first of the tensors that is missing, too many, or of another shape or dtype."""
    wanted, given = ({name: (tuple(t.shape), t.dtype) for name, t in of.items()} for of in (parameters, tensors))
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(f"weights: {name!r} is {given.get(name)}: expected {wanted.get(name)}, as the model has")


def draw(
    logits_RV: Tensor, temperature: float, top_p: float, uniforms_R: list[float], greedy_R: list[bool]
) -> tuple[list[int], list[float]]:
    """Draw one token per row by inverting the cumulated probabilities of softmax(logits / temperature) cut to top_p.

    logits float32; uniforms in [0, 1). Returns the tokens and their log-probs under the very distribution drawn from:
    after temperature and top-p; 0 for greedy rows, which have no choice.
    """
    greedy = torch.tensor(greedy_R, device=logits_RV.device)
    best_R = logits_RV.argmax(-1)
    logps_RV = (logits_RV / temperature).log_softmax(-1)
    if top_p < 1:
        logps_RV = _cut(logps_RV, top_p)
    cumulated_RV = logps_RV.exp().cumsum(-1)
    uniforms = torch.tensor(uniforms_R, dtype=torch.float32, device=logits_RV.device).clamp(max=UNIFORM_MAX)
    threshold_R1 = uniforms[:, None] * cumulated_RV[:, -1:]
    tokens_R = torch.where(greedy, best_R, torch.searchsorted(cumulated_RV, threshold_R1, right=True)[:, 0])
    logps_R = logps_RV.gather(-1, tokens_R[:, None])[:, 0].masked_fill(greedy, 0.0)
    return tokens_R.tolist(), logps_R.tolist()


def _cut(logps_RV: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probability reaches top_p, and renormalise."""
    ordered_RV, order_RV = logps_RV.sort(-1, descending=True)
    before_RV = ordered_RV.exp().cumsum(-1) - ordered_RV.exp()
    kept_RV = ordered_RV.masked_fill(before_RV >= top_p, float("-inf")).log_softmax(-1)
    return torch.empty_like(logps_RV).scatter_(-1, order_RV, kept_RV)
