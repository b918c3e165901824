"""Show at regular intervals that this process is alive, even during a long step of its main thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event, Thread

log = logging.getLogger(__name__)


class Heartbeat:
    """Call `beat` every `seconds` in a separate thread, from `start` to `stop`, even if it raises one of `errors`.

    Such an error is logged as a warning that begins with `failure`. seconds: a third of the lease that the beat
    extends, so that two beats may fail before the lease lapses.
    """

    def __init__(
        self,
        beat: Callable[[], None],
        seconds: float,
        failure: str = "heartbeat",
        errors: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        self.beat, self.seconds, self.failure, self.errors = beat, seconds, failure, errors
        self._stopped = Event()
        self._thread = Thread(target=self._run, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Start the thread. The first beat comes after `seconds`."""
        self._thread.start()

    def stop(self, timeout: float = 0.0) -> None:
        """End the thread, and wait at most `timeout` seconds for a beat that is under way."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopped.wait(self.seconds):
            try:
                self.beat()
            except self.errors as error:
                log.warning("%s: %s", self.failure, error)
