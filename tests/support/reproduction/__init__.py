"""Report what a reproduction found: the fault is there (exit status 1), it is not (0), or it could not be tried (2)."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import NoReturn


def fault(text: str) -> NoReturn:
    """End with status 1: the fault is there."""
    _end("FAULT", text, 1)


def held(text: str) -> NoReturn:
    """End with status 0: what the script tried went well, or was refused as it should be."""
    _end("held", text, 0)


def cannot(text: str) -> NoReturn:
    """End with status 2: the fault could not be tried, so that nothing is known of it."""
    _end("could not be tried", text, 2)


def _end(verdict: str, text: str, status: int) -> NoReturn:
    print(f"{verdict}: {text}", flush=True)
    sys.exit(status)


def report_untried(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Stand in for sys.excepthook: an exception that the script does not expect proves nothing, so the status is 2."""
    traceback.print_exception(kind, error, trace)
    cannot(f"{kind.__name__}: {error}")


sys.excepthook = report_untried
