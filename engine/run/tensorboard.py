"""Copy the rows of metrics to TensorBoard. A number may appear there twice; metrics.jsonl is the reference.

Each stage has its own folder, because each counts its steps from 0 and purging removes all tags from a step on.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mgrpo.engine.run.metrics import STAGES, Row


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

            _wait_for_next_second(self.folder / stage)
            self._writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=self._purge.get(stage))
            self._purge.pop(stage, None)
        return self._writers[stage]

    def _leave(self, stage: str) -> None:
        if writer := self._writers.pop(stage, None):
            with suppress(OSError):
                writer.close()


def _wait_for_next_second(folder: Path) -> None:
    """Wait until a new file gets a later second in its name: files are read in the order of their names."""
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    while seconds and time.time() < max(seconds) + 1:
        time.sleep(0.05)
