"""What one model, and one caller of it, may take of a worker: who is refused before any work.

Counted on the loop. A model that is heavy or popular fills its own share, not that of its
neighbours. Each worker counts what is under way for itself, rates are those of all of a host.
"""

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict

from gateway.config import ServerConfig
from gateway.errors import ModelBusyError, RateLimitedError, TooLargeError
from registry.routes import Batch, Limits, Route

RATES_FILE = "rates.1"
"""In the run directory; the number is that of its format."""
_PLACES = 16_384
"""Pairs of a model and a caller that have a bucket of their own; beyond, some share one."""
_NS = 1_000_000_000


class Rates:
    """Token buckets by model and caller: each fills at a rate up to its size, a request takes one.

    A bucket is the time at which it would be full, in a cell of a mapped file: nothing has to run
    to fill it, and every worker of the host sees at once what the others have let in. Two that take
    at the very same microsecond may both get the last token. Without a file (disk full, read-only)
    each worker counts for itself.

    Cells: for each place a hash of who has it, and nanoseconds of `time.monotonic`, which all
    processes of a host share.
    """

    def __init__(
        self, path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._places: dict[tuple[str, str], int] = {}
        self._cells = memoryview(bytearray(16 * _PLACES)).cast("q")
        self._lock: int | None = None
        if path is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.posix_fallocate(self._lock, 0, 16 * _PLACES)
                self._cells = memoryview(mmap.mmap(self._lock, 16 * _PLACES)).cast("q")

    def take(self, model: str, caller: str, rate_per_s: float, size: float) -> float:
        """Take a token; 0 when there was one, else the seconds until there is.

        Parameters
        ----------
        size : tokens of a full bucket, at least 1
        """
        at = self._places.get((model, caller))
        if at is None:
            at = self._places[model, caller] = self._place(f"{model}\0{caller}")
        now = self._clock()
        full_at = max(self._cells[at] / _NS, now)
        if full_at > now + size / rate_per_s:
            # Emptier than empty: the file is older than the machine's last start, or another route
            # allowed more.
            full_at = now + size / rate_per_s
            self._cells[at] = int(full_at * _NS)
        wait_s = full_at - now - (size - 1) / rate_per_s
        if wait_s > 1e-8:
            return wait_s
        self._cells[at] = int((full_at + 1 / rate_per_s) * _NS)
        return 0.0

    def _place(self, who: str) -> int:
        """The cell of a bucket; who has none yet takes the next one that is free."""
        mark = (
            int.from_bytes(blake2b(who.encode(), digest_size=8).digest(), "big", signed=True) or 1
        )
        first, cells = mark % _PLACES, self._cells
        with self._locked():
            for k in range(_PLACES):
                at = 2 * ((first + k) % _PLACES)
                if cells[at] in (0, mark):
                    cells[at] = mark
                    return at + 1
        return 2 * first + 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock is None:
            yield
            return
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


class Gate:
    """Requests of one model. It outlives revisions; its limits do not."""

    __slots__ = ("_rates", "inflight", "model")

    def __init__(self, model: str, rates: Rates) -> None:
        self.model = model
        self.inflight = 0
        self._rates = rates

    def enter(self, limits: Limits, caller: str = "anybody") -> None:
        """Let a request in; whoever was let in must leave.

        Parameters
        ----------
        caller : whose rate it counts for

        Raises
        ------
        ModelBusyError : as many are under way as may be.
        RateLimitedError : the caller has made as many as it may, with the time until the next.
        """
        if limits.inflight_max is not None and self.inflight >= limits.inflight_max:
            raise ModelBusyError(self.model, limits.inflight_max)
        if (rate_per_s := limits.rate_per_s_max) is not None:
            size = max(limits.burst_max or rate_per_s, 1.0)
            wait_s = self._rates.take(self.model, caller, rate_per_s, size)
            if wait_s:
                raise RateLimitedError(self.model, caller, rate_per_s, wait_s)
        self.inflight += 1

    def leave(self) -> None:
        """A request has ended, however it did."""
        self.inflight -= 1


def refuse_rows(model: str, rows: int, rows_max: int | None) -> None:
    """Refuse a request of more rows than the model's route allows.

    Raises
    ------
    TooLargeError : with both numbers.
    """
    if rows_max is not None and rows > rows_max:
        raise TooLargeError(
            f"model {model!r}: {rows} rows in one request; its route allows {rows_max}"
            " (limits.rows_max)"
        )


class BatchLimits(TypedDict):
    """What a route may say of one model's batches and queues."""

    rows_max: int
    wait_s_max: float
    queue_rows_max: int


def batch_limits(config: ServerConfig, route: Route | None) -> BatchLimits:
    """The route over the settings, each part by itself."""
    batch = (route and route.batch) or Batch()
    limits = (route and route.limits) or Limits()
    rows_max, wait_s_max = batch.rows_max, batch.wait_s_max
    queue_rows_max = limits.queue_rows_max
    return BatchLimits(
        rows_max=config.batch.rows_max if rows_max is None else rows_max,
        wait_s_max=config.batch.wait_s_max if wait_s_max is None else wait_s_max,
        queue_rows_max=config.limits.queue_rows_max if queue_rows_max is None else queue_rows_max,
    )
