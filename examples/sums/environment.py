"""Define a small but complete environment: the main agent may ask its sub-agent, a clerk, to add two digits."""

from mgrpo import Answer, Call, CallScore, Delegate, Environment, Malformed, Score, Task


class Sums(Environment):
    def tasks(self, split):
        digits = [(a, b) for a in range(10) for b in range(10)]
        chosen = [(a, b) for a, b in digits if ((a + 2 * b) % 5 == 0) == (split == "held_out")]
        return [Task(f"{a}+{b}", {"question": f"{a} + {b}", "answer": str(a + b)}) for a, b in chosen]

    def prompt(self, call: Call):
        return f"{call.request or call.task.data['question']}\n"

    def parse(self, call: Call, text: str):
        verb, _, rest = text.strip().partition(" ")
        if verb == "ask" and rest and call.agent == "main":
            return (Delegate("clerk", rest),)
        if verb == "say" and rest:
            return Answer(rest)
        return Malformed(f"neither 'ask …' nor 'say …': {text!r}")

    def score(self, episode):
        right = episode.task.data["answer"]
        return Score(
            format=episode.main.ended == "answer",
            correct=float(episode.main.answer == right),
            calls=tuple(CallScore(call.ended == "answer", float(call.answer == right)) for call in episode.calls),
        )

    def script(self, call: Call):  # demonstrations, needed for the warm-up only
        if call.agent == "main" and not call.turns:
            return f"ask {call.task.data['question']}\n"
        return f"say {call.task.data['answer']}\n"
