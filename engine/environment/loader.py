"""Load the user's environment class, as the config names it."""

from __future__ import annotations

from collections.abc import Collection

from mgrpo.engine.config.schema import EnvironmentConfig
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.system.imports import load_name


def load_environment(config: EnvironmentConfig) -> Environment:
    """Construct the user's environment with its options.

    Raises ValueError if the class cannot be found, is no subclass of Environment, or refuses the options.
    """
    cls = environment_class(config)
    try:
        return cls(**config.options)
    except TypeError as error:
        raise ValueError(f"environment.options: {config.options} given: {error}") from error


def volatile_options(config: EnvironmentConfig) -> Collection[str]:
    """Return the names of the options that may change when a run is resumed. Raises ValueError if there is no class."""
    return environment_class(config).volatile


def environment_class(config: EnvironmentConfig) -> type[Environment]:
    """Return the user's class. Raises ValueError if it cannot be found, or is no subclass of Environment."""
    cls = load_name(config.use, "environment.use", "Class")
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        module, _, name = config.use.rpartition(":")
        given = "not defined" if cls is None else repr(cls)
        raise ValueError(f"environment.use: {name!r} in {module} is {given}: expected a subclass of Environment")
    return cls
