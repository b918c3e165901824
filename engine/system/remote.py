"""Reach files through fsspec, here or in an object store. An outage of a store is an OSError, like that of a disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

# What a mistake of ours would raise; everything else that a library raises is about the store or the way to it.
MISTAKES = (AttributeError, TypeError, NotImplementedError, AssertionError)


def file_system(root: str | os.PathLike[str]) -> tuple[Any, str]:
    """Return the file system of a folder, a local path or an fsspec URL, and the folder's path in it.

    Calls of a file system that is not local raise OSError for everything that its library raises. Raises ValueError if
    there is no such kind of URL, or if it needs a package that is not installed.
    """
    try:
        fs, directory = fsspec.url_to_fs(os.fspath(root))
    except ImportError as error:
        raise ValueError(f"store.files: {os.fspath(root)!r} given: {error}") from error
    return (fs if isinstance(fs, LocalFileSystem) else Remote(fs)), directory


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Raise OSError naming the place for what a library raises that has no connection, or loses it."""
    try:
        yield
    except (OSError, *MISTAKES):
        raise
    except Exception as error:  # each store's library has errors of its own, such as botocore's EndpointConnectionError
        raise OSError(errno.EIO, f"{place}: {error.__class__.__name__}: {error}") from error


class Remote:
    """Pass everything on to a file system, under `reaching`. Use `reaching` itself around the files that it opens."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        return _reached(found, f"store.files ({self._fs.__class__.__name__})") if callable(found) else found


def _reached(method: Callable[..., Any], place: str) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with reaching(place):
            return method(*args, **kwargs)

    return call
