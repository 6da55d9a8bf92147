"""What one model, and one caller of it, may take of a worker: who is refused before any work.

Counted on the loop, per worker. A model that is heavy or popular fills its own share, not that of
its neighbours. A rate is divided by the number of workers, so that all of them together never
exceed it; requests under way are counted by each worker for itself.
"""

import time
from collections.abc import Callable
from typing import TypedDict

from gateway.config import ServerConfig
from gateway.errors import ModelBusyError, RateLimitedError, TooLargeError
from registry.routes import Batch, Limits, Route

_CALLERS_MAX = 4096
"""So many are remembered before those who could start afresh are let go."""


class Rates:
    """Token buckets by caller: each fills at a rate up to its size, and a request takes one.

    A bucket is kept as the time at which it would be full: nothing needs to run to fill it.
    """

    __slots__ = ("_clock", "_full_at")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def take(self, caller: str, rate_per_s: float, size: float) -> float:
        """Take a token; seconds until there is one, and nothing is taken: 0 when there was.

        Parameters
        ----------
        size : tokens of a full bucket, at least 1
        """
        now = self._clock()
        full_at = max(self._full_at.get(caller, now), now)
        # Time that the bucket lacks to be full, beyond what may be lacking before this one.
        wait_s = full_at - now - (size - 1) / rate_per_s
        if wait_s > 1e-9:
            return wait_s
        if caller not in self._full_at and len(self._full_at) >= _CALLERS_MAX:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[caller] = full_at + 1 / rate_per_s
        return 0.0


class Gate:
    """Requests of one model. It outlives revisions; its limits do not.

    Parameters
    ----------
    workers : that share a rate
    """

    __slots__ = ("_rates", "_workers", "inflight", "model")

    def __init__(
        self, model: str, workers: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model = model
        self.inflight = 0
        self._workers = workers
        self._rates = Rates(clock)

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
        if limits.rate_per_s_max is not None:
            rate_per_s = limits.rate_per_s_max / self._workers
            size = (limits.burst_max or limits.rate_per_s_max) / self._workers
            wait_s = self._rates.take(caller, rate_per_s, max(size, 1.0))
            if wait_s:
                rate = limits.rate_per_s_max
                raise RateLimitedError(self.model, caller, rate, self._workers, wait_s)
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
