"""What a route would do: with one request (explain), or with captured ones (simulate).

Nothing is executed.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway.capture import reading
from gateway.endpoints.revisions import Door
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object
from gateway.errors import BadRequestError, ChangeRefusedError, shown
from gateway.prediction import DataPlane, Head, pick
from gateway.protocol import v2_json
from gateway.router import Decision, Routing, Variant
from gateway.simulation import Way, simulate
from registry import changes, routes
from registry.revisions import ModelState

_REST_S = 0.0005
"""Pauses between records: predictions share the interpreter with this."""

_BYTES_MAX = 64 * 1024 * 1024
"""Of captures that are read for one answer, the newest: more takes a command, and its own time."""


def endpoints(plane: DataPlane, door: Door, captures: Path) -> list[Endpoint]:
    """Both paths.

    Parameters
    ----------
    captures : where the captures of the host are
    """

    async def explain(request: Request) -> Response:
        given = await json_object(request)
        headers = given.get("headers", {})
        if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
            raise BadRequestError("'headers' must be an object of texts")
        if unknown := set(given) - {"headers", "request"}:
            raise BadRequestError(f"{min(unknown)!r}: only 'headers' and 'request' are read")
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        head = Head(request.path_params["model"], None, None, None, headers=pairs)
        head.wanted = dict(pairs).get(b"x-driftgate-version")
        call = None
        if "request" in given:
            call = v2_json.decode(orjson.dumps(given["request"]))
        model = plane.table.model(request.path_params["model"])
        picked, decision = pick(model, head, call)
        _divert(plane, head, model.routing, picked, decision)
        said = dict(part.split("=", 1) for part in head.decision.decode().split("; "))
        is_open = isinstance(picked, Variant)
        return JSONAnswer({"decision": said, "is_open": is_open})

    async def simulated(request: Request) -> Response:
        given, model = await json_object(request), request.path_params["model"]
        if unknown := set(given) - {"route", "capture"}:
            raise BadRequestError(f"{shown(min(unknown))}: only 'route' and 'capture' are read")
        what = given.get("capture", "last-24h")
        if not isinstance(what, str):
            raise BadRequestError("'capture' must be a text: last-24h, all, or the name of a file")
        try:
            route = routes.parse_one(model, given.get("route"))
        except routes.RouteError as error:
            raise ChangeRefusedError(str(error)) from None
        # Whatever a change would refuse is refused here too; whose split it is matters not yet.
        would = await door.change(
            lambda _: changes.PutRoute(model, route),
            actor="", via="http", dry_run=True, force=True, take_over=True,
        )  # fmt: skip
        head = await door.read(lambda revisions: revisions.head())
        states = [revision.models.get(model, ModelState()) for revision in (head, would.revision)]
        return JSONAnswer(await asyncio.to_thread(_simulated, captures, what, model, states))

    return [
        Endpoint("POST", "/admin/routes/{model}/explain", "admin", explain,
                 "Who would answer a request, and why; nothing is executed.",
                 body="ExplainRequest", answer="Explained"),
        Endpoint("POST", "/admin/routes/{model}/simulate", "admin", simulated,
                 "What another route would make of captured requests; nothing is executed.",
                 body="SimulateRequest", answer="Simulated"),
    ]  # fmt: skip


def _simulated(
    captures: Path, what: str, model: str, states: Sequence[ModelState]
) -> dict[str, object]:
    found = reading.find(what, captures, model).newest(_BYTES_MAX)
    before, after = (Way(model, state) for state in states)
    made = simulate(found, before, after, rest=lambda: time.sleep(_REST_S))
    return {**made.document(), "passed_over": found.said()}


def _divert(
    plane: DataPlane,
    head: Head,
    routing: Routing | None,
    picked: Variant | int,
    decision: Decision | None,
) -> None:
    """Say who is asked instead of a variant whose breaker is open in this worker."""
    if routing is None or decision is None or not isinstance(picked, Variant):
        return
    variants = partial(plane.variants, picked.model)
    if other := plane.breakers.diverted(routing, picked, decision, variants):
        head.decision = other.decision.header
