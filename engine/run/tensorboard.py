"""Copy the rows of metrics to TensorBoard. A number may appear there twice; metrics.jsonl is the reference.

Each stage has its own folder, because each counts its steps from 0 and purging removes all tags from a step on.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mgrpo.engine.run.metrics import STAGES, Row

FILES = "events.out.tfevents."  # how the names of TensorBoard's files begin; the second of their beginning follows


class Boards:
    """Write rows to TensorBoard files below a folder, which are created when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}  # by stage, the step from which the next writer removes what is there

    def show(self, row: Row) -> None:
        """Write the numbers of a row under their keys, with "warmup/" before those of the warm-up.

        Raises OSError if the disk is full.
        """
        stage, step = row["stage"], row["step"]
        prefix = "warmup/" if stage == "warmup" else ""
        try:
            writer = self._writer(stage)
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(prefix + key, value, step)
            writer.flush()
        except OSError as error:  # the file may end in a torn record: the next writer begins a new one here
            self._leave(stage)
            self._purge.setdefault(stage, step)
            raise OSError(error.errno, f"cannot write for TensorBoard: {error.strerror}", str(self.folder)) from error

    def rewind(self, step: int, stage: str) -> None:
        """Remove everything from (stage, step) on, because that step is about to run again."""
        self.close()
        self._purge = {stage: step} | dict.fromkeys(STAGES[STAGES.index(stage) + 1 :], 0)

    def close(self) -> None:
        """Close all writers."""
        for stage in [*self._writers]:
            self._leave(stage)

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            _come_last(self.folder / stage)
            self._writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=self._purge.get(stage))
            self._purge.pop(stage, None)
        return self._writers[stage]

    def _leave(self, stage: str) -> None:
        if writer := self._writers.pop(stage, None):
            with suppress(OSError):
                writer.close()


def _come_last(folder: Path) -> None:
    """See to it that a new file gets a later second in its name than those there: they are read in the order of names.

    This waits for the next second, but not for a clock that was ahead and then went back: the files that were written
    meanwhile get the present second in their names, in the order that they had.
    """
    now = int(time.time())
    files = sorted(folder.glob(f"{FILES}*"))
    ahead = [path for path in files if _second(path) > now]
    for number, path in enumerate(ahead):
        rest = path.name.removeprefix(FILES).partition(".")[2]
        path.rename(folder / f"{FILES}{now:010d}.{number:06d}-{rest}")
    if ahead or any(_second(path) == now for path in files):
        time.sleep(max(0.0, min(1.0, now + 1 - time.time())))


def _second(path: Path) -> int:
    """Return the second in a file's name; -1 if there is none, as in a file of another program."""
    second = path.name.removeprefix(FILES).partition(".")[0]
    return int(second) if second.isdecimal() else -1
