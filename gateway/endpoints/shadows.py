"""Shadows over HTTP: give a version copies, take them away, and what came of comparing."""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.labels import targets
from gateway.endpoints.revisions import Door, Handlers, declared
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object, query
from gateway.errors import BadRequestError, ChangeRefusedError
from gateway.labels import PredictionLog, StoreError
from gateway.labels.rows import Joined
from gateway.prediction import DataPlane
from gateway.shadow.report import report
from registry import changes, names, routes
from registry.revisions import ModelState
from registry.routes import RouteError, Shadow

_ROWS_MAX = 200_000
_LABELS_S = 30 * 86_400.0
"""Labels of predictions that are older are not looked at."""
_CHANGE = ("message", "force", "take_over")


class _Handlers(Handlers):
    """What each path does."""

    def __init__(self, plane: DataPlane, door: Door, log: PredictionLog | None) -> None:
        super().__init__(plane, door)
        self._log = log

    async def report(self, request: Request) -> Response:
        """Every shadow of a model, with its verdict."""
        query(request)
        model = self._plane.table.model(request.path_params["model"]).name
        head = await self.door.read(lambda revisions: revisions.head())
        state = head.models.get(model, ModelState())
        target = targets(self._plane).get(model)
        log, since = self._log, time.time() - _LABELS_S

        def read() -> list[dict[str, Any]]:
            joined: list[Joined] = []
            known = target if log is not None else None
            if log is not None and target is not None:
                try:
                    joined = log.store.joined(model, since=since, rows_max=_ROWS_MAX)
                except StoreError:
                    known = None  # The rest of the report is none the worse.
            return report(self.door.state_path, model, state, joined=joined, target=known)

        return JSONAnswer({"model": model, "shadows": await asyncio.to_thread(read)})

    async def start(self, request: Request) -> Response:
        """Copies for a version."""
        given = await json_object(request)
        more = {name: given.pop(name) for name in _CHANGE if name in given}
        to = request.path_params["to"]
        if "to" in given and str(given["to"]) != to:
            raise BadRequestError("'to' must be the one of the path, or left out")
        number = names.version(to)
        shadow, problems = routes.read_part(Shadow, {**given, "to": number or to}, "shadow")
        if shadow is None or problems:
            raise ChangeRefusedError(str(RouteError(*problems)))
        change = changes.PutShadow(request.path_params["model"], shadow)
        return await self.changed(request, more, lambda _: change)

    async def stop(self, request: Request) -> Response:
        """No copies any more."""
        model, to = request.path_params["model"], request.path_params["to"]
        return await self.changed(request, {}, lambda _: changes.DeleteShadow(model, to))


def endpoints(plane: DataPlane, door: Door, log: PredictionLog | None) -> list[Endpoint]:
    """Everything about shadows; `log` is None where no predictions are kept."""
    h = _Handlers(plane, door, log)
    one = "/admin/models/{model}/shadows/{to}"
    return [
        Endpoint("GET", "/drift/{model}/shadows", "monitor", h.report,
                 "What shadows said to the same requests, each with a verdict.",
                 answer="Shadows"),
        declared("PUT", one, h.start, "Give a version copies of a model's requests.",
                 "ShadowRequest"),
        declared("DELETE", one, h.stop, "Give it no more."),
    ]  # fmt: skip
