"""Find the loggers that a config names in log.to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from mgrpo.engine.report.loggers.base import Logger
from mgrpo.engine.system.imports import load_name

CLASSES = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "TrackIO"}
NEEDS_NOTHING = ("tensorboard",)  # neither a key nor a class of the user: these loggers never refuse a run


def label(to: str) -> str:
    """Return a short name for a logger: its own, or that of the user's class; it can be a part of a file's name."""
    return re.sub(r"[^\w.-]", "_", to.rpartition(":")[2])


def check_installed(loggers: Sequence[str]) -> None:
    """Check that the packages of the loggers are there, without importing them. Raises ValueError with the command."""
    for to in loggers:
        if to in CLASSES and find_spec(to) is None:
            raise ValueError(f"log.to: {to!r} given: {to} is not installed: pip install 'mgrpo[{to}]'")


def make_logger(to: str) -> Logger:
    """Make the logger of a name, or of the user's class. Raises ValueError if it cannot be found."""
    if to in CLASSES:
        made: Logger = getattr(import_module(f"mgrpo.engine.report.loggers.{to}"), CLASSES[to])()
        return made
    cls = load_name(to, "log.to", "Class")
    if not (isinstance(cls, type) and issubclass(cls, Logger)):
        given = "not defined" if cls is None else repr(cls)
        raise ValueError(f"log.to: {to!r} given: it is {given}: expected a subclass of mgrpo.Logger")
    return cls()
