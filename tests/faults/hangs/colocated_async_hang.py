"""In topology colocated an async tool that never returns hangs the run, as episodes have no timeout there."""

from reproduction import fault, held
from reproduction.runs import ENVIRONMENT, LIMIT, check_healthy_run, mgrpo, new_folder, raw, write

SOURCE = (
    ENVIRONMENT
    + """
    async def observation(self, call, results):
        import asyncio
        await asyncio.sleep(10**6)
"""
)

check_healthy_run(topology="colocated")
folder = new_folder()
changes = {"topology": "colocated", "sampling": {"timeout": 5.0}, "eval": {"questions": 1}}
config = write(folder, raw(folder, SOURCE, **changes))
status, said = mgrpo("train", config, limit=min(LIMIT, 60))
if status is None:
    fault(f"hung (sampling.timeout = 5 s); it said: {said[-300:]!r}")
held(f"status {status}: {said[-300:]}")
