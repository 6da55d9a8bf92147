"""What labels say about versions and variants."""

import asyncio
import math
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.labels import targets
from gateway.endpoints.monitor import version_of
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object, query
from gateway.errors import BadRequestError, LabelsOffError, NotFoundError, StorageError, shown
from gateway.labelling import Labelling
from gateway.labels import PredictionLog, StoreError
from gateway.labels.report import Kept, outcomes_of, performance_of
from gateway.prediction import DataPlane

_DAYS = 30.0
_ROWS_MAX = 200_000
"""The newest; each is read, so more would keep a core busy for long."""


def endpoints(
    plane: DataPlane, log: PredictionLog | None, labelling: Labelling | None
) -> list[Endpoint]:
    """Performance of a version, and outcomes of a model's variants."""

    async def performance(request: Request) -> Response:
        given = query(request, "version", "days")
        name = request.path_params["model"]
        version = version_of(plane, name, given.get("version"))
        since = _since(given.get("days"))
        target = targets(plane)[name]
        if target is None:
            raise NotFoundError(f"model {name!r} has no output that a label could be compared with")

        view = labelling.view(name, version) if labelling is not None else None

        def read(kept: PredictionLog) -> dict[str, Any]:
            joined = kept.store.joined(name, version, since=since, rows_max=_ROWS_MAX)
            rows = kept.store.outputs(name, version, since=since, rows_max=_ROWS_MAX)
            calibration = view.calibration if view is not None else None
            return performance_of(joined, [Kept(*row) for row in rows], target, calibration)

        found = await _read(read)
        judged = view.about if view is not None else None
        return JSONAnswer(
            {"model": name, "version": version, "since": since, **found, "judged": judged}
        )

    async def accept(request: Request) -> Response:
        return JSONAnswer(await _accepted(labelling, *await _cohort(plane, request)))

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
        Endpoint("POST", "/admin/models/{model}/labels/accept", "admin", accept,
                 "Let labelled predictions be what later labels are compared with.",
                 body="LabelsAcceptRequest", answer="Accepted"),
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


async def _accepted(
    labelling: Labelling | None, model: str, version: int, days: float
) -> dict[str, Any]:
    if labelling is None:
        raise LabelsOffError
    try:
        return await labelling.judge.accept(model, version, days)
    except StoreError:
        raise StorageError("labels cannot be read or written now") from None


async def _cohort(plane: DataPlane, request: Request) -> tuple[str, int, float]:
    """Model, version and days of a request to accept a cohort."""
    given = await json_object(request)
    name = request.path_params["model"]
    if unknown := next((field for field in given if field not in ("version", "days")), None):
        raise BadRequestError(f"no field {shown(unknown)} here; there are: version, days")
    asked, days = given.get("version"), given.get("days", _DAYS)
    if asked is not None and type(asked) is not int:
        raise BadRequestError(f"version = {shown(asked)}: must be a number")
    version = version_of(plane, name, None if asked is None else str(asked))
    if isinstance(days, bool) or not isinstance(days, int | float):
        raise BadRequestError(f"days = {shown(days)}: must be a number")
    _since(str(days))
    return name, version, float(days)
