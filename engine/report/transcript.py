"""Print whole episodes: which agent called which, what each wrote and was shown, what its calls counted.

The texts are the decoded token ids of the recording; reward, advantage and multiplicity are computed as in the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.batch.advantages import main_reward, weigh
from mgrpo.engine.config.schema import Config
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.model.pieces import for_pieces
from mgrpo.engine.run.directory import root_of
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.store import CallRecord, Group, RolloutRecord
from mgrpo.engine.store.open import open_copy
from mgrpo.engine.system.words import counted
from mgrpo.engine.types import MAIN, Trajectory

COLUMN = 40  # characters: the least width of an episode that is printed beside another
Key = tuple[str, int, int]  # of a call: agent, rollout, call
Weight = tuple[float, float, float]  # reward, advantage, multiplicity


class Transcripts:
    """Print recorded rl episodes of a run directory."""

    def __init__(self, run: Path, config: Config) -> None:
        self.run, self.config = run, config
        self.tokenizers = {name: for_pieces(load_tokenizer(name, agent)) for name, agent in config.agents.items()}

    def show(self, console: Console, count: int, queries: Sequence[int]) -> None:
        """Print `count` episodes of a query, from the best to the worst.

        The query is the first whose rewards differ, or else the first. Raises ValueError if it was not sampled, or if
        its tokens are missing.
        """
        query, rollouts, calls = self._find(queries)
        weights = weights_of(self.config, query, rollouts, calls)
        some = spread(rollouts, self.config, count)
        asked = f"query {query}"
        if self.config.colocated:  # in other topologies groups are dropped and replaced, and agents differ
            asked += f" of rl step {query // self.config.queries_per_step}"
        console.print(Text(f"{asked}: {len(some)} of {len(rollouts)} rollouts", style="bold"))
        marks = ("<<", ">>") if console.color_system is None else ("", "")
        written, shown = sampled_text("so", marks), Text("so", style="dim")
        console.print(Text.assemble("written by the agent itself: ", written, "; shown to it: ", shown))
        episodes = [self._episode(rollout, calls, weights, marks) for rollout in some]
        beside = max(1, console.width // COLUMN)
        for first in range(0, len(episodes), beside):
            console.print(side_by_side(episodes[first : first + beside]))

    def _find(self, queries: Sequence[int]) -> tuple[int, list[RolloutRecord], list[CallRecord]]:
        """Choose the query to show, and return it with its records."""
        with open_copy(self.config, self.run) as store:
            rollouts = {query: store.groups.rollouts_of(query) for query in queries}
            query = next((query for query in queries if self._differ(rollouts[query])), queries[0])
            calls = store.groups.calls_of(query)
        if not rollouts[query]:
            each = self.config.queries_per_step
            raise ValueError(
                f"query: {query} given, expected one that was sampled (step s asks {each} from {each} s on)"
            )
        return query, rollouts[query], calls

    def _differ(self, rollouts: Sequence[RolloutRecord]) -> bool:
        return len({main_reward(r, self.config.reward) for r in rollouts if r.status == "scored"}) > 1

    def _episode(
        self, rollout: RolloutRecord, calls: Sequence[CallRecord], weights: dict[Key, Weight], marks: tuple[str, str]
    ) -> RenderableType:
        """Lay out the main agent's call, then its calls of each sub-agent."""
        order = [MAIN, *self.config.subs]
        mine = sorted((c for c in calls if c.rollout == rollout.rollout), key=lambda call: order.index(call.agent))
        root, digests = root_of(self.config, "trajectories", self.run), [call.sampler_digest for call in mine]
        trajectories = read(root, [call.position for call in mine], digests)
        scored = rollout.status == "scored"
        found = f"correct {rollout.correct:g}" if scored else f"{rollout.status}: {visible(rollout.error)}"
        head = Text(f"rollout {rollout.rollout}: {found}, {rollout.seconds:.1f} s", style="bold")
        panels = [
            self._panel(call, trajectory, weights.get((call.agent, call.rollout, call.call)), marks)
            for call, trajectory in zip(mine, trajectories, strict=True)
        ]
        return Stack(head, *panels)

    def _panel(self, call: CallRecord, trajectory: Trajectory, weight: Weight | None, marks: tuple[str, str]) -> Panel:
        who = MAIN if call.agent == MAIN else f"{MAIN} -> {call.agent}, call {call.call + 1}"
        size = f"{counted(call.tokens, 'token')}, {counted(call.turns, 'turn')}"
        facts = f"{size}, ended by {call.ended or 'an error'}, weights {call.version}"
        text = Text.assemble((judged(call, weight), "cyan"), "\n", (facts, "cyan"), "\n\n")
        text.append_text(written(trajectory, self.tokenizers[call.agent], marks))
        return Panel(text, title=Text(who), title_align="left")


def weights_of(
    config: Config, query: int, rollouts: Sequence[RolloutRecord], calls: Sequence[CallRecord]
) -> dict[Key, Weight]:
    """Return reward, advantage and multiplicity of every call in the query's scored rollouts, as the trainer does."""
    found: dict[Key, Weight] = {}
    for index, name in enumerate(config.agents):
        group = Group(query, "", 0, list(rollouts), [call for call in calls if call.agent == name])
        credit = weigh(name, index, [group], config.algorithm, config.reward, config.seed)
        rows = zip(credit.rewards, credit.adv, credit.multiplicities, strict=True)
        for call, (reward, advantage, copies) in zip(credit.calls, rows, strict=True):
            found[call.agent, call.rollout, call.call] = (float(reward), float(advantage), float(copies))
    return found


def spread(rollouts: Sequence[RolloutRecord], config: Config, count: int) -> list[RolloutRecord]:
    """Choose `count` rollouts, evenly from the best to the worst reward; unscored ones only if there are too few."""
    scored = [r for r in rollouts if r.status == "scored"]
    ranked = sorted(scored, key=lambda r: main_reward(r, config.reward), reverse=True)
    if len(ranked) < count:
        return (ranked + [r for r in rollouts if r.status != "scored"])[:count]
    places = np.linspace(0, len(ranked) - 1, count).round().astype(int)
    return [ranked[place] for place in places]


def written(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> Text:
    """Return the text of a call, in which what the agent sampled differs from what it was shown.

    tokenizer: as `for_pieces` returns it. marks: put around sampled text if there are no colours.
    """
    text = Text()
    for first, last in runs(trajectory.sampled):
        ids = trajectory.tokens[first:last].tolist()
        words = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(words, str)  # a list, for a list of lists
        shown = visible(words)
        text.append_text(sampled_text(shown, marks) if trajectory.sampled[first] else Text(shown, style="dim"))
    return text


def runs(flags_L: np.ndarray) -> list[tuple[int, int]]:
    """Return [first, last) of each run of equal flags, in order."""
    edges = np.flatnonzero(np.diff(flags_L.astype(np.int8))) + 1
    return list(pairwise([0, *edges.tolist(), len(flags_L)])) if len(flags_L) else []


def visible(text: str) -> str:
    """Escape unprintable characters, because a model may write codes that control a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def sampled_text(words: str, marks: tuple[str, str]) -> Text:
    """Style text that the agent sampled, between marks if there are no colours."""
    return Text(f"{marks[0]}{words}{marks[1]}", style="bold green")


def judged(call: CallRecord, weight: Weight | None) -> str:
    """Say what a call counts in training."""
    if weight is None:
        return "not trained on"
    reward, advantage, copies = weight
    expert = "" if call.expert is None else f"expert {call.expert:.2f}, "
    counts = "" if call.agent == MAIN else f", counts {copies:g}x"
    return f"{'' if call.format else 'format invalid, '}{expert}reward {reward:.2f}, advantage {advantage:+.2f}{counts}"


def side_by_side(columns: Sequence[RenderableType]) -> Table:
    """Lay out episodes as columns of equal width."""
    grid = Table.grid(expand=True)
    for _ in columns:
        grid.add_column(ratio=1)
    grid.add_row(*columns)
    return grid
