"""Write a run's numbers for TensorBoard, as event files in tensorboard/ of the run directory.

The events are written without torch or TensorFlow, whose import takes seconds. Each process writes the whole run into a
new file, which begins with the order to drop what was read before. So TensorBoard shows what metrics.jsonl holds, also
after a run went back to a checkpoint. Only the file before it is kept: a TensorBoard that is reading it would never
find the new one if it were gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mgrpo.engine.report.loggers.base import LoggedRollout, LoggedRun, Logger, Status

FILES = "events.out.tfevents."  # how the names of TensorBoard's files begin; the second of their beginning follows


class TensorBoard(Logger):
    """Write event files."""

    replays: ClassVar[bool] = True

    def begin(self, run: LoggedRun) -> str | None:
        """Begin a new file, which counts instead of those that are there."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        before = sorted(folder.glob(f"{FILES}*"))
        second = max([int(time.time()), *(_second(path) + 1 for path in before)])  # files are read in order of names
        self._writer = RecordWriter((folder / f"{FILES}{second:010d}.mgrpo").open("wb"))
        self._write(file_version="brain.Event:2")
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))  # drop what was read from step 0 on
        self._writer.flush()
        for path in before[:-1]:
            path.unlink(missing_ok=True)
        return None

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write each number as a scalar."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))
        self._writer.flush()

    def rollouts(self, step: int, rollouts: Sequence[LoggedRollout]) -> None:
        """Write the episodes as texts, one behind the other."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb

        texts = ["    " + rollout.text.replace("\n", "\n    ") for rollout in rollouts]  # a block of code, in Markdown
        value = text_pb("rollouts", texts).value[0]
        self._write(step=step, summary=Summary(value=[Summary.Value.FromString(value.SerializeToString())]))
        self._writer.flush()

    def finish(self, status: Status) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **event).SerializeToString())


def _second(path: Path) -> int:
    """Return the second in a file's name; -1 if there is none, as in a file of another program."""
    second = path.name.removeprefix(FILES).partition(".")[0]
    return int(second) if second.isdecimal() else -1
