"""Read the rows of a run as they are written, for one logger."""

from __future__ import annotations

from pathlib import Path

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.follow import Unmerged
from mgrpo.engine.report.metrics import Tail
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import Row


class NewRows:
    """Follow the rows of a run of any topology: those of all its processes, merged as `mgrpo report` merges them.

    In a decoupled run a step comes when the next one is there too, so that it has what slower workers counted for it.
    """

    def __init__(self, run: Path, config: Config) -> None:
        paths = RunPaths(run)
        self._one = Tail(paths.metrics) if config.colocated else None
        self._parts = None if config.colocated else Unmerged(paths, config.agents)

    def read(self, over: bool) -> list[Row]:
        """Return the rows since the last call, and also steps that came before, if the run took them again.

        over: no more rows are written, so that none waits for others.
        """
        if self._parts:
            return self._parts.read(late=not over)
        assert self._one
        self._one.renewed()
        return list(self._one.rows())

    def close(self) -> None:
        """Close the files."""
        (self._parts or self._one).close()  # type: ignore[union-attr]
