"""`mgrpo check` of a GPT-2 (GPT-NeoX, OPT, …) directory ends in a traceback, though `mgrpo train` takes it.

AttributeError: no attribute num_key_value_heads.
"""

from reproduction import fault, held
from reproduction.commands import check_healthy_command, new_project, settings
from reproduction.runs import mgrpo

project = new_project()
check_healthy_command("check", project)
status, said = mgrpo("check", project / "run.toml", *settings(agents__main__model=project / "gpt2"))
if "Traceback" in said or status != 0:
    fault(f"status {status}: {said[-400:]}")
held(f"status {status}: {said[-200:]}")
