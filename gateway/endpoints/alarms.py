"""Alarms as episodes: what is open, and who has seen it."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.alarms import AlarmLog
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object, query
from gateway.errors import BadRequestError, NotFoundError, shown

_NOTE_CHARS_MAX = 500


def endpoints(log: AlarmLog) -> list[Endpoint]:
    """The list, and acknowledgement."""

    async def listed(request: Request) -> Response:
        model = query(request, "model").get("model")
        episodes = await asyncio.to_thread(log.episodes)
        found = [e.to_dict() for e in episodes if model is None or e.model == model]
        return JSONAnswer({"alarms": found})

    async def acknowledge(request: Request) -> Response:
        given = await json_object(request)
        by, note = (_text(given, name) for name in ("by", "note"))
        if unknown := next((name for name in given if name not in ("by", "note")), None):
            raise BadRequestError(f"no field {shown(unknown)} here; there are: by, note")
        name = request.path_params["alarm"]
        try:
            episode = await asyncio.to_thread(log.acknowledge, name, by, note)
        except KeyError:
            raise NotFoundError(f"no alarm {shown(name)}; see GET /alarms") from None
        return JSONAnswer(episode.to_dict())

    return [
        Endpoint("GET", "/alarms", "monitor", listed, "Alarms as episodes, the newest first.",
                 query=("model",), answer="Alarms"),
        Endpoint("POST", "/admin/alarms/{alarm}/ack", "admin", acknowledge,
                 "Say that an alarm has been seen.", body="AckRequest", answer="Alarm"),
    ]  # fmt: skip


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name, "")
    if not isinstance(value, str) or len(value) > _NOTE_CHARS_MAX or not value.isprintable():
        raise BadRequestError(
            f"{name!r} must be a printable text of up to {_NOTE_CHARS_MAX} characters"
        )
    return value
