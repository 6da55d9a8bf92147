"""The hot path: one prediction, bytes in, bytes out, the same for every carrier."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway.config import ServerConfig
from gateway.errors import ClientGoneError, GatewayError, NotReadyError
from gateway.protocol import v2_json
from gateway.protocol.call import bind, choose, n_rows
from gateway.router import Meters, Table, Variant
from gateway.tap import Observation, Tap
from gateway.telemetry import Telemetry
from gateway.tensors import Array, n_bytes

Gone = Callable[[], Awaitable[None]]
"""Returns when the client has hung up."""


@dataclass(slots=True)
class Head:
    """What came beside the body."""

    model: str
    version: str | None
    timeout_s: float | None
    gone: Gone


class DataPlane:
    """What the hot path reads. Its table is replaced as a whole, never changed."""

    def __init__(self, config: ServerConfig, telemetry: Telemetry, tap: Tap) -> None:
        self.config = config
        self.telemetry = telemetry
        self.tap = tap
        self.table = Table()
        self.is_ready = False
        self.open_version: Callable[[str, int], Awaitable[Variant]] | None = None
        """Opens a version that is in the registry but not in the table."""
        self.timeout_s = config.limits.timeout_s
        self.sample = config.monitor.sample / 100
        self._pinned: dict[tuple[str, int], Meters] = {}

    def pinned(self, variant: Variant) -> Meters:
        """Counts of calls by number; the series exist from the first such call on."""
        key = (variant.model, variant.version)
        if (meters := self._pinned.get(key)) is None:
            meters = Meters(self.telemetry, *key, str(variant.version), "pinned")
            self._pinned[key] = meters
        return meters


async def infer(plane: DataPlane, head: Head, body: bytes, start: float) -> bytes:
    """One prediction: decode, pick a variant, bind, batch, run, observe, encode.

    Parameters
    ----------
    start : `time.perf_counter()` when the request was first seen

    Raises
    ------
    GatewayError : what the client is told instead of an answer.
    """
    table = plane.table  # Read once: a request sees one state of things from start to end.
    variant = table.model(head.model).pick(head.version)
    if isinstance(variant, int):
        variant = await _opened(plane, head.model, variant)
    meters = variant.meters if head.version is None else plane.pinned(variant)
    try:
        call = v2_json.decode(body)
        signature = variant.signature
        inputs = bind(call, signature, variant.model)
        chosen = choose(call, signature, variant.model)
        rows = n_rows(inputs, signature, variant.model) if signature.has_row_axis else _size(inputs)
        timeout_s = plane.timeout_s
        for asked_s in (call.timeout_s, head.timeout_s):
            if asked_s is not None and asked_s < timeout_s:
                timeout_s = asked_s
        queue = variant.queue
        future = queue.submit(inputs, rows, timeout_s)
        outputs = await (_unless_gone(future, head.gone) if queue.is_busy else future)
    except GatewayError as error:
        meters.failed(error.code).add()
        raise
    if plane.sample >= 1 or random.random() < plane.sample:  # noqa: S311  a sample, no secret
        size = variant.row_bytes * rows or n_bytes(inputs) + n_bytes(outputs)
        observation = Observation(variant.model, variant.version, inputs, outputs, rows, size)
        plane.tap.offer(observation, variant.tap_dropped)  # Never waits: drops when full.
    answer = v2_json.encode(variant.answer_head, call, signature, outputs, chosen)
    meters.ok.add()
    meters.seconds.observe(time.perf_counter() - start)
    return answer


def _size(inputs: list[Array]) -> int:
    """Rows of a request to a model without a common row axis: what its first tensor shows."""
    return inputs[0].shape[0] if inputs[0].ndim else 1


async def _opened(plane: DataPlane, model: str, version: int) -> Variant:
    if plane.open_version is None:
        raise NotReadyError(f"model {model!r} version {version} is not open")
    return await plane.open_version(model, version)


async def _unless_gone(future: "asyncio.Future[list[Array]]", gone: Gone) -> list[Array]:
    """The future's result; when the client hangs up first, the rows are dropped."""
    watcher = asyncio.ensure_future(gone())
    watcher.add_done_callback(lambda done: done.cancelled() or future.cancel())
    try:
        return await future
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            raise ClientGoneError("the client hung up") from None
        future.cancel()
        raise
    finally:
        watcher.cancel()
