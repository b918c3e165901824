"""In topology colocated a tool that never returns holds the whole run for good, without a word.

sampling.timeout applies to the other topologies only. It is a fault while such a run, with sampling.timeout and
reward.timeout of 5 s, still runs a minute and a half after it was begun.
"""

from reproduction import fault, held
from reproduction.commands import check_healthy_command, new_project, settings
from reproduction.runs import mgrpo

STUCK = """

    class Stuck(Plain):
        def parse(self, call, text):
            return (ToolCall("web", text),) if not call.turns else Answer(text)

        async def tool(self, call, use):
            if call.task.id == "t1":
                await asyncio.Event().wait()
            return "ok"
    """

project = new_project(STUCK)
check_healthy_command("train", project)
stuck = settings(environment__use=f"{project}/environment.py:Stuck", sampling__timeout=5, reward__timeout=5)
status, said = mgrpo("train", project / "run.toml", *stuck, limit=90)
if status is None:
    fault(f"had to be killed; it had said: {said.strip().splitlines()[-3:]}")
held(f"status {status}")
