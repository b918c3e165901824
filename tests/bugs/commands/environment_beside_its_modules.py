"""An environment file that imports a module in its own folder ends in a traceback (ModuleNotFoundError).

That folder is not searched, nor is the working directory with the `mgrpo` command.
"""

from reproduction import fault, held
from reproduction.commands import check_healthy_command, last_line, new_project, settings
from reproduction.runs import mgrpo

project = new_project()
check_healthy_command("check", project)
game = project / "game"
game.mkdir()
(game / "rules.py").write_text("WORD = 'ab'\n")
(game / "environment.py").write_text("from rules import WORD\n" + (project / "environment.py").read_text())
status, said = mgrpo("check", project / "run.toml", *settings(environment__use=f"{game}/environment.py:Plain"))
if "Traceback" in said:
    fault(f"status {status}: {last_line(said)}")
held(f"status {status}: {last_line(said)}")
