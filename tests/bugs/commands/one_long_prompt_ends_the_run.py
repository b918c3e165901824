"""One task whose prompt has more tokens than max_context ends the whole run at the step that asks it.

The run cannot be resumed with a larger max_context either. It is a fault while both hold.
"""

from reproduction import fault, held
from reproduction.commands import check_healthy_command, last_line, new_project, settings
from reproduction.runs import mgrpo

LONG = """

    class Long(Plain):
        def tasks(self, split):
            return [Task(f"t{i}", {"q": "x" * (100 if split == "train" and i == 3 else 2)}) for i in range(8)]
    """

project = new_project(LONG)
check_healthy_command("train", project)
long = settings(environment__use=f"{project}/environment.py:Long", steps=4, checkpoint__every=1)
status, said = mgrpo("train", project / "run.toml", *long)
print("status", status, last_line(said))
again, told = mgrpo("train", project / "run.toml", *long, *settings(agents__main__max_context=200), "--resume")
if status != 0 and again != 0:
    fault(f"status {status}: {last_line(said)}; resumed: status {again}: {last_line(told)}")
held(f"status {status}; resumed: status {again}")
