"""Compare mathematical answers with `math-verify`, in a process of its own.

The package stops what takes too long by an alarm signal, which works in a process's main thread only, while scores are
made in threads; and some expressions, such as 9**9**9, keep it busy regardless. So a child process compares, one pair
of answers after the other, and is ended and started anew if it takes too long.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec

START = 60.0  # seconds that the child may take to import the package, on a busy machine


class MathAnswers:
    """Compare answers in a child process, which starts with the first pair; any thread may ask.

    timeout: seconds for a pair. Raises ValueError if `math-verify` is not installed.
    """

    def __init__(self, timeout: float = 5.0) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("math-verify is not installed: expected it for MathAnswers: pip install 'mgrpo[math]'")
        self.timeout = timeout
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equal(self, given: str, right: str) -> bool:
        """Return whether two answers, in LaTeX or plain, are mathematically the same.

        An answer that cannot be read is not, and neither is one that takes longer than the timeout: whoever gave it
        gets no credit for an expression that nobody can evaluate.
        """
        with self._lock:
            child = self._started()
            try:
                _write(child, [given, right])
                return _read(child, self.timeout) is True
            except (OSError, TimeoutError):  # it died, of memory for example, or takes too long
                self.close()
                return False

    def close(self) -> None:
        """End the child process, if there is one; the next pair starts another."""
        if self._child is not None:
            _end(self._child)
            self._child = None

    def _started(self) -> subprocess.Popen[bytes]:
        """Return a child that is ready. Raises RuntimeError if none can be started."""
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = child = _start()
            weakref.finalize(self, _end, child)
            try:
                _read(child, START)
            except (OSError, TimeoutError) as error:
                self.close()
                raise RuntimeError(f"math-verify does not start in a process of its own: {error}") from error
        return self._child


def _start() -> subprocess.Popen[bytes]:
    """Start this file as a program. It leaves Ctrl-C to us, and ends when its input does."""
    command = [sys.executable, "-P", __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, process_group=0)


def _write(child: subprocess.Popen[bytes], pair: list[str]) -> None:
    assert child.stdin is not None
    data = memoryview(json.dumps(pair).encode() + b"\n")
    while data:
        data = data[child.stdin.write(data) :]


def _read(child: subprocess.Popen[bytes], seconds: float) -> object:
    """Return the child's next line, as JSON. Raises TimeoutError if there is none in time, OSError if it ended."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], seconds)[0]:
        raise TimeoutError(f"no answer in {seconds:g} s")
    line = child.stdout.readline()
    if not line:
        raise BrokenPipeError(f"it ended with status {child.wait()}")
    found: object = json.loads(line)
    return found


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
    child.wait()


def _serve() -> None:
    """Answer each line of the input, a pair of answers, with true or false; this runs in the child."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the package prints is no answer
    from math_verify import parse, verify

    def read(text: str) -> list[object]:
        found: list[object] = parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None)
        return found

    print("true", file=answers)
    for line in sys.stdin:
        given, right = json.loads(line)
        same = bool(verify(read(right), read(given), timeout_seconds=None))
        print(json.dumps(same), file=answers)


if __name__ == "__main__":
    _serve()
