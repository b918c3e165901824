"""User code that ends a rollout worker with status 0 (sys.exit(0), os._exit(0), exit() in a tool) hangs the run.

The supervisor takes the worker for finished, nobody samples any more, and the trainers wait without a word.
"""

from reproduction import fault, held
from reproduction.runs import ENVIRONMENT, LIMIT, check_healthy_run, mgrpo, new_folder, raw, write

SOURCE = (
    ENVIRONMENT
    + """
    def tool(self, call, use): ...
    def observation(self, call, results):
        import sys
        sys.exit(0)   # as a library, a script turned into a tool, or the model's own code does
"""
)

check_healthy_run()
folder = new_folder()
status, said = mgrpo("train", write(folder, raw(folder, SOURCE)))
worker = (folder / "run/logs/worker-0.txt").read_text(errors="replace")
if status is None:
    attempts = f"{worker.count('attempt')} attempt, never started again"
    fault(f"hung for {LIMIT:.0f} s after its only worker had ended with status 0 ({attempts}); it said:\n{said[-600:]}")
if status == 0:
    fault("status 0, as if the run were done")
held(f"status {status}: {said[-400:]}")
