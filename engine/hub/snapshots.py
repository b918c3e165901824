"""Find the models that agents name: in a directory, in the cache of the hub's client, or on a hub, and fetch them.

Only what training reads is downloaded: config, tokenizer, templates and safetensors; pickles and Python only if the
agent's settings allow to read them. The config comes after the other small files, and the weights come last, so that a
snapshot with a config has a whole tokenizer, and one with weights has everything else.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import tqdm

from mgrpo.engine.config.hub_names import commit_of, pinned, shown
from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.hub.failures import (
    FAILURES,
    HubSource,
    Refusal,
    explaining,
    free_space,
    no_room,
    offline,
    patiently,
    temporary,
    token,
)
from mgrpo.engine.system.files import replace

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SMALL = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja")
OTHER_INDEX = re.compile(r".*\.index\.json")
PICKLE = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
TENSORS = re.compile(r"(?!consolidated|adapter_)[^/]+\.safetensors")
TIMEOUT = 20.0  # seconds for the list of files
AT_ONCE = 8  # files
FILE_TRIES = 3  # of a file: within each of them the hub's client tries five times itself, for half a minute


class Talk(Protocol):
    """Show the user what is going on."""

    def say(self, text: str) -> None:
        """Show a line of text."""

    def doing(self, text: str, part: float | None = None) -> None:
        """Show what takes time now, and which part of it is done, from 0 to 1."""


class Lines:
    """Print lines to stderr, for commands without a display."""

    def __init__(self) -> None:
        self.told = ""

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def doing(self, text: str, part: float | None = None) -> None:
        """Print what begins."""
        if text != self.told:
            self.told = text
            self.say(text)


@dataclass(frozen=True)
class Listing:
    """Hold the commit of a model on a hub, and the bytes of each of its files."""

    source: HubSource
    commit: str
    files: Mapping[str, int]

    def cached(self, name: str) -> Path | None:
        """Return where a file is in the cache."""
        found = try_to_load_from_cache(self.source.repo, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def missing(self, names: Collection[str]) -> int:
        """Return the bytes that are still to be downloaded for these files."""
        return sum(self.files[name] for name in names if not self.cached(name))


def source_of(name: str, agent: AgentConfig) -> HubSource:
    """Return what an agent's model is on a hub."""
    return HubSource(agent.model, agent.revision, f"agents.{name}" if name else "")


def look_up(source: HubSource, talk: Talk, *, patient: bool = True) -> Listing:
    """Ask the hub for a model's commit and files. Raises one of FAILURES."""
    api = HfApi(token=token())

    def ask() -> Any:
        if offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        revision = commit_of(source.revision) or source.asked
        return api.model_info(source.repo, revision=revision, files_metadata=True, timeout=TIMEOUT)

    info = patiently(ask, talk.say, source.repo) if patient else ask()
    if not info.sha:
        raise ValueError("the answer names no commit, expected that of a hub")
    return Listing(source, info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})


def folder(name: str, agent: AgentConfig, *, weights: bool = False) -> Path:
    """Return the directory of an agent's model, which is fetched if it is on a hub and not in the cache yet.

    weights: whether they must be in it. Raises ValueError naming the agent's model if it cannot be had.
    """
    if not agent.on_hub:
        return Path(agent.model)
    return _folder(source_of(name, agent), agent.trust_remote_code, agent.allow_pickle, weights)


@cache
def _folder(source: HubSource, trust: bool, pickles: bool, weights: bool) -> Path:
    agent = AgentConfig(model=source.repo, revision=source.revision, trust_remote_code=trust, allow_pickle=pickles)
    found = in_cache(source, agent, weights=weights) if commit_of(source.revision) else None
    return found or fetch(source, agent, Lines(), weights=weights)


def in_cache(source: HubSource, agent: AgentConfig, *, weights: bool) -> Path | None:
    """Return the directory of a model in the cache, or None if it is not there, or not whole."""
    revision = commit_of(source.revision) or source.asked
    try:
        found = Path(snapshot_download(source.repo, revision=revision, local_files_only=True, allow_patterns=[CONFIG]))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return found if _whole(found, agent, weights) else None


def _whole(found: Path, agent: AgentConfig, weights: bool) -> bool:
    there = {path.name for path in found.iterdir() if path.exists()}  # a link whose file was deleted is not there
    small = CONFIG in there and any(re.match("token|vocab|spiece", name) for name in there)
    return small and (not weights or _has_weights(found, there, agent))


def _has_weights(found: Path, there: Collection[str], agent: AgentConfig) -> bool:
    if INDEX in there:
        return _shards(found / INDEX) <= set(there)
    return any(TENSORS.fullmatch(name) or (agent.allow_pickle and PICKLE.fullmatch(name)) for name in there)


def _shards(index: Path) -> set[str]:
    """Return the files that an index names. One that cannot be read names none; transformers says what is wrong."""
    try:
        return set(map(str, json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return set()


def outlook(name: str, agent: AgentConfig) -> tuple[int, int]:
    """Return how many files of an agent's model, and how many bytes, a run would still download.

    Raises ValueError naming the agent's model if the hub does not say.
    """
    source = source_of(name, agent)
    if in_cache(source, agent, weights=True):
        return 0, 0
    with explaining(source):
        listing = look_up(source, Lines())
        wanted = [each for each in needed(listing, agent, weights=True) if not listing.cached(each)]
    return len(wanted), listing.missing(wanted)


def fetch(source: HubSource, agent: AgentConfig, talk: Talk, *, weights: bool = True) -> Path:
    """Return the directory of a model, after downloading what it lacks.

    If the hub cannot be reached, what the cache holds is taken. Raises ValueError naming the agent's model.
    """
    with explaining(source):
        return _fetch(source, agent, talk, weights)


def _fetch(source: HubSource, agent: AgentConfig, talk: Talk, weights: bool) -> Path:
    here = in_cache(source, agent, weights=weights)
    if here and (offline() or commit_of(source.revision)):
        return here
    try:
        listing = look_up(source, talk, patient=here is None)
    except FAILURES as error:
        if here is None or not temporary(error):
            raise
        talk.say(f"{source.repo}: the hub cannot be reached, commit {here.name[:7]} is taken from the cache")
        return here
    return _download(listing, agent, talk, weights)


def _download(listing: Listing, agent: AgentConfig, talk: Talk, weights: bool) -> Path:
    """Download what is needed, each group of files after the other, and return the directory."""
    wanted = needed(listing, agent, weights)
    _check_room(listing, wanted)
    loader = _Loader(listing, talk, listing.missing(wanted))
    small = [name for name in wanted if not _is_weights(name) and name != CONFIG]
    loader.load(small)
    loader.load([CONFIG])
    found = Path(str(listing.cached(CONFIG))).parent
    _remember(found, listing.source.asked)
    if weights:
        heavy = [name for name in wanted if _is_weights(name)]
        loader.load([name for name in heavy if name in _shards(found / INDEX)] if INDEX in wanted else heavy)
    return found


def _remember(found: Path, revision: str) -> None:
    """Note in the cache at which commit a branch or tag was, as the hub's client does, for when there is no hub."""
    note = found.parents[1] / "refs" / revision
    with suppress(OSError):  # a cache that may only be read
        if revision != found.name and not (note.is_file() and note.read_text() == found.name):
            note.parent.mkdir(parents=True, exist_ok=True)
            replace(note, found.name.encode())


def _check_room(listing: Listing, wanted: Collection[str]) -> None:
    if (size := listing.missing(wanted)) > free_space():
        raise Refusal(f"{listing.source.key}.model: {listing.source.repo!r} given: {no_room(size)}")


def needed(listing: Listing, agent: AgentConfig, weights: bool) -> list[str]:
    """Return the files that training reads. Raises ValueError if there is no config, or no weights that may be read."""
    files, page = listing.files, f"{listing.source.key}.model: {listing.source.repo!r} given: {listing.source.page}"
    if CONFIG not in files:
        raise Refusal(f"{page} has no {CONFIG}: expected a model that transformers can load")
    tensors = [name for name in files if TENSORS.fullmatch(name)]
    if INDEX not in files and "model.safetensors" in tensors:
        tensors = ["model.safetensors"]
    pickles = [name for name in files if PICKLE.fullmatch(name)] if agent.allow_pickle and not tensors else []
    if not tensors and not pickles:
        raise Refusal(f"{page} {_no_weights(files, listing.source.key)}")
    small = [name for name in files if SMALL.fullmatch(name) and (name == INDEX or not OTHER_INDEX.fullmatch(name))]
    code = [name for name in files if re.fullmatch(r"[^/]+\.py", name)] if agent.trust_remote_code else []
    return [*small, *code, *(tensors or pickles if weights else ())]


def _no_weights(files: Collection[str], key: str) -> str:
    if any(PICKLE.fullmatch(name) for name in files):
        return (
            f"has its weights as pickles only: expected safetensors, or {key}.allow_pickle = true, with which plain "
            "tensors are unpickled"
        )
    return "has no safetensors: expected the weights of a model of transformers, not an adapter, GGUF or another format"


def _is_weights(name: str) -> bool:
    return bool(TENSORS.fullmatch(name) or PICKLE.fullmatch(name))


class _Loader:
    """Download files of one model, some at a time, and show how far that is. total: bytes of all that is missing."""

    def __init__(self, listing: Listing, talk: Talk, total: int) -> None:
        self.listing, self.talk, self.total, self.done = listing, talk, max(total, 1), 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        source = listing.source
        self.what = f"downloading {shown(source.repo, pinned(source.revision, listing.commit))}"

    def load(self, names: Collection[str]) -> None:
        """Download files, unless they are cached. Raises one of FAILURES, after all others have been stopped."""
        missing = [name for name in names if not self.listing.cached(name)]
        if missing:
            self.talk.doing(f"{self.what}, {self.total / 2**20:,.1f} MiB", self.done / self.total)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for each in as_completed([pool.submit(self._load, name) for name in missing]):
                    each.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _load(self, name: str) -> None:
        repo, commit = self.listing.source.repo, self.listing.commit

        def get() -> None:
            came: list[float] = []

            def add(size: float) -> None:
                came.append(size)
                self._add(size)

            try:
                hf_hub_download(repo, name, revision=commit, token=token(), tqdm_class=_bar(add))
            except FAILURES:
                self._add(-sum(came))  # they are lost: the next try begins anew
                raise

        patiently(get, self.talk.say, f"{repo}/{name}", FILE_TRIES)

    def _add(self, size: float) -> None:
        if self._stop.is_set():
            raise InterruptedError("another file could not be downloaded")
        with self._lock:
            self.done += int(size)
            self.talk.doing(f"{self.what}, {self.total / 2**20:,.1f} MiB", min(self.done / self.total, 1.0))


def _bar(report: Callable[[float], None]) -> Any:
    """Return a class of bars, as the hub's client wants one, that draws nothing and reports what comes in."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            report(n or 0)
            return None

    return Bar
