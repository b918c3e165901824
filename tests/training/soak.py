"""Kill and stop the processes of runs at random, as often as asked for: `python tests/training/soak.py MINUTES`.

It repeats the soak test of `tests/training/test_faults.py`, each time in the arm that is furthest behind, until all
arms together have had KILLS kills and STOPS stops, or the minutes are over. The counts are kept in build/soak.json, so
that a soak may be made in pieces. The first failure ends it with status 1; the log of each arm's last round stays in
build/.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from faults import K, Q, Run, wait_for
from mgrpo.engine.store.open import open_store

KILLS, STOPS = 300, 150  # of all arms together
ARMS = ("sqlite", "sqlite-2-ranks", "postgresql", "postgresql-2-ranks", "colocated")
ROUND = {"KILLS_IN_SOAK": 15, "STOPS_IN_SOAK": 8}  # of one run
LEASE = 1.0
ROOT = Path(__file__).parents[2]
STATE = ROOT / "build" / "soak.json"
TEST = "tests/training/test_faults.py::test_a_soak_of_random_kills_and_stops"


class Soak:
    """Kill and stop processes of one run, whichever and at any moment, also while they start; sometimes the launcher.

    done: how often what was done to which process.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.chance, self.done = run, random.Random(), Counter[str]()
        self.launcher = run.start("train")

    def disturb(self, kills: int, stops: int) -> None:
        """Kill and stop that often, in a random order, each after some rollouts more were recorded."""
        acts: list[Callable[[], None]] = [self._kill] * kills + [self._stop] * stops
        self.chance.shuffle(acts)
        with closing(open_store(self.run.config)) as store:
            for act in acts:
                more = store.audit.balance()["rollouts"] + self.chance.randrange(3 * Q * K)
                wait_for(lambda more=more: store.audit.balance()["rollouts"] >= more, self.run)
                time.sleep(self.chance.uniform(0.0, 0.2))
                act()

    def finish(self) -> dict[str, Any]:
        """Let every agent take some steps more and end the run; check and return its books."""
        run = self.run
        run.wait_for_step(max(run.steps().values()) + 1)
        self._interrupt(signal.SIGINT)
        steps = max(run.steps().values()) + 3
        run.finish(run.start("train", "--resume", "--set", f"steps={steps}"))
        return run.check(steps=steps)

    def _kill(self) -> None:
        pid, who = self._anyone(launcher=0.05)
        self.done[f"{who} killed"] += 1
        self._send(pid, signal.SIGKILL)
        if pid == self.launcher.pid:
            self.launcher.wait()
            self._resume()

    def _stop(self) -> None:
        """Stop a process for up to two leases; or ask the launcher to end the run, and resume it."""
        if self.chance.random() < 0.2:
            self.done["run ended and resumed"] += 1
            self._interrupt(self.chance.choice([signal.SIGINT, signal.SIGTERM]))
            self._resume()
            return
        pid, who = self._anyone(launcher=0.1)
        self.done[f"{who} stopped"] += 1
        self._send(pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.0, 2 * LEASE))
        self._send(pid, signal.SIGCONT)

    def _anyone(self, launcher: float) -> tuple[int, str]:
        """Choose a process. launcher: the probability that it is the launcher; a colocated run has nothing else."""
        if self.run.config.colocated or self.chance.random() < launcher:
            return self.launcher.pid, "launcher"
        return self.chance.choice([*wait_for(self.run.living, self.run).items()])

    def _send(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, number)

    def _interrupt(self, number: int) -> None:
        self._wait_until_it_listens()
        self.launcher.send_signal(number)
        wait_for(lambda: self.launcher.poll() is not None, self.run)
        assert self.launcher.returncode == 130, self.run.told()

    def _wait_until_it_listens(self) -> None:
        """Wait until the launcher handles signals: while it imports modules, a signal simply ends it."""
        caught = f"/proc/{self.launcher.pid}/status"
        ours = 1 << (signal.SIGTERM - 1)
        wait_for(lambda: int(Path(caught).read_text().split("SigCgt:")[1].split()[0], 16) & ours, self.run)

    def _resume(self) -> None:
        self.launcher = self.run.start("train", "--resume")


def main(minutes: float) -> None:
    """Soak for so many minutes, or until all is done. Ends with status 1 if a round fails."""
    end, state = time.monotonic() + 60 * minutes, _read()
    while (arm := _next(state)) and time.monotonic() < end:
        log, began = STATE.with_name(f"soak-{arm}.txt"), time.monotonic()
        with log.open("w") as out:
            command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "nightly or not nightly", f"{TEST}[{arm}]"]
            numbers = {key: str(number) for key, number in ROUND.items()}
            status = subprocess.run(command, cwd=ROOT, env={**os.environ, **numbers}, stdout=out, stderr=out).returncode
        if status or "skipped" in log.read_text().splitlines()[-1]:
            print(f"{arm}: a round failed, see {log}", flush=True)
            sys.exit(1)
        books = state[arm]
        for key, more in (("kills", ROUND["KILLS_IN_SOAK"]), ("stops", ROUND["STOPS_IN_SOAK"]), ("rounds", 1)):
            books[key] += more
        books["seconds"] = round(books["seconds"] + time.monotonic() - began)
        STATE.write_text(json.dumps(state, indent=1))
        print(f"{arm}: {books}", flush=True)
    for key, wanted in (("kills", KILLS), ("stops", STOPS)):
        print(f"{key}: {sum(books[key] for books in state.values())} of {wanted}")


def _read() -> dict[str, dict[str, int]]:
    """Return what was done so far, by arm."""
    STATE.parent.mkdir(exist_ok=True)
    done = json.loads(STATE.read_text()) if STATE.exists() else {}
    return {arm: done.get(arm, dict.fromkeys(("kills", "stops", "rounds", "seconds"), 0)) for arm in ARMS}


def _next(state: dict[str, dict[str, int]]) -> str | None:
    """Return the arm that is furthest behind, or None if everything is done."""
    done = {key: sum(books[key] for books in state.values()) for key in ("kills", "stops")}
    if done["kills"] >= KILLS and done["stops"] >= STOPS:
        return None
    return min(ARMS, key=lambda arm: state[arm]["kills"])


if __name__ == "__main__":
    main(float(sys.argv[1]))
