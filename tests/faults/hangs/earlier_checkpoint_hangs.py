"""A run that resumes from an earlier checkpoint, because the last one is damaged, hangs.

keep = 2 keeps the checkpoint before the last one for that case. But the groups acked since then stay acked: they are
never trained on again, so that the run waits for groups that do not come.
"""

import shutil

from reproduction import cannot, fault, held
from reproduction.runs import LIMIT, logs, mgrpo, new_folder, raw, write

folder = new_folder()
base = {"checkpoint": {"every": 1, "keep": 2}, "steps": 4}
config = write(folder, raw(folder, **base))
status, said = mgrpo("train", config)
if status != 0:
    cannot(said[-500:])
saved = sorted((folder / "run/agents/main/checkpoints").iterdir())
with (saved[-1] / "main/weights.safetensors").open("r+b") as file:  # a disk's torn write
    file.truncate(1000)
more = write(folder, raw(folder, **base) | {"steps": 5})
status, said = mgrpo("train", more, "--resume", "--set", "restarts=0")
print("damaged, resumed:", status, said[-300:])
shutil.rmtree(saved[-1])  # the only way on, with keep = 2
status, said = mgrpo("train", more, "--resume")
if status is None:
    after = f"after the damaged checkpoint {saved[-1].name} was removed"
    fault(f"hung for {LIMIT:.0f} s {after}; logs:\n{logs(folder / 'run', 300)}")
_, books = mgrpo("store", "status", more)
if "violations: none" not in books:
    fault(f"status {status}, {books}")
held(f"status {status}: {said[-300:]}")
