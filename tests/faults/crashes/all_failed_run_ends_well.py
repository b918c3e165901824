"""A run of topology local in which every rollout fails ends with status 0, although no agent took one step.

All groups are acked when every rollout fails or stays unscored, for example because a judge is down. Topology
colocated refuses the same with a ValueError at its first step.
"""

from reproduction import fault, held
from reproduction.runs import ENVIRONMENT, check_healthy_run, mgrpo, new_folder, raw, write

SOURCE = (
    ENVIRONMENT
    + """
    def score(self, episode):
        raise ConnectionError("the judge is down")
"""
)

check_healthy_run()
folder = new_folder()
colocated = raw(folder, SOURCE, topology="colocated", run_dir=str(folder / "colocated"))
other, told = mgrpo("train", write(folder, colocated, "colocated.toml"))
print("colocated:", other, told[-200:])
status, said = mgrpo("train", write(folder, raw(folder, SOURCE)))
if status == 0:
    fault(f"status 0 and nothing was ever trained; it said:\n{said[-900:]}")
held(f"status {status}: {said[-400:]}")
