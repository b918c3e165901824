"""Environment.tasks that returns dictionaries or a generator ends in a traceback from within the engine.

AttributeError: no attribute id; TypeError: generator has no len(). Every other slip of an environment gets one line.
"""

from reproduction import fault, held
from reproduction.commands import check_healthy_command, last_line, new_project, settings
from reproduction.runs import mgrpo

KINDS = """

    class Dictionaries(Plain):
        def tasks(self, split):
            return [{"id": "a", "q": "1"}, {"id": "b", "q": "2"}]


    class Generated(Plain):
        def tasks(self, split):
            yield Task("a", {"q": "1"})
    """

project = new_project(KINDS)
check_healthy_command("train", project)
bad = []
for name in ("Dictionaries", "Generated"):
    use = settings(environment__use=f"{project}/environment.py:{name}", run_dir=project / name)
    status, said = mgrpo("train", project / "run.toml", *use)
    print(name, "status", status, last_line(said))
    if "Traceback (most recent call last)" in said and "error: " not in last_line(said):
        bad.append(f"{name}: {last_line(said)}")
if bad:
    fault("; ".join(bad))
held("each got one line")
