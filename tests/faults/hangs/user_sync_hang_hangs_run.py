"""A plain (not async) tool that never returns, once, in one episode, hangs the run, also with a second worker.

sampling.timeout does not apply to such a tool, and the worker's heartbeat goes on extending its query leases, so that
no other worker takes its queries over.
"""

from reproduction import fault, held
from reproduction.runs import ENVIRONMENT, LIMIT, check_healthy_run, logs, mgrpo, new_folder, raw, write

SOURCE = (
    ENVIRONMENT
    + """
    def observation(self, call, results):
        import os, time
        try:
            os.close(os.open(__file__ + ".hung", os.O_CREAT | os.O_EXCL))  # once in the life of the run
        except FileExistsError:
            return "fine\\n"
        time.sleep(10**6)
"""
)

check_healthy_run(sampling={"workers": 2})
folder = new_folder()
sampling = {"timeout": 5.0, "workers": 2, "max_staleness": 1}
config = write(folder, raw(folder, SOURCE, sampling=sampling, store={"lease": 3.0}, steps=4))
limit = max(LIMIT, 120)
status, said = mgrpo("train", config, limit=limit)
if status is None:
    given = "sampling.timeout = 5 s, lease 3 s, two workers"
    tail = f"{said[-500:]}\n{logs(folder / 'run', 400)}"
    fault(f"{given}: the run still hung after {limit:.0f} s because of one episode's plain tool:\n{tail}")
held(f"status {status}: {said[-300:]}")
