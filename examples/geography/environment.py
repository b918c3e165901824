"""Geography: multi-hop questions about countries, answered by a main agent and a sub-agent that can search.

Every action is one line, ended by a newline. The main agent writes `ask: <request>` (several requests, separated by
" ; ", run in parallel) and finally `answer: <text>`; the sub-agent writes `search: <query>` and finally
`report: <text>`. A search returns a card with three records of the gazetteer in alphabetical order, one right and two
distractors with similar names: the sub-agent has to pick the record and the field.

    main   Question: What currency is used in the country whose capital is Nairobi?
           ask: country of Nairobi
           reply: Kenya
           ask: currency of Kenya
           reply: Shilling
           answer: Shilling

In the arm "single" the main agent searches by itself and there is no sub-agent.

A training question searches only the training half of the gazetteer, so training never shows anything about a held-out
country, not even as a distractor. A held-out question searches the whole gazetteer. `prepare.py` writes the files.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mgrpo import (
    MAIN,
    Action,
    Answer,
    Call,
    CallScore,
    Delegate,
    Environment,
    Episode,
    Malformed,
    Score,
    Split,
    Task,
    ToolCall,
    ToolError,
    read_tasks,
)

SUB = "sub"
CARD = 3  # records that a search returns
MAX_REQUESTS = 4  # requests in one line
SEPARATOR = " ; "
UNKNOWN = "unknown"  # the answer of a demonstration that found nothing
RELATIONS = ("capital", "currency", "continent", "largest neighbour", "country")
KEYWORDS = {relation.split()[-1]: relation for relation in RELATIONS} | {"neighbor": "largest neighbour"}

Facts = Mapping[str, str]  # relation -> value


def fold(text: str) -> str:
    """Return a text without case, accents, punctuation and a leading "the", so that equal results mean the same."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    words = "".join(c if c.isalnum() else " " for c in plain).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] == "the" else words)


def card_line(name: str, facts: Facts) -> str:
    """Format a record as the agents see it: `Kenya: capital Nairobi, currency Shilling, …`."""
    return f"{name}: " + ", ".join(f"{relation} {value}" for relation, value in facts.items())


def read_card(text: str) -> dict[str, dict[str, str]]:
    """Parse the lines that `card_line` wrote into {name: {relation: value}}; skip all other lines."""
    card = {}
    for line in text.splitlines():
        name, _, rest = line.partition(": ")
        pairs = ((r, part[len(r) + 1 :]) for part in rest.split(", ") for r in RELATIONS if part.startswith(r + " "))
        if facts := dict(pairs):
            card[name] = facts
    return card


def chained(hops: Sequence[Facts], i: int) -> bool:
    """Return whether hop i starts from the value of hop i - 1; otherwise the question names its entity."""
    return i > 0 and hops[i]["entity"] == hops[i - 1]["value"]


def conclude(hops: Sequence[Facts], values: Sequence[str]) -> str:
    """Join the values found into the answer: the last value of each chain of hops."""
    return " and ".join(v for i, v in enumerate(values) if i + 1 >= len(hops) or not chained(hops, i + 1))


@dataclass(frozen=True)
class Record:
    """Describe a country or a city of the gazetteer."""

    name: str
    kind: str
    facts: Facts


@dataclass
class Book:
    """Hold records with a trigram index of their names, so that a search for a misspelt name finds similar ones."""

    records: Sequence[Record]  # in alphabetical order
    by_name: dict[str, Record] = field(init=False)  # folded name -> record
    postings: dict[str, list[int]] = field(init=False)  # trigram -> positions in records
    sizes: list[int] = field(init=False)  # trigrams of each record's name

    def __post_init__(self) -> None:
        self.by_name = {fold(record.name): record for record in self.records}
        assert len(self.by_name) == len(self.records), "names are unique"
        grams = [trigrams(name) for name in self.by_name]
        self.sizes = [len(each) for each in grams]
        self.postings = defaultdict(list)
        for i, each in enumerate(grams):
            for gram in each:
                self.postings[gram].append(i)

    def search(self, query: str) -> str:
        """Return the card around the record whose name is most similar to a query, or "" if none has a common trigram.

        Similarity is Dice's coefficient of the trigrams.
        """
        wanted = trigrams(fold(query[:80]))
        shared = Counter(chain.from_iterable(self.postings.get(gram, ()) for gram in wanted))
        if not shared:
            return ""
        ranked = sorted(shared, key=lambda i: (-shared[i] / (len(wanted) + self.sizes[i]), i))
        kind = self.records[ranked[0]].kind
        near = [i for i in ranked if self.records[i].kind == kind][:CARD]
        if len(near) < CARD:  # too few similar names: fill up with neighbours in the alphabet
            others = (i for i, r in enumerate(self.records) if r.kind == kind and i not in near)
            near += sorted(others, key=lambda i: abs(i - near[0]))[: CARD - len(near)]
        return "\n".join(card_line(self.records[i].name, self.records[i].facts) for i in sorted(near))

    def understand(self, request: str) -> tuple[Record | None, str | None]:
        """Return the record and the relation that a request is about.

        The relation is the first one named; the record is that of the longest name in the request whose record has this
        relation. The word "of" plays no role, because it occurs in names too.
        """
        words = fold(request).split()[:40]
        relation = next((KEYWORDS[word] for word in words if word in KEYWORDS), None)
        spans = ((i, i + n) for n in range(min(8, len(words)), 0, -1) for i in range(len(words) - n + 1))
        named = (self.by_name.get(" ".join(words[i:j])) for i, j in spans)
        return next((r for r in named if r and (relation is None or relation in r.facts)), None), relation


def trigrams(name: str) -> set[str]:
    """Return the trigrams of a folded name with marked ends; none for an empty name."""
    padded = f"  {name} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)} if name else set()


class Geography(Environment):
    """Ask geography questions and judge the answers.

    data: the folder that `prepare.py` wrote.
    arm: "co-train" and "main-only" are the same environment (only the set of trained agents differs); in "single" the
    main agent searches itself.
    carelessness: the share of *calls* in which `script` makes one plausible mistake (the main agent answers one hop
    early; the sub-agent reports another record's value). A hash of the task and the request decides which. Warm-up on
    such demonstrations leaves something for reinforcement learning to unlearn. An episode with d calls to the sub-agent
    contains a mistake with probability of about 1 - (1 - carelessness)^(1 + d).

    Raises ValueError for an unknown arm, a share outside [0, 1] and a folder without the data.
    """

    def __init__(
        self, data: str, arm: Literal["co-train", "main-only", "single"] = "co-train", carelessness: float = 0.0
    ) -> None:
        if arm not in ("co-train", "main-only", "single"):
            raise ValueError(f"arm: {arm!r}, expected 'co-train', 'main-only' or 'single'")
        if not 0 <= carelessness <= 1:
            raise ValueError(f"carelessness: {carelessness}, expected a share in [0, 1]")
        folder = Path(data)
        if not (folder / "gazetteer.json").exists():
            raise ValueError(f"data: {data!r} holds no gazetteer.json; run prepare.py --out {data}")
        self.arm, self.carelessness = arm, carelessness
        self._tasks = {split: read_tasks(folder / f"{split}.jsonl") for split in ("train", "held_out")}
        rows = json.loads((folder / "gazetteer.json").read_text(encoding="utf-8"))
        self._books = {"train": _book(row for row in rows if row["split"] == "train"), "held_out": _book(rows)}

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def prompt(self, call: Call) -> str:
        return f"Question: {call.task.data['question']}\n" if call.agent == MAIN else f"Request: {call.request}\n"

    def parse(self, call: Call, text: str) -> Action:
        verb, colon, rest = text.strip().partition(":")
        verb, rest = verb.strip().lower(), rest.strip()
        if not colon or verb not in self._verbs(call):
            return Malformed(f"expected a line that starts with one of {', '.join(self._verbs(call))}")
        if not rest or len(rest.splitlines()) > 1:
            return Malformed(f"expected one line of text after {verb}:")
        if verb in ("answer", "report"):
            return Answer(rest)
        parts = [part.strip() for part in rest.split(SEPARATOR.strip())]
        if not all(parts) or len(parts) > MAX_REQUESTS:
            return Malformed(f"expected 1 to {MAX_REQUESTS} texts, separated by {SEPARATOR.strip()!r}")
        return tuple(Delegate(SUB, part) if verb == "ask" else ToolCall("search", part) for part in parts)

    def tool(self, call: Call, use: ToolCall) -> str:
        if use.name != "search":
            return super().tool(call, use)
        card = self._book(call.task).search(use.argument)
        if not card:  # do not repeat the query: an agent's own words must never count as a finding
            raise ToolError("nothing found")
        return card

    def observation(self, call: Call, results: Sequence[tuple[ToolCall | Delegate, str]]) -> str:
        return "".join(
            f"{text}\n" if isinstance(action, ToolCall) else f"reply: {' '.join(text.split()) or UNKNOWN}\n"
            for action, text in results
        )

    def score(self, episode: Episode) -> Score:
        """Score an answer 1 if it equals the truth after folding, else 0; `expert` scores the sub-agent's calls."""
        answer, truth = episode.main.answer or "", episode.task.data["answer"]
        calls = tuple(CallScore(_well_formed(call), self.expert(call)) for call in episode.calls)
        return Score(_well_formed(episode.main), float(fold(answer) == fold(truth)), calls)

    def expert(self, call: Call) -> float:
        """Judge one sub-agent call by a rule: 1 if the report is right, 0.5 if it is only supported, else 0.

        A report is supported if it equals (folded) a name or a value on a card that a search of this call returned. It
        is right if it also equals the fact that the request asks for; a request that names no known fact has no right
        report. The rule tests equality, not containment: otherwise a report of the whole card would get the full score.
        """
        report = fold(call.answer or "")
        card = read_card("".join(turn.observation for turn in call.turns))
        if not report or report not in {fold(text) for name in card for text in (name, *card[name].values())}:
            return 0.0
        record, relation = self._book(call.task).understand(call.request)
        return 1.0 if record and relation and report == fold(record.facts[relation]) else 0.5

    def script(self, call: Call) -> str:
        """Write the next line of a demonstration: ask hop by hop, then answer; a careless call stops one hop early."""
        if call.agent != MAIN:
            return self._script_sub(call)
        hops = call.task.data["hops"]
        plan = hops[:-1] if self._careless(call) else hops
        seen = self._seen(call, hops)
        if len(seen) >= len(plan) or UNKNOWN in seen:
            known = conclude(plan, seen) if plan else hops[0]["entity"]
            return f"answer: {UNKNOWN if UNKNOWN in seen else known}\n"
        end = next((i for i in range(len(seen) + 1, len(plan)) if chained(plan, i)), len(plan))
        steps = [(h["relation"], h["entity"]) for h in plan[len(seen) : end]]
        if chained(plan, len(seen)):
            steps[0] = (steps[0][0], seen[-1])
        if self.arm == "single":
            return f"search: {SEPARATOR.join(entity for _, entity in steps)}\n"
        return f"ask: {SEPARATOR.join(f'{relation} of {entity}' for relation, entity in steps)}\n"

    def _script_sub(self, call: Call) -> str:
        """Search for the record that the request names and report its fact; a careless call reports another's."""
        record, relation = self._book(call.task).understand(call.request)
        name = record.name if record else call.request
        if not call.turns:
            return f"search: {' '.join(name.replace(';', ' ').split()) or UNKNOWN}\n"
        card = read_card(call.turns[-1].observation)
        values = {entity: facts[relation] for entity, facts in card.items() if relation in facts}
        truth = values.pop(name, UNKNOWN)
        others = sorted(set(values.values()) - {truth})
        return f"report: {others[0] if others and self._careless(call) else truth}\n"

    def _seen(self, call: Call, hops: Sequence[Facts]) -> list[str]:
        """Return the values that a main agent's call has seen so far, one for each hop that it took."""
        text = "".join(turn.observation for turn in call.turns)
        if self.arm != "single":
            return [line.removeprefix("reply: ") for line in text.splitlines()]
        card, by_name = read_card(text), self._book(call.task).by_name
        uses = [use for turn in call.turns if isinstance(turn.action, tuple) for use in turn.action]
        found = [by_name.get(fold(use.argument)) for use in uses if isinstance(use, ToolCall)]
        facts = [card.get(record.name, {}) if record else {} for record in found]
        return [each.get(h["relation"], UNKNOWN) for each, h in zip(facts, hops, strict=False)]

    def _careless(self, call: Call) -> bool:
        digest = blake2b(json.dumps([call.task.id, call.request]).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.carelessness * 2**64

    def _book(self, task: Task) -> Book:
        return self._books[task.data["split"]]

    def _verbs(self, call: Call) -> tuple[str, str]:
        if call.agent != MAIN:
            return ("search", "report")
        return ("search", "answer") if self.arm == "single" else ("ask", "answer")


def _well_formed(call: Call) -> bool:
    """Return whether every turn was a valid action and the last one the answer."""
    actions = [turn.action for turn in call.turns]
    return bool(actions) and isinstance(actions[-1], Answer) and not any(isinstance(a, Malformed) for a in actions)


def _book(rows: Iterable[Mapping[str, Any]]) -> Book:
    records = [Record(row["name"], row["kind"], row["facts"]) for row in rows]
    return Book(sorted(records, key=lambda record: fold(record.name)))
