"""The rows of metrics for TensorBoard: a copy, in which a number may stand twice; metrics.jsonl is what counts.

A folder per stage: purging takes all tags from a step on, and each stage counts from 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

STAGES = ("warmup", "rl")  # in the order in which a run goes through them


class Boards:
    """Writers below a folder, made when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}  # by stage, from which step on the next writer takes back what is there

    def show(self, row: Mapping[str, Any]) -> None:
        """A row's numbers under their keys, "warmup/" before the warm-up's. Raises OSError when there is no room."""
        stage, step = row["stage"], row["step"]
        prefix = "warmup/" if stage == "warmup" else ""
        try:
            writer = self._writer(stage)
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(prefix + key, value, step)
            writer.flush()
        except OSError as error:  # the writer stays so, its file perhaps torn at the end: another one begins here
            self._leave(stage)
            self._purge.setdefault(stage, step)
            raise OSError(error.errno, f"cannot tell TensorBoard: {error.strerror}", str(self.folder)) from error

    def rewind(self, step: int, stage: str) -> None:
        """That step is about to run again."""
        self.close()
        self._purge = {stage: step} | dict.fromkeys(STAGES[STAGES.index(stage) + 1 :], 0)

    def close(self) -> None:
        for stage in [*self._writers]:
            self._leave(stage)

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            _pass_second_of_last(self.folder / stage)
            self._writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=self._purge.get(stage))
            self._purge.pop(stage, None)
        return self._writers[stage]

    def _leave(self, stage: str) -> None:
        if writer := self._writers.pop(stage, None):
            with suppress(OSError):
                writer.close()


def _pass_second_of_last(folder: Path) -> None:
    """Files are read in the order of their names, which say the second: two of one second might swap places."""
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    while seconds and time.time() < max(seconds) + 1:
        time.sleep(0.05)
