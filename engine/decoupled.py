"""What the processes of one decoupled run (topologies `local` and `cluster`) agree on without asking each other.

Below run_dir, which all of them see:

    agents/<name>/    a run directory of that agent's trainer      weights/<name>/   what it published
    workers/<name>/   metrics of a rollout worker                  trajectories/     what the workers wrote
    logs/<name>.txt   what the processes of a `local` run say
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import sqlalchemy as sa

from mgrpo.engine.config import Config
from mgrpo.engine.database import read_password
from mgrpo.engine.resume import fingerprint
from mgrpo.engine.store import Store

HOLDER = "MGRPO_HOLDER"


def agent_folder(config: Config, agent: str) -> Path:
    return Path(config.run_dir) / "agents" / agent


def worker_folder(config: Config, worker: str) -> Path:
    return Path(config.run_dir) / "workers" / worker


def open_store(config: Config) -> Store:
    """The run's store, with the run begun in it. ValueError if another run is there under the same name."""
    inside = sa.URL.create("sqlite", database=str(Path(config.run_dir) / "store.db")).render_as_string()
    password = read_password(config.store.password_file)
    store = Store(config.store.url or inside, run_name(config), password=password, tls=config.store.tls)
    try:
        store.begin_run(list(config.agents), config.algorithm.rollouts, fingerprint(config))
    except BaseException:
        store.close()
        raise
    return store


def run_name(config: Config) -> str:
    """A store inside the run directory has this run only, and moves with it; elsewhere the directory is the name."""
    return config.run_dir if config.store.url and config.topology != "colocated" else config.topology


def role_holder() -> str:
    """Who this process is to the store, as the holder of a role.

    The launcher of a local run gives it, the same for every attempt, so that a restarted trainer need not wait until
    the role of the one before it lapses: that one is known to be dead, and a lock in its folder says so too.
    """
    return os.environ.get(HOLDER) or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
