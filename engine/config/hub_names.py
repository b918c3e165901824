"""Tell the id of a model on a hub from a path, and a revision that was asked for from the commit that it was.

A run looks its model up once. From then on its revision is written as "main@<commit>": what was asked for, and the
commit that it was at that time, which all processes of the run, and a resumed run, load.
"""

from __future__ import annotations

import re
from pathlib import Path

MAIN_BRANCH = "main"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_PINNED = re.compile(r"(?:(?P<asked>.*)@)?(?P<commit>[0-9a-f]{40})")


def is_id(model: str) -> bool:
    """Return whether a model is given by its id, ORGANISATION/NAME: a path of that form that exists is a path."""
    return looks_like_id(model) and not Path(model).exists()


def looks_like_id(model: str) -> bool:
    """Return whether a text has the form of an id: two names with one slash between them, the first without a dot."""
    return bool(_ID.fullmatch(model)) and ".." not in model and "--" not in model


def commit_of(revision: str) -> str | None:
    """Return the commit that a revision names, or None for a branch or a tag, which may move."""
    found = _PINNED.fullmatch(revision)
    return found["commit"] if found else None


def asked(revision: str) -> str:
    """Return what was asked for: a branch, a tag or a commit."""
    found = _PINNED.fullmatch(revision)
    return (found["asked"] or found["commit"]) if found else revision or MAIN_BRANCH


def pinned(revision: str, commit: str) -> str:
    """Return the revision with the commit that it is now."""
    return commit if asked(revision) == commit else f"{asked(revision)}@{commit}"


def shown(model: str, revision: str) -> str:
    """Return how a model is named to the user: an id with its revision and the first digits of its commit."""
    commit = commit_of(revision)
    if commit is None:
        return f"{model} ({asked(revision)})" if revision else model
    return f"{model} ({asked(revision)} at {commit[:7]})" if asked(revision) != commit else f"{model} ({commit[:7]})"
