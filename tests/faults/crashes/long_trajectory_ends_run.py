"""A trajectory longer than compute.max_tokens ends the trainer, perhaps hours into the run, and after every restart.

compute.max_tokens below an agent's max_context is accepted, also by `mgrpo check`, though both numbers are known
before the run begins.
"""

from reproduction import fault, held
from reproduction.runs import ENVIRONMENT, check_healthy_run, mgrpo, new_folder, raw, write

SOURCE = (
    ENVIRONMENT
    + """
    def prompt(self, call):
        return "a" * (10 if call.task.id < "train 3" else 100) + "\\n"
"""
)

check_healthy_run()
folder = new_folder()
config = write(folder, raw(folder, SOURCE, compute={"max_tokens": 64}, restarts=0, steps=6))
status, said = mgrpo("check", config)
if status:
    held(f"check refused: {said[-300:]}")
status, said = mgrpo("train", config)
if status == 0:
    held("trained")
sampled = folder / "run/trajectories"
if not sampled.exists() or not any(sampled.iterdir()):
    held(f"refused before anything was sampled: {said[-300:]}")
fault(f"`mgrpo check` passed; train: status {status}: {said[-700:]}")
