"""HotpotQA: questions over two Wikipedia paragraphs, answered by a main agent and a sub-agent that searches and reads.

Every question comes with ten paragraphs: two contain what the answer needs and eight are distractors (Yang et al. 2018,
the "distractor" setting). Every action is one line, ended by a newline. The main agent writes `ask: <request>`
(several requests, separated by " ; ", run in parallel) and finally `answer: <text>`; the sub-agent writes
`search: <words>`, which lists the paragraphs most similar to the words, `read: <title>`, and finally `report: <text>`.

    main   Question: Which band did the singer of "Zombie" belong to?
           ask: who sings Zombie
           reply: Zombie is a song by Dolores O'Riordan
           ask: band of Dolores O'Riordan
           reply: O'Riordan was the lead singer of The Cranberries
           answer: The Cranberries

In training the score of an answer is its F1; held-out answers are judged by exact match (or by F1: `evaluate_by`). Both
are computed as in the official evaluation. The expert score of a sub-agent's call depends on the supporting facts, see
`expert`.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
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
)

SUB = "sub"
FOUND = 3  # paragraphs that a search lists
BEGINNING = 12  # words of each listed paragraph that are shown
MAX_REQUESTS = 3  # requests in one line
SEPARATOR = ";"
HELD_OUT_SHARE = 5  # one question in so many is held out if there is no file of held-out questions
INSTRUCTION = {
    True: "Write one line at a time: `ask: <request>` lets a reader look something up, `answer: <text>` ends.",
    False: "Write one line at a time: `search: <words>`, `read: <title>`, and at last `report: <what you found>`.",
}
VERBS = {True: ("ask", "answer"), False: ("search", "read", "report")}


def normalize(text: str) -> str:
    """Remove case, punctuation, articles and repeated spaces, as HotpotQA's evaluation does."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, truth: str) -> float:
    return float(normalize(answer) == normalize(truth))


def f1(answer: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall over words; for yes, no and "noanswer" only equality counts."""
    given, wanted = normalize(answer), normalize(truth)
    if given != wanted and {given, wanted} & {"yes", "no", "noanswer"}:
        return 0.0
    return _overlap(given.split(), wanted.split())


def _overlap(given: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Read the questions of a file: HotpotQA's own JSON (a list), or JSON lines with `docs` and `support_titles`.

    Returns each as {id, question, answer, paragraphs: {title: [sentences]}, support: {title: [sentences]}}. Raises
    ValueError naming the file and the question.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"hotpotqa: {path} is no file, expected questions as JSON; see the example's train.toml")
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"hotpotqa: {path} is no JSON: {error}") from error
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions.append(_official(row) if "context" in row else _lines(row))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"hotpotqa: {path}, question {number}: {type(error).__name__} {error}: expected the keys of HotpotQA's "
                "distractor files, or docs and support_titles"
            ) from error
    if not questions:
        raise ValueError(f"hotpotqa: {path} is empty, expected questions")
    return questions


def _official(row: Mapping[str, Any]) -> dict[str, Any]:
    paragraphs = {title: [s.strip() for s in sentences] for title, sentences in row["context"]}
    support: dict[str, list[str]] = {}
    for title, number in row["supporting_facts"]:
        if title in paragraphs and number < len(paragraphs[title]):  # some originals name missing sentences
            support.setdefault(title, []).append(paragraphs[title][number])
    return _question(row["_id"], row, paragraphs, support)


def _lines(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row that names the supporting paragraphs, but not which of their sentences support the answer."""
    paragraphs = {doc["title"]: [s.strip() for s in doc["sentences"]] for doc in row["docs"]}
    support = {title: paragraphs[title] for title in row["support_titles"]}
    return _question(row["task_id"], row, paragraphs, support)


def _question(name: str, row: Mapping[str, Any], paragraphs: Any, support: Any) -> dict[str, Any]:
    texts = {"id": str(name), "question": str(row["question"]), "answer": str(row["answer"])}
    return {**texts, "paragraphs": paragraphs, "support": support}


class HotpotQA(Environment):
    """Ask HotpotQA's questions and judge the answers.

    train: a file of questions.
    held_out: a file of held-out questions; if "", about a fifth of `train`, chosen by a hash of the id, is held out.
    evaluate_by: how held-out answers are judged.

    Raises ValueError for a file that cannot be read as questions, and for a question in both files.
    """

    def __init__(self, train: str, held_out: str = "", evaluate_by: Literal["em", "f1"] = "em") -> None:
        if evaluate_by not in ("em", "f1"):
            raise ValueError(f"evaluate_by: {evaluate_by!r}, expected 'em' or 'f1'")
        self.evaluate_by = evaluate_by
        rows = read_questions(train)
        kept_out = read_questions(held_out) if held_out else [row for row in rows if _held_out(row["id"])]
        names = {row["id"] for row in kept_out}
        trained = [row for row in rows if row["id"] not in names]
        if held_out and len(trained) < len(rows):
            both = sorted(names & {row["id"] for row in rows})
            raise ValueError(f"hotpotqa: question {both[0]!r} is in {train} and in {held_out}: expected it in one")
        self._tasks = {split: _tasks(of, split) for split, of in (("train", trained), ("held_out", kept_out))}

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def prompt(self, call: Call) -> str:
        main = call.agent == MAIN
        asked = f"Question: {call.task.data['question']}" if main else f"Request: {call.request}"
        return f"{INSTRUCTION[main]}\n{asked}\n"

    def parse(self, call: Call, text: str) -> Action:
        verb, colon, rest = text.strip().partition(":")
        verb, rest, verbs = verb.strip().lower(), rest.strip(), VERBS[call.agent == MAIN]
        if not colon or verb not in verbs:
            return Malformed(f"expected a line that starts with one of {', '.join(verbs)}")
        if not rest or len(rest.splitlines()) > 1:
            return Malformed(f"expected one line of text after {verb}:")
        if verb in ("answer", "report"):
            return Answer(rest)
        if verb != "ask":
            return (ToolCall(verb, rest),)
        parts = [part.strip() for part in rest.split(SEPARATOR)]
        if not all(parts) or len(parts) > MAX_REQUESTS:
            return Malformed(f"expected 1 to {MAX_REQUESTS} requests, separated by {SEPARATOR!r}")
        return tuple(Delegate(SUB, part) for part in parts)

    def tool(self, call: Call, use: ToolCall) -> str:
        paragraphs = call.task.data["paragraphs"]
        if use.name == "search":
            return "\n".join(f"{title}: {_beginning(paragraphs[title])}" for title in search(paragraphs, use.argument))
        if use.name != "read":
            return super().tool(call, use)
        title = next((title for title in paragraphs if normalize(title) == normalize(use.argument)), None)
        if title is None:
            raise ToolError("no paragraph has this title")
        return " ".join(paragraphs[title])

    def observation(self, call: Call, results: Sequence[tuple[ToolCall | Delegate, str]]) -> str:
        return "".join(
            f"{text}\n" if isinstance(action, ToolCall) else f"reply: {' '.join(text.split()) or 'nothing'}\n"
            for action, text in results
        )

    def score(self, episode: Episode) -> Score:
        """Score an answer by F1 in training and by `evaluate_by` otherwise; `expert` scores the sub-agent's calls."""
        data = episode.task.data
        measure = exact_match if data["split"] == "held_out" and self.evaluate_by == "em" else f1
        calls = tuple(CallScore(_well_formed(call), self.expert(call)) for call in episode.calls)
        return Score(_well_formed(episode.main), measure(episode.main.answer or "", data["answer"]), calls)

    def expert(self, call: Call) -> float:
        """Judge one sub-agent call by a rule: 0 unless it read a paragraph with a supporting fact, else 0.5 to 1.

        The part above 0.5 is half the overlap (F1 of words) of the report with the most similar supporting fact read.
        """
        support, read = call.task.data["support"], _titles_read(call)
        facts = [fact for title, sentences in support.items() if normalize(title) in read for fact in sentences]
        if not facts or call.answer is None:
            return 0.0
        report = normalize(call.answer).split()
        return 0.5 + 0.5 * max(_overlap(report, normalize(fact).split()) for fact in facts)

    def script(self, call: Call) -> str:
        """Write the next line of a demonstration: one request for each supporting paragraph, then the answer."""
        data = call.task.data
        if call.agent != MAIN:
            return self._script_sub(call)
        titles = sorted(data["support"], key=lambda title: normalize(title) not in normalize(data["question"]))
        if len(call.turns) < len(titles):
            return f"ask: {_plain(titles[len(call.turns)])}\n"
        return f"answer: {_plain(data['answer'])}\n"

    def _script_sub(self, call: Call) -> str:
        """Search for the request, read the paragraph that it names and report its first supporting fact."""
        data = call.task.data
        if not call.turns:
            return f"search: {_plain(call.request)}\n"
        best = search(data["paragraphs"], call.request)
        title = next((title for title in best if title in data["support"]), best[0])
        if len(call.turns) == 1:
            return f"read: {_plain(title)}\n"
        facts = data["support"].get(title) or data["paragraphs"][title] or [title]
        return f"report: {_plain(' '.join(facts[0].split()[:30]))}\n"


def search(paragraphs: Mapping[str, Sequence[str]], query: str) -> list[str]:
    """Return the titles of the FOUND paragraphs most similar to a query.

    Similarity is the cosine of tf-idf weighted words; the words of a title count three times.
    """
    words = {t: Counter(normalize(f"{t} {t} {t} {' '.join(sentences)}").split()) for t, sentences in paragraphs.items()}
    spread = Counter(word for counted in words.values() for word in counted)
    rare = {word: math.log((1 + len(paragraphs)) / count) for word, count in spread.items()}
    wanted = set(normalize(query[:300]).split()) & rare.keys()

    def nearness(title: str) -> float:
        counted = words[title]
        length = math.sqrt(sum((count * rare[word]) ** 2 for word, count in counted.items()))
        return sum(counted[word] * rare[word] ** 2 for word in wanted) / length if length else 0.0

    return sorted(paragraphs, key=nearness, reverse=True)[:FOUND]


def _titles_read(call: Call) -> set[str]:
    """Return the normalised titles of the paragraphs that a call read."""
    actions = [turn.action for turn in call.turns if isinstance(turn.action, tuple)]
    return {normalize(use.argument) for uses in actions for use in uses if getattr(use, "name", "") == "read"}


def _beginning(sentences: Sequence[str]) -> str:
    return " ".join(" ".join(sentences).split()[:BEGINNING])


def _plain(text: str) -> str:
    """Put a text on one line and remove the separator of requests."""
    return " ".join(text.replace(SEPARATOR, " ").split()) or "nothing"


def _held_out(name: str) -> bool:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % HELD_OUT_SHARE == 0


def _tasks(rows: Sequence[Mapping[str, Any]], split: str) -> list[Task]:
    return [Task(row["id"], {**row, "split": split}) for row in rows]


def _well_formed(call: Call) -> bool:
    """Return whether every turn was a valid action and the last one the answer."""
    actions = [turn.action for turn in call.turns]
    return bool(actions) and isinstance(actions[-1], Answer) and not any(isinstance(a, Malformed) for a in actions)
