"""How much the shadows of a worker may run: as much as leaves the thread that answers its core.

The kernel counts for each thread how long it was ready to run and had no core, and how often it got
one (https://docs.kernel.org/scheduler/sched-stats.html). What the answering thread waits while a
shadow runs, beyond what it waits while none does, is charged to the shadows; they pay by time in
which none of them runs.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

ALLOWED_NS = 5_000
"""What the answering thread may wait on account of shadows, for each time that it gets a core: one
wait of 4 ms, the tick of many kernels, in 800. Clients wait as often, and more threads may."""
ALLOWED_SHARE = 0.0005
"""And of the time: else a thread with little to do would hardly ever forgive."""
SAVED_NS = 4_000_000
"""What may be saved up."""
OWED_NS_MAX = 10_000_000
"""Of what is owed beyond this, nothing is remembered."""
_USUAL_TURNS = 2000
"""So many turns are remembered of the time in which no shadow runs."""
_MEMORY_S = 0.5

Counts = Callable[[], tuple[int, int]]
"""Nanoseconds that a thread has waited for a core, and how often it got one."""


class Turns:
    """What the kernel counts for one thread of this process; no waits where it counts none."""

    def __init__(self, thread: int) -> None:
        self._last = (0, 0)
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def __call__(self) -> tuple[int, int]:
        """The counts now."""
        file = self._file
        if file is not None:
            with contextlib.suppress(OSError, ValueError):
                _, waited, turns = os.pread(file, 96, 0).split()
                self._last = int(waited), int(turns)
        return self._last

    def close(self) -> None:
        """Count no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Usual:
    """What a thread waits on average, for each time that it gets a core: of its last turns."""

    def __init__(self) -> None:
        self.mean_ns = self._waited_ns = self._turns = 0.0

    def add(self, waited_ns: int, turns: int) -> None:
        self._waited_ns += waited_ns
        self._turns += turns
        if self._turns > _USUAL_TURNS:
            self._waited_ns *= _USUAL_TURNS / self._turns
            self._turns = _USUAL_TURNS
        if self._turns:
            self.mean_ns = self._waited_ns / self._turns


class Pacer:
    """The account of one worker's shadows. For any thread.

    Parameters
    ----------
    counts : of the thread that answers
    clock : nanoseconds that never go back
    """

    def __init__(self, counts: Counts, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._counts, self._clock = counts, clock
        self._lock = threading.Lock()
        self._n_running = 0
        self._owed_ns = 0.0
        self._usual = _Usual()
        self._waited, self._turns = counts()
        self._at = clock()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """While a shadow runs."""
        self._book(1)
        try:
            yield
        finally:
            self._book(-1)

    @property
    def is_owing(self) -> bool:
        """Whether no shadow should run now."""
        return self._book(0) > 0

    def _book(self, n_more: int) -> float:
        with self._lock:
            (waited, turns), at = self._counts(), self._clock()
            owed = self._owed_ns
            owed -= (turns - self._turns) * ALLOWED_NS + (at - self._at) * ALLOWED_SHARE
            if self._n_running:
                owed += waited - self._waited - (turns - self._turns) * self._usual.mean_ns
            else:
                self._usual.add(waited - self._waited, turns - self._turns)
            self._owed_ns = owed = min(max(owed, -SAVED_NS), OWED_NS_MAX)
            self._waited, self._turns, self._at = waited, turns, at
            self._n_running += n_more
            return owed


class Demand:
    """What is asked of one shadow, by what its copies have lately taken."""

    def __init__(self, now: float) -> None:
        self._at, self._n_before = now, 0
        self._per_s = self._cost_s = 0.0

    def ran(self, n: int, seconds: float, *, n_offered: int, now: float) -> float:
        """The share of its time that all copies would take: with 1 it just keeps up.

        Parameters
        ----------
        n, seconds : so many copies were run, which took so long
        n_offered : copies that it was ever offered
        now : seconds, by the clock that it was made with
        """
        passed_s = max(now - self._at, 1e-6)
        weight = 1 - math.exp(-passed_s / _MEMORY_S)
        self._per_s += weight * ((n_offered - self._n_before) / passed_s - self._per_s)
        if n:
            self._cost_s += (weight if self._cost_s else 1) * (seconds / n - self._cost_s)
        self._at, self._n_before = now, n_offered
        return self._per_s * self._cost_s


def give_way() -> None:
    """Let the calling thread wait for its turn when it wakes: it takes no core away (sched(7)).

    Its share of a core and its slice stay what they were: a thread that gets a core less often
    would hold the interpreter while it waits for one, and all others with it.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
