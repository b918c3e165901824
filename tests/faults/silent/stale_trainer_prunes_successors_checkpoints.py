"""A trainer that was succeeded deletes its successor's checkpoints when it goes on, before it is refused.

Checkpoints are not fenced. On a shared file system whose flock does not reach other hosts (Lustre's -o localflock, NFS
with nolock) a trainer is stopped before it saves, taken for dead and succeeded. When it goes on, it replaces its
successor's checkpoint of that step and deletes all later ones (`_prune`); only then is it refused. The groups acked
since are in no weights any more. Here flock is switched off for both trainers.
"""

import json
import os
import signal
import subprocess
import sys

from reproduction import cannot, fault, held
from reproduction.runs import FAULTY, LIMIT, check_healthy_run, new_folder, raw, start, stop, wait_for, write

NOLOCK = f"""
import fcntl, runpy, sys
fcntl.flock = lambda *_: None
sys.argv[0:1] = []
sys.path.insert(0, {str(FAULTY.parent)!r})
runpy.run_path({str(FAULTY)!r}, run_name='__main__')
"""
STOPPED = {"who": "main", "method": "RunDirectory.save_checkpoint", "when": "before", "nth": 3}

check_healthy_run()
folder = new_folder()
plan = {"alone": ["main"], "lone": True, "faults": [STOPPED | {"signal": int(signal.SIGSTOP)}]}
(folder / "plan.json").write_text(json.dumps(plan))
(folder / "nolock.py").write_text(NOLOCK)
store = {"url": f"sqlite:///{folder}/shared.db", "lease": 2.0}
config = write(folder, raw(folder, store=store, steps=6, checkpoint={"every": 1, "keep": 2}))


def trainer(out: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, folder / "nolock.py", "faulty.py", folder / "plan.json", "agent", config]
    with (folder / out).open("wb") as stream:
        return subprocess.Popen([*command, "--name", "main"], stdout=stream, stderr=subprocess.STDOUT)


launcher = start("train", config, plan={"alone": ["main"]}, out=folder / "launcher")
wait_for((folder / "run/config.json").exists)
first = trainer("first")
wait_for((folder / "fault-0").exists)
second = trainer("second")
try:
    ended = second.wait(LIMIT)
    launcher.wait(LIMIT)
except subprocess.TimeoutExpired:
    for process in (launcher, second, first):
        stop(process)
    cannot((folder / "second").read_text()[-600:])
saved = folder / "run/agents/main/checkpoints"
before = sorted(path.name for path in saved.iterdir())
os.kill(first.pid, signal.SIGCONT)
first.wait(LIMIT)
after = sorted(path.name for path in saved.iterdir())
stop(launcher)
print("second ended with", ended, "; the first, when it went on:", (folder / "first").read_text()[-200:])
if not before:
    cannot("the successor saved no checkpoint")
if before[-1] not in after:
    fault(f"the successor's {before} became {after}: the last steps are in no checkpoint, and acked")
held(f"{before} -> {after}")
