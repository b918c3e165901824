"""Load the user's environment class, as the config names it."""

from __future__ import annotations

from mgrpo.engine.config.schema import EnvironmentConfig
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.system.imports import load_name


def load_environment(config: EnvironmentConfig) -> Environment:
    """Construct the user's environment with its options.

    Raises ValueError if the class cannot be found, is no subclass of Environment, or refuses the options.
    """
    cls = load_name(config.use, "environment.use", "Class")
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        module, _, name = config.use.rpartition(":")
        given = "not defined" if cls is None else repr(cls)
        raise ValueError(f"environment.use: {name!r} in {module} is {given}: expected a subclass of Environment")
    try:
        return cls(**config.options)
    except TypeError as error:
        raise ValueError(f"environment.options: {config.options} given: {error}") from error
