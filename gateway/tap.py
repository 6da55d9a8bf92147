"""The bounded buffer between answers and monitors. A full tap drops rows and counts them.

One thread offers (the event loop), one takes (the observer). Nothing is locked: each side only ever
adds to numbers of its own, and what waits is their difference.
"""

import threading
from collections import deque
from dataclasses import dataclass

from gateway.counters import Counter
from gateway.tensors import Array

BLOCK_ROWS = 50
"""So many waiting rows wake the observer before its second is over."""


@dataclass(slots=True)
class Observation:
    """One run of a session, or one request with its answer. Nobody writes to the arrays."""

    model: str
    version: int
    inputs: list[Array]
    outputs: list[Array]
    rows: int
    n_bytes: int


class Tap:
    """Holds up to `rows_max` rows and `bytes_max` bytes of observations."""

    def __init__(self, rows_max: int, bytes_max: int) -> None:
        self._rows_max = rows_max
        self._bytes_max = bytes_max
        self._waiting: deque[Observation] = deque()
        self._rows_in = self._bytes_in = 0
        self._rows_out = self._bytes_out = 0
        self._is_calling = False
        self.called = threading.Event()

    def offer(self, observation: Observation, dropped: Counter) -> None:
        """Hand over one observation, or count its rows as dropped. Never waits."""
        rows = self._rows_in - self._rows_out + observation.rows
        n_bytes = self._bytes_in - self._bytes_out + observation.n_bytes
        if rows > self._rows_max or n_bytes > self._bytes_max:
            dropped.add(observation.rows)
            return
        self._rows_in += observation.rows
        self._bytes_in += observation.n_bytes
        self._waiting.append(observation)
        if rows >= BLOCK_ROWS and not self._is_calling:
            self._is_calling = True
            self.called.set()

    def take(self, rows: int) -> list[Observation]:
        """The oldest observations, until they hold so many rows; called by one thread only."""
        waiting, taken, n = self._waiting, [], 0
        while waiting and n < rows:
            taken.append(waiting.popleft())
            n += max(taken[-1].rows, 1)
        self._rows_out += sum(observation.rows for observation in taken)
        self._bytes_out += sum(observation.n_bytes for observation in taken)
        return taken

    def rest(self, timeout_s: float) -> None:
        """Wait until enough rows are there, somebody calls, or the time is over."""
        self.called.wait(timeout_s)
        self.called.clear()
        self._is_calling = False
