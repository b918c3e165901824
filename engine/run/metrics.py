"""Read and write rows of metrics: files of JSON lines, one row per step or evaluation.

A row always has "stage" (one of STAGES) and "step" (int). docs/metrics.md lists the other keys.
"""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

from mgrpo.engine.system.files import append

Row = dict[str, Any]  # one row of metrics, by key

log = logging.getLogger(__name__)

STAGES = ("warmup", "rl")  # in the order in which a run goes through them


def is_evaluation(row: Row) -> bool:
    """Return whether a row is that of an evaluation, not of a training step."""
    return "eval/held_out_accuracy" in row


class JsonLines:
    """Append rows to a file of JSON lines. Opening it cuts off a last line that a killed process left unfinished."""

    def __init__(self, path: Path) -> None:
        self._file = _open_lines(path)

    def append(self, row: Row) -> Row:
        """Append the row as a whole or not at all, and return it as written: with null for NaN and infinities.

        Raises OSError if the disk is full; the file is then as it was.
        """
        written = {key: plain(value) for key, value in row.items()}
        try:
            append(self._file, (json.dumps(written, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, f"cannot append metrics: {error.strerror}", str(self._file.name)) from error
        return written

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics file, or none if there is no file. An unfinished last line is ignored.

    A damaged line is left out, with a warning that names it: no run depends on its metrics.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        row = parse_row(line)
        if row is None:
            log.warning("%s, line %d is left out: not a row of metrics: %.60r", path, number, line)
        else:
            rows.append(row)
    return rows


def parse_row(line: bytes) -> Row | None:
    """Return the row in a line of a metrics file, or None if it is damaged: no JSON, or without stage and step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(row, dict) and row.get("stage") in STAGES and isinstance(row.get("step"), int)
    return row if known else None


def plain(value: Any) -> Any:
    """Convert a value to what JSON can express: scalars of numpy and torch to numbers, NaN and infinities to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_lines(path: Path) -> io.FileIO:
    """Open a file for appending lines, without the unfinished last line, to which the next one would be joined."""
    file = io.FileIO(path, "a+")
    file.seek(0)
    text = file.readall()
    file.truncate(text.rfind(b"\n") + 1)
    return file
