"""Ask a hub patiently, and turn what goes wrong into one sentence that says what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mgrpo.engine.config.hub_names import asked
from mgrpo.engine.system import process, secrets
from mgrpo.engine.system.retry import doubling

Result = TypeVar("Result")
Say = Callable[[str], None]

TOKEN = "HF_TOKEN"
FAILURES = (OSError, ValueError, HTTPError)  # what the hub's client raises; most of its errors are OSErrors
TRIES = 6  # of one request; the pauses between them come to half a minute
PAUSES = (1.0, 30.0)  # seconds: the first pause, and the longest; a hub may ask for one up to the longest
BUSY = (408, 425, 429, 500, 502, 503, 504)  # statuses of a hub that may answer later
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class HubSource:
    """Name what is wanted from a hub: a model or a data set. key: what errors begin with, such as "agents.main"."""

    repo: str
    revision: str = ""
    key: str = ""
    kind: str = "model"

    @property
    def page(self) -> str:
        """The address at which people see it."""
        folder = "" if self.kind == "model" else "datasets/"
        return f"{constants.ENDPOINT}/{folder}{self.repo}"

    @property
    def asked(self) -> str:
        """The branch, tag or commit that was asked for."""
        return asked(self.revision)


def token() -> str | None:
    """Return the user's token for hubs, or None, with which the client looks into its own file."""
    return secrets.get(TOKEN) or None


def offline() -> bool:
    """Return whether the user forbids all requests, by HF_HUB_OFFLINE."""
    return bool(constants.HF_HUB_OFFLINE)


def patiently(work: Callable[[], Result], say: Say, what: str, tries: int = TRIES) -> Result:
    """Return what `work` returns, which is tried again after errors that may pass, `tries` times in all.

    what: names the work in the lines that `say` shows. Raises the last error.
    """
    for number, pause in enumerate(doubling(*PAUSES), 1):
        try:
            return work()
        except FAILURES as error:
            if number == tries or not temporary(error):
                raise
            seconds = max(pause, min(_asked_pause(error), PAUSES[1]))
            say(f"{what}: {brief(error)}; trying again in {seconds:.3g} s")
        process.pause(seconds)
    raise AssertionError


def temporary(error: Exception) -> bool:
    """Return whether the same request may succeed later: a busy hub, a lost connection, a download that was cut."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY
    return isinstance(error, HTTPError) or _cut(error)


def brief(error: Exception) -> str:
    """Return an error in a few words."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    if _cut(error):
        return f"the download from {constants.ENDPOINT} was cut"
    if isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    return " ".join(str(error).split()) or type(error).__name__


class Refusal(ValueError):
    """Say that what a hub has is not what can be read. The sentence is complete."""


@contextmanager
def explaining(source: HubSource) -> Iterator[None]:
    """Turn errors of the hub's client into `explained` ones."""
    try:
        yield
    except Refusal:
        raise
    except FAILURES as error:
        raise explained(source, error) from error


def explained(source: HubSource, error: Exception) -> ValueError:
    """Return the error to raise: what was given, what the hub said, and what to do."""
    error = _cause(error)
    field = "revision" if isinstance(error, RevisionNotFoundError) else source.kind
    given = source.asked if field == "revision" else source.repo
    where = f"{source.key}.{field}" if source.key else field
    return ValueError(f"{where}: {given!r} given: {_advice(source, error)}")


def _advice(source: HubSource, error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, RevisionNotFoundError):
        return f"{source.page} has no such branch, tag or commit: expected one of {source.page}/tree/main"
    if isinstance(error, GatedRepoError) or status == 403:
        return _gated(source)
    if isinstance(error, RepositoryNotFoundError):
        return _unknown(source)
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{source.page} at {source.asked} lacks a file that it lists: {brief(error)}"
    if status == 401:
        return f"{constants.ENDPOINT} refuses the token: expected a valid one in {TOKEN}"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) and (offline() or not temporary(error)):
        return _not_cached(source)
    if isinstance(error, OSError) and error.errno in FULL:
        return no_room(0)
    if isinstance(error, HFValidationError):
        return f"expected an id such as 'Qwen/Qwen3-0.6B': {brief(error)}"
    if isinstance(error, JSONDecodeError):
        return f"{constants.ENDPOINT} does not answer as a hub does: expected the address of one in HF_ENDPOINT"
    if isinstance(error, ValueError | FileNotFoundError):
        return brief(error)
    return f"{brief(error)}: {_later(status)}"


def _gated(source: HubSource) -> str:
    done = "with the account of the token in" if token() else "and set"
    return f"it is gated: expected that you accept its licence at {source.page} {done} {TOKEN}"


def _unknown(source: HubSource) -> str:
    here = "there is no directory of that name, and " if source.kind == "model" else ""
    secret = f"a {TOKEN} that may read it" if token() else f"{TOKEN} to be set, if it is private"
    return f"{here}{constants.ENDPOINT} has no such {source.kind}: expected an id that it has, or {secret}"


def _not_cached(source: HubSource) -> str:
    return (
        f"HF_HUB_OFFLINE is set, and {source.asked} is not, or not whole, in {constants.HF_HUB_CACHE}: expected one "
        "that was downloaded before; unset HF_HUB_OFFLINE once, or set HF_HOME to where it is"
    )


def _later(status: int) -> str:
    if status == 429:
        return f"too many requests: expected fewer; try again later, or set {TOKEN}, which may send more"
    return "try again later, or set HF_ENDPOINT to a hub that can be reached, or HF_HUB_OFFLINE=1 for what is cached"


def no_room(size: int) -> str:
    """Return what to do about a full disk. size: bytes that are still to be downloaded, 0 if that is not known."""
    need = f", and {size / 2**30:.3g} GiB are still to be downloaded" if size else ""
    return (
        f"the disk of {constants.HF_HUB_CACHE} is full, it has {free_space() / 2**30:.3g} GiB free{need}: expected "
        "more room there, or HF_HOME on a larger disk"
    )


def free_space() -> int:
    """Return the free bytes where the hub's client keeps files."""
    path = Path(constants.HF_HUB_CACHE)
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


def _asked_pause(error: Exception) -> float:
    """Return the seconds after which a busy hub wants to be asked again, 0 if it does not say."""
    error = _cause(error)
    after = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(after) if after.isdecimal() else 0.0


def _cause(error: Exception) -> Exception:
    """Return what is behind an error that says only that something is neither on the hub nor here."""
    while isinstance(error, FileNotFoundError | ConnectionError):
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, OSError | HTTPError):
            break
        error = inner
    return error


def _cut(error: Exception) -> bool:
    return type(error) is OSError and "Consistency check failed" in str(error)
