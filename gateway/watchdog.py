"""Runs that hold the event loop: asked to end by a thread that looks every so often.

A run on a session's own thread is ended by its batcher, on the loop. One on the loop itself can
only be seen from another thread. Only what was measured to take microseconds is run there, but some
inputs make a model go round without end. What does not end even when it is asked to is for the
supervisor, which replaces workers that do not go round their loop.
"""

import threading
import time
from typing import Protocol

HELD_S_MAX = 1.0
"""A run may hold the loop for so long; a busy machine must not look like an endless run."""
_LOOK_S = 0.5


class Holder(Protocol):
    """Who runs something on the loop."""

    @property
    def ran_at(self) -> float:
        """When its newest run started, by `time.monotonic`."""

    def interrupt(self) -> None:
        """End what runs, and let it run elsewhere. Called by another thread."""


class Watchdog:
    """Looks at what holds the loop."""

    def __init__(self, held_s_max: float = HELD_S_MAX) -> None:
        self.holder: Holder | None = None
        """Who runs on the loop at this moment; set and taken away by the loop."""
        self._held_s_max = held_s_max
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look, unless it does so already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()

    def _look(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            holder = self.holder
            if holder is None:
                continue
            if time.monotonic() - holder.ran_at > self._held_s_max and self.holder is holder:
                holder.interrupt()
