"""What labels say about versions and variants."""

import asyncio
import math
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.labels import targets
from gateway.endpoints.monitor import version_of
from gateway.endpoints.route import Endpoint, JSONAnswer, query
from gateway.errors import BadRequestError, LabelsOffError, NotFoundError, StorageError, shown
from gateway.labels import PredictionLog, StoreError
from gateway.labels.report import Kept, outcomes_of, performance_of
from gateway.prediction import DataPlane

_DAYS = 30.0
_ROWS_MAX = 200_000
"""The newest; each is read, so more would keep a core busy for long."""


def endpoints(plane: DataPlane, log: PredictionLog | None) -> list[Endpoint]:
    """Performance of a version, and outcomes of a model's variants."""

    async def performance(request: Request) -> Response:
        given = query(request, "version", "days")
        name = request.path_params["model"]
        version = version_of(plane, name, given.get("version"))
        since = _since(given.get("days"))
        target = targets(plane)[name]
        if target is None:
            raise NotFoundError(f"model {name!r} has no output that a label could be compared with")

        def read(kept: PredictionLog) -> dict[str, Any]:
            joined = kept.store.joined(name, version, since=since, rows_max=_ROWS_MAX)
            rows = kept.store.outputs(name, version, since=since, rows_max=_ROWS_MAX)
            return performance_of(joined, [Kept(*row) for row in rows], target)

        found = await _read(read)
        return JSONAnswer({"model": name, "version": version, "since": since, **found})

    async def outcomes(request: Request) -> Response:
        given = query(request, "days", "control")
        name = plane.table.model(request.path_params["model"]).name
        since = _since(given.get("days"))
        found = await _read(
            lambda kept: outcomes_of(
                kept.store.joined(name, since=since, rows_max=_ROWS_MAX),
                given.get("control", "champion"),
            )
        )
        return JSONAnswer({"model": name, "since": since, **found})

    async def _read(question: Any) -> dict[str, Any]:
        if log is None:
            raise LabelsOffError
        try:
            found: dict[str, Any] = await asyncio.to_thread(question, log)
        except StoreError:
            raise StorageError("labels cannot be read now") from None
        return found

    return [
        Endpoint("GET", "/drift/{model}/performance", "monitor", performance,
                 "How right a version was, by its labels, and how right it should be.",
                 query=("version", "days"), answer="Performance"),
        Endpoint("GET", "/drift/{model}/outcomes", "monitor", outcomes,
                 "Labels by variant, each against the control.",
                 query=("days", "control"), answer="Outcomes"),
    ]  # fmt: skip


def _since(text: str | None) -> float:
    try:
        days = _DAYS if text is None else float(text)
    except ValueError:
        days = math.nan
    if not 0 < days <= 3650:
        raise BadRequestError(f"days = {shown(text)}: must be above 0, up to 3650")
    return time.time() - days * 86_400
