"""`mgrpo store …`: making a run's store, looking into it, and throwing away trajectories that nobody will read again.

A store is named by the run's TOML file, or by its URL where there is none; then every run in it is shown, and the
password comes from the environment alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import sqlalchemy as sa

from mgrpo.engine.config.resume import fingerprint
from mgrpo.engine.config.schema import Config, load_config, read_dump
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.trajectories import below
from mgrpo.engine.store.database import read_password
from mgrpo.engine.store.groups import Store


def open_store(config: Config) -> Store:
    """The store of a run as its config names it; each process of the run opens it so.

    In its own file a run is called by its topology, in a database that runs may share, by its run_dir's name.
    """
    if not config.store.url:
        return Store(_url(config), config.topology)
    password = read_password(config.store.password_file)
    return Store(config.store.url, Path(config.run_dir).name, password=password, tls=config.store.tls)


def files_of(config: Config, kind: str, run_dir: str | Path = "") -> str:
    """The root of the run's "weights" or "trajectories", for fsspec. run_dir: where it is now, if it was moved."""
    return f"{config.store.files or run_dir or config.run_dir}/{kind}"


def begin(store: Store, config: Config) -> None:
    """Idempotent. Raises ValueError when the run was begun with another config."""
    store.begin_run(list(config.agents), config.algorithm.rollouts, fingerprint(config))


def init(file: Path) -> str:
    """Makes the tables, and the run."""
    config = load_config(file)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    with closing(open_store(config)) as store:
        begin(store, config)
        return f"{store.name}: run {store.run!r} of {', '.join(config.agents)} is begun"


def status(target: str) -> str:
    """Of each run where its groups stand, who holds what, and whether the books balance."""
    with _stores(target) as stores:
        return "\n".join(_status(store) for store in stores) or f"{target}: no run"


def dump(target: str) -> None:
    """Prints every row, a line of JSON each."""
    with _stores(target) as stores:
        for store in stores:
            store.dump(print)


def collect(target: str, run_dir: Path | None = None) -> str:
    """Deletes the trajectory files that every agent has finished with, and forgets the calls in them.

    run_dir: needed where the target is a server's URL. Raises ValueError while the run is alive, as a worker may be
    appending to one of the files, and for a file outside the run.
    """
    folder = run_dir or _run_dir(target)
    root = _trajectories(target, folder)
    fs, directory = fsspec.url_to_fs(root)
    if not fs.isdir(directory):
        raise ValueError(f"gc: {folder} given: expected a run directory with trajectories, in {root}")
    run = RunDirectory(folder, resume=True)  # colocated and local runs hold its lock
    try:
        with _stores(target) as stores:
            file = Path(target.removeprefix("sqlite:///")).absolute()
            own = "://" not in target or file == folder.absolute() / "store.db"  # other databases may hold other runs
            mine = [store for store in stores if own or store.run == folder.name]
            return "\n".join(_collect(store, root) for store in mine) or f"{target}: no run {folder.name!r}"
    finally:
        run.close()


def _trajectories(target: str, folder: Path) -> str:
    """Their root, as the run's file says or, where the target is a URL, its copy in the run directory."""
    if "://" not in target:
        return files_of(load_config(target), "trajectories")
    copy = folder / "config.json"
    return files_of(read_dump(copy.read_text()), "trajectories", folder) if copy.exists() else f"{folder}/trajectories"


def _collect(store: Store, root: str) -> str:
    _check_idle(store)
    names = store.garbage()
    freed = remove(root, names)
    return f"run {store.run}: {len(names)} files of {store.forget(names)} calls deleted, {freed} bytes"


def remove(root: str, names: list[str]) -> int:
    """Deletes trajectory files below the root, a local path or fsspec URL; one that is gone is no mistake.

    Unlike `trajectories.remove` also the last of each writer: nobody writes any more. Returns how many bytes they had.
    Raises ValueError, and deletes none, when one is not below the root.
    """
    fs, directory = fsspec.url_to_fs(root)
    there = [path for path in [below(directory, name) for name in names] if fs.exists(path)]
    freed = sum(fs.size(path) or 0 for path in there)
    for path in there:
        fs.rm_file(path)
    return freed


def _status(store: Store) -> str:
    found, books = store.status(), store.balance()
    lines = [f"run {store.run}: {books['queries']} queries, {books['rollouts']} rollouts, {books['calls']} calls"]
    for agent, counts in books["agents"].items():
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        published = found["publications"].get(agent)
        lines.append(f"  {agent}: {told}" + (f"; step {published['step']} published" if published else ""))
    for role, held in found["roles"].items():
        lines.append(f"  {role} is held by {held['holder']}, {_left(held['seconds'])}")
    for worker, held in found["leases"].items():
        lines.append(f"  worker {worker} has {held['queries']} queries, {_left(held['seconds'])}")
    wrong = [f"{count} {kind}" for kind, count in books["violations"].items() if count]
    return "\n".join([*lines, f"  violations: {', '.join(wrong) or 'none'}"])


def _left(seconds: float) -> str:
    return f"for another {seconds:.0f} s" if seconds > 0 else f"lapsed {-seconds:.0f} s ago"


def _check_idle(store: Store) -> None:
    found = store.status()
    held: dict[str, dict[str, Any]] = {**found["roles"], **found["leases"]}
    alive = [name for name, about in held.items() if about["seconds"] > 0]
    if alive:
        raise ValueError(f"gc: run {store.run!r} is alive ({', '.join(alive)}): stop it first")


@contextmanager
def _stores(target: str) -> Iterator[list[Store]]:
    """The run of a TOML file, or every run at a URL. A store that is not there is not made."""
    with ExitStack() as stack:
        if "://" not in target:
            config = load_config(target)
            _check_there(_url(config))
            yield [stack.enter_context(closing(open_store(config)))]
            return
        _check_there(target)
        password = read_password()
        with closing(Store(target, "", password=password)) as store:
            runs = store.runs()
        yield [stack.enter_context(closing(Store(target, run, password=password))) for run in runs]


def _url(config: Config) -> str:
    own = sa.URL.create("sqlite", database=str(Path(config.run_dir).absolute() / "store.db")).render_as_string()
    return config.store.url or own


def _run_dir(target: str) -> Path:
    if "://" not in target:
        return Path(load_config(target).run_dir)
    if not target.startswith("sqlite:"):
        raise ValueError("gc: expected --run-dir: the url of a server does not say where the trajectories lie")
    return Path(target.removeprefix("sqlite:///")).parent


def _check_there(url: str) -> None:
    if url.startswith("sqlite:///") and not Path(sa.make_url(url).database or "").is_file():
        raise ValueError(f"store: {url} is not there")
