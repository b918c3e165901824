"""Run `mgrpo store …`: create a run's store, inspect it, and delete trajectories that are no longer needed.

A store is named by the run's TOML file or by its own URL. With a URL every run in the store is shown, and the password
comes from the environment only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from mgrpo.engine.config.resume import check_unchanged, fingerprint
from mgrpo.engine.config.schema import StoreConfig, dump_config, load_config, read_dump
from mgrpo.engine.environment.loader import volatile_options
from mgrpo.engine.hub.settle import settle
from mgrpo.engine.hub.snapshots import Lines
from mgrpo.engine.run.directory import RunDirectory, RunPaths, root_of
from mgrpo.engine.run.trajectories import below, last_files
from mgrpo.engine.store import Store
from mgrpo.engine.store.database import read_password
from mgrpo.engine.store.open import begin, identify, location, open_store, sqlite_file
from mgrpo.engine.system.files import make_private, replace
from mgrpo.engine.system.remote import file_system
from mgrpo.engine.system.words import counted

WORKER = "worker:"  # how the role of a rollout worker begins
GONE = 86400.0  # seconds without a sign of life after which a worker is taken to be gone


def init(file: Path) -> str:
    """Create the tables and the run, or compare the run's config; return lines that say what was done.

    The config of a cluster run is saved in its directory, with the commits of models on a hub: what may change when it
    goes on is taken over from the file.
    """
    config = load_config(file)
    paths = RunPaths(config.run_dir)
    config = settle(config, Lines(), paths.config, weights=False)
    make_private(paths.path)
    saved = read_dump(paths.config.read_text()) if paths.config.exists() else config
    changes = check_unchanged(saved, config, partial(volatile_options, config.environment))
    with closing(open_store(config)) as store:
        identify(store, config, known=any(paths.path.glob("agents/*/checkpoints/*-*")))
        if changes:
            store.roles.renew(fingerprint(config))
        begin(store, config)
        if config.topology == "cluster":
            replace(paths.config, dump_config(config).encode())
        ready = f"{store.name}: run {store.run!r} of {', '.join(config.agents)} is ready"
    return "\n".join([*(f"resume: {change}" for change in changes), ready])


def status(target: str) -> str:
    """Describe each run: its groups by state, the processes that hold roles and leases, and violated invariants."""
    with _stores(target) as stores:
        return "\n".join(_status(store) for store in stores) or f"{target}: no run"


def dump(target: str) -> None:
    """Print every row as a line of JSON."""
    with _stores(target) as stores:
        for store in stores:
            store.audit.dump(print)


def collect(target: str, run_dir: Path | None = None) -> str:
    """Delete the trajectory files that every agent has finished with, and forget the calls in them.

    The last files of a worker that did not end in order are kept for a day, because it may only have been stopped.
    run_dir: needed if the target is the URL of a server. Raises ValueError while the run is alive, because a worker may
    be appending to one of the files, and for a file outside the run.
    """
    folder = run_dir or _run_dir(target)
    root, lease = _trajectories(target, folder)
    fs, directory = file_system(root)
    if not fs.isdir(directory):
        raise ValueError(f"gc: {folder} given: expected a run directory with trajectories, in {root}")
    run = RunDirectory(folder, resume=True)  # holds the lock that colocated and local runs hold
    try:
        with _stores(target) as stores:
            own = "://" not in target or sqlite_file(target) == run.store  # other databases may hold other runs
            mine = [store for store in stores if own or store.run == folder.name]
            return "\n".join(_collect(store, root, lease) for store in mine) or f"{target}: no run {folder.name!r}"
    finally:
        run.close()


def _run_dir(target: str) -> Path:
    if "://" not in target:
        return Path(load_config(target).run_dir)
    file = sqlite_file(target)
    if file is None:
        raise ValueError("gc: expected --run-dir: the url of a server does not say where the trajectories are")
    return file.parent


def _trajectories(target: str, folder: Path) -> tuple[str, float]:
    """Return the folder of the trajectories and the lease, from the run's file or its copy in the run directory."""
    if "://" not in target:
        config = load_config(target)
        return root_of(config, "trajectories"), config.store.lease
    run = RunPaths(folder)
    if not run.config.exists():
        return str(run.trajectories), StoreConfig().lease
    config = read_dump(run.config.read_text())
    return root_of(config, "trajectories", folder), config.store.lease


def _collect(store: Store, root: str, lease: float) -> str:
    _check_idle(store, lease)
    silent = _silent_workers(store)
    kept = {file for writer, file in last_files(root).items() if writer.partition("-")[2] in silent}
    names = [name for name in store.audit.garbage() if name not in kept]
    freed = remove(root, names)
    files, calls = counted(len(names), "file"), counted(store.audit.forget(names), "call")
    rest = f"; {counted(len(kept), 'file')} kept of {', '.join(sorted(silent))}" if kept else ""
    return f"run {store.run}: {files} of {calls} deleted, {freed} bytes{rest}"


def _silent_workers(store: Store) -> set[str]:
    """Return the workers that have not ended in order: if one was only stopped, it goes on with its last files."""
    held = store.audit.status()["roles"]
    return {
        role.removeprefix(WORKER)
        for role, about in held.items()
        if role.startswith(WORKER) and about["seconds"] > -GONE
    }


def remove(root: str, names: list[str]) -> int:
    """Delete trajectory files below the root, a local path or fsspec URL, and return how many bytes they had.

    Ignore those that are gone already. Unlike `trajectories.remove`, delete the last file of each writer too, because
    no process writes any more. Raises ValueError, and deletes none, if one is not below the root.
    """
    fs, directory = file_system(root)
    there = [path for path in [below(directory, name) for name in names] if fs.exists(path)]
    freed = sum(fs.size(path) or 0 for path in there)
    for path in there:
        fs.rm_file(path)
    return freed


def _status(store: Store) -> str:
    found, counts = store.audit.status(), store.audit.balance()
    lines = [f"run {store.run}: {counts['queries']} queries, {counts['rollouts']} rollouts, {counts['calls']} calls"]
    for agent, states in counts["agents"].items():
        told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        published = found["publications"].get(agent)
        lines.append(f"  {agent}: {told}" + (f"; step {published['step']} published" if published else ""))
    for role, held in found["roles"].items():
        lines.append(f"  {role} is held by {held['holder']}, {_left(held['seconds'])}")
    for worker, held in found["leases"].items():
        lines.append(f"  worker {worker} has {held['queries']} queries, {_left(held['seconds'])}")
    wrong = [f"{count} {kind}" for kind, count in counts["violations"].items() if count]
    return "\n".join([*lines, f"  violations: {', '.join(wrong) or 'none'}"])


def _left(seconds: float) -> str:
    return f"for another {seconds:.0f} s" if seconds > 0 else f"lapsed {-seconds:.0f} s ago"


def _check_idle(store: Store, lease: float) -> None:
    if alive := store.audit.at_work(lease):
        raise ValueError(f"gc: run {store.run!r} is alive ({', '.join(alive)}): stop it first")


@contextmanager
def _stores(target: str) -> Iterator[list[Store]]:
    """Open the run of a TOML file, or every run at a URL. Never creates a store that is not there."""
    with ExitStack() as stack:
        if "://" not in target:
            config = load_config(target)
            _check_there(location(config)[0])
            yield [stack.enter_context(closing(open_store(config)))]
            return
        _check_there(target)
        password = read_password()
        with closing(Store(target, "", password=password)) as store:
            runs = store.audit.runs()
        yield [stack.enter_context(closing(Store(target, run, password=password))) for run in runs]


def _check_there(url: str) -> None:
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        raise ValueError(f"store: {url} is not there")
