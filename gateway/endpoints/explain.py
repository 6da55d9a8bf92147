"""`POST /admin/routes/{model}/explain`: who would answer, and why. Nothing is executed."""

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.route import Endpoint, JSONAnswer, json_object
from gateway.errors import BadRequestError
from gateway.prediction import DataPlane, Head, pick
from gateway.protocol import v2_json
from gateway.router import Variant


def endpoints(plane: DataPlane) -> list[Endpoint]:
    """The one path."""

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
        picked, _ = pick(model, head, call)
        said = dict(part.split("=", 1) for part in head.decision.decode().split("; "))
        is_open = isinstance(picked, Variant)
        return JSONAnswer({"decision": said, "is_open": is_open})

    return [
        Endpoint("POST", "/admin/routes/{model}/explain", "admin", explain,
                 "Who would answer a request, and why; nothing is executed.",
                 body="ExplainRequest", answer="Explained"),
    ]  # fmt: skip
