"""One damaged line in a worker's metrics.jsonl ends the whole run, again at every --resume, by an error without a file.

Those metrics serve the display alone, but the launcher's display raises.
"""

from reproduction import cannot, fault, held
from reproduction.runs import mgrpo, new_folder, raw, write

folder = new_folder()
config = write(folder, raw(folder, steps=2))
status, said = mgrpo("train", config)
if status != 0:
    cannot(f"{status} {said[-400:]}")
file = folder / "run/workers/worker-0/metrics.jsonl"
lines = file.read_bytes().splitlines(keepends=True)
lines[0] = b"\0" * (len(lines[0]) - 1) + b"\n"  # as a file system leaves a block after a power cut
file.write_bytes(b"".join(lines))
status, said = mgrpo("train", config, "--resume", "--set", "steps=3")
if status == 0:
    held("the run went on")
fault(f"status {status}: {said.strip().splitlines()[-1] if 'Traceback' not in said else said[-300:]}")
