"""The warm-up trains on whole scripted episodes, also where their observations go past max_context.

With learned positions (GPT-2) that is a traceback (IndexError). Otherwise agents are trained beyond the context, the
sliding window and the rotary positions that all checks were made for. Here max_context is 64.
"""

import json

from reproduction import fault, held
from reproduction.commands import check_healthy_command, last_line, new_project, settings
from reproduction.runs import mgrpo

TALKATIVE = """

    class Talkative(Plain):
        def parse(self, call, text):
            return (ToolCall("look", text),) if len(call.turns) < 2 else Answer(text)

        def tool(self, call, use):
            return "y" * 100
    """

project = new_project(TALKATIVE)
check_healthy_command("train", project)
warmup = settings(environment__use=f"{project}/environment.py:Talkative", warmup__steps=1, warmup__episodes=2, steps=0)
status, said = mgrpo("train", project / "run.toml", *warmup)
tokens = 0
if status == 0:
    rows = [json.loads(line) for line in (project / "run/metrics.jsonl").read_text().splitlines()]
    tokens = next(row["main/tokens_trained"] for row in rows if row["stage"] == "warmup")
print("Llama: status", status, "tokens of the one distinct call that was trained on:", tokens)
gpt2 = settings(agents__main__model=project / "gpt2", run_dir=project / "run2")
_, told = mgrpo("train", project / "run.toml", *warmup, *gpt2)
if tokens > 64 or "Traceback" in told:
    fault(f"Llama trained on {tokens} tokens of one call; GPT-2: {last_line(told)}")
held(f"Llama trained on {tokens} tokens of one call (status {status}); GPT-2: {last_line(told)}")
