"""What every HTTP endpoint shares: a route with its scope, JSON answers, and errors as JSON."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from gateway.access import SCOPES, Access, Caller, Scope
from gateway.errors import (
    BadRequestError,
    ClientGoneError,
    GatewayError,
    MethodError,
    NotFoundError,
    TooLargeError,
    UnauthenticatedError,
    shown,
)
from gateway.telemetry import event

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Raw:
    """A handler that speaks ASGI itself, such as a prediction: it answers its own errors."""

    app: ASGIApp


CALLER = "driftgate.caller"
"""Where in the scope of a request it is said who asks; predictions: not there for `ANYBODY`."""
_BODY_BYTES_MAX = 64 * 1024
_QUERY_MAX = 1024


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path and verb."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    scope: Scope
    handler: Handler | Raw
    summary: str
    query: tuple[str, ...] = ()
    """Names of the query's parameters."""
    headers: tuple[str, ...] = ()
    """Names of headers that mean something here only."""
    body: str | None = None
    """What it takes, by its name in `openapi.CONTENTS`; None: nothing."""
    answer: str = "Any"
    """What it answers, by its name there."""
    status: int = 200
    """Of an answer that is no error."""


class JSONAnswer(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of it; NaN becomes null."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def routes(endpoints: list[Endpoint], access: Access) -> list[Route]:
    """One starlette route per path, with all of its verbs; the first of two equal ones counts.

    Raises
    ------
    ValueError : an endpoint whose scope is none; nothing is served that nobody guards.
    """
    by_path: dict[str, dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        if endpoint.scope not in SCOPES:
            raise ValueError(f"{endpoint.path}: no scope {endpoint.scope!r}")
        by_path.setdefault(endpoint.path, {}).setdefault(endpoint.method, endpoint)
    return [_route(path, verbs, access) for path, verbs in by_path.items()]


def caller_of(request: Request) -> Caller:
    """Who asks, as the guard of the route found."""
    caller: Caller = request.scope[CALLER]
    return caller


def _route(path: str, verbs: Mapping[str, Endpoint], access: Access) -> Route:
    async def answer(request: Request) -> Response:
        endpoint = _endpoint(verbs, request.method)
        if endpoint is None or isinstance(endpoint.handler, Raw):
            return error_answer(MethodError(request.method, sorted(verbs)))
        try:
            headers = dict(request.scope["headers"])
            request.scope[CALLER] = access.guard(endpoint.scope, request.method, headers)
            return await endpoint.handler(request)
        except GatewayError as error:
            return error_answer(error)
        except Exception:  # noqa: BLE001  no trace may reach a client
            event("request_failed", logging.ERROR, path=path, exc=True)
            return error_answer(GatewayError("internal error; the server's log says more"))

    has_raw = any(isinstance(endpoint.handler, Raw) for endpoint in verbs.values())
    route = Route(path, _Either(verbs, answer, access) if has_raw else answer)
    # Every verb comes here, also those starlette has no list for: it would know no better than 405.
    route.methods = None
    return route


def _endpoint(verbs: Mapping[str, Endpoint], method: str) -> Endpoint | None:
    return verbs.get("GET" if method == "HEAD" else method)


class _Either:
    """A path whose verbs are raw or not. No function, so that starlette takes it as ASGI."""

    def __init__(self, verbs: Mapping[str, Endpoint], answer: Handler, access: Access) -> None:
        self._verbs = verbs
        self._answer = answer
        self._access = access

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        endpoint = _endpoint(self._verbs, scope["method"])
        if endpoint is not None and isinstance(endpoint.handler, Raw):
            try:
                headers = dict(scope["headers"])
                scope[CALLER] = self._access.guard(endpoint.scope, scope["method"], headers)
            except GatewayError as error:
                response = error_answer(error)
            else:
                await endpoint.handler.app(scope, receive, send)
                return
        else:
            response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)


def error_answer(error: GatewayError) -> Response:
    """`{"error": sentence, "code": stable code}` with the status of the error."""
    return Response(
        error_body(error),
        status_code=error.status,
        headers=error_headers(error),
        media_type="application/json",
    )


def error_body(error: GatewayError) -> bytes:
    """The JSON of an error."""
    return orjson.dumps({"error": str(error), "code": error.code})


def error_headers(error: GatewayError) -> dict[str, str]:
    """Headers that go with an error."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, MethodError):
        headers["allow"] = ", ".join(error.allowed)
    if isinstance(error, TooLargeError):
        headers["connection"] = "close"
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = "Bearer"
    return headers


async def no_such_path(request: Request, error: Exception) -> Response:
    """Starlette's own errors, in our words."""
    if isinstance(error, HTTPException) and error.status_code == 404:
        path = shown(request.scope["path"])
        return error_answer(NotFoundError(f"no such path: {path}; see /v2, /drift, /metrics"))
    return error_answer(GatewayError("internal error; the server's log says more"))


def query(request: Request, *known: str) -> dict[str, str]:
    """The query's parameters.

    Raises
    ------
    BadRequestError : one that this path does not know, or one given twice.
    """
    given: dict[str, str] = {}
    if len(request.scope["query_string"]) > _QUERY_MAX:
        raise BadRequestError(f"the query is longer than {_QUERY_MAX} bytes")
    for name, value in request.query_params.multi_items():
        if name not in known:
            takes = ", ".join(known) or "none"
            raise BadRequestError(f"no query parameter {shown(name)} here; there are: {takes}")
        if name in given:
            raise BadRequestError(f"query parameter {name!r} is given twice")
        given[name] = value
    return given


async def json_object(request: Request) -> dict[str, Any]:
    """A small JSON object as body; no body at all is an empty one.

    Raises
    ------
    BadRequestError, TooLargeError, ClientGoneError
    """
    body = await body_bytes(request, _BODY_BYTES_MAX)
    try:
        value = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequestError("the body must be a JSON object")
    return value


async def body_bytes(request: Request, bytes_max: int) -> bytes:
    """The body, if it is not too long.

    Raises
    ------
    TooLargeError, ClientGoneError
    """
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > bytes_max:
                raise TooLargeError(f"the body is longer than {bytes_max} bytes")
    except ClientDisconnect:
        raise ClientGoneError("the client hung up") from None
    return body
