"""`POST /labels`: ground truth, by prediction id."""

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gateway.endpoints.route import Endpoint, JSONAnswer, query
from gateway.errors import (
    ClientGoneError,
    ConfigError,
    LabelsOffError,
    MediaTypeError,
    StorageError,
    TooLargeError,
    shown,
)
from gateway.labels import PredictionLog, StoreError
from gateway.labels.reading import REASONS, Given, Summary, need_lookup, place, read
from gateway.labels.rows import Verdict
from gateway.labels.target import Target
from gateway.labels.target import of as target_of
from gateway.prediction import DataPlane
from gateway.telemetry import LABELS, Telemetry
from registry import monitoring

_BODY_BYTES_MAX = 16 * 1024 * 1024
_AT_A_TIME = 2
"""Requests whose labels are held in memory; others wait with their body unread."""
_TYPES = {
    "": "application/json",
    "application/json": "application/json",
    "text/csv": "text/csv",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
}


def endpoints(plane: DataPlane, log: PredictionLog | None, telemetry: Telemetry) -> list[Endpoint]:
    """The one path; `log` is None where no predictions are kept."""
    counters = {verdict: telemetry.counter(LABELS, verdict) for verdict in Summary().counts}
    turns = asyncio.Semaphore(_AT_A_TIME)

    async def labels(request: Request) -> Response:
        default = query(request, "model").get("model")
        if log is None:
            raise LabelsOffError
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _TYPES:
            raise MediaTypeError(
                f"content-type {shown(kind)} is not read here; send application/json, text/csv or"
                " application/msgpack"
            )
        async with turns:
            body = await _body(request, min(plane.config.limits.json_bytes_max, _BODY_BYTES_MAX))
            given = await asyncio.to_thread(read, body, _TYPES[kind])
            if default is not None:
                given = [
                    entry if entry.model is not None
                    else Given(entry.id, entry.label, default, entry.is_text)
                    for entry in given
                ]  # fmt: skip
            try:
                summary = await _take(log, given, targets(plane))
            except StoreError:
                raise StorageError(
                    "labels cannot be stored now, none was; send them again"
                ) from None
        for verdict, n in summary.counts.items():
            counters[verdict].add(n)
        return JSONAnswer(summary.to_dict())

    return [
        Endpoint("POST", "/labels", "predict", labels, "What turned out to be true.",
                 query=("model",), body="LabelsRequest", answer="LabelsAnswer"),
    ]  # fmt: skip


async def _take(
    log: PredictionLog, given: list[Given], models: Mapping[str, Target | None]
) -> Summary:
    """Store labels; what became of them."""
    summary = Summary()
    lookup = need_lookup(given)
    rows_of = await log.rows_of(lookup) if lookup else {}
    placed = await asyncio.to_thread(lambda: place(given, summary, models=models, rows_of=rows_of))
    if placed:
        verdicts: list[Verdict] = await log.label([entry.label for entry in placed])
        for entry, verdict in zip(placed, verdicts, strict=True):
            if verdict in REASONS:
                summary.tell(entry.at, entry.id, verdict, REASONS[verdict])
            else:
                summary.add(verdict)
    return summary


def targets(plane: DataPlane) -> dict[str, Target | None]:
    """What labels of each model that is served are compared with."""
    found: dict[str, Target | None] = {}
    for model in plane.table.models.values():
        found[model.name] = None
        if model.champion is not None:
            try:
                declared = monitoring.target(model.monitoring)
                found[model.name] = target_of(model.champion.signature, declared)
            except ConfigError:
                continue
    return found


async def _body(request: Request, bytes_max: int) -> bytes:
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > bytes_max:
                raise TooLargeError(f"the body is longer than {bytes_max} bytes")
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGoneError("the client hung up") from None
    return b"".join(chunks)
