"""A run begun anew under the name of an earlier one hangs without a word if both use the same store.url.

After `rm -rf` of the run directory, or in another directory of the same last name, the old run's rows are still in the
store: the new trainers find nothing to train on, and no query may be opened.
"""

import json
import shutil

from reproduction import cannot, fault, held
from reproduction.runs import LIMIT, logs, mgrpo, new_folder, raw, write

folder = new_folder()
config = write(folder, raw(folder, store={"url": f"sqlite:///{folder}/shared.db"}))
status, said = mgrpo("train", config)
if status != 0:
    cannot(said[-500:])
shutil.rmtree(folder / "run")
status, said = mgrpo("train", config)
if status is None:
    fault(f"the second run hung for {LIMIT:.0f} s; it said {said[-300:]!r}; logs:\n{logs(folder / 'run', 300)}")
if status == 0:
    rows = [json.loads(line) for line in (folder / "run/agents/main/metrics.jsonl").read_text().splitlines()]
    if len(rows) != 3:
        fault(f"status 0 with {len(rows)} steps of 3")
held(f"status {status}: {said[-300:]}")
