"""What one model may take of a worker: who is refused before any work is done.

Counted on the loop, per worker. A model that is heavy or popular fills its own share, not that of
its neighbours.
"""

from typing import TypedDict

from gateway.config import ServerConfig
from gateway.errors import ModelBusyError, TooLargeError
from registry.routes import Batch, Limits, Route


class Gate:
    """Requests of one model that are under way. It outlives revisions; its limits do not."""

    __slots__ = ("inflight", "model")

    def __init__(self, model: str) -> None:
        self.model = model
        self.inflight = 0

    def enter(self, limits: Limits) -> None:
        """Let a request in; whoever was let in must leave.

        Raises
        ------
        ModelBusyError : as many are under way as may be.
        """
        if limits.inflight_max is not None and self.inflight >= limits.inflight_max:
            raise ModelBusyError(self.model, limits.inflight_max)
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
